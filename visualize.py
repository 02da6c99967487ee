"""Pictures of what a network looks at, of what it is trained on, and of how it groups images.

attention: self-attention of the class token in the last block of a vision transformer, of each head
and of their mean, over an image, a folder, a video or an animated GIF (src/attention_maps.py). Caron
et al., Emerging Properties in Self-Supervised Vision Transformers, arXiv:2104.14294, figures 1, 3.
crops: multi-crops of a few images after their photometry, each framed in the colour of the window
of the image that it was cut from (src/multicrop.py, src/augment.py).
clusters: which cluster each image is in, by the network's prototypes or by k-means of its features,
as csv, npy and folders, and what clusters look like (src/cluster_files.py, src/cluster_pictures.py).

  python visualize.py attention                          digits, an untrained network, seconds
  python visualize.py attention --pretrained runs/dino   a run: its args.json says the rest
  python visualize.py attention --pretrained_weights dino_deitsmall8_pretrain.pth \\
      --image_path cat.jpg --threshold 0.6 --output_dir cat
  python visualize.py attention --pretrained runs/dino --image_path walk.mp4 --fps 25
  python visualize.py crops --pretrained runs/dino       what this run is trained on
  python visualize.py crops --data_path my_images --nmb_crops 2 6 --solarize 0 0.2 0
  python visualize.py clusters --pretrained runs/swav --folders
  python visualize.py clusters --pretrained resnet50.pth --num_clusters 100 --data_path my_images

Of each image, in a folder of its own where there are several: img.png, attn-head0.png, ..., and with
--threshold mask_th0.6_head0.png, ..., as published; attn-mean.png, overlay-*.png, and sheet.png, all
in one to look at. Of several images also one sheet.png, of frames attention.gif.

Deviations from the authors' visualize_attention.py: without weights the network is untrained and
says so, theirs takes released ones; without --image_path images of --data_path, not one from the
web; networks trained on smaller images see smaller ones, --image_size is 480/224 of that; each head
has its own colour of masks, not a random one; img.png has the colours of the image. Kept: two values
of --image_size change the shape of the image; what is no whole patch is cut off, right and bottom.
"""

import argparse
import itertools
import logging
import math
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from src import attention_maps, checkpoint, cli, cluster_files, distributed, image_args, plots
from src.augment import Augment
from src.backbones import is_vit
from src.cluster_pictures import add_cluster_args, check_folders, draw_clusters, image_names
from src.crop_pictures import draw_crops
from src.datasets import IMAGENET, open_dataset, usual_std
from src.eval_args import NETWORKS as SMALL_NETWORKS
from src.eval_args import check_images, vit_defaults
from src.evaluation import (
    build_network,
    is_dino,
    is_transformer,
    run_arguments,
    run_defaults,
    run_folder,
    statistics,
)
from src.frames import in_batches, open_frames
from src.logger import duration, setup_logging
from src.multicrop import MultiCropDataset, collate_crops
from src.presets import CROPS, SHARED
from src.setup import generator

logger = logging.getLogger(__name__)

# Untrained networks for small images, which are enlarged for them.
NETWORKS = dict.fromkeys(
    ("tiny", "cifar"), {"arch": "vit_tiny", "patch_size": 8, "image_size": [96, 96]}
)
TRAINED_SIZE = 224  # pixels of the crops that the published 480 is meant for
ON_SHEET = 12  # images on the sheet of all images
LOG_SECONDS = 5.0
CLUSTER_SETTINGS = ("pretrained", "data_path", "split", "head", "num_clusters", "feature", "seed")


# ============ attention ============
@torch.no_grad()
def attention(args, run):
    """Write the pictures of every image to --dump_path."""
    if not is_vit(args.arch):
        raise ValueError(
            f"--arch {args.arch} has no class token that attends to patches: use vit_tiny, "
            "vit_small or vit_base"
        )
    device = distributed.resolve_device(args.device)
    frames, count, statistics = open_images(args)
    options = {"in_chans": args.in_chans, "width": args.width, **cli.vit_options(args)}
    network = (args.pretrained, run, "backbone", args.checkpoint_key, args.seed)
    model = build_network(args.arch, options, *network).to(device)
    if not args.pretrained:
        logger.warning(
            "WARNING: no --pretrained: the network is UNTRAINED, its maps show nothing learned"
        )
    mean, std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in statistics)
    fit = (args.image_size, args.patch_size)
    at_once = partial(attention_maps.images_at_once, model)
    folder, several = Path(args.dump_path), count != 1
    checkpoint.check_writable(folder)

    animation, rows, done = attention_maps.Animation(), [], 0
    start = logged = time.perf_counter()
    frames = ((name, attention_maps.fit_image(x, *fit)) for name, x in frames)
    for names, images in in_batches(frames, at_once):
        x = (torch.stack(images).to(device).float() / 255 - mean) / std  # (B, C, H, W)
        grid = [side // args.patch_size for side in x.shape[2:]]
        weights = model.get_last_selfattention(x)  # (B, heads, T, T)
        maps = attention_maps.class_attention(weights, *grid, args.num_registers).float().cpu()
        if not maps.isfinite().all():
            raise ValueError(f"--pretrained {args.pretrained} makes attention that is not finite")
        for name, image, heads in zip(names, images, maps, strict=True):
            pictures = attention_maps.draw_attention(image, heads, args.threshold)
            write_pictures(pictures, folder / name if several else folder, args.threshold)
            if len(rows) < ON_SHEET:
                rows.append(attention_maps.summary_row(name, pictures))
            if several and args.image_path:
                shown = [x for key, x in pictures.items() if key in ("img", "overlay-mean")]
                animation.add(shown + [x for key, x in pictures.items() if "masks" in key])
        done += len(names)
        now = time.perf_counter()
        if now - logged > LOG_SECONDS:
            logged, rate = now, done / (now - start)
            left = duration((count - done) / rate) if count else "?"
            logger.info("image %d of %s, %.2g images/s, ETA %s", done, count or "?", rate, left)

    if several:
        attention_maps.make_sheet(rows).save(folder / "sheet.png")
    if animation.frames:
        animation.save(folder / "attention.gif", args.fps)
    if animation.left_out:
        logger.info("attention.gif ends after %d frames", len(animation.frames))
    logger.info("%d images, written to %s; look at %s", done, folder, folder / "sheet.png")


def open_images(args):
    """(frames, their number or None, (mean, std)) of --image_path, or of --data_path."""
    if args.image_path:
        frames, count = open_frames(args.image_path, args.in_chans)
        mean, std = IMAGENET[0], usual_std(IMAGENET[1])
        if args.in_chans != 3:
            mean, std = ([sum(x) / 3] * args.in_chans for x in (mean, std))
        limit = args.num_images * args.every if args.num_images else None
        frames = itertools.islice(frames, 0, limit, args.every)
        if count:
            count = min(math.ceil(count / args.every), args.num_images or count)
    else:
        dataset = open_dataset(args.data_path, in_chans=args.in_chans)
        indices = spread(len(dataset), args.num_images or 4)
        frames = ((f"image_{index:06}", dataset.load(index)) for index in indices)
        count, mean, std = len(indices), dataset.mean, usual_std(dataset.std)
    return frames, count, (args.mean or mean, args.std or std)


def write_pictures(pictures, folder, threshold):
    """One PNG for each picture, and all of them on sheet.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    rows = attention_maps.sheet_rows(pictures, threshold)
    attention_maps.make_sheet(rows).save(folder / "sheet.png")


def spread(total, number):
    """At most `number` indices below `total`, evenly spaced: of all classes of sorted images."""
    return [i * total // min(number, total) for i in range(min(number, total))]


# ============ crops ============
def crops(args, run):
    """Draw the crops of a few images, those of epoch --epoch; the colours are drawn anew."""
    args.preset = cli.preset_of(args.data_path) if args.preset == "auto" else args.preset
    image_args.fill_in_crops(args)
    dataset = open_dataset(args.data_path, in_chans=args.in_chans)
    options = image_args.augment_options(args, dataset, sum(args.nmb_crops))
    multicrop = MultiCropDataset(
        *(dataset, args.nmb_crops, args.size_crops, args.min_scale_crops, args.max_scale_crops),
        seed=args.seed,
        interpolation=args.interpolation,
    )
    checkpoint.check_writable(args.dump_path)
    indices = spread(len(dataset), args.num_images)
    batch, _ = collate_crops([multicrop[args.epoch, index] for index in indices])
    views = Augment(**options)(batch, generator(args.seed, args.epoch, 0, 0))  # (B, C, S, S) each

    views = [plots.to_uint8(view, options["mean"], options["std"]) for view in views]
    path = Path(args.dump_path) / "plots" / "multicrop.png"
    draw_crops(multicrop, args.epoch, indices, views, path)
    for number, size, scale in zip(args.nmb_crops, args.size_crops, multicrop.scales, strict=True):
        logger.info("%d x %d px, %g to %g of the image's area", number, size, *scale)
    logger.info("%d images with their crops, drawn to %s", len(indices), path)


# ============ clusters ============
@torch.no_grad()
def clusters(args, run):
    """Write which cluster each image is in to --dump_path, and draw clusters."""
    weights = "" if args.num_clusters else args.pretrained
    heads, dino = cluster_files.read_heads(weights, args.checkpoint_key)
    path = {"train": args.train_path, "val": args.val_path}[args.split]
    flag = f"--{args.split if path else 'data'}_path"
    dataset = open_dataset(path or args.data_path, args.split, args.in_chans, flag)
    cluster_files.check_request(args, [len(weight) for weight, _ in heads], len(dataset))
    folder = Path(args.dump_path)
    check_folders(folder, args.folders)
    checkpoint.check_writable(folder)
    feature = args.feature if args.num_clusters else "backbone" if dino else "embedding"
    options = {**cli.model_options(args), **cli.vit_options(args, args.size)}
    network = (args.pretrained, run, feature, args.checkpoint_key, args.seed)
    model = build_network(args.arch, options, *network)
    usual = is_transformer(args.arch) or is_dino(run) or dino is not None
    normalise = statistics(args, dataset, usual)
    features = cluster_files.features_of(model, feature, dino, dataset, normalise, args)

    names, readable = image_names(dataset)
    by_head = cluster_files.group(features, heads, readable, args.num_clusters, args.seed)
    found = cluster_files.Clusters(*by_head[args.head], dataset.labels, dataset.classes)
    settings = {**{name: getattr(args, name) for name in CLUSTER_SETTINGS}, "feature": feature}
    cluster_files.write_files(folder, found, names, [x for x, *_ in by_head], settings)
    draw_clusters(folder, found, dataset, names, args)
    if not args.pretrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, clusters mean little")
    text = "{images} images, {empty} of {num_clusters} clusters empty, the largest of {size_max}"
    if found.labels is not None:
        text += "; purity {purity:.1%}, NMI {nmi:.3f} with the labels"
    text = text.format(**found.summary())
    logger.info("%s; written to %s, look at %s", text, folder, folder / "clusters.png")
    if 2 * (found.sizes == 0).sum() > len(found.sizes):
        logger.info("note: most prototypes are nearest to no image, as in a run that is young")


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Draw; returns 0."""
    args, run = parse_args(argv)
    setup_logging(None, True)
    check_args(args)
    draw, _, _ = COMMANDS[args.picture]
    draw(args, run)
    return 0


# ============ arguments ============
def parse_args(argv):
    """The arguments, and those of the run of --pretrained ({} if it is not a run).

    The command line wins over the run, the run over the preset of the data, that over the defaults.
    """
    args = get_parser().parse_args(argv)
    blank = get_parser(dict.fromkeys(vars(args))).parse_args(argv)
    given = {name for name, x in vars(blank).items() if x is not None}
    run = run_arguments(args.pretrained) if args.pretrained else {}
    _, _, defaults = COMMANDS[args.picture]
    return get_parser(defaults(args, run, given)).parse_args(argv), run


def get_parser(defaults: dict | None = None) -> argparse.ArgumentParser:
    """defaults: by name of a flag, instead of those that the flags have themselves."""

    def command_parser(prog, doc, **_):
        parser = cli.Parser(doc)
        parser.prog = prog
        return parser

    parser = cli.Parser(__doc__)
    parser.usage = f"%(prog)s {{{','.join(COMMANDS)}}} [flags]"
    commands = parser.add_subparsers(
        prog=parser.prog,
        title="pictures",
        dest="picture",
        required=True,
        parser_class=command_parser,
    )
    for name, (draw, add_flags, _) in COMMANDS.items():
        command = commands.add_parser(name, doc=draw.__doc__, help=draw.__doc__)
        add_flags(command)
        known = {action.dest for action in command._actions}
        command.set_defaults(**{key: x for key, x in (defaults or {}).items() if key in known})
    return parser


# fmt: off
def add_attention_flags(parser):
    positive = cli.positive
    add = parser.add_argument_group("attention").add_argument
    add("--image_path", default=None,
        help="an image, a folder of images, a video or an animated GIF; or else --data_path")
    add("--image_size", type=positive(int), nargs="+", default=(480, 480),
        help="height and width in pixels; one value: of the shorter side, the shape stays")
    add("--threshold", type=positive(float), default=None,
        help="also draw the patches that hold this share of each head's attention, such as 0.6")
    add("--num_images", type=positive(int), default=None,
        help="the first images of --image_path (default: all), or so many of --data_path (4)")
    add("--every", type=positive(int), default=1, help="take every so many-th frame or image")
    add("--fps", type=positive(float), default=10, help="frames a second of attention.gif")
    add = cli.add_vit_args(parser)
    add("--arch", default="vit_small", help="vit_tiny, vit_small or vit_base")
    add("--width", type=positive(float), default=1.0, help="multiplies the dimension of the tokens")
    parser.set_defaults(patch_size=8)
    add = add_shared_flags(parser)
    add("--checkpoint_key", default=None,
        help="section of the file: student, teacher, ... (default: teacher, if there is one)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto: a GPU if there is one")
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="digits",
        help="digits, cifar10, ..., a folder of images, or tar shards; no labels are needed")
    add("--in_chans", type=positive(int), default=3, help="channels of the images")
    add("--mean", type=float, nargs="+", default=None, help="of each channel; default: the data's")
    add("--std", type=float, nargs="+", default=None, help="of each channel; default: the data's")


def add_crops_flags(parser):
    image_args.add_crop_args(image_args.add_data_args(parser, SHARED))
    image_args.add_augment_args(parser)
    add = add_shared_flags(parser)
    add("--num_images", type=cli.positive(int), default=8, help="images, a row of the sheet each")
    add("--epoch", type=cli.at_least_zero(int), default=0, help="whose crops are drawn, from 0")


def add_shared_flags(parser):
    add = parser.add_argument_group("weights and files").add_argument
    add("--pretrained", "--pretrained_weights", default="",
        help="a run's folder, a checkpoint of it, or a released file")
    add("--dump_path", "--output_dir", default=".",
        help="folder of the pictures; by default that of the run, if there is one")
    add("--seed", type=cli.at_least_zero(int), default=31, help="seed of every random draw")
    return add
# fmt: on


def attention_defaults(args, run, given):
    """The network and the size of the images, from the run, the file or the preset."""
    defaults = run_defaults(run)
    if args.pretrained and not run and ("arch" not in given or is_vit(args.arch)):
        defaults = vit_defaults(args.pretrained, args.checkpoint_key)
    elif not args.pretrained and not args.image_path and not given & {"arch", "patch_size"}:
        defaults = {**NETWORKS.get(cli.preset_of(args.data_path), {})}
    if defaults.get("img_size"):  # of the crops that the network was trained on
        patch_size = defaults.get("patch_size", args.patch_size)
        side = 480 * defaults["img_size"] // TRAINED_SIZE // patch_size * patch_size
        defaults["image_size"] = [max(side, patch_size)] * 2
    if run:
        defaults["dump_path"] = str(run_folder(args.pretrained) / "plots" / "attention")
    elif not args.image_path:
        defaults["dump_path"] = str(Path("plots") / "attention")
    return defaults


def crops_defaults(args, run, given):
    """The crops and the photometry, from the run or the preset."""
    if not run:
        return SHARED[cli.preset_of(args.data_path) if args.preset == "auto" else args.preset]
    defaults = {**run, "dump_path": str(run_folder(args.pretrained))}
    if is_dino(run):
        scales = (run["global_crops_scale"], run["local_crops_scale"])
        values = {
            "nmb_crops": [2, run["local_crops_number"]],
            "size_crops": [run["global_crops_size"], run["local_crops_size"]],
            "min_scale_crops": [scale[0] for scale in scales],
            "max_scale_crops": [scale[1] for scale in scales],
        }
        resolutions = 2 if run["local_crops_number"] else 1
        defaults |= {name: x[:resolutions] for name, x in values.items()}
    return defaults


def clusters_defaults(args, run, given):
    """The network and the images, from the run, the file or the preset."""
    defaults = run_defaults(run)
    if args.pretrained and not run and ("arch" not in given or is_vit(args.arch)):
        defaults = vit_defaults(args.pretrained, args.checkpoint_key)
    elif not args.pretrained and "arch" not in given:
        preset = cli.preset_of(args.data_path)
        defaults = {"size": CROPS[preset]["size"][0], **SMALL_NETWORKS.get(preset, {})}
    folder = run_folder(args.pretrained) if run else Path()
    return {**defaults, "dump_path": str(folder / "plots" / "clusters")}


COMMANDS = {
    "attention": (attention, add_attention_flags, attention_defaults),
    "crops": (crops, add_crops_flags, crops_defaults),
    "clusters": (clusters, add_cluster_args, clusters_defaults),
}


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    check_images(args)
    if args.picture == "attention":
        if len(args.image_size) > 2:
            raise ValueError(
                f"--image_size has {len(args.image_size)} values: give height and width, or one"
            )
        if args.threshold and args.threshold > 1:
            raise ValueError(f"--threshold {args.threshold:g} is a share: use one from 0 to 1")


if __name__ == "__main__":
    cli.run(main)
