"""Memory bank of the methods that assign the whole data set once an epoch.

SwAV paper (arXiv:2006.09882), appendix D.2: the assignment phase works on the embeddings that
training computed during the last epoch, instead of on a pass of its own over the data.
"""

import logging
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import dist
from ..run.log import duration
from ..run.run import Run

logger = logging.getLogger(__name__)

GATHERED = 2**24  # numbers that all processes together exchange at a time when saving
LOG_SECONDS = 10.0


class MemoryBank:
    """Embeddings of some crops of each image, as they were in the last pass over the data.

    Each process keeps the rows of its own batches. Row i of process r has the number that its image
    has in the order of the epoch, (i // B * W + r) * B + i % B for batches of B and W processes, so
    that the numbers do not depend on how many processes share the rows.

    num_crops: embeddings of an image. capacity: images of this process, at most. batch_size: B.
    """

    def __init__(
        self, num_crops: int, capacity: int, batch_size: int, dim: int, device: torch.device
    ):
        self.batch_size, self.num_rows = batch_size, 0
        self._embeddings = torch.zeros(num_crops, capacity, dim, device=device)
        self._indices = torch.zeros(capacity, dtype=torch.int64)

    @property
    def embeddings(self) -> Tensor:
        """(crops, n, D) float32 of the rows held now."""
        return self._embeddings[:, : self.num_rows]

    @property
    def indices(self) -> Tensor:
        """(n,), the samples that the rows belong to."""
        return self._indices[: self.num_rows]

    @property
    def positions(self) -> Tensor:
        """(n,), the numbers of the rows, ascending."""
        row = torch.arange(self.num_rows)
        batch = row // self.batch_size * dist.world_size() + dist.rank()
        return batch * self.batch_size + row % self.batch_size

    @property
    def has_embedding(self) -> Tensor:
        """(n,), whether an image has an embedding: rows of zeros stand for none."""
        return self.embeddings.any(2).all(0)

    def push(self, indices: Tensor, embeddings: Tensor) -> None:
        """Add a batch: indices (B,), embeddings (crops, B, D).

        What is not finite becomes a row of zeros: half precision overflows now and then, and loss
        scaling goes on after it, while one NaN would be in all sums of a clustering.
        """
        rows = slice(self.num_rows, self.num_rows + len(indices))
        finite = torch.isfinite(embeddings).all(2, keepdim=True)
        self._indices[rows] = indices
        self._embeddings[:, rows] = torch.where(finite, embeddings, 0.0)
        self.num_rows = rows.stop

    def keep(self, num_rows: int) -> None:
        """Forget all but the first rows."""
        self.num_rows = min(self.num_rows, num_rows)

    def state_dict(self) -> dict:
        """The rows of all processes in the order of their numbers, on the CPU of the main process."""
        crops, _, dim = self._embeddings.shape
        most_rows = dist.all_reduce_max(torch.tensor(self.num_rows)).item()
        numbers_a_batch = crops * dim * self.batch_size * dist.world_size()
        rows_at_once = max(1, GATHERED // numbers_a_batch) * self.batch_size
        parts = [(torch.zeros(0, crops, dim), torch.zeros(0, dtype=torch.int64))]
        for first in range(0, most_rows, rows_at_once):
            rows = slice(first, min(first + rows_at_once, self.num_rows))
            embeddings = dist.all_gather_rows(self.embeddings[:, rows].transpose(0, 1))
            indices = dist.all_gather_rows(self.indices[rows])
            positions = dist.all_gather_rows(self.positions[rows])
            if dist.is_main():
                order = positions.argsort()
                parts.append((embeddings.cpu()[order], indices[order]))
        embeddings, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"embeddings": embeddings, "indices": indices}  # (n, crops, D), (n,)

    def load_state_dict(self, state: dict) -> None:
        """Take this process's share of the rows, for any number of processes."""
        batch = torch.arange(len(state["indices"])) // self.batch_size
        own_rows = (batch % dist.world_size() == dist.rank()).nonzero().flatten()
        self.num_rows = 0
        for rows in own_rows.split(self.batch_size):
            self.push(state["indices"][rows], state["embeddings"][rows].transpose(0, 1))


@torch.no_grad()
def fill_memory(
    run: Run, bank: MemoryBank, loader: Iterable, crops_for_assign: list[int], epoch: int
) -> None:
    """Embed every image with the untrained network: what the first assignment works on.

    epoch: whose crops these are, one after the last. In training mode, as the rows that follow: batch
    norm sees batches. Stops early when a signal asks the run to stop.
    """
    start = logged = time.perf_counter()
    total = len(loader)
    for _, crops, indices in run.iterate(loader, epoch, start=0, picture_crops=False):
        done = run.done
        with run.autocast():
            embeddings = [run.network(crops[crop])[0] for crop in crops_for_assign]  # (B, D) each
        bank.push(indices, torch.stack(embeddings))
        now = time.perf_counter()
        if now - logged > LOG_SECONDS or done == total:
            logged, rate = now, done / (now - start)
            logger.info(
                f"memory bank: {done} of {total} batches, {rate * run.global_batch:.0f} img/s "
                f"eta {duration((total - done) / rate)}"
            )
        if done < total and run.must_stop(done):
            logger.info("stopped in the pass that fills the memory bank: it will start again")
            return
