"""DeepCluster-v2: cluster the embeddings of the last epoch, predict the clusters from several crops.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by
Contrasting Cluster Assignments, NeurIPS 2020, arXiv:2006.09882, appendix D.
  Eq. 8, 9     classification of pseudo-labels    deepcluster_loss
  D.1          centroids as classification head   assign_clusters
  Eq. 11       spherical k-means                  assign_clusters, src/cluster/kmeans.py
  D.2          memory bank of the last epoch      src/labels/memory_bank.py
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

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

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
from src.data.datasets import EpochSampler
from src.data.multicrop import MultiCropDataset, generator, multicrop_loader
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
SMALL = {"temperature": 0.2}


def photos(situation):
    """Defaults for photographs, beside those of src/run/presets.py."""
    return {"temperature": 0.1, "nmb_prototypes": [situation.clusters()] * 3}


PRESETS = {
    "imagenet": {},
    "photos": photos,
    "cifar": {**SMALL, "nmb_prototypes": [100, 100, 100]},
    "tiny": {**SMALL, "nmb_prototypes": [60, 60, 60]},
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
def assign_clusters(bank, prototypes, *, iterations, start, empty, backend, seed, epoch):
    """Spherical k-means on the memory bank; the centroids become the prototypes (D.1, Eq. 11).

    prototypes: one (K, D) for each head, overwritten. Head h clusters the embeddings of the bank's
    crop h modulo their number. seed, epoch: of the draws. Returns the clusters of the bank's rows,
    (heads, n).
    """
    assignments = []
    for head, weight in enumerate(prototypes):
        embedding = bank.embeddings[head % len(bank.embeddings)]  # (n, D)
        centroids = initial_centroids(
            embedding,
            num_clusters=len(weight),
            seed=generator(seed, epoch, head, KMEANS_DRAW).initial_seed(),
            method=start,
            positions=bank.positions,
        )
        centroids, clusters = spherical_kmeans(
            embedding, centroids, iterations=iterations, empty=empty, backend=backend
        )
        weight.copy_(centroids)
        assignments.append(clusters)
    return torch.stack(assignments)


# ============ one epoch ============
def train_one_epoch(run, loader, schedule, bank, labels, epoch, start, args):
    """One pass over the loader, from iteration `start` of the epoch on."""
    num_crops = sum(args.nmb_crops)
    heads = prototypes_of(run.module)
    for iteration, crops, indices in run.iterate(loader, epoch, start):
        for group in run.optimizer.param_groups:
            group["lr"] = float(schedule[iteration])

        # ============ multi-crop forward ============
        with run.autocast():
            embedding, scores = run.network(crops)  # (V * B, D), (V * B, K) for each head
        embedding = embedding.detach().unflatten(0, (num_crops, -1))  # (V, B, D)
        scores = scores if len(heads) > 1 else [scores]

        # ============ deepcluster-v2 loss ============
        targets = labels.of(indices, run.process.device)  # (heads, B)
        loss = deepcluster_loss(scores, targets, args.temperature)
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


def cluster_memory(run, bank, labels, truth, epoch, args):
    """The assignment phase: new prototypes and pseudo-labels for `epoch`."""
    began = time.perf_counter()
    assignments = assign_clusters(
        bank,
        prototypes_of(run.module),
        iterations=args.kmeans_iters,
        start=args.kmeans_start,
        empty=args.empty_clusters,
        backend=args.kmeans_backend,
        seed=args.seed,
        epoch=epoch,
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
        get_parser(), PRESETS, argv, method="deepclusterv2", world_size=launch.world_size
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
        method="deepclusterv2",
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
    log_clusters(args, len(dataset))
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
        if start == 0 and labels.epoch < epoch:
            cluster_memory(run, bank, labels, dataset.labels, epoch, args)
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


def log_clusters(args, num_images):
    """Say what will be clustered."""
    sizes = " + ".join(f"{k:,}" for k in args.nmb_prototypes)
    logger.info(
        f"clusters    K = {sizes} of {num_images:,} images, by {args.kmeans_iters} iterations of "
        "spherical k-means before each epoch; "
        f"ln(K) = {loss_of_nothing(args.nmb_prototypes):.3f} is the loss of predicting nothing"
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
    num_labelled = num_images - num_images % global_batch
    if max(args.nmb_prototypes) > num_labelled:
        raise ValueError(
            f"--nmb_prototypes {max(args.nmb_prototypes)} is more clusters than the {num_labelled} images "
            f"of an epoch's whole batches of --data_path {args.data_path}: use fewer"
        )


if __name__ == "__main__":
    flags.run(main)
