"""visualize.py neighbours: images and those of the data nearest to them."""

import argparse
import logging
import os
from pathlib import Path

from ..evaluate import flags as eval_flags
from ..labels.features import extract_features
from ..run.flags import positive
from . import flags as picture_flags
from .flags import Command
from .neighbours import draw_queries, nearest_of_others

logger = logging.getLogger(__name__)


def neighbours(args: argparse.Namespace) -> None:
    """Draw images, or those of --queries, and those of the data nearest to them by their features."""
    dataset, folder = eval_flags.open_split(args), Path(args.dump_path)
    queries, rows = picture_flags.queries_of(args, dataset)
    own = rows
    if args.queries:
        places = {os.path.abspath(dataset.file_name(i)): i for i in range(len(dataset))}
        own = [places.get(os.path.abspath(queries.file_name(row))) for row in rows]
    if args.top >= len(dataset):
        raise ValueError(
            f"--top {args.top} is not fewer than the {len(dataset)} images of --data_path "
            f"{args.data_path}: use fewer"
        )
    network, features = picture_flags.features_of_images(args, dataset)
    if args.queries:
        asked, _ = extract_features(
            network.model, queries, **picture_flags.feature_options(args, network, dataset)
        )
    else:
        asked = features[list(rows)]
    cosines, indices = nearest_of_others(features, asked, own, args.top)
    source = f"{args.feature} of {network.origin}, centre crops compared by cosine"
    draw_queries(queries, rows, dataset, cosines, indices, folder, source)
    logger.info(f"{len(rows)} queries; written to {folder}, look at {folder / 'neighbours.png'}")


# ============ arguments ============
# fmt: off
def add_neighbours_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py neighbours."""
    add = parser.add_argument_group("neighbours").add_argument
    add("--queries", nargs="+", default=None,
        help="files of images whose neighbours are looked for (default: some images of the data)")
    add("--num_images", type=positive(int), default=12, help="queries, without --queries")
    add("--top", type=positive(int), default=10, help="neighbours of each query")
    picture_flags.add_feature_flags(add)
    picture_flags.add_network_flags(parser)
# fmt: on


NEIGHBOURS = Command(
    neighbours, add_neighbours_flags, picture_flags.network_defaults, check=eval_flags.check_images
)
