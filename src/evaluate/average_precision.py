"""Average precision of a ranking, by both definitions in use on PASCAL VOC 2007."""

import math

import numpy as np
import torch
from torch import Tensor

from .. import dist

IGNORED = 255  # label of a class of which an image has difficult objects only


def average_precision(scores: Tensor, positive: Tensor) -> tuple[float, float]:
    """Area under the steps of the curve, and the 11-point average of VOC 2007.

    scores (n,), positive (n,) bool. Equal scores are one threshold, so that their order does not
    count; a score that is not a number comes last. The area is scikit-learn's, sum_t (recall_t -
    recall_t-1) precision_t; the other, Everingham et al. 2010 (IJCV 88), section 4.2, the mean over
    the recalls 0, 0.1, ... 1 of the highest precision at that recall or beyond. NaN without a positive.
    """
    from sklearn.metrics import precision_recall_curve

    if not positive.any():
        return math.nan, math.nan
    # scikit-learn takes finite scores alone: their ranks say the same.
    scores = torch.where(scores.isnan(), -torch.inf, scores.double())
    ranks = torch.unique(scores, return_inverse=True)[1].numpy()
    precision, recall, _ = precision_recall_curve(positive.numpy(), ranks)  # from recall 1 to 0
    precision = precision[:-1]  # (T,); the last, at recall 0, is of no image
    area = -(np.diff(recall) * precision).sum()  # as average_precision_score has it
    reached = recall[:-1] >= np.arange(11)[:, None] / 10 - 1e-9  # (11, T)
    points = np.where(reached, precision, 0.0).max(1).mean()
    return float(area), float(points)


def mean_average_precision(scores: Tensor, labels: Tensor) -> dict:
    """Average precisions of the rows of all processes: `map` and `map_11points` in percent, `ap`.

    scores (n, C), labels (n, C) of this process: 1, 0, or 255 where the image does not count for
    the class; n may be 0. ap: C areas in percent, None for a class without a positive, which the
    means leave out. Raises ValueError where no class has one.
    """
    scores, labels = (dist.all_gather_rows(x.cpu()) for x in (scores, labels))
    precisions = []
    for column, targets in zip(scores.t(), labels.t(), strict=True):
        counted = targets != IGNORED
        precisions.append(average_precision(column[counted], targets[counted] == 1))
    precisions = 100 * torch.tensor(precisions, dtype=torch.float64)  # (C, 2)
    known = ~precisions[:, 0].isnan()
    if not known.any():
        raise ValueError("average precision needs an image with an object; the split has none")
    area, points = precisions[known].mean(0).tolist()
    ap = [None if math.isnan(x) else x for x in precisions[:, 0].tolist()]
    return {"map": area, "map_11points": points, "ap": ap}
