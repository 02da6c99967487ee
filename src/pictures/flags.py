"""Flags of visualize.py, and what they are where a run, a file of weights or the data says it."""

import argparse
from pathlib import Path

from ..evaluate import flags as eval_flags
from ..nets.pretrained import describe, is_dino, read_run_args, run_folder
from ..run import flags, image_flags
from ..run.flags import at_least_zero, positive, probability
from ..run.presets import (
    MADE_FOR_IMAGES,
    PRESET_OF,
    SHARED,
    look,
    photos,
    preset_for,
    preset_of,
)
from .responses import Layer

# Untrained networks for small images, which are enlarged for them.
NETWORKS = dict.fromkeys(
    ("tiny", "cifar"), {"arch": "vit_tiny", "patch_size": 8, "image_size": [96, 96]}
)
TRAINED_SIZE = 224  # pixels of the crops that the published 480 is meant for


# fmt: off
def add_attention_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py attention."""
    add = parser.add_argument_group("attention").add_argument
    add("--image_path", default=None,
        help="an image, a folder of images, a video or an animated GIF; or else --data_path")
    add("--image_size", type=positive(int), nargs="+", default=(480, 480),
        help="height and width in pixels; one value: of the shorter side, the shape stays")
    add("--threshold", type=positive(float), default=None,
        help="also draw the patches that hold this share of each head's attention, such as 0.6")
    add("--num_images", type=positive(int), default=None,
        help="the first images of --image_path (default: all), or so many of --data_path (4), of --voc "
        "(all)")
    add("--every", type=positive(int), default=1, help="take every so many-th frame or image")
    add("--fps", type=positive(float), default=10, help="frames a second of attention.gif")
    add("--voc", default=None,
        help="instead, measure the masks of --threshold (0.6) as segments: the folder VOCdevkit of "
        "PASCAL VOC 2012")
    add("--baseline", default="",
        help="with --voc: another vision transformer to measure beside it, such as a supervised one; "
        "untrained: the same network before its training")
    add = flags.add_vit_args(parser)
    add("--arch", default="vit_small", help="vit_tiny, vit_small or vit_base")
    add("--width", type=positive(float), default=1.0, help="multiplies the dimension of the tokens")
    parser.set_defaults(patch_size=8)
    add = _add_shared_flags(parser)
    add("--checkpoint_key", default=None,
        help="section of the file: student, teacher, ... (default: teacher, if there is one)")
    _add_data_flags(parser, add)


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
    _add_data_flags(parser, add)


def _add_data_flags(parser, add):
    """The device, with the `add` of an earlier group, and the images."""
    add("--device", default="auto",
        help="auto, cpu, cuda, cuda:1, mps; auto: a GPU if there is one")
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="digits",
        help="digits, cifar10, ..., a folder of images, a list of files, or tar shards")
    image_flags.add_list_args(add)
    image_flags.add_reading_args(add)
    add("--in_chans", type=positive(int), default=3, help="channels of the images")
    add("--mean", type=float, nargs="+", default=None, help="of each channel; default: the data's")
    add("--std", type=float, nargs="+", default=None, help="of each channel; default: the data's")


def add_crops_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py crops."""
    image_flags.add_crop_args(image_flags.add_data_args(parser, {**SHARED, "photos": {}}))
    image_flags.add_augment_args(parser)
    add = _add_shared_flags(parser)
    add("--num_images", type=positive(int), default=8, help="images, a row of the sheet each")
    add("--epoch", type=at_least_zero(int), default=0, help="whose crops are drawn, from 0")


def add_neighbours_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py neighbours."""
    add = parser.add_argument_group("neighbours").add_argument
    add("--queries", nargs="+", default=None,
        help="files of images whose neighbours are looked for (default: some images of the data)")
    add("--num_images", type=positive(int), default=12, help="queries, without --queries")
    add("--top", type=positive(int), default=10, help="neighbours of each query")
    _add_feature_flags(add)
    _add_network_flags(parser)


def _add_feature_flags(add):
    """Which features of images are taken, as evaluations take them."""
    add("--feature", default="backbone", choices=["backbone", "embedding"],
        help="the pooled output of the trunk, or that of the projection head")
    add("--interpolation", default="bicubic", choices=["bilinear", "bicubic"], help="of the resize")


def add_classes_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py classes."""
    add = parser.add_argument_group("classes").add_argument
    add("--method", default="tsne", choices=["tsne", "pca"], help="how means become points")
    add("--pca_dim", type=positive(int), default=30, help="components that t-SNE is of")
    add("--perplexity", type=positive(float), default=None,
        help="of t-SNE (default: 20, of fewer than 61 classes a third of their number less one)")
    add("--learning_rate", type=positive(float), default=200.0, help="of t-SNE")
    add("--iterations", type=positive(int), default=5000, help="of t-SNE")
    _add_feature_flags(add)
    _add_network_flags(parser)
    parser.set_defaults(split="val")


def add_curves_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py curves."""
    add = parser.add_argument_group("curves").add_argument
    add("--runs", nargs="+", default=None, help="folders of runs, a line each; must be given")
    add("--curves", nargs="+", default=None,
        help="what is drawn, by the names in log.jsonl, such as loss knn (default: all that two runs have)")
    add("--dump_path", "--output_dir", default="plots", help="folder of the picture, runs.png")


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
    _add_network_flags(parser)


def add_activations_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py activations."""
    _add_layer_flags(parser)
    _add_network_flags(parser)


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


def _add_network_flags(parser):
    eval_flags.add_network_args(parser)
    add = eval_flags.add_image_args(parser)
    add("--split", default="train", choices=["train", "val"], help="which images of the data")
    add("--batch_size", type=positive(int), default=128, help="images at once")
    flags.add_runtime_args(parser, one_process=True)


def _add_shared_flags(parser):
    add = parser.add_argument_group("weights and files").add_argument
    add("--pretrained", "--pretrained_weights", default="",
        help="a run's folder, a checkpoint of it, or a released file")
    add("--dump_path", "--output_dir", default=".",
        help="folder of the pictures; by default that of the run, if there is one")
    add("--seed", type=at_least_zero(int), default=31, help="seed of every random draw")
    return add
# fmt: on


def attention_defaults(args: argparse.Namespace, explicit: dict) -> dict:
    """The network and the size of the images, from the run, the file or the preset."""
    said = {}
    if args.pretrained:
        _, said = describe(args.pretrained, explicit.get("arch"), args.checkpoint_key)
    elif not args.image_path and not args.voc and not explicit.keys() & {"arch", "patch_size"}:
        said = {**NETWORKS.get(preset_of(args.data_path), {})}
    if said.get("img_size"):  # of the crops that the network was trained on
        patch_size = said.get("patch_size", args.patch_size)
        side = 480 * said["img_size"] // TRAINED_SIZE // patch_size * patch_size
        said["image_size"] = [max(side, patch_size)] * 2
    if eval_flags.is_run(args.pretrained):
        said["dump_path"] = str(run_folder(args.pretrained) / "plots" / "attention")
    elif not args.image_path:
        said["dump_path"] = str(Path("plots") / "attention")
    return said


def patches_defaults(args: argparse.Namespace, explicit: dict) -> dict:
    """The network from the run, the file or the preset; images twice as large as its crops."""
    _, said = eval_flags.network_defaults(args, explicit)
    if not args.pretrained and not explicit.keys() & {"arch", "patch_size"}:
        said = {**NETWORKS.get(preset_of(args.data_path), {})}
    side = said.get("size") or said.get("img_size")
    if side:
        said["image_size"] = [2 * side]
    folder = run_folder(args.pretrained) if eval_flags.is_run(args.pretrained) else Path()
    return {**said, "dump_path": str(folder / "plots" / "patches")}


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


def no_defaults(args: argparse.Namespace, explicit: dict) -> dict:
    """Nothing: the command line says all."""
    return {}


def network_defaults(args: argparse.Namespace, explicit: dict) -> dict:
    """The network and the images, from the run, the file or the preset."""
    _, said = eval_flags.network_defaults(args, explicit)
    folder = run_folder(args.pretrained) if eval_flags.is_run(args.pretrained) else Path()
    return {**said, "dump_path": str(folder / "plots" / args.picture)}


def check_filters(args: argparse.Namespace, layer: Layer, num_images: int) -> None:
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
