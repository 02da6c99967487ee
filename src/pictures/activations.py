"""The images that filters respond to most: found in one pass, as a table and as pictures.

Thesis of M. Caron, figure 3.8; of the authors' DeepCluster (Caron et al. 2018, arXiv:1807.05520)
figure 4. The response of a filter is the mean of its map, see src/pictures/responses.py.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data.datasets import ImageDataset
from ..labels.features import centre_crop, extract_features
from .responses import Layer, filter_responses
from .sheets import (
    Group,
    Header,
    Row,
    Tile,
    draw_sheet,
    enlarge,
    factor_for,
    three_channels,
    to_picture,
)

LEAST, MOST = 96, 160  # pixels of the side of an image on a sheet


class TopImages:
    """The images with the largest response of each filter, while responses come in.

    values (num_filters, number) float32, the largest first, and indices (num_filters, number) int64
    of their images; of equal ones the image that came first. -inf and -1 where there are fewer.
    """

    def __init__(self, num_filters: int, number: int):
        self.values = torch.full((num_filters, number), -torch.inf)
        self.indices = torch.full((num_filters, number), -1)
        self.total, self.count = torch.zeros(num_filters, dtype=torch.float64), 0

    def update(self, responses: Tensor, indices: Tensor) -> None:
        """Responses (B, num_filters) on the CPU to the images `indices` (B,)."""
        self.total += responses.double().sum(0)
        self.count += len(responses)
        values = torch.cat([self.values, responses.t()], 1)  # (num_filters, number + B)
        indices = torch.cat([self.indices, indices.expand(len(values), -1)], 1)
        number = self.values.shape[1]
        self.values, order = (
            x[:, :number] for x in values.sort(dim=1, descending=True, stable=True)
        )
        self.indices = indices.gather(1, order)

    def most_active(self, number: int) -> list[int]:
        """So many filters, those of the largest mean response over all images first."""
        return self.total.sort(descending=True, stable=True).indices[:number].tolist()

    def of_filter(self, number: int) -> list[tuple[int, float]]:
        """(index, response) of its images, the largest response first."""
        pairs = zip(self.indices[number].tolist(), self.values[number].tolist(), strict=True)
        return [(index, value) for index, value in pairs if index >= 0]


def find_top_images(
    model: nn.Module,
    layer: Layer,
    dataset: ImageDataset,
    number: int,
    size: int,
    normalisation: tuple[Sequence[float], Sequence[float]],
    **extraction,
) -> TopImages:
    """The `number` images of `dataset` that each filter of `layer` responds to most.

    One pass over centre crops of size x size pixels, in the order of the data; nothing is kept of
    an image but what TopImages keeps, so there may be any number. normalisation: mean and standard
    deviation; extraction: device, batch_size, num_workers, precision of
    src.labels.features.extract_features.
    An image that cannot be read is left out. Raises ValueError for responses that are not finite.
    """
    top = TopImages(layer.num_filters, number)
    seen = 0

    def forward(images):
        nonlocal seen
        indices = torch.arange(seen, seen + len(images))
        seen += len(images)
        responses = filter_responses(model, layer, images).cpu()
        if not responses.isfinite().all():
            raise ValueError(f"{layer.name} of these weights gives values that are not finite")
        if broken := set(dataset.broken):  # another image stands for them, which has its own row
            kept = [i for i, x in enumerate(indices.tolist()) if dataset.file_name(x) not in broken]
            responses, indices = responses[kept], indices[kept]
        top.update(responses, indices)
        return images.new_empty(len(images), 0)

    mean, std = normalisation
    extract_features(forward, dataset, size, mean=mean, std=std, **extraction)
    return top


def write_table(top: TopImages, filters: Sequence[int], dataset: ImageDataset, path: Path) -> None:
    """A line for each image of each filter: filter, rank from 1, index, file, activation."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["filter", "rank", "index", "file", "activation"])
        for number in filters:
            for rank, (index, value) in enumerate(top.of_filter(number), 1):
                writer.writerow([number, rank, index, dataset.file_name(index), f"{value:.6g}"])


def draw_top_images(
    top: TopImages,
    filters: Sequence[int],
    dataset: ImageDataset,
    path: Path,
    layer: str,
    source: str,
    synthetic: Sequence[tuple[Tensor, float]] | None = None,
) -> Path:
    """A row for each filter: the images it responds to most, with their responses below them.

    layer and source: what the filters are of, for the header. synthetic: an image, uint8 (C, S, S), for
    each of `filters`, and its response, on the left.
    """
    rows = []
    for i, number in enumerate(filters):
        tiles = [
            Tile(_middle(dataset.load(index)), _captions(value, dataset.file_name(index)))
            for index, value in top.of_filter(number)
        ]
        groups = [tiles]
        if synthetic is not None:
            image, value = synthetic[i]
            groups = [[Tile(to_picture(image, (MOST, MOST)), [f"{value:.3g}"])], tiles]
        rows.append(Row(groups, [f"filter {number}"]))
    for g in range(len(rows[0].tiles)):
        column = [tile for row in rows for tile in row.tiles[g]]
        factor = factor_for([tile.picture for tile in column], LEAST)
        for tile in column:
            tile.picture = enlarge(tile.picture, factor)
    names = [Group("images with the largest response, the largest first")]
    if synthetic is not None:
        names.insert(0, Group("by ascent"))
    title = f"What {len(filters)} of {len(top.values)} filters of {layer} respond to most"
    notes = [
        f"{source}; {top.count:,} images of {dataset.name}",
        "numbers: the response, the mean of the filter's map over the middle of the image",
    ]
    return draw_sheet(Header(title, notes), names, rows).save(path)


def _captions(value, file_name):
    return [f"{value:.3g}", os.path.basename(file_name)]


def as_picture(image: Tensor) -> np.ndarray:
    """uint8 (C, H, W) -> (H, W, 3)."""
    return three_channels(image).permute(1, 2, 0).contiguous().cpu().numpy()


def _middle(image):
    """The middle of an image, which the network sees of it."""
    side = min(MOST, *image.shape[1:])
    return to_picture(centre_crop(image, side, side))
