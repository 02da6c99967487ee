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
from src.data.datasets import open_dataset, usual_std
from src.evaluate.linear_classifiers import fingerprint
from src.gradients import grad_norm
from src.labels import pseudo_labels
from src.labels.features import extract_features
from src.labels.pseudo_labels import IGNORED, PseudoLabels
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
from src.run import checkpoint, convnet_flags, flags, image_flags, setup
from src.run.log import Stopwatch, describe_run, setup_logging
from src.run.run import Run
from src.run.stop import Stopped

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py.
SMALL = {**convnet_flags.SMALL, "lr": 0.05, "wd": 5e-4, "super_classes": 8, "dim_pca": 32}
CIFAR = {"arch": "resnet18", "k": 100, "dump_path": "runs/deepercluster_cifar"}
DIGITS = {"arch": "resnet10", "k": 60, "dump_path": "runs/deepercluster_digits"}
PRESETS = {
    "imagenet": {},
    "cifar": {**SMALL, **CIFAR, "checkpoint_freq": 25},
    "tiny": {**SMALL, **DIGITS, "checkpoint_freq": 25, "reassignment": 10},  # of 10 iterations
}
# What a clustering depends on, besides weights and data.
SETTINGS = ("dim_pca", "niter", "seed", "k", "super_classes", "rotnet", "warm_restart", "use_faiss")
SETTINGS += ("data_path", "size_crops", "interpolation", "mean", "std", "sobel_padding", "in_chans")
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
        rows = rows.to(crops.device, non_blocking=True)  # else the host waits for the GPU
        turned[rows] = torch.rot90(crops[rows], quarter_turns, (2, 3))
    return turned


# ============ one epoch ============
def train_one_epoch(run, loader, places, heads, labels, epoch, start, args):
    """One pass over the loader, from iteration `start`; returns the iterations of the epoch done."""
    device, num_crops = run.process.device, sum(args.nmb_crops)
    supers = places.supers.to(device)  # (B,)
    stopwatch = Stopwatch()
    run.network.train()
    for it, (batch, indices) in enumerate(stopwatch.watch(loader), start):
        iteration = epoch * run.iters_per_epoch + it

        # ============ multi-crop forward ============
        draws = setup.generator(args.seed, epoch, it, run.process.rank)
        torch.manual_seed(draws.initial_seed())  # of dropout
        crops = run.augment([crop.to(device, non_blocking=True) for crop in batch], draws)
        crops = [rotate(crop, places.rotations) for crop in crops]
        with dist.autocast(device, run.precision):
            features, scores = run.network(crops)  # (V * B, F), (V * B, S)
            inputs = run.module.before_top(features).unflatten(0, (num_crops, -1))  # (V, B, F)
            sub_scores = heads.scores(inputs)  # (V * n_s, k) for each super-class held

        # ============ deepercluster loss ============
        targets = heads.targets(labels.of(indices, device)[1])  # (n_s,) for each of them
        loss = hierarchical_loss(scores, supers, sub_scores, targets)

        # ============ backward and optim step ============
        run.optimizer.zero_grad()
        heads.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        heads.average_gradients(run.scaler.get_scale() if run.scaler.is_enabled() else 1.0)
        if run.scaler.is_enabled() and heads.overflowed():
            run.module.top_layer.bias.grad.fill_(math.inf)  # all processes skip the step together
        run.scaler.unscale_(run.optimizer)
        norm = grad_norm(run.module.parameters())  # heads are not the same on all processes:
        run.last = (loss.detach(), norm + 0 * grad_norm(heads.parameters()))  # NaN if theirs is
        if not run.scaler.is_enabled() or norm.isfinite():
            heads.optimizer.step()
        run.scaler.step(run.optimizer)
        run.scaler.update()

        # ============ log, save, stop ============
        done = it + 1
        run.picture_crops(crops)
        if done % args.log_freq == 0 or done == run.iters_per_epoch or iteration == 0:
            to_go = args.epochs * run.iters_per_epoch - iteration - 1
            rates = stopwatch.rates(run.global_batch, to_go)
            log_progress(
                run, places, epoch, iteration, scores, features, sub_scores, targets, rates
            )
        if done < run.iters_per_epoch and run.must_stop(done):
            run.save(epoch, done)
            return done
        if args.checkpoint_iters and done % args.checkpoint_iters == 0 < run.iters_per_epoch - done:
            run.save(epoch, done)
    return run.iters_per_epoch


def log_progress(run, places, epoch, iteration, scores, features, sub_scores, targets, rates):
    """Write a log line with the health of the predictions of both levels, and of the features."""
    pairs = zip(sub_scores, targets, strict=True)
    right = sum((s.argmax(1) == t.repeat(len(s) // len(t))).sum() for s, t in pairs)
    agree = run.mean_over_processes(100 * right / len(scores))
    ceiling = loss_of_nothing(places.num_super, sub_scores[0].shape[1])
    health = (scores, places.supers.to(scores.device), features, rates, ceiling)
    flags = {"lr": "--lr", "clusters": "--k", "more": {"sub_accuracy": agree}}
    pseudo_labels.report_predictions(run, epoch, iteration, *health, **flags)


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Train; returns 0 when all epochs are done, 128 + the signal when a signal stopped the run."""
    args = flags.parse_args(get_parser(), PRESETS, argv)
    image_flags.fill_in_crops(args)
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    flags.check_runtime(args, launch.world_size)
    dataset = open_dataset(args.data_path, in_chans=args.in_chans)
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
        checkpoint.load_weights(model, args.init_from, allow_missing=("top_layer",))

    process = dist.init(args.device)
    precision = dist.resolve_precision(args.precision, process.device)

    # ============ data ============
    resolutions = [args.nmb_crops, args.size_crops, args.min_scale_crops, args.max_scale_crops]
    sampler = PlannedSampler(args.batch_size, process.rank, process.world_size)
    loading = (args.batch_size, args.workers, args.seed, args.interpolation)
    crops, sampler, loader = setup.multicrop_loading(
        dataset, resolutions, process, *loading, sampler
    )

    # ============ model and optimizer ============
    placing = (process, args.sync_bn, args.syncbn_process_group_size, args.compile)
    model, network = setup.wrap_network(model, *placing)
    lr = args.lr * flags.lr_factor(args, global_batch)
    sgd = {"lr": lr, "momentum": 0.9, "weight_decay": args.wd}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = setup.build_optimizer("sgd", trained, args.wd)
    optimizer.param_groups[0]["lr"] = lr
    rotations = 4 if args.rotnet else 1
    places = Places(
        args.super_classes, rotations, args.batch_size, process.rank, process.world_size
    )
    num_sub = args.k * rotations // args.super_classes
    heads = SubClassifiers(places, model.num_features, num_sub, process, **sgd)
    labels = PseudoLabels(2, len(dataset))  # first- and second-level clusters
    run = Run(
        *(args, process, precision, model, network, augment, optimizer, num_images, global_batch),
        {"pseudo_labels": labels, "sub_classifiers": heads},
        method="deepercluster",
    )
    setup.log_plan(run, crops, lr)
    log_clusters(args, num_images, num_sub)
    first_epoch, start = run.resume()
    if (first_epoch, start) == (0, 0) and labels.epoch < 0:
        first_epoch, start = args.epoch, args.start_iter
    del network  # run.network is wrapped anew before each epoch
    if process.rank == 0:  # not before: a run that may not go on leaves the folder as it was
        describe_run(vars(args), args.dump_path)

    # ============ epochs ============
    groups = cluster_groups(args.super_classes // rotations)
    if process.rank == 0 and labels.epoch >= first_epoch - first_epoch % args.reassignment:
        shutil.rmtree(Path(args.dump_path) / "clustering", ignore_errors=True)  # is in the labels
    for epoch in range(first_epoch, args.epochs):
        if labels.epoch < epoch - epoch % args.reassignment:
            try:
                cluster_dataset(run, dataset, num_images, labels, heads, groups, epoch, start, args)
            except Stopped:
                return run.stopped()
        run.network = setup.average_gradients(model, process)
        sampler.set_epoch(epoch, draw_epoch(run, places, labels, epoch, args), start)
        done = train_one_epoch(run, loader, places, heads, labels, epoch, start, args)
        if run.stopping:
            return run.stopped()
        last, start = epoch + 1 == args.epochs, 0
        run.save(epoch, done, keep=last or (epoch + 1) % args.checkpoint_freq == 0)
        if args.knn_freq and (last or (epoch + 1) % args.knn_freq == 0):
            run.probe(model, dataset, epoch, args.size_crops[0], args.workers)
        run.plot(math.exp(loss_of_nothing(args.super_classes, num_sub)))
        if not last and run.must_stop(done):
            return run.stopped()
    return run.finished()


def cluster_dataset(run, dataset, num_images, labels, heads, groups, epoch, start, args):
    """The assignment phase: features of all images, clusters in two levels, new classifiers."""
    began, rotations = time.perf_counter(), 4 if args.rotnet else 1
    setup.share_buffers(run.module)
    run.module.eval()
    rng = np.random.default_rng(args.seed)
    images = np.sort(rng.permutation(len(dataset))[:num_images])
    statistics = (run.augment.mean.flatten().tolist(), run.augment.std.flatten().tolist())
    where = (args.size_crops[0], *statistics, run.process.device)
    loading = {"batch_size": args.batch_size, "num_workers": args.workers}

    def extract(numbers, write):
        how = {**loading, "precision": run.precision, "interpolation": args.interpolation}
        forward, some = run.module.forward_backbone, images[numbers]
        extract_features(forward, dataset, *where, **how, indices=some, write=write)

    num_super, num_sub = args.super_classes // rotations, args.k * rotations // args.super_classes
    settings = {name: x for name, x in vars(args).items() if name in SETTINGS}
    settings |= {"weights": fingerprint(run.module), "epoch": epoch, "precision": run.precision}
    settings |= {"images": [num_images, len(dataset)]}
    member = run.process.rank * num_super // run.process.world_size
    backend = "faiss" if args.use_faiss and run.process.world_size == 1 else "torch"
    clustering = TwoLevelClustering(
        *(Path(args.dump_path) / "clustering", settings, num_images, groups, member),
        *(run.process.device, backend, run.stop),
    )
    rows = clustering.whitened(extract, run.module.num_features, args.dim_pca)
    known = labels.epoch >= 0
    previous = tuple(labels.labels[:, images]) if known and args.warm_restart else None
    draw = setup.generator(args.seed, epoch, 0, 0, KMEANS_DRAW).initial_seed()
    found = clustering.clusters(rows, num_super, num_sub, args.niter, draw, previous)
    before = one_label(labels.labels, num_sub) if known else None
    labels.labels = torch.full_like(labels.labels, IGNORED)
    labels.labels[:, images], labels.epoch = torch.stack(found), epoch

    # ============ new classifiers ============
    top_layer = run.module.top_layer
    if num_super > 1:  # else the super-classes are the rotations, as before
        top_layer.reset(args.super_classes, setup.generator(args.seed, epoch, 0, 0, TOP_LAYER_DRAW))
        for p in top_layer.parameters():
            run.optimizer.state.pop(p, None)
    heads.reset(num_sub, args.seed, epoch)
    run.save(epoch, start)
    clustering.remove()
    seconds, number = time.perf_counter() - began, [num_super * num_sub]
    after = one_label(labels.labels, num_sub)
    pseudo_labels.report_assignment(run, after, before, dataset.labels, number, epoch, seconds)


def draw_epoch(run, places, labels, epoch, args):
    """The images of an epoch, uniform over the sub-classes of each super-class: (iterations, B)."""
    order = np.empty((run.iters_per_epoch, args.batch_size), dtype=np.int64)
    for s in places.held:
        inside = labels.labels[0] == places.cluster_of(s)
        subs = torch.where(inside, labels.labels[1], IGNORED).numpy()
        rng = np.random.default_rng([args.seed, epoch, s])
        drawn = uniform_over_clusters(subs, run.iters_per_epoch * places.quota[s], rng)
        order[:, places.local(s)] = drawn.reshape(run.iters_per_epoch, -1)[:, places.columns(s)]
    return order


def log_clusters(args, num_images, num_sub):
    """Say what will be clustered."""
    rotations = "4 rotations x " if args.rotnet else ""
    clusters = args.super_classes // (4 if args.rotnet else 1)
    logger.info(
        "clusters    %s%d clusters = %d super-classes of %s images, %s sub-classes in each, every %d "
        "epochs; %.3f is the loss of predicting nothing",
        *(rotations, clusters, args.super_classes, f"{num_images:,}", f"{num_sub:,}"),
        *(args.reassignment, loss_of_nothing(args.super_classes, num_sub)),
    )
    if args.use_faiss and dist.world_size() > 1:
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
    num_super = args.super_classes // (4 if args.rotnet else 1)
    if not num_super <= args.k <= num_images:
        raise ValueError(
            f"--k {args.k} must be from {num_super}, the first-level clusters, to {num_images}, the "
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
