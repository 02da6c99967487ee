"""visualize.py filters and activations: what filters look like, and what they look for."""

import argparse
import logging
import math
from pathlib import Path

from PIL import Image

from .. import dist
from ..evaluate import flags as eval_flags
from ..run import checkpoint
from ..run.flags import at_least_zero, positive, probability
from ..run.lock import hold_folder
from . import activations as activation_pictures
from . import filters as filter_pictures
from . import flags as picture_flags
from . import responses
from .flags import Command
from .sheets import spread

logger = logging.getLogger(__name__)


def filters(args: argparse.Namespace) -> None:
    """Draw the first layer's filters; with --conv, --layer or --filters what a layer looks for."""
    network, calls = _trace_network(args)
    model, folder = network.model, Path(args.dump_path)
    if all(getattr(args, name) is None for name in ("conv", "layer", "filters", "num_filters")):
        first, path = responses.convolutions(model, calls)[0].module, folder / "filters.png"
        checkpoint.check_writable(folder)
        hold_folder(folder, f"visualize_{args.picture}")
        sobel = getattr(model, "sobel", None)
        filter_pictures.draw_first_layer(first, sobel, path, network.origin)
        logger.info(
            f"{first.out_channels} filters, drawn to {path}; --conv, --layer or --filters show what "
            "a layer looks for"
        )
        return
    layer, dataset, chosen, top = _rank_images(args, network, calls)
    samples = (dataset.load(index) for index in spread(len(dataset), 16))
    images, responses_before, responses_after = filter_pictures.ascend(
        model,
        layer,
        chosen,
        args.size,
        normalisation=network.normalisation(dataset),
        steps=args.steps,
        step_size=args.step_size,
        decay=args.decay,
        blur_every=args.blur_every,
        blur_sigma=args.blur_sigma,
        clip=args.clip,
        grey=all(bool((image == image[:1]).all()) for image in samples),
        seed=args.seed,
    )
    name = f"filters_{layer.name}"
    (folder / name).mkdir(exist_ok=True)
    for number, image, before, after in zip(
        chosen, images, responses_before, responses_after, strict=True
    ):
        picture = activation_pictures.as_picture(image)
        Image.fromarray(picture).save(folder / name / f"filter_{number:04}.png")
        natural = max((value for _, value in top.of_filter(number)), default=math.nan)
        logger.info(
            f"filter {number}: noise {before:.3g}, after ascent {after:.3g}, best image {natural:.3g}"
        )
    synthetic = list(zip(images, responses_after.tolist(), strict=True))
    path = folder / f"{name}.png"
    activation_pictures.draw_top_images(
        top, chosen, dataset, path, layer.name, network.origin, synthetic
    )
    logger.info(f"{len(chosen)} filters, drawn to {path}")


def activations(args: argparse.Namespace) -> None:
    """Write which images the filters of a layer respond to most, and draw them."""
    network, calls = _trace_network(args)
    layer, dataset, chosen, top = _rank_images(args, network, calls)
    folder = Path(args.dump_path)
    table = folder / "activations.csv"
    listed = chosen if args.filters else range(layer.num_filters)
    activation_pictures.write_table(top, listed, dataset, table)
    activation_pictures.draw_top_images(
        top, chosen, dataset, folder / "activations.png", layer.name, network.origin
    )
    rows, columns = layer.cells
    logger.info(
        f"{layer.name} has {layer.num_filters} filters of {rows} x {columns} cells; written to "
        f"{table}, look at {folder / 'activations.png'}"
    )


def _trace_network(args):
    """The network, frozen, on the device, and the use of its modules."""
    network = eval_flags.open_network(args)
    model = network.model.requires_grad_(False)
    if not args.pretrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, as its filters are")
    model.to(dist.resolve_device(args.device))
    return network, responses.trace(model, args.size, args.in_chans)


def _rank_images(args, network, calls):
    """(layer, images, filters to draw, what each filter responds to most)."""
    layer = responses.find_layer(network.model, calls, conv=args.conv, name=args.layer)
    dataset, device = eval_flags.open_split(args), dist.resolve_device(args.device)
    _check_filters(args, layer, len(dataset))
    checkpoint.check_writable(args.dump_path)
    hold_folder(args.dump_path, f"visualize_{args.picture}")
    precision = "fp32" if args.use_fp16 is False else args.precision
    precision = dist.resolve_precision(precision, device)
    top = activation_pictures.find_top_images(
        network.model,
        layer,
        dataset,
        number=args.top,
        size=args.size,
        normalisation=network.normalisation(dataset),
        device=device,
        batch_size=args.batch_size,
        num_workers=args.workers,
        loader_timeout=args.loader_timeout,
        precision=precision,
    )
    chosen = list(dict.fromkeys(args.filters or [])) or top.most_active(args.num_filters or 8)
    return layer, dataset, chosen, top


# ============ arguments ============
# fmt: off
def add_filters_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py filters."""
    _add_layer_flags(parser)
    add = parser.add_argument_group("gradient ascent").add_argument
    add("--steps", "--niter", type=positive(int), default=200, help="steps from noise to the image")
    add("--step_size", type=positive(float), default=0.1,
        help="root mean square of a step over the pixels, in standard deviations of the data")
    add("--decay", type=probability, default=0.01,
        help="share by which every step draws the image towards the mean colour")
    add("--blur_every", "--step", type=at_least_zero(int), default=4,
        help="steps between Gaussian blurs; 0: none")
    add("--blur_sigma", "--sig", type=positive(float), default=0.5,
        help="standard deviation of that blur in pixels")
    add("--clip", type=probability, default=0.0,
        help="share of the pixels, those nearest to the mean colour, that become it at every step")
    picture_flags.add_network_flags(parser)


def add_activations_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py activations."""
    _add_layer_flags(parser)
    picture_flags.add_network_flags(parser)


def _add_layer_flags(parser):
    add = parser.add_argument_group("layer").add_argument
    add("--conv", type=positive(int), default=None,
        help="number of a convolution, from 1 on, with its batch norm and ReLU (default: the last)")
    add("--layer", default=None, help="instead, the name of any module, such as layer4.0.conv2")
    add("--filters", type=at_least_zero(int), nargs="+", default=None,
        help="numbers of filters of that layer, from 0 on")
    add("--num_filters", type=positive(int), default=None,
        help="or so many, those of the largest mean response to the images (default: 8)")
    add("--top", "--count", type=positive(int), default=9, help="images of each filter")
# fmt: on


def _check_filters(args, layer, num_images):
    """Raise ValueError on filters or images that are not there; of `layer` and the data."""
    last = layer.num_filters - 1
    for number in args.filters or []:
        if number > last:
            raise ValueError(f"--filters {number} is not there: {layer.name} has 0 to {last}")
    if args.num_filters and args.num_filters > layer.num_filters:
        count = f"the {layer.num_filters} filters of {layer.name}"
        raise ValueError(f"--num_filters {args.num_filters} is more than {count}: use fewer")
    if args.top > num_images:
        images = f"the {num_images} images of --data_path {args.data_path}"
        raise ValueError(f"--top {args.top} is more than {images}: use fewer")


def check_layer(args: argparse.Namespace) -> None:
    """Raise ValueError on arguments that do not fit together."""
    eval_flags.check_images(args)
    if args.conv and args.layer:
        raise ValueError(f"--conv {args.conv} and --layer {args.layer}: give one of them")


FILTERS = Command(filters, add_filters_flags, picture_flags.network_defaults, check_layer)
ACTIVATIONS = Command(
    activations, add_activations_flags, picture_flags.network_defaults, check_layer
)
