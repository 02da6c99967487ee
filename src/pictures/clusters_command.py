"""visualize.py clusters: which cluster each image is in, and what clusters look like and know."""

import argparse
import logging
from pathlib import Path

import torch

from .. import dist
from ..evaluate import flags as eval_flags
from ..run import checkpoint, flags
from ..run.flags import at_least_zero, positive
from ..run.health import UNIQUE_DISTANCE
from ..run.lock import hold_folder
from . import cluster_contents, cluster_tables
from . import clusters as cluster_pictures
from . import flags as picture_flags
from .clusters import (
    check_folders,
    choose_clusters,
    draw_colours,
    draw_sizes,
    image_names,
    write_folders,
)
from .flags import Command

logger = logging.getLogger(__name__)

CLUSTER_SETTINGS = (
    "pretrained", "data_path", "split", "head", "num_clusters", "feature", "neighbours", "seed",
)  # fmt: skip


@torch.no_grad()
def clusters(args: argparse.Namespace) -> None:
    """Write which cluster each image is in to --dump_path, and draw clusters."""
    weights = "" if args.num_clusters else args.pretrained
    heads, dino = cluster_tables.read_heads(weights, args.checkpoint_key)
    dataset = eval_flags.open_split(args)
    _check_request(args, [len(weight) for weight, _ in heads], len(dataset))
    columns = cluster_contents.read_columns(dataset.metadata, args.columns)
    folder = Path(args.dump_path)
    check_folders(folder, args.folders)
    checkpoint.check_writable(folder)
    hold_folder(folder, f"visualize_{args.picture}")
    feature = args.feature if args.num_clusters else "backbone" if dino else "embedding"
    network = eval_flags.open_network(args, feature)
    device = dist.resolve_device(args.device)
    precision = "fp32" if args.use_fp16 is False else args.precision
    features, colours = cluster_tables.features_of(
        network,
        dino,
        dataset,
        size=args.size,
        device=device,
        precision=dist.resolve_precision(precision, device),
        batch_size=args.batch_size,
        workers=args.workers,
        loader_timeout=args.loader_timeout,
    )

    names, readable = image_names(dataset)
    by_head = cluster_tables.group(
        features, heads, readable, num_clusters=args.num_clusters, seed=args.seed
    )
    assignments, cosines, centroids = by_head[args.head]
    found = cluster_tables.Clusters(
        assignments,
        cosines,
        centroids,
        labels=dataset.labels,
        classes=dataset.classes,
        colours=colours,
        columns=columns,
    )
    if args.neighbours and dataset.labels is not None:
        labels = dataset.labels.masked_fill(~readable, -1)
        found.same_class_edges = cluster_contents.same_class_edges(
            features, labels, args.neighbours, args.seed
        )
    numbers = cluster_tables.write_files(
        folder,
        found,
        names,
        heads=[by_one_head for by_one_head, _, _ in by_head],
        settings={**{name: getattr(args, name) for name in CLUSTER_SETTINGS}, "feature": feature},
    )
    _draw(args, found, dataset, names, folder, network.origin)
    if not args.pretrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, clusters mean little")
    _report(args, numbers)
    logger.info(
        f"{numbers['images']} images, {numbers['empty']} of {numbers['num_clusters']} clusters empty, "
        f"the largest of {numbers['size_max']}; written to {folder}, look at {folder / 'clusters.png'}"
    )


def _report(args, numbers):
    """Say what clusters know of labels, metadata and colour, and warn of what is odd with them."""
    if "purity" in numbers:
        edges = ""
        if "same_class_edges" in numbers:
            edges = (
                f", {numbers['same_class_edges']:.1%} of {args.neighbours}-NN edges in one class"
            )
        logger.info(
            f"with the labels: accuracy {numbers['accuracy']:.1%}, purity {numbers['purity']:.1%}, NMI "
            f"{numbers['nmi']:.3f}, AMI {numbers['ami']:.3f}, ARI {numbers['ari']:.3f}{edges}"
        )
    for name, column in numbers.get("metadata", {}).items():
        logger.info(
            f"with {name}: NMI {column['nmi']:.3f}, AMI {column['ami']:.3f} ({column['values']:,} values of "
            f"{column['images']:,} images)"
        )
    logger.info(
        f"colours spread by {numbers['colour_spread']:.1f} in clusters, "
        f"{numbers['colour_spread_of_all']:.1f} in all images (of 255)"
    )
    unique, total = numbers["unique"], numbers["num_clusters"]
    if 2 * unique < total:
        logger.warning(
            f"WARNING: only {unique:,} of {total:,} centroids are unique, the others lie within a cosine "
            f"distance of {UNIQUE_DISTANCE:g} of one of these"
        )
    if 2 * numbers["empty"] > total:
        logger.info("note: most prototypes are nearest to no image, as in a run that is young")


def _check_request(args, sizes, num_images):
    """Raise ValueError for clusters that are not there; sizes: how many each head has."""
    of_run = f"--pretrained {args.pretrained}" if args.pretrained else "an untrained network"
    number, wanted = args.num_clusters, max(args.show or [0])
    if number and number > num_images:
        images = f"the {num_images} images of --data_path {args.data_path}"
        raise ValueError(f"--num_clusters {number} is more than {images}: use fewer")
    if number and args.head:
        raise ValueError(f"--head {args.head} is of prototypes: leave it out with --num_clusters")
    if not number and not sizes:
        raise ValueError(
            f"{of_run} has no prototypes, which SwAV, DeepCluster-v2, SeLa-v2 and DINO train: give "
            "--num_clusters to cluster its features by k-means"
        )
    if not number and args.head >= len(sizes):
        raise ValueError(
            f"--head {args.head} is not one of the {len(sizes)} of {of_run}, from 0 on"
        )
    number = number or sizes[args.head]
    if wanted >= number:
        raise ValueError(f"--show {wanted} is not there: clusters are numbered 0 to {number - 1}")


def _draw(args, found, dataset, names, folder, source):
    """clusters.png; sizes.png and colours.png where matplotlib is installed; with --folders folders."""
    shown = args.show or choose_clusters(found.sizes, args.num_shown)
    kind = "k-means of the features" if args.num_clusters else "prototypes"
    cluster_pictures.draw_clusters(
        found,
        dataset,
        shown,
        num_images=args.num_images,
        seed=args.seed,
        path=folder / "clusters.png",
        source=f"{kind} of {source}",
    )
    try:
        draw_sizes(found, folder / "sizes.png")
        draw_colours(found, folder / "colours.png")
    except ImportError:
        logger.warning("no sizes.png, no colours.png: pip install matplotlib")
    if args.folders:
        write_folders(folder / "folders", found, dataset, names)


# ============ arguments ============
# fmt: off
def add_clusters_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py clusters."""
    add = parser.add_argument_group("clusters").add_argument
    add("--num_clusters", type=positive(int), default=None,
        help="k-means of --feature with so many clusters; default: those of the run's prototypes")
    add("--feature", default="backbone", choices=["backbone", "embedding"],
        help="what k-means is of: the trunk's pooled output, or that of SwAV's projection head")
    add("--head", type=at_least_zero(int), default=0,
        help="which of several heads; assignments_heads.npy has the clusters by all of them")
    add("--columns", nargs="+", default=None,
        help="columns of the list of images that clusters are compared with (default: all of its metadata)")
    add("--neighbours", type=at_least_zero(int), default=10,
        help="of each image, in whose graph edges between images of one class are counted; 0: none")
    add("--folders", action="store_true", help="also a folder for each cluster, with links to files")
    add("--num_shown", type=positive(int), default=20, help="clusters on the sheet, of all sizes")
    add("--show", type=at_least_zero(int), nargs="+", default=None, help="which, by number")
    add("--num_images", type=positive(int), default=8,
        help="images of a cluster nearest to its centroid, and as many others at random")
    eval_flags.add_network_args(parser)
    add = eval_flags.add_image_args(parser)
    add("--split", default="train", choices=["train", "val"], help="which images of the data")
    add("--batch_size", type=positive(int), default=128, help="images at once")
    flags.add_runtime_args(parser, one_process=True)
# fmt: on


CLUSTERS = Command(
    clusters, add_clusters_flags, picture_flags.network_defaults, check=eval_flags.check_images
)
