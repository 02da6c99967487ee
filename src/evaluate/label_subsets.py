"""Which training images keep their label: a published list of their names, or a draw of each class."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..data.datasets import ImageDataset
from ..data.images import IMAGE_SUFFIXES
from ..errors import printable


def read_list(path: str, dataset: ImageDataset, flag: str = "--label_list") -> Tensor:
    """The images of `dataset` that a list names, (n,) int64, in the order of the dataset.

    path: a text with the name of a file in each line, with or without the folders that it lies in
    (`n01440764_10074.JPEG`, as SimCLR's lists of 1 % and 10 % of ImageNet have it, or `n01440764/...`);
    the suffix of an image does not count. A name that stands twice counts once.
    Raises FileNotFoundError and ValueError, naming `flag`: for a name that no image has or that
    several have, and for a list without a name.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig", errors="surrogateescape")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{flag} {path} does not exist: give a text with the name of an image in each line"
        ) from None
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read ({error.strerror})") from None
    wanted = [line.strip() for line in text.splitlines() if line.strip()]
    if not wanted:
        raise ValueError(f"{flag} {path} names no image: give the name of one in each line")
    images = {}  # number of each image by its name, without folders and suffix
    for index in range(len(dataset)):
        images.setdefault(_parts(dataset.file_name(index))[-1], []).append(index)
    chosen, missing = set(), []
    for line in wanted:
        parts = _parts(line)
        same_name = images.get(parts[-1], [])
        matches = [i for i in same_name if _parts(dataset.file_name(i))[-len(parts) :] == parts]
        if len(matches) > 1:
            raise ValueError(
                f"{flag} {path}: {len(matches)} images of {dataset.name} are called {printable(line)}: "
                "name them with their folder, as class/image.jpg"
            )
        missing += [] if matches else [line]
        chosen.update(matches)
    if missing:
        raise ValueError(
            f"{flag} {path}: {len(missing):,} of its {len(wanted):,} names are not in {dataset.name}, "
            f"{printable(missing[0])} among them, where images are called "
            f"{printable(dataset.file_name(0))}: is it a list of these images?"
        )
    return torch.tensor(sorted(chosen))


def _parts(name):
    """Folders and name of an image without its suffix; of one in a shard those of its key."""
    name = name.rpartition(".tar:")[2].replace("\\", "/").removeprefix("./")
    stem, suffix = os.path.splitext(name)
    return (stem if suffix.lower() in IMAGE_SUFFIXES else name).split("/")


def draw(
    labels: Tensor, per_class: int | None = None, fraction: float | None = None, seed: int = 0
) -> Tensor:
    """As many images of each class, at random: their indices (n,) int64, in order.

    labels (N,): of all images. per_class: how many of each class, all of a class that has fewer; or
    fraction: of all images, as `images_per_class` says. The draw depends on the seed alone; a larger
    one by the same seed holds a smaller one.
    Raises ValueError unless one of per_class and fraction is given, and for labels of several classes each.
    """
    if (per_class is None) == (fraction is None):
        raise ValueError("a draw of labelled images needs their number in a class, or their share")
    _check_one_label(labels)
    if per_class is None:
        per_class = images_per_class(labels, fraction)
    return draw_members(class_members(labels), per_class, torch.Generator().manual_seed(seed))


def images_per_class(labels: Tensor, fraction: float) -> int:
    """Images of each class that make up this share of all: 13 for 1 % of ImageNet, 128 for 10 %.

    It is rounded and at least 1. Raises ValueError for labels of several classes each.
    """
    _check_one_label(labels)
    return max(1, round(fraction * len(labels) / len(labels.unique())))


def _check_one_label(labels):
    if labels.ndim != 1:
        raise ValueError(
            "images with several labels each cannot be drawn by class: give a list of them"
        )


def class_members(labels: Tensor, num_classes: int | None = None) -> list[Tensor]:
    """The indices of the images of each class, by its number; none for one that has no image."""
    if num_classes is None:
        num_classes = int(labels.max()) + 1
    order = labels.argsort(stable=True)
    return list(order.split(labels.bincount(minlength=num_classes).tolist()))


def draw_members(members: Sequence[Tensor], per_class: int, generator: torch.Generator) -> Tensor:
    """`per_class` indices of each class, or all that it has, in order, drawn by the generator."""
    drawn = [m[torch.randperm(len(m), generator=generator)[:per_class]] for m in members]
    return torch.cat(drawn).sort().values
