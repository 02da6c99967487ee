"""visualize.py attention: maps of the heads of images or films, or with --voc how well they segment."""

import argparse
import logging
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from .. import dist
from ..data.datasets import IMAGENET, usual_std
from ..data.multicrop import generator
from ..evaluate import flags as eval_flags
from ..evaluate.progress import Progress
from ..evaluate.voc_segments import open_segmented
from ..nets.backbones import is_vit
from ..nets.pretrained import describe, open_pretrained, run_folder
from ..run import checkpoint, flags
from ..run.flags import positive
from ..run.lock import hold_folder
from ..run.log import duration
from ..run.presets import preset_of
from . import attention as attention_maps
from . import flags as picture_flags
from .attention_masks import (
    BASELINE,
    BEST,
    Overlaps,
    draw_masks,
    enlarge_masks,
    maps_of_segments,
    masks_of,
    picture_of_mask,
    picture_of_truth,
    report_masks,
)
from .flags import Command
from .frames import in_batches
from .sheets import spread

logger = logging.getLogger(__name__)

ON_SHEET = 12  # images on the sheet of all images
TITLE = "Attention of the class token in the last block"
LOG_SECONDS = 5.0
MASS = 0.6  # share of the attention that a mask holds, in figure 4
TRAINED_SIZE = 224  # pixels of the crops that the published 480 is meant for


@torch.no_grad()
def attention(args: argparse.Namespace) -> None:
    """Write the pictures of every image to --dump_path, or measure their masks with --voc."""
    _check_attends(args.arch)
    if args.voc:
        _attention_of_voc(args)
        return
    device = dist.resolve_device(args.device)
    frames, count, normalisation, file_names = picture_flags.open_images(args)
    network = eval_flags.open_network(args)
    model, source = network.model.to(device), network.origin
    if not args.pretrained:
        logger.warning(
            "WARNING: no --pretrained: the network is UNTRAINED, its maps show nothing learned"
        )
    mean, std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in normalisation)
    at_once = partial(attention_maps.images_at_once, model)
    folder, several = Path(args.dump_path), count != 1
    checkpoint.check_writable(folder)
    hold_folder(folder, f"visualize_{args.picture}")

    animation, rows, done = attention_maps.Animation(), [], 0
    start = logged = time.perf_counter()
    frames = (
        (name, attention_maps.fit_image(x, args.image_size, args.patch_size)) for name, x in frames
    )
    for names, images in in_batches(frames, at_once):
        x = (torch.stack(images).to(device).float() / 255 - mean) / std  # (B, C, H, W)
        rows_of_patches, columns = (side // args.patch_size for side in x.shape[2:])
        weights = model.get_last_selfattention(x)  # (B, heads, T, T)
        maps = attention_maps.class_attention(
            weights, rows_of_patches, columns, num_registers=args.num_registers
        )
        maps = maps.float().cpu()
        if not maps.isfinite().all():
            raise ValueError(f"--pretrained {args.pretrained} makes attention that is not finite")
        for name, image, heads in zip(names, images, maps, strict=True):
            pictures = attention_maps.draw_attention(image, heads, args.threshold)
            sheet = attention_maps.image_sheet(
                pictures,
                heads,
                args.threshold,
                f"{TITLE}: {file_names.get(name, name)}",
                source,
            )
            _write_pictures(pictures, sheet, folder / name if several else folder)
            if len(rows) < ON_SHEET:
                summary = attention_maps.summary_pictures(pictures)
                rows.append((file_names.get(name, name), summary))
            if several and args.image_path:
                shown = [x for key, x in pictures.items() if key in ("img", "overlay-mean")]
                animation.add(shown + [x for key, x in pictures.items() if "masks" in key])
        done += len(names)
        now = time.perf_counter()
        if now - logged > LOG_SECONDS:
            logged, rate = now, done / (now - start)
            left = duration((count - done) / rate) if count else "?"
            logger.info(f"image {done} of {count or '?'}, {rate:.2g} images/s, ETA {left}")

    if several:
        attention_maps.summary_sheet(rows, TITLE, source).save(folder / "sheet.png")
    if animation.frames:
        animation.save(folder / "attention.gif", args.fps)
    if animation.left_out:
        logger.info(f"attention.gif ends after {len(animation.frames)} frames")
    logger.info(f"{done} images, written to {folder}; look at {folder / 'sheet.png'}")


def _check_attends(arch: str) -> None:
    """Raise ValueError for a network without a class token."""
    if not is_vit(arch):
        raise ValueError(
            f"--arch {arch} has no class token that attends to patches: use vit_tiny, vit_small or "
            "vit_base"
        )


def _attention_of_voc(args: argparse.Namespace) -> None:
    """Compare the masks of the heads with the objects of VOC 2012: a table, a line of JSON, a sheet."""
    images = open_segmented(args.voc)
    images = [images[i] for i in spread(len(images), args.num_images or len(images))]
    network, mass, folder = (
        eval_flags.open_network(args),
        args.threshold or MASS,
        Path(args.dump_path),
    )
    networks = {"network": network}
    if args.baseline == "untrained":
        networks[BASELINE] = network.untrained()
    elif args.baseline:
        networks[BASELINE] = open_pretrained(args.baseline)
        _check_attends(networks[BASELINE].arch)
    if not args.pretrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, a mere baseline")
    checkpoint.check_writable(folder)
    hold_folder(folder, f"visualize_{args.picture}")

    overlaps, progress = Overlaps(), Progress(len(images) * len(networks), "images")
    shown = {place: {} for place in spread(len(images), ON_SHEET)}  # (picture, caption) by column
    for name, network in networks.items():
        draws = generator(args.seed)
        segments = maps_of_segments(
            network,
            images,
            args.image_size,
            in_chans=args.in_chans,
            mean=args.mean or network.mean or IMAGENET[0],
            std=args.std or network.std or usual_std(IMAGENET[1]),
            device=dist.resolve_device(args.device),
        )
        for place, (image, labels, heads) in enumerate(segments):
            by_kind = masks_of(heads, mass, draws)
            if name == BASELINE:
                by_kind = {BASELINE: by_kind[BEST]}
            if place in shown and name != BASELINE:
                shown[place]["objects"] = (picture_of_truth(image, labels), "")
            for kind, masks in by_kind.items():
                masks = enlarge_masks(masks, image.shape[1:])
                values = overlaps.add(kind, masks, labels)
                if place in shown and values is not None:
                    best = int(values.argmax())
                    head = f"head {best}: " if len(values) > 1 else ""
                    picture = picture_of_mask(image, masks[best])
                    shown[place][kind] = (picture, f"{head}{100 * values[best]:.0f}")
            progress.count(name)

    origins = {name: network.origin for name, network in networks.items()}
    settings = {"mass": mass, "image_size": list(args.image_size), "networks": origins}
    report_masks(overlaps, settings, folder / "attention_voc.json")
    notes = [f"{name}: {origin}" for name, origin in origins.items()]
    notes.append(
        f"{mass:.0%} of the mass; Jaccard similarity with all objects together, in percent"
    )
    rows = [(images[place].name, shown[place]) for place in shown if BEST in shown[place]]
    if rows:
        draw_masks(rows, folder / "attention_voc.png", notes)
        logger.info(f"look at {folder / 'attention_voc.png'}")


def _write_pictures(pictures, sheet, folder):
    """One PNG for each picture, and all of them on sheet.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    sheet.save(folder / "sheet.png")


# ============ arguments ============
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
    add = picture_flags.add_shared_flags(parser)
    add("--checkpoint_key", default=None,
        help="section of the file: student, teacher, ... (default: teacher, if there is one)")
    picture_flags.add_data_flags(parser, add)
# fmt: on


def attention_defaults(args: argparse.Namespace, explicit: dict) -> dict:
    """The network and the size of the images, from the run, the file or the preset."""
    said = {}
    if args.pretrained:
        _, said = describe(args.pretrained, explicit.get("arch"), args.checkpoint_key)
    elif not args.image_path and not args.voc and not explicit.keys() & {"arch", "patch_size"}:
        said = {**picture_flags.NETWORKS.get(preset_of(args.data_path), {})}
    if said.get("img_size"):  # of the crops that the network was trained on
        patch_size = said.get("patch_size", args.patch_size)
        side = 480 * said["img_size"] // TRAINED_SIZE // patch_size * patch_size
        said["image_size"] = [max(side, patch_size)] * 2
    if eval_flags.is_run(args.pretrained):
        said["dump_path"] = str(run_folder(args.pretrained) / "plots" / "attention")
    elif not args.image_path:
        said["dump_path"] = str(Path("plots") / "attention")
    return said


def check_attention(args: argparse.Namespace) -> None:
    """Raise ValueError on arguments that do not fit together."""
    picture_flags.check_image_size(args)
    if args.voc and args.image_path:
        raise ValueError("--voc brings its images: leave out --image_path")
    if args.baseline and not args.voc:
        raise ValueError("--baseline is measured with --voc: give the folder VOCdevkit")
    if args.threshold and args.threshold > 1:
        raise ValueError(f"--threshold {args.threshold:g} is a share: use one from 0 to 1")


ATTENTION = Command(attention, add_attention_flags, attention_defaults, check_attention)
