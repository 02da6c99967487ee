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

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

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
from src.data.datasets import EpochSampler, open_dataset, usual_std
from src.data.multicrop import MultiCropDataset, generator, multicrop_loader
from src.errors import CheckpointError, Stopped
from src.labels.assignment_files import check_clusters, read_clusters, write_clusters
from src.labels.features import extract_features, raw_pixels
from src.labels.health import cluster_health
from src.labels.pseudo_labels import PseudoLabels, report_predictions
from src.nets.convnets import build_convnet
from src.optim import build_optimizer, parameter_groups, step_lr
from src.run import checkpoint, convnet_flags, flags, image_flags
from src.run.log import setup_logging
from src.run.run import Run, average_gradients, log_plan, place_network
from src.run.stop import StopSignal, leave

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py; VISSL's jitter.
JITTER = {"color_jitter": [0.4, 0.4, 0.4, 0.2], "jitter_prob": 1.0}
SMALL = {**convnet_flags.SMALL, **JITTER, "batch_size": 128}
CIFAR = {"nmb_cluster": 100}
DIGITS = {"nmb_cluster": 60}


def photos(situation):
    """Defaults for photographs, beside those of src/run/presets.py."""
    return {
        **convnet_flags.PHOTOS,
        **JITTER,
        "nmb_cluster": situation.clusters(),
        "decay_epochs": convnet_flags.steps_of(situation.epochs()),
    }


PRESETS = {
    "imagenet": {},
    "photos": photos,
    "cifar": {**SMALL, **CIFAR},
    "tiny": {**SMALL, **DIGITS, "color_jitter": [0.4, 0.4, 0.0, 0.0], "jitter_prob": 0.8},
}
# What clusters depend on, kept with them.
SETTINGS = (
    "pretrained",
    "teacher_arch",
    "checkpoint_key",
    "layer",
    "nmb_cluster",
    "niter",
    "kmeans_backend",
    "data_path",
    "in_chans",
    "seed",
)
KMEANS_DRAW = 1  # sets the draw apart from those of photometry


# ============ clusterfit loss ============
def clusterfit_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the clusters, predicted from every crop (step 2).

    scores: (V * B, K), crop-major, carries gradient. labels: (B,), the cluster of each image,
    constants. Returns the mean over crops and images.
    """
    return F.cross_entropy(scores.float(), labels.repeat(len(scores) // len(labels)))


@torch.no_grad()
def cluster_features(features, *, num_clusters, iterations, backend, seed, on_step=None):
    """Cluster the features at length 1 by k-means with squared distances (step 1).

    features: (n, D), of this process's images. on_step: see euclidean_kmeans. Returns the centroids
    (K, D), the same on all processes, and the clusters (n,).
    """
    rows = F.normalize(features, dim=1)  # (n, D)
    centroids = initial_centroids(rows, num_clusters, seed)
    return euclidean_kmeans(
        rows, centroids, iterations=iterations, empty="reseed", backend=backend, on_step=on_step
    )


# ============ one epoch ============
def train_one_epoch(run, loader, labels, epoch, start):
    """One pass over the loader, from iteration `start` of the epoch on."""
    for _, crops, indices in run.iterate(loader, epoch, start):
        # ============ multi-crop forward ============
        with run.autocast():
            features, scores = run.network(crops)  # (V * B, F), (V * B, K)

        # ============ clusterfit loss ============
        targets = labels.of(indices, run.process.device)[0]  # (B,)
        loss = clusterfit_loss(scores, targets)

        # ============ backward and optim step ============
        run.backward(loss)
        run.step()

        # ============ log, save, stop ============
        if run.is_log_step():
            report_predictions(
                run,
                logits=scores,
                labels=targets,
                embedding=features,
                prototypes=[run.module.top_layer.weight],
                lr="--lr",
                clusters="--nmb_cluster",
            )
        if run.save_or_stop():
            return


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Cluster and train; returns 0 when all is done, 128 + the signal when a signal stopped it."""
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    args, dataset = image_flags.parse_args(
        get_parser(), PRESETS, argv, method="clusterfit", world_size=launch.world_size
    )
    image_flags.fill_in_crops(args)
    flags.check_runtime(args, launch.world_size)
    global_batch = args.batch_size * launch.world_size
    flags.check_batch(args, global_batch, len(dataset))
    folder = Path(args.clusters or Path(args.dump_path) / "clusters")
    has_clusters = check_args(args, folder, dataset)
    assignments, num_clusters = None, args.nmb_cluster
    if has_clusters:
        assignments, num_clusters = read_clusters(folder)
    args.mean, args.std = args.mean or dataset.mean, args.std or usual_std(dataset.std)
    augment = Augment(**image_flags.augment_options(args, dataset, sum(args.nmb_crops)))
    extract = None
    if args.pretrained and not has_clusters:
        extract = open_teacher(
            args.pretrained,
            dataset,
            arch=args.teacher_arch,
            checkpoint_key=args.checkpoint_key,
            layer=args.layer,
        )
    torch.manual_seed(args.seed)  # every process starts from the same network
    model = build_convnet(args.arch, num_clusters, **convnet_flags.convnet_options(args))
    checkpoint.check_writable(args.dump_path)
    setup_logging(args.dump_path, launch.rank == 0)
    if args.init_from:
        from src.nets.weights import load_weights

        load_weights(model, args.init_from, allow_missing=("top_layer",))

    process = dist.init(args.device, args.dist_timeout)

    # ============ step 1: clusters ============
    if not has_clusters:
        stop = StopSignal()
        try:
            assignments = cluster_dataset(extract, dataset, folder, process, stop, args)
        except Stopped:
            return leave(stop, "the same command begins the clustering again")
        stop.restore()
    if args.step == "cluster":
        logger.info(f"{num_clusters} clusters are in {folder}; the step fit trains on them")
        dist.shutdown()
        return 0
    return fit(args, process, dataset, model, augment, assignments, folder)


def fit(args, process, dataset, model, augment, assignments, folder):
    """Step 2: train on the clusters (N,) of the images, which are in `folder`. Returns the status."""
    num_clusters = model.top_layer.out_features

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
    groups = [{**group, "momentum": args.momentum} for group in parameter_groups(model)]
    optimizer = build_optimizer("sgd", groups, args.wd)
    labels = PseudoLabels(num_heads=1, num_images=len(dataset))
    labels.labels, labels.epoch = assignments[None], 0
    run = Run(
        args,
        process,
        method="clusterfit",
        module=model,
        network=average_gradients(model, process),
        augment=augment,
        optimizer=optimizer,
        dataset=dataset,
        global_batch=args.batch_size * process.world_size,
        image_size=args.size_crops[0],
        num_prototypes=num_clusters,
        method_state={"pseudo_labels": labels},
    )
    lr = args.lr * flags.lr_factor(args, run.global_batch)
    log_plan(run, crops, peak_lr=lr)
    log_clusters(args, folder, num_clusters)
    first_epoch, start = run.resume()
    if not torch.equal(labels.labels[0], assignments):
        raise ValueError(
            f"--dump_path {args.dump_path} holds a run on other clusters than those of {folder}: use "
            "another --dump_path"
        )
    run.begin()

    # ============ epochs ============
    for epoch in range(first_epoch, args.epochs):
        for group in optimizer.param_groups:
            group["lr"] = step_lr(lr, epoch, decay_epochs=args.decay_epochs, gamma=args.gamma)
        sampler.set_epoch(epoch, start)
        train_one_epoch(run, loader, labels, epoch, start)
        start = 0
        if run.end_epoch(epoch):
            break
    return run.leave()


def open_teacher(pretrained, dataset, *, arch="", checkpoint_key=None, layer=""):
    """The network whose features are clustered, on images as large and as normalised as its own were.

    Returns extract(device, **options) -> features (n, D) of this process's share of the dataset and
    their indices (n,), with options of extract_features. Raises ValueError and OSError.
    """
    from src.nets.layers import forward_of_layer  # here, as clusters of pixels need no teacher
    from src.nets.pretrained import open_pretrained, read_run_args

    try:
        teacher = open_pretrained(pretrained, arch or None, checkpoint_key=checkpoint_key)
    except CheckpointError as error:
        if arch or read_run_args(pretrained):
            raise
        raise CheckpointError(f"{error}; for a teacher give --teacher_arch, not --arch") from error
    forward, size = forward_of_layer(teacher.model, layer), teacher.image_size
    if len(dataset.mean) != teacher.in_chans:
        dataset = open_dataset(dataset.name, in_chans=teacher.in_chans, **dataset.opening)
    mean, std = teacher.normalisation(dataset)

    def extract(device, **options):
        teacher.model.to(device)
        return extract_features(
            forward, dataset, size, mean=mean, std=std, device=device, **options
        )

    return extract


def cluster_dataset(extract, dataset, folder, process, stop, args):
    """Step 1: features of all images, their clusters (N,), which it returns, and their files.

    extract: of open_teacher; None: the pixels themselves are clustered. Raises Stopped when a signal
    asks to stop.
    """
    began = time.perf_counter()
    loading = {
        "batch_size": args.batch_size,
        "num_workers": args.workers,
        "loader_timeout": args.loader_timeout,
    }
    precision = dist.resolve_precision(args.precision, process.device)
    with stop.at_once():
        if extract is not None:
            features, indices = extract(process.device, precision=precision, **loading)
        else:
            logger.info(
                "no --pretrained: clusters of the pixels themselves, in place of a network's features"
            )
            features, indices = raw_pixels(dataset, **loading)

    def leave_if_asked(*_):
        if stop.agreed():
            raise Stopped

    leave_if_asked()
    centroids, clusters = cluster_features(
        features.to(process.device),
        num_clusters=args.nmb_cluster,
        iterations=args.niter,
        backend=args.kmeans_backend,
        seed=generator(args.seed, 0, 0, 0, KMEANS_DRAW).initial_seed(),
        on_step=leave_if_asked,
    )
    assignments = torch.empty(len(dataset), dtype=torch.int64)
    assignments[dist.all_gather_rows(indices.cpu())] = dist.all_gather_rows(clusters.cpu())
    leave_if_asked()
    values = cluster_health(assignments[None], None, dataset.labels, [args.nmb_cluster])
    seconds = time.perf_counter() - began
    summary = {
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "num_images": len(dataset),
        "images_digest": dataset.digest(),
        "num_clusters": args.nmb_cluster,
        **{name: values[name] for name in sorted(values)},
        "seconds": seconds,
        "sizes": assignments.bincount(minlength=args.nmb_cluster).tolist(),
    }
    write_clusters(folder, assignments, centroids, summary)
    texts = [
        f"sizes {values['cluster_min']:.0f} to {values['cluster_max']:.0f}",
        f"median {values['cluster_median']:.0f}",
    ]
    if dataset.labels is not None:
        texts.append(f"NMI {values['nmi_labels']:.2f} with the labels")
    logger.info(
        f"clusters {args.nmb_cluster} of {len(dataset):,} images in {seconds:.1f} s: "
        f"{', '.join(texts)}"
    )
    return assignments


def log_clusters(args, folder, num_clusters):
    """Say what will be predicted."""
    logger.info(
        f"clusters    {num_clusters} of {folder}; ln(K) = {math.log(num_clusters):.3f} is the loss of "
        f"predicting nothing; {convnet_flags.describe_steps(args)}"
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


def check_args(args, folder: Path, dataset) -> bool:
    """Whether there are clusters already. Raises ValueError on arguments that do not fit together."""
    if args.kmeans_backend == "faiss" and not importlib.util.find_spec("faiss"):
        raise ValueError(
            "--kmeans_backend faiss needs the package faiss: pip install faiss-cpu, or use torch"
        )
    settings = {name: getattr(args, name) for name in SETTINGS}
    num_images, digest = len(dataset), dataset.digest()
    if args.step == "fit":
        settings = None
    if check_clusters(folder, num_images, settings, images_digest=digest):
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
