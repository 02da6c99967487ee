"""Flags of the methods that predict pseudo-labels of whole images: networks, Sobel, one crop, SGD."""

import argparse
from collections.abc import Callable

from . import flags
from .flags import at_least_zero, boolean, positive, probability

# One crop of an image, as torchvision's RandomResizedCrop, and no photometry but flips.
NO_COLOURS = {"color_jitter": [0.0], "jitter_prob": 0.0, "grayscale": 0.0, "blur": [0.0]}
ONE_CROP = {"nmb_crops": [1], "min_scale_crops": [0.08], "max_scale_crops": [1.0], **NO_COLOURS}
# For small images: the sizes and scales of src/run/flags.py.
SMALL = {"nmb_crops": [1], "min_scale_crops": None, "max_scale_crops": None, **NO_COLOURS}
# For photographs: one crop of the size that other methods have.
PHOTOS = {**SMALL, "min_scale_crops": [0.2]}


def steps_of(epochs: int) -> list[int]:
    """--decay_epochs of a run of so many: after six and eight tenths of it."""
    return sorted({max(1, round(0.6 * epochs)), max(1, round(0.8 * epochs))})


def add_convnet_args(
    parser: argparse.ArgumentParser, arch: str, sobel_padding: int = 1
) -> Callable:
    """The network; returns the group's add_argument. arch, sobel_padding: the defaults."""
    add = flags.add_backbone_args(parser, arch, "alexnet, vgg16 (of the thesis: with batch norm), ")
    add("--sobel", type=boolean, nargs="?", const=True, default=False,
        help="grey images through fixed Sobel filters come before the first layer")  # fmt: skip
    add("--sobel_padding", type=int, choices=[1, 2], default=sobel_padding,
        help="zeros around the image at the Sobel filters: 1 DeepCluster's, 2 DeeperCluster's")  # fmt: skip
    add("--image_padding", type=at_least_zero(int), default=sobel_padding - 1,
        help="zeros around images of vgg16 without --sobel: 1 in DeeperCluster's code")  # fmt: skip
    add("--dropout", type=probability, default=0.5, help="of alexnet's and vgg16's linear layers")
    return add


def convnet_options(args: argparse.Namespace) -> dict:
    """The arguments of src.nets.convnets.build_convnet that come from the flags of add_convnet_args."""
    names = ("sobel", "sobel_padding", "dropout", "image_padding")
    options = {name: getattr(args, name) for name in names}
    return {**flags.backbone_options(args), **options}


def power_of_ten(wd: float) -> float:
    """A weight decay; the published DeepCluster gives -5 for 1e-5."""
    return 10.0**wd if wd < 0 else wd


def add_sgd_args(
    add: Callable, lr: float, wd: float, decay_epochs: list[int], gamma: float
) -> None:
    """Steps of SGD that become smaller a few times."""
    add("--lr", type=positive(float), default=lr, help="learning rate at the start")
    add("--decay_epochs", type=positive(int), nargs="*", default=decay_epochs,
        help="epochs after which the learning rate is multiplied by --gamma")  # fmt: skip
    add("--gamma", type=positive(float), default=gamma, help="see --decay_epochs")
    add("--wd", type=at_least_zero(float), default=wd, help="weight decay")


def describe_steps(args: argparse.Namespace) -> str:
    """What the flags of add_sgd_args make of the learning rate in this run."""
    within = [str(epoch) for epoch in args.decay_epochs if epoch < args.epochs]
    beyond = [str(epoch) for epoch in args.decay_epochs if epoch >= args.epochs]
    sentences = ["learning rate constant"]
    if within:
        sentences = [f"learning rate times {args.gamma:g} after epochs {' '.join(within)}"]
    if beyond:
        sentences.append(f"the run ends before its steps after {' '.join(beyond)}")
    return "; ".join(sentences)
