"""Power Iteration Clustering: uphill on a graph of nearest neighbours, with no number of clusters.

Source: the thesis, section 3.2.2 (Table 3.2), after Lin and Cohen (ICML 2010). Time and memory grow
with the number of edges.
"""

import math

import torch
from torch import Tensor

from .. import dist
from .neighbours import nearest_neighbours

ROUNDING = 1e-15  # relative changes of float64 numbers that mean nothing


@torch.no_grad()
def knn_graph(
    features: Tensor, k: int = 5, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of each row, by Euclidean distance, among those of all processes.

    features: (n, D), this process's rows, any floating type; n may be 0. device: where they are
    searched, that of the features by default. Each process searches for its own rows.
    Returns ids (N, k + 1) int64, by the numbers of the rows in the order of the ranks, and squared
    distances (N, k + 1) float32, the same on all processes and on the device of the features: first
    the row itself at distance 0, then its neighbours, the nearest first, of equals the lowest
    number. With N <= k rows in all, there are N columns.
    Raises ValueError for k < 1, no row at all, or features that are not finite.
    """
    if features.ndim != 2 or k < 1:
        raise ValueError(
            f"a graph of {k} neighbours of features {tuple(features.shape)} needs at least 1 "
            f"neighbour and features (n, D)"
        )
    rows = features.to(features.device if device is None else device).float()
    exponent = _exponent(rows)
    rows = rows * 2.0**-exponent  # so that no square overflows
    lengths = rows.square().sum(1, keepdim=True)
    # The largest x.q - |x|^2 / 2 is the smallest distance: one more entry in a dot product.
    train = torch.cat([rows, lengths / -2], dim=1)
    queries = torch.cat([rows, torch.ones_like(lengths)], dim=1)
    counts = dist.all_gather_rows(torch.tensor([len(rows)], device=rows.device))
    first = int(counts[: dist.rank()].sum())
    scores, ids = nearest_neighbours(train, queries, min(k + 1, max(1, int(counts.sum()))))
    own = torch.arange(first, first + len(rows), device=ids.device)[:, None]
    # A row is not always the first of its neighbours, nor one of them: there may be copies of it.
    others = (ids == own).int().argsort(dim=1, stable=True)[:, : ids.shape[1] - 1]
    distances = (lengths - 2 * scores).clamp(min=0).gather(1, others) * 4.0**exponent
    ids = torch.cat([own, ids.gather(1, others)], dim=1)
    distances = torch.cat([torch.zeros_like(lengths), distances], dim=1)
    found = dist.all_gather_rows(ids), dist.all_gather_rows(distances)
    return found[0].to(features.device), found[1].to(features.device)


def _exponent(rows):
    """Power of 2 above the largest entry of all processes; 0 if that is not a number to scale by."""
    top = rows.abs().amax() if rows.numel() else rows.new_zeros(())
    top = dist.all_reduce_max(top.nan_to_num(nan=math.inf)[None]).item()
    return min(100, max(-100, math.frexp(top)[1])) if 0 < top < math.inf else 0


@torch.no_grad()
def power_iteration_clustering(
    ids: Tensor,
    distances: Tensor,
    sigma: float = 0.2,
    alpha: float = 0.001,
    iterations: int = 200,
) -> Tensor:
    """Clusters (N,) int64, 0 to C - 1, of the nodes that climb to the same peak of a graph.

    ids, distances: (N, k + 1), as knn_graph returns them, the same on all processes. With A_ij =
    exp(-distance_ij / sigma^2) for the k neighbours j of i, and W = A + A^T, `iterations` of
      v = alpha W v + (1 - alpha) / N,   v = v / sum(v),   from v = 1/N,
    make v large where the graph is dense. Each node then points to the j of the largest
    W_ij (v_j - v_i), or nowhere if none is positive (the lowest j in ties); those whose pointers end
    in the same node are a cluster, numbered in the order of these. At last a node that is alone
    joins the cluster of its nearest neighbour that is not; it stays if there is none.
    Computed in float64 by rank 0, on the CPU; the iterations end early once they change
    nothing beyond its rounding.
    Raises ValueError for shapes or numbers that cannot be.
    """
    _check(ids, distances, sigma, alpha, iterations)

    def climb():
        nodes = ids.cpu()
        sources, targets, weights = _edges(nodes, distances.cpu(), sigma)
        v = _power_iteration(sources, targets, weights, len(nodes), alpha, iterations)
        peaks = _peaks(sources, targets, weights, v)
        return _without_singletons(peaks, nodes).unique(return_inverse=True)[1]

    labels = dist.on_main(climb)
    if labels is None:
        labels = torch.zeros(len(ids), dtype=torch.int64)
    return dist.broadcast(labels).to(distances.device)


def _check(ids, distances, sigma, alpha, iterations):
    if ids.ndim != 2 or ids.numel() == 0 or ids.shape != distances.shape:
        raise ValueError(
            f"ids {tuple(ids.shape)} and distances {tuple(distances.shape)} of a graph must both be "
            f"(N, k + 1), with at least one node"
        )
    if not (sigma > 0 and 0 <= alpha < 1 and iterations >= 0):
        raise ValueError(
            f"sigma {sigma} must be above 0, alpha {alpha} in [0, 1), iterations {iterations} at "
            f"least 0"
        )
    nodes = torch.arange(len(ids), device=ids.device)
    if (ids[:, 0] != nodes).any() or ids.min() < 0 or ids.max() >= len(ids):
        raise ValueError(f"ids must be in 0 .. {len(ids)} - 1, the node itself first")
    if not (distances >= 0).all():
        raise ValueError("squared distances of a graph must be at least 0, and some are not")


def _edges(ids, distances, sigma):
    """Sources, targets and weights (E,) of W's entries, ordered by source, then target."""
    num_nodes, k = len(ids), ids.shape[1] - 1
    sources = torch.arange(num_nodes).repeat_interleave(k)
    targets = ids[:, 1:].reshape(-1)
    weights = (distances[:, 1:].reshape(-1).double() / sigma / sigma).neg_().exp_()
    entries = torch.cat([sources * num_nodes + targets, targets * num_nodes + sources])
    entries, places = entries.unique(return_inverse=True)
    sums = torch.zeros(len(entries), dtype=torch.float64)
    sums.index_add_(0, places, weights.repeat(2))
    return entries // num_nodes, entries % num_nodes, sums


def _power_iteration(sources, targets, weights, num_nodes, alpha, iterations):
    v = torch.full((num_nodes,), 1 / num_nodes, dtype=torch.float64)
    moved = torch.empty_like(
        weights
    )  # kept: to ask for as much memory anew takes longer than to add
    for _ in range(iterations):
        torch.index_select(v, 0, targets, out=moved).mul_(weights)
        after = torch.full_like(v, (1 - alpha) / num_nodes)
        after.index_add_(0, sources, moved, alpha=alpha)
        after /= after.sum()
        if ((after - v).abs() <= ROUNDING * after).all():
            break
        v = after
    return v


def _peaks(sources, targets, weights, v):
    """The node (N,) in which the pointers of each node end."""
    gains = weights * (v[targets] - v[sources])
    best = torch.zeros_like(v).scatter_reduce_(0, sources, gains, "amax")
    uphill = (gains > 0) & (gains == best[sources])
    nodes = torch.arange(len(v))
    pointers = torch.full_like(nodes, len(v))
    pointers.scatter_reduce_(0, sources[uphill], targets[uphill], "amin")
    pointers = torch.where(pointers < len(v), pointers, nodes)
    while not torch.equal(pointers, pointers[pointers]):  # each round doubles how far they reach
        pointers = pointers[pointers]
    return pointers


def _without_singletons(peaks, ids):
    """Peaks (N,), where a node that is alone takes that of its first neighbour that is not."""
    alone = peaks.bincount(minlength=len(peaks))[peaks] == 1
    company = ~alone[ids]  # (N, k + 1); column 0 is the node itself, which comes first
    return peaks[ids.gather(1, company.int().argmax(1, keepdim=True))[:, 0]]
