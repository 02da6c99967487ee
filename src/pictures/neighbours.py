"""Images and those nearest to them by their features, as one sheet."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dist
from ..cluster.neighbours import nearest_neighbours
from ..data.datasets import ImageDataset
from ..data.folders import read_file
from ..data.images import BrokenImage, UnfitImage
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


class QueryFiles:
    """Image files by their paths, a source of ImageDataset."""

    def __init__(self, paths: Sequence[str]):
        self.paths = [os.path.expanduser(path) for path in paths]

    def __len__(self):
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        return read_file(self.paths[index])

    def is_of_one_file(self, index: int, error: OSError) -> bool:
        return True  # nobody waits for a storage here


def open_queries(paths: Sequence[str], in_chans: int = 3, flag: str = "--queries") -> ImageDataset:
    """The images of some files, in this order. Raises FileNotFoundError or ValueError naming `flag`."""
    dataset = ImageDataset(QueryFiles(paths), "queries", in_chans, flag)
    for index in range(len(dataset)):
        path = dataset.file_name(index)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{flag} {path} does not exist: give files of images")
        try:
            dataset.read(index)
        except (BrokenImage, UnfitImage) as error:
            raise ValueError(f"{flag} {path} cannot be read ({error})") from error
    return dataset


def nearest_of_others(
    features: Tensor, queries: Tensor, own: Sequence[int | None], k: int
) -> tuple[Tensor, Tensor]:
    """Cosines (Q, k) and indices (Q, k) of the rows of features (N, D) nearest to queries (Q, D).

    own: the row that is the query itself, which is left out, None where there is none.
    """
    features, queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)
    cosines, indices = nearest_neighbours(features, queries, k + 1)
    own = torch.tensor([-1 if row is None else row for row in own])[:, None]  # (Q, 1)
    order = (indices == own).int().argsort(dim=1, stable=True)[:, :k]  # the query itself comes last
    return cosines.gather(1, order), indices.gather(1, order)


def draw_queries(
    queries: ImageDataset,
    rows: Sequence[int],
    dataset: ImageDataset,
    cosines: Tensor,
    indices: Tensor,
    folder: Path,
    source: str,
) -> None:
    """Write neighbours.png, a row for each query, and neighbours.csv.

    rows: the images of `queries` that are asked for; cosines, indices (Q, k): of nearest_of_others in
    `dataset`. Frames are green or red where the classes of both are known.
    """
    lines, tiles = [], []
    for row, values, found in zip(rows, cosines.tolist(), indices.tolist(), strict=True):
        own = None if queries.labels is None else int(queries.labels[row])
        shown = []
        for rank, (value, index) in enumerate(zip(values, found, strict=True), 1):
            label = None if dataset.labels is None else int(dataset.labels[index])
            name = "" if label is None else _class_name(dataset, label)
            frame = None
            if own is not None and label is not None:
                frame = RIGHT if label == own else WRONG
            shown.append(_tile(dataset, index, name, frame, value))
            lines.append(
                [queries.file_name(row), rank, dataset.file_name(index), f"{value:.6f}", name]
            )
        own_name = "" if own is None else _class_name(queries, own)
        tiles.append([[_tile(queries, row, own_name)], shown])
    are_labelled = queries.labels is not None and dataset.labels is not None
    notes = [source, "below an image: its file, its class if it has one, and the cosine"]
    title = f"The nearest of {len(dataset):,} images of {dataset.name}"
    header = Header(title, notes, LEGEND if are_labelled else ())
    neighbour_sheet(header, tiles).save(folder / "neighbours.png")
    with open(folder / "neighbours.csv", "w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "rank", "file", "cosine", "class"])
        writer.writerows(lines)


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
    texts = [class_name, "" if cosine is None else f"{cosine:.2f}"]
    captions = [os.path.basename(dataset.file_name(sample)), ", ".join(filter(None, texts))]
    return Tile(to_picture(dataset.load(sample), (MOST, MOST)), captions, frame)


def _class_name(dataset: ImageDataset, label: int | Tensor) -> str:
    """The name of a class; those of validation images are numbered as the training images' are."""
    classes, number = dataset.classes, int(label)
    return classes[number] if classes and number < len(classes) else f"class {number}"
