"""Spherical and Euclidean k-means over processes (DeepCluster-v2: SwAV, arXiv:2006.09882, Eq. 11).

Every process keeps its own rows; an iteration exchanges K x (D + 1) sums and counts and no more.
"""

import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dist
from .exact_sums import block_rows, exact_rows, extent, member_sums, num_rows, placed
from .neighbours import full_precision

BLOCK = 2**20  # scores that the E-step holds at a time on a CPU, in its cache
MANY_THREADS = 8  # with more torch's argmax on a CPU is the faster one, by its time on one
COLUMNS = 16  # of the product of rows and centroids: a multiple of it
MODERATE = 30  # exponents of entries whose products are numbers, squared and added up
DRAWS = 4096  # candidates of k-means++ that are looked up at once
ROUNDS = 8  # ... and how often before the farthest row is taken without a draw
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
    return _kmeans(
        features, centroids, iterations, True, empty, backend, device, on_step, first_step
    )


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
    return _kmeans(
        features, centroids, iterations, False, empty, backend, device, on_step, first_step
    )


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

    Where entries are so large or small that a product might not be a number, a power of 2 scales all to at
    most 1, which changes no argmax. Blocks have one shape, the last one being filled up: a row's scores
    must not depend on how many rows this process has. Products into given memory are left alone by
    autocast.
    """
    num_clusters = len(centroids)
    as_they_are = abs(exponent) <= MODERATE and features.dtype == torch.float32
    scale = 1.0 if as_they_are else 2.0 ** -max(-100, min(100, exponent))
    weights = centroids.to(device, torch.float32) * scale
    # A product may round its last few columns otherwise than the rest, and equal centroids must tie:
    # copies of the last one fill the columns up.
    weights = torch.cat([weights, weights[-1:].expand(-num_clusters % COLUMNS, -1)])
    offsets = weights.new_zeros(len(weights)) if spherical else weights.square().sum(1) / -2
    length = block_rows(device, max(weights.shape), BLOCK)
    memory = weights.new_zeros(length, weights.shape[1])
    product = weights.new_empty(length, len(weights))  # (b, K)
    assignments = torch.empty(len(features), dtype=torch.int64, device=features.device)
    with full_precision():
        for block, out in zip(features.split(length), assignments.split(length), strict=True):
            if as_they_are and len(block) == length and block.device == device:
                rows = block
            else:
                rows = memory
                rows[: len(block)].copy_(block).mul_(scale)
            scores = torch.addmm(offsets, rows, weights.T, out=product)[: len(block)]
            out.copy_(_argmax(scores))
    return assignments.clamp_(max=num_clusters - 1)


def _argmax(scores):
    """The column of the largest score of each row, (b, K) -> (b,) int64; the first one in ties.

    numpy's is vectorised along a row, a fifth to a twelfth of torch's time on one thread of an AMD EPYC.
    """
    if scores.device.type != "cpu" or torch.get_num_threads() > MANY_THREADS:
        return scores.argmax(1)
    return torch.from_numpy(scores.numpy().argmax(1))


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


# ============ what it starts from ============
@torch.no_grad()
def initial_centroids(
    features: Tensor,
    num_clusters: int,
    seed: int,
    method: str = "random",
    positions: Tensor | None = None,
) -> Tensor:
    """num_clusters different rows of all processes; the same ones for a seed at any number of them.

    features: (n, D), this process's rows. positions: (n,) int64, ascending: their numbers among the
    N rows of all processes, where each of 0 to N-1 belongs to one process; None: in rank order.
    method: "random" (uniform), or "k-means++" (Arthur and Vassilvitskii 2007): each next row with a
    probability proportional to its squared distance from the nearest one chosen so far, which costs
    num_clusters passes over the features.
    Returns (K, D) float32, identical on all processes.
    Raises ValueError for no cluster, more clusters than rows, non-finite features, another method,
    or positions that do not number the rows.
    """
    if method not in ("random", "k-means++"):
        raise ValueError(f"method {method!r} of initial_centroids must be random or k-means++")
    exponent, _ = extent(features)
    total = num_rows(features, num_clusters)
    if positions is None:
        counts = dist.all_gather_rows(torch.tensor([len(features)], device=features.device))
        first = int(counts[: dist.rank()].sum())
        positions = torch.arange(first, first + len(features))
    if positions.shape != (len(features),):
        raise ValueError(
            f"positions must number the {len(features)} rows, not be {tuple(positions.shape)}"
        )
    positions = positions.to(features.device)
    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        chosen = torch.randperm(total, generator=generator)[:num_clusters]
    else:
        chosen = _plus_plus(features, positions, num_clusters, total, generator, exponent)
    return _rows_at(features, positions, chosen)


def _owned(positions, wanted):
    """Which of the `wanted` (B,) positions are of this process (B,), and their local rows."""
    wanted = wanted.to(positions.device)
    if not len(positions):
        return torch.zeros_like(wanted, dtype=torch.bool), wanted[:0]
    at = torch.searchsorted(positions, wanted).clamp_(max=len(positions) - 1)
    is_owned = positions[at] == wanted
    return is_owned, at[is_owned]


def _rows_at(features, positions, chosen):
    """The rows at the positions `chosen` (K,), from whichever process owns each: (K, D) float32."""
    is_owned, at = _owned(positions, chosen)
    rows = torch.zeros(len(chosen), features.shape[1] + 1, device=features.device)
    rows[is_owned, :-1] = features[at].float()
    rows[is_owned, -1] = 1.0  # owners
    rows = dist.all_reduce_sum(rows)
    if (rows[:, -1] != 1).any():
        raise ValueError("positions must ascend and give each of 0 to N-1 to one row of a process")
    return rows[:, :-1].contiguous()


def _plus_plus(features, positions, num_clusters, total, generator, exponent):
    """Positions (K,) drawn by squared distances, from proposals that all processes make alike.

    A uniform proposal that is kept with probability d^2 / max(d^2) is a draw by d^2, and needs no
    sum over processes, whose rounding would depend on their number. Distances are taken row by row
    and not by a product, so that a copy of a chosen row is at 0 and is never drawn.
    """
    scale = 2.0 ** -max(-100, min(100, exponent))  # no square overflows
    distances = torch.full((len(features),), math.inf, device=features.device)  # squared
    rows = block_rows(features.device, features.shape[1], 2**18)
    chosen = torch.randint(total, (1,), generator=generator)
    while len(chosen) < num_clusters:
        centroid = _rows_at(features, positions, chosen[-1:]) * scale
        for block, nearest in zip(features.split(rows), distances.split(rows), strict=True):
            far = torch.cdist(
                block.float() * scale, centroid, compute_mode="donot_use_mm_for_euclid_dist"
            )
            nearest.copy_(torch.minimum(nearest, far[:, 0].square()))
        if not dist.all_reduce_max((distances > 0).any().long()[None]).item():
            # Only copies of chosen rows are left: all that were not chosen are as good.
            weights = torch.ones_like(distances)
            weights[_owned(positions, chosen)[1]] = 0.0
        else:
            weights = distances
        chosen = torch.cat([chosen, _draw(weights, positions, total, generator)])
    return chosen


def _draw(weights, positions, total, generator):
    """One position (1,) with a probability proportional to the weights of all processes."""
    top = weights.amax() if len(weights) else weights.new_zeros(())
    top = dist.all_reduce_max(top[None])
    for _ in range(ROUNDS):
        proposed = torch.randint(total, (DRAWS,), generator=generator)
        keep = torch.rand(DRAWS, generator=generator).to(weights.device)  # in [0, 1)
        is_owned, at = _owned(positions, proposed)
        found = torch.zeros_like(keep)
        found[is_owned] = weights[at]
        accepted = (keep * top < dist.all_reduce_sum(found)).nonzero()
        if len(accepted):
            return proposed[accepted[0].cpu()]
    farthest = positions[weights == top]  # so few that the proposals missed them all
    first = farthest[:1] if len(farthest) else positions.new_full((1,), total)
    return -dist.all_reduce_max(-first).cpu()


def faiss_centroids(
    features: Tensor, centroids: Tensor, iterations: int, spherical: bool
) -> Tensor:
    """Centroids (K, D) by faiss.Kmeans from the given ones, on all rows, which rank 0 trains on.

    Every process holds the rows of all for a moment. faiss re-seeds empty clusters in its own way.
    """
    try:
        logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells which build it tries
        import faiss
    except ImportError as error:  # it is not there, or does not go with this numpy
        raise ValueError(
            f'backend="faiss" needs the package faiss ({error}): pip install faiss-cpu'
        ) from None
    rows = dist.all_gather_rows(features.float().cpu()).contiguous()
    found = centroids.cpu().contiguous()

    def train():
        kmeans_of_faiss = faiss.Kmeans(
            rows.shape[1],
            len(found),
            niter=iterations,
            spherical=spherical,
            min_points_per_centroid=1,
            max_points_per_centroid=2**31 - 1,  # no sampling
        )
        kmeans_of_faiss.train(rows.numpy(), init_centroids=found.numpy())
        return torch.from_numpy(kmeans_of_faiss.centroids)

    trained = dist.on_main(train) if iterations else None
    return dist.broadcast(found if trained is None else trained).to(features.device)
