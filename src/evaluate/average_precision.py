"""Average precision of a ranking, by both definitions in use on PASCAL VOC 2007."""

import torch
from torch import Tensor

from .. import dist

IGNORED = 255  # label of a class of which an image has difficult objects only


def precision_and_recall(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall at every threshold, from the highest score down, float64 (T,).

    scores (n,); positive (n,) bool, at least one true. Equal scores are passed together, so that
    their order does not count. A score that is not a number comes last.
    """
    scores = torch.where(scores.isnan(), -torch.inf, scores.double())
    scores, order = scores.sort(descending=True)
    hits = positive[order].double().cumsum(0)  # (n,)
    last = torch.ones_like(scores, dtype=torch.bool)  # of the images with the same score
    last[:-1] = scores[1:] != scores[:-1]
    places = torch.arange(1, len(scores) + 1, device=scores.device)[last]
    return hits[last] / places, hits[last] / hits[-1]


def average_precision(scores: Tensor, positive: Tensor) -> tuple[float, float]:
    """Area under the steps of the curve, and the 11-point average of VOC 2007.

    scores (n,), positive (n,) bool. The area is sum_t (recall_t - recall_t-1) precision_t, as
    scikit-learn's; the other, Everingham et al. 2010 (IJCV 88), section 4.2, the mean over the
    recalls 0, 0.1, ... 1 of the highest precision at that recall or beyond. NaN without a positive.
    """
    if not positive.any():
        return torch.nan, torch.nan
    precision, recall = precision_and_recall(scores, positive)
    area = (recall.diff(prepend=recall.new_zeros(1)) * precision).sum().item()
    points = torch.arange(11, device=recall.device) / 10.0
    beyond = recall[None] >= points[:, None].double() - 1e-9  # (11, T)
    return area, torch.where(beyond, precision, 0.0).amax(1).mean().item()


def mean_average_precision(scores: Tensor, labels: Tensor) -> dict:
    """Average precisions of the rows of all processes: `map` and `map_11points` in percent, `ap`.

    scores (n, C), labels (n, C) of this process: 1, 0, or 255 where the image does not count for
    the class; n may be 0. ap: C areas in percent, None for a class without a positive, which the
    means leave out. Raises ValueError where no class has one.
    """
    scores, labels = (dist.all_gather_rows(x.cpu()) for x in (scores, labels))
    found = []
    for column, targets in zip(scores.t(), labels.t(), strict=True):
        counted = targets != IGNORED
        found.append(average_precision(column[counted], targets[counted] == 1))
    found = 100 * torch.tensor(found, dtype=torch.float64)  # (C, 2)
    known = ~found[:, 0].isnan()
    if not known.any():
        raise ValueError("average precision needs an image with an object; the split has none")
    area, points = found[known].mean(0).tolist()
    ap = [x if there else None for x, there in zip(found[:, 0].tolist(), known, strict=True)]
    return {"map": area, "map_11points": points, "ap": ap}
