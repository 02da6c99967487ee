"""Weighted k-nearest-neighbour classification of features, one search for all k.

Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
(arXiv:1805.01978), section 3.4. When a process group is up, all arguments are this rank's share:
training features stay where they are, see src.cluster.neighbours.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import dist
from ..cluster.neighbours import nearest_neighbours
from .label_subsets import class_members, draw_members

LARGEST_EXPONENT = 80.0  # 6000 times exp(80) still fits a float32


def knn_votes(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    backend: str = "torch",
) -> Tensor | Iterator[Tensor]:
    """Votes of the k nearest training rows: sums of exp(cosine / temperature) over each class.

    train_features (N, D), train_labels (N,) of any integer type, features (M, D): this rank's share
    of each; features are expected L2-normalised, so that the inner product is the cosine.
    k may be a list: then one search answers all, and the votes of each k come one after the other, so
    that those of one k are held at a time.
    num_classes: by default the largest training label of all ranks plus one.
    Returns (M, num_classes) float32. In a row where exp(cosine / temperature) would leave float32,
    the votes are divided by the largest weight of the row, which changes no order within it.
    Raises ValueError as `nearest_neighbours` does, for a temperature that is not above 0, and for
    training labels that are negative or not below num_classes.
    """
    if not temperature > 0:
        raise ValueError(f"--temperature {temperature} must be above 0; the usual value is 0.07")
    ks = [k] if isinstance(k, int) else list(k)
    labels, num_classes = _all_labels(train_labels.to(train_features.device), num_classes)
    similarities, indices = nearest_neighbours(train_features, features, max(ks), backend)
    near = labels.to(indices.device)[indices]  # (M, k)
    votes = (
        _votes(similarities[:, :count], near[:, :count], temperature, num_classes) for count in ks
    )
    return next(votes) if isinstance(k, int) else votes


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    backend: str = "torch",
    top: Sequence[int] = (1, 5),
) -> dict[int, list[float]]:
    """{k: [top-1, top-5]} in percent of the queries of all ranks, from one search.

    Arguments as for `knn_votes`; labels (M,) of the queries. Equal votes are ranked by class index.
    `top` counts beyond the number of classes are that number; a label that no training image has is
    an error of the classifier, not of the call. Raises as knn_votes, and where there is no query.
    """
    votes_of_ks = knn_votes(
        train_features, train_labels, features, k=ks, temperature=temperature, backend=backend
    )
    accuracies = {}
    for k, votes in zip(ks, votes_of_ks, strict=True):
        ranks = _target_ranks(votes, labels)
        hits = [(ranks < min(t, votes.shape[1])).sum() for t in top]
        counts = torch.stack([*hits, torch.tensor(len(ranks), device=ranks.device)])
        *hits, total = dist.all_reduce_sum(counts.to(train_features.device)).tolist()
        if total == 0:
            raise ValueError("there is no image to classify: the validation split is empty")
        accuracies[k] = [100.0 * hit / total for hit in hits]
    return accuracies


def few_label_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    per_class: int,
    draws: int = 20,
    seed: int = 0,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    backend: str = "torch",
) -> dict[int, tuple[float, float]]:
    """{k: (mean, standard deviation)} of the top-1 in percent with `per_class` labelled images.

    Each draw labels `per_class` training images of each class (all of a class that has fewer), by a
    generator seeded with `seed`, the same on any number of processes. Reported are k = 1, k =
    per_class and those of `ks` that are smaller than the number of labelled images. The figure to
    quote is k = per_class: more neighbours than a class has labelled images must vote for others.
    """
    if per_class < 1 or draws < 1:
        raise ValueError("few-label k-NN needs at least 1 labelled image per class and 1 draw")
    device = train_features.device
    every_label, num_classes = _all_labels(train_labels.to(device), None)
    every_label = every_label.cpu()
    shares = dist.all_gather_rows(torch.tensor([len(train_labels)], device=device)).tolist()
    start = sum(shares[: dist.rank()])
    members = class_members(every_label, num_classes)
    num_labelled = sum(min(per_class, len(m)) for m in members)
    ks = sorted({1, min(per_class, num_labelled), *(k for k in ks if k < num_labelled)})
    generator = torch.Generator().manual_seed(seed)
    top1 = {k: [] for k in ks}
    for _ in range(draws):
        drawn = draw_members(members, per_class, generator) - start
        drawn = drawn[(drawn >= 0) & (drawn < len(train_labels))]  # this rank's rows
        accuracies = knn_accuracy(
            train_features[drawn.to(device)],
            train_labels[drawn.to(train_labels.device)],
            features,
            labels,
            ks=ks,
            temperature=temperature,
            backend=backend,
            top=(1,),
        )
        for k in ks:
            top1[k].append(accuracies[k][0])
    values = {k: torch.tensor(top1[k], dtype=torch.float64) for k in ks}
    return {k: (v.mean().item(), v.std().item() if draws > 1 else 0.0) for k, v in values.items()}


def _votes(similarities, labels, temperature, num_classes):
    """Neighbours' similarities and labels (M, k), best first -> votes (M, num_classes)."""
    temperature = max(temperature, 1e-30)  # smaller ones are 0 in float32
    best = similarities[:, :1]
    shift = torch.where(best.abs() > LARGEST_EXPONENT * temperature, best, torch.zeros_like(best))
    weights = ((similarities - shift) / temperature).exp()  # (M, k)
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)


def _target_ranks(votes, labels):
    """Position (N,) of each label in a stable descending sort of its row of votes (N, C)."""
    num_classes = votes.shape[1]
    labels = labels.to(votes.device).long()
    known = (labels >= 0) & (labels < num_classes)
    target = labels.clamp(0, num_classes - 1)[:, None]
    value = votes.gather(1, target)
    before = torch.arange(num_classes, device=votes.device) < target  # (N, C)
    ranks = ((votes > value) | ((votes == value) & before)).sum(1)
    return torch.where(known, ranks, num_classes)


def _all_labels(labels, num_classes):
    """Training labels of all ranks, and the number of classes."""
    labels = dist.all_gather_rows(labels.long())
    smallest, largest = (labels.min().item(), labels.max().item()) if len(labels) else (0, -1)
    if smallest < 0 or (num_classes is not None and largest >= num_classes):
        limit = "num_classes" if num_classes is None else num_classes
        raise ValueError(f"training labels {smallest} to {largest} must lie in 0 .. {limit} - 1")
    return labels, largest + 1 if num_classes is None else num_classes
