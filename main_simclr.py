"""SimCLR with multi-crop: tell crops of one image from crops of all other images of the batch.

Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual
Representations, ICML 2020, arXiv:2002.05709; with several crops as in appendix A.8 of the SwAV
paper, arXiv:2006.09882, and Khosla et al., Supervised Contrastive Learning, arXiv:2004.11362.
  Eq. 7 (SwAV)   each positive against all negatives   nt_xent
  appendix A.8   negatives of all processes            dist.all_gather_with_gradient
  section 3.2    multi-crop                            src/data/multicrop.py, src/data/augment.py

  python main_simclr.py                                    digits, a minute on two cores
  python main_simclr.py --data_path cifar10 --epochs 100   one GPU
  torchrun --nproc_per_node 8 main_simclr.py --data_path /imagenet/train --min_scale_crops 0.08 \\
      --batch_size 32 --base_lr 0.6 --final_lr 0.0006 --warmup_epochs 0 --epochs 200
                       the SwAV paper lists SimCLR of this size with 61.9 % linear (Table 3)
Starting the same command again continues where it stopped.

Deviations from Chen et al.: all but the loss is as in main_swav.py, as it is where the SwAV paper
compares the two (section 5.1): optimizer, schedule, head, crops. Two crops make their loss; of more,
a denominator holds one positive only (Eq. 7), where that of Khosla et al. holds all.
Deviations from the authors' code: that of this comparison is not published; as in main_swav.py,
photometry runs in batches on the device, in float, not on 8-bit images; images and crops depend on
(seed, epoch, index) only, photometry on (seed, epoch, iteration, rank).
Kept: normalisation with red std 0.228 (usually 0.229), so that features fit the released weights;
the schedule repeats its peak and stops short of its end.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import logging
import math

import torch
import torch.nn.functional as F

from src import dist
from src.data.augment import Augment
from src.data.datasets import EpochSampler
from src.data.multicrop import MultiCropDataset, multicrop_loader
from src.nets.resnet import build_model
from src.optim import build_optimizer, cosine_schedule
from src.run import checkpoint, flags, health, image_flags
from src.run.log import setup_logging
from src.run.run import Run, average_gradients, log_plan, place_network

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py.
SMALL = {"temperature": 0.5}


def photos(situation):
    """Defaults for photographs, beside those of src/run/presets.py."""
    return {"temperature": 0.2}


PRESETS = {
    "imagenet": {},
    "photos": photos,
    "cifar": SMALL,
    "tiny": SMALL,
}


# ============ simclr loss ============
def nt_xent(embedding: torch.Tensor, num_crops: int, temperature: float) -> torch.Tensor:
    """Tell the other crops of an image from the crops of all other images (Eq. 7).

    embedding: (M * B, D), M crops of each of the B images of this process, crop-major, L2-normalised,
    carries gradient. With s = cosine / temperature, p the M - 1 other crops of the image of crop i,
    and n its negatives, all crops of all other images of all processes, returns the mean over the
    crops i of this process and over p of - log(exp(s_ip) / (exp(s_ip) + sum_n exp(s_in))): a float32
    scalar, computed in float32. Its gradient averaged over processes, as DDP does, is that of the
    mean over all crops. There must be at least 2 crops, and 2 images over all processes.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        own = embedding.float().unflatten(0, (num_crops, -1))  # (M, B, D)
        images = dist.all_gather_with_gradient(own.transpose(0, 1))  # (W * B, M, D), by rank
        s = (own / temperature).flatten(0, 1) @ images.flatten(0, 1).t()  # (M * B, W * B * M)
        s = s.view(*own.shape[:2], *images.shape[:2])  # (M, B, W * B, M)
        same_image = s.diagonal(dist.rank() * own.shape[1], 1, 2)  # (M, M, B), a view of s
        positives = same_image.clone()
        same_image.fill_(-math.inf)  # what is left in s are the negatives
        negatives = s.flatten(2).logsumexp(2)  # (M, B)
        losses = F.softplus(negatives[:, None] - positives)  # (M, M, B)
        is_other = 1 - torch.eye(num_crops, device=s.device)  # a crop is not its own positive
        return (is_other * losses.mean(2)).sum() / is_other.sum()


# ============ one epoch ============
def train_one_epoch(run, loader, schedule, epoch, start, args):
    """One pass over the loader, from iteration `start` of the epoch on."""
    num_crops = sum(args.nmb_crops)
    for iteration, crops, _ in run.iterate(loader, epoch, start):
        for group in run.optimizer.param_groups:
            group["lr"] = float(schedule[iteration])

        # ============ multi-crop forward ============
        with run.autocast():
            embedding = run.network(crops)  # (V * B, D)

        # ============ simclr loss ============
        loss = nt_xent(embedding, num_crops, args.temperature)
        embedding = embedding.detach().unflatten(0, (num_crops, -1))  # (V, B, D)

        # ============ backward and optim step ============
        run.backward(loss)
        run.step()

        # ============ log, save, stop ============
        if run.is_log_step():
            log_progress(run, embedding, args)
        if run.save_or_stop():
            return


def log_progress(run, embedding, args):
    """Write a log line with the health of the embeddings (V, B, D)."""
    largest = embedding[: args.nmb_crops[0]].flatten(0, 1)  # crops of the first resolution
    positive, negative = pair_cosines(embedding)
    values = run.read(
        means={"embedding_std": health.embedding_std(largest)},
        own={
            "positive_cosine": positive,
            "negative_cosine": negative,
            "rankme": health.rankme(largest),
        },
    )
    num_negatives = count_negatives(args, run.global_batch)
    text = (
        f"at most {math.log(1 + num_negatives):.2f}, positives {values['positive_cosine']:.2f}, "
        f"negatives {values['negative_cosine']:.2f}, "
        f"std {values['embedding_std']:.2f}, rank {values['rankme']:.0f}"
    )
    line = run.report(values, text)
    run.diagnose(line, lambda lines: diagnose(lines, num_negatives))


@torch.no_grad()
def pair_cosines(embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cosine of pairs of crops of one image, and of pairs of crops of different images.

    embedding: (M, B, D), M >= 2 crops of B images, L2-normalised; with a process group, this process's
    images, the same number on each. All pairs of all processes count; there must be two images. From
    sums of embeddings alone: the cosines of all pairs of a set add up to |sum of the set|^2.
    """
    z = health.in_float64(embedding)
    images = z.sum(0)  # (B, D)
    # of all pairs in an image, of every crop with itself
    squares = torch.stack([images.square().sum(), z.square().sum()])
    within, selves = dist.all_reduce_sum(squares)
    everything = dist.all_reduce_sum(images.sum(0)).square().sum()
    num_crops, crops_of_image = z[..., 0].numel() * dist.world_size(), len(z)
    positive = (within - selves) / (num_crops * (crops_of_image - 1))
    negative = (everything - within) / (num_crops * (num_crops - crops_of_image))
    return positive, negative


def diagnose(history: list[dict], num_negatives: int) -> health.Trouble | None:
    """What is wrong with a run, in one sentence that names the flags that help, or None.

    history: the latest log lines, oldest first, with `loss` and `embedding_std`. num_negatives: of a
    crop. Needs 10 lines, all of them in trouble. Identical embeddings give ln(1 + num_negatives).
    """
    recent = history[-health.NUM_LINES :]
    if len(recent) < health.NUM_LINES:
        return None
    ceiling = math.log(1 + num_negatives)
    remedies = "lower --base_lr, lengthen --warmup_epochs, or lower --temperature (0.1)"
    trouble = health.same_embedding(recent, remedies)
    if trouble:
        return trouble
    if all(abs(line["loss"] - ceiling) < 1e-3 * ceiling for line in recent):
        return health.Trouble(
            "loss",
            f"the loss stays at ln(1 + {num_negatives}) = {ceiling:.3f}, what identical embeddings "
            "give; lower --temperature (0.1), or change --base_lr",
        )
    return None


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Train; returns 0 when all epochs are done, 128 + the signal when a signal stopped the run."""
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    args, dataset = image_flags.parse_args(
        get_parser(), PRESETS, argv, method="simclr", world_size=launch.world_size
    )
    image_flags.fill_in_crops(args)
    flags.check_runtime(args, launch.world_size)
    global_batch = args.batch_size * launch.world_size
    flags.check_batch(args, global_batch, len(dataset))
    check_args(args, global_batch)
    augment = Augment(**image_flags.augment_options(args, dataset, sum(args.nmb_crops)))
    torch.manual_seed(args.seed)  # every process starts from the same network
    model = build_model(args.arch, normalize=True, nmb_prototypes=0, **flags.model_options(args))
    checkpoint.check_writable(args.dump_path)
    setup_logging(args.dump_path, launch.rank == 0)
    if args.init_from:
        from src.nets.weights import load_weights

        load_weights(model, args.init_from, allow_missing=("projection_head",))

    process = dist.init(args.device, args.dist_timeout)

    # ============ data ============
    crops = MultiCropDataset(dataset, **image_flags.crop_options(args))
    sampler = EpochSampler(
        len(dataset),
        args.batch_size,
        rank=process.rank,
        world_size=process.world_size,
        seed=args.seed,
        groups=dataset.groups,
    )
    loader = multicrop_loader(crops, sampler, **flags.loader_options(args, process.device.type))

    # ============ model and optimizer ============
    model = place_network(model, process, **flags.placement_options(args))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(args.optimizer, trained, args.wd)  # appendix A.1
    run = Run(
        args,
        process,
        method="simclr",
        module=model,
        network=average_gradients(model, process),
        augment=augment,
        optimizer=optimizer,
        dataset=dataset,
        global_batch=global_batch,
        image_size=args.size_crops[0],
        num_prototypes=1 + count_negatives(args, global_batch),
    )
    factor = flags.lr_factor(args, global_batch)
    schedule = cosine_schedule(
        args.base_lr * factor,
        args.final_lr * factor,
        args.epochs,
        run.iters_per_epoch,
        warmup_epochs=args.warmup_epochs,
        start_value=args.start_warmup * factor,
    )
    log_plan(run, crops, peak_lr=args.base_lr * factor)
    log_contrast(args, global_batch)
    first_epoch, start = run.resume()
    run.begin()

    # ============ epochs ============
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch, start)
        train_one_epoch(run, loader, schedule, epoch, start, args)
        start = 0
        if run.end_epoch(epoch):
            break
    return run.leave()


def count_negatives(args, global_batch):
    """Negatives of a crop: the crops of all other images."""
    return sum(args.nmb_crops) * (global_batch - 1)


def log_contrast(args, global_batch):
    """Say what a crop is compared with."""
    num_negatives = count_negatives(args, global_batch)
    logger.info(
        f"contrast    {sum(args.nmb_crops) - 1} positives and {num_negatives:,} negatives for each crop, "
        f"temperature {args.temperature:g}; ln(1 + {num_negatives:,}) = "
        f"{math.log(1 + num_negatives):.3f} is the loss of identical embeddings"
    )


# ============ arguments ============
def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive = flags.at_least_zero, flags.positive

    add = parser.add_argument_group("method (symbols of the paper)").add_argument
    add("--temperature", type=positive(float), default=0.1, help="tau of Eq. 7")

    image_flags.add_crop_args(image_flags.add_data_args(parser, PRESETS))
    image_flags.add_augment_args(parser)
    flags.add_model_args(parser)

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=100, help="passes over the data")
    add("--batch_size", "--batch_size_per_gpu", type=positive(int), default=64,
        help="B, images per process")
    add("--optimizer", default="larc", choices=["larc", "lars", "sgd", "adamw"],
        help="larc: around SGD with momentum 0.9, as published; or another")
    add("--base_lr", type=positive(float), default=4.8, help="learning rate after the warm-up")
    add("--final_lr", type=at_least_zero(float), default=0.0, help="learning rate at the end")
    add("--start_warmup", type=at_least_zero(float), default=0.0, help="learning rate at the start")
    add("--warmup_epochs", type=at_least_zero(int), default=10, help="epochs of linear warm-up")
    add("--wd", type=at_least_zero(float), default=1e-6, help="weight decay")

    flags.add_training_args(parser)
    flags.add_runtime_args(parser)
    return parser
    # fmt: on


def check_args(args, global_batch: int) -> None:
    """Raise ValueError on arguments that do not fit together."""
    if sum(args.nmb_crops) < 2:
        raise ValueError(
            "--nmb_crops 1: the positives of a crop are other crops, so use at least 2"
        )
    if global_batch < 2:
        raise ValueError(
            f"--batch_size {args.batch_size}: a batch of {global_batch} image has no negatives, "
            "so use at least 2 images over all processes"
        )


if __name__ == "__main__":
    flags.run(main)
