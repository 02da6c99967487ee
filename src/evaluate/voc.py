"""PASCAL VOC 2007, a set of images with any number of the labels of 20 classes (host files only)."""

import os
from pathlib import Path
from xml.etree import ElementTree

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.datasets import ImageDataset
from ..data.folders import is_of_one_file, read_file
from .average_precision import IGNORED

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
TESTED_ON = {"train": "val", "trainval": "test"}  # the images to evaluate, by those to train on


class _Files:
    """JPEG files of a folder by their numbers, a source of ImageDataset."""

    def __init__(self, folder, names):
        self.folder, self.names = folder, names

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return os.path.join(self.folder, f"{self.names[index]}.jpg")

    def read(self, index):
        return read_file(self.name(index))

    def is_of_one_file(self, index, error):
        return is_of_one_file(os.fsencode(self.name(index)), os.fsencode(self.folder), error)


def voc_folder(path: str) -> Path | None:
    """The folder with JPEGImages/ and ImageSets/Main/ that `path` is or holds; None: it is not VOC."""
    if not path:
        return None
    for subfolder in (".", "VOC2007", "VOCdevkit/VOC2007"):
        folder = Path(path).expanduser() / subfolder
        if (folder / "JPEGImages").is_dir() and (folder / "ImageSets" / "Main").is_dir():
            return folder
    return None


def open_voc(
    path: str, split: str, in_chans: int = 3, flag: str = "--data_path", **reading
) -> ImageDataset:
    """The images of a split of VOC 2007, "train", "val", "trainval" or "test".

    path: VOC2007, or the VOCdevkit that holds it. `labels` (N, 20) int64: 1, 0, and 255 where all
    objects of the class are difficult ones, which neither the loss nor the average precision counts.
    reading: storage_timeout and max_broken of ImageDataset.
    They are those of ImageSets/Main/<class>_<split>.txt, or else of Annotations/. Raises
    FileNotFoundError or ValueError naming `flag`.
    """
    folder = voc_folder(path)
    if folder is None:
        raise FileNotFoundError(
            f"{flag} {path} has no JPEGImages and ImageSets/Main: give the folder VOCdevkit/VOC2007"
        )
    labels = _read_image_sets(folder, split) or _read_annotations(folder, split, flag)
    if not labels:
        raise ValueError(f"{flag} {path}: ImageSets/Main names no image of the split {split}")
    names = sorted(labels)
    source = _Files(str(folder / "JPEGImages"), names)
    missing = next((i for i in range(len(source)) if not os.path.exists(source.name(i))), None)
    if missing is not None:
        raise FileNotFoundError(
            f"{flag} {path}: there is no {source.name(missing)}, which the split {split} names"
        )
    rows = torch.tensor([labels[name] for name in names])  # (N, 20)
    name, classes = f"VOC 2007 {split}", list(CLASSES)
    return ImageDataset(source, name, in_chans, flag, labels=rows, classes=classes, **reading)


def _read_image_sets(folder, split):
    """{image: its 20 labels} from the file of each class; {} if one is not there."""
    labels = {}
    for number, name in enumerate(CLASSES):
        file = folder / "ImageSets" / "Main" / f"{name}_{split}.txt"
        if not file.is_file():
            return {}
        for line in file.read_text().splitlines():
            if not line.strip():
                continue
            image, value = line.split()  # 1, -1 for none, 0 for difficult ones only
            row = labels.setdefault(image, [IGNORED] * len(CLASSES))
            row[number] = {1: 1, 0: IGNORED}.get(int(value), 0)
    return labels


def _read_annotations(folder, split, flag):
    """{image: its 20 labels} from the objects in Annotations/ of the images in <split>.txt."""
    listed, labels = folder / "ImageSets" / "Main" / f"{split}.txt", {}
    if not listed.is_file():
        raise FileNotFoundError(
            f"{flag} {folder}: ImageSets/Main has neither the files of 20 classes of the split "
            f"{split} nor {listed.name}"
        )
    for image in listed.read_text().split():
        row, file = [0] * len(CLASSES), folder / "Annotations" / f"{image}.xml"
        if not file.is_file():
            raise FileNotFoundError(f"{flag} {folder}: there is no {file}, which says its labels")
        for item in ElementTree.parse(file).getroot().iter("object"):
            name = item.findtext("name", "").strip()
            if name not in CLASSES:
                raise ValueError(f"{flag} {folder}: {file} has an object {name!r}, no class of VOC")
            number = CLASSES.index(name)
            difficult = item.findtext("difficult", "0").strip() == "1"
            if row[number] != 1:
                row[number] = IGNORED if difficult else 1
        labels[image] = row
    return labels


def multilabel_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy with the labels 1 and 0, summed over classes: (..., B, C) -> (..., B).

    labels (B, C), or of the shape of the scores; where they are 255 the loss is 0.
    """
    counted = labels != IGNORED
    targets = torch.where(counted, labels, 0).to(scores.dtype).expand_as(scores)
    loss = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    return torch.where(counted, loss, 0.0).sum(-1)
