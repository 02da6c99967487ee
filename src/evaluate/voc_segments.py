"""PASCAL VOC 2012's images with the masks of their objects and of their classes, as distributed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .davis import read_mask
from .segmentation_measures import VOID

KINDS = ("objects", "classes", "foreground")  # of true masks


@dataclass
class SegmentedImage:
    """The files of an image: JPEG, and indexed PNG with the number of the object, and of the class."""

    name: str
    image: Path
    objects: Path
    classes: Path


def open_segmented(path: str, split: str = "val", flag: str = "--voc") -> list[SegmentedImage]:
    """The images of ImageSets/Segmentation/<split>.txt.

    path: VOC2012, or the VOCdevkit that holds it. Raises FileNotFoundError or ValueError naming `flag`.
    """
    places = [Path(path).expanduser() / x for x in (".", "VOC2012", "VOCdevkit/VOC2012")]
    folder = next((place for place in places if (place / "SegmentationObject").is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"{flag} {path} has no SegmentationObject: give the folder VOCdevkit of PASCAL VOC 2012"
        )
    listed = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listed.is_file():
        raise FileNotFoundError(f"{flag} {path}: there is no {listed}, which names the images")
    images = [
        SegmentedImage(
            name,
            folder / "JPEGImages" / f"{name}.jpg",
            folder / "SegmentationObject" / f"{name}.png",
            folder / "SegmentationClass" / f"{name}.png",
        )
        for name in listed.read_text().split()
    ]
    for one in images:
        missing = next((x for x in (one.image, one.objects, one.classes) if not x.is_file()), None)
        if missing is not None:
            raise FileNotFoundError(f"{flag} {path}: there is no {missing}, which {listed} names")
    if not images:
        raise ValueError(f"{flag} {path}: {listed} names no image")
    return images


def read_labels(one: SegmentedImage) -> np.ndarray:
    """The objects and the classes of an image, (2, H, W) uint8: 0 background, 255 void, not counted."""
    return np.stack([read_mask(one.objects), read_mask(one.classes)])


def true_masks(labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(masks (n, H, W) by KINDS, void pixels (H, W)) of what `read_labels` has read.

    objects: of each object; classes: of all objects of a class; foreground: of all objects, n = 1.
    """
    objects, classes = labels
    void = objects == VOID
    by_kind = {}
    for kind, values in (("objects", objects), ("classes", classes)):
        numbers = [x for x in np.unique(values) if x not in (0, VOID)]
        by_kind[kind] = np.array([values == x for x in numbers]).reshape(-1, *void.shape)
    by_kind["foreground"] = ((objects > 0) & ~void)[None]
    return by_kind, void
