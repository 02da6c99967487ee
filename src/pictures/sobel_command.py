"""visualize.py sobel: what Sobel filters leave of images, and what the first layer makes of it."""

import argparse
import logging
import os
from pathlib import Path

import torch

from .. import dist
from ..evaluate import flags as eval_flags
from ..labels.features import centre_crop
from ..nets.sobel import Sobel
from ..run import checkpoint
from ..run.flags import positive
from ..run.lock import hold_folder
from . import flags as picture_flags
from . import responses
from .flags import Command
from .sobel import draw_sobel

logger = logging.getLogger(__name__)


@torch.no_grad()
def sobel(args: argparse.Namespace) -> None:
    """Draw what Sobel filters leave of images, and with a network how its first layer responds to it."""
    dataset, indices = picture_flags.queries_of(args)
    device = dist.resolve_device(args.device)
    filters, conv, source = Sobel(args.sobel_padding or 1), None, dataset.name
    mean, std = args.mean or dataset.mean, args.std or dataset.std
    if args.pretrained or args.sobel:
        network = eval_flags.open_network(args)
        filters = getattr(network.model, "sobel", None)
        if filters is None:
            raise ValueError(
                f"--pretrained {args.pretrained} has no Sobel filters before its first layer: leave it "
                "out to see what they make of images"
            )
        if not args.pretrained:
            logger.warning("WARNING: no --pretrained: the network is UNTRAINED, as its filters are")
        model = network.model.to(device)
        conv = responses.convolutions(model, responses.trace(model, args.size))[0].module
        mean, std = network.normalisation(dataset)
        source = f"{network.origin}; {dataset.name}"
    folder = Path(args.dump_path)
    checkpoint.check_writable(folder)
    hold_folder(folder, f"visualize_{args.picture}")

    names = [os.path.basename(dataset.file_name(index)) for index in indices]
    images = [centre_crop(dataset.load(index), args.size, args.size) for index in indices]
    mean, std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (mean, std))
    normalised = (torch.stack(images).to(device).float() / 255 - mean) / std  # (N, 3, S, S)
    path = folder / "sobel.png"
    draw_sobel(
        list(zip(names, images, strict=True)),
        normalised,
        filters.to(device),
        conv,
        path=path,
        source=source,
        num_filters=args.num_filters,
    )
    logger.info(f"{len(images)} images, drawn to {path}")


# ============ arguments ============
# fmt: off
def add_sobel_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py sobel."""
    add = parser.add_argument_group("sobel").add_argument
    add("--queries", nargs="+", default=None,
        help="files of images (default: some images of the data)")
    add("--num_images", type=positive(int), default=4, help="images, without --queries")
    add("--num_filters", type=positive(int), default=6,
        help="filters of the first layer of a network, those whose maps vary most")
    picture_flags.add_network_flags(parser)
# fmt: on


def sobel_defaults(args: argparse.Namespace, explicit: dict) -> dict:
    """The network and the images, from the run, the file or the preset; files have no preset's size."""
    said = picture_flags.network_defaults(args, explicit)
    if args.queries and not args.pretrained:
        said.pop("size", None)
    return said


def check_sobel(args: argparse.Namespace) -> None:
    """Raise ValueError on arguments that do not fit together."""
    eval_flags.check_images(args)
    if args.in_chans != 3:
        raise ValueError(f"--in_chans {args.in_chans}: Sobel filters are of images of 3 channels")


SOBEL = Command(sobel, add_sobel_flags, sobel_defaults, check_sobel)
