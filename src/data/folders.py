"""Folders of images: which files are images, which folders are splits and classes, reading a file.

What is no image of the data is left out and counted: other kinds of files, junk of file managers, and
what runs and visualize.py have written there.
"""

import errno
import heapq
import logging
import os
import stat
from collections import Counter

import numpy as np
import torch

from ..errors import printable
from .images import IMAGE_SUFFIXES, BrokenImage

logger = logging.getLogger(__name__)

# Folders and files of file managers and archives, by their names in lower case.
JUNK = frozenset(
    ("@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found")
    + ("thumbs.db", "ehthumbs.db", "desktop.ini")
)
# What runs and visualize.py leave in a folder, each by files that show that they were there.
RUN_FOLDERS = frozenset("plots checkpoints clustering clusters linear features davis".split())
RUN_FILES = (".jsonl", ".json", ".log", ".pth")
PLOTS = frozenset(
    "curves.png crops.png multicrop.png attention patches classes clusters filters activations".split()
)
CLUSTER_FILES = frozenset(
    ("assignments.npy", "assignments_heads.npy", "similarities.npy", "centroids.npy")
    + ("clusters.png", "sizes.png", "folders")
)
ATTENTION_FILES = ("attn-", "overlay-", "mask_th", "img.png", "sheet.png")
# Spellings of the splits' folders, in any case.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
SPLITS_IN_PLACE_OF = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}
# A folder of such a name inside a class's folder may hold its images.
IMAGE_FOLDERS = frozenset("images image imgs img jpeg jpegs jpegimages photos pictures".split())
MAX_BYTES = 2**32  # of a file; no image is larger
# What opening one file may say though the storage is well.
OF_ONE_FILE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENXIO)


# ============ finding images ============
def list_images(root: str) -> list[str]:
    """Paths of all image files below `root`, relative to it and sorted; see walk_images."""
    return walk_images(root)[0]


def walk_images(root: str) -> tuple[list[str], Counter]:
    """Paths of all image files below `root`, relative to it and sorted; what was left out, by kind.

    Links are followed, and each folder is visited once, by its own path where it has one below `root`.
    Names that begin with a dot, junk, and what runs have written are skipped.
    """
    found, left_out, visited = [], Counter(), set()
    starts = [""]  # `root`, and then the links to folders, in order
    while starts:
        folders = [heapq.heappop(starts)]
        while folders:
            folder = folders.pop()
            status = os.stat(os.path.join(root, folder))
            identity = (status.st_dev, status.st_ino)
            if status.st_ino and identity in visited:  # some file systems have no numbers
                continue
            visited.add(identity)
            with os.scandir(os.path.join(root, folder)) as entries:
                entries = {entry.name: entry for entry in entries}
            own = _own_files(os.path.join(os.path.basename(root), folder), set(entries))
            for name, entry in entries.items():
                if name.startswith(".") or name.lower() in JUNK:
                    continue
                path = os.path.join(folder, name)
                kind = _kind(entry)
                if name in own:
                    left_out["folders of runs"] += kind == "folder"
                elif kind == "folder" and entry.is_symlink():
                    heapq.heappush(starts, path)
                elif kind == "folder":
                    folders.append(path)
                elif not _has_image_suffix(name):
                    suffix = os.path.splitext(name)[1].lower()
                    left_out[suffix or "without a suffix"] += 1
                elif kind == "other":
                    left_out["pipes and devices"] += 1
                else:
                    found.append(path)
    return sorted(found), left_out


def _kind(entry):
    """folder, file (or a link that leads nowhere now), or other: a pipe, a device, a circle of links."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "file" if entry.is_symlink() and not os.path.exists(entry.path) else "other"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return "other"


def _own_files(folder, names):
    """Those of the names in a folder that a run or visualize.py has written, as far as images go."""
    own = set()
    if not names.isdisjoint(("log.jsonl", "checkpoint.pth")) or {"args.json", "train.log"} <= names:
        own |= RUN_FOLDERS | {name for name in names if name.endswith(RUN_FILES)}
    if {"clusters.json", "assignments.npy"} <= names:
        own |= CLUSTER_FILES
    if {"extract.json", "features.npy"} <= names:
        own |= {"features.npy", "unit_rows.npy", "centroids.npy", "clusters.png"}
    if "attn-mean.png" in names:
        own |= {name for name in names if name.startswith(ATTENTION_FILES)}
    if os.path.basename(folder.rstrip(os.sep)) == "plots" and not names.isdisjoint(PLOTS):
        own |= names
    return own


def _has_image_suffix(name):
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def describe_left_out(left_out: Counter, most: int = 5) -> str:
    """Such as "12 .heic, 3 .txt", the most frequent first; "" for nothing."""
    texts = [f"{count:,} {printable(kind)}" for kind, count in left_out.most_common(most) if count]
    others = sum(left_out.values()) - sum(count for _, count in left_out.most_common(most))
    return ", ".join([*texts, f"{others:,} others"] if others else texts)


def has_image(folder: str | os.PathLike) -> bool:
    """Whether a folder (str or bytes) has an image file directly in it."""
    names = map(os.fsdecode, os.listdir(folder))
    return any(_has_image_suffix(name) and not name.startswith(".") for name in names)


# ============ splits ============
def split_folders(path: str) -> dict[str, str]:
    """The folders of train, val and test in `path`, by split; those that are there.

    train, val and test are what they say. Other spellings (Train, training, valid, ...) are splits
    where one for training lies beside one to evaluate; else they may be classes.
    """
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if _kind(entry) == "folder")
    found = {}
    for split, spellings in SPLITS.items():
        matching = [name for name in names if name.lower() in spellings]
        if matching:
            found[split] = min(matching, key=lambda name: (name != split, name))
    if "train" not in found or len(found) == 1:
        found = {split: name for split, name in found.items() if name == split}
    return {split: os.path.join(path, name) for split, name in found.items()}


def find_split(path: str, split: str, flag: str) -> tuple[str, str | None]:
    """The folder of `split`, and the one of training images beside it if there is one.

    Raises FileNotFoundError where there are training images only and others were asked for.
    """
    folders = split_folders(path)
    train = folders.get("train")
    for name in SPLITS_IN_PLACE_OF.get(split, (split,)):
        folder = folders.get(name)
        if folder is None and os.path.isdir(os.path.join(path, name)):
            folder = os.path.join(path, name)  # a split of another name
        if folder is not None:
            if os.path.basename(folder) != name:
                logger.info(f"{flag} {path}: the images of {split} are in {folder}")
            return folder, train
    if split != "train" and train is not None:
        names = " or ".join(SPLITS_IN_PLACE_OF.get(split, (split,)))
        raise FileNotFoundError(
            f"{flag} {path} has a folder {os.path.basename(train)} but no {names}"
        )
    if split == "train" and folders:
        names = " and ".join(os.path.basename(folder) for folder in folders.values())
        logger.warning(
            f"WARNING: {flag} {path} has the folder {names} and none of training images: all its "
            "images are trained on, those included"
        )
    return path, None


def warn_of_inner_splits(parts: list[list[bytes]], flag: str, path: str) -> None:
    """Say it where the images to train on are those of train/ and val/ of a folder further down."""
    inner = {tuple(part[:2]) for part in parts if len(part) > 2}
    for folder, name in sorted(inner):
        if name.lower() in map(str.encode, SPLITS["val"] + SPLITS["test"]):
            if any((folder, other) in inner for other in (b"train", b"Train", b"training")):
                inside = os.path.join(path, os.fsdecode(folder))
                logger.warning(
                    f"WARNING: {flag} {path}: the images of {os.fsdecode(name)} in {inside} are trained "
                    f"on as well; {flag} {inside} takes those of train alone"
                )


# ============ classes ============
def folder_labels(
    source: "FolderSource", train: str | None
) -> tuple[torch.Tensor | None, list[str] | None, str]:
    """Labels (N,) and class names by the rule of datasets.open_dataset; or None, None and why not.

    train: the folder of training images, whose classes are numbered first.
    """
    parts = source.parts()
    names = {part[0] for part in parts if len(part) > 1}
    if len(names) < 2:
        return None, None, ""
    outside = next((part for part in parts if len(part) == 1), None)
    if outside:
        return None, None, f"{printable(outside[0])} lies beside the folders, in none of them"
    lacking = names - {part[0] for part in parts if _is_of_class(part)}
    if lacking:
        first = next(part for part in parts if part[0] in lacking)
        file, folder = printable(os.fsencode(os.sep).join(first)), printable(first[0])
        return None, None, f"{file} lies deeper, and {folder} has no image directly in it"
    known = []
    if train and os.fsencode(train) != source.root:
        known = _class_folders(os.fsencode(train))
    classes = [*known, *sorted(names - set(known))]  # a class that only val has comes last
    label_of = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([label_of[part[0]] for part in parts])
    return labels, [os.fsdecode(name) for name in classes], ""


def _is_of_class(part):
    """Whether a file lies directly in a class's folder, or in images/ or the like in there."""
    if len(part) == 3:
        return os.fsdecode(part[1]).lower() in IMAGE_FOLDERS
    return len(part) == 2


def _class_folders(train):
    """Names of the folders of training images that have images, sorted bytes."""
    names = []
    for entry in os.scandir(train):
        name = os.fsdecode(entry.name).lower()
        if not entry.is_dir() or name in JUNK or name.startswith("."):
            continue
        inner = [inside.path for inside in os.scandir(entry.path) if inside.is_dir()]
        inner = [
            path for path in inner if os.fsdecode(os.path.basename(path)).lower() in IMAGE_FOLDERS
        ]
        if any(has_image(folder) for folder in (entry.path, *inner)):
            names.append(entry.name)
    return sorted(names)


# ============ reading ============
class FileSource:
    """Image files of a folder, `root`, by their `paths` (N,) bytes relative to it.

    One array has them all, which workers share without copying.
    """

    root: bytes
    paths: np.ndarray

    def __len__(self):
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path of an image, for people."""
        return os.fsdecode(self._path(index))

    def fingerprint(self) -> bytes:
        """What tells these files from others, in order."""
        return self.paths.tobytes()

    def read(self, index: int) -> bytes:
        """The bytes of one image. Raises as read_file does."""
        return read_file(self._path(index))

    def is_of_one_file(self, index: int, error: OSError) -> bool:
        """Whether an error concerns this image alone, and not the storage."""
        return is_of_one_file(self._path(index), self.root, error)

    def _path(self, index):
        return os.path.join(self.root, self.paths[index])


class FolderSource(FileSource):
    """All image files below `root`."""

    def __init__(self, root: str):
        self.root = os.fsencode(root)
        names, left_out = walk_images(root)
        self.paths = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.left_out = describe_left_out(left_out)

    def parts(self) -> list[list[bytes]]:
        """The path of each image: its first two folders, where it has them, and the rest."""
        return [path.split(os.fsencode(os.sep), 3) for path in self.paths.tolist()]


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of a file. Raises BrokenImage for a pipe, a device, or what is too large to be an image.

    Nothing is waited for: a pipe is opened without anybody who writes to it.
    """
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BrokenImage("it is no regular file")
        if status.st_size > MAX_BYTES:
            raise BrokenImage(f"it has {status.st_size:,} bytes, more than an image may have")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def is_of_one_file(path: bytes, root: bytes, error: OSError) -> bool:
    """Whether a file cannot be read for good: it is gone, or closed to us, while its storage is there.

    root: the folder of the data set. A storage that is away may look like an empty folder.
    """
    if error.errno in OF_ONE_FILE:
        return _has_entries(root)
    target, root = os.path.realpath(path), os.path.realpath(root)
    below = target.startswith(os.path.join(root, b""))
    parent = root if below else os.path.dirname(target)  # a link may lead to another storage
    # Looked at twice, since a storage may come back at any moment.
    return _has_entries(parent) and not os.path.lexists(target) and _has_entries(parent)


def _has_entries(folder):
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False
