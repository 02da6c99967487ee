"""Protocols of linear classification: what each says where the command line says nothing."""

import argparse
import logging
from pathlib import Path

import torch
from torch import Tensor

from .. import dist
from ..data.datasets import ImageDataset
from ..nets.backbones import is_transformer
from ..nets.pretrained import is_dino
from ..run import flags
from . import flags as eval_flags
from .label_subsets import draw, read_list
from .logistic_search import PENALTIES

logger = logging.getLogger(__name__)

REFERENCE_BATCH = 256  # images that --lr is for; dino has it in proportion
DINO_BATCH = 128  # images per process
PROTOCOLS = {
    "swav": {"lr": 0.3, "wd": 1e-6, "interpolation": "bilinear"},
    "dino": {"lr": 0.001, "wd": 0.0, "interpolation": "bicubic"},
    "deepcluster": {"lr": 0.01, "wd": 1e-4, "epochs": 90},
    "deepercluster": {"lr": 0.05, "wd": 1e-5},  # of a convolution as below
}
# SwAV's appendix A.5: the learning rate falls by 10 three times, every 8 and every 24 epochs as VISSL's.
TRANSFER = {
    "places205": {"epochs": 28, "decay_epochs": [8, 16, 24]},
    "inat18": {"epochs": 84, "decay_epochs": [24, 48, 72]},
}
for name, schedule in TRANSFER.items():
    PROTOCOLS[name] = {"lr": 0.01, "wd": 1e-4, "interpolation": "bilinear", **schedule}
    PROTOCOLS[name]["scheduler_type"] = "step"
for name in ("deepcluster", "deepercluster"):
    PROTOCOLS[name] |= {"interpolation": "bilinear", "scheduler_type": "inverse_sqrt"}
# On ImageNet, by convolution; for Places205 others were chosen.
DEEPERCLUSTER_LR = {
    **{1: 0.005, 2: 0.01, 7: 0.02},
    **dict.fromkeys((3, 4, 5, 6, 8, 9, 10), 0.03),
    **dict.fromkeys((11, 12, 13), 0.02),
}
# For small images: seconds rather than hours. Features are computed once, without augmentation.
SMALL = {"cache_features": True}
PRESETS = {
    "imagenet": {},
    "cifar": {**SMALL, "workers": 2},
    "tiny": {**SMALL, "no_flip": True, "workers": 0},
}
# Logistic regression sees the features of k-NN: one block's class token, centre crops.
LBFGS = {"interpolation": "bicubic", "n_last_blocks": 1, "avgpool_patchtokens": False}
# Flags of each solver alone.
OF_LBFGS = ("label_fractions", "label_lists", "penalties", "intercept")
OF_SGD = (
    *(
        "protocol",
        "use_bn",
        "cache_features",
        "flip",
        "no_flip",
        "cross_valid",
        "kfold",
        "tencrops",
    ),
    *("evaluate", "linear_weights", "epochs", "epoch", "start_iter", "lr", "lrs", "wd", "momentum"),
    *("nesterov", "scheduler_type", "decay_epochs", "gamma", "final_lr", "val_freq", "log_freq"),
    "verbose",
)
# Flags that one kind of --scheduler_type reads.
OF_SCHEDULER = {"step": ("decay_epochs", "gamma"), "cosine": ("final_lr",)}
SMALL_DINO = {"lr": 0.1}  # fewer iterations need a larger one than DINO's


def weight_decay(text: str) -> float:
    """An argparse type: a weight decay, or below zero the power of ten of one, as DeepCluster's -4."""
    value = float(text)
    if value < 0:
        return 10**value
    return flags.at_least_zero(float)(text)


def parse_args(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, dict]:
    """The arguments, and those of the run that is evaluated ({} if it is of none).

    Of what is not on the command line, the preset of small images decides before the protocol.
    """
    args, run_args = eval_flags.parse_args(parser, argv, "eval_linear")
    if args.conv and args.sobel is None and args.arch in ("alexnet", "vgg16"):
        args.sobel = False  # torchvision's networks of these names have no batch norm
    if args.protocol == "auto":
        args.protocol = _protocol(args, run_args)
    defaults = PROTOCOLS[args.protocol] | PRESETS[args.preset]
    if args.protocol == "dino" and args.preset != "imagenet":
        defaults |= SMALL_DINO
    if args.protocol == "deepercluster" and args.conv in DEEPERCLUSTER_LR:
        defaults["lr"] = DEEPERCLUSTER_LR[args.conv]
    if args.solver == "lbfgs":
        defaults |= LBFGS
    for name, value in defaults.items():
        if name not in args.given:
            setattr(args, name, value)
    args.penalties = args.penalties or PENALTIES
    is_base = args.arch == "vit_base"
    if args.avgpool_patchtokens is None:
        args.avgpool_patchtokens = is_base and args.n_last_blocks is None
    if args.n_last_blocks is None:
        args.n_last_blocks = 1 if is_base else min(4, args.depth or 4)
    if args.verbose and "log_freq" not in args.given:
        args.log_freq = 10
    return args, run_args


def _protocol(args, run_args):
    """What --protocol auto is."""
    if args.conv:
        return "deepcluster" if args.arch == "alexnet" else "deepercluster"
    as_dino = is_transformer(args.arch) or is_dino(run_args)
    return "dino" if as_dino or args.checkpoint_key in ("student", "teacher") else "swav"


def share_of_labels(text: str) -> float:
    """An argparse type: a share above 0, at most 1."""
    value = flags.positive(float)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: 0.01 for 1 %, 1 for all")
    return value


def check_solver(args: argparse.Namespace) -> None:
    """Raise ValueError on flags of the other solver."""
    other, names = ("sgd", OF_SGD) if args.solver == "lbfgs" else ("lbfgs", OF_LBFGS)
    for name in names:
        if name in args.given:
            raise ValueError(f"--{name} is for --solver {other}: leave it out")


def labelled_sets(args: argparse.Namespace, train: ImageDataset) -> dict[str, Tensor]:
    """The images (n,) whose labels are used, by what people call the set.

    Raises ValueError and FileNotFoundError for lists that do not fit, and for images of several classes.
    """
    if train.labels.ndim != 1:
        raise ValueError(
            f"--solver lbfgs is for images of one class each, and {train.name} has several labels an "
            "image: use eval_voc07.py --protocol svm, or --solver sgd"
        )
    fractions = args.label_fractions or ([] if args.label_lists else [1.0])
    sets = {}
    for fraction in fractions:
        name = f"{100 * fraction:g} %"
        every = torch.arange(len(train))
        sets[name] = (
            every if fraction == 1 else draw(train.labels, fraction=fraction, seed=args.seed)
        )
    files = [Path(path).name for path in args.label_lists or ()]
    for path, file in zip(args.label_lists or (), files, strict=True):
        name = path if files.count(file) > 1 else file  # lists of several folders may share a name
        sets[name] = read_list(path, train, "--label_lists")
    return sets


def fill_in_batch(args: argparse.Namespace, world_size: int, num_images: int) -> None:
    """The batch size of the protocol where none is given; ValueError for one that does not fit."""
    if args.batch_size is None:
        if args.protocol == "dino" and args.preset == "imagenet":
            batch = DINO_BATCH
        else:
            batch = max(1, REFERENCE_BATCH // world_size)
        args.batch_size = max(1, min(batch, num_images // world_size))
    if args.batch_size * world_size > num_images:
        raise ValueError(
            f"--batch_size {args.batch_size} times {world_size} processes is more than the "
            f"{num_images} training images: use at most {num_images // world_size}"
        )


def chosen_folds(cross_valid: int | None, kfold: int | None) -> tuple[int | None, list[int | None]]:
    """The number of folds, and those to validate on: (None, [None]) without cross-validation.

    cross_valid alone: all its folds. With kfold the larger of the two is the number of folds and the
    smaller one the fold, from 0: the authors' help and code name them the other way round. Raises
    ValueError.
    """
    if cross_valid is None and kfold is None:
        return None, [None]
    if cross_valid is None:
        raise ValueError(f"--kfold {kfold} needs --cross_valid: give both, or --cross_valid alone")
    if kfold is None:
        if cross_valid < 2:
            raise ValueError(f"--cross_valid {cross_valid} must be at least 2 folds")
        return cross_valid, list(range(cross_valid))
    if cross_valid == kfold or max(cross_valid, kfold) < 2:
        raise ValueError(
            f"--cross_valid {cross_valid} --kfold {kfold} must be a number of folds, 2 or more, and "
            "one of them, counted from 0"
        )
    return max(cross_valid, kfold), [min(cross_valid, kfold)]


def log_plan(
    args: argparse.Namespace,
    train: ImageDataset,
    val: ImageDataset,
    *,
    num_classes: int,
    dim: int,
    total: int,
    lrs: list[float],
    process: dist.Process,
) -> None:
    """Say what will be computed, before it is.

    dim: features of an image. total: images of a batch over all processes. lrs: of the classifiers.
    """
    features = "features computed once" if args.cache_features else "random crops and flips"
    conv = f", {args.conv_pooling}-pooled convolution {args.conv}" if args.conv else ""
    for line in (
        f"protocol    {args.protocol}, {features}",
        f"data        {train.name}: {len(train):,} and {len(val):,} images, {num_classes} classes",
        f"batch       {args.batch_size} x {process.world_size} processes = {total}; "
        f"{len(train) // total:,} iterations an epoch, {args.epochs} epochs",
        f"classifiers {', '.join(f'{lr:g}' for lr in lrs)} (learning rates), {args.wd:g} weight "
        f"decay, {dim:,} features of {args.arch}{conv}",
    ):
        logger.info(line)
    if args.protocol != "dino" and total != REFERENCE_BATCH and "lr" not in args.given:
        fitting = args.lr * total / REFERENCE_BATCH
        logger.info(f"note: the learning rate is for 256 images; --lr {fitting:g} fits {total}")
    unread = [
        f"--{name}"
        for scheduler, names in OF_SCHEDULER.items()
        for name in names
        if scheduler != args.scheduler_type and name in args.given
    ]
    if unread:  # published commands give them, so that they are not refused
        logger.info(
            f"note: --scheduler_type {args.scheduler_type} does not read {', '.join(unread)}"
        )
