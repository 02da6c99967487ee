"""Health of a representation: are the codes spread, are the prototypes used, has it collapsed?"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import dist

NUM_LINES = 10  # of the log, all of them in trouble, before a run is said to collapse
UNIQUE_DISTANCE = (
    0.025  # cosine distance within which prototypes repeat each other (arXiv:2410.14060)
)
PROTOTYPES_AT_ONCE = 512


class Trouble(NamedTuple):
    """What is wrong with a run: a word for the kind, which is said once, and a sentence for people."""

    kind: str
    sentence: str


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """The same in float64, on its device where that has such numbers, else on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of the last dimension of (..., K) shares; a share of 0 adds nothing."""
    if shares.is_cpu:
        return torch.special.entr(shares).sum(-1)
    return -torch.xlogy(shares, shares).sum(-1)  # CUDA compiles entr when it is first called


@torch.no_grad()
def code_entropy(assignments: torch.Tensor) -> torch.Tensor:
    """Mean entropy in nats of the rows of (B, K) assignments: 0 one-hot, ln(K) says nothing."""
    return entropy(in_float64(assignments)).mean()


@torch.no_grad()
def prototype_usage(assignments: torch.Tensor) -> torch.Tensor:
    """Number of prototypes in use by the batch of all processes, from (B, K) assignments.

    Perplexity exp(H) of the histogram of the most likely prototype of each sample: 1 when all
    samples choose the same one, at most min(K, B). The hard choice is counted, because Sinkhorn's
    soft codes use all prototypes equally by construction (Eq. 4).
    """
    chosen = assignments.argmax(1)
    counts = in_float64(assignments.new_zeros(assignments.shape[1], dtype=torch.float32))
    # Not bincount, for which the host waits.
    counts.scatter_add_(0, chosen.to(counts.device), torch.ones_like(chosen).to(counts))
    counts = dist.all_reduce_sum(counts)  # (K,)
    return entropy(counts / counts.sum().clamp(min=1)).exp()


@torch.no_grad()
def count_unique(prototypes: torch.Tensor, distance: float = UNIQUE_DISTANCE) -> int:
    """Number of unique prototypes of (K, D), of any length (arXiv:2410.14060).

    Greedy, in their order: one is unique where no unique one before it is within that cosine distance.
    So all others are within it of a unique one. O(K^2 D) where all are unique, less where many are not.
    """
    rows = F.normalize(prototypes.detach().float(), dim=1)
    unique, found = torch.empty_like(rows), 0
    for block in rows.split(PROTOTYPES_AT_ONCE):
        if found:
            block = block[(block @ unique[:found].t()).amax(1) < 1 - distance]
        near = (block @ block.t() >= 1 - distance).tril(-1).cpu()
        is_unique = torch.ones(len(block), dtype=torch.bool)
        for row in near.any(1).nonzero().flatten().tolist():
            is_unique[row] = not (near[row] & is_unique).any()
        block = block[is_unique.to(block.device)]
        unique[found : found + len(block)] = block
        found += len(block)
    return found


@torch.no_grad()
def embedding_std(embeddings: torch.Tensor) -> torch.Tensor:
    """Spread of L2-normalised (B, D) embeddings: 1 when uniform on the sphere, 0 when collapsed.

    Standard deviation over the batch, averaged over dimensions, times sqrt(D).
    """
    z = in_float64(embeddings)
    return z.std(0, unbiased=False).mean() * math.sqrt(z.shape[1])


@torch.no_grad()
def rankme(embeddings: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Effective rank of (B, D) embeddings (RankMe, Garrido et al., 2023, arXiv:2210.02885, Eq. 1-2).

    Exponential of the entropy of the normalised singular values: between 1 and min(B, D). They are
    the roots of the eigenvalues of the smaller Gram matrix, which is much faster than the decomposition.
    NaN where an embedding is not finite.
    """
    z = in_float64(embeddings)
    z = z if len(z) <= z.shape[1] else z.t()
    gram = (z @ z.t()).nan_to_num(0.0, 0.0, 0.0)
    eigenvalues = torch.linalg.eigvalsh(gram)  # ascending
    noise = eigenvalues[-1:] * len(gram) * torch.finfo(gram.dtype).eps
    singular_values = torch.where(eigenvalues > noise, eigenvalues, 0.0).sqrt()
    p = singular_values / singular_values.sum().clamp(min=eps) + eps
    rank = entropy(p).exp()
    return torch.where(z.isfinite().all(), rank, math.nan)


def same_embedding(recent: list[dict], remedies: str) -> Trouble | None:
    """The trouble of embeddings that are all alike in all of the lines, or None."""
    if not all(line["embedding_std"] < 0.05 for line in recent):
        return None
    spread = f"standard deviation {recent[-1]['embedding_std']:.3f}, healthy is near 1"
    return Trouble(
        "embeddings", f"collapse: all images have the same embedding ({spread}); {remedies}"
    )
