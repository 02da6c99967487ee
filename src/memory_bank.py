"""Memory bank and pseudo-labels of the methods that assign the whole data set, once an epoch.

SwAV paper (arXiv:2006.09882), appendix D.2: the assignment phase works on the embeddings that
training computed during the last epoch, instead of on a pass of its own over the data.
"""

import logging
import math
import time

import torch
from torch import Tensor

from src import distributed, metrics, setup
from src.diagnosis import diagnose_clusters
from src.logger import duration

logger = logging.getLogger(__name__)

IGNORED = (
    -100
)  # pseudo-label of an image that the bank does not hold: it does not count in the loss
GATHERED = 2**24  # numbers that all processes together exchange at a time when saving
LOG_SECONDS = 10.0


class MemoryBank:
    """Embeddings of some crops of each image, as they were in the last pass over the data.

    Each process keeps the rows of its own batches. Row i of process r has the number that its image
    has in the order of the epoch, (i // B * W + r) * B + i % B for batches of B and W processes, so
    that the numbers do not depend on how many processes share the rows.

    num_crops: embeddings of an image. capacity: images of this process, at most. batch_size: B.
    """

    def __init__(self, num_crops, capacity, batch_size, dim, device):
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
        batch = row // self.batch_size * distributed.world_size() + distributed.rank()
        return batch * self.batch_size + row % self.batch_size

    @property
    def known(self) -> Tensor:
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
        longest = distributed.all_reduce_max(torch.tensor(self.num_rows)).item()
        batch = crops * dim * self.batch_size * distributed.world_size()  # numbers
        at_once = max(1, GATHERED // batch) * self.batch_size
        parts = [(torch.zeros(0, crops, dim), torch.zeros(0, dtype=torch.int64))]
        for first in range(0, longest, at_once):
            rows = slice(first, min(first + at_once, self.num_rows))
            mine = (
                self.embeddings[:, rows].transpose(0, 1),
                self.indices[rows],
                self.positions[rows],
            )
            embeddings, indices, positions = (distributed.all_gather_rows(x) for x in mine)
            if distributed.is_main():
                order = positions.argsort()
                parts.append((embeddings.cpu()[order], indices[order]))
        embeddings, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"embeddings": embeddings, "indices": indices}  # (n, crops, D), (n,)

    def load_state_dict(self, state: dict) -> None:
        """Take this process's share of the rows, for any number of processes."""
        batch = torch.arange(len(state["indices"])) // self.batch_size
        mine = (batch % distributed.world_size() == distributed.rank()).nonzero().flatten()
        self.num_rows = 0
        for rows in mine.split(self.batch_size):
            self.push(state["indices"][rows], state["embeddings"][rows].transpose(0, 1))


class PseudoLabels:
    """Cluster of every image for each head, the same on all processes.

    labels: (heads, N) int64, IGNORED where unknown. epoch: at whose start they were made, -1: never.
    """

    def __init__(self, num_heads, num_images):
        self.labels = torch.full((num_heads, num_images), IGNORED)
        self.epoch = -1

    def of(self, indices: Tensor, device: torch.device) -> Tensor:
        """(heads, B) for a batch."""
        return self.labels[:, indices].to(device, non_blocking=True)

    def replace(self, indices: Tensor, assignments: Tensor, epoch: int) -> Tensor | None:
        """Make labels of the assignments (heads, n) of this process's rows (n,) and of the others'.

        Returns the labels before, None if there were none. All processes call it.
        """
        before = self.labels if self.epoch >= 0 else None
        indices = distributed.all_gather_rows(indices)
        assignments = distributed.all_gather_rows(assignments.cpu().t().contiguous())  # (N, heads)
        self.labels = torch.full_like(self.labels, IGNORED)
        self.labels[:, indices] = assignments.t()
        self.epoch = epoch
        return before

    def state_dict(self) -> dict:
        return {"labels": self.labels.int(), "epoch": self.epoch}

    def load_state_dict(self, state: dict) -> None:
        self.labels, self.epoch = state["labels"].long(), state["epoch"]


@torch.no_grad()
def fill_memory(run, bank, loader, crops_for_assign, seed, epoch) -> None:
    """Embed every image with the untrained network: what the first assignment works on.

    The crops are those of `epoch`, one after the last. In training mode, as the rows that follow:
    batch norm sees batches. Stops early when a signal asks the run to stop.
    """
    start = logged = time.perf_counter()
    total = len(loader)
    run.network.train()
    for it, (batch, indices) in enumerate(loader):
        draws = setup.generator(seed, epoch, it, run.process.rank)
        torch.manual_seed(draws.initial_seed())
        crops = run.augment([x.to(run.process.device, non_blocking=True) for x in batch], draws)
        with distributed.autocast(run.process.device, run.precision):
            embeddings = [run.network(crops[crop])[0] for crop in crops_for_assign]  # (B, D) each
        bank.push(indices, torch.stack(embeddings))
        now = time.perf_counter()
        if now - logged > LOG_SECONDS or it + 1 == total:
            logged, rate = now, (it + 1) / (now - start)
            logger.info(
                "memory bank: %d of %d batches, %.0f img/s eta %s",
                *(it + 1, total, rate * run.global_batch, duration((total - it - 1) / rate)),
            )
        if it + 1 < total and run.must_stop(it + 1):
            logger.info("stopped in the pass that fills the memory bank: it will start again")
            return


def loss_of_nothing(num_clusters: list[int]) -> float:
    """The loss of uniform predictions: ln(K), averaged over the heads."""
    return sum(map(math.log, num_clusters)) / len(num_clusters)


def report_predictions(run, epoch, iteration, scores, labels, embedding, rates, args) -> None:
    """Write a log line with the health of the predictions (V * B, K) and of the embeddings (N, D).

    scores, labels (B,): of the first head. All processes call it.
    """
    health = metrics.prediction_health(scores.detach() / args.temperature, labels, IGNORED)
    health = {name: run.mean_over_processes(x) for name, x in health.items()}
    health["prototypes_used"] = metrics.prototype_usage(scores.detach()).item()
    health["embedding_std"] = run.mean_over_processes(metrics.embedding_std(embedding))
    health["rankme"] = metrics.rankme(embedding).item()
    num_prototypes, ceiling = scores.shape[1], loss_of_nothing(args.nmb_prototypes)
    text = "predictions H {prediction_entropy:.2f} of {ceiling:.2f}, {accuracy:.0f}% agree, "
    text += "{prototypes_used:.0f} of {k} in use, std {embedding_std:.2f}, rank {rankme:.0f}"
    text = text.format(**health, ceiling=math.log(num_prototypes), k=num_prototypes)
    line = run.report(epoch, iteration, rates, health, text)
    run.diagnose(line, lambda lines: diagnose_clusters(lines, num_prototypes, ceiling))


def report_assignment(run, labels, before, truth, num_clusters, epoch, seconds) -> None:
    """Write a log line with the health of new pseudo-labels (heads, N), the same on all processes.

    before: those of the epoch before, or None. truth: (N,) of the data, or None.
    """
    if not distributed.is_main():
        return
    line = {
        "epoch": epoch,
        "epoch_float": float(epoch),
        "iteration": epoch * run.iters_per_epoch,
        **metrics.cluster_health(labels, before, truth, num_clusters),
        "assignment_seconds": seconds,
    }
    run.log.write(line["iteration"], line)
    text = "sizes {cluster_min:.0f} to {cluster_max:.0f}, median {cluster_median:.0f}, "
    text += f"{round(line['clusters_empty'], 1):g} empty"
    text += ", NMI {nmi_previous:.2f} with the previous" if before is not None else ""
    text += ", NMI {nmi_labels:.2f} with the labels" if truth is not None else ""
    known = (labels[0] >= 0).sum().item()
    logger.info(
        "epoch %d/%d clusters %s of %s images in %.1f s: %s",
        *(epoch + 1, run.arguments["epochs"], " + ".join(map(str, num_clusters))),
        *(f"{known:,}", seconds, text.format(**line)),
    )
