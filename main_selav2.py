"""SeLa-v2: assign all images to learned prototypes in equal shares, predict that from several crops.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by
Contrasting Cluster Assignments, NeurIPS 2020, arXiv:2006.09882, appendix D; after Asano, Rupprecht,
Vedaldi: Self-labelling via simultaneous clustering and representation learning, arXiv:1911.05371.
  Eq. 8, 10    classification of pseudo-labels    sela_loss
  Eq. 12, D.2  Sinkhorn-Knopp on a memory bank    assign_labels, src/cluster/self_label.py, src/labels/memory_bank.py
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
from src.data.datasets import open_dataset
from src.gradients import grad_norm
from src.labels import memory_bank, pseudo_labels
from src.labels.memory_bank import MemoryBank
from src.labels.pseudo_labels import IGNORED, PseudoLabels, loss_of_nothing
from src.nets.resnet import build_model
from src.optim import cosine_schedule
from src.run import checkpoint, flags, image_flags, setup
from src.run.log import Stopwatch, describe_run, setup_logging
from src.run.run import Run

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py.
SMALL = {"temperature": 0.2, "freeze_prototypes_niters": 100}
PRESETS = {
    "imagenet": {},
    "cifar": {**SMALL, "nmb_prototypes": [100, 100, 100], "dump_path": "runs/selav2_cifar"},
    "tiny": {**SMALL, "nmb_prototypes": [60, 60, 60], "dump_path": "runs/selav2_digits"},
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
def assign_labels(bank, prototypes, temperature, epsilon, tolerance):
    """Equal shares of all images for all prototypes by Sinkhorn-Knopp, rounded to one (Eq. 12).

    prototypes: one (K, D) for each head, rows of norm 1. Head h assigns the embeddings of the bank's
    crop h modulo their number. Returns the labels of the bank's rows, (heads, n).
    """
    assignments = []
    for head, weight in enumerate(prototypes):
        embedding = bank.embeddings[head % len(bank.embeddings)]  # (n, D)
        found = self_labels(embedding, weight, temperature, epsilon, tolerance)
        logger.debug("head %d: %d iterations, change %.3g", head, found.iterations, found.error)
        assignments.append(found.labels)
    return torch.stack(assignments)


@torch.no_grad()
def normalize_prototypes(prototypes):
    """Project the prototypes back to the unit sphere: each (K, D), rows to norm 1."""
    for weight in prototypes:
        weight.copy_(F.normalize(weight, dim=1))


# ============ one epoch ============
def train_one_epoch(run, loader, schedule, bank, labels, epoch, start, args):
    """One pass over the loader, from iteration `start`; returns the iterations of the epoch done."""
    device, num_crops = run.process.device, sum(args.nmb_crops)
    heads = [p for name, p in run.module.named_parameters() if name.startswith("prototypes")]
    stopwatch = Stopwatch()
    run.network.train()
    for it, (batch, indices) in enumerate(stopwatch.watch(loader), start):
        iteration = epoch * run.iters_per_epoch + it
        for group in run.optimizer.param_groups:
            group["lr"] = float(schedule[iteration])
        normalize_prototypes(heads)

        # ============ multi-crop forward ============
        draws = setup.generator(args.seed, epoch, it, run.process.rank)
        torch.manual_seed(draws.initial_seed())  # dropout and the like of a trunk, if it has any
        crops = run.augment([crop.to(device, non_blocking=True) for crop in batch], draws)
        with dist.autocast(device, run.precision):
            embedding, scores = run.network(crops)  # (V * B, D), (V * B, K) for each head
        embedding = embedding.detach().unflatten(0, (num_crops, -1))  # (V, B, D)

        # ============ sela-v2 loss ============
        scores = scores if len(heads) > 1 else [scores]
        targets = labels.of(indices, device)  # (heads, B)
        loss = sela_loss(scores, targets, args.temperature)
        bank.push(indices, torch.stack([embedding[crop] for crop in args.crops_for_assign]))

        # ============ backward and optim step ============
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
        for prototypes in heads if iteration < args.freeze_prototypes_niters else ():
            prototypes.grad = None
        run.last = (loss.detach(), grad_norm(run.module.parameters()))
        run.scaler.step(run.optimizer)
        run.scaler.update()

        # ============ log, save, stop ============
        done = it + 1
        run.picture_crops(crops)
        if done % args.log_freq == 0 or done == run.iters_per_epoch or iteration == 0:
            assigned = embedding[args.crops_for_assign].flatten(0, 1)  # (crops * B, D)
            rates = stopwatch.rates(run.global_batch, len(schedule) - iteration - 1)
            head = (scores[0] / args.temperature, targets[0], assigned, rates)
            ceiling = loss_of_nothing(args.nmb_prototypes)
            pseudo_labels.report_predictions(run, epoch, iteration, *head, ceiling)
        if done < run.iters_per_epoch and run.must_stop(done):
            run.save(epoch, done)
            return done
        if args.checkpoint_iters and done % args.checkpoint_iters == 0 < run.iters_per_epoch - done:
            run.save(epoch, done)
    return run.iters_per_epoch


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Train; returns 0 when all epochs are done, 128 + the signal when a signal stopped the run."""
    args = flags.parse_args(get_parser(), PRESETS, argv)
    image_flags.fill_in_crops(args)
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    flags.check_runtime(args, launch.world_size)
    dataset = open_dataset(args.data_path, in_chans=args.in_chans)
    global_batch = args.batch_size * launch.world_size
    flags.check_batch(args, global_batch, len(dataset))
    check_args(args, global_batch, len(dataset))
    augment = Augment(**image_flags.augment_options(args, dataset, sum(args.nmb_crops)))
    torch.manual_seed(args.seed)  # every process starts from the same network
    sets = args.nmb_prototypes if len(args.nmb_prototypes) > 1 else args.nmb_prototypes[0]
    options = flags.model_options(args)
    model = build_model(args.arch, normalize=True, nmb_prototypes=sets, **options)
    checkpoint.check_writable(args.dump_path)
    setup_logging(args.dump_path, launch.rank == 0)
    if args.init_from:
        head = ("projection_head", "prototypes")
        checkpoint.load_weights(model, args.init_from, allow_missing=head)

    process = dist.init(args.device)
    precision = dist.resolve_precision(args.precision, process.device)

    # ============ data ============
    resolutions = [args.nmb_crops, args.size_crops, args.min_scale_crops, args.max_scale_crops]
    loading = (args.batch_size, args.workers, args.seed, args.interpolation)
    crops, sampler, loader = setup.multicrop_loading(dataset, resolutions, process, *loading)

    # ============ model and optimizer ============
    placing = (process, args.sync_bn, args.syncbn_process_group_size, args.compile)
    model, network = setup.wrap_network(model, *placing)
    optimizer = setup.build_optimizer(args.optimizer, list(model.parameters()), args.wd)
    capacity = (len(dataset) // global_batch + 1) * args.batch_size
    dim = args.head_dims[-1] if args.head_dims else args.feat_dim
    shape = (len(args.crops_for_assign), capacity, args.batch_size, dim)
    bank = MemoryBank(*shape, process.device)
    labels = PseudoLabels(len(args.nmb_prototypes), len(dataset))
    run = Run(
        *(args, process, precision, model, network, augment, optimizer),
        *(len(dataset), global_batch, {"memory_bank": bank, "pseudo_labels": labels}),
        method="selav2",
    )
    factor = flags.lr_factor(args, global_batch)
    peak, end, begin = (lr * factor for lr in (args.base_lr, args.final_lr, args.start_warmup))
    times = (args.epochs, run.iters_per_epoch, args.warmup_epochs)
    schedule = cosine_schedule(peak, end, *times, begin)
    setup.log_plan(run, crops, peak)
    reassigned = reassignment_epochs(args.epochs, args.nmb_reassignments)
    log_assignments(args, len(dataset), len(reassigned))
    first_epoch, start = run.resume()
    if process.rank == 0:  # not before: a run that may not go on leaves the folder as it was
        describe_run(vars(args), args.dump_path)

    # ============ epochs ============
    if labels.epoch < 0 and not bank.num_rows:
        sampler.set_epoch(args.epochs)  # crops that training does not see
        memory_bank.fill_memory(run, bank, loader, args.crops_for_assign, args.seed, args.epochs)
        if run.stopping:
            return run.stopped()
        run.save(0, 0)
    for epoch in range(first_epoch, args.epochs):
        if start == 0 and labels.epoch < epoch and epoch in reassigned:
            assign_memory(run, bank, labels, dataset.labels, epoch, args)
        bank.keep(start * args.batch_size)  # the rows of this epoch
        sampler.set_epoch(epoch, start)
        done = train_one_epoch(run, loader, schedule, bank, labels, epoch, start, args)
        if run.stopping:
            return run.stopped()
        last, start = epoch + 1 == args.epochs, 0
        run.save(epoch, done, keep=last or (epoch + 1) % args.checkpoint_freq == 0)
        if args.knn_freq and (last or (epoch + 1) % args.knn_freq == 0):
            run.probe(model, dataset, epoch, args.size_crops[0], args.workers)
        run.plot(math.exp(loss_of_nothing(args.nmb_prototypes)))
        if not last and run.must_stop(done):
            return run.stopped()
    return run.finished()


def assign_memory(run, bank, labels, truth, epoch, args):
    """The assignment phase: new pseudo-labels for `epoch` and those that follow."""
    began = time.perf_counter()
    heads = [p for name, p in run.module.named_parameters() if name.startswith("prototypes")]
    normalize_prototypes(heads)
    sinkhorn = (args.temperature, args.epsilon, args.sinkhorn_tolerance)
    assignments = assign_labels(bank, heads, *sinkhorn)
    assignments[:, ~bank.known] = IGNORED
    before = labels.replace(bank.indices, assignments, epoch)
    seconds = time.perf_counter() - began
    pseudo_labels.report_assignment(
        run, labels.labels, before, truth, args.nmb_prototypes, epoch, seconds
    )


def log_assignments(args, num_images, times):
    """Say what will be assigned, and when."""
    logger.info(
        "labels      K = %s prototypes share %s images, assigned anew before %d of %d epochs; epsilon "
        "%g; ln(K) = %.3f is the loss of predicting nothing",
        *(" + ".join(f"{k:,}" for k in args.nmb_prototypes), f"{num_images:,}"),
        *(times, args.epochs, args.epsilon, loss_of_nothing(args.nmb_prototypes)),
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
    held = num_images - num_images % global_batch
    if max(args.nmb_prototypes) > held:
        raise ValueError(
            f"--nmb_prototypes {max(args.nmb_prototypes)} is more than the {held} images of an "
            f"epoch's whole batches of --data_path {args.data_path}: use fewer"
        )


if __name__ == "__main__":
    flags.run(main)
