"""A matrix in a file that all processes map, filled in chunks of rows; a stopped run goes on with the rest.

<name>.npy is the matrix, as numpy reads it; <name>.<rank>.done the chunks that a process has written and
flushed, a number a line. The folder must be shared by all processes, as that of the run is.
"""

import contextlib
import math
import os
import shutil
import struct
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from .. import dist
from ..errors import RunError, Stopped, writing
from ..run.lock import has_lost_its_writer
from ..run.stop import StopSignal
from .features import share

CHUNK = 4096  # rows, where a file does not say it
START = 4096  # bytes before the first row, so that chunks of two processes share no page of a disk


class RowFile:
    """(num_rows, *width) float32 at <folder>/<name>.npy, which is made if it is not there.

    width: a number, or the shape of a row. chunk: rows that are written, and lost, together; where there are
    fewer than CHUNK, they should fill whole pages of 4,096 bytes. All processes call the constructor, with
    the same arguments.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        num_rows: int,
        width: int | Sequence[int],
        chunk: int | None = None,
    ):
        self.chunk = CHUNK if chunk is None else chunk
        width = (width,) if isinstance(width, int) else tuple(width)
        self.path, self.shape = Path(folder) / f"{name}.npy", (num_rows, *width)
        self.row_bytes = 4 * math.prod(width)
        self._done = self.path.with_name(f"{name}.{dist.rank()}.done")
        if dist.is_main() and not self.path.exists():
            self.forget_chunks()  # of a file that somebody has deleted
            header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {self.shape}, }}"
            magic = b"\x93NUMPY\x01\x00" + struct.pack("<H", START - 10)
            part = self.path.with_suffix(".part")
            with writing(self.path):
                with open(part, "wb") as file:
                    file.write(magic + header.ljust(START - 11).encode() + b"\n")
                    file.truncate(START + num_rows * self.row_bytes)  # sparse: no bytes
                os.replace(part, self.path)
        dist.barrier()

    def read(self) -> Tensor:
        """The matrix, mapped, not to be written to: in memory is what is used, as far as it has room."""
        if not self.shape[0]:
            return torch.empty(self.shape)
        array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        with warnings.catch_warnings():  # torch knows no tensor that cannot be written to
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return torch.from_numpy(array)

    def missing(self) -> list[int]:
        """Chunks that no process has written yet."""
        written = set()
        for path in self.path.parent.glob(f"{self.path.stem}.*.done"):
            lines = path.read_text().split()
            written.update(int(line[:-1]) for line in lines if line.endswith("."))  # not torn
        return [i for i in range(-(-self.shape[0] // self.chunk)) if i not in written]

    def own_missing(self) -> list[int]:
        """The missing chunks that this process shall write. All processes call it together."""
        missing = dist.broadcast_object(self.missing() if dist.is_main() else None)
        return [missing[i] for i in share(len(missing))]

    def rows(self, chunk: int) -> range:
        """The rows of a chunk."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.shape[0]))

    def chunk_of(self, row: int) -> int:
        """The chunk that a row is in."""
        return row // self.chunk

    def write(self, first: int, rows: Tensor) -> None:
        """Write rows (n, *width) from number `first` on."""
        data = np.ascontiguousarray(rows.detach().cpu().float().numpy())
        with writing(self.path), open(self.path, "r+b") as file:
            file.seek(START + first * self.row_bytes)
            file.write(data.data)

    def mark(self, chunk: int) -> None:
        """Remember that all rows of a chunk are written, once they have reached the disk."""
        with writing(self.path), open(self.path, "r+b") as file:
            os.fsync(file.fileno())
        with writing(self._done), open(self._done, "a") as file:
            file.write(f"\n{chunk}.\n")
            file.flush()
            os.fsync(file.fileno())

    def fill(self, extract: Callable, stop: StopSignal) -> None:
        """Write the missing rows of this process, until all are there or a signal asks to stop.

        extract: called with the numbers (n,) of the rows, and with write(first, rows), to which it gives
        theirs in batches, in order. All processes call this; it does not wait for the others' rows.
        """
        chunks = [self.rows(chunk) for chunk in self.own_missing()]
        if not chunks:
            return
        numbers = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in chunks])

        def write(first, batch):
            done = 0
            while done < len(batch):  # rows of one chunk at a time
                number = int(numbers[first + done])
                chunk = self.chunk_of(number)
                chunk_end = self.rows(chunk).stop
                count = min(len(batch) - done, chunk_end - number)
                self.write(number, batch[done : done + count])
                done += count
                if number + count == chunk_end:
                    self.mark(chunk)
            if stop.requested:
                raise Stopped

        with contextlib.suppress(Stopped):
            extract(numbers, write)

    def forget_chunks(self) -> None:
        """Delete the lists of chunks, when all are written; by the main process."""
        for path in self.path.parent.glob(f"{self.path.stem}.*.done"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the file, once all processes have come here."""
        dist.barrier()
        if dist.is_main():
            self.forget_chunks()
            self.path.unlink(missing_ok=True)
        dist.barrier()


def check_space(
    folder: Path, needed: int, purpose: str, remedy: str = "lower --dim_pca or --size_dataset"
) -> None:
    """ValueError on all processes if the disk has too little space for so many bytes.

    What is in the folder's .npy files counts as free. remedy: what would need less.
    """
    held = sum(path.stat().st_blocks * 512 for path in folder.glob("*.npy"))
    free = dist.broadcast_object(shutil.disk_usage(folder).free + held)
    if needed > free:
        raise ValueError(
            f"--dump_path has {free / 1e9:.3g} GB free, and {purpose} needs {needed / 1e9:.3g} GB: "
            f"name a folder on another disk, or {remedy}"
        )


def wait_for(
    condition: Callable[[], bool], stop: StopSignal, folder: Path, locks: Iterable[Path] = ()
) -> None:
    """Wait until the files of other processes are there, or one of all was asked to stop.

    A collective would do, but for its time limit: processes may have hours of work more than others.
    locks: of the processes that this one waits for. Raises RunError when one of them has ended.
    """
    asked, pause = folder / "stop", 0.01
    while not condition():
        if stop.requested:
            asked.touch()
        if asked.exists():
            return
        if pause > 1.0 and any(map(has_lost_its_writer, locks)):
            raise RunError(
                "another process of the run has ended in the clustering: what it says on its screen tells "
                "why; the same command continues the run"
            )
        time.sleep(pause)
        pause = min(5.0, 1.5 * pause)


def load_tensors(path: Path) -> dict:
    """What write_tensors wrote."""
    return torch.load(path, weights_only=True, map_location="cpu")  # noqa: TID251


def write_tensors(path: Path, values: dict) -> None:
    """Write tensors and numbers by name, whole or not at all. Raises CheckpointError."""
    _write(path, lambda file: torch.save(values, file))


def write_array(path: Path, values: Tensor) -> None:
    """Write a tensor as numpy reads it, whole or not at all. Raises CheckpointError."""
    # Numpy writes to a file itself, and does not say why that fails.
    _write(path, lambda file: np.save(SimpleNamespace(write=file.write), values.numpy()))


def _write(path, write):
    part = path.with_suffix(".part")
    with writing(path):
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
