"""Health of pseudo-labels and of their predictions, and what is wrong with a run of them."""

import math

import torch

from ..run.health import NUM_LINES, Trouble, code_entropy, same_embedding


@torch.no_grad()
def prediction_health(
    logits: torch.Tensor, labels: torch.Tensor, ignored: int
) -> dict[str, torch.Tensor]:
    """How sure predictions are, and how often they agree with the pseudo-labels.

    logits: (V * B, K), crop-major, before the softmax; labels: (B,), `ignored` for images without.
    prediction_entropy: mean over rows, nats. accuracy: in percent, NaN when there is no label.
    """
    logits = logits.float()
    known = (labels != ignored).repeat(len(logits) // len(labels))  # (V * B,)
    agree = (logits.argmax(1) == labels.repeat(len(logits) // len(labels))) & known
    return {
        "prediction_entropy": code_entropy(torch.softmax(logits, 1)),
        "accuracy": 100 * (agree.sum().float() / known.sum().float()),
    }


@torch.no_grad()
def cluster_health(
    assignments: torch.Tensor,
    previous: torch.Tensor | None,
    labels: torch.Tensor | None,
    num_clusters: list[int],
) -> dict[str, float]:
    """Sizes of the clusters of all heads, and NMI, the mean of the heads.

    NMI: see src.labels.agreement.Overlaps.nmi.
    assignments, previous: (heads, N), negative for samples without; num_clusters: K of each head;
    labels: (N,), of the data. Keys whose argument is None are left out.
    """
    from .agreement import Overlaps  # for the first assignment, not with the script

    heads = list(zip(assignments.cpu(), num_clusters, strict=True))
    sizes = [torch.bincount(a[a >= 0], minlength=k) for a, k in heads]  # (K,) each
    every = torch.cat(sizes).double()
    health = {
        "cluster_min": every.min().item(),
        "cluster_median": every.median().item(),
        "cluster_max": every.max().item(),
        "clusters_empty": (every == 0).double().sum().item() / len(heads),
    }
    for key, other in (("nmi_previous", previous), ("nmi_labels", labels)):
        if other is not None:
            reference = other.expand(len(heads), -1)
            nmi = [Overlaps(a, b).nmi() for a, b in zip(assignments, reference, strict=True)]
            health[key] = sum(nmi) / len(nmi)
    return health


def diagnose_clusters(
    history: list[dict],
    num_prototypes: int,
    ceiling: float | None = None,
    lr: str = "--base_lr",
    clusters: str | None = "--nmb_prototypes",
) -> Trouble | None:
    """What is wrong with a run that predicts pseudo-labels of all images, or None.

    In one sentence that names the flags that help.

    history: log lines with `loss`, `prototypes_used` (by the predictions of a batch), `batch` and
    `embedding_std`. num_prototypes: of the head that these are of. ceiling: the loss of predicting
    nothing, ln(K) unless the heads differ. lr, clusters: the flags of the step size and of K,
    None where K is given by the method.
    """
    recent = history[-NUM_LINES:]
    if len(recent) < NUM_LINES or num_prototypes < 2:
        return None
    ceiling, last = math.log(num_prototypes) if ceiling is None else ceiling, recent[-1]
    found = same_embedding(recent, f"lower {lr}")
    if found:
        return found
    fewer = f", or ask for fewer clusters ({clusters})" if clusters else ""
    if all(abs(line["loss"] - ceiling) < 1e-3 * ceiling for line in recent):
        return Trouble(
            "loss",
            f"the loss stays at ln(K) = {ceiling:.3f}, what predicting nothing gives; change {lr}{fewer}",
        )
    possible = min(num_prototypes, last["batch"])
    if possible >= 8 and all(line["prototypes_used"] < 0.05 * possible for line in recent):
        return Trouble(
            "clusters",
            f"only {last['prototypes_used']:.1f} of {possible} possible clusters are predicted; lower "
            f"{lr}{fewer}",
        )
    return None
