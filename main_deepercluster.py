"""DeeperCluster: predict rotations and clusters together, in two levels, on any number of images.

Caron, Bojanowski, Mairal, Joulin: Unsupervised Pre-Training of Image Features on Non-Curated Data,
ICCV 2019, arXiv:1905.01278; equations of Caron's thesis, section 3.3.
  Eq. 3.3, 3.4    super-classes: rotations x clusters; loss  hierarchical_loss, src/labels/super_classes.py
  section 3.3.1   distributed k-means in two levels          cluster_dataset, src/labels/two_level.py
  section 3.2.1   sampling uniform over (sub-)clusters       draw_epoch, src/labels/sampling.py
  section 2.2.3   rotations                                  rotate

  python main_deepercluster.py                                    digits, two minutes on two cores
  python main_deepercluster.py --pretrained runs/rotnet --data_path 'shards/{000..999}.tar' --sobel
  torchrun --nproc_per_node 8 main_deepercluster.py --pretrained runs/rotnet --data_path /images \\
      --sobel true --super_classes 16 --k 320000
  sbatch scripts/deepercluster_vgg16_pretrain.sh                  64 GPUs, the published run
Starting the same command again continues where it stopped, inside the clustering too.

Deviations from the authors' code: any number of processes does the same mathematics; place p of a
batch of G belongs to super-class p S / G, so that a multiple of S processes has the published groups;
features lie in memory-mapped files; the PCA is of all features, at every clustering; k-means starts
from rows of all processes and splits the largest clusters where theirs takes any; a cluster smaller
than its number of sub-classes has as many as images; --warm_restart, never read there, starts
k-means from the means of the clusters before; batch norm is shared by 8 processes, there by all.
Kept: new W_s at each clustering, and V if there are several clusters; W_s' step averages over images
of its super-class, S times the gradient of Eq. 3.4; the rotations of an image share its sub-class.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import importlib.util
import logging
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src import dist
from src.data.augment import Augment
from src.data.datasets import usual_std
from src.data.multicrop import MultiCropDataset, generator, multicrop_loader
from src.errors import Stopped
from src.labels.features import extract_features
from src.labels.pseudo_labels import IGNORED, PseudoLabels, report_assignment, report_predictions
from src.labels.sampling import PlannedSampler, uniform_over_clusters
from src.labels.super_classes import (
    Places,
    SubClassifiers,
    cluster_groups,
    loss_of_nothing,
    one_label,
)
from src.labels.two_level import TwoLevelClustering
from src.nets.convnets import build_convnet
from src.nets.weights import fingerprint, load_weights
from src.optim import build_optimizer, grad_norm
from src.run import checkpoint, convnet_flags, flags, image_flags
from src.run.log import setup_logging
from src.run.run import Run, average_gradients, log_plan, place_network, share_buffers

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py.
SMALL = {**convnet_flags.SMALL, "lr": 0.05, "wd": 5e-4, "super_classes": 8, "dim_pca": 32}
CIFAR = {"arch": "resnet18", "k": 100}
DIGITS = {"arch": "resnet10", "k": 60}


def photos(situation):
    """Defaults for photographs, beside those of src/run/presets.py."""
    return {
        **convnet_flags.PHOTOS,
        "lr": 0.05,
        "wd": 5e-4,
        "super_classes": 8,
        "dim_pca": 64,
        "k": situation.clusters(),
        "checkpoint_freq": 25,
        "reassignment": max(1, situation.epochs() // 5),
    }


PRESETS = {
    "imagenet": {},
    "photos": photos,
    "cifar": {**SMALL, **CIFAR, "checkpoint_freq": 25},
    "tiny": {**SMALL, **DIGITS, "checkpoint_freq": 25, "reassignment": 10},  # of 10 iterations
}
# What a clustering depends on, besides weights and data.
SETTINGS = (
    "dim_pca",
    "niter",
    "seed",
    "k",
    "super_classes",
    "rotnet",
    "warm_restart",
    "use_faiss",
    "data_path",
    "size_crops",
    "interpolation",
    "mean",
    "std",
    "sobel_padding",
    "image_padding",
    "in_chans",
)
NUM_ROTATIONS = 4  # by 0, 90, 180 and 270 degrees
KMEANS_DRAW, TOP_LAYER_DRAW = 1, 2  # set the draws apart from those of photometry


# ============ deepercluster loss ============
def hierarchical_loss(
    super_scores: Tensor, supers: Tensor, sub_scores: list[Tensor], subs: list[Tensor]
) -> Tensor:
    """Cross-entropy of the super-class, and of the sub-class inside it (Eq. 3.4).

    super_scores: (V * B, S), crop-major, V f(x). supers: (B,). sub_scores, subs: of the images of each
    super-class, (V * n_s, k) of W_s f(x) and (n_s,). Scores carry gradient, labels are constants.
    Returns the mean over crops and images of the sum of both.
    """
    num_crops = len(super_scores) // len(supers)
    loss = F.cross_entropy(super_scores.float(), supers.repeat(num_crops))
    for scores, labels in zip(sub_scores, subs, strict=True):
        total = F.cross_entropy(scores.float(), labels.repeat(num_crops), reduction="sum")
        loss = loss + total / len(super_scores)
    return loss


def rotate(crops: Tensor, rotations: Tensor) -> Tensor:
    """Crops (B, C, S, S), each turned counter-clockwise by its number (B,) of quarter turns."""
    turned = crops.clone()
    for quarter_turns in (1, 2, 3):
        rows = (rotations == quarter_turns).nonzero().flatten()
        rows = dist.to_device(rows, crops.device)
        turned[rows] = torch.rot90(crops[rows], quarter_turns, (2, 3))
    return turned


# ============ one epoch ============
def train_one_epoch(run, loader, places, heads, labels, epoch, start):
    """One pass over the loader, from iteration `start` of the epoch on."""
    supers = places.supers.to(run.process.device)  # (B,)
    for _, crops, indices in run.iterate(loader, epoch, start, picture_crops=False):
        crops = [rotate(crop, places.rotations) for crop in crops]
        run.picture_crops(crops)

        # ============ multi-crop forward ============
        with run.autocast():
            features, scores = run.network(crops)  # (V * B, F), (V * B, S)
            inputs = run.module.before_top(features).unflatten(0, (len(crops), -1))  # (V, B, F)
            sub_scores = heads.scores(inputs)  # (V * n_s, k) for each super-class held

        # ============ deepercluster loss ============
        targets = heads.targets(labels.of(indices, run.process.device)[1])  # (n_s,) for each
        loss = hierarchical_loss(scores, supers, sub_scores, targets)

        # ============ backward and optim step ============
        backward(run, heads, loss)
        norm, sub_norm = grad_norm(run.module.parameters()), grad_norm(heads.parameters())
        # Each process has classifiers of its own: where one is broken, NaN says so to all processes.
        is_sound = run.step(gradient_norm=norm.where(sub_norm.isfinite(), math.nan))
        if is_sound and (not run.scaler.is_enabled() or norm.isfinite()):
            heads.optimizer.step()

        # ============ log, save, stop ============
        if run.is_log_step():
            log_progress(run, scores, supers, features, sub_scores, targets, heads)
        if run.save_or_stop():
            return


def backward(run, heads, loss):
    """What run.backward does, for two optimizers that skip a step of fp16 together."""
    run.loss = loss.detach()
    run.optimizer.zero_grad()
    heads.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    heads.average_gradients(run.scaler.get_scale() if run.scaler.is_enabled() else 1.0)
    if run.scaler.is_enabled() and heads.overflowed():
        run.module.top_layer.bias.grad.fill_(math.inf)  # which all processes have
    run.scaler.unscale_(run.optimizer)


def log_progress(run, scores, supers, features, sub_scores, targets, heads):
    """Write a log line with the health of the predictions of both levels, and of the features."""
    agreeing = 0
    for s, labels in zip(sub_scores, targets, strict=True):
        agreeing += (s.argmax(1) == labels.repeat(len(s) // len(labels))).sum()
    report_predictions(
        run,
        logits=scores,
        labels=supers,
        embedding=features,
        ceiling=loss_of_nothing(num_super=scores.shape[1], num_sub=sub_scores[0].shape[1]),
        percentages={"sub_accuracy": 100 * agreeing / len(scores)},
        prototypes=heads.prototypes(),
        holders=heads.num_holders(),
        lr="--lr",
        clusters="--k",
    )


def cluster_dataset(run, dataset, labels, heads, groups, epoch, start, args):
    """The assignment phase: features of all images, clusters in two levels, new classifiers.

    start: the iteration of the epoch that the run goes on from. Raises Stopped when a signal asks
    the run to stop.
    """
    began = time.perf_counter()
    _, num_clusters, num_sub = class_counts(args)
    order = np.random.default_rng(args.seed).permutation(len(dataset))
    images = np.sort(order[: run.num_images])
    share_buffers(run.module)
    run.module.eval()

    def extract(numbers, write):
        extract_features(
            run.module.forward_backbone,
            dataset,
            size=args.size_crops[0],
            mean=run.augment.mean.flatten().tolist(),
            std=run.augment.std.flatten().tolist(),
            device=run.process.device,
            batch_size=args.batch_size,
            num_workers=args.workers,
            loader_timeout=args.loader_timeout,
            precision=run.precision,
            interpolation=args.interpolation,
            indices=images[numbers],
            write=write,
        )

    clustering = open_clustering(run, len(dataset), groups, epoch, args)
    rows = clustering.whitened(extract, run.module.num_features, args.dim_pca)
    before, previous = None, None
    if labels.epoch >= 0:
        before = one_label(labels.labels, num_sub)
        if args.warm_restart:
            previous = tuple(labels.labels[:, images])
    levels = clustering.clusters(
        rows,
        num_super=num_clusters,
        num_sub=num_sub,
        iterations=args.niter,
        seed=generator(args.seed, epoch, 0, 0, KMEANS_DRAW).initial_seed(),
        previous=previous,
    )
    labels.labels = torch.full_like(labels.labels, IGNORED)
    labels.labels[:, images], labels.epoch = torch.stack(levels), epoch

    # ============ new classifiers ============
    top_layer = run.module.top_layer
    if num_clusters > 1:  # else the super-classes are the rotations, as before
        top_layer.reset(args.super_classes, generator(args.seed, epoch, 0, 0, TOP_LAYER_DRAW))
        for p in top_layer.parameters():
            run.optimizer.state.pop(p, None)
    heads.reset(num_sub, args.seed, epoch)
    report_assignment(
        run,
        one_label(labels.labels, num_sub),
        before,
        dataset.labels,
        num_clusters=[num_clusters * num_sub],
        epoch=epoch,
        seconds=time.perf_counter() - began,
    )
    run.save(epoch, start)  # after the line of the log, which a run that is killed here writes anew
    clustering.remove()


def open_clustering(run, num_images, groups, epoch, args):
    """The files of a clustering before `epoch`, which belong to these weights and settings.

    num_images: of the data, of which run.num_images are in use.
    """
    settings = {name: value for name, value in vars(args).items() if name in SETTINGS}
    settings["weights"] = fingerprint(run.module)
    settings["epoch"] = epoch
    settings["precision"] = run.precision
    settings["images"] = [run.num_images, num_images, run.images_digest]
    _, num_clusters, _ = class_counts(args)
    rank, world_size = run.process.rank, run.process.world_size
    return TwoLevelClustering(
        Path(args.dump_path) / "clustering",
        settings,
        num_images=run.num_images,
        groups=groups,
        member=rank * num_clusters // world_size,
        device=run.process.device,
        backend="faiss" if args.use_faiss and world_size == 1 else "torch",
        stop=run.stop,
    )


def class_counts(args):
    """Rotations, first-level clusters, and second-level clusters in each of these."""
    num_rotations = NUM_ROTATIONS if args.rotnet else 1
    num_clusters = args.super_classes // num_rotations
    return num_rotations, num_clusters, args.k * num_rotations // args.super_classes


def draw_epoch(run, places, labels, *, epoch, seed):
    """The images of an epoch, uniform over the sub-classes of each super-class: (iterations, B)."""
    iterations = run.iters_per_epoch
    order = np.empty((iterations, len(places.supers)), dtype=np.int64)
    for s in places.held:
        inside = labels.labels[0] == places.cluster_of(s)
        subs = torch.where(inside, labels.labels[1], IGNORED).numpy()
        rng = np.random.default_rng([seed, epoch, s])
        drawn = uniform_over_clusters(subs, iterations * places.quota[s], rng)
        order[:, places.local(s)] = drawn.reshape(iterations, -1)[:, places.columns(s)]
    return order


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Train; returns 0 when all epochs are done, 128 + the signal when a signal stopped the run."""
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    args, dataset = image_flags.parse_args(
        get_parser(), PRESETS, argv, method="deepercluster", world_size=launch.world_size
    )
    image_flags.fill_in_crops(args)
    flags.check_runtime(args, launch.world_size)
    num_images = min(len(dataset), args.size_dataset)
    global_batch = args.batch_size * launch.world_size
    flags.check_batch(args, global_batch, num_images)
    check_args(args, global_batch, num_images)
    args.mean, args.std = args.mean or dataset.mean, args.std or usual_std(dataset.std)
    augment = Augment(**image_flags.augment_options(args, dataset, sum(args.nmb_crops)))
    torch.manual_seed(args.seed)  # every process starts from the same network
    model = build_convnet(args.arch, args.super_classes, **convnet_flags.convnet_options(args))
    checkpoint.check_writable(args.dump_path)
    setup_logging(args.dump_path, launch.rank == 0)
    if args.init_from:
        load_weights(model, args.init_from, allow_missing=("top_layer",))

    process = dist.init(args.device, args.dist_timeout)

    # ============ data ============
    crops = MultiCropDataset(dataset, **image_flags.crop_options(args))
    sampler = PlannedSampler(args.batch_size, rank=process.rank, world_size=process.world_size)
    loader = multicrop_loader(crops, sampler, **flags.loader_options(args, process.device.type))

    # ============ model and optimizer ============
    model = place_network(model, process, **flags.placement_options(args))
    lr = args.lr * flags.lr_factor(args, global_batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer("sgd", trained, args.wd)
    optimizer.param_groups[0]["lr"] = lr
    _, num_clusters, num_sub = class_counts(args)
    places, heads = build_classifiers(args, model.num_features, process, lr)
    labels = PseudoLabels(num_heads=2, num_images=len(dataset))  # of both levels
    run = Run(
        args,
        process,
        method="deepercluster",
        module=model,
        network=average_gradients(model, process),
        augment=augment,
        optimizer=optimizer,
        dataset=dataset,
        num_images=num_images,
        global_batch=global_batch,
        image_size=args.size_crops[0],
        num_prototypes=args.super_classes * num_sub,
        method_state={"pseudo_labels": labels, "sub_classifiers": heads},
    )
    log_plan(run, crops, peak_lr=lr)
    log_clusters(args, num_images, process.world_size)
    first_epoch, start = run.resume()
    if (first_epoch, start) == (0, 0) and labels.epoch < 0:
        first_epoch, start = args.epoch, args.start_iter
    run.begin()

    # ============ epochs ============
    groups = cluster_groups(num_clusters)
    if process.rank == 0 and labels.epoch >= first_epoch - first_epoch % args.reassignment:
        shutil.rmtree(Path(args.dump_path) / "clustering", ignore_errors=True)  # is in the labels
    for epoch in range(first_epoch, args.epochs):
        if labels.epoch < epoch - epoch % args.reassignment:
            try:
                cluster_dataset(run, dataset, labels, heads, groups, epoch, start, args)
            except Stopped:
                return run.stopped()
        run.network = average_gradients(model, process)  # the top layer may be a new one
        order = draw_epoch(run, places, labels, epoch=epoch, seed=args.seed)
        sampler.set_epoch(epoch, order, start)
        train_one_epoch(run, loader, places, heads, labels, epoch, start)
        start = 0
        if run.end_epoch(epoch):
            break
    return run.leave()


def build_classifiers(args, num_features, process, lr):
    """Which super-classes this process has images of, and the classifiers of their sub-classes."""
    num_rotations, _, num_sub = class_counts(args)
    places = Places(
        args.super_classes,
        num_rotations,
        batch_size=args.batch_size,
        rank=process.rank,
        world_size=process.world_size,
    )
    heads = SubClassifiers(
        places,
        num_features=num_features,
        num_classes=num_sub,
        process=process,
        lr=lr,
        momentum=0.9,
        weight_decay=args.wd,
    )
    return places, heads


def log_clusters(args, num_images, world_size):
    """Say what will be clustered."""
    num_rotations, num_clusters, num_sub = class_counts(args)
    factor = f"{num_rotations} rotations x " if args.rotnet else ""
    logger.info(
        f"clusters    {factor}{num_clusters} clusters = {args.super_classes} super-classes of "
        f"{num_images:,} images, {num_sub:,} sub-classes in each, every {args.reassignment} epochs; "
        f"{loss_of_nothing(args.super_classes, num_sub):.3f} is the loss of predicting nothing"
    )
    if args.use_faiss and world_size > 1:
        logger.info("note: faiss is for one process; ours does the same on several")


# ============ arguments ============
def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive = flags.at_least_zero, flags.positive

    add = parser.add_argument_group("method (symbols of the thesis)").add_argument
    add("--super_classes", type=positive(int), default=4, help="S, rotations x first-level clusters")
    add("--rotnet", type=flags.boolean, default=True, help="4 rotations are part of the super-classes")
    add("--k", type=positive(int), default=10000, help="second-level clusters of the whole data")
    add("--reassignment", type=positive(int), default=3, help="T, epochs between two clusterings")
    add("--dim_pca", type=positive(int), default=4096,
        help="dimensions of the whitened features, at most those of the network")
    add("--niter", type=positive(int), default=10, help="iterations of k-means, at both levels")
    add("--warm_restart", type=flags.boolean, default=False,
        help="start k-means from the means of the clusters before")
    add("--use_faiss", type=flags.boolean, default=False,
        help="k-means by faiss, in memory; for a single process")

    add = image_flags.add_data_args(parser, PRESETS)
    add("--size_dataset", type=positive(int), default=10000000,
        help="images to use of --data_path, drawn at random if it has more")
    image_flags.add_crop_args(add)
    image_flags.add_augment_args(parser)
    convnet_flags.add_convnet_args(parser, "vgg16", sobel_padding=2)

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", "--nepochs", type=positive(int), default=100, help="passes over the data")
    add("--epoch", type=at_least_zero(int), default=0, help="the epoch that a new run begins with")
    add("--start_iter", type=at_least_zero(int), default=0, help="and its iteration")
    add("--batch_size", "--batch_size_per_gpu", type=positive(int), default=48,
        help="B, images per process")
    add("--lr", type=positive(float), default=0.1, help="learning rate, which stays as it is")
    add("--wd", type=at_least_zero(float), default=1e-5, help="weight decay")
    add("--pretrained", dest="init_from", default=argparse.SUPPRESS, help="as --init_from: RotNet's")

    flags.add_training_args(parser)
    flags.add_runtime_args(parser)
    parser.set_defaults(**convnet_flags.ONE_CROP, workers=8, checkpoint_freq=1)
    return parser
    # fmt: on


def check_args(args, global_batch: int, num_images: int) -> None:
    """Raise ValueError on arguments that do not fit together."""
    if args.rotnet and args.super_classes % 4:
        raise ValueError(
            f"--super_classes {args.super_classes} must be a multiple of the 4 rotations: use "
            f"{4 * (args.super_classes // 4 + 1)}, or --rotnet false"
        )
    _, num_clusters, _ = class_counts(args)
    if not num_clusters <= args.k <= num_images:
        raise ValueError(
            f"--k {args.k} must be from {num_clusters}, the first-level clusters, to {num_images}, the "
            f"images of --data_path {args.data_path} in use"
        )
    if args.epoch >= args.epochs:
        raise ValueError(f"--epoch {args.epoch} must be below --epochs {args.epochs}")
    if args.super_classes > global_batch:
        raise ValueError(
            f"--super_classes {args.super_classes} is more than the {global_batch} images of a batch "
            "of all processes, in which each has its share: raise --batch_size"
        )
    if args.use_faiss and global_batch == args.batch_size and not importlib.util.find_spec("faiss"):
        raise ValueError(
            "--use_faiss true needs the package faiss: pip install faiss-cpu, or use false"
        )


if __name__ == "__main__":
    flags.run(main)
