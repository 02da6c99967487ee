"""A disk that is full from the n-th write on, for the process that calls `fill` and one folder.

What needs room counts: a file or folder that is made, bytes that Python writes, a flush to the disk.
What libraries write by themselves, as numpy does, is seen at the flush only; a small file system does that.
"""

import builtins
import errno
import io
import os
import re
from pathlib import Path

NO_SPACE = os.strerror(errno.ENOSPC)


class _Disk:
    """Counts what needs room in a folder, notes it, and refuses all from number `full_at` on."""

    def __init__(self, folder, full_at, notes):
        self.folder, self.full_at, self.notes = os.path.realpath(folder), full_at, notes
        self.count = 0

    def holds(self, path):
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.realpath(os.fsdecode(path)).startswith(self.folder)

    def use(self, kind, path):
        """Count a use of the disk; OSError if it is full."""
        number, self.count = self.count, self.count + 1
        if self.notes is not None:
            name = os.path.relpath(os.path.realpath(os.fsdecode(path)), self.folder)
            os.write(self.notes, f"{kind} {name}\n".encode())
        if self.full_at is not None and number >= self.full_at:
            named = [] if kind in ("write", "flush") else [os.fsdecode(path)]
            raise OSError(errno.ENOSPC, NO_SPACE, *named)


def fill(folder: str, full_at: int | None, notes: str | None = None) -> None:
    """Have the disk be full from a number on; notes: a file that gets a line for each use."""
    handle = None if notes is None else os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    disk = _Disk(folder, full_at, handle)
    plain_open, plain_os_open, plain_fdopen = io.open, os.open, os.fdopen
    plain_fsync = os.fsync

    class File(io.FileIO):
        def write(self, data):
            disk.use("write", self.path)
            return super().write(data)

        def truncate(self, size=None):
            disk.use("write", self.path)
            return super().truncate(size)

    def wrap(raw, path, mode, buffering, text_options):
        raw.path = path
        kind = io.BufferedRandom if "+" in mode else io.BufferedWriter
        if "b" in mode:
            return raw if buffering == 0 else kind(raw)
        return io.TextIOWrapper(kind(raw), **text_options)

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **options):
        if not (set(mode) & set("wax+") and disk.holds(file)):
            return plain_open(file, mode, buffering, encoding, errors, newline, **options)
        if not os.path.exists(file):
            disk.use("open", file)
        raw = File(file, mode.replace("b", "").replace("t", ""))
        text_options = {"encoding": encoding or "utf-8", "errors": errors, "newline": newline}
        return wrap(raw, file, mode, buffering, text_options)

    def os_opened(path, flags, *rest, **options):
        if flags & os.O_CREAT and disk.holds(path) and not os.path.exists(path):
            disk.use("open", path)
        return plain_os_open(path, flags, *rest, **options)

    def path_of(handle):
        return os.readlink(f"/proc/self/fd/{handle}")

    def fdopened(handle, mode="r", *rest, **options):
        path = path_of(handle)
        if not (set(mode) & set("wax+") and disk.holds(path)):
            return plain_fdopen(handle, mode, *rest, **options)
        raw = File(handle, mode.replace("b", "").replace("t", ""))
        return wrap(raw, path, mode, -1, {"encoding": "utf-8"})

    def flushed(handle):
        path = path_of(handle if isinstance(handle, int) else handle.fileno())
        if disk.holds(path) and not os.path.isdir(path):
            disk.use("flush", path)
        return plain_fsync(handle)

    def using(name, position):
        plain = getattr(os, name)

        def replaced(*args, **options):
            if disk.holds(args[position]) and not os.path.exists(args[position]):
                disk.use(name, args[position])
            return plain(*args, **options)

        setattr(os, name, replaced)

    builtins.open = io.open = opened
    os.open, os.fdopen, os.fsync = os_opened, fdopened, flushed
    using("mkdir", 0)
    using("link", 1)


def places(notes: Path) -> list[str]:
    """What each use of the disk was, by its number, without numbers of processes and of clusterings."""
    lines = notes.read_text().splitlines()
    return [re.sub(r"tmp-[^/]*\d", "tmp", re.sub(r"-\d+\.part", ".part", line)) for line in lines]


def first_of_each(kinds: list[str]) -> list[int]:
    """The numbers of the first use of each kind."""
    return sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
