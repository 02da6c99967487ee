"""Pseudo-labels of all images, and what the log says of them and of their predictions."""

import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dist
from ..nets.weights import CheckpointError
from ..run import metrics
from ..run.diagnosis import diagnose_clusters

logger = logging.getLogger(__name__)

IGNORED = -100  # pseudo-label of an image that was not assigned: it does not count in the loss


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
        indices = dist.all_gather_rows(indices)
        assignments = dist.all_gather_rows(assignments.cpu().t().contiguous())  # (N, heads)
        self.labels = torch.full_like(self.labels, IGNORED)
        self.labels[:, indices] = assignments.t()
        self.epoch = epoch
        return before

    def state_dict(self) -> dict:
        return {"labels": self.labels.int(), "epoch": self.epoch}

    def load_state_dict(self, state: dict) -> None:
        there, here = state["labels"].shape[1], self.labels.shape[1]
        if there != here:
            raise CheckpointError(
                f"the run's pseudo-labels are of {there:,} images, and --data_path has {here:,}: give "
                "the data that it was trained on, or use another --dump_path"
            )
        self.labels, self.epoch = state["labels"].long(), state["epoch"]


def loss_of_nothing(num_clusters: list[int]) -> float:
    """The loss of uniform predictions: ln(K), averaged over the heads."""
    return sum(map(math.log, num_clusters)) / len(num_clusters)


def report_predictions(
    run, epoch, iteration, logits, labels, embedding, rates, ceiling=None, more=None, **flags
) -> None:
    """Write a log line with the health of the predictions and of the embeddings (N, D).

    logits (V * B, K), before the softmax, and labels (B,): of the first head. ceiling: the loss of
    predicting nothing, ln(K) unless the heads differ. more: percentages by name, of all processes.
    flags: see diagnose_clusters. All processes call it.
    """
    logits, embedding = logits.detach(), F.normalize(embedding.detach().float(), dim=1)
    health = metrics.prediction_health(logits, labels, IGNORED)
    health = {name: run.mean_over_processes(x) for name, x in health.items()}
    health["prototypes_used"] = metrics.prototype_usage(logits).item()
    health["embedding_std"] = run.mean_over_processes(metrics.embedding_std(embedding))
    health["rankme"] = metrics.rankme(embedding).item()
    health |= more or {}
    num_prototypes = logits.shape[1]
    text = "predictions H {prediction_entropy:.2f} of {ceiling:.2f}, {accuracy:.0f}% agree, "
    text += "{prototypes_used:.0f} of {k} in use, std {embedding_std:.2f}, rank {rankme:.0f}"
    text = text.format(**health, ceiling=math.log(num_prototypes), k=num_prototypes)
    text += "".join(f", {name.replace('_', ' ')} {x:.0f}%" for name, x in (more or {}).items())
    line = run.report(epoch, iteration, rates, health, text)
    run.diagnose(line, lambda lines: diagnose_clusters(lines, num_prototypes, ceiling, **flags))


def report_assignment(run, labels, before, truth, num_clusters, epoch, seconds) -> None:
    """Write a log line with the health of new pseudo-labels (heads, N), the same on all processes.

    before: those of the epoch before, or None. truth: (N,) of the data, or None.
    """
    if not dist.is_main():
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
