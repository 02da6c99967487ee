"""visualize.py patches: patches in the colours of their features."""

import argparse
import logging
from pathlib import Path

import torch

from .. import dist
from ..evaluate import flags as eval_flags
from ..nets.pooling import forward_of_feature, stride_of_positions
from ..nets.pretrained import run_folder
from ..run import checkpoint
from ..run.flags import at_least_zero, positive
from ..run.lock import hold_folder
from ..run.presets import preset_of
from . import attention as attention_maps
from . import flags as picture_flags
from .flags import Command
from .patches import colours_of_patches, draw_patches

logger = logging.getLogger(__name__)


@torch.no_grad()
def patches(args: argparse.Namespace) -> None:
    """Draw patches in the colours of their features: three principal components of all images."""
    network = eval_flags.open_network(args)
    forward = forward_of_feature(network, "patches")
    stride = stride_of_positions(network, forward)
    frames, _, normalisation, file_names = picture_flags.open_images(args)
    folder, device = Path(args.dump_path), dist.resolve_device(args.device)
    checkpoint.check_writable(folder)
    hold_folder(folder, f"visualize_{args.picture}")
    if not args.pretrained:
        logger.warning(
            "WARNING: no --pretrained: the network is UNTRAINED, what it finds alike is not learned"
        )
    network.model.to(device)
    mean, std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in normalisation)
    names, images, maps = [], [], []
    for name, image in frames:
        image = attention_maps.fit_image(image, args.image_size, stride)
        features = forward(((image.to(device).float() / 255 - mean) / std)[None])[0].float().cpu()
        names.append(name)
        images.append(image)
        maps.append(features.unflatten(0, [side // stride for side in image.shape[1:]]))
    colours = colours_of_patches(maps, args.foreground)
    notes = [network.origin, "red, green, blue: the first three components of all these patches"]
    if args.foreground:
        notes.append("black: what the first component tells from them, as it tells the edges")
    drawn = [(names[i], images[i], colours[i]) for i in range(len(names))]
    draw_patches(drawn, folder, notes)
    for name, file in file_names.items():
        logger.info(f"{name}.png is of {file}")
    logger.info(f"{len(names)} images, written to {folder}; look at {folder / 'sheet.png'}")


# ============ arguments ============
# fmt: off
def add_patches_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py patches."""
    add = parser.add_argument_group("patches").add_argument
    add("--image_path", default=None,
        help="an image, a folder of images, a video or an animated GIF; or else --data_path")
    add("--image_size", type=positive(int), nargs="+", default=[448],
        help="height and width in pixels; one value: of the shorter side, the shape stays")
    add("--foreground", action="store_true",
        help="draw only what the first component tells from the edges of the images, in colours of its own")
    add("--num_images", type=positive(int), default=8, help="images that share their colours")
    add("--every", type=positive(int), default=1, help="take every so many-th frame or image")
    eval_flags.add_network_args(parser)
    parser.set_defaults(arch="vit_small")
    add = parser.add_argument_group("files").add_argument
    add("--dump_path", "--output_dir", default=".",
        help="folder of the pictures; by default that of the run, if there is one")
    add("--seed", type=at_least_zero(int), default=31, help="seed of an untrained network")
    picture_flags.add_data_flags(parser, add)
# fmt: on


def patches_defaults(args: argparse.Namespace, explicit: dict) -> dict:
    """The network from the run, the file or the preset; images twice as large as its crops."""
    _, said = eval_flags.network_defaults(args, explicit)
    if not args.pretrained and not explicit.keys() & {"arch", "patch_size"}:
        said = {**picture_flags.NETWORKS.get(preset_of(args.data_path), {})}
    side = said.get("size") or said.get("img_size")
    if side:
        said["image_size"] = [2 * side]
    folder = run_folder(args.pretrained) if eval_flags.is_run(args.pretrained) else Path()
    return {**said, "dump_path": str(folder / "plots" / "patches")}


PATCHES = Command(
    patches, add_patches_flags, patches_defaults, check=picture_flags.check_image_size
)
