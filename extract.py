"""Features of images by a trained network, a row for each image, and clusters of them.

Any run, checkpoint, released file, torchvision network or timm network; any folder, list, tar shards or
named set, with labels or without. Of each image one centre crop counts, as in eval_knn.py, whose
features these are to the last bit.

  python extract.py --pretrained runs/mine --data_path my_images
  python extract.py --pretrained runs/mine --data_path my_images --clusters 20
  python extract.py --pretrained torchvision:resnet50 --data_path photos.csv --feature gem --parquet
  torchrun --nproc_per_node 8 extract.py --pretrained dino.pth --data_path 'shards/*.tar' --feature patches

What is written, to features/ in the run's folder, or to --dump_path:

  features.npy    (N, D) float32, in the order of the data: np.load(..., mmap_mode="r")
  files.csv       row, path, label, class, cluster, cosine, and the metadata of a list
  files.parquet   the same with the features, with --parquet
  extract.json    what the features depend on
  centroids.npy, clusters.json, clusters.png    with --clusters: k-means on the sphere (src/cluster/kmeans.py)

Started again, the same command goes on where it stopped; so does it on another number of processes.
An image that cannot be read has NaN in its row, and is in cluster -1.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from src import dist
from src.cluster.kmeans import initial_centroids, spherical_kmeans
from src.errors import Stopped
from src.evaluate import flags as eval_flags
from src.evaluate.feature_table import (
    columns_of,
    import_pyarrow,
    unreadable_rows,
    write_csv,
    write_parquet,
)
from src.evaluate.stored_features import check_settings
from src.labels.features import extract_features, share
from src.labels.row_file import CHUNK, RowFile, check_space, write_array
from src.nets.pooling import FEATURES, forward_of_feature, shape_of_features
from src.nets.pretrained import MODEL_FLAGS
from src.nets.weights import fingerprint
from src.run import checkpoint, flags
from src.run.lock import hold_folder
from src.run.log import duration, setup_logging, write_whole
from src.run.stop import StopSignal, finish, leave

logger = logging.getLogger(__name__)

# What features depend on, besides the images and the weights.
SETTINGS = (
    *("pretrained", "checkpoint_key", "feature", "gem_p", *MODEL_FLAGS),
    *("data_path", "data_root", "split", "in_chans", "mean", "std", "size", "interpolation"),
)
UNREADABLE = -1  # in place of a cluster
LOG_SECONDS = 5.0


# ============ features ============
def fill(rows, forward, dataset, stop, pretrained, **extraction):
    """Compute the rows of `rows` that are missing; those of unreadable images become NaN.

    pretrained: for the message. extraction: of src.evaluate.flags.extraction_options.
    """

    def extract(numbers, write):
        def write_batch(first, features):
            broken = dataset.is_broken(numbers[first : first + len(features)])
            if not features[~broken].isfinite().all():
                raise ValueError(
                    f"--pretrained {pretrained} makes features that are not finite: take another "
                    "checkpoint"
                )
            features[broken] = torch.nan
            write(first, features)

        extract_features(forward, dataset, indices=numbers, write=write_batch, **extraction)

    rows.fill(extract, stop)
    dataset.share_broken()


# ============ clusters ============
def cluster(rows, folder, process, stop, *, num_clusters, iterations, seed):
    """Clusters (N,) of all rows, the cosines (N,) to their centroids, and the centroids (K, D).

    All on the CPU of all processes. Unreadable images are in UNREADABLE. Raises Stopped.
    """
    matrix, began, logged = rows.read(), time.perf_counter(), time.perf_counter()
    unit_rows = RowFile(
        folder, "unit_rows", rows.shape[0], rows.shape[1:]
    )  # a file, as there may be any number of them

    def normalise(numbers, write):
        for first in range(0, len(numbers), CHUNK):
            block = matrix[torch.from_numpy(numbers[first : first + CHUNK])]
            write(first, F.normalize(block, dim=1))

    def on_step(step, centroids):
        nonlocal logged
        if stop.agreed():
            raise Stopped
        now = time.perf_counter()
        if dist.is_main() and now - logged > LOG_SECONDS:
            logged = now
            left = duration((now - began) / (step + 1) * (iterations - step - 1))
            logger.info(f"k-means: iteration {step + 1} of {iterations}, ETA {left}")

    unit_rows.fill(normalise, stop)
    if stop.agreed():  # all processes come here when their rows are written
        raise Stopped
    own = share(len(matrix))
    features = unit_rows.read()[own.start : own.stop]
    readable = ~features[:, 0].isnan()
    features = features if readable.all() else features[readable]
    centroids = initial_centroids(features, num_clusters, seed, method="k-means++")
    centroids, found = spherical_kmeans(
        features,
        centroids,
        iterations=iterations,
        empty="reseed",
        device=process.device,
        on_step=on_step,
    )
    assignments = torch.full((len(own),), UNREADABLE)
    assignments[readable] = found
    cosines = torch.full((len(own),), torch.nan)
    cosines[readable] = torch.cat(
        [
            (block * centroids[clusters]).sum(1).clamp(-1, 1)
            for block, clusters in zip(features.split(CHUNK), found.split(CHUNK), strict=True)
        ]
        or [torch.empty(0)]
    )
    assignments, cosines = dist.all_gather_rows(assignments), dist.all_gather_rows(cosines)
    del features
    unit_rows.remove()
    return assignments, cosines, centroids


def write_clusters(folder, clustered, dataset, args):
    """centroids.npy, clusters.json and the sheet clusters.png; returns what to say of them."""
    from src.pictures import cluster_tables
    from src.pictures.clusters import choose_clusters, draw_clusters

    assignments, cosines, centroids = clustered
    clusters = cluster_tables.Clusters(
        assignments, cosines, centroids, labels=dataset.labels, classes=dataset.classes
    )
    summary = {"seed": args.seed, **clusters.summary(), "sizes": clusters.sizes.tolist()}
    write_array(folder / "centroids.npy", centroids)
    write_whole(folder / "clusters.json", json.dumps(summary, indent=1) + "\n")
    shown = choose_clusters(clusters.sizes, args.num_shown)
    draw_clusters(
        clusters,
        dataset,
        shown,
        args.num_images,
        args.seed,
        folder / "clusters.png",
        source=f"k-means of the features of {args.pretrained or 'an untrained network'}",
    )
    agreement = ""
    if dataset.labels is not None:
        agreement = f"; purity {summary['purity']:.1%}, NMI {summary['nmi']:.3f} with the labels"
    return (
        f"{args.clusters} clusters of {summary['size_min']:,} to {summary['size_max']:,} images"
        f"{agreement}; look at {folder / 'clusters.png'}"
    )


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Extract; returns 0, or 128 + the signal when a signal stopped it."""
    args = parse_args(argv)
    setup_logging(None, dist.read_environment().rank == 0)
    dataset = eval_flags.open_split(args)
    check_args(args, len(dataset))
    opened_for = "embedding" if args.feature == "embedding" else "backbone"
    network = eval_flags.open_network(args, opened_for)
    forward = forward_of_feature(network, args.feature, args.gem_p)
    shape = shape_of_features(forward, args.in_chans, args.size, network.arch, "--size")
    if not args.pretrained:
        logger.warning(
            "WARNING: no --pretrained: the network is UNTRAINED, its features say little"
        )
    checkpoint.check_writable(args.dump_path)

    process = dist.init(args.device, args.dist_timeout)
    folder = Path(args.dump_path)
    hold_folder(folder, "extract")
    stop, start = StopSignal(), time.perf_counter()
    extraction = eval_flags.extraction_options(args, network, dataset, process.device)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"arch": network.arch, "images_digest": dataset.digest(), "shape": list(shape)}
    settings |= {"weights": fingerprint(network.model), "precision": extraction["precision"]}
    stored = read_stored(folder, settings)
    statistics = {name: extraction[name] for name in ("mean", "std")}
    rows = prepare(folder, stored, {**statistics, "settings": settings}, shape, len(dataset))
    network.model.to(process.device)

    # ============ features ============
    if is_complete(stored):
        logger.info(f"the features are in {folder} already")
    else:
        fill(rows, forward, dataset, stop, args.pretrained, **extraction)
    if stop.agreed():
        return leave(stop)
    clustered = None
    if args.clusters:
        try:
            clustered = cluster(
                rows,
                folder,
                process,
                stop,
                num_clusters=args.clusters,
                iterations=args.iterations,
                seed=args.seed,
            )
        except Stopped:
            return leave(
                stop, "the features are there; the same command begins the clustering again"
            )

    # ============ files ============
    dist.on_main(lambda: write_results(folder, rows, dataset, clustered, settings, args))
    if dist.is_main():
        logger.info(f"{duration(time.perf_counter() - start)}, written to {folder}")
    return finish(stop)


def prepare(folder, stored, contents, shape, num_images):
    """The file of features, made by the first call, with the contents of extract.json beside it.

    stored: what extract.json says already, or None. All processes call it.
    """
    if stored is None:
        check_space(
            folder,
            4 * num_images * int(np.prod(shape)),
            f"the features of {num_images:,} images",
            "extract fewer images",
        )
    dist.barrier()  # until all have looked at what is there
    if dist.is_main() and stored is None:
        save_settings(folder, contents)
    return RowFile(folder, "features", num_images, shape)


def write_results(folder, rows, dataset, clustered, settings, args):
    """The table, the clusters and the end of extract.json; by the main process."""
    features = rows.read().numpy()
    unreadable = unreadable_rows(features)
    assignments, cosines, _ = clustered or (None, None, None)
    columns = columns_of(dataset, assignments, cosines)
    write_csv(folder / "files.csv", columns)
    if args.parquet:
        write_parquet(folder / "files.parquet", columns, features)
    stored = json.loads((folder / "extract.json").read_text())
    save_settings(folder, {**stored, "unreadable": unreadable.nonzero().flatten().tolist()})
    rows.forget_chunks()  # last, as they say what is missing where extract.json does not say it is whole
    logger.info(f"features {tuple(features.shape)} of {args.feature}, {folder / 'features.npy'}")
    if unreadable.any():
        logger.warning(
            f"WARNING: {int(unreadable.sum()):,} images could not be read: their rows are NaN"
        )
    if clustered is not None:
        logger.info(write_clusters(folder, clustered, dataset, args))


def read_stored(folder, settings):
    """What extract.json says, None where there is none.

    Raises CheckpointError if the folder holds features of other images, weights or settings.
    """
    path = folder / "extract.json"
    if not path.is_file() or not (folder / "features.npy").is_file():
        return None
    stored = json.loads(path.read_text())
    check_settings(stored["settings"], settings, folder)
    return stored


def is_complete(stored):
    """Whether all features were written, by what extract.json says."""
    return stored is not None and "unreadable" in stored


def save_settings(folder, contents):
    """Write extract.json, whole or not at all."""
    write_whole(folder / "extract.json", json.dumps(contents, indent=1) + "\n")


# ============ arguments ============
def parse_args(argv):
    """The arguments; without --dump_path files go to features/ in the run's folder, or below runs/."""
    args, _ = eval_flags.parse_args(get_parser(), argv, "extract")
    if "dump_path" not in args.given and eval_flags.is_run(args.pretrained):
        args.dump_path = str(Path(args.dump_path) / "features")
    return args


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser, positive = flags.Parser(__doc__), flags.positive

    add = parser.add_argument_group("method").add_argument
    add("--feature", default="backbone", choices=FEATURES,
        help="backbone: what evaluations use, the pooled output of the trunk or the class token; cls: the "
        "class token; mean, gem: average, or generalised mean, of positions; cls_gem: the class token and "
        "gem; patches: all positions; "
        "embedding: of SwAV's projection head")
    add("--gem_p", type=positive(float), default=3.0, help="exponent of --feature gem and cls_gem")
    add("--parquet", action="store_true", help="also write features and table as files.parquet")
    add("--clusters", type=positive(int), default=None, help="K of k-means of the features")
    add("--iterations", type=positive(int), default=20, help="of k-means")
    add("--num_shown", type=positive(int), default=40, help="clusters on the sheet, of all sizes")
    add("--num_images", type=positive(int), default=8,
        help="images of a cluster on the sheet: nearest to its centroid, and as many at random")

    eval_flags.add_network_args(parser)
    add = eval_flags.add_image_args(parser)
    add("--split", default="train", choices=["train", "val"],
        help="which images, where the data has splits")
    add("--interpolation", default="bicubic", choices=["bilinear", "bicubic"], help="of the resize")
    add("--batch_size", "--batch_size_per_gpu", type=positive(int), default=128,
        help="images per process")
    flags.add_runtime_args(parser)
    return parser
    # fmt: on


def check_args(args, num_images: int) -> None:
    """Raise ValueError on arguments that do not fit together."""
    eval_flags.check_images(args)
    if args.clusters and args.feature == "patches":
        raise ValueError(
            "--clusters needs a vector for each image: not --feature patches, but mean"
        )
    if args.clusters and args.clusters > num_images:
        raise ValueError(
            f"--clusters {args.clusters} is more than the {num_images} images of --data_path "
            f"{args.data_path}: use fewer"
        )
    if args.parquet:
        import_pyarrow()


if __name__ == "__main__":
    flags.run(main)
