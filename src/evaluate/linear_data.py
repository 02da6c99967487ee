"""Labelled images to train and to validate a classifier on: splits, held-out parts, folds."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..data.datasets import ImageDataset, open_dataset
from .evaluation import HELD_OUT, check_labelled, open_labelled_splits
from .voc import TESTED_ON, open_voc, voc_folder


class Part:
    """Some images of a dataset, given by their indices, as a dataset of their own."""

    def __init__(self, dataset: ImageDataset, indices: list[int]):
        self.dataset, self.indices = dataset, indices
        self.name, self.classes = dataset.name, dataset.classes
        self.mean, self.std = dataset.mean, dataset.std
        self.labels = dataset.labels[indices]
        self.groups = None if dataset.groups is None else dataset.groups[indices]

    def __len__(self):
        return len(self.indices)

    def load(self, index: int) -> Tensor:
        return self.dataset.load(self.indices[index])


def hold_out(dataset: ImageDataset) -> tuple[Part, Part]:
    """Nine tenths of a dataset for training, every tenth image for validation."""
    every = range(len(dataset))
    train = [i for i in every if i % HELD_OUT]
    return Part(dataset, train), Part(dataset, list(every[::HELD_OUT]))


class Joined:
    """Two datasets with the same classes, one after the other."""

    def __init__(self, first: ImageDataset, second: ImageDataset):
        self.parts, self.name = (first, second), f"{first.name} and {second.name}"
        self.mean, self.std, self.classes = first.mean, first.std, first.classes
        self.labels, self.groups = torch.cat([first.labels, second.labels]), None

    def __len__(self):
        return len(self.labels)

    def load(self, index: int) -> Tensor:
        first, second = self.parts
        return first.load(index) if index < len(first) else second.load(index - len(first))


def split_folds(dataset: ImageDataset, num_folds: int) -> Callable[[int], tuple[Part, Part]]:
    """A function: fold i, 0 to num_folds - 1, -> the images of the other folds, and those of fold i.

    The images, sorted by class, go to the folds in turns: each has its share of every class, and at
    most one image more than another. Raises ValueError where a fold would be empty.
    """
    if len(dataset) < num_folds:
        raise ValueError(f"--cross_valid {num_folds} is more than the {len(dataset)} images")
    labels = dataset.labels if dataset.labels.ndim == 1 else torch.zeros(len(dataset))
    fold = torch.empty(len(dataset), dtype=torch.int64)
    fold[labels.argsort(stable=True)] = torch.arange(len(dataset)) % num_folds

    def split(number):
        masks = (fold != number, fold == number)
        return tuple(Part(dataset, mask.nonzero().flatten().tolist()) for mask in masks)

    return split


def open_splits(
    data_path: str, train_path: str | None, val_path: str | None, in_chans: int, split: str
) -> tuple[ImageDataset, ImageDataset | None]:
    """Training and validation images with labels; (images, None) where nothing splits them.

    split: "train", or "trainval": those of train/ and val/ together, validated on test/. A folder
    of VOC 2007 is known by what it holds. Raises as src.evaluate.evaluation.open_labelled_splits.
    """
    if voc_folder(data_path) is not None and not (train_path or val_path):
        return tuple(open_voc(data_path, name, in_chans) for name in (split, TESTED_ON[split]))
    if split == "train":
        return open_labelled_splits(data_path, train_path, val_path, in_chans)
    if train_path or val_path:
        raise ValueError(f"--split {split} is for one --data_path: leave out the other paths")
    folders = [Path(data_path).expanduser() / name for name in ("train", "val", "test")]
    if not all(folder.is_dir() for folder in folders):
        raise ValueError(
            f"--split {split} needs --data_path with the folders train, val and test, or VOC 2007; "
            f"{data_path} has not all of them"
        )
    parts = [open_dataset(data_path, folder.name, in_chans) for folder in folders]
    for part in parts:
        check_labelled(part, "--data_path")
    return Joined(*parts[:2]), parts[2]


def count_classes(num_labels: int | None, *datasets: ImageDataset) -> int:
    """The number of classes of the data; ValueError if that is more than num_labels."""
    counts = [
        data.labels.shape[1]
        if data.labels.ndim == 2
        else max(len(data.classes or ()), int(data.labels.max()) + 1)
        for data in datasets
    ]
    if num_labels is not None and max(counts) > num_labels:
        raise ValueError(
            f"--num_labels {num_labels}, and the data has {max(counts)} classes: leave it out, "
            "they are counted"
        )
    return max(counts)
