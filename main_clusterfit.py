"""ClusterFit: cluster the features of a trained network, train a new one to predict the clusters.

Yan, Misra, Gupta, Ghadiyaram, Mahajan: ClusterFit: Improving Generalization of Visual
Representations, CVPR 2020, arXiv:1912.03330, section 3; settings of VISSL's recipe.
  step 1, cluster     k-means of a teacher's features     cluster_features, src/cluster/kmeans.py
  step 2, fit         classification of the clusters      clusterfit_loss

  python main_clusterfit.py                                    digits: clusters of pixels, a minute
  python main_clusterfit.py --pretrained runs/rotnet_digits --dump_path runs/from_rotnet
  torchrun --nproc_per_node 8 main_clusterfit.py cluster --data_path /imagenet/train \\
      --pretrained resnet50.pth --teacher_arch resnet50 --layer layer4 --dump_path runs/clusterfit
  torchrun --nproc_per_node 8 main_clusterfit.py fit --data_path /imagenet/train \\
      --dump_path runs/clusterfit
  sbatch scripts/clusterfit_resnet50.sh                       the published run, both steps
Starting the same command again continues where it stopped.

Deviations from VISSL's recipe: features of centre crops (theirs: of random ones), clusters by our
k-means unless --kmeans_backend faiss, empty ones split another; the first 5 epochs have the learning
rate of the next (theirs: from 0.25 on); no weight decay on biases.
Kept: no weight decay on batch norm; a learning rate of 0.1 for 256 images, in steps; colour jitter.
"""

import argparse
import importlib.util
import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from src import dist
from src.cluster.kmeans import euclidean_kmeans, initial_centroids
from src.data.augment import Augment
from src.data.datasets import open_dataset, usual_std
from src.gradients import grad_norm
from src.labels import pseudo_labels
from src.labels.assignment_files import check_clusters, read_clusters, write_clusters
from src.labels.features import raw_pixels
from src.labels.pseudo_labels import PseudoLabels
from src.labels.teacher import open_teacher
from src.nets.convnets import build_convnet
from src.optim import parameter_groups
from src.run import checkpoint, convnet_flags, flags, image_flags, setup
from src.run.log import Stopwatch, describe_run, setup_logging
from src.run.metrics import cluster_health
from src.run.run import Run
from src.run.stop import Stopped, leave

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py; VISSL's jitter.
JITTER = {"color_jitter": [0.4, 0.4, 0.4, 0.2], "jitter_prob": 1.0}
SMALL = {**convnet_flags.SMALL, **JITTER, "batch_size": 128}
CIFAR = {"nmb_cluster": 100, "dump_path": "runs/clusterfit_cifar"}
DIGITS = {"nmb_cluster": 60, "dump_path": "runs/clusterfit_digits"}
PRESETS = {
    "imagenet": {},
    "cifar": {**SMALL, **CIFAR},
    "tiny": {**SMALL, **DIGITS, "color_jitter": [0.4, 0.4, 0.0, 0.0], "jitter_prob": 0.8},
}
# What clusters depend on, kept with them.
SETTINGS = ("pretrained", "teacher_arch", "checkpoint_key", "layer", "nmb_cluster", "niter")
SETTINGS += ("kmeans_backend", "data_path", "in_chans", "seed")
KMEANS_DRAW = 1  # sets the draw apart from those of photometry


# ============ clusterfit loss ============
def clusterfit_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the clusters, predicted from every crop (step 2).

    scores: (V * B, K), crop-major, carries gradient. labels: (B,), the cluster of each image,
    constants. Returns the mean over crops and images.
    """
    return F.cross_entropy(scores.float(), labels.repeat(len(scores) // len(labels)))


@torch.no_grad()
def cluster_features(features, num_clusters, iterations, backend, seed, on_step=None):
    """Cluster the features at length 1 by k-means with squared distances (step 1).

    features: (n, D), of this process's images. on_step: see euclidean_kmeans. Returns the centroids
    (K, D), the same on all processes, and the clusters (n,).
    """
    rows = F.normalize(features, dim=1)  # (n, D)
    centroids = initial_centroids(rows, num_clusters, seed)
    return euclidean_kmeans(rows, centroids, iterations, "reseed", backend, on_step=on_step)


# ============ one epoch ============
def train_one_epoch(run, loader, labels, epoch, start, args):
    """One pass over the loader, from iteration `start`; returns the iterations of the epoch done."""
    device, num_clusters = run.process.device, run.module.top_layer.out_features
    stopwatch = Stopwatch()
    run.network.train()
    for it, (batch, indices) in enumerate(stopwatch.watch(loader), start):
        iteration = epoch * run.iters_per_epoch + it

        # ============ multi-crop forward ============
        draws = setup.generator(args.seed, epoch, it, run.process.rank)
        torch.manual_seed(draws.initial_seed())  # of dropout
        crops = run.augment([crop.to(device, non_blocking=True) for crop in batch], draws)
        with dist.autocast(device, run.precision):
            features, scores = run.network(crops)  # (V * B, F), (V * B, K)

        # ============ clusterfit loss ============
        targets = labels.of(indices, device)[0]  # (B,)
        loss = clusterfit_loss(scores, targets)

        # ============ backward and optim step ============
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
        run.last = (loss.detach(), grad_norm(run.module.parameters()))
        run.scaler.step(run.optimizer)
        run.scaler.update()

        # ============ log, save, stop ============
        done = it + 1
        run.picture_crops(crops)
        if done % args.log_freq == 0 or done == run.iters_per_epoch or iteration == 0:
            to_go = args.epochs * run.iters_per_epoch - iteration - 1
            rates = stopwatch.rates(run.global_batch, to_go)
            health = (scores, targets, features, rates, math.log(num_clusters))
            flags = {"lr": "--lr", "clusters": "--nmb_cluster"}
            pseudo_labels.report_predictions(run, epoch, iteration, *health, **flags)
        if done < run.iters_per_epoch and run.must_stop(done):
            run.save(epoch, done)
            return done
        if args.checkpoint_iters and done % args.checkpoint_iters == 0 < run.iters_per_epoch - done:
            run.save(epoch, done)
    return run.iters_per_epoch


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Cluster and train; returns 0 when all is done, 128 + the signal when a signal stopped it."""
    args = flags.parse_args(get_parser(), PRESETS, argv)
    image_flags.fill_in_crops(args)
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    flags.check_runtime(args, launch.world_size)
    dataset = open_dataset(args.data_path, in_chans=args.in_chans)
    global_batch = args.batch_size * launch.world_size
    flags.check_batch(args, global_batch, len(dataset))
    folder = Path(args.clusters or Path(args.dump_path) / "clusters")
    there, teacher = check_args(args, folder, len(dataset)), None
    assignments, num_clusters = read_clusters(folder) if there else (None, args.nmb_cluster)
    args.mean, args.std = args.mean or dataset.mean, args.std or usual_std(dataset.std)
    augment = Augment(**image_flags.augment_options(args, dataset, sum(args.nmb_crops)))
    if args.pretrained and not there:
        where = (args.teacher_arch, args.checkpoint_key, args.layer)
        teacher = open_teacher(args.pretrained, dataset, *where)
    torch.manual_seed(args.seed)  # every process starts from the same network
    model = build_convnet(args.arch, num_clusters, **convnet_flags.convnet_options(args))
    checkpoint.check_writable(args.dump_path)
    setup_logging(args.dump_path, launch.rank == 0)
    if args.init_from:
        checkpoint.load_weights(model, args.init_from, allow_missing=("top_layer",))

    process = dist.init(args.device)
    precision = dist.resolve_precision(args.precision, process.device)

    # ============ clusters ============
    if not there:
        stop = checkpoint.StopSignal()
        try:
            how = (process.device, precision, stop)
            assignments = cluster_dataset(teacher, dataset, folder, *how, args)
        except Stopped:
            return leave(stop, "the same command begins the clustering again")
        stop.restore()
    if args.step == "cluster":
        logger.info("%d clusters are in %s; the step fit trains on them", num_clusters, folder)
        dist.shutdown()
        return 0

    # ============ data ============
    resolutions = [args.nmb_crops, args.size_crops, args.min_scale_crops, args.max_scale_crops]
    loading = (args.batch_size, args.workers, args.seed, args.interpolation)
    crops, sampler, loader = setup.multicrop_loading(dataset, resolutions, process, *loading)

    # ============ model and optimizer ============
    placing = (process, args.sync_bn, args.syncbn_process_group_size, args.compile)
    model, network = setup.wrap_network(model, *placing)
    groups = [{**group, "momentum": args.momentum} for group in parameter_groups(model)]
    optimizer = setup.build_optimizer("sgd", groups, args.wd)
    labels = PseudoLabels(1, len(dataset))
    labels.labels, labels.epoch = assignments[None], 0
    run = Run(
        *(args, process, precision, model, network, augment, optimizer),
        *(len(dataset), global_batch, {"pseudo_labels": labels}),
        method="clusterfit",
    )
    lr = args.lr * flags.lr_factor(args, global_batch)
    setup.log_plan(run, crops, lr)
    log_clusters(args, folder, num_clusters)
    first_epoch, start = run.resume()
    if not torch.equal(labels.labels[0], assignments):
        raise ValueError(
            f"--dump_path {args.dump_path} holds a run on other clusters than those of {folder}: use "
            "another --dump_path"
        )
    if process.rank == 0:  # not before: a run that may not go on leaves the folder as it was
        describe_run(vars(args), args.dump_path)

    # ============ epochs ============
    for epoch in range(first_epoch, args.epochs):
        for group in optimizer.param_groups:
            group["lr"] = convnet_flags.step_lr(lr, epoch, args.decay_epochs, args.gamma)
        sampler.set_epoch(epoch, start)
        done = train_one_epoch(run, loader, labels, epoch, start, args)
        if run.stopping:
            return run.stopped()
        last, start = epoch + 1 == args.epochs, 0
        run.save(epoch, done, keep=last or (epoch + 1) % args.checkpoint_freq == 0)
        if args.knn_freq and (last or (epoch + 1) % args.knn_freq == 0):
            run.probe(model, dataset, epoch, args.size_crops[0], args.workers)
        run.plot(num_clusters)
        if not last and run.must_stop(done):
            return run.stopped()
    return run.finished()


def cluster_dataset(teacher, dataset, folder, device, precision, stop, args):
    """Step 1: features of all images, their clusters (N,), which it returns, and their files."""
    began = time.perf_counter()
    loading = {"batch_size": args.batch_size, "num_workers": args.workers}
    if teacher:
        features, indices = teacher(device, precision=precision, **loading)
    else:
        logger.info(
            "no --pretrained: clusters of the pixels themselves, in place of a network's features"
        )
        features, indices = raw_pixels(dataset, **loading)

    def leave_if_asked(*_):
        if stop.agreed():
            raise Stopped

    leave_if_asked()
    draw = setup.generator(args.seed, 0, 0, 0, KMEANS_DRAW).initial_seed()
    how = (args.nmb_cluster, args.niter, args.kmeans_backend, draw, leave_if_asked)
    centroids, clusters = cluster_features(features.to(device), *how)
    assignments = torch.empty(len(dataset), dtype=torch.int64)
    indices, clusters = (dist.all_gather_rows(x.cpu()) for x in (indices, clusters))
    assignments[indices] = clusters
    leave_if_asked()
    health = cluster_health(assignments[None], None, dataset.labels, [args.nmb_cluster])
    summary = {
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "num_images": len(dataset),
        "num_clusters": args.nmb_cluster,
        **{name: health[name] for name in sorted(health)},
        "seconds": time.perf_counter() - began,
        "sizes": assignments.bincount(minlength=args.nmb_cluster).tolist(),
    }
    write_clusters(folder, assignments, centroids, summary)
    text = "sizes {cluster_min:.0f} to {cluster_max:.0f}, median {cluster_median:.0f}"
    text += ", NMI {nmi_labels:.2f} with the labels" if dataset.labels is not None else ""
    logger.info(
        "clusters %d of %s images in %.1f s: %s",
        *(args.nmb_cluster, f"{len(dataset):,}", summary["seconds"], text.format(**health)),
    )
    return assignments


def log_clusters(args, folder, num_clusters):
    """Say what will be predicted."""
    logger.info(
        "clusters    %d of %s; ln(K) = %.3f is the loss of predicting nothing; %s",
        *(num_clusters, folder, math.log(num_clusters), convnet_flags.describe_steps(args)),
    )


# ============ arguments ============
def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive = flags.at_least_zero, flags.positive

    add = parser.add_argument_group("method").add_argument
    add("step", nargs="?", default="both", choices=["cluster", "fit", "both"],
        help="make the clusters, or train on them, or both")
    add("--pretrained", default="",
        help="the teacher: a run's folder, a checkpoint, a released file, or torchvision weights; on "
        "small data none is needed, and pixels are clustered")
    add("--teacher_arch", default="", help="of the teacher (default: what its run or file says)")
    add("--checkpoint_key", default=None, help="section of the teacher's file, such as teacher")
    add("--layer", default="",
        help="module of the teacher whose output is clustered, such as layer4 or blocks.11 "
        "(default: the pooled features)")
    add("--nmb_cluster", "--k", type=positive(int), default=16000, help="K, clusters of k-means")
    add("--niter", type=positive(int), default=50, help="iterations of k-means")
    add("--kmeans_backend", default="torch", choices=["torch", "faiss"], help="what runs k-means")
    add("--clusters", default=None, metavar="DIR",
        help="folder of the clusters (default: clusters in --dump_path)")

    add = image_flags.add_data_args(parser, PRESETS)
    image_flags.add_crop_args(add)
    image_flags.add_augment_args(parser)
    convnet_flags.add_convnet_args(parser, "resnet50")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=105, help="passes over the data")
    add("--batch_size", type=positive(int), default=32, help="B, images per process")
    convnet_flags.add_sgd_args(add, lr=0.1, wd=1e-4, decay_epochs=[30, 60, 90, 100], gamma=0.1)
    add("--momentum", type=at_least_zero(float), default=0.9, help="of SGD")

    flags.add_training_args(parser)
    flags.add_runtime_args(parser)
    scaling = {"lr_scaling": "linear", "lr_reference_batch": 256}
    parser.set_defaults(**{**convnet_flags.ONE_CROP, **JITTER, **scaling, "workers": 5})
    return parser
    # fmt: on


def check_args(args, folder: Path, num_images: int) -> bool:
    """Whether there are clusters already. Raises ValueError on arguments that do not fit together."""
    if args.kmeans_backend == "faiss" and not importlib.util.find_spec("faiss"):
        raise ValueError(
            "--kmeans_backend faiss needs the package faiss: pip install faiss-cpu, or use torch"
        )
    settings = {name: getattr(args, name) for name in SETTINGS}
    if check_clusters(folder, num_images, None if args.step == "fit" else settings):
        return True
    if args.step == "fit":
        raise ValueError(
            f"--clusters {folder} holds no clusters: make them with `main_clusterfit.py cluster`"
        )
    if args.nmb_cluster > num_images:
        raise ValueError(
            f"--nmb_cluster {args.nmb_cluster} is more clusters than the {num_images} images of "
            f"--data_path {args.data_path}: use fewer"
        )
    if not args.pretrained and (args.preset == "imagenet" or args.layer):
        flag = f"--layer {args.layer}" if args.layer else f"--data_path {args.data_path}"
        raise ValueError(
            f"{flag} needs --pretrained, the network whose features are clustered, such as runs/rotnet "
            "after `python main_rotnet.py --dump_path runs/rotnet`"
        )
    return False


if __name__ == "__main__":
    flags.run(main)
