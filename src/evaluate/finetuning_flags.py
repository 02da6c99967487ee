"""Flags of the evaluations that fine-tune a network: labelled images, steps, and what runs need besides."""

import argparse
import hashlib
import logging
import re
from pathlib import Path

import torch

from .. import dist
from ..data.datasets import ImageDataset
from ..run import flags, image_flags
from ..run.flags import at_least_zero, positive
from .label_subsets import draw, read_list
from .splits import Part, hold_out, open_splits

logger = logging.getLogger(__name__)

# Images of a class up to which the rates are those of 1 %, 13 images, and not of 10 %, 128.
FEW_LABELS = 40


def percent(text: str) -> float:
    """An argparse type: above 0, at most 100."""
    value = float(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 100 %, not {text}")
    return value


# ============ images ============
def open_parts(args: argparse.Namespace) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images, every tenth of those to train on where nothing splits them.

    Raises as src.evaluate.splits.open_splits, and ValueError for images of several classes each.
    """
    train, val = open_splits(
        args.data_path,
        train_path=args.train_path,
        val_path=args.val_path,
        in_chans=args.in_chans,
        split="train",
        **image_flags.opening_options(args),
    )
    if val is None:
        train, val = hold_out(train)
    if train.labels.ndim != 1:
        raise ValueError(
            f"--data_path {args.data_path} has several labels an image, and here each has one: "
            "eval_linear.py and eval_voc07.py take such images"
        )
    return train, val


def labelled_part(args: argparse.Namespace, train: ImageDataset) -> tuple[Part, str, str]:
    """The training images that keep their label, a name for them, and a digest of which they are.

    Raises as src.evaluate.label_subsets, and ValueError where fewer than two classes are left.
    """
    if args.label_list:
        indices = read_list(args.label_list, train)
        name = re.sub(r"\W+", "_", Path(args.label_list).stem)
    elif args.labels_per_class is not None:
        indices = draw(train.labels, per_class=args.labels_per_class, seed=args.seed)
        name = f"{args.labels_per_class}perclass"
    else:
        indices = draw(train.labels, fraction=args.labels_perc / 100, seed=args.seed)
        name = f"{args.labels_perc:g}percent".replace(".", "_")
    part = Part(train, indices.tolist())
    counts = part.labels.bincount(minlength=int(train.labels.max()) + 1)
    if int((counts > 0).sum()) < 2:
        raise ValueError("the labelled images are all of one class: take more, or another list")
    if (counts[train.labels.unique()] == 0).any():
        lacking = int((counts[train.labels.unique()] == 0).sum())
        logger.warning(f"WARNING: {lacking} classes of the training images have no labelled image")
    return part, name, hashlib.blake2b(indices.numpy().tobytes(), digest_size=8).hexdigest()


def fill_in_batch(
    args: argparse.Namespace, world_size: int, num_images: int, reference: int
) -> None:
    """`reference` images over all processes where no batch size is given; ValueError for one too large."""
    if args.batch_size is None:
        args.batch_size = max(1, min(reference, num_images) // world_size)
    if args.batch_size * world_size > num_images:
        raise ValueError(
            f"--batch_size {args.batch_size} times {world_size} processes is more than the "
            f"{num_images} training images: use at most {num_images // world_size}"
        )
    if args.batch_size * world_size == 1:
        raise ValueError("--batch_size 1 is too small: batch norm needs two images, or more")


def extraction_options(args: argparse.Namespace, process: dist.Process, precision: str) -> dict:
    """The arguments of src.labels.features.extract_features for validation images."""
    return {
        "size": args.size,
        "mean": args.mean,
        "std": args.std,
        "device": process.device,
        "batch_size": args.batch_size,
        "num_workers": args.workers,
        "loader_timeout": args.loader_timeout,
        "precision": precision,
        "interpolation": args.interpolation,
    }


def check_network(module: torch.nn.Module, args: argparse.Namespace, sizes: list[int]) -> None:
    """Pass an empty image of each size, so that what does not fit is found before anything is started."""
    with torch.no_grad():
        for size in sorted({args.size, *sizes}):
            module.eval()(torch.zeros(1, args.in_chans, size, size))


# ============ flags ============
# fmt: off
def add_loop_args(parser: argparse.ArgumentParser) -> None:
    """Evaluating, logging and saving, and the flags of the run time."""
    add = parser.add_argument_group("evaluation, logging and checkpoints").add_argument
    add("--val_freq", type=positive(int), default=1, help="epochs between evaluations")
    add("--log_freq", type=positive(int), default=50, help="iterations between log lines")
    add("--checkpoint_iters", type=at_least_zero(int), default=0,
        help="iterations between saves inside an epoch; 0: only at the end of each epoch")
    flags.add_runtime_args(parser)
# fmt: on
