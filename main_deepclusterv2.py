"""DeepCluster-v2: cluster the embeddings of the last epoch, predict the clusters from several crops.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by
Contrasting Cluster Assignments, NeurIPS 2020, arXiv:2006.09882, appendix D.
  Eq. 8, 9     classification of pseudo-labels    deepcluster_loss
  D.1          centroids as classification head   assign_clusters
  Eq. 11, D.2  spherical k-means on a memory bank assign_clusters, src/cluster/kmeans.py, src/labels/memory_bank.py
  section 3.2  multi-crop                         src/data/multicrop.py, src/data/augment.py

  python main_deepclusterv2.py                                    digits, two minutes on two cores
  python main_deepclusterv2.py --data_path cifar10 --epochs 100   one GPU
  torchrun --nproc_per_node 8 main_deepclusterv2.py --data_path /imagenet/train --nmb_crops 2 6 \\
      --base_lr 0.6 --final_lr 0.0006 --freeze_prototypes_niters 10000000000
  sbatch scripts/deepclusterv2_800ep_pretrain.sh                  64 GPUs, 75.2 % linear in the paper
Starting the same command again continues where it stopped.

Deviations from the authors' code: the start of k-means is drawn from the rows of all processes, not
of the first one, and is the same for any number of them; sums of clusters are in float64; the bank
is saved in the checkpoint, whose folder any number of processes takes over; a batch without any
pseudo-label has loss 0, not NaN; the first pass, which fills the bank, sees crops of its own;
photometry runs in batches on the device, in float, not on 8-bit images.
Kept: normalisation with red std 0.228 (usually 0.229), so that features fit the released weights;
images left out of an epoch's last batch have no pseudo-label in the next; empty clusters keep their
centroid; head h clusters crop h modulo the number of --crops_for_assign.
"""

import argparse
import importlib.util
import logging
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from src import dist
from src.cluster.kmeans import initial_centroids, spherical_kmeans
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
SMALL = {"temperature": 0.2}
PRESETS = {
    "imagenet": {},
    "cifar": {**SMALL, "nmb_prototypes": [100, 100, 100], "dump_path": "runs/deepclusterv2_cifar"},
    "tiny": {**SMALL, "nmb_prototypes": [60, 60, 60], "dump_path": "runs/deepclusterv2_digits"},
}
KMEANS_DRAW = 1  # sets the draws of k-means apart from those of photometry


# ============ deepcluster-v2 loss ============
def deepcluster_loss(scores: list[Tensor], labels: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the pseudo-labels, predicted from every crop (Eq. 8, 9).

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
def assign_clusters(bank, prototypes, iterations, start, empty, backend, seed):
    """Spherical k-means on the memory bank; the centroids become the prototypes (D.1, Eq. 11).

    prototypes: one (K, D) for each head, overwritten. Head h clusters the embeddings of the bank's
    crop h modulo their number. Returns the clusters of the bank's rows, (heads, n).
    """
    assignments = []
    for head, weight in enumerate(prototypes):
        embedding = bank.embeddings[head % len(bank.embeddings)]  # (n, D)
        draw = setup.generator(*seed, head, KMEANS_DRAW).initial_seed()
        centroids = initial_centroids(embedding, len(weight), draw, start, bank.positions)
        centroids, clusters = spherical_kmeans(embedding, centroids, iterations, empty, backend)
        weight.copy_(centroids)
        assignments.append(clusters)
    return torch.stack(assignments)


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

        # ============ multi-crop forward ============
        draws = setup.generator(args.seed, epoch, it, run.process.rank)
        torch.manual_seed(draws.initial_seed())  # dropout and the like of a trunk, if it has any
        crops = run.augment([crop.to(device, non_blocking=True) for crop in batch], draws)
        with dist.autocast(device, run.precision):
            embedding, scores = run.network(crops)  # (V * B, D), (V * B, K) for each head
        embedding = embedding.detach().unflatten(0, (num_crops, -1))  # (V, B, D)

        # ============ deepcluster-v2 loss ============
        scores = scores if len(heads) > 1 else [scores]
        targets = labels.of(indices, device)  # (heads, B)
        loss = deepcluster_loss(scores, targets, args.temperature)
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
        method="deepclusterv2",
    )
    factor = flags.lr_factor(args, global_batch)
    peak, end, begin = (lr * factor for lr in (args.base_lr, args.final_lr, args.start_warmup))
    times = (args.epochs, run.iters_per_epoch, args.warmup_epochs)
    schedule = cosine_schedule(peak, end, *times, begin)
    setup.log_plan(run, crops, peak)
    log_clusters(args, len(dataset))
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
        if start == 0 and labels.epoch < epoch:
            cluster_memory(run, bank, labels, dataset.labels, epoch, args)
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


def cluster_memory(run, bank, labels, truth, epoch, args):
    """The assignment phase: new prototypes and pseudo-labels for `epoch`."""
    began = time.perf_counter()
    heads = [p for name, p in run.module.named_parameters() if name.startswith("prototypes")]
    kmeans = (args.kmeans_iters, args.kmeans_start, args.empty_clusters, args.kmeans_backend)
    assignments = assign_clusters(bank, heads, *kmeans, seed=(args.seed, epoch))
    assignments[:, ~bank.known] = IGNORED
    before = labels.replace(bank.indices, assignments, epoch)
    seconds = time.perf_counter() - began
    pseudo_labels.report_assignment(
        run, labels.labels, before, truth, args.nmb_prototypes, epoch, seconds
    )


def log_clusters(args, num_images):
    """Say what will be clustered."""
    logger.info(
        "clusters    K = %s of %s images, by %d iterations of spherical k-means before each epoch; "
        "ln(K) = %.3f is the loss of predicting nothing",
        *(" + ".join(f"{k:,}" for k in args.nmb_prototypes), f"{num_images:,}"),
        *(args.kmeans_iters, loss_of_nothing(args.nmb_prototypes)),
    )


# ============ arguments ============
def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive = flags.at_least_zero, flags.positive

    add = parser.add_argument_group("method (symbols of the paper)").add_argument
    add("--crops_for_assign", type=at_least_zero(int), nargs="+", default=[0, 1],
        help="crops whose embeddings are kept in the memory bank and clustered")
    add("--temperature", type=positive(float), default=0.1, help="tau of Eq. 8")
    add("--nmb_prototypes", type=positive(int), nargs="+", default=[3000, 3000, 3000],
        help="K, clusters of each head; their losses are averaged")
    add("--kmeans_iters", type=positive(int), default=10, help="iterations of k-means (Eq. 11)")
    add("--kmeans_start", default="random", choices=["random", "k-means++"],
        help="first centroids: random embeddings, as published, or spread ones")
    add("--empty_clusters", default="keep", choices=["keep", "reseed"],
        help="keep their centroid, as published, or split the largest clusters")
    add("--kmeans_backend", default="torch", choices=["torch", "faiss"], help="what runs k-means")
    add("--freeze_prototypes_niters", type=at_least_zero(int), default=10**10,
        help="iterations at the start during which prototypes stay the centroids")

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
    if args.kmeans_backend == "faiss" and not importlib.util.find_spec("faiss"):
        raise ValueError(
            "--kmeans_backend faiss needs the package faiss: pip install faiss-cpu, or use torch"
        )
    held = num_images - num_images % global_batch
    if max(args.nmb_prototypes) > held:
        raise ValueError(
            f"--nmb_prototypes {max(args.nmb_prototypes)} is more clusters than the {held} images of an "
            f"epoch's whole batches of --data_path {args.data_path}: use fewer"
        )


if __name__ == "__main__":
    flags.run(main)
