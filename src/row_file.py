"""A matrix in a file that all processes map, filled in chunks of rows; a stopped run knows which are there.

<name>.npy is the matrix, as numpy reads it; <name>.<rank>.done the chunks that a process has written and
flushed, a number a line. The folder must be shared by all processes, as that of the run is.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src import distributed
from src.features import share

CHUNK = 4096  # rows


class RowFile:
    """(num_rows, width) float32 at <folder>/<name>.npy, which is made if it is not there.

    All processes call the constructor, with the same arguments.
    """

    def __init__(self, folder: Path, name: str, num_rows: int, width: int):
        self.path, self.shape = Path(folder) / f"{name}.npy", (num_rows, width)
        self._done = self.path.with_name(f"{name}.{distributed.rank()}.done")
        if distributed.is_main() and not self.path.exists():
            part = self.path.with_suffix(".part")
            np.lib.format.open_memmap(
                part, "w+", np.float32, self.shape
            ).flush()  # sparse: no bytes
            os.replace(part, self.path)
        distributed.barrier()
        self._start = np.load(self.path, mmap_mode="r", allow_pickle=False).offset

    def read(self) -> Tensor:
        """The matrix, mapped: what is used of it is in memory, as long as there is room."""
        if not self.shape[0]:
            return torch.empty(self.shape)
        # Copy on write: torch knows no tensor that cannot be written to.
        return torch.from_numpy(np.load(self.path, mmap_mode="c", allow_pickle=False))

    def missing(self) -> list[int]:
        """Chunks that no process has written yet."""
        written = set()
        for path in self.path.parent.glob(f"{self.path.stem}.*.done"):
            whole = path.read_text().rpartition("\n")[0]  # the last line may be torn
            written.update(map(int, whole.split()))
        return [i for i in range(-(-self.shape[0] // CHUNK)) if i not in written]

    def mine(self) -> list[int]:
        """The missing chunks that this process shall write. All processes call it together."""
        missing = self.missing()
        distributed.barrier()  # before any of them is written
        return [missing[i] for i in share(len(missing))]

    def rows(self, chunk: int) -> range:
        """The rows of a chunk."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.shape[0]))

    def chunk_of(self, row: int) -> int:
        return row // CHUNK

    def write(self, first: int, rows: Tensor) -> None:
        """Write rows (n, width) from number `first` on."""
        data = np.ascontiguousarray(rows.detach().cpu().float().numpy())
        with open(self.path, "r+b") as file:
            file.seek(self._start + first * self.shape[1] * 4)
            file.write(data.data)

    def mark(self, chunk: int) -> None:
        """Remember that all rows of a chunk are written, once they have reached the disk."""
        with open(self.path, "r+b") as file:
            os.fsync(file.fileno())
        with open(self._done, "a") as file:
            file.write(f"{chunk}\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file, once all processes have come here."""
        distributed.barrier()
        if distributed.is_main():
            for path in [*self.path.parent.glob(f"{self.path.stem}.*.done"), self.path]:
                path.unlink(missing_ok=True)
        distributed.barrier()


def load_tensors(path: Path) -> dict:
    """What write_tensors wrote."""
    return torch.load(path, weights_only=True)  # noqa: TID251


def write_tensors(path: Path, values: dict) -> None:
    """Write tensors and numbers by name, whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(values, part)
    os.replace(part, path)


def write_array(path: Path, values: Tensor) -> None:
    """Write a tensor as numpy reads it, whole or not at all."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.save(file, values.numpy())
    os.replace(part, path)
