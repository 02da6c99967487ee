"""Images and those nearest to them by their features, as one sheet."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from .. import dist
from ..cluster.neighbours import nearest_neighbours
from ..data.datasets import ImageDataset
from ..evaluate.splits import HELD_OUT
from ..labels.features import centre_crop
from .curves import neighbour_sheet

SIDE = 64  # pixels of an image at most


def draw_neighbours(
    split: list[Tensor],
    train: ImageDataset,
    val: ImageDataset | None,
    path: str | Path,
    num_queries: int = 12,
    k: int = 10,
) -> None:
    """Draw validation images of rank 0 and the k training images nearest to each, as PNG.

    split: what src.evaluate.splits.split_features made of `train` and `val`. All processes call this,
    one draws.
    """
    train_features, train_labels, features, labels = split
    train_rows, val_rows = range(len(train)), range(len(val or train))  # row -> sample
    if val is None:
        train_rows = [i for i in train_rows if i % HELD_OUT]
        val_rows = val_rows[::HELD_OUT]
    num = len(features) if dist.is_main() else 0
    chosen = range(0, num, max(1, num // num_queries))[:num_queries]
    queries = F.normalize(features[list(chosen)], dim=1)
    _, nearest = nearest_neighbours(F.normalize(train_features, dim=1), queries, k)  # (q, k)
    train_labels = dist.all_gather_rows(train_labels)
    if not dist.is_main():
        return
    neighbour_sheet(
        [_picture(val or train, val_rows[query]) for query in chosen],
        [[_picture(train, train_rows[row]) for row in rows] for rows in nearest.tolist()],
        (train_labels[nearest] == labels[list(chosen), None]).tolist(),
        path,
    )


def _picture(dataset, sample):
    image = dataset.load(sample)
    side = min(SIDE, *image.shape[1:])
    return centre_crop(image, side, side)
