"""DeepCluster: cluster the features of all images, train the network to predict the clusters, repeat.

Caron, Bojanowski, Joulin, Douze: Deep Clustering for Unsupervised Learning of Visual Features, ECCV
2018, arXiv:1807.05520; equations of Caron's thesis, section 3.2.
  Eq. 3.1         classification of pseudo-labels     deepcluster_loss
  Eq. 3.2         k-means of the whitened features    cluster_features; pca.py and kmeans.py of src/cluster
  section 3.1.1   power iteration clustering          cluster_features; src/cluster/pic.py
  section 3.2.1   sampling uniform over clusters      src/labels/sampling.py
  section 3.2.1   networks, Sobel filters             src/nets/convnets.py, src/nets/sobel.py

  python main_deepcluster.py                                      digits, two minutes on two cores
  python main_deepcluster.py /imagenet/train --arch vgg16 --sobel --lr 0.05 --wd -5 --k 10000
  torchrun --nproc_per_node 8 main_deepcluster.py --data_path /imagenet/train --sobel --batch 32
  sbatch scripts/deepcluster_alexnet_pretrain.sh                  the published run
Starting the same command again continues where it stopped.

Deviations from the authors' code: labels and images go together, so that sampling is uniform over
clusters, which theirs is not (it reads a list in cluster order by indices in file order); an image
drawn twice has two crops; other sizes than 224 px are averaged to the classifier's cells; small
eigenvalues of the PCA are raised to 1e-5 of the largest; any number of processes; k-means is ours
unless --kmeans_backend faiss; NMI has the thesis' normalisation; --resume takes weights and epoch.
Kept: a new top layer after each clustering, trained without momentum; empty clusters split another;
features before the last ReLU; a step size that stays; an epoch is --reassign times the data.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import contextlib
import importlib.util
import logging
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src import dist
from src.cluster.kmeans import euclidean_kmeans, initial_centroids
from src.cluster.pca import fit_whitening, whiten
from src.cluster.pic import knn_graph, power_iteration_clustering
from src.data.augment import Augment
from src.data.datasets import usual_std
from src.data.multicrop import MultiCropDataset, generator, multicrop_loader
from src.errors import Stopped
from src.labels.features import extract_features, share
from src.labels.pseudo_labels import PseudoLabels, report_assignment, report_predictions
from src.labels.sampling import PlannedSampler, uniform_over_clusters
from src.nets.convnets import build_convnet
from src.optim import build_optimizer
from src.run import checkpoint, convnet_flags, flags, image_flags
from src.run.log import setup_logging
from src.run.run import Run, average_gradients, log_plan, place_network, share_buffers

logger = logging.getLogger(__name__)

# Changed defaults of the method on small data, beside those of src/run/presets.py.
SMALL = {**convnet_flags.SMALL, "checkpoint_iters": 0, "wd": 5e-4, "dim_pca": 32}
CIFAR = {"arch": "resnet18", "nmb_cluster": 100}
DIGITS = {"arch": "resnet10", "nmb_cluster": 60}


def photos(situation):
    """Defaults for photographs, beside those of src/run/presets.py."""
    return {
        **convnet_flags.PHOTOS,
        "checkpoint_iters": 0,
        "wd": 5e-4,
        "dim_pca": 64,
        "nmb_cluster": situation.clusters(),
    }


PRESETS = {
    "imagenet": {},
    "photos": photos,
    "cifar": {**SMALL, **CIFAR},
    "tiny": {**SMALL, **DIGITS, "epochs": 6, "reassign": 10.0, "knn_freq": 2},  # of 100 iterations
}
KMEANS_DRAW, TOP_LAYER_DRAW = 1, 2  # set the draws apart from those of photometry
NEIGHBOURS, SIGMA, ALPHA = 5, 0.2, 0.001  # of power iteration clustering, as published


# ============ deepcluster loss ============
def deepcluster_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the pseudo-labels, predicted from every crop (Eq. 3.1).

    scores: (V * B, K), crop-major, W f(x), carries gradient. labels: (B,), the cluster of each image,
    constants. Returns the mean over crops and images.
    """
    return F.cross_entropy(scores.float(), labels.repeat(len(scores) // len(labels)))


@torch.no_grad()
def cluster_features(
    features, *, method, num_clusters, dim_pca, iterations, backend, seed, device, on_step=None
):
    """Whiten the features and cluster them (Eq. 3.2).

    features: (n, D), of this process's images, on the CPU; blocks of them are computed on `device`.
    method: "Kmeans", with num_clusters, or "PIC", which finds their number by itself. on_step: see
    euclidean_kmeans. Returns the clusters (n,) and their number.
    """
    whitening = fit_whitening(features, dim_pca, device=device)
    rows = whiten(features, whitening, device=device).to(device)  # (n, d), unit rows
    if method == "PIC":
        ids, distances = knn_graph(rows, NEIGHBOURS)
        labels = power_iteration_clustering(ids, distances, sigma=SIGMA, alpha=ALPHA)  # (N,)
        own_rows = share(len(labels))
        return labels[own_rows.start : own_rows.stop], int(labels.max()) + 1
    centroids = initial_centroids(rows, num_clusters, seed)
    _, labels = euclidean_kmeans(
        rows, centroids, iterations=iterations, empty="reseed", backend=backend, on_step=on_step
    )
    return labels, num_clusters


# ============ one epoch ============
def train_one_epoch(run, loader, labels, epoch, start):
    """One pass over the loader, from iteration `start` of the epoch on."""
    for _, crops, indices in run.iterate(loader, epoch, start):
        # ============ multi-crop forward ============
        with run.autocast():
            features, scores = run.network(crops)  # (V * B, F), (V * B, K)

        # ============ deepcluster loss ============
        targets = labels.of(indices, run.process.device)[0]  # (B,)
        loss = deepcluster_loss(scores, targets)

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


def cluster_dataset(run, dataset, labels, epoch, args):
    """The assignment phase: features of all images, their clusters, and a new top layer.

    Raises Stopped when a signal asks the run to stop.
    """
    began = time.perf_counter()
    features = features_of_share(run, dataset, args)

    def leave_if_asked(*_):
        if run.stop.agreed():
            raise Stopped

    leave_if_asked()
    clusters, num_clusters = cluster_features(
        features,
        method=args.clustering,
        num_clusters=args.nmb_cluster,
        dim_pca=args.dim_pca,
        iterations=args.niter,
        backend=args.kmeans_backend,
        seed=generator(args.seed, epoch, 0, 0, KMEANS_DRAW).initial_seed(),
        device=run.process.device,
        on_step=leave_if_asked,
    )
    before = labels.replace(torch.tensor(share(len(dataset))), clusters[None], epoch)
    draws = generator(args.seed, epoch, 0, 0, TOP_LAYER_DRAW)
    run.module.top_layer.reset(num_clusters, draws)
    run.num_prototypes = num_clusters  # PIC finds how many
    report_assignment(
        run,
        labels.labels,
        before,
        dataset.labels,
        num_clusters=[num_clusters],
        epoch=epoch,
        seconds=time.perf_counter() - began,
    )


def features_of_share(run, dataset, args):
    """Features (n, F) of this process's share of the images; not of all where a signal came."""
    share_buffers(run.module)
    run.module.eval()
    features = torch.empty(len(share(len(dataset))), run.module.num_features)

    def write(first, batch):
        features[first : first + len(batch)] = batch
        if run.stop.requested:
            raise Stopped

    with contextlib.suppress(Stopped):
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
            write=write,
        )
    return features


def draw_epoch(run, labels, *, epoch, seed):
    """The images of an epoch, uniform over clusters: (iterations, B) of this process."""
    total = run.iters_per_epoch * run.global_batch
    rng = np.random.default_rng([seed, epoch])
    order = uniform_over_clusters(labels.labels[0].numpy(), total, rng)
    return order.reshape(run.iters_per_epoch, run.process.world_size, -1)[:, run.process.rank]


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Train; returns 0 when all epochs are done, 128 + the signal when a signal stopped the run."""
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    args, dataset = image_flags.parse_args(
        get_parser(), PRESETS, argv, method="deepcluster", world_size=launch.world_size
    )
    image_flags.fill_in_crops(args)
    flags.check_runtime(args, launch.world_size)
    global_batch = args.batch_size * launch.world_size
    flags.check_batch(args, global_batch, len(dataset))
    check_args(args, global_batch, len(dataset))
    args.mean, args.std = args.mean or dataset.mean, args.std or usual_std(dataset.std)
    augment = Augment(**image_flags.augment_options(args, dataset, sum(args.nmb_crops)))
    torch.manual_seed(args.seed)  # every process starts from the same network
    num_clusters = args.nmb_cluster if args.clustering == "Kmeans" else 1
    model = build_convnet(args.arch, num_clusters, **convnet_flags.convnet_options(args))
    checkpoint.check_writable(args.dump_path)
    setup_logging(args.dump_path, launch.rank == 0)
    if args.resume or args.init_from:
        from src.nets.weights import load_weights

        load_weights(model, args.resume or args.init_from, allow_missing=("top_layer",))

    process = dist.init(args.device, args.dist_timeout)

    # ============ data ============
    crops = MultiCropDataset(dataset, **image_flags.crop_options(args))
    sampler = PlannedSampler(args.batch_size, rank=process.rank, world_size=process.world_size)
    loader = multicrop_loader(crops, sampler, **flags.loader_options(args, process.device.type))

    # ============ model and optimizer ============
    model = place_network(model, process, **flags.placement_options(args))
    trunk = [p for name, p in model.named_parameters() if not name.startswith("top_layer")]
    groups = [
        {"params": [p for p in trunk if p.requires_grad], "momentum": args.momentum},
        {"params": list(model.top_layer.parameters()), "momentum": 0.0},
    ]
    optimizer = build_optimizer("sgd", groups, convnet_flags.power_of_ten(args.wd))
    labels = PseudoLabels(num_heads=1, num_images=len(dataset))
    run = Run(
        args,
        process,
        method="deepcluster",
        module=model,
        network=average_gradients(model, process),
        augment=augment,
        optimizer=optimizer,
        dataset=dataset,
        global_batch=global_batch,
        image_size=args.size_crops[0],
        num_prototypes=args.nmb_cluster,
        method_state={"pseudo_labels": labels},
    )
    run.iters_per_epoch = int(args.reassign * len(dataset)) // global_batch
    lr = args.lr * flags.lr_factor(args, global_batch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    log_plan(run, crops, peak_lr=lr)
    log_clusters(args, len(dataset))
    first_epoch, start = run.resume()
    if (first_epoch, start) == (0, 0) and labels.epoch < 0:
        first_epoch = first_epoch_of(args, run.method)
    num_clusters = model.top_layer.out_features
    if start and args.clustering == "Kmeans" and num_clusters != args.nmb_cluster:
        logger.info(
            f"note: this epoch still has {num_clusters} clusters, the next {args.nmb_cluster}"
        )
    run.begin()

    # ============ epochs ============
    for epoch in range(first_epoch, args.epochs):
        if start == 0 and labels.epoch < epoch:
            try:
                cluster_dataset(run, dataset, labels, epoch, args)
            except Stopped:
                return run.stopped()
            run.save(epoch, 0)
        run.network = average_gradients(model, process)  # the top layer has another size
        sampler.set_epoch(epoch, draw_epoch(run, labels, epoch=epoch, seed=args.seed), start)
        train_one_epoch(run, loader, labels, epoch, start)
        start = 0
        if run.end_epoch(epoch):
            break
    return run.leave()


def first_epoch_of(args, method):
    """The epoch that a new run begins with. Raises ValueError where none is left."""
    first_epoch, flag = args.start_epoch, f"--start_epoch {args.start_epoch}"
    if args.resume:
        from src.nets.weights import epoch_of

        first_epoch, flag = epoch_of(args.resume, method), f"--resume {args.resume}"
    if first_epoch >= args.epochs:
        raise ValueError(
            f"{flag} begins after epoch {first_epoch} of --epochs {args.epochs}: raise --epochs"
        )
    return first_epoch


def log_clusters(args, num_images):
    """Say what will be clustered."""
    clusters, ceiling = "as many as PIC finds", "ln(K)"
    if args.clustering == "Kmeans":
        clusters = f"{args.nmb_cluster:,} by {args.niter} iterations of k-means"
        ceiling = f"ln(K) = {math.log(args.nmb_cluster):.3f}"
    logger.info(
        f"clusters    of {num_images:,} images, {clusters}, before each epoch, which is "
        f"{args.reassign:g} times the data; {ceiling} is the loss of predicting nothing"
    )


# ============ arguments ============
def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive = flags.at_least_zero, flags.positive

    add = parser.add_argument_group("method").add_argument
    add("--clustering", default="Kmeans", choices=["Kmeans", "PIC"],
        help="k-means, or power iteration clustering of a graph of 5 neighbours (sigma 0.2)")
    add("--nmb_cluster", "--k", type=positive(int), default=10000, help="K, clusters of k-means")
    add("--dim_pca", type=positive(int), default=256,
        help="dimensions of the whitened features, at most those of the network")
    add("--niter", type=positive(int), default=20, help="iterations of k-means")
    add("--kmeans_backend", default="torch", choices=["torch", "faiss"], help="what runs k-means")
    add("--reassign", type=positive(float), default=1.0,
        help="passes over the data between two clusterings, which is what an epoch is here")

    add = image_flags.add_data_args(parser, PRESETS)
    add("data_path", nargs="?", default=argparse.SUPPRESS, metavar="DIR", help="as --data_path")
    image_flags.add_crop_args(add)
    image_flags.add_augment_args(parser)
    convnet_flags.add_convnet_args(parser, "alexnet")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=200, help="clusterings, each followed by training")
    add("--start_epoch", type=at_least_zero(int), default=0, help="where a new run begins")
    add("--batch", "--batch_size", type=positive(int), default=256, dest="batch_size",
        help="B, images per process")
    add("--lr", type=positive(float), default=0.05, help="learning rate, which stays as it is")
    add("--momentum", type=at_least_zero(float), default=0.9, help="of the trunk")
    add("--wd", type=float, default=-5, help="weight decay; below 0 a power of ten: -5 is 1e-5")
    add("--resume", default="", metavar="PATH",
        help="a checkpoint whose weights and epoch a new run begins with; a run in --dump_path goes "
        "on without it")

    flags.add_training_args(parser)
    flags.add_runtime_args(parser)
    add = parser.add_argument_group("published spellings").add_argument
    add("--verbose", action="store_true", help="a log line every 10 iterations at least")
    parser.set_defaults(**convnet_flags.ONE_CROP, workers=4, checkpoint_iters=25000)
    return parser
    # fmt: on


def check_args(args, global_batch: int, num_images: int) -> None:
    """Raise ValueError on arguments that do not fit together."""
    if args.kmeans_backend == "faiss" and not importlib.util.find_spec("faiss"):
        raise ValueError(
            "--kmeans_backend faiss needs the package faiss: pip install faiss-cpu, or use torch"
        )
    if args.clustering == "Kmeans" and args.nmb_cluster > num_images:
        raise ValueError(
            f"--nmb_cluster {args.nmb_cluster} is more clusters than the {num_images} images of "
            f"--data_path {args.data_path}: use fewer"
        )
    if args.clustering == "PIC" and num_images <= NEIGHBOURS:
        raise ValueError(
            f"--clustering PIC needs more than {NEIGHBOURS} images, and --data_path "
            f"{args.data_path} has {num_images}"
        )
    if args.reassign * num_images < global_batch:
        raise ValueError(
            f"--reassign {args.reassign:g} makes epochs of {int(args.reassign * num_images)} images, "
            f"fewer than a batch of {global_batch}: use at least {global_batch / num_images:.3g}"
        )
    if args.verbose:
        args.log_freq = min(args.log_freq, 10)


if __name__ == "__main__":
    flags.run(main)
