"""Rankings of a database by queries, and how good they are: average precisions, expansions."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .average_precision import average_precision

KAPPAS = (1, 5, 10)  # of mP@k


@dataclass
class Relevance:
    """What is right for a query: the database's images that it should find.

    positives, junk: indices into the database; junk counts neither as right nor as wrong, and is taken
    out of the ranking. num_positives: all that there are, where the database lacks some of them; None:
    as many as `positives`.
    """

    positives: np.ndarray
    junk: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    num_positives: int | None = None

    def count(self) -> int:
        """The number of positives that recall is a share of."""
        return len(self.positives) if self.num_positives is None else self.num_positives


def rank(similarity: Tensor) -> np.ndarray:
    """Similarities (Q, N) -> the database's indices by falling similarity, (Q, N); ties by index."""
    return torch.sort(similarity, dim=1, descending=True, stable=True).indices.numpy()


def trapezoid_ap(ranks: np.ndarray, num_positives: int) -> float:
    """Area under the straight lines between the points of precision and recall of one ranking.

    ranks: of the positives that were found, from 0, in order. A positive at rank r, the j-th from 0, adds
    (j / r + (j + 1) / (r + 1)) / 2, the former being 1 at rank 0, divided by num_positives. It is what the
    programs of the Oxford buildings (Philbin et al. 2007), of Holidays (Jegou et al. 2008), whose program
    Copydays uses, and of the revisited benchmarks (Radenovic et al. 2018, arXiv:1803.11285) compute. NaN
    without a positive.
    """
    if num_positives == 0:
        return float("nan")
    ranks = np.asarray(ranks, np.float64)
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    return float(((before + (found + 1) / (ranks + 1)) / 2).sum() / num_positives)


def ranks_of_positives(order: np.ndarray, relevance: Relevance) -> np.ndarray:
    """Where the positives are in a ranking (N,) from which junk is taken out, from 0, in order."""
    kept = order[~np.isin(order, relevance.junk)]
    return np.flatnonzero(np.isin(kept, relevance.positives))


def precision_at(ranks: np.ndarray, kappa: int) -> float:
    """The share of positives among the first k of a ranking, k being kappa or the last positive's place.

    ranks: of all positives, from 0; at least one. The revisited benchmarks (arXiv:1803.11285) end the
    ranking at the last positive, so that fewer positives than kappa cost nothing.
    """
    end = min(int(ranks[-1]) + 1, kappa)
    return float((ranks < end).sum() / end)


def retrieval_scores(order: np.ndarray, relevance: list[Relevance]) -> dict:
    """map, aps (Q,), precision at KAPPAS (3,), precisions (Q, 3), of rankings (Q, N), as shares.

    Queries without a positive are NaN and left out of the means.
    Raises ValueError where no query has a positive.
    """
    aps, precisions = [], []
    for row, relevant in zip(order, relevance, strict=True):
        ranks = ranks_of_positives(row, relevant)
        aps.append(trapezoid_ap(ranks, relevant.count()))
        some = relevant.count() > 0 and len(ranks) > 0
        missed = 0.0 if relevant.count() else float("nan")
        precisions.append([precision_at(ranks, k) if some else missed for k in KAPPAS])
    aps, precisions = np.array(aps), np.array(precisions)
    if np.isnan(aps).all():
        raise ValueError("no query of the ground truth has an image that it should find")
    return {
        "map": float(np.nanmean(aps)),
        "aps": aps,
        "precision": np.nanmean(precisions, axis=0),
        "precisions": precisions,
    }


def micro_average_precision(similarity: Tensor, relevance: list[Relevance]) -> float:
    """Average precision of all pairs of query and image in one ranking, by similarities (Q, N).

    Area under the steps of the curve (Douze et al. 2021, arXiv:2106.09672): one threshold is
    to do for all queries. Junk is not counted. Equal similarities are one threshold.
    """
    positive = torch.zeros(similarity.shape, dtype=torch.bool)
    counted = torch.ones(similarity.shape, dtype=torch.bool)
    for row, relevant in enumerate(relevance):
        positive[row, torch.from_numpy(np.asarray(relevant.positives, np.int64))] = True
        counted[row, torch.from_numpy(np.asarray(relevant.junk, np.int64))] = False
    return average_precision(similarity[counted].cpu(), positive[counted])[0]


# ============ expansions ============
def expand_database(database: Tensor, num_neighbours: int) -> Tensor:
    """Each row (N, D) in the mean with its nearest ones, of length 1: database-side augmentation.

    Gordo et al. 2016, arXiv:1610.07940, weighted as its published program does: 1 for the row itself,
    then 1, (k - 1) / k, ... 1 / k for its k neighbours by falling cosine. database: rows of length 1.
    """
    k = min(num_neighbours, len(database) - 1)
    weights = torch.tensor([1.0, *((num_neighbours - i) / num_neighbours for i in range(k))])
    order = torch.from_numpy(rank(database @ database.T)[:, : k + 1].copy())  # (N, k + 1)
    rows = [(weights[:, None] * database[neighbours]).sum(0) for neighbours in order]
    return F.normalize(torch.stack(rows), dim=1)


def expand_queries(queries: Tensor, database: Tensor, num_neighbours: int) -> Tensor:
    """Each query (Q, D) in the mean with the first images that it finds, of length 1.

    Average query expansion, Chum et al. 2007. database (N, D); rows of both have length 1.
    """
    order = torch.from_numpy(rank(queries @ database.T)[:, :num_neighbours].copy())  # (Q, k)
    return F.normalize(queries + database[order].sum(1), dim=1)
