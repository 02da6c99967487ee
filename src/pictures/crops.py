"""Multi-crops beside the images that they were cut from, each in the colour of its window."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ImageDraw
from torch import Tensor

from ..data.multicrop import MultiCropDataset, crop_generator, draw_window
from . import curves
from .attention import distinct_colours, shrink, three_channels

SIDE = 192  # pixels of the largest crop, if it is not larger itself
FRAME = 3  # pixels of the border of a crop


def draw_crops(
    crops: MultiCropDataset,
    epoch: int,
    indices: Sequence[int],
    views: Sequence[Tensor],
    path: str | Path,
) -> Path:
    """A sheet as PNG with a row for each image: the image with its windows, then its crops.

    views: uint8 (B, C, S, S) for each crop, of the samples `indices` in `epoch`. A small crop is
    enlarged pixel by pixel, all by the same factor.
    """
    largest = max(view.shape[-1] for view in views)
    factor = max(1, round(SIDE / largest))
    colours = distinct_colours(len(views))
    first = [_with_windows(crops, epoch, i, factor * largest, colours) for i in indices]
    columns = [torch.stack(first)]  # (B, 3, S, S)
    columns += [_framed(view, factor, c) for view, c in zip(views, colours, strict=True)]
    return curves.crop_sheet(columns, path, factor * largest)


def crop_windows(crops: MultiCropDataset, epoch: int, index: int, height: int, width: int) -> list:
    """Windows (top, left, height, width) in pixels of the crops that crops[epoch, index] has."""
    draws = crop_generator(crops.seed, epoch, index)
    return [
        draw_window(height, width, scale, crops.ratio, draws)
        for number, scale in zip(crops.num_crops, crops.scales, strict=True)
        for _ in range(number)
    ]


def _with_windows(crops, epoch, index, side, colours):
    """uint8 (3, side, side): the image, its longer side as long, with the outlines of its windows."""
    image = three_channels(crops.dataset.load(index))
    picture = shrink(image.permute(1, 2, 0).numpy(), side)
    canvas, scale = ImageDraw.Draw(picture), side / max(image.shape[1:])
    windows = crop_windows(crops, epoch, index, *image.shape[1:])
    for window, colour in zip(windows, colours, strict=True):
        top, left, height, width = (round(scale * x) for x in window)
        corners = [left, top, left + max(1, width) - 1, top + max(1, height) - 1]
        canvas.rectangle(corners, outline=colour, width=2)
    square = np.full((side, side, 3), curves.PAPER, np.uint8)
    square[: picture.height, : picture.width] = np.asarray(picture)
    return torch.from_numpy(square).permute(2, 0, 1)


def _framed(view, factor, colour):
    """uint8 (B, C, S, S) -> (B, 3, factor * S, factor * S) with a border."""
    view = three_channels(view).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    colour = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)
    for edge in (slice(None, FRAME), slice(-FRAME, None)):
        view[:, :, edge] = colour
        view[:, :, :, edge] = colour
    return view
