"""Flags that the evaluations of frozen features share, and where their defaults come from.

The command line wins over the run or the file of weights that is evaluated, this over the preset of
small images, that over the defaults.
"""

import argparse
from collections.abc import Callable

import torch

from .. import dist
from ..data.datasets import ImageDataset, open_dataset
from ..nets.pretrained import (
    NETWORK_FLAGS,
    Pretrained,
    describe,
    for_channels,
    open_pretrained,
    read_run_args,
    run_folder,
    settings_of_run,
)
from ..run import flags, image_flags
from ..run.flags import positive
from ..run.presets import CROPS, default_folder, preset_of

OF_DATA = ("data_root", "label_column")  # flags that say how --data_path is read
# Networks for small images that are not of a run.
SMALL_NETWORKS = {
    "tiny": {"arch": "resnet10", "stem": "small", "width": 0.25, "workers": 0},
    "cifar": {"arch": "resnet18", "stem": "small"},
}


def weights(text: str) -> str:
    """An argparse type: what --pretrained names, "" for none."""
    return "" if text == "none" else text


# fmt: off
def add_network_args(parser: argparse.ArgumentParser) -> None:
    """The network and the file that its weights come from."""
    flags.add_vit_args(parser)
    flags.add_model_args(parser)
    add = parser.add_argument_group("classifiers of clusters or rotations").add_argument
    add("--sobel", type=flags.boolean, nargs="?", const=True, default=None,
        help="true: Sobel filters before the first layer; false: none, but alexnet and vgg16 have "
        "batch norm; by default the file says it, else these two are torchvision's")
    add("--sobel_padding", type=int, choices=[1, 2], default=None,
        help="zeros around the image there: 1 DeepCluster's, 2 DeeperCluster's")
    add = parser.add_argument_group("weights").add_argument
    add("--pretrained", "--pretrained_weights", default="", type=weights,
        help="a run's folder, a checkpoint, a file of weights, a folder of the Hugging Face hub, or "
        "torchvision:resnet50 or timm:resnet50 to download theirs; a run says all flags of its network; a "
        "file those that its tensors tell, such as --arch, --width, --patch_size, --sobel; none: an "
        "untrained network")
    add("--checkpoint_key", default=None,
        help="section of the file: student, teacher, ... (default: teacher, if there is one)")


def add_image_args(parser: argparse.ArgumentParser) -> Callable:
    """The images and how they are prepared; returns the group's add_argument."""
    add = add_path_args(parser)
    add("--in_chans", type=positive(int), default=3, help="channels of the images")
    add("--mean", type=float, nargs="+", default=None, help="of each channel; default: the data's")
    add("--std", type=float, nargs="+", default=None, help="of each channel; default: the data's")
    return add


def add_path_args(parser: argparse.ArgumentParser) -> Callable:
    """Where the images are, and the size of their crops; returns the group's add_argument."""
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="digits",
        help="digits, cifar10, ..., a folder of class folders or of train/ and val/, a list of files "
        "(.txt, .csv), or tar shards")
    add("--train_path", default=None, help="training images that are not in --data_path")
    add("--val_path", default=None, help="validation images that are not in --data_path")
    image_flags.add_list_args(add)
    image_flags.add_reading_args(add)
    add("--size", type=positive(int), default=224, help="side in pixels of the crops")
    return add
# fmt: on


def parse_args(
    parser: argparse.ArgumentParser, argv: list[str] | None, name: str
) -> tuple[argparse.Namespace, dict]:
    """The arguments, and those of the run that is evaluated ({} if it is of none).

    name: of the evaluation; results go to the folder of the run, and without one to runs/<name>_<data>.
    `args.given` holds the names on the command line, `args.preset` the preset of the data. Raises
    ValueError and OSError for a run or weights that cannot be read.
    """
    explicit = flags.explicit_flags(parser, argv)
    args = with_defaults(parser, explicit)
    run_args, said = network_defaults(args, explicit)
    said["dump_path"] = default_folder(name, args.data_path)
    if is_run(args.pretrained):
        said["dump_path"] = str(run_folder(args.pretrained))  # results lie beside the run
    args = with_defaults(parser, explicit, said)
    args.given = sorted(explicit)
    args.preset = preset_of(args.data_path)
    if args.use_fp16 is not None and args.precision == "auto":
        args.precision = "auto" if args.use_fp16 else "fp32"
    return args, run_args


def network_defaults(args: argparse.Namespace, explicit: dict) -> tuple[dict, dict]:
    """(arguments of the run, what it, the file or the preset says of network and images, by flag).

    explicit: what the command line says. Raises ValueError and OSError.
    """
    if args.pretrained and getattr(args, "load_features", None):  # which opens no network
        run_args = read_run_args(args.pretrained)
        return run_args, settings_of_run(run_args)
    if args.pretrained:
        run_args, said = describe(args.pretrained, explicit.get("arch"), args.checkpoint_key)
        return run_args, for_channels(said, explicit.get("in_chans", said.get("in_chans", 3)))
    if "arch" in explicit:
        return {}, {}
    preset = preset_of(args.data_path)
    return {}, {"size": CROPS[preset]["size"][0], **SMALL_NETWORKS.get(preset, {})}


def with_defaults(
    parser: argparse.ArgumentParser, explicit: dict, said: dict | None = None
) -> argparse.Namespace:
    """All flags of a parser: `explicit` wins over `said`, that over the parser's defaults.

    How a run found the images in its data (OF_DATA) counts for no other data than its own.
    """
    defaults = vars(parser.parse_args([]))
    said = {name: value for name, value in (said or {}).items() if name in defaults}
    has_own_sets = {"train_path", "val_path"} <= explicit.keys()
    if has_own_sets or explicit.get("data_path", said.get("data_path")) != said.get("data_path"):
        said = {name: value for name, value in said.items() if name not in OF_DATA}
    return argparse.Namespace(**{**defaults, **said, **explicit})


def network_of(path: str) -> dict:
    """The flags of the network in a run or a file of weights, as far as these tell them.

    Raises as src.nets.pretrained.describe.
    """
    _, said = describe(path)
    return {name: said[name] for name in NETWORK_FLAGS if said.get(name) is not None}


def is_run(pretrained: str) -> bool:
    """Whether --pretrained is a run's folder or lies in one, rather than a file on its own."""
    return bool(pretrained) and (run_folder(pretrained) / "args.json").is_file()


def open_network(args: argparse.Namespace, feature: str = "backbone", **options) -> Pretrained:
    """The network of the flags with its weights, or untrained without --pretrained.

    feature, options: see src.nets.pretrained.open_pretrained, which says what is raised, too.
    """
    return open_pretrained(
        args.pretrained,
        args.arch,
        checkpoint_key=args.checkpoint_key,
        feature=feature,
        image_size=getattr(args, "size", None),
        mean=args.mean,
        std=args.std,
        seed=getattr(args, "seed", None),
        **{name: getattr(args, name) for name in NETWORK_FLAGS if name != "arch" and name in args},
        **options,
    )


def with_network(args: argparse.Namespace, network: Pretrained) -> dict:
    """The command line, and what the network was built with where no flag says it: for args.json."""
    built_with = {
        name: value for name, value in network.options.items() if getattr(args, name, None) is None
    }
    return {**vars(args), **built_with}


def open_split(args: argparse.Namespace) -> ImageDataset:
    """The images of --split, of --train_path or --val_path where it is given, else of --data_path.

    Raises as src.data.datasets.open_dataset.
    """
    path = {"train": args.train_path, "val": args.val_path}[args.split]
    flag = f"--{args.split if path else 'data'}_path"
    opening = image_flags.opening_options(args)
    return open_dataset(path or args.data_path, args.split, args.in_chans, flag, **opening)


def extraction_options(
    args: argparse.Namespace, network: Pretrained, dataset: ImageDataset, device: torch.device
) -> dict:
    """The arguments of src.labels.features.extract_features after the images: the same features for the
    same flags, whichever script computes them."""
    mean, std = network.normalisation(dataset)
    return {
        "size": args.size,
        "mean": mean,
        "std": std,
        "device": device,
        "batch_size": args.batch_size,
        "num_workers": args.workers,
        "loader_timeout": args.loader_timeout,
        "precision": dist.resolve_precision(args.precision, device),
        "interpolation": args.interpolation,
    }


def check_images(args: argparse.Namespace) -> None:
    """Raise ValueError on flags of the images that do not fit together."""
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values is not None and len(values) != args.in_chans:
            raise ValueError(f"--{name} has {len(values)} values and --in_chans is {args.in_chans}")
