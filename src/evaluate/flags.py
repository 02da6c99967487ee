"""Flags that the evaluations of frozen features share, and where their defaults come from.

The command line wins over the run that is evaluated, the run or the file of weights over the preset
of small images, that over the defaults.
"""

import argparse
import math
from collections.abc import Callable

from ..nets.backbones import is_vit
from ..nets.weights import SOBEL, read_weights
from ..run import flags, image_flags
from ..run.flag_types import positive
from .evaluation import run_arguments, run_defaults, run_folder

# Small images, and networks for them that are not of a run.
NETWORKS = {
    "tiny": {"arch": "resnet10", "stem": "small", "width": 0.25, "workers": 0},
    "cifar": {"arch": "resnet18", "stem": "small"},
}
ARCH_OF_WIDTH = {96: "vit_micro", 192: "vit_tiny", 384: "vit_small", 768: "vit_base"}
QKV = "blocks.0.attn.qkv.weight"  # of the first block of a vision transformer


def add_network_args(parser: argparse.ArgumentParser) -> None:
    """The network and the file that its weights come from."""
    flags.add_vit_args(parser)
    flags.add_model_args(parser)
    add = parser.add_argument_group("classifiers of clusters or rotations").add_argument
    add("--sobel", type=flags.boolean, nargs="?", const=True, default=None,
        help="true: Sobel filters before the first layer; false: none, but alexnet and vgg16 have "
        "batch norm; by default the file says it, else these two are torchvision's")  # fmt: skip
    add("--sobel_padding", type=int, choices=[1, 2], default=None,
        help="zeros around the image there: 1 DeepCluster's, 2 DeeperCluster's")  # fmt: skip
    add = parser.add_argument_group("weights").add_argument
    add("--pretrained", "--pretrained_weights", default="",
        help="a run's folder, a checkpoint of it, a released file, or torchvision weights; those of "
        "a vision transformer say its --arch, --patch_size, --img_size, --depth, those of DeepCluster "
        "and the like their --arch, --width, --sobel")  # fmt: skip
    add("--checkpoint_key", default=None,
        help="section of the file: student, teacher, ... (default: teacher, if there is one)")  # fmt: skip


def add_image_args(parser: argparse.ArgumentParser) -> Callable:
    """The images and how they are prepared; returns the group's add_argument."""
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="digits",
        help="digits, cifar10, ..., a folder of class folders or of train/ and val/, or tar shards")  # fmt: skip
    add("--train_path", default=None, help="training images that are not in --data_path")
    add("--val_path", default=None, help="validation images that are not in --data_path")
    add("--size", type=positive(int), default=224, help="side in pixels of the crops")
    add("--in_chans", type=positive(int), default=3, help="channels of the images")
    add("--mean", type=float, nargs="+", default=None, help="of each channel; default: the data's")
    add("--std", type=float, nargs="+", default=None, help="of each channel; default: the data's")
    return add


def parse_args(
    get_parser: Callable[[], argparse.ArgumentParser], argv: list[str] | None
) -> tuple[argparse.Namespace, dict]:
    """The arguments, and those of the run that is evaluated ({} if it is not a run).

    `args.given` holds the names on the command line, `args.preset` the preset of the data. Raises
    ValueError and OSError for a run or weights that cannot be read.
    """
    parser, blank = get_parser(), get_parser()
    args = parser.parse_args(argv)
    blank.set_defaults(**dict.fromkeys(vars(args)))
    given = {name for name, x in vars(blank.parse_args(argv)).items() if x is not None}
    run = run_arguments(args.pretrained) if args.pretrained else {}
    defaults = run_defaults(run)
    if run:
        defaults["dump_path"] = str(run_folder(args.pretrained))  # results lie beside the run
    elif not args.pretrained and "arch" not in given:
        preset = flags.preset_of(args.data_path)
        defaults = {"size": image_flags.CROPS[preset]["size"][0], **NETWORKS.get(preset, {})}
    elif args.pretrained and not getattr(args, "load_features", None):
        arch = args.arch if "arch" in given else None
        defaults = file_defaults(args.pretrained, args.checkpoint_key, arch)
    parser.set_defaults(**defaults, given=sorted(given))
    args = parser.parse_args(argv)
    args.preset = flags.preset_of(args.data_path)
    if args.use_fp16 is not None and args.precision == "auto":
        args.precision = "auto" if args.use_fp16 else "fp32"
    return args, run


def file_defaults(
    pretrained: str, checkpoint_key: str | None = None, arch: str | None = None
) -> dict:
    """What a file says about the vision transformer or the classifier of clusters in it, by flag.

    arch: the one that was asked for; of another the file's flags are not taken. {} where the file
    says nothing. Raises as read_weights does.
    """
    weights = read_weights(pretrained, checkpoint_key)
    if arch is None or is_vit(arch):
        found = _vit_flags(weights)
        if found or arch is not None:
            return found
    found = _convnet_flags(weights)
    return found if arch in (None, found.get("arch", arch)) else {}


def vit_defaults(pretrained: str, checkpoint_key: str | None = None) -> dict:
    """What a file says about the vision transformer in it, by flag; {} if there is none in it.

    The size of the images is that of a square table of positions. Raises as read_weights does.
    """
    return _vit_flags(read_weights(pretrained, checkpoint_key))


def _vit_flags(weights):
    start = next((name.removesuffix(QKV) for name in weights if name.endswith(QKV)), None)
    names = ("pos_embed", "patch_embed.proj.weight")
    if start is None or any(f"{start}{name}" not in weights for name in names):  # XCiT has no table
        return {}
    table, patches = (weights[f"{start}{name}"] for name in names)  # (1, 1 + N, D), (D, C, P, P)
    blocks = {
        name.removeprefix(start).split(".")[1] for name in weights if f"{start}blocks." in name
    }
    found = {"patch_size": patches.shape[-1], "depth": len(blocks)}
    side = math.isqrt(table.shape[1] - 1)
    if side**2 == table.shape[1] - 1:
        found["img_size"] = side * patches.shape[-1]
    if table.shape[2] in ARCH_OF_WIDTH:
        found["arch"] = ARCH_OF_WIDTH[table.shape[2]]
    if f"{start}register_tokens" in weights:
        found["num_registers"] = weights[f"{start}register_tokens"].shape[1]
    return found


def _convnet_flags(weights):
    """Flags of AlexNet or VGG-16 with batch norm, or of any network under Sobel filters; else {}."""
    body = "body." if any(name.startswith("body.") for name in weights) else ""
    found = {}
    if f"{SOBEL}0.weight" in weights:  # DeeperCluster, whose trunk is called body, pads by 2
        found = {"sobel": True, "sobel_padding": 2 if body else 1}
    layers = {name.removeprefix(body): x for name, x in weights.items()}
    # torchvision's networks end in classifier.6, and without batch norm 1 is a ReLU
    if "features.1.running_mean" not in layers or "classifier.6.weight" in layers:
        return found
    kernel = layers["features.0.weight"].shape[-1] if "features.0.weight" in layers else None
    for arch, last, side in (
        ("alexnet", "classifier.4.weight", 11),
        ("vgg16", "classifier.3.weight", 3),
    ):
        if kernel == side and last in layers:
            found = {"arch": arch, "width": len(layers[last]) / 4096, "sobel": False, **found}
    return found


def check_images(args: argparse.Namespace) -> None:
    """Raise ValueError on flags of the images that do not fit together."""
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values is not None and len(values) != args.in_chans:
            raise ValueError(f"--{name} has {len(values)} values and --in_chans is {args.in_chans}")
