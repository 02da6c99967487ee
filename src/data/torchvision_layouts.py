"""Data sets in the folders that torchvision's classes make of them, where these are not class folders.

CIFAR-10 and -100, Oxford Flowers 102, Stanford Cars. What lies in which split, and the labels, are
torchvision's; Flowers 102 has its train and val split to train on, as those who fine-tune on it do
(2,040 images in DeiT, arXiv:2012.12877), and its test split to validate.
"""

import os

import numpy as np

from .folders import FileSource
from .small_sets import STATISTICS, ArraySource, images_and_labels

# The folder's name -> the class of torchvision.datasets, and a file that is in such a folder.
LAYOUTS = {
    "cifar-10-batches-py": ("CIFAR10", "data_batch_1"),
    "cifar-100-python": ("CIFAR100", "meta"),
    "flowers-102": ("Flowers102", "setid.mat"),
    "stanford_cars": ("StanfordCars", os.path.join("devkit", "cars_meta.mat")),
}


class ListedFiles(FileSource):
    """Image files below `root`, from pairs (path, label); labels (N,) bytes."""

    def __init__(self, root: str, samples: list[tuple]):
        self.root = os.fsencode(root)
        names = [os.path.relpath(path, root) for path, _ in samples]
        self.paths = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.labels = np.array([str(label).encode() for _, label in samples], dtype=np.bytes_)


def is_layout(folder: str) -> bool:
    """Whether this is one of LAYOUTS, by its name and a file in it."""
    _, mark = LAYOUTS.get(os.path.basename(os.path.abspath(folder)), (None, None))
    return mark is not None and os.path.isfile(os.path.join(folder, mark))


def open_layout(folder: str, split: str, flag: str, normalisation: tuple) -> tuple:
    """(images, labels, class names, mean and standard deviation) of a split, "train" or another.

    folder: one of LAYOUTS. Labels of files are those of the source. normalisation: of sets without
    one of their own. Raises ValueError, naming `flag`, for a folder that torchvision does not take.
    """
    from torchvision import datasets

    root, name = os.path.split(os.path.abspath(folder))
    (kind, _), is_train = LAYOUTS[name], split == "train"
    make = getattr(datasets, kind)
    try:
        if kind.startswith("CIFAR"):
            images, labels, classes = images_and_labels(make(root, train=is_train))
            return ArraySource(images), labels, classes, STATISTICS[kind.lower()]
        if kind == "StanfordCars":
            samples = make(root, split="train" if is_train else "test")._samples
        else:
            names = ("train", "val") if is_train else ("test",)
            parts = [make(root, split=name) for name in names]
            samples = [
                sample
                for part in parts
                for sample in zip(part._image_files, part._labels, strict=True)
            ]
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{flag} {folder} is not whole: torchvision.datasets.{kind} says {error}"
        ) from None
    return ListedFiles(folder, samples), None, None, normalisation
