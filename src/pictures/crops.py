"""Crops that a network is trained on, beside the images that they were cut from."""

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from ..data.datasets import ImageDataset
from ..data.multicrop import MultiCropDataset
from .sheets import (
    Group,
    Header,
    Row,
    Tile,
    distinct_colours,
    draw_sheet,
    enlarge,
    factor_for,
    to_picture,
)

SIDE = 192  # pixels that the largest crops have at least, enlarged by a whole factor if need be
WIDEST = 2.5  # of an image: its width by the height of the largest crops, at most
OUTLINE = 2  # pixels


def draw_crops(
    crops: MultiCropDataset,
    epoch: int,
    indices: Sequence[int],
    views: Sequence[Tensor],
    path: str | Path,
    source: str = "",
) -> Path:
    """A sheet as PNG with a row for each image: the image with its windows, then its crops.

    views: uint8 (B, C, S, S) for each crop, of the samples `indices` in `epoch`; each is framed in the
    colour of its window. source: of which run, for the header.
    """
    colours = distinct_colours(len(views))
    originals = [crops.dataset.load(index) for index in indices]
    pictures = _as_high_as_crops(originals, views)
    for index, image, picture in zip(indices, originals, pictures, strict=True):
        windows = crop_windows(crops, epoch, index, *image.shape[1:])
        _outline(picture, windows, picture.width / image.shape[2], colours)
    header = Header(
        f"Crops of {len(indices)} images of {crops.dataset.name}",
        [
            f"{source + ', ' if source else ''}epoch {epoch + 1}, after the changes of colour; "
            "a frame has the colour of its window",
        ],
    )
    names = [os.path.basename(crops.dataset.file_name(index)) for index in indices]
    return crop_sheet(header, "original with windows", pictures, names, views, path, colours)


def draw_batch(
    dataset: ImageDataset,
    indices: Sequence[int],
    views: Sequence[Tensor],
    path: str | Path,
    title: str,
) -> Path:
    """A sheet as PNG of the first crops of a run, uint8 (B, C, S, S) each, beside their images."""
    pictures = _as_high_as_crops([dataset.load(index) for index in indices], views)
    note = "as the network sees them: cut out, resized, and changed in colour"
    names = [os.path.basename(dataset.file_name(index)) for index in indices]
    return crop_sheet(Header(title, [note]), "original", pictures, names, views, path)


def crop_sheet(
    header: Header,
    original: str,
    pictures: Sequence[Image.Image],
    names: Sequence[str],
    views: Sequence[Tensor],
    path: str | Path,
    colours: Sequence[tuple[int, int, int]] | None = None,
) -> Path:
    """A row for each of `pictures`, B images: the image, then its crops, the resolutions side by side.

    original: the name of the first column. views: uint8 (B, C, S, S) for each crop, those of one
    resolution next to each other. All are enlarged by the same whole factor where the largest has fewer
    than SIDE pixels; small ones are stacked to the height of the largest.
    """
    largest, factor = _scale_of_crops(views)
    groups, members = [Group(original)], []
    for i, view in enumerate(views):
        size = view.shape[-1]
        if not members or views[members[-1][0]].shape[-1] != size:
            members.append([])
        members[-1].append(i)
    for same_size in members:
        size = views[same_size[0]].shape[-1]
        lines = min(largest // size, len(same_size))
        groups.append(Group(f"{len(same_size)} x {size} px", lines))
    rows = []
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        tiles = [[Tile(picture, [name])]]
        for same_size in members:
            crops = [enlarge(to_picture(views[k][i]), factor) for k in same_size]
            frames = [colours[k] if colours is not None else None for k in same_size]
            tiles.append([Tile(x, frame=frame) for x, frame in zip(crops, frames, strict=True)])
        rows.append(Row(tiles))
    return draw_sheet(header, groups, rows).save(path)


def crop_windows(crops: MultiCropDataset, epoch: int, index: int, height: int, width: int) -> list:
    """Windows (top, left, height, width) in pixels of the crops that crops[epoch, index] has."""
    return [
        window for same_size in crops.windows(epoch, index, height, width) for window in same_size
    ]


def _scale_of_crops(views):
    """(pixels of the largest crops' side, the factor that crops are enlarged by)."""
    largest = max(view.shape[-1] for view in views)
    return largest, max(1, round(SIDE / largest))


def _as_high_as_crops(images, views):
    """Pictures of images (C, H, W) that are about as high as the largest crops are drawn."""
    largest, factor = _scale_of_crops(views)
    height = factor * largest
    pictures = [to_picture(image, (round(WIDEST * height), height)) for image in images]
    factor = factor_for(pictures, height)
    return [enlarge(picture, factor) for picture in pictures]


def _outline(picture, windows, scale, colours):
    """Draw the windows (top, left, height, width), in pixels of the image, on its picture."""
    canvas, width = ImageDraw.Draw(picture), OUTLINE + (picture.width > 300)
    for window, colour in zip(windows, colours, strict=True):
        top, left, tall, wide = (round(scale * x) for x in window)
        corners = [left, top, left + max(1, wide) - 1, top + max(1, tall) - 1]
        canvas.rectangle(corners, outline=colour, width=width)
