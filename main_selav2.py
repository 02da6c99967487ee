"""SeLa-v2: assign all images to learned prototypes in equal shares, predict that from several crops.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by
Contrasting Cluster Assignments, NeurIPS 2020, arXiv:2006.09882, appendix D; after Asano, Rupprecht,
Vedaldi: Self-labelling via simultaneous clustering and representation learning, arXiv:1911.05371.
  Eq. 8, 10    classification of pseudo-labels    sela_loss
  Eq. 12       Sinkhorn-Knopp, shares rounded     assign_labels, src/cluster/self_label.py
  D.2          memory bank of the last epoch      src/labels/memory_bank.py
  section 3.2  multi-crop                         src/data/multicrop.py, src/data/augment.py

  python main_selav2.py                                    digits, two minutes on two cores
  python main_selav2.py --data_path cifar10 --epochs 100   one GPU
  torchrun --nproc_per_node 8 main_selav2.py --data_path /imagenet/train --nmb_crops 2 4 \\
      --size_crops 160 96 --base_lr 0.6 --final_lr 0.0006 --epochs 400
Starting the same command again continues where it stopped.

Deviations: the authors released weights, no code; what the appendix leaves open is as in SwAV (the
prototypes have norm 1 and are frozen at first; epsilon 0.05 = tau / 2, where lambda = 25 of SeLa is
tau / 25) or as in DeepCluster-v2 (one pass with the untrained network fills the memory bank
before training; head h uses crop h modulo the number of --crops_for_assign; images left out of an
epoch's last batch have no pseudo-label in the next). SeLa's own schedule of re-assignments
(--nmb_reassignments) is rounded up to whole epochs. Photometry runs in batches on the device.
Kept: normalisation with red std 0.228 (usually 0.229), so that features fit the released weights;
Sinkhorn-Knopp ends when the summed change of all images is below 0.1, as SeLa's does.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import logging
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from src import dist
from src.cluster.self_label import reassignment_epochs, self_labels
from src.data.augment import Augment
from src.data.datasets import EpochSampler
from src.data.multicrop import MultiCropDataset, multicrop_loader
from src.labels.memory_bank import MemoryBank, fill_memory
from src.labels.pseudo_labels import (
    IGNORED,
    PseudoLabels,
    loss_of_nothing,
    report_assignment,
    report_predictions,
)
from src.nets.resnet import build_model
from src.optim import build_optimizer, cosine_schedule
from src.run import checkpoint, flags, image_flags
from src.run.log import setup_logging
from src.run.run import Run, average_gradients, log_plan, place_network

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py.
SMALL = {"temperature": 0.2, "freeze_prototypes_niters": 100}


def photos(situation):
    """Defaults for photographs, beside those of src/run/presets.py."""
    return {
        "temperature": 0.1,
        "freeze_prototypes_niters": 50,
        "nmb_prototypes": [situation.clusters()] * 3,
    }


PRESETS = {
    "imagenet": {},
    "photos": photos,
    "cifar": {**SMALL, "nmb_prototypes": [100, 100, 100]},
    "tiny": {**SMALL, "nmb_prototypes": [60, 60, 60]},
}


# ============ sela-v2 loss ============
def sela_loss(scores: list[Tensor], labels: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the pseudo-labels, predicted from every crop (Eq. 8, 10).

    scores: one (V * B, K_h) for each head, crop-major, z^T c, carries gradient. labels: (heads, B),
    constants, IGNORED for images without; over all processes the same images for every head.
    Returns the mean over heads, over crops and over the images of all processes that have a label:
    each process divides by its share of their number, so that the processes' mean is that.
    """
    num_labels = dist.all_reduce_sum((labels[0] != IGNORED).sum()) / dist.world_size()
    loss = 0.0
    for s, label in zip(scores, labels, strict=True):
        num_crops = len(s) // len(label)
        logits = s.float() / temperature  # (V * B, K)
        targets = label.repeat(num_crops)  # (V * B,)
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        loss = loss + total / (num_crops * num_labels.clamp(min=1e-9)) / len(scores)
    return loss


@torch.no_grad()
def assign_labels(bank, prototypes, *, temperature, epsilon, tolerance):
    """Equal shares of all images for all prototypes by Sinkhorn-Knopp, rounded to one (Eq. 12).

    prototypes: one (K, D) for each head, rows of norm 1. Head h assigns the embeddings of the bank's
    crop h modulo their number. Returns the labels of the bank's rows, (heads, n).
    """
    assignments = []
    for head, weight in enumerate(prototypes):
        embedding = bank.embeddings[head % len(bank.embeddings)]  # (n, D)
        result = self_labels(
            embedding, weight, temperature=temperature, epsilon=epsilon, tolerance=tolerance
        )
        logger.debug(f"head {head}: {result.iterations} iterations, change {result.error:.3g}")
        assignments.append(result.labels)
    return torch.stack(assignments)


@torch.no_grad()
def normalize_prototypes(prototypes):
    """Project the prototypes back to the unit sphere: each (K, D), rows to norm 1."""
    for weight in prototypes:
        weight.copy_(F.normalize(weight, dim=1))


# ============ one epoch ============
def train_one_epoch(run, loader, schedule, bank, labels, epoch, start, args):
    """One pass over the loader, from iteration `start` of the epoch on."""
    num_crops = sum(args.nmb_crops)
    heads = prototypes_of(run.module)
    for iteration, crops, indices in run.iterate(loader, epoch, start, changed=heads):
        for group in run.optimizer.param_groups:
            group["lr"] = float(schedule[iteration])
        normalize_prototypes(heads)

        # ============ multi-crop forward ============
        with run.autocast():
            embedding, scores = run.network(crops)  # (V * B, D), (V * B, K) for each head
        embedding = embedding.detach().unflatten(0, (num_crops, -1))  # (V, B, D)
        scores = scores if len(heads) > 1 else [scores]

        # ============ sela-v2 loss ============
        targets = labels.of(indices, run.process.device)  # (heads, B)
        loss = sela_loss(scores, targets, args.temperature)
        assigned = torch.stack([embedding[crop] for crop in args.crops_for_assign])  # (crops, B, D)

        # ============ backward and optim step ============
        run.backward(loss)
        if iteration < args.freeze_prototypes_niters:
            for prototypes in heads:
                prototypes.grad = None
        if run.step():
            bank.push(indices, assigned)

        # ============ log, save, stop ============
        if run.is_log_step():
            report_predictions(
                run,
                logits=scores[0] / args.temperature,
                labels=targets[0],
                embedding=assigned.flatten(0, 1),
                ceiling=loss_of_nothing(args.nmb_prototypes),
                prototypes=heads,
            )
        if run.save_or_stop():
            return


def assign_memory(run, bank, labels, truth, epoch, args):
    """The assignment phase: new pseudo-labels for `epoch` and those that follow."""
    began = time.perf_counter()
    heads = prototypes_of(run.module)
    normalize_prototypes(heads)
    assignments = assign_labels(
        bank,
        heads,
        temperature=args.temperature,
        epsilon=args.epsilon,
        tolerance=args.sinkhorn_tolerance,
    )
    assignments[:, ~bank.has_embedding] = IGNORED
    before = labels.replace(bank.indices, assignments, epoch)
    report_assignment(
        run,
        labels.labels,
        before,
        truth,
        num_clusters=args.nmb_prototypes,
        epoch=epoch,
        seconds=time.perf_counter() - began,
    )


def prototypes_of(model):
    """The prototypes of each head: a list of (K, D) parameters."""
    return [p for name, p in model.named_parameters() if name.startswith("prototypes")]


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Train; returns 0 when all epochs are done, 128 + the signal when a signal stopped the run."""
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    args, dataset = image_flags.parse_args(
        get_parser(), PRESETS, argv, method="selav2", world_size=launch.world_size
    )
    image_flags.fill_in_crops(args)
    flags.check_runtime(args, launch.world_size)
    global_batch = args.batch_size * launch.world_size
    flags.check_batch(args, global_batch, len(dataset))
    check_args(args, global_batch, len(dataset))
    augment = Augment(**image_flags.augment_options(args, dataset, sum(args.nmb_crops)))
    torch.manual_seed(args.seed)  # every process starts from the same network
    num_prototypes = args.nmb_prototypes if len(args.nmb_prototypes) > 1 else args.nmb_prototypes[0]
    model = build_model(
        args.arch, normalize=True, nmb_prototypes=num_prototypes, **flags.model_options(args)
    )
    checkpoint.check_writable(args.dump_path)
    setup_logging(args.dump_path, launch.rank == 0)
    if args.init_from:
        from src.nets.weights import load_weights

        load_weights(model, args.init_from, allow_missing=("projection_head", "prototypes"))

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
    optimizer = build_optimizer(args.optimizer, trained, args.wd)
    bank, labels = build_memory(args, len(dataset), global_batch, process.device)
    run = Run(
        args,
        process,
        method="selav2",
        module=model,
        network=average_gradients(model, process),
        augment=augment,
        optimizer=optimizer,
        dataset=dataset,
        global_batch=global_batch,
        image_size=args.size_crops[0],
        num_prototypes=mean_prototypes(args),
        method_state={"memory_bank": bank, "pseudo_labels": labels},
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
    reassigned = reassignment_epochs(args.epochs, args.nmb_reassignments)
    log_assignments(args, len(dataset), len(reassigned))
    first_epoch, start = run.resume()
    run.begin()

    # ============ epochs ============
    if labels.epoch < 0 and not bank.num_rows:
        sampler.set_epoch(args.epochs)  # crops that training does not see
        fill_memory(run, bank, loader, args.crops_for_assign, epoch=args.epochs)
        if run.stopping:
            return run.leave()
        run.save(0, 0)
    for epoch in range(first_epoch, args.epochs):
        if start == 0 and labels.epoch < epoch and epoch in reassigned:
            assign_memory(run, bank, labels, dataset.labels, epoch, args)
        bank.keep(start * args.batch_size)  # the rows of this epoch
        sampler.set_epoch(epoch, start)
        train_one_epoch(run, loader, schedule, bank, labels, epoch, start, args)
        start = 0
        if run.end_epoch(epoch):
            break
    return run.leave()


def build_memory(args, num_images, global_batch, device):
    """The memory bank of this process, a batch longer than an epoch, and the labels of all images."""
    bank = MemoryBank(
        num_crops=len(args.crops_for_assign),
        capacity=(num_images // global_batch + 1) * args.batch_size,
        batch_size=args.batch_size,
        dim=args.head_dims[-1] if args.head_dims else args.feat_dim,
        device=device,
    )
    return bank, PseudoLabels(num_heads=len(args.nmb_prototypes), num_images=num_images)


def mean_prototypes(args):
    """K, or the geometric mean of the K of several heads."""
    return math.exp(loss_of_nothing(args.nmb_prototypes))


def log_assignments(args, num_images, num_assignments):
    """Say what will be assigned, and when."""
    sizes = " + ".join(f"{k:,}" for k in args.nmb_prototypes)
    logger.info(
        f"labels      K = {sizes} prototypes share {num_images:,} images, assigned anew before "
        f"{num_assignments} of {args.epochs} epochs; epsilon {args.epsilon:g}; "
        f"ln(K) = {loss_of_nothing(args.nmb_prototypes):.3f} is the loss of predicting nothing"
    )


# ============ arguments ============
def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive = flags.at_least_zero, flags.positive

    add = parser.add_argument_group("method (symbols of the paper)").add_argument
    add("--crops_for_assign", type=at_least_zero(int), nargs="+", default=[0, 1],
        help="crops whose embeddings are kept in the memory bank and assigned")
    add("--temperature", type=positive(float), default=0.1, help="tau of Eq. 8")
    add("--nmb_prototypes", type=positive(int), nargs="+", default=[3000, 3000, 3000],
        help="K, prototypes of each head; their losses are averaged")
    add("--epsilon", type=positive(float), default=0.05,
        help="entropy regularisation of the assignment; SeLa's lambda is temperature / epsilon")
    add("--sinkhorn_tolerance", type=positive(float), default=0.1,
        help="Sinkhorn-Knopp ends when the relative changes of all images sum to less")
    add("--nmb_reassignments", "--nopts", type=at_least_zero(int), default=0,
        help="assign so many times, often at first and seldom later as SeLa does; 0: before each epoch")
    add("--freeze_prototypes_niters", type=at_least_zero(int), default=313,
        help="iterations at the start during which the prototypes are not updated")

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


def check_args(args, global_batch: int, num_images: int) -> None:
    """Raise ValueError on arguments that do not fit together."""
    image_flags.check_crops_for_assign(args)
    if args.batch_size < 2:
        raise ValueError(
            "--batch_size 1: batch norm needs 2 images on each process, so use at least 2"
        )
    num_labelled = num_images - num_images % global_batch
    if max(args.nmb_prototypes) > num_labelled:
        raise ValueError(
            f"--nmb_prototypes {max(args.nmb_prototypes)} is more than the {num_labelled} images of an "
            f"epoch's whole batches of --data_path {args.data_path}: use fewer"
        )


if __name__ == "__main__":
    flags.run(main)
