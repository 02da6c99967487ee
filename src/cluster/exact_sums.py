"""The sums of k-means' M-step, without rounding of their own: the same in any order of the rows."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dist

BAG = 8  # rows whose sums float32 holds exactly, once the rows are rounded
SPREAD = 5  # powers of 2 between the largest entries of two rows up to which they are rounded alike
WHOLE = 2**30  # bytes up to which the features are rounded, or moved to the device, once for all


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


class ExactRows:
    """The features (n, D), rounded so that float32 sums of 8 rows are exact.

    Exact sums are the same in any order, hence at any number of processes and with a GPU's atomic
    additions. Entries, below 2^largest, become multiples of 2^(largest - 21): 8 of them add up to
    at most 2^24 such units, which is what float32 holds, and float64 holds the sum of 2^32 rows.
    That moves an entry, hence a mean, by at most 2^(largest - 22): by 2.4e-7 for entries below 1.
    Up to WHOLE bytes the rounded rows are kept, else they are rounded anew each time, a quarter of
    that at a time.
    """

    def __init__(self, features: Tensor, largest: int, device: torch.device):
        self.features, self.device = features, device
        self.anchor = 1.5 * 2.0 ** (largest + 2)  # float32 has a step of 2^(largest - 21) around it
        row = 4 * features.shape[1]  # bytes
        keeps = row * len(features) <= WHOLE
        self.length = max(1, len(features) if keeps else WHOLE // 4 // row)  # of a block
        self.kept = [self._round(features)] if keeps else None

    def _round(self, block):
        block = block.to(self.device).float()
        return block.add(self.anchor).sub_(self.anchor)

    def blocks(self) -> Iterable[Tensor]:
        """The rounded rows, `length` at a time."""
        return self.kept or map(self._round, self.features.split(self.length))


def placed(features: Tensor, device: torch.device) -> Tensor:
    """The features on the device, or where they are if they have more than WHOLE bytes."""
    return features.to(device) if features.numel() * features.itemsize <= WHOLE else features


def exact_rows(
    features: Tensor, largest: int, smallest: int, device: torch.device | None = None
) -> ExactRows | None:
    """ExactRows of features with these exponents (see extent); None where that hurts.

    None if some row's largest entry is over 32 to 64 times smaller than another's: sums are then
    ordinary float64 ones, whose dependence on the order rarely reaches the float32 centroids.
    """
    if largest - smallest > SPREAD or abs(largest) > 100:
        return None
    return ExactRows(features, largest, features.device if device is None else device)


def member_sums(
    features: Tensor,
    exact: ExactRows | None,
    assignments: Tensor,
    num_clusters: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums (K, D) float64 and numbers (K,) of the members of each cluster on all processes.

    exact: exact_rows of the features. Bags of 8 members add up in float32, then bags in float64.
    """
    device = features.device if device is None else device
    size = features.shape[1]
    counts = assignments.bincount(minlength=num_clusters).to(device)
    sums = torch.zeros(num_clusters, size, dtype=torch.float64, device=device)
    if exact is None:
        length = block_rows(device, size, 2**19)
        for block, members in zip(features.split(length), assignments.split(length), strict=True):
            sums.index_add_(0, members.to(device), block.to(device).float().double())
    else:
        for block, members in zip(exact.blocks(), assignments.split(exact.length), strict=True):
            if len(block):
                clusters, bag_sums = _bags(block, members.to(device), num_clusters)
                sums.index_add_(0, clusters, bag_sums.double())
    return dist.all_reduce_sum(sums), dist.all_reduce_sum(counts)


def _bags(rows, members, num_clusters):
    """The clusters (B,) of bags of up to 8 members, and the sums (B, D) of their rows."""
    counts = members.bincount(minlength=num_clusters)
    order = members.int().argsort(stable=True)  # members of cluster 0, of cluster 1, ...
    bags = (counts + BAG - 1) // BAG  # (K,), numbers of them
    clusters = torch.arange(num_clusters, device=bags.device).repeat_interleave(bags)  # (B,)
    before = counts.cumsum(0) - counts - BAG * (bags.cumsum(0) - bags)
    starts = before[clusters] + BAG * torch.arange(len(clusters), device=bags.device)
    return clusters, F.embedding_bag(order, rows, starts, mode="sum")


def member_means(features: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Means (K, D) float32 of the rows of each label, of all processes; of empty ones `centroids`.

    features: (n, D). labels: (n,) on the CPU; those below 0, or not below K, belong to none.
    """
    has_cluster = labels >= 0
    counts = torch.bincount(labels[has_cluster], minlength=len(centroids))[: len(centroids)]
    has_cluster &= labels < len(centroids)
    sums = torch.zeros(len(centroids), features.shape[1], dtype=torch.float64)
    rows = has_cluster.nonzero().flatten()
    for block in rows.split(4096):
        sums.index_add_(0, labels[block], features[block].double())
    sums, counts = dist.all_reduce_sum(sums), dist.all_reduce_sum(counts)
    means = (sums / counts.clamp(min=1)[:, None]).float()
    return torch.where(counts[:, None] > 0, means, centroids)
