"""Tar shards in webdataset's naming (`key.jpg` beside `key.cls`), read by offset.

Each shard's headers are scanned once and the table is kept in a cache folder. Samples are then
read directly, in any order, so an epoch is exact and can go on from its middle. Several archives in one
file are read one after the other; behind a damaged header the next whole one is looked for.
"""

import contextlib
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

from ..errors import printable
from .folders import is_of_one_file
from .images import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

OPEN_SHARDS = 32  # file handles that a worker keeps; the sampler's window is smaller
SCAN_THREADS = 8  # scanning waits for the file system, not for the processor
BLOCK = 512  # bytes; headers and data of a tar file begin at multiples of it
CHUNK = 2048 * BLOCK  # bytes that are read at once between archives
MAGIC = slice(257, 262)  # of a header, where "ustar" is
ENDS = "it ends"  # how the words for a shard that is cut off begin
INDEX_VERSION = 2  # of the tables in the cache; those of version 1 could be short


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
        missing = np.flatnonzero(labels == b"")
        self.labels = labels if len(labels) and not len(missing) else None
        self.unlabelled_since = ""
        if 0 < len(missing) < len(labels):
            first = printable(self.name(missing[0]))
            self.unlabelled_since = (
                f"{len(missing):,} of {len(labels):,} have no .cls, {first} first"
            )
        self._files, self._owner = OrderedDict(), None

    def __len__(self):
        return len(self.keys)

    def __getstate__(self):  # handles do not travel to a spawned worker
        return {**self.__dict__, "_files": OrderedDict(), "_owner": None}

    def name(self, index: int) -> str:
        """The shard of an image and its key in there, for people."""
        key = self.keys[index].decode(errors="replace")
        return f"{self.paths[self.groups[index]]}:{key}"

    def fingerprint(self) -> bytes:
        """What tells these images from others, in order."""
        return self.keys.tobytes() + self.sizes.tobytes()

    def is_of_one_file(self, index: int, error: OSError) -> bool:
        """Whether an error concerns this shard alone, and not the storage."""
        path = os.fsencode(self.paths[self.groups[index]])
        return is_of_one_file(path, os.path.dirname(path), error)

    def read(self, index: int) -> bytes:
        """The bytes of one image. Raises OSError where the shard does not give them."""
        if self._owner != os.getpid():  # a forked worker must not share the file position
            self._files, self._owner = OrderedDict(), os.getpid()
        shard = int(self.groups[index])
        if shard not in self._files:
            if len(self._files) >= OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = open(self.paths[shard], "rb")
        self._files.move_to_end(shard)
        size = int(self.sizes[index])
        try:
            self._files[shard].seek(int(self.offsets[index]))
            data = self._files[shard].read(size)
            if len(data) < size:
                raise OSError(f"{self.paths[shard]} is shorter than when it was indexed")
        except OSError:
            self._files.pop(shard).close()  # it may be a handle of a storage that was away
            raise
        return data


def _read_table(path, cache, flag):
    """Keys, offsets, sizes and labels of one shard, from the cache where it has them."""
    status = os.stat(path)
    stamp = f"{INDEX_VERSION} {path} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha1(stamp.encode(errors="surrogateescape")).hexdigest()
    stored = os.path.join(cache, f"{digest}.npz")
    try:
        with np.load(stored, allow_pickle=False) as table:
            return dict(table)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # not there, or not whole
        table, is_whole = _scan_shard(path, flag)
    if not is_whole:  # mended or not, it is looked at again
        return table
    try:
        os.makedirs(cache, exist_ok=True)
        partial = f"{stored}.{os.getpid()}.npz"
        np.savez(partial, **table)
        os.replace(partial, stored)
    except OSError as error:
        logger.info("the index of %s is not kept: %s", path, error)
    return table


def _scan_shard(path, flag):
    """The table of a shard, and whether nothing was wrong with it."""
    logger.info("indexing %s", path)
    images, labels, damages = {}, {}, []
    for archive, shard, member in _members(path, damages):
        folder, base = os.path.split(member.name)
        stem, _, suffix = base.partition(".")
        key = (archive, os.path.join(folder, stem))
        if not member.isfile() or stem == "":
            continue
        if os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES:
            images.setdefault(key, (member.offset_data, member.size))
        elif suffix.lower() == "cls":
            labels[key] = shard.extractfile(member).read().strip()
    if damages and not images:
        raise ValueError(
            f"{flag}: {path} is not an uncompressed tar file ({damages[0]}); shards are read by offset, "
            f"so unpack .tar.gz to .tar first"
        )
    last = next(reversed(images), None)
    if damages and labels and last not in labels:
        images.popitem()  # its label is cut off
    for damage in damages:
        word = "ends early" if damage.startswith(ENDS) else "is damaged"
        logger.warning("%s %s (%s): %d images are used", path, word, damage, len(images))
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    table = {
        "keys": np.array([os.fsencode(key) for _, key in images], dtype=np.bytes_),
        "labels": np.array([labels.get(key, b"") for key in images], dtype=np.bytes_),
        "offsets": places[:, 0],
        "sizes": places[:, 1],
    }
    return table, not damages


def _members(path, damages):
    """Each member of a shard: (number of its archive in the file, the archive, its header).

    What is wrong is added to the list `damages`, in words.
    """
    size, start, archive = os.path.getsize(path), 0, 0
    with open(path, "rb") as file:
        while start is not None:
            file.seek(start)
            try:
                shard = tarfile.open(fileobj=file, mode="r:")
            except tarfile.TarError as error:
                end, problem = start, str(error)
                if _block(file, start)[MAGIC] != b"ustar":  # compressed, or something else
                    damages.append(problem)
                    return
            else:
                end, problem = yield from _archive_members(shard, size, archive)
            if problem is None:
                block = _block(file, end)
                if len(block) < BLOCK:
                    problem = f"{ENDS} without an empty block"
                elif block.strip(b"\0"):
                    problem = "no header of a member"
            occupied, start = _find_header(file, end + BLOCK if problem else end)
            if problem is None and occupied is not None:  # behind the end of an archive
                end, archive = occupied, archive + 1
                if start == occupied:
                    logger.info("%s has another archive from byte %d on", path, start)
                    continue
                problem = "data behind the last member"
            if problem:
                rest = "the rest" if start is None else f"all before byte {start:,}"
                damages.append(f"{problem} at byte {end:,}, {rest} is skipped")


def _archive_members(shard, size, archive):
    """The members of an archive, as _members; returns where it ends, and what is wrong there or None.

    size: of the file.
    """
    while True:
        try:
            member = shard.next()
        except (tarfile.TarError, ValueError) as error:
            return shard.offset, str(error)
        if member is None:
            return shard.offset, None
        shard.members = []  # tarfile would keep every header in memory
        name = printable(member.name)
        if member.isfile() and member.size < 0:
            return member.offset, f"{name} has a size of {member.size:,} bytes"
        if member.isfile() and member.offset_data + -(-member.size // BLOCK) * BLOCK > size:
            return member.offset, f"{ENDS} within {name}"
        yield archive, shard, member


def _find_header(file, position):
    """Where the first block that is not empty and the first header are, from `position` on, or None."""
    occupied = None
    file.seek(position)
    while chunk := file.read(CHUNK):
        for start in range(0, len(chunk), BLOCK) if chunk.strip(b"\0") else ():
            block = chunk[start : start + BLOCK]
            if occupied is None and block.strip(b"\0"):
                occupied = position + start
            if block[MAGIC] == b"ustar":
                with contextlib.suppress(tarfile.HeaderError):
                    tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                    return occupied, position + start
        position += len(chunk)
    return occupied, None


def _block(file, position):
    file.seek(position)
    return file.read(BLOCK)
