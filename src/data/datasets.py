"""Where images come from: folders, tar shards and small named sets, as uint8 by index.

A file that does not decode is replaced by the next readable one and named in the log; a storage that
does not answer is waited for. The sampler makes epochs that are exact, the same for any number of
workers, and can go on from their middle.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from .. import dist
from ..errors import RunError, cause, printable
from .folders import FolderSource, find_split, folder_labels, warn_of_inner_splits
from .images import BrokenImage, Reduced, UnfitImage, decode_image, decode_reduced, match_channels
from .loading import shared_bytes

logger = logging.getLogger(__name__)

# The published SwAV scripts divide red by 0.228, not by ImageNet's usual 0.229. Released weights
# were trained so, which is why it stays.
SWAV_RED_STD = 0.228
# What has a name, read by small_sets.py.
NAMES = (
    "digits",
    "cifar10",
    "cifar100",
    "stl10",
    "stl10_unlabeled",
    "svhn",
    "mnist",
    "fashion_mnist",
)
IMAGENET = ((0.485, 0.456, 0.406), (SWAV_RED_STD, 0.224, 0.225))
LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".json")
SHARD_WINDOW = 8  # shards whose samples are mixed with each other
STORAGE_TIMEOUT = 600.0  # seconds that a storage may take to come back
# Seconds between two attempts to read a file, doubled each time.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
MAX_BROKEN = 0.01  # share of the images that may be unreadable,
FEW_BROKEN = 5  # and so many in any case
MAX_NUMBERED = 1_000_000  # classes that may have a number for a name
PROBES = 8  # images that are tried before channels are said not to fit


def usual_std(std: Sequence[float]) -> list[float]:
    """The same standard deviations, with the usual red of ImageNet where it is SwAV's."""
    return [0.229 if value == SWAV_RED_STD else value for value in std]


def open_dataset(
    path: str,
    split: str = "train",
    in_chans: int = 3,
    flag: str = "--data_path",
    root: str = "data",
    storage_timeout: float = STORAGE_TIMEOUT,
    max_broken: float = MAX_BROKEN,
    data_root: str | None = None,
    label_column: str | None = None,
) -> "ImageDataset":
    """Open the images that `path` names.

    path: a name (`digits`, `cifar10`, ...: NAMES; a folder of that name is written
        `./cifar10`), a folder, also of Places205 or iNaturalist 2018 (annotations.py), a list of files
        (`.txt`, `.csv`, `.tsv`, `.json`: see lists.py), or tar shards
        (`a.tar`, `shard-{000..009}.tar`, `shards/*.tar`, several of these joined by commas or in a
        list, or a folder that holds them), or a folder of torchvision_layouts.LAYOUTS.
    split: "train" or "val". In a folder: `<path>/train`, or `<path>/val` or else `<path>/test`, in
        one of their spellings (folders.SPLITS); a folder without any of them is taken as it is for
        every split, and so are shards, and lists without a column that says it.
    in_chans: channels of the tensors. root: folder of downloads and of shard indexes.
    storage_timeout, max_broken: see ImageDataset. data_root: the folder that the paths in a list are
        relative to, by default its own. label_column: of a table, by default label or class.

    Labels: where all images lie in two or more immediate subfolders, each with at least one image
    directly in it, or in images/ or the like in there, every subfolder is a class. Images at the top,
    or only deeper down, are unlabelled. Classes are sorted; those of `val` are numbered as in the
    `train` beside it. Shards are labelled when every sample has a .cls, which holds a number or a name.

    Raises FileNotFoundError or ValueError with one sentence that names `flag`.
    """
    if in_chans < 1:
        raise ValueError(f"--in_chans {in_chans} must be at least 1")
    path = ",".join(map(str, path)) if isinstance(path, list | tuple) else os.fspath(path)
    folder, index = os.path.expanduser(path), os.path.join(root, "shard_index")
    labels = classes = None
    normalisation, unlabelled_since = IMAGENET, ""
    if path in NAMES:
        from . import small_sets

        images, labels, classes = small_sets.read_small_set(path, split, flag, root)
        source, normalisation = small_sets.ArraySource(images), small_sets.STATISTICS[path]
    elif _is_of_torchvision(folder):
        from .torchvision_layouts import open_layout

        source, labels, classes, normalisation = open_layout(folder, split, flag, normalisation)
    elif annotated := _annotated_source(folder, split, data_root, label_column, flag):
        source = annotated
    elif os.path.isdir(folder):
        folder, train = find_split(folder, split, flag)
        source = FolderSource(folder)
        shards = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
        if len(source) == 0 and shards:
            source = _shard_source([os.path.join(folder, name) for name in shards], index, flag)
        else:
            labels, classes, unlabelled_since = folder_labels(source, train)
            if split == "train":
                warn_of_inner_splits(source.parts(), flag, folder)
    elif folder.lower().endswith(LIST_SUFFIXES) and os.path.isfile(folder):
        from .lists import ListSource

        source = ListSource(folder, split, data_root, label_column, flag)
    elif ".tar" in path:
        source = _shard_source(path, index, flag)
    else:
        raise _no_images_at(path, folder, flag)
    if len(source) == 0:
        raise _empty(source, folder, flag)
    _say_what_is_unused(source, path, split, data_root, label_column)
    if getattr(source, "labels", None) is not None:  # of shards and lists
        labels, classes = _number_labels(source.labels)
    unlabelled_since = unlabelled_since or getattr(source, "unlabelled_since", "")
    if unlabelled_since:
        logger.info(f"{printable(path)} is unlabelled: {unlabelled_since}")
    dataset = ImageDataset(
        source,
        path,
        in_chans,
        flag,
        labels=labels,
        classes=classes,
        normalisation=normalisation,
        storage_timeout=storage_timeout,
        max_broken=max_broken,
    )
    dataset.unlabelled_since = unlabelled_since
    dataset.opening |= {"data_root": data_root, "label_column": label_column}
    dataset.check_channels()
    return dataset


def _is_of_torchvision(folder):
    from .torchvision_layouts import is_layout

    return is_layout(folder)


def _annotated_source(folder, split, data_root, label_column, flag):
    """The images of a folder of Places205 or iNaturalist 2018, None for another."""
    from .annotations import find_annotations
    from .lists import ListSource

    paths = os.path.isdir(folder) and find_annotations(folder, split, flag)
    return ListSource(paths[0], split, data_root or paths[1], label_column, flag) if paths else None


def _say_what_is_unused(source, path, split, data_root, label_column):
    """Warn where the flags of lists are given for what is none."""
    if split == "train" and (data_root or label_column) and not hasattr(source, "metadata"):
        logger.warning(
            f"--data_root and --label_column are for lists and tables, and {printable(path)} is none"
        )


def _empty(source, folder, flag):
    """The error of a folder without images; says what else is in it."""
    left_out = getattr(source, "left_out", "")
    left_out = f"; left out: {left_out}" if left_out else ""
    return FileNotFoundError(f"{flag} {folder} has no image in it, nor in its subfolders{left_out}")


def _no_images_at(path, folder, flag):
    """The error of a path that is none of what open_dataset takes."""
    if os.path.exists(folder):
        return ValueError(
            f"{flag} {path} is a file: give a folder of images, a list (.txt, .csv, .json), or tar shards"
        )
    return FileNotFoundError(
        f"{flag} {path} does not exist: give a folder of images, a list of files, tar shards, or one of "
        f"{', '.join(NAMES)}"
    )


class ImageSource(Protocol):
    """Where the images of a set lie; what a new kind of place needs."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of an image, for people and for the digest of the set."""

    def read(self, index: int) -> bytes | torch.Tensor:
        """The bytes of an image's file, or the image, uint8 (C, H, W). Raises BrokenImage, OSError."""

    def is_of_one_file(self, index: int, error: OSError) -> bool:
        """Whether what `read` raised concerns this image alone, and not the storage."""


class ImageDataset:
    """Images by index, with what is known about them.

    `labels` is `(N,)` int64 or None, `classes` the names; `mean` and `std` have one value a
    channel, from `normalisation`, those of RGB; `groups` `(N,)` is the shard of each sample, or None;
    `metadata` has N texts by the name of a column of a list; `opening` is what open_dataset needs
    besides to open another split.

    Broken is what was read and does not decode, and a file that is gone while its folder is there. A
    storage that does not answer is waited for, `storage_timeout` seconds; then RunError is raised, and
    also where more than the share `max_broken` of the images is broken.
    """

    def __init__(
        self,
        source: ImageSource,
        name: str,
        in_chans: int,
        flag: str,
        labels: torch.Tensor | None = None,
        classes: list[str] | None = None,
        normalisation: tuple[Sequence[float], Sequence[float]] = IMAGENET,
        storage_timeout: float = STORAGE_TIMEOUT,
        max_broken: float = MAX_BROKEN,
    ):
        self.name, self.labels, self.classes = name, labels, classes
        self.groups = getattr(source, "groups", None)
        self.left_out = getattr(source, "left_out", "")  # files that are no images, in words
        self.unlabelled_since = ""  # what is in the way of labels, in words
        mean, std = normalisation
        if in_chans != 3:  # no figures are known for them: the average over the colours
            mean, std = [sum(mean) / 3] * in_chans, [sum(std) / 3] * in_chans
        self.mean, self.std = list(mean), list(std)
        self.metadata = getattr(source, "metadata", {})
        self.opening = {"storage_timeout": storage_timeout, "max_broken": max_broken}
        self._source, self._in_chans, self._flag = source, in_chans, flag
        # Shared, so that a broken file is tried and named once by all workers together.
        self._is_broken = shared_bytes(len(source))
        self._is_waiting = shared_bytes(1)  # for the storage
        self._num_shared = 0

    def __len__(self):
        return len(self._source)

    def file_name(self, index: int) -> str:
        """The file of image `index`, its shard and key, or its number in a named set."""
        return self._source.name(index)

    @property
    def broken(self) -> list[str]:
        """Names of the files that this process and its workers could not read."""
        return [self.file_name(index) for index in self._is_broken.nonzero().flatten().tolist()]

    def is_broken(self, indices: Sequence[int]) -> torch.Tensor:
        """Whether this process and its workers have found these images unreadable, (n,) bool."""
        return self._is_broken[torch.as_tensor(indices)].bool()

    def digest(self) -> str:
        """Of the names of all images in their order, wherever the data set lies: their number, 16 digits."""
        if hasattr(self._source, "fingerprint"):
            names = self._source.fingerprint()
        else:
            names = "\n".join(map(self._source.name, range(len(self)))).encode(
                errors="surrogateescape"
            )
        return f"{len(self)}-{hashlib.blake2b(names, digest_size=8).hexdigest()}"

    def share_broken(self) -> int:
        """How many images are broken, of which all processes then know; all of them call it."""
        if dist.world_size() > 1:
            counted = int(dist.all_reduce_sum(self._is_broken.sum()))
            if counted != self._num_shared:  # the same on all processes
                broken = dist.all_reduce_max(self._is_broken)
                self._is_broken |= broken
                self._num_shared = int(broken.sum()) * dist.world_size()
            self._check_broken()
        return int(self._is_broken.sum())

    def check_channels(self) -> None:
        """Raise ValueError where no image has the channels, RunError or ValueError where none is readable.

        A few images are tried, up to the first that is as it should be.
        """
        unfit = None
        for index in np.unique(np.linspace(0, len(self) - 1, PROBES).astype(int)).tolist():
            try:
                self.read(index)
                return
            except UnfitImage as error:
                unfit = unfit or (index, error)
            except (BrokenImage, FileNotFoundError):
                pass
        if unfit is not None:
            index, error = unfit
            file = printable(self.file_name(index))
            raise ValueError(f"{self._flag} {self.name}: {file} cannot be used, {error}")
        self.load(0)

    def same_files(self, other: "ImageDataset") -> bool:
        """Whether both name the same images, as the splits of a folder without train/ and val/ do."""
        if len(self) != len(other) or getattr(self._source, "in_memory", False):
            return self._source is other._source
        return all(self._source.name(i) == other._source.name(i) for i in (0, len(self) - 1))

    def read(self, index: int) -> torch.Tensor:
        """Image `index` itself, uint8 `(C, H, W)`.

        Raises BrokenImage, UnfitImage, FileNotFoundError for a file that is gone, or RunError.
        """
        image = self._read_patiently(index)
        if isinstance(image, torch.Tensor):
            return match_channels(image, self._in_chans)
        return decode_image(image, self._in_chans)

    def load(self, index: int) -> torch.Tensor:
        """Image `index`, or the next that is readable, uint8 `(C, H, W)`.

        Raises ValueError when the whole dataset has none, and RunError as the class says.
        """
        return self._next_readable(index, self.read)

    def load_reduced(self, index: int, scale_for: Callable[[int, int], int]) -> Reduced:
        """As `load`, a JPEG at the part of its size that `scale_for` says; see images.decode_reduced."""

        def read(candidate):
            image = self._read_patiently(candidate)
            if isinstance(image, torch.Tensor):
                pixels = match_channels(image, self._in_chans)
                return Reduced(pixels, *pixels.shape[1:], scale=1)
            return decode_reduced(image, self._in_chans, scale_for)

        return self._next_readable(index, read)

    def _next_readable(self, index, read):
        """What `read` gives for image `index`, or for the next that is readable."""
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            if self._is_broken[candidate]:
                continue
            try:
                return read(candidate)
            except (BrokenImage, UnfitImage, FileNotFoundError) as error:
                self._is_broken[candidate] = 1
                file, count = printable(self.file_name(candidate)), int(self._is_broken.sum())
                reason = printable(str(error))
                logger.warning("cannot read %s (%s): took the next, %d so far", file, reason, count)
                self._check_broken(f", {file} ({reason}) among them")
        raise ValueError(f"{self._flag} {self.name}: none of its {len(self)} images is readable")

    def _read_patiently(self, index):
        """What the source gives for an image; a storage that does not answer is waited for."""
        failed_at, pause = None, FIRST_PAUSE
        while True:
            try:
                image = self._source.read(index)
                break
            except OSError as error:
                if self._source.is_of_one_file(index, error):
                    raise FileNotFoundError(cause(error)) from error
                file, reason, now = printable(self.file_name(index)), cause(error), time.monotonic()
            failed_at = failed_at or now
            timeout = self.opening["storage_timeout"]
            if now - failed_at >= timeout:
                raise RunError(
                    f"{self._flag}: {file} cannot be read for {timeout:g} s ({reason}): start the same "
                    "command again when the storage answers, or raise --storage_timeout; an empty file "
                    "in its place counts as broken"
                )
            if not self._is_waiting:
                self._is_waiting.fill_(1)
                logger.warning(
                    f"WARNING: cannot read {file} ({reason}): waiting up to {timeout:g} s for the storage"
                )
            time.sleep(min(pause, failed_at + timeout - now))
            pause = min(2 * pause, LONGEST_PAUSE)
        if failed_at is not None and self._is_waiting:
            self._is_waiting.zero_()
            logger.warning(f"the storage answers again, after {time.monotonic() - failed_at:.1f} s")
        return image

    def _check_broken(self, example=""):
        """Raise RunError where more images are broken than may be."""
        share, count = self.opening["max_broken"], int(self._is_broken.sum())
        allowed = max(FEW_BROKEN, share * len(self)) if share > 0 else 0
        if allowed < count < len(self):
            raise RunError(
                f"{self._flag} {self.name}: {count:,} of its {len(self):,} images are broken{example}, "
                f"more than --max_broken {share:g} allows: mend the data, or raise --max_broken"
            )


def _shard_source(paths, index, flag):
    """Tar shards: a list of files, or the text that names them."""
    try:
        from .shards import ShardSource, expand_shards
    except ImportError:  # scripts/copy_method.py copies it where it is asked for
        raise ValueError(
            f"{flag} {paths if isinstance(paths, str) else paths[0]} needs src/data/shards.py, which this "
            "copy lacks: copy it with --with shards, or give a folder of images"
        ) from None

    return ShardSource(expand_shards(paths, flag) if isinstance(paths, str) else paths, index, flag)


def _number_labels(texts):
    """Labels and class names from bytes (N,): numbers as they are, else sorted names.

    Numbers from MAX_NUMBERED on are names too: there is no class for each number below an id.
    """
    try:
        labels = torch.from_numpy(texts.astype(np.int64))
    except (ValueError, OverflowError):
        labels = None
    if labels is None or int(labels.max()) >= MAX_NUMBERED:
        names, labels = np.unique(texts, return_inverse=True)
        return torch.from_numpy(labels), [name.decode(errors="replace") for name in names]
    if int(labels.min()) < 0:
        return None, None
    return labels, [str(label) for label in range(int(labels.max()) + 1)]


def images_like(name: str | None, in_chans: int) -> ImageDataset:
    """No images, with the mean and std of a named set, or of ImageNet where the name says nothing.

    For networks whose run does not say how images are normalised.
    """
    from .small_sets import STATISTICS

    return ImageDataset([], "", in_chans, "", normalisation=STATISTICS.get(name, IMAGENET))


class EpochSampler(torch.utils.data.Sampler):
    """Pairs `(epoch, index)`; each sample at most once an epoch, in whole global batches.

    Batch b of an epoch holds the samples `permutation[b * G : (b + 1) * G]`, where G is
    `batch_size * world_size`, and rank r the r-th slice of `batch_size` in it. So the processes
    together see the batches that one process would. What is left at the end of an epoch (fewer
    than G samples) is dropped. With `groups` `(num_samples,)`, the shard of each sample, the
    shards are shuffled and the samples mixed among SHARD_WINDOW shards at a time, which keeps
    reading local.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        groups: Sequence[int] | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"--batch_size {batch_size} must be at least 1")
        if batch_size * world_size > num_samples:
            raise ValueError(
                f"--batch_size {batch_size} times {world_size} processes is more than the "
                f"{num_samples} images of the dataset: at most {num_samples // world_size} will do"
            )
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.groups = seed, None if groups is None else np.asarray(groups)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_iteration: int = 0) -> None:
        """Choose the epoch, and how many of its global batches were already seen."""
        self.epoch, self.start_iteration = epoch, start_iteration

    def __len__(self):
        batches = self.num_samples // (self.batch_size * self.world_size)
        return max(0, batches - self.start_iteration) * self.batch_size

    def __iter__(self):
        order = epoch_permutation(self.num_samples, self.seed, self.epoch, self.groups)
        batches = self.num_samples // (self.batch_size * self.world_size)
        for batch in range(self.start_iteration, batches):
            start = (batch * self.world_size + self.rank) * self.batch_size
            for index in order[start : start + self.batch_size].tolist():
                yield self.epoch, index


def epoch_permutation(
    num_samples: int, seed: int, epoch: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Order of the samples in an epoch, `(num_samples,)`; see EpochSampler for `groups`."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    if groups is None:
        return generator.permutation(num_samples)
    by_shard = np.argsort(groups, kind="stable")
    shards = np.split(by_shard, np.flatnonzero(np.diff(groups[by_shard])) + 1)
    shards = [shards[i] for i in generator.permutation(len(shards))]
    windows = [shards[i : i + SHARD_WINDOW] for i in range(0, len(shards), SHARD_WINDOW)]
    return np.concatenate([generator.permutation(np.concatenate(window)) for window in windows])
