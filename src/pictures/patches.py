"""Patches in the colours of their features: what a network finds alike, within and across images.

The first three principal components of the patches of all images together are red, green and blue, as
Oquab et al. 2023, arXiv:2304.07193, figure 1 and section 8, draw them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .attention import shrink
from .sheets import Group, Header, Row, Tile, draw_sheet, three_channels

NUM_COLOURS = 3
ENDS = (0.01, 0.99)  # quantiles of a component that are without and with all of its colour
SIDE = 320  # pixels of the longer side of an image on the sheet


def principal_axes(features: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """(mean (D,), axes (D, number)) of the largest variance of features (N, D), in float64.

    The largest entry of an axis is positive, so that colours do not change from run to run.
    """
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    _, axes = torch.linalg.eigh(centred.T @ centred)  # ascending
    axes = axes.flip(1)[:, :number]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))  # (1, number)
    return mean, axes * largest.sign()


def colours_of_patches(maps: Sequence[Tensor], foreground: bool = False) -> list[np.ndarray]:
    """Colours, uint8 (rows, cols, 3), of maps of features (rows, cols, D), which share their axes.

    foreground: what lies on that side of the first component's mean which is rarer at the edges of the
    images is drawn alone, by the components of its own; the rest is black.
    """
    rows = torch.cat([x.flatten(0, 1) for x in maps])  # (N, D)
    shown = torch.ones(len(rows), dtype=torch.bool)
    if foreground:
        mean, axes = principal_axes(rows, 1)
        shown = ((rows.double() - mean) @ axes)[:, 0] > 0
        edges = torch.cat([_edge(x.shape[0], x.shape[1]).flatten() for x in maps])
        if shown[edges].float().mean() > 0.5:
            shown = ~shown
    mean, axes = principal_axes(rows[shown], min(NUM_COLOURS, rows.shape[1]))
    values = (rows.double() - mean) @ axes  # (N, 3)
    lowest, highest = (_quantile(values[shown], share) for share in ENDS)
    values = (values - lowest) / (highest - lowest).clamp(min=torch.finfo(torch.float64).tiny)
    values = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    values[~shown] = 0
    if values.shape[1] < NUM_COLOURS:
        values = values[:, :1].expand(-1, NUM_COLOURS)
    sizes = [x.shape[0] * x.shape[1] for x in maps]
    parts = zip(values.split(sizes), maps, strict=True)
    return [part.reshape(*x.shape[:2], NUM_COLOURS).numpy() for part, x in parts]


def _edge(rows, columns):
    """Which patches lie at the edge of an image, (rows, columns)."""
    edge = torch.ones(rows, columns, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return edge


def _quantile(values, share):
    """The smallest value that at least so many of each column (N, 3) do not exceed: (3,)."""
    return values.kthvalue(max(1, round(share * len(values))), dim=0).values


def draw_patches(
    images: Sequence[tuple[str, Tensor, np.ndarray]], folder: Path, notes: Sequence[str]
) -> None:
    """Write <name>.png of each image, its patches alone, and sheet.png with both beside each other.

    images: (name, image uint8 (C, H, W), colours (rows, cols, 3)); H, W multiples of rows, cols.
    """
    rows = []
    for name, image, colours in images:
        picture = three_channels(image).permute(1, 2, 0).cpu().numpy()
        tall, wide = (
            n // cells for n, cells in zip(picture.shape, colours.shape[:2], strict=False)
        )
        patches = colours.repeat(tall, 0).repeat(wide, 1)
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(patches).save(path)
        grid = f"{colours.shape[0]} x {colours.shape[1]} patches"
        tiles = [Tile(shrink(picture, SIDE), [name]), Tile(shrink(patches, SIDE), [grid])]
        rows.append(Row([[tile] for tile in tiles]))
    header = Header("Patches in the colours of their features", notes)
    draw_sheet(header, [Group("image"), Group("principal components")], rows).save(
        folder / "sheet.png"
    )
