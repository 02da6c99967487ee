"""INRIA's Copydays: photographs, and copies of them, as distributed (Douze et al. 2009).

original/ has 157 photographs, strong/ 229 copies that were printed, scanned, painted over; jpegqual/3 to 75
and crops/10 to 80 have a copy of each at a quality, or without so many percent of its area. An image's
number says its block: the copies of 200100.jpg are 200101.jpg, 200102.jpg, ... up to 200199.jpg.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.datasets import ImageDataset
from ..data.folders import list_images
from .ranking import Relevance
from .retrieval_sets import ListedFiles

ORIGINAL = "original"
FOLDERS = ("strong", "jpegqual", "crops")
BLOCK = 100  # numbers of images that are of one photograph


@dataclass
class Copies:
    """Copies of one kind, such as strong, and the photograph among the originals that each is of."""

    images: ImageDataset
    relevance: list[Relevance]


def open_copydays(
    path: str, in_chans: int = 3, **reading
) -> tuple[ImageDataset, dict[str, Copies]]:
    """The originals, and the copies by kind: strong, jpegqual/3, ..., crops/80, those that are there.

    reading: storage_timeout and max_broken of ImageDataset. Raises FileNotFoundError or ValueError, naming
    --data_path.
    """
    folder = Path(path).expanduser()
    kinds = [kind for name in FOLDERS for kind in _kinds(folder, name)]
    if not (folder / ORIGINAL).is_dir() or not kinds:
        raise FileNotFoundError(
            f"--data_path {path} has no {ORIGINAL}/ with {FOLDERS[0]}/ or others beside it: give the folder "
            "that Copydays' archives were unpacked in"
        )
    options = {"in_chans": in_chans, **reading}
    originals, names = _open(folder / ORIGINAL, ORIGINAL, options)
    photographs = {}
    for index, name in enumerate(names):
        block = _block(name, folder / ORIGINAL)
        if block in photographs:
            raise ValueError(
                f"--data_path: {folder / ORIGINAL} has {names[photographs[block]]} and {name}, which are "
                f"both of the block {block}"
            )
        photographs[block] = index
    copies = {}
    for kind in kinds:
        images, names = _open(folder / kind, kind, options)
        blocks = [_block(name, folder / kind) for name in names]
        for name, block in zip(names, blocks, strict=True):
            if block not in photographs:
                raise ValueError(
                    f"--data_path: {folder / kind / name} is a copy of none of {ORIGINAL}/, which has no "
                    f"{block * BLOCK}.jpg"
                )
        relevance = [Relevance(np.array([photographs[block]])) for block in blocks]
        copies[kind] = Copies(images, relevance)
    return originals, copies


def _kinds(folder, name):
    """strong, or the folders in jpegqual/ and crops/ by number; those that are there."""
    if not (folder / name).is_dir():
        return []
    if name == FOLDERS[0]:
        return [name]
    numbers = [int(entry.name) for entry in (folder / name).iterdir() if entry.name.isdecimal()]
    return [f"{name}/{number}" for number in sorted(numbers)]


def _open(folder, kind, options):
    """The images of a folder, and their names, in order."""
    names = list_images(str(folder))
    if not names:
        raise FileNotFoundError(f"--data_path: {folder} has no image in it")
    source = ListedFiles(folder, names)
    dataset = ImageDataset(source, f"Copydays {kind}", flag="--data_path", **options)
    dataset.check_channels()
    return dataset, names


def _block(name, folder):
    """The number of the photograph that an image is of."""
    stem = Path(name).stem
    if not stem.isdecimal():
        raise ValueError(
            f"--data_path: {folder / name} should have a number for a name, such as 200001.jpg"
        )
    return int(stem) // BLOCK
