"""Tar shards in webdataset's naming (`key.jpg` beside `key.cls`), read by offset.

Each shard's headers are scanned once and the table is kept in a cache folder. Samples are then
read directly, in any order, so an epoch is exact and can go on from its middle.
"""

import glob
import hashlib
import itertools
import logging
import os
import re
import tarfile
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .images import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

OPEN_SHARDS = 32  # file handles that a worker keeps; the sampler's window is smaller
SCAN_THREADS = 8  # scanning waits for the file system, not for the processor


def expand_shards(path: str, flag: str) -> list[str]:
    """Paths that a pattern means: commas, `{000..009}` or `{a,b}`, `*` and `?`, in that order.

    Raises FileNotFoundError naming the first part that matches no file.
    """
    paths = []
    for part in re.findall(r"(?:[^,{]|\{[^}]*\})+", path):
        for name in _expand_braces(os.path.expanduser(part.strip())):
            matches = [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True))
            if not matches:
                raise FileNotFoundError(f"{flag}: there is no tar shard {name} (from {path})")
            paths += matches
    return paths


def _expand_braces(pattern):
    pieces = re.split(r"\{([^}]*)\}", pattern)  # text, braces, text, braces, ..., text
    choices = []
    for position, piece in enumerate(pieces):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if position % 2 == 0:
            choices.append([piece])
        elif span:
            first, last = span.groups()
            numbers = range(int(first), int(last) + 1)
            choices.append([str(number).zfill(len(first)) for number in numbers])
        else:
            choices.append(piece.split(","))
    return ["".join(pieces) for pieces in itertools.product(*choices)]


class ShardSource:
    """Images of several tar files; `labels` is what the .cls members say, or None."""

    def __init__(self, paths: list[str], cache: str, flag: str):
        self.paths = [os.path.abspath(path) for path in paths]
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            tables = list(pool.map(lambda path: _read_table(path, cache, flag), self.paths))
        self.keys = np.concatenate([table["keys"] for table in tables])  # (N,) bytes
        self.offsets = np.concatenate([table["offsets"] for table in tables])  # (N,)
        self.sizes = np.concatenate([table["sizes"] for table in tables])  # (N,)
        self.groups = np.repeat(np.arange(len(tables)), [len(table["keys"]) for table in tables])
        labels = np.concatenate([table["labels"] for table in tables])
        self.labels = None if len(labels) == 0 or (labels == b"").any() else labels
        self._files, self._owner = OrderedDict(), None

    def __len__(self):
        return len(self.keys)

    def __getstate__(self):  # handles do not travel to a spawned worker
        return {**self.__dict__, "_files": OrderedDict(), "_owner": None}

    def name(self, index):
        key = self.keys[index].decode(errors="replace")
        return f"{self.paths[self.groups[index]]}:{key}"

    def read(self, index):
        """The bytes of one image."""
        if self._owner != os.getpid():  # a forked worker must not share the file position
            self._files, self._owner = OrderedDict(), os.getpid()
        shard = int(self.groups[index])
        if shard not in self._files:
            if len(self._files) >= OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = open(self.paths[shard], "rb")
        self._files.move_to_end(shard)
        self._files[shard].seek(int(self.offsets[index]))
        return self._files[shard].read(int(self.sizes[index]))


def _read_table(path, cache, flag):
    """Keys, offsets, sizes and labels of one shard, from the cache where it has them."""
    status = os.stat(path)
    stamp = f"{path} {status.st_size} {status.st_mtime_ns}"
    stored = os.path.join(cache, hashlib.sha1(stamp.encode()).hexdigest() + ".npz")
    try:
        with np.load(stored, allow_pickle=False) as table:
            return dict(table)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # not there, or not whole
        table = _scan_shard(path, flag)
    try:
        os.makedirs(cache, exist_ok=True)
        partial = f"{stored}.{os.getpid()}.npz"
        np.savez(partial, **table)
        os.replace(partial, stored)
    except OSError as error:
        logger.info("the index of %s is not kept: %s", path, error)
    return table


def _scan_shard(path, flag):
    logger.info("indexing %s", path)
    images, labels = {}, {}
    torn = "its size is no multiple of 512 bytes" if os.path.getsize(path) % 512 else None
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                shard.members = []  # tarfile would keep every header in memory
                folder, base = os.path.split(member.name)
                stem, _, suffix = base.partition(".")
                key = os.path.join(folder, stem)
                if not member.isfile() or stem == "":
                    continue
                if os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES:
                    images.setdefault(key, (member.offset_data, member.size))
                elif suffix.lower() == "cls":
                    labels[key] = shard.extractfile(member).read().strip()
    except tarfile.TarError as error:
        torn = str(error)
    if torn and not images:
        raise ValueError(
            f"{flag}: {path} is not an uncompressed tar file ({torn}); shards are read by offset, "
            f"so unpack .tar.gz to .tar first"
        )
    if torn:
        images.popitem()  # its image or label may be cut
        logger.warning("%s ends early (%s): %d images are used", path, torn, len(images))
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    return {
        "keys": np.array([os.fsencode(key) for key in images], dtype=np.bytes_),
        "labels": np.array([labels.get(key, b"") for key in images], dtype=np.bytes_),
        "offsets": places[:, 0],
        "sizes": places[:, 1],
    }
