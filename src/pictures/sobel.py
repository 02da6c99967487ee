"""What Sobel filters leave of an image, and what the first layer behind them makes of it.

Figure 3.5 of the thesis of M. Caron (section 3.2.2) shows two images beside what Sobel filters make of
them: two channels, which hold approximations of the derivatives at each point. Colour is gone, edges
are left, so that clusters cannot be those of colours (its figure 3.6).
Here the channels stand apart, as the first layer gets them, after the grey level that they are of;
then how steep the image is, the length of both; and the maps of some filters of the first layer.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..nets.sobel import Sobel
from .sheets import (
    PAPER,
    Group,
    Header,
    Row,
    Scale,
    Tile,
    draw_sheet,
    enlarge,
    factor_for,
    to_picture,
)

LEAST, MOST = 128, 224  # pixels of the side of an image on the sheet


@torch.no_grad()
def strongest_filters(
    conv: nn.Conv2d, derivatives: Tensor, number: int
) -> tuple[list[int], Tensor]:
    """The filters of a first layer whose maps vary most over some images: their numbers, and the maps.

    derivatives: (N, 2, H, W), what the layer gets; the variance is that over positions and images. The
    maps (N, number, h, w) are those of the convolution alone, without its batch norm and ReLU.
    """
    maps = conv(derivatives)  # (N, F, h, w)
    chosen = maps.var((0, 2, 3)).sort(descending=True, stable=True).indices[:number]
    return chosen.tolist(), maps[:, chosen]


@torch.no_grad()
def draw_sobel(
    images: Sequence[tuple[str, Tensor]],
    normalised: Tensor,
    sobel: Sobel,
    conv: nn.Conv2d | None,
    path: str | Path,
    source: str,
    num_filters: int = 6,
) -> None:
    """Write a PNG with a row for each image, and above them the filters of `conv`, if there is one.

    images: name and uint8 (3, S, S); normalised: the same (N, 3, S, S), as a network gets them. sobel:
    of the network, with its padding; conv: its first layer. source: of which network and data.
    """
    derivatives = sobel(normalised)  # (N, 2, H, W)
    grey = sobel[0](normalised)[:, 0]  # (N, S, S)
    length = derivatives.norm(dim=1)
    groups = [Group("image"), Group("grey level"), Group("along rows"), Group("along columns")]
    groups.append(Group("length of both"))
    notes = [
        source,
        f"as the first layer gets them: normalised, {sobel.padding} px of zeros around",
    ]
    notes.append("grey: no change; white: darker to the right, or downwards; black: brighter")
    rows, factor = [], factor_for([to_picture(image, (MOST, MOST)) for _, image in images], LEAST)
    for i, (name, image) in enumerate(images):
        largest = derivatives[i].abs().max()
        pictures = [
            to_picture(image),
            _from_black(grey[i] - grey[i].min()),
            _around_grey(derivatives[i, 0], largest),
            _around_grey(derivatives[i, 1], largest),
            _from_black(length[i]),
        ]
        tiles = [[Tile(enlarge(_shrunk(picture), factor))] for picture in pictures]
        rows.append(Row(tiles, [name]))
    if conv is not None:
        chosen, maps = strongest_filters(conv, derivatives, num_filters)
        side = rows[0].tiles[0][0].picture.width
        groups.append(Group(f"{len(chosen)} of {conv.out_channels} filters of the first layer"))
        notes.append(
            "above the maps: each filter along rows (left) and along columns; its maps have one scale"
        )
        for i, row in enumerate(rows):
            row.tiles.append(
                [
                    Tile(_as_wide(_around_grey(maps[i, k], maps[:, k].abs().max()), side))
                    for k in range(len(chosen))
                ]
            )
        kernels = [
            Tile(_as_wide(_kernel(conv.weight[number]), side), [f"filter {number}"])
            for number in chosen
        ]
        rows.insert(0, Row([[] for _ in groups[:-1]] + [kernels], ["filters"]))
    shades = np.linspace(1, 255, 64).round().astype(np.uint8)
    scale = Scale(np.repeat(shades[:, None], 3, 1), "-largest", "+largest")
    title = f"{len(images)} image{'s' * (len(images) != 1)} behind Sobel filters"
    draw_sheet(Header(title, notes, scale=scale), groups, rows).save(path)


def _around_grey(values, largest):
    """(H, W) -> grey where it is zero, black and white at minus and plus `largest`."""
    return _picture(128 + 127 * values / largest.clamp(min=torch.finfo(values.dtype).tiny))


def _from_black(values):
    """(H, W), 0 or more -> black where it is zero, white where it is largest."""
    return _picture(255 * values / values.max().clamp(min=torch.finfo(values.dtype).tiny))


def _picture(shades):
    return Image.fromarray(shades.round().clamp(0, 255).to(torch.uint8).cpu().numpy()).convert(
        "RGB"
    )


def _kernel(weight):
    """Both channels of a filter (2, k, k) side by side, in one scale, a column of paper between them."""
    height, width = weight.shape[1:]
    picture = Image.new("RGB", (2 * width + 1, height), PAPER)
    for i, channel in enumerate(weight):
        picture.paste(_around_grey(channel, weight.abs().max()), (i * (width + 1), 0))
    return picture


def _shrunk(picture):
    picture.thumbnail((MOST, MOST), Image.Resampling.BICUBIC)
    return picture


def _as_wide(picture, side):
    """A picture with its pixels as squares where it is narrower than `side`, else shrunk to it."""
    if picture.width > side:
        size = (side, max(1, round(side * picture.height / picture.width)))
        return picture.resize(size, Image.Resampling.BICUBIC)
    return enlarge(picture, side // picture.width)
