"""Where images come from: folders, tar shards and small named sets, as uint8 by index.

A file that does not decode is replaced by the next readable one and named in the log. The sampler
makes epochs that are exact, the same for any number of workers, and can go on from their middle.
"""

import logging
import os
from collections.abc import Sequence

import numpy as np
import torch

from .images import BrokenImage, FolderSource, UnfitImage, decode_image, has_image, match_channels
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
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}
SHARD_WINDOW = 8  # shards whose samples are mixed with each other


def usual_std(std: Sequence[float]) -> list[float]:
    """The same standard deviations, with the usual red of ImageNet where it is SwAV's."""
    return [0.229 if value == SWAV_RED_STD else value for value in std]


def open_dataset(
    path: str,
    split: str = "train",
    in_chans: int = 3,
    flag: str = "--data_path",
    root: str = "data",
) -> "ImageDataset":
    """Open the images that `path` names.

    path: a name (`digits`, `cifar10`, ...: NAMES; a folder of that name is written
        `./cifar10`), a folder, or tar shards (`a.tar`, `shard-{000..009}.tar`, `shards/*.tar`,
        several of these joined by commas or in a list, or a folder that holds them).
    split: "train" or "val". In a folder: `<path>/train`, or `<path>/val` or else `<path>/test`; a
        folder without any of them is taken as it is for every split, and so are shards.
    in_chans: channels of the tensors. root: folder of downloads and of shard indexes.

    Labels: where all images lie in two or more immediate subfolders, each with at least one image
    directly in it, every subfolder is a class. Images at the top, or only deeper down, are
    unlabelled. Classes are sorted; those of `val` are numbered as in the `train` beside it. Shards
    are labelled when every sample has a .cls, which holds a number or a name.

    Raises FileNotFoundError or ValueError with one sentence that names `flag`.
    """
    if in_chans < 1:
        raise ValueError(f"--in_chans {in_chans} must be at least 1")
    path = ",".join(map(str, path)) if isinstance(path, list | tuple) else os.fspath(path)
    folder, index = os.path.expanduser(path), os.path.join(root, "shard_index")
    labels = classes = None
    normalisation = IMAGENET
    if path in NAMES:
        from . import small_sets

        images, labels, classes = small_sets.read_small_set(path, split, flag, root)
        source, normalisation = small_sets.ArraySource(images), small_sets.STATISTICS[path]
    elif os.path.isdir(folder):
        folder, train = _split_folder(folder, split, flag)
        source = FolderSource(folder)
        shards = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
        if len(source) == 0 and shards:
            source = _shard_source([os.path.join(folder, name) for name in shards], index, flag)
        else:
            labels, classes = _folder_labels(source, train)
    elif ".tar" in path:
        source = _shard_source(path, index, flag)
    elif os.path.exists(folder):
        raise ValueError(f"{flag} {path} is a file: give a folder of images, or tar shards")
    else:
        raise FileNotFoundError(
            f"{flag} {path} does not exist: give a folder of images, tar shards, or one of "
            f"{', '.join(NAMES)}"
        )
    if len(source) == 0:
        raise FileNotFoundError(f"{flag} {folder} has no image in it, nor in its subfolders")
    if getattr(source, "labels", None) is not None:  # of shards
        labels, classes = _shard_labels(source.labels)
    dataset = ImageDataset(
        source, path, in_chans, flag, labels=labels, classes=classes, normalisation=normalisation
    )
    try:
        dataset.read(0)  # channels that do not fit are found here rather than in a worker
    except UnfitImage as error:
        raise ValueError(f"{flag} {path}: {source.name(0)} cannot be used, {error}") from None
    except (BrokenImage, OSError):
        dataset.load(0)  # raises if there is no readable one at all
    return dataset


class ImageDataset:
    """Images by index, with what is known about them.

    `labels` is `(N,)` int64 or None, `classes` the names; `mean` and `std` have one value a
    channel, from `normalisation`, those of RGB; `groups` `(N,)` is the shard of each sample, or None.
    """

    def __init__(
        self, source, name, in_chans, flag, labels=None, classes=None, normalisation=IMAGENET
    ):
        self.name, self.labels, self.classes = name, labels, classes
        self.groups = getattr(source, "groups", None)
        mean, std = normalisation
        if in_chans != 3:  # no figures are known for them: the average over the colours
            mean, std = [sum(mean) / 3] * in_chans, [sum(std) / 3] * in_chans
        self.mean, self.std = list(mean), list(std)
        self._source, self._in_chans, self._flag = source, in_chans, flag
        # Shared, so that a broken file is tried and named once by all workers together.
        self._is_broken = shared_bytes(len(source))

    def __len__(self):
        return len(self._source)

    def file_name(self, index: int) -> str:
        """The file of image `index`, its shard and key, or its number in a named set."""
        return self._source.name(index)

    @property
    def broken(self) -> list[str]:
        """Names of the files that this process and its workers could not read."""
        return [self.file_name(index) for index in self._is_broken.nonzero().flatten().tolist()]

    def same_files(self, other: "ImageDataset") -> bool:
        """Whether both name the same images, as the splits of a folder without train/ and val/ do."""
        if len(self) != len(other) or getattr(self._source, "in_memory", False):
            return self._source is other._source
        return all(self._source.name(i) == other._source.name(i) for i in (0, len(self) - 1))

    def read(self, index: int) -> torch.Tensor:
        """Image `index` itself, uint8 `(C, H, W)`. Raises BrokenImage, UnfitImage or OSError."""
        image = self._source.read(index)
        if isinstance(image, torch.Tensor):
            return match_channels(image, self._in_chans)
        return decode_image(image, self._in_chans)

    def load(self, index: int) -> torch.Tensor:
        """Image `index`, or the next that is readable, uint8 `(C, H, W)`.

        Raises ValueError when the whole dataset has none.
        """
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            if self._is_broken[candidate]:
                continue
            try:
                return self.read(candidate)
            except (BrokenImage, UnfitImage, OSError) as error:
                self._is_broken[candidate] = 1
                file, count = self.file_name(candidate), int(self._is_broken.sum())
                logger.warning("cannot read %s (%s): took the next, %d so far", file, error, count)
        raise ValueError(f"{self._flag} {self.name}: none of its {len(self)} images is readable")


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


def _split_folder(path, split, flag):
    """The folder of `split`, and the `train` folder beside it if there is one."""
    names, train = SPLIT_FOLDERS.get(split, (split,)), os.path.join(path, "train")
    has_train = os.path.isdir(train)
    for name in names:
        if os.path.isdir(os.path.join(path, name)):
            return os.path.join(path, name), train if has_train else None
    if has_train:
        raise FileNotFoundError(f"{flag} {path} has a folder train but no {' or '.join(names)}")
    return path, None


def _folder_labels(source, train):
    """Labels `(N,)` and class names by the rule of `open_dataset`, or None, None."""
    parts = [path.split(os.fsencode(os.sep), 2) for path in source.paths.tolist()]
    names = {part[0] for part in parts if len(part) > 1}
    if len(names) < 2 or any(len(part) == 1 for part in parts):
        return None, None
    if names != {part[0] for part in parts if len(part) == 2}:
        logger.info("%s is nested without a level of classes: unlabelled", source.root.decode())
        return None, None
    known = []
    if train and os.fsencode(train) != source.root:
        subfolders = [entry for entry in os.scandir(os.fsencode(train)) if entry.is_dir()]
        known = sorted(entry.name for entry in subfolders if has_image(entry.path))
    classes = [*known, *sorted(names - set(known))]  # a class that only val has comes last
    number = {name: label for label, name in enumerate(classes)}
    return torch.tensor([number[part[0]] for part in parts]), [os.fsdecode(x) for x in classes]


def _shard_labels(texts):
    """Labels and class names from the .cls members: numbers as they are, else sorted names."""
    try:
        labels = torch.from_numpy(texts.astype(np.int64))
    except ValueError:
        names, labels = np.unique(texts, return_inverse=True)
        return torch.from_numpy(labels), [name.decode(errors="replace") for name in names]
    if int(labels.min()) < 0:
        return None, None
    return labels, [str(label) for label in range(int(labels.max()) + 1)]


class EpochSampler(torch.utils.data.Sampler):
    """Pairs `(epoch, index)`; each sample at most once an epoch, in whole global batches.

    Batch b of an epoch holds the samples `permutation[b * G : (b + 1) * G]`, where G is
    `batch_size * world_size`, and rank r the r-th slice of `batch_size` in it. So the processes
    together see the batches that one process would. What is left at the end of an epoch (fewer
    than G samples) is dropped. With `groups` `(num_samples,)`, the shard of each sample, the
    shards are shuffled and the samples mixed among SHARD_WINDOW shards at a time, which keeps
    reading local.
    """

    def __init__(self, num_samples, batch_size, rank, world_size, seed, groups=None):
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

    def set_epoch(self, epoch: int, start_iteration: int = 0):
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


def epoch_permutation(num_samples: int, seed: int, epoch: int, groups=None) -> np.ndarray:
    """Order of the samples in an epoch, `(num_samples,)`; see EpochSampler for `groups`."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    if groups is None:
        return generator.permutation(num_samples)
    by_shard = np.argsort(groups, kind="stable")
    shards = np.split(by_shard, np.flatnonzero(np.diff(groups[by_shard])) + 1)
    shards = [shards[i] for i in generator.permutation(len(shards))]
    windows = [shards[i : i + SHARD_WINDOW] for i in range(0, len(shards), SHARD_WINDOW)]
    return np.concatenate([generator.permutation(np.concatenate(window)) for window in windows])
