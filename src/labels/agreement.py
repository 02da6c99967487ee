"""How well clusters agree with classes, or with any other grouping of the same images.

Accuracy under the best one-to-one matching, purity, NMI, adjusted mutual information and adjusted Rand
index. Exact, in float64 on the CPU; memory grows with the pairs of a cluster and a class that occur,
and only the matching holds a matrix of clusters x classes.
"""

import math

import numpy as np
import torch
from torch import Tensor

TERMS_AT_ONCE = 1 << 22  # of the expected information: bounds its memory


class Overlaps:
    """How many samples each pair of groups has in common, of two groupings of the same samples.

    a, b: (N,) integers; samples that are negative in either are left out. rows, columns, counts: (P,)
    int64, of the pairs that occur, the groups numbered anew without empty ones; row_sizes: (R,),
    column_sizes: (C,); total: the number of samples.
    """

    def __init__(self, a: Tensor, b: Tensor):
        a, b = a.cpu().long(), b.cpu().long()
        known = (a >= 0) & (b >= 0)
        _, a = a[known].unique(return_inverse=True)
        _, b = b[known].unique(return_inverse=True)
        self.total = len(a)
        self.row_sizes, self.column_sizes = a.bincount(), b.bincount()
        num_columns = max(1, len(self.column_sizes))
        pairs, self.counts = (a * num_columns + b).unique(return_counts=True)
        self.rows, self.columns = pairs // num_columns, pairs % num_columns

    @property
    def num_groups(self) -> tuple[int, int]:
        """Groups that are not empty, of a and of b."""
        return len(self.row_sizes), len(self.column_sizes)

    # ============ one to one, and many to one ============
    def accuracy(self) -> float:
        """Share of samples whose groups are matched, one to one, so that most samples are; NaN of none.

        Where there are more groups of one kind than of the other, those that are left over count as
        wrong.
        """
        if not self.total:
            return math.nan
        table = np.zeros(self.num_groups)
        table[self.rows.numpy(), self.columns.numpy()] = self.counts.numpy()
        rows, columns = optimal_matching(table)
        return float(table[rows, columns].sum()) / self.total

    def purity(self) -> float:
        """Share of samples of the most frequent group of b in their group of a; NaN of none."""
        if not self.total:
            return math.nan
        most = torch.zeros_like(self.row_sizes)
        most.scatter_reduce_(0, self.rows, self.counts, "amax")
        return int(most.sum()) / self.total

    # ============ information ============
    def information(self) -> float:
        """I(A; B) in nats; 0 where either has one group."""
        if min(self.num_groups) < 2:
            return 0.0
        counts, total = self.counts.double(), float(self.total)
        independent = self.row_sizes[self.rows].double() * self.column_sizes[self.columns].double()
        terms = counts / total * (counts * (total / independent)).log()
        return max(0.0, terms.sum().item())

    def nmi(self) -> float:
        """I(A; B) / sqrt(H(A) H(B)) (thesis, section 3.2.2): 1 for equal partitions, 0 for independent ones.

        1 also where both are one group, and 0 where no sample is left.
        """
        if max(self.num_groups) < 2:
            return float(self.total > 0)
        information = self.information()
        if information == 0:
            return 0.0
        return information / math.sqrt(entropy(self.row_sizes) * entropy(self.column_sizes))

    def ami(self) -> float:
        """(I - E) / ((H(A) + H(B)) / 2 - E), E the information of random groups of these sizes.

        Vinh, Epps, Bailey 2010, "Information theoretic measures for clusterings comparison", Eq. 15, with
        the arithmetic mean: 1 for equal partitions, about 0 for random ones of any number of groups.
        """
        if max(self.num_groups) < 2:
            return 1.0
        if min(self.num_groups) < 2:
            return 0.0
        expected = expected_information(self.row_sizes, self.column_sizes)
        most = (entropy(self.row_sizes) + entropy(self.column_sizes)) / 2
        # Where all samples are groups of their own, both differences are 0 up to rounding: that is 1.
        smallest = np.finfo(np.float64).eps
        above, room = self.information() - expected, most - expected
        return _at_least(above, smallest) / _at_least(room, smallest)

    # ============ pairs of samples ============
    def ari(self) -> float:
        """The Rand index, 1 for equal partitions and about 0 for random ones (Hubert, Arabie 1985, Eq. 5)."""
        together = int(self.counts.square().sum())
        both = together - self.total
        only_b = int(self.column_sizes.square().sum()) - together
        only_a = int(self.row_sizes.square().sum()) - together
        neither = self.total**2 - together - only_a - only_b
        if only_a == only_b == 0:
            return 1.0
        chance = (both + only_a) * (only_a + neither) + (both + only_b) * (only_b + neither)
        return 2 * (both * neither - only_a * only_b) / chance

    def summary(self) -> dict[str, float]:
        """All of them by name, each from 0 (ARI and AMI: from about 0) to 1."""
        return {
            "accuracy": self.accuracy(),
            "purity": self.purity(),
            "nmi": self.nmi(),
            "ami": self.ami(),
            "ari": self.ari(),
        }


# ============ information ============
def entropy(sizes: Tensor) -> float:
    """Entropy in nats of groups of these sizes (K,), all above 0."""
    shares = sizes.double() / sizes.sum()
    return torch.special.entr(shares).sum().item()


def expected_information(row_sizes: Tensor, column_sizes: Tensor) -> float:
    """Mean of I(A; B) in nats over random groupings with groups of these sizes.

    Vinh, Epps, Bailey 2010, Eq. 14: a sum over all pairs of groups and all numbers of samples that they
    can have in common. Pairs of equal sizes have equal terms, and are computed once.
    """
    total = int(row_sizes.sum())
    log_factorial = torch.lgamma(torch.arange(1, total + 2, dtype=torch.float64))
    sizes, times = column_sizes.unique(return_counts=True)  # sorted
    expected = 0.0
    for size, count in zip(
        *(x.tolist() for x in row_sizes.unique(return_counts=True)), strict=True
    ):
        longest = min(size, int(sizes[-1]))
        for part, part_times in zip(
            sizes.split(max(1, TERMS_AT_ONCE // longest)),
            times.split(max(1, TERMS_AT_ONCE // longest)),
            strict=True,
        ):
            terms = _terms(size, part, total, log_factorial)
            expected += count * (terms * part_times).sum().item()
    return expected


def _terms(row_size, column_sizes, total, log_factorial):
    """For each column size (C,): the sum of Eq. 14 over the numbers in common with a row of row_size."""
    b = column_sizes[:, None]
    fewest = (row_size + b - total).clamp(min=1)  # in common
    most = b.clamp(max=row_size)
    steps = torch.arange(int((most - fewest).max()) + 1)
    inside = fewest + steps <= most
    n = torch.minimum(fewest + steps, most)  # (C, n)
    log_probability = (
        log_factorial[row_size]
        + log_factorial[b]
        + log_factorial[total - row_size]
        + log_factorial[total - b]
        - log_factorial[total]
        - log_factorial[n]
        - log_factorial[row_size - n]
        - log_factorial[b - n]
        - log_factorial[total - row_size - b + n]
    )
    independent, n = row_size * b.double() / total, n.double()
    return (n / total * (n / independent).log() * log_probability.exp() * inside).sum(1)


def _at_least(value, smallest):
    """A value that is not nearer to 0 than `smallest`, of its own sign."""
    return min(value, -smallest) if value < 0 else max(value, smallest)


# ============ matching ============
def optimal_matching(profit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of a row and a column, each at most once, whose sum of `profit` (R, C) is largest.

    (min(R, C),) rows, ascending, and (min(R, C),) columns. The Hungarian method, as shortest augmenting
    paths from one row after the other (Jonker, Volgenant 1987): O(min(R, C)^2 max(R, C)). Raises
    ValueError for entries that are not finite.
    """
    cost = -np.asarray(profit, dtype=np.float64)
    if not np.isfinite(cost).all():
        raise ValueError("the entries of a table to be matched must be finite")
    if cost.shape[0] > cost.shape[1]:
        columns, rows = optimal_matching(np.ascontiguousarray(profit.T))
        order = rows.argsort()
        return rows[order], columns[order]
    num_rows, num_columns = cost.shape
    row_price, column_price = np.zeros(num_rows), np.zeros(num_columns)
    row_of, column_of = np.full(num_columns, -1), np.full(num_rows, -1)
    for first in range(num_rows):
        length = np.full(num_columns, np.inf)  # of the shortest path to each column
        before = np.full(num_columns, first)  # the row that it comes from
        is_open, row, reached = np.ones(num_columns, dtype=bool), first, 0.0
        passed = []  # columns
        while True:
            through = reached + cost[row] - row_price[row] - column_price
            shorter = is_open & (through < length)
            length[shorter], before[shorter] = through[shorter], row
            lengths = np.where(is_open, length, np.inf)
            column = int(lengths.argmin())
            reached = lengths[column]
            # Of equally near columns a free one, which ends the path.
            free = np.flatnonzero((lengths == reached) & (row_of < 0))
            if len(free):
                column = int(free[0])
                break
            is_open[column] = False
            passed.append(column)
            row = row_of[column]
        row_price[first] += reached
        row_price[row_of[passed]] += reached - length[passed]
        column_price[passed] -= reached - length[passed]
        row = -1
        while row != first:
            row = before[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
    return np.arange(num_rows), column_of
