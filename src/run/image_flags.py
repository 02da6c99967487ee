"""Flags of images and crops, shared by the scripts that train: data, multi-crop, photometry."""

import argparse
from collections.abc import Callable

from ..data.datasets import MAX_BROKEN, STORAGE_TIMEOUT, ImageDataset, open_dataset
from . import flags
from .flags import at_least_zero, positive, probability
from .presets import CROPS, look


def parse_args(
    parser: argparse.ArgumentParser,
    presets: dict[str, dict | Callable],
    argv: list[str] | None,
    method: str,
    world_size: int,
) -> tuple[argparse.Namespace, ImageDataset]:
    """The arguments of a script that trains, and its images, which --preset auto looks at.

    See src.run.flags.parse_args for the first four. Raises as src.data.datasets.open_dataset.
    """
    opened = []

    def look_at_images(args):
        opened.append(open_images(args))
        return look(opened[0], args.device, world_size)

    args = flags.parse_args(parser, presets, argv, method=method, look=look_at_images)
    return args, opened[0] if opened else open_images(args)


def add_data_args(parser: argparse.ArgumentParser, presets: dict[str, dict]) -> Callable:
    """Images and the preset; returns the group's add_argument for the crops."""
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="digits",
        help="digits, cifar10, ..., a folder of images, a list of files (.txt, .csv), or tar shards; no "
        "labels are needed")  # fmt: skip
    add_list_args(add)
    add_reading_args(add)
    choices = ["auto", *presets, *(["continue"] if "photos" in presets else [])]
    add("--preset", default="auto", choices=choices,
        help="defaults of all flags; auto: tiny for digits, cifar for cifar10 and the like and for images "
        "of their size, imagenet, the published values, from 300,000 images on, else photos, which are "
        "made for the number of images; continue: as photos, to go on from the weights of --init_from; "
        "--preset X --help shows the defaults of X")  # fmt: skip
    return add


def add_list_args(add: Callable) -> None:
    """How lists of files are read; the same in every script that opens images by --data_path."""
    add("--data_root", default=None,
        help="folder that the paths in a list of files are relative to (default: the list's)")  # fmt: skip
    add("--label_column", default=None,
        help="column of labels in a list with a header (default: label or class, if any)")  # fmt: skip


def add_reading_args(add: Callable) -> None:
    """What happens when images cannot be read; the same in every script that opens images."""
    add("--storage_timeout", type=at_least_zero(float), default=STORAGE_TIMEOUT,
        help="seconds to wait for a storage that does not answer, before the run stops")  # fmt: skip
    add("--max_broken", type=probability, default=MAX_BROKEN,
        help="share of the images that may be broken or missing, 5 images in any case, before the run "
        "stops; 0: none")  # fmt: skip


def reading_options(args: argparse.Namespace) -> dict:
    """The arguments of src.data.datasets.ImageDataset that come from the flags of add_reading_args."""
    return {"storage_timeout": args.storage_timeout, "max_broken": args.max_broken}


def opening_options(args: argparse.Namespace) -> dict:
    """The arguments of src.data.datasets.open_dataset: those of lists, and reading_options."""
    lists = {"data_root": args.data_root, "label_column": args.label_column}
    return {**reading_options(args), **lists}


def open_images(args: argparse.Namespace) -> ImageDataset:
    """The images to train on, of --data_path; raises as src.data.datasets.open_dataset."""
    return open_dataset(args.data_path, in_chans=args.in_chans, **opening_options(args))


def add_crop_args(add: Callable) -> None:
    """Crops, a value for each resolution; what is not given comes from the preset (fill_in_crops)."""
    add("--nmb_crops", type=positive(int), nargs="+", default=[2],
        help="number of crops for each resolution, such as 2 6")  # fmt: skip
    add("--size_crops", type=positive(int), nargs="+", default=None,
        help="side in pixels for each resolution (default: of the preset, 224 96)")  # fmt: skip
    add("--min_scale_crops", type=float, nargs="+", default=None,
        help="smallest share of the image's area in a crop (default: of the preset, 0.14 0.05)")  # fmt: skip
    add("--max_scale_crops", type=float, nargs="+", default=None,
        help="largest share of the image's area in a crop (default: of the preset, 1 0.14)")  # fmt: skip


def fill_in_crops(args: argparse.Namespace) -> None:
    """Crop sizes and scales that were not given are those of the preset; all lists equally long."""
    num_resolutions, wrong = len(args.nmb_crops), []
    of_preset = dict(CROPS.get("photos" if args.preset == "continue" else args.preset, {}))
    if getattr(args, "crop_sides", None):
        of_preset["size"] = args.crop_sides
    for key in ("size", "min_scale", "max_scale"):
        name = f"{key}_crops"
        if getattr(args, name) is None:
            if key not in of_preset:
                raise ValueError(f"--preset {args.preset} says no --{name}: give it, or a preset")
            setattr(args, name, of_preset[key][:num_resolutions])
        if len(getattr(args, name)) != num_resolutions:
            wrong.append(f"--{name} has {len(getattr(args, name))} values")
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} and --nmb_crops has {num_resolutions}: give one value for each "
            "resolution to each of them"
        )
    for low, high in zip(args.min_scale_crops, args.max_scale_crops, strict=True):
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"--min_scale_crops {low} --max_scale_crops {high}: need 0 < min <= max <= 1, "
                "the share of the image's area"
            )


def check_crops_for_assign(args: argparse.Namespace) -> None:
    """ValueError unless --crops_for_assign are different crops of --nmb_crops."""
    num_crops = sum(args.nmb_crops)
    if max(args.crops_for_assign) >= num_crops or len(set(args.crops_for_assign)) < len(
        args.crops_for_assign
    ):
        raise ValueError(
            f"--crops_for_assign {args.crops_for_assign} must be different crops below {num_crops}, "
            f"the number of crops of --nmb_crops, such as {' '.join(map(str, range(min(2, num_crops))))}"
        )


def add_augment_args(parser: argparse.ArgumentParser) -> None:
    """Photometry of the crops (SwAV, appendix A.2); every transformation can be switched off."""
    group = parser.add_argument_group("image transformations, for each crop")
    add = group.add_argument
    add("--in_chans", type=positive(int), default=3, help="channels of the images")
    add("--mean", type=float, nargs="+", default=None, help="of each channel; default: the data's")
    add("--std", type=float, nargs="+", default=None, help="of each channel; default: the data's")
    add_flip_args(add)
    add("--color_jitter", type=at_least_zero(float), nargs="+", default=[0.8, 0.8, 0.8, 0.2],
        help="strength for brightness, contrast, saturation, hue; 0: none")  # fmt: skip
    add("--jitter_prob", type=probability, default=0.8, help="probability of the colour jitter")
    add("--grayscale", type=probability, default=0.2, help="probability of grayscale")
    add("--blur", type=probability, nargs="+", default=[0.5],
        help="probability of each crop's Gaussian blur; the last one holds for further crops")  # fmt: skip
    add("--blur_sigma", type=positive(float), nargs=2, default=[0.1, 2.0],
        help="range of the blur's standard deviation, in pixels")  # fmt: skip
    add("--solarize", type=probability, nargs="+", default=[0.0],
        help="probability of solarisation, likewise")  # fmt: skip
    add("--interpolation", default="bilinear", choices=["bilinear", "bicubic"],
        help="of the resize of a crop")  # fmt: skip
    add("--reduced_decoding", type=flags.boolean, nargs="?", const=True, default=False,
        help="decode a JPEG at 1/2, 1/4 or 1/8 of its size where no crop of it is enlarged by that; faster "
        "on photographs much larger than the crops, whose pixels change slightly")  # fmt: skip


def add_flip_args(add: Callable) -> None:
    """--no_flip, and --flip against a preset that switches it off."""
    add("--no_flip", "--no-flip", type=flags.boolean, nargs="?", const=True, default=False,
        help="no horizontal flip (default: probability 0.5)")  # fmt: skip
    add("--flip", dest="no_flip", action="store_false", default=argparse.SUPPRESS,
        help="flip, also where the preset does not")  # fmt: skip


def crop_options(args: argparse.Namespace) -> dict:
    """The arguments of src.data.multicrop.MultiCropDataset that come from flags."""
    return {
        "num_crops": args.nmb_crops,
        "size_crops": args.size_crops,
        "min_scale_crops": args.min_scale_crops,
        "max_scale_crops": args.max_scale_crops,
        "seed": args.seed,
        "interpolation": args.interpolation,
        "reduced_decoding": args.reduced_decoding,
    }


def augment_options(args: argparse.Namespace, dataset: ImageDataset, num_crops: int) -> dict:
    """The arguments of src.data.augment.Augment; mean and std are the data's unless given."""
    jitter = args.color_jitter
    if jitter == [0]:
        jitter = [0.0] * 4
    if len(jitter) != 4:
        raise ValueError(
            "--color_jitter takes 4 values (brightness contrast saturation hue) or a single 0"
        )
    for name in ("mean", "std"):
        given = getattr(args, name)
        if given is not None and len(given) != args.in_chans:
            raise ValueError(f"--{name} has {len(given)} values and --in_chans is {args.in_chans}")
    return {
        "mean": args.mean or dataset.mean,
        "std": args.std or dataset.std,
        "flip_prob": 0.0 if args.no_flip else 0.5,
        "color_jitter": tuple(jitter),
        "jitter_prob": args.jitter_prob,
        "grayscale_prob": args.grayscale,
        "blur_prob": for_each_crop("--blur", args.blur, num_crops),
        "blur_sigma": tuple(args.blur_sigma),
        "solarize_prob": for_each_crop("--solarize", args.solarize, num_crops),
    }


def for_each_crop(flag: str, values: list[float], num_crops: int) -> list[float]:
    """One value for each crop; the last of `values` holds for all further crops, if there are any."""
    if len(values) > num_crops + 1:
        raise ValueError(f"{flag} has {len(values)} values and there are {num_crops} crops")
    return (values + values[-1:] * num_crops)[:num_crops]
