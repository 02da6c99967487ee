"""Pseudo-labels of all images, and what the log says of them and of their predictions."""

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dist
from ..errors import CheckpointError
from ..run import health
from ..run.run import Run
from .health import cluster_health, diagnose_clusters, prediction_health

logger = logging.getLogger(__name__)

IGNORED = -100  # pseudo-label of an image that was not assigned: it does not count in the loss


class PseudoLabels:
    """Cluster of every image for each head, the same on all processes.

    labels: (heads, N) int64, IGNORED where unknown. epoch: at whose start they were made, -1: never.
    """

    def __init__(self, num_heads: int, num_images: int):
        self.labels = torch.full((num_heads, num_images), IGNORED)
        self.epoch = -1

    def of(self, indices: Tensor, device: torch.device) -> Tensor:
        """(heads, B) for a batch."""
        return dist.to_device(self.labels[:, indices], device)

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
        """The labels of all images and the epoch that they are of."""
        return {"labels": self.labels.int(), "epoch": self.epoch}

    def load_state_dict(self, state: dict) -> None:
        """Take over what state_dict gave. Raises CheckpointError for labels of other images."""
        num_saved, num_images = state["labels"].shape[1], self.labels.shape[1]
        if num_saved != num_images:
            raise CheckpointError(
                f"the run's pseudo-labels are of {num_saved:,} images, and --data_path has "
                f"{num_images:,}: give the data that it was trained on, or use another --dump_path"
            )
        self.labels, self.epoch = state["labels"].long(), state["epoch"]


def loss_of_nothing(num_clusters: list[int]) -> float:
    """The loss of uniform predictions: ln(K), averaged over the heads."""
    return sum(map(math.log, num_clusters)) / len(num_clusters)


def report_predictions(
    run: Run,
    logits: Tensor,
    labels: Tensor,
    embedding: Tensor,
    *,
    ceiling: float | None = None,
    percentages: dict[str, Tensor] | None = None,
    prototypes: Sequence[Tensor] = (),
    holders: Sequence[int] | None = None,
    lr: str = "--base_lr",
    clusters: str | None = "--nmb_prototypes",
) -> None:
    """Write a log line with the health of the predictions and of the embeddings (N, D).

    logits (V * B, K), before the softmax, and labels (B,): of the first head. ceiling: the loss of
    predicting nothing, ln(K) unless the heads differ. percentages: more of them by name, 0-d, of
    this process. prototypes, holders: whose unique ones are counted, see Run.count_unique. lr, clusters:
    flags, see diagnose_clusters. All processes call it.
    """
    logits, embedding = logits.detach(), F.normalize(embedding.detach().float(), dim=1)
    percentages = percentages or {}
    values = run.read(
        means={
            **prediction_health(logits, labels, IGNORED),
            "embedding_std": health.embedding_std(embedding),
            **percentages,
        },
        own={
            "prototypes_used": health.prototype_usage(logits),
            "rankme": health.rankme(embedding),
        },
    )
    num_prototypes = logits.shape[1]
    texts = [
        f"predictions H {values['prediction_entropy']:.2f} of {math.log(num_prototypes):.2f}",
        f"{values['accuracy']:.0f}% agree",
        f"{values['prototypes_used']:.0f} of {num_prototypes} in use",
        f"std {values['embedding_std']:.2f}",
        f"rank {values['rankme']:.0f}",
        *(f"{name.replace('_', ' ')} {values[name]:.0f}%" for name in percentages),
    ]
    unique, unique_text = {}, ""
    if len(prototypes):
        unique, unique_text = run.count_unique(prototypes, clusters, holders)
    line = run.report(values | unique, ", ".join(texts) + unique_text)
    run.diagnose(
        line,
        lambda lines: diagnose_clusters(
            lines, num_prototypes, ceiling=ceiling, lr=lr, clusters=clusters
        ),
    )


def report_assignment(
    run: Run,
    labels: Tensor,
    before: Tensor | None,
    truth: Tensor | None,
    *,
    num_clusters: list[int],
    epoch: int,
    seconds: float,
) -> None:
    """Write a log line with the health of new pseudo-labels (heads, N), the same on all processes.

    before: those of the epoch before, or None. truth: (N,) of the data, or None. num_clusters: K of
    each head. seconds: what the assignment took.
    """
    if not dist.is_main():
        return
    line = {
        "epoch": epoch,
        "epoch_float": float(epoch),
        "iteration": epoch * run.iters_per_epoch,
        **cluster_health(labels, before, truth, num_clusters),
        "assignment_seconds": seconds,
    }
    run.log.write(line["iteration"], line)
    texts = [
        f"sizes {line['cluster_min']:.0f} to {line['cluster_max']:.0f}",
        f"median {line['cluster_median']:.0f}",
        f"{round(line['clusters_empty'], 1):g} empty",
    ]
    if before is not None:
        texts.append(f"NMI {line['nmi_previous']:.2f} with the previous")
    if truth is not None:
        texts.append(f"NMI {line['nmi_labels']:.2f} with the labels")
    num_labelled = (labels[0] >= 0).sum().item()
    logger.info(
        f"epoch {epoch + 1}/{run.arguments['epochs']} clusters {' + '.join(map(str, num_clusters))} "
        f"of {num_labelled:,} images in {seconds:.1f} s: {', '.join(texts)}"
    )
