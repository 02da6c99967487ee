"""Images and those nearest to them by their features, as one sheet."""

import os
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from .. import dist
from ..cluster.neighbours import nearest_neighbours
from ..data.datasets import ImageDataset
from ..evaluate.splits import HELD_OUT
from .sheets import (
    Colour,
    Group,
    Header,
    Row,
    Sheet,
    Tile,
    draw_sheet,
    enlarge,
    factor_for,
    to_picture,
)

LEAST, MOST = 72, 160  # pixels of the longer side of an image
RIGHT, WRONG = (30, 140, 50), (205, 40, 40)
LEGEND = [
    ("green: of the same class as the image on the left", RIGHT),
    ("red: of another class", WRONG),
]


def draw_neighbours(
    split: list[Tensor],
    train: ImageDataset,
    val: ImageDataset | None,
    folder: str | Path,
    source: str,
    num_queries: int = 12,
    k: int = 10,
) -> None:
    """Draw validation images of rank 0 and the k training images nearest to each, to plots/neighbours.png.

    split: what src.evaluate.splits.split_features made of `train` and `val`. source: whose features
    they are, for the header. All processes call this, one draws.
    """
    train_features, train_labels, features, labels = split
    train_rows, val_rows = range(len(train)), range(len(val or train))  # row -> sample
    if val is None:
        train_rows = [i for i in train_rows if i % HELD_OUT]
        val_rows = val_rows[::HELD_OUT]
    num = len(features) if dist.is_main() else 0
    chosen = range(0, num, max(1, num // num_queries))[:num_queries]
    queries = F.normalize(features[list(chosen)], dim=1)
    cosines, nearest = nearest_neighbours(F.normalize(train_features, dim=1), queries, k)  # (q, k)
    train_labels = dist.all_gather_rows(train_labels)
    if not dist.is_main():
        return
    rows = []
    for query, indices, values in zip(chosen, nearest.tolist(), cosines.tolist(), strict=True):
        own = int(labels[query])
        frames = [RIGHT if int(train_labels[index]) == own else WRONG for index in indices]
        tiles = [
            _tile(train, train_rows[index], _class_name(train, train_labels[index]), frame, cosine)
            for index, frame, cosine in zip(indices, frames, values, strict=True)
        ]
        rows.append([[_tile(val or train, val_rows[query], _class_name(val or train, own))], tiles])
    kind = "validation" if val is not None else "held-out"
    title = f"The nearest of {len(train_labels):,} training images of {train.name}"
    notes = [
        f"{source}; {len(rows)} of {num:,} {kind} images, centre crops compared by cosine",
        "below an image: its file, its class, and the cosine",
    ]
    neighbour_sheet(Header(title, notes, LEGEND), rows).save(
        Path(folder) / "plots" / "neighbours.png"
    )


def neighbour_sheet(header: Header, rows: list[list[list[Tile]]]) -> Sheet:
    """A sheet with a row for each image: [[its tile], the tiles of its neighbours, nearest first]."""
    tiles = [tile for row in rows for group in row for tile in group]
    factor = factor_for([tile.picture for tile in tiles], LEAST)
    for tile in tiles:
        tile.picture = enlarge(tile.picture, factor)
    groups = [Group("image"), Group("its neighbours, the nearest first")]
    return draw_sheet(header, groups, [Row(row) for row in rows])


def _tile(
    dataset: ImageDataset,
    sample: int,
    class_name: str,
    frame: Colour | None = None,
    cosine: float | None = None,
) -> Tile:
    """An image with its file's name, its class, and its cosine to another."""
    text = class_name if cosine is None else f"{class_name}, {cosine:.2f}"
    captions = [os.path.basename(dataset.file_name(sample)), text]
    return Tile(to_picture(dataset.load(sample), (MOST, MOST)), captions, frame)


def _class_name(dataset: ImageDataset, label: int | Tensor) -> str:
    """The name of a class; those of validation images are numbered as the training images' are."""
    classes, number = dataset.classes, int(label)
    return classes[number] if classes and number < len(classes) else f"class {number}"
