"""visualize.py classes: a map of the classes of some images."""

import argparse
import logging
from pathlib import Path

from ..evaluate import flags as eval_flags
from ..evaluate.splits import check_labelled
from ..run.flags import positive
from . import flags as picture_flags
from .class_map import class_means, draw_classes, place_by_pca, place_by_tsne
from .flags import Command

logger = logging.getLogger(__name__)


def classes(args: argparse.Namespace) -> None:
    """Draw a map of the classes, each where the mean of its features lies, with an image of it."""
    dataset = eval_flags.open_split(args)
    check_labelled(dataset, "--data_path")
    network, features = picture_flags.features_of_images(args, dataset)
    means, numbers, rows = class_means(features, dataset.labels)
    if len(means) < 4:
        raise ValueError(f"--data_path {args.data_path} has {len(means)} classes: a map needs four")
    if args.method == "pca":
        points, how = place_by_pca(means, 2), "two principal components"
    else:
        perplexity = args.perplexity or min(20.0, (len(means) - 1) / 3)
        points = place_by_tsne(
            means,
            args.pca_dim,
            perplexity=perplexity,
            learning_rate=args.learning_rate,
            iterations=args.iterations,
            seed=args.seed,
        )
        dim = min(args.pca_dim, len(means) - 1, means.shape[1])
        how = f"t-SNE of {dim} principal components, perplexity {perplexity:.3g}"
    notes = [
        f"{args.feature} of {network.origin}; {how}",
        "each class at the mean of its images, shown by the image that is nearest to it",
    ]
    title = f"{len(means):,} classes of {dataset.name}"
    folder = Path(args.dump_path)
    draw_classes(dataset, points, numbers, rows, folder, title, notes)
    logger.info(f"{len(means)} classes; written to {folder}, look at {folder / 'classes.png'}")


# ============ arguments ============
# fmt: off
def add_classes_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py classes."""
    add = parser.add_argument_group("classes").add_argument
    add("--method", default="tsne", choices=["tsne", "pca"], help="how means become points")
    add("--pca_dim", type=positive(int), default=30, help="components that t-SNE is of")
    add("--perplexity", type=positive(float), default=None,
        help="of t-SNE (default: 20, of fewer than 61 classes a third of their number less one)")
    add("--learning_rate", type=positive(float), default=200.0, help="of t-SNE")
    add("--iterations", type=positive(int), default=5000, help="of t-SNE")
    picture_flags.add_feature_flags(add)
    picture_flags.add_network_flags(parser)
    parser.set_defaults(split="val")
# fmt: on


CLASSES = Command(
    classes, add_classes_flags, picture_flags.network_defaults, check=eval_flags.check_images
)
