"""What k-means starts from: checked features, centroids drawn from them, or all of it by faiss."""

import logging
import math

import torch
from torch import Tensor

from .. import dist

DRAWS = 4096  # candidates of k-means++ that are looked up at once
ROUNDS = 8  # ... and how often before the farthest row is taken without a draw


def block_rows(device: torch.device, width: int, entries: int) -> int:
    """Rows of `width` entries worked on at a time: `entries` in all, 2^24 on a GPU."""
    return max(64, min(4096, entries // width) if device.type == "cpu" else 2**24 // width)


def extent(features: Tensor, device: torch.device | None = None) -> tuple[int, int]:
    """Exponents e of the largest and the smallest row: its largest entry is in [2^(e-1), 2^e).

    features: (n, D), this process's rows; all-zero rows count for nothing. One pass, in blocks on
    `device`, that of the features by default.
    Both are those of all processes. Raises ValueError on all of them if any entry is not finite.
    """
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"k-means needs features of shape (n, D), not {tuple(features.shape)}")
    device = features.device if device is None else device
    ends = [torch.tensor([0.0, 0.0, -math.inf], device=device)]  # broken, largest, -smallest
    for block in features.split(block_rows(device, features.shape[1], 2**18)):
        top = block.to(device).float().abs().amax(1)  # (b,)
        if len(top):
            smallest = top.where(top > 0, math.inf).amin()
            ends.append(torch.stack([1 - top.isfinite().all().float(), top.amax(), -smallest]))
    broken, largest, smallest = torch.stack(ends).nan_to_num(nan=0.0).amax(0).tolist()
    ends = torch.tensor([broken, largest, smallest], device=device)
    broken, largest, smallest = dist.all_reduce_max(ends).tolist()
    if broken:
        raise ValueError("k-means needs finite features, and some are NaN or infinite")
    if largest == 0:  # no row, or zeros only
        return 0, 0
    return math.frexp(largest)[1], math.frexp(-smallest)[1]


def num_rows(features: Tensor, num_clusters: int) -> int:
    """The rows of all processes. Raises ValueError for no cluster, or more clusters than rows."""
    total = int(dist.all_reduce_sum(torch.tensor([len(features)], device=features.device)))
    if not 1 <= num_clusters <= total:
        raise ValueError(
            f"k-means cannot make {num_clusters} clusters of the {total} rows of all processes: "
            f"ask for 1 to {total}"
        )
    return total


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
    mine = positions[at] == wanted
    return mine, at[mine]


def _rows_at(features, positions, chosen):
    """The rows at the positions `chosen` (K,), from whichever process owns each: (K, D) float32."""
    mine, at = _owned(positions, chosen)
    rows = torch.zeros(len(chosen), features.shape[1] + 1, device=features.device)
    rows[mine, :-1] = features[at].float()
    rows[mine, -1] = 1.0  # owners
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
        mine, at = _owned(positions, proposed)
        found = torch.zeros_like(keep)
        found[mine] = weights[at]
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
    except ImportError:
        raise ValueError('backend="faiss" needs the package faiss: pip install faiss-cpu') from None
    rows = dist.all_gather_rows(features.float().cpu()).contiguous()
    found = centroids.cpu().contiguous()
    if dist.is_main() and iterations:
        limits = {"min_points_per_centroid": 1, "max_points_per_centroid": 2**31 - 1}  # no sampling
        kmeans = faiss.Kmeans(
            rows.shape[1], len(found), niter=iterations, spherical=spherical, **limits
        )
        kmeans.train(rows.numpy(), init_centroids=found.numpy())
        found = torch.from_numpy(kmeans.centroids)
    return dist.broadcast(found).to(features.device)
