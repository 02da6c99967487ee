"""Average precision of a ranking, by the definitions in use on PASCAL VOC 2007."""

import math

import numpy as np
import torch
from torch import Tensor

from .. import dist

IGNORED = 255  # label of a class of which an image has difficult objects only


def average_precision(
    scores: Tensor, positive: Tensor, num_positives: int | None = None
) -> tuple[float, float]:
    """Area under the steps of the curve, and the 11-point average of VOC 2007.

    scores (n,), positive (n,) bool. Equal scores are one threshold, so that their order does not
    count; a score that is not a number comes last. The area is scikit-learn's, sum_t (recall_t -
    recall_t-1) precision_t; the other, Everingham et al. 2010 (IJCV 88), section 4.2, the mean over
    the recalls 0, 0.1, ... 1 of the highest precision at that recall or beyond. num_positives: of detection,
    with those that are not among the scores. NaN without a positive.
    """
    if not positive.any():
        return (0.0, 0.0) if num_positives else (math.nan, math.nan)
    precision, recall = _curve(scores, positive, num_positives)
    area = -(np.diff(recall) * precision).sum()  # as average_precision_score has it
    reached = recall[:-1] >= np.arange(11)[:, None] / 10 - 1e-9  # (11, T)
    points = np.where(reached, precision, 0.0).max(1).mean()
    return float(area), float(points)


def interpolated_precision(
    scores: Tensor, positive: Tensor, num_positives: int | None = None
) -> float:
    """Area under the curve whose precision at a recall is the highest there or beyond: that of VOC since
    2010, and of VISSL's SVMs on VOC 2007. Arguments as average_precision; NaN without a positive."""
    if not positive.any():
        return 0.0 if num_positives else math.nan
    precision, recall = _curve(scores, positive, num_positives)
    return float(-(np.diff(recall) * np.maximum.accumulate(precision)).sum())


def _curve(scores, positive, num_positives):
    """Precisions (T,) and recalls (T + 1,), from the largest recall to 0, by threshold."""
    from sklearn.metrics import precision_recall_curve

    # scikit-learn takes finite scores alone: their ranks say the same.
    scores = torch.where(scores.isnan(), -torch.inf, scores.double())
    ranks = torch.unique(scores, return_inverse=True)[1].numpy()
    precision, recall, _ = precision_recall_curve(positive.numpy(), ranks)
    found = int(positive.sum())
    recall = recall * (found / (num_positives or found))
    return precision[:-1], recall  # the last, at recall 0, is of no image


def mean_average_precision(scores: Tensor, labels: Tensor) -> dict:
    """Average precisions of the rows of all processes: `map`, `map_11points` and `map_interpolated` in
    percent, `ap`, `ap_11points`.

    scores (n, C), labels (n, C) of this process: 1, 0, or 255 where the image does not count for
    the class; n may be 0. ap, ap_11points: C values in percent, None for a class without a positive,
    which the means leave out. Raises ValueError where no class has one.
    """
    scores, labels = (dist.all_gather_rows(x.cpu()) for x in (scores, labels))
    precisions = []
    for column, targets in zip(scores.t(), labels.t(), strict=True):
        counted = targets != IGNORED
        column, positive = column[counted], targets[counted] == 1
        area, points = average_precision(column, positive)
        precisions.append((area, points, interpolated_precision(column, positive)))
    precisions = 100 * torch.tensor(precisions, dtype=torch.float64)  # (C, 3)
    known = ~precisions[:, 0].isnan()
    if not known.any():
        raise ValueError("average precision needs an image with an object; the split has none")
    area, points, interpolated = precisions[known].mean(0).tolist()
    ap, ap_points = (
        [None if math.isnan(x) else x for x in column.tolist()] for column in precisions[:, :2].t()
    )
    means = {"map": area, "map_11points": points, "map_interpolated": interpolated}
    return {**means, "ap": ap, "ap_11points": ap_points}
