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


@torch.no_grad()
def code_entropy(assignments: torch.Tensor) -> torch.Tensor:
    """Mean entropy in nats of the rows of (B, K) assignments: 0 one-hot, ln(K) says nothing."""
    return torch.special.entr(assignments.cpu().double()).sum(1).mean()


@torch.no_grad()
def prototype_usage(assignments: torch.Tensor) -> torch.Tensor:
    """Number of prototypes in use by the batch of all processes, from (B, K) assignments.

    Perplexity exp(H) of the histogram of the most likely prototype of each sample: 1 when all
    samples choose the same one, at most min(K, B). The hard choice is counted, because Sinkhorn's
    soft codes use all prototypes equally by construction (Eq. 4).
    """
    counts = torch.bincount(assignments.argmax(1).cpu(), minlength=assignments.shape[1]).double()
    counts = dist.all_reduce_sum(counts)  # (K,)
    return torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp()


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
    z = embeddings.cpu().double()  # on the CPU: some devices have no float64
    return z.std(0, unbiased=False).mean() * math.sqrt(z.shape[1])


@torch.no_grad()
def rankme(embeddings: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Effective rank of (B, D) embeddings (RankMe, Garrido et al., 2023, arXiv:2210.02885, Eq. 1-2).

    Exponential of the entropy of the normalised singular values: between 1 and min(B, D).
    """
    if not torch.isfinite(embeddings).all():
        return torch.tensor(math.nan)
    singular_values = torch.linalg.svdvals(embeddings.cpu().double())
    p = singular_values / singular_values.sum().clamp(min=eps) + eps
    return torch.special.entr(p).sum().exp()


def same_embedding(recent: list[dict], remedies: str) -> Trouble | None:
    """The trouble of embeddings that are all alike in all of the lines, or None."""
    if not all(line["embedding_std"] < 0.05 for line in recent):
        return None
    spread = f"standard deviation {recent[-1]['embedding_std']:.3f}, healthy is near 1"
    return Trouble(
        "embeddings", f"collapse: all images have the same embedding ({spread}); {remedies}"
    )
