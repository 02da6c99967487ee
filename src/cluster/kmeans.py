"""Spherical and Euclidean k-means over processes (DeepCluster-v2: SwAV, arXiv:2006.09882, Eq. 11).

Every process keeps its own rows; an iteration exchanges K x (D + 1) sums and counts and no more.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .exact_sums import exact_rows, member_sums, placed
from .kmeans_start import block_rows, extent, faiss_centroids, num_rows
from .kmeans_start import initial_centroids as initial_centroids
from .neighbours import full_precision

BLOCK = 2**21  # scores that the E-step holds at a time on a CPU, in its cache
GROUP = 64  # columns of which only the maximum is compared at first
MANY = 1024  # centroids from which on that pays
SPLIT = 0.01  # distance of the two halves of a cluster from its centroid, in norms of the centroid


def spherical_kmeans(
    features: Tensor,
    centroids: Tensor,
    iterations: int = 10,
    empty: str = "keep",
    backend: str = "torch",
    device: torch.device | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    first_step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cluster unit rows by the largest dot product; centroids are normalised means (Eq. 11).

    Each iteration assigns all rows (E-step; the lowest index in ties), then moves the centroids to
    the means of their members (M-step); a last E-step assigns to the centroids that are returned.

    features: (n, D), this process's rows, L2-normalised, any floating type; n may be 0, and they
    may be memory-mapped. Everything is computed in float32 with autocast off, the sums without any
    rounding of theirs, from a copy of the features (up to 1 GiB of it; see src/cluster/exact_sums.py).
    centroids: (K, D), the same on all processes.
    empty: "keep" leaves the centroid of an empty cluster where it was; "reseed" splits the largest
    clusters in two instead (thesis, section 3.2.1, where they are drawn at random), as many as are
    empty and have 2 members.
    backend: "torch", or "faiss", which runs on rank 0 and re-seeds empty clusters in its own way.
    device: where it is computed, that of the features by default. Of the features, what is more
    than 1 GiB stays where it is, and goes there in blocks, twice an iteration.
    on_step: on_step(step, centroids (K, D)) after each M-step (step 0 is the first; not of faiss).
    With the centroids of step s and first_step = s + 1, all goes on as if it had not been stopped.
    Returns centroids (K, D) float32, identical on all processes, and the assignments (n,) int64 of
    this process's rows, both where the features are. Both are the same at any number of processes,
    but for rows whose two best centroids are as close as float32 can tell.
    Raises ValueError on all processes for more clusters than rows, K = 0, features that are not
    finite or of another size than the centroids, another `empty` or `backend`.
    """
    options = empty, backend, device, on_step, first_step
    return _kmeans(features, centroids, iterations, True, *options)


def euclidean_kmeans(
    features: Tensor,
    centroids: Tensor,
    iterations: int = 10,
    empty: str = "keep",
    backend: str = "torch",
    device: torch.device | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    first_step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cluster rows by the smallest squared distance; centroids are means (thesis, Eq. 3.2).

    Rows of any length; everything else is as in spherical_kmeans.
    """
    options = empty, backend, device, on_step, first_step
    return _kmeans(features, centroids, iterations, False, *options)


def assign(
    features: Tensor, centroids: Tensor, spherical: bool, device: torch.device | None = None
) -> Tensor:
    """The E-step: (n,) int64, for each of this process's rows (n, D) the best of (K, D) centroids.

    The largest dot product if `spherical`, else the smallest squared distance; the lowest index in
    ties. device: where blocks are computed, that of the features by default. Raises ValueError as
    spherical_kmeans does. Collective, for the sake of that.
    """
    device = features.device if device is None else torch.device(device)
    exponent, *_ = _check(features, centroids, device)
    return _nearest(features, centroids, spherical, exponent, device)


@torch.no_grad()
def _kmeans(features, centroids, iterations, spherical, empty, backend, device, on_step, first):
    if empty not in ("keep", "reseed") or backend not in ("torch", "faiss"):
        raise ValueError(
            f"k-means knows empty= keep or reseed and backend= torch or faiss, "
            f"not {empty!r} and {backend!r}"
        )
    if not 0 <= first <= iterations:
        raise ValueError(
            f"iterations {iterations} of k-means must be at least 0, and first_step {first} "
            f"between 0 and them"
        )
    home = features.device
    device = home if device is None else torch.device(device)
    if "mps" in (home.type, device.type):  # has no float64
        device = torch.device("cpu")
    features = placed(features, device)
    exponent, largest, smallest = _check(features, centroids, device)
    num_rows(features, len(centroids))
    centroids = centroids.detach().to(device, torch.float32)
    if backend == "faiss":
        centroids = faiss_centroids(features, centroids, iterations - first, spherical)
        first = iterations
    exact = exact_rows(features, largest, smallest, device) if first < iterations else None
    for step in range(first, iterations):
        assignments = _nearest(features, centroids, spherical, exponent, device)
        sums, counts = member_sums(features, exact, assignments, len(centroids), device)
        members = counts[:, None]
        means = torch.where(members > 0, sums / members.clamp(min=1), centroids.double())
        if empty == "reseed":
            means = _reseed(means, counts, spherical, step, largest)
        if spherical:
            means = F.normalize(means, dim=1, eps=1e-12)
        centroids = means.float()
        if on_step is not None:
            on_step(step, centroids)
    assignments = _nearest(features, centroids, spherical, exponent, device)
    return centroids.to(home), assignments.to(home)


def _check(features, centroids, device):
    """Exponents of the largest entry of both, and of the features' largest and smallest row."""
    largest, smallest = extent(features, device)
    if centroids.ndim != 2 or centroids.shape[1] != features.shape[1]:
        raise ValueError(
            f"centroids {tuple(centroids.shape)} must be (K, {features.shape[1]}), "
            f"as the features are {tuple(features.shape)}"
        )
    if not centroids.isfinite().all():
        raise ValueError("k-means needs finite centroids, and some are NaN or infinite")
    if not (centroids.numel() and centroids.any()):
        return largest, largest, smallest
    reach = math.frexp(centroids.float().abs().max().item())[1]
    return max(largest, reach), largest, smallest


# ============ E-step ============


@torch.no_grad()
def _nearest(features, centroids, spherical, exponent, device):
    """Assignments (n,): argmax of x.c, or of x.c - |c|^2 / 2, which is argmin of the distance.

    A power of 2 scales all entries to at most 1, which changes no argmax and keeps squares finite.
    Blocks have one shape, the last one being filled up: a row's scores must not depend on how many
    rows this process has. Products into given memory are left alone by autocast.
    """
    num_clusters, size = centroids.shape
    scale = 2.0 ** -max(-100, min(100, exponent))
    weights = centroids.to(device, torch.float32) * scale
    if not spherical:  # the offset is the weight of one more entry, which is 1 in all rows
        offsets = weights.square().sum(1, keepdim=True) / -2
        weights = torch.cat([weights, offsets], dim=1)
    # Copies of the last centroid fill its group up: a product may round its last few columns
    # otherwise than the rest, and equal centroids must tie.
    grouped = num_clusters >= MANY
    copies = weights[-1:].expand(-num_clusters % (GROUP if grouped else 32), -1)
    weights = torch.cat([weights, copies])
    length = block_rows(device, max(weights.shape), BLOCK)
    rows = weights.new_ones(length, weights.shape[1])
    product = weights.new_empty(length, len(weights))  # (b, K)
    assignments = torch.empty(len(features), dtype=torch.int64, device=features.device)
    with full_precision():
        for block, out in zip(features.split(length), assignments.split(length), strict=True):
            rows[: len(block), :size].copy_(block).mul_(scale)
            scores = torch.mm(rows, weights.T, out=product)[: len(block)]
            if grouped:
                scores = scores.unflatten(1, (-1, GROUP))  # (b, K / GROUP, GROUP)
                group = scores.amax(2).argmax(1)
                at = group[:, None, None].expand(-1, 1, GROUP)
                column = scores.gather(1, at)[:, 0].argmax(1)
                out.copy_(group * GROUP + column)
            else:
                out.copy_(scores.argmax(1))
    return assignments.clamp_(max=num_clusters - 1)


# ============ M-step ============


def _reseed(means, counts, spherical, step, exponent):
    """Give the i-th empty cluster half of the i-th largest (thesis, section 3.2.1).

    Both centroids move off the donor's in opposite directions, so that its members lie on both
    sides of the border between them. The direction is random, and known to all processes.
    """
    empty = (counts == 0).nonzero()[:, 0]
    num_donors = min(len(empty), int((counts >= 2).sum()))
    donors = counts.sort(descending=True, stable=True).indices[:num_donors]
    centroids = means[donors]
    generator = torch.Generator().manual_seed(step)
    moves = torch.randn(centroids.shape, generator=generator, dtype=means.dtype).to(means.device)
    norms = centroids.norm(dim=1, keepdim=True)
    if spherical:  # along the sphere: a border that passes through the donor's centroid
        axes = F.normalize(centroids, dim=1)
        moves -= (moves * axes).sum(1, keepdim=True) * axes
    norms = torch.where(norms > 0, norms, 2.0**exponent)
    moves = F.normalize(moves, dim=1) * norms * SPLIT
    means = means.index_copy(0, donors, centroids - moves)
    return means.index_copy(0, empty[:num_donors], centroids + moves)
