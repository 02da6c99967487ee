"""Labelled images to fit and to validate a classifier on: splits, held-out parts, folds."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..data.datasets import ImageDataset, open_dataset
from ..data.folders import split_folders
from ..data.images import Reduced
from .voc import TESTED_ON, open_voc, voc_folder

logger = logging.getLogger(__name__)

READING = ("storage_timeout", "max_broken")  # of the options of open_dataset those of open_voc
HELD_OUT = 10  # without a val split, every tenth image is classified by the others


# ============ training and validation images ============
def open_labelled_splits(
    data_path: str,
    train_path: str | None = None,
    val_path: str | None = None,
    in_chans: int = 3,
    **opening,
) -> tuple[ImageDataset, ImageDataset | None]:
    """Training and validation images with labels; (images, None) where nothing splits them.

    train_path, val_path: where they are not in data_path. The labels of validation images are
    numbered as the classes of the training images. opening: further arguments of
    open_dataset. Raises ValueError where labels are missing, and where no class is in both; what is
    only in the validation images is a warning.
    """
    train_flag = "--train_path" if train_path else "--data_path"
    val_flag = "--val_path" if val_path else "--data_path"
    train = open_dataset(train_path or data_path, "train", in_chans, flag=train_flag, **opening)
    val = open_dataset(val_path or data_path, "val", in_chans, flag=val_flag, **opening)
    check_labelled(train, train_flag)
    check_labelled(val, val_flag)
    if val.same_files(train):
        logger.info(f"{train.name} is one split: image 0, {HELD_OUT}, ... are held out")
        return train, None
    number_as(train, val)
    check_classes(train, val, f"{val_flag}: name the folders of classes alike in both splits")
    return train, val


def open_splits(
    data_path: str,
    train_path: str | None,
    val_path: str | None,
    in_chans: int,
    split: str,
    **opening,
) -> tuple[ImageDataset, ImageDataset | None]:
    """Training and validation images with labels; (images, None) where nothing splits them.

    split: "train", or "trainval": those of train/ and val/ together, validated on test/. A folder
    of VOC 2007 is known by what it holds. opening, and what is raised: as open_labelled_splits.
    """
    if voc_folder(data_path) is not None and not (train_path or val_path):
        reading = {name: opening[name] for name in READING if name in opening}
        train = open_voc(data_path, split, in_chans, **reading)
        return train, open_voc(data_path, TESTED_ON[split], in_chans, **reading)
    if split == "train":
        return open_labelled_splits(data_path, train_path, val_path, in_chans, **opening)
    if train_path or val_path:
        raise ValueError(f"--split {split} is for one --data_path: leave out the other paths")
    folder, names = Path(data_path).expanduser(), ("train", "val", "test")
    if not folder.is_dir() or len(split_folders(folder)) < len(names):
        raise ValueError(
            f"--split {split} needs --data_path with the folders train, val and test, or VOC 2007; "
            f"{data_path} has not all of them"
        )
    parts = [open_dataset(data_path, name, in_chans, **opening) for name in names]
    for part in parts:
        check_labelled(part, "--data_path")
    train, val, test = parts
    number_as(train, val)
    joined = Joined(train, val)
    number_as(joined, test)
    check_classes(joined, test, "--data_path: name the folders of classes alike in all splits")
    return joined, test


def number_as(train: ImageDataset, val: ImageDataset) -> None:
    """Number the classes of validation images as the training images' are, further ones behind them."""
    if train.classes and val.classes and train.classes != val.classes:
        numbers = {name: i for i, name in enumerate(train.classes)}
        order = [numbers.setdefault(name, len(numbers)) for name in val.classes]
        val.labels, val.classes = torch.tensor(order)[val.labels], list(numbers)


def check_classes(train: ImageDataset, val: ImageDataset, remedy: str) -> None:
    """Warn of validation images of classes that no training image has, which are errors whatever the
    features are; raise ValueError if all of them are. remedy: a flag, and what to do.

    The labels are numbered alike already. Images with several labels are not looked at.
    """
    if train.labels.ndim != 1 or val.labels.ndim != 1:
        return
    trained = train.labels.unique()
    unknown = val.labels[~torch.isin(val.labels, trained)]
    if not len(unknown):
        return
    lacking = _names(unknown.unique(), val.classes)
    if len(unknown) == len(val.labels):
        raise ValueError(
            f"none of the classes of {val.name}'s validation images ({lacking}) is one of its "
            f"training images' ({_names(trained, train.classes)}), so that none could be classified: "
            f"look at {remedy}"
        )
    logger.warning(
        f"WARNING: {len(unknown):,} of {len(val.labels):,} validation images "
        f"({100 * len(unknown) / len(val.labels):.1f} %) are of {len(unknown.unique())} classes that no "
        f"training image has ({lacking}): they count as errors"
    )


def _names(numbers, classes, most=5):
    """The first few names of classes, by number."""
    names = [classes[i] if classes and i < len(classes) else str(i) for i in numbers.tolist()]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_labelled(dataset: ImageDataset, flag: str) -> None:
    """Raise ValueError, naming `flag`, for a dataset without labels."""
    if dataset.labels is None:
        reason = f" ({dataset.unlabelled_since})" if dataset.unlabelled_since else ""
        raise ValueError(
            f"{flag} {dataset.name} has no labels{reason}, which this evaluation needs: give a folder "
            "with one folder for each class, a list with labels, or shards with .cls entries"
        )


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


def split_features(
    extract: Callable[[ImageDataset], tuple[Tensor, Tensor]],
    train: ImageDataset,
    val: ImageDataset | None,
) -> list[Tensor]:
    """[features (N, D), labels (N,)] of training, then of validation images, of this process.

    extract: dataset -> features and sample indices of this process, see src.labels.features. Without `val`
    every tenth image of `train` is held out.
    """
    features, indices = extract(train)
    labels = train.labels[indices]
    if val is None:
        held_out = indices % HELD_OUT == 0
        return [features[~held_out], labels[~held_out], features[held_out], labels[held_out]]
    val_features, indices = extract(val)
    return [features, labels, val_features, val.labels[indices]]


# ============ parts of a dataset ============
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
        """One image, uint8 (C, H, W)."""
        return self.dataset.load(self.indices[index])

    def load_reduced(self, index: int, scale_for: Callable[[int, int], int]) -> Reduced:
        """See ImageDataset.load_reduced."""
        return self.dataset.load_reduced(self.indices[index], scale_for)

    def file_name(self, index: int) -> str:
        """The file of an image, as its dataset has it."""
        return self.dataset.file_name(self.indices[index])

    def digest(self) -> str:
        """What tells these images from others, see ImageDataset.digest."""
        chosen = torch.tensor(self.indices).numpy().tobytes()
        return f"{self.dataset.digest()}-{hashlib.blake2b(chosen, digest_size=4).hexdigest()}"


class Joined:
    """Two datasets, one after the other; the classes of the second are numbered as the first's."""

    def __init__(self, first: ImageDataset, second: ImageDataset):
        self.parts, self.name = (first, second), f"{first.name} and {second.name}"
        self.mean, self.std, self.classes = first.mean, first.std, second.classes or first.classes
        self.labels, self.groups = torch.cat([first.labels, second.labels]), None

    def __len__(self):
        return len(self.labels)

    def load(self, index: int) -> Tensor:
        """One image, uint8 (C, H, W)."""
        part, index = self._part_of(index)
        return part.load(index)

    def load_reduced(self, index: int, scale_for: Callable[[int, int], int]) -> Reduced:
        """See ImageDataset.load_reduced."""
        part, index = self._part_of(index)
        return part.load_reduced(index, scale_for)

    def file_name(self, index: int) -> str:
        """The file of an image, as its dataset has it."""
        part, index = self._part_of(index)
        return part.file_name(index)

    def digest(self) -> str:
        """What tells these images from others, see ImageDataset.digest."""
        return "+".join(part.digest() for part in self.parts)

    def _part_of(self, index):
        first, second = self.parts
        return (first, index) if index < len(first) else (second, index - len(first))


def hold_out(dataset: ImageDataset) -> tuple[Part, Part]:
    """Nine tenths of a dataset for training, every tenth image for validation."""
    every = range(len(dataset))
    train = [i for i in every if i % HELD_OUT]
    return Part(dataset, train), Part(dataset, list(every[::HELD_OUT]))


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
