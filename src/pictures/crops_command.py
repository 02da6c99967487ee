"""visualize.py crops: what a network is trained on."""

import argparse
import logging
from pathlib import Path

from ..data.augment import Augment
from ..data.multicrop import MultiCropDataset, collate_crops, generator
from ..evaluate import flags as eval_flags
from ..nets.pretrained import is_dino, read_run_args, run_folder
from ..run import checkpoint, image_flags
from ..run.flags import at_least_zero, positive
from ..run.lock import hold_folder
from ..run.presets import MADE_FOR_IMAGES, PRESET_OF, SHARED, look, photos, preset_for
from . import flags as picture_flags
from .crops import draw_crops
from .flags import Command
from .sheets import spread, to_uint8

logger = logging.getLogger(__name__)


def crops(args: argparse.Namespace) -> None:
    """Draw the crops of a few images, those of epoch --epoch; the colours are drawn anew."""
    image_flags.fill_in_crops(args)
    dataset = image_flags.open_images(args)
    options = image_flags.augment_options(args, dataset, sum(args.nmb_crops))
    multicrop = MultiCropDataset(dataset, **image_flags.crop_options(args))
    checkpoint.check_writable(args.dump_path)
    hold_folder(args.dump_path, f"visualize_{args.picture}")
    indices = spread(len(dataset), args.num_images)
    batch, _ = collate_crops([multicrop[args.epoch, index] for index in indices])
    views = Augment(**options)(batch, generator(args.seed, args.epoch, 0, 0))  # (B, C, S, S) each

    views = [to_uint8(view, options["mean"], options["std"]) for view in views]
    path = Path(args.dump_path) / "plots" / "multicrop.png"
    source = f"as in {args.pretrained}" if args.pretrained else ""
    draw_crops(multicrop, args.epoch, indices, views, path, source)
    for number, size, scale in zip(args.nmb_crops, args.size_crops, multicrop.scales, strict=True):
        smallest, largest = scale
        logger.info(f"{number} x {size} px, {smallest:g} to {largest:g} of the image's area")
    logger.info(f"{len(indices)} images with their crops, drawn to {path}")


# ============ arguments ============
# fmt: off
def add_crops_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py crops."""
    image_flags.add_crop_args(image_flags.add_data_args(parser, {**SHARED, "photos": {}}))
    image_flags.add_augment_args(parser)
    add = picture_flags.add_shared_flags(parser)
    add("--num_images", type=positive(int), default=8, help="images, a row of the sheet each")
    add("--epoch", type=at_least_zero(int), default=0, help="whose crops are drawn, from 0")
# fmt: on


def crops_defaults(args: argparse.Namespace, explicit: dict) -> dict:
    """The crops and the photometry, from the run or the preset."""
    run_args = read_run_args(args.pretrained)
    if not run_args:
        return _crops_of_preset(args, explicit)
    said = {**run_args, "dump_path": str(run_folder(args.pretrained))}
    if is_dino(run_args):
        scales = (run_args["global_crops_scale"], run_args["local_crops_scale"])
        values = {
            "nmb_crops": [2, run_args["local_crops_number"]],
            "size_crops": [run_args["global_crops_size"], run_args["local_crops_size"]],
            "min_scale_crops": [smallest for smallest, _ in scales],
            "max_scale_crops": [largest for _, largest in scales],
        }
        resolutions = 2 if run_args["local_crops_number"] else 1
        said |= {name: x[:resolutions] for name, x in values.items()}
    return said


def _crops_of_preset(args, explicit):
    """The values of --preset, which auto chooses as the training scripts do. Opens images without a name."""
    preset, situation = args.preset, None
    if preset == "auto" and args.data_path in PRESET_OF:
        preset = PRESET_OF[args.data_path]
    if preset in ("auto", *MADE_FOR_IMAGES):
        situation = look(image_flags.open_images(args), "auto", world_size=1)
    if preset == "auto":
        preset = preset_for(situation)
    if preset not in MADE_FOR_IMAGES:
        return {**SHARED[preset], "preset": preset}
    values = {**photos(situation), "preset": preset}
    numbers = explicit.get("nmb_crops", values["nmb_crops"])
    return {**values, "size_crops": values["crop_sides"][: len(numbers)]}


CROPS = Command(crops, add_crops_flags, crops_defaults, check=eval_flags.check_images)
