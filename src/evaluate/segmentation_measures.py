"""How well segments fit the true ones: region similarity J and contour accuracy F.

Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation, CVPR 2016,
section 5, and Pont-Tuset et al. 2017, arXiv:1704.00675, which measures every object of a video by
itself. Masks are arrays of bool (..., H, W); pixels that are void are of neither mask.
"""

import math
from collections.abc import Sequence

import numpy as np

TOLERANCE = 0.008  # distance of contours that match, as a share of the image's diagonal
RECALLED = 0.5  # an object is recalled in a frame where its measure is above
QUARTERS = 4  # parts of a video, of which decay compares the first and the last
VOID = 255  # the label of pixels that do not count


def jaccard(mask: np.ndarray, truth: np.ndarray, void: np.ndarray | None = None) -> np.ndarray:
    """J, intersection over union: (..., H, W), (..., H, W) -> (...), float64; 1 where both are empty."""
    if void is not None:
        mask, truth = mask & ~void, truth & ~void
    intersection = (mask & truth).sum((-2, -1), dtype=np.int64)
    union = (mask | truth).sum((-2, -1), dtype=np.int64)
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))


def contour(mask: np.ndarray) -> np.ndarray:
    """The pixels (..., H, W) that differ from the next one to the right, below, or across both."""
    edges = [(0, 0)] * (mask.ndim - 2) + [(0, 1), (0, 1)]
    padded = np.pad(mask, edges, mode="edge")
    right, below, across = padded[..., :-1, 1:], padded[..., 1:, :-1], padded[..., 1:, 1:]
    return (mask != right) | (mask != below) | (mask != across)


def contour_accuracy(
    mask: np.ndarray,
    truth: np.ndarray,
    void: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
) -> float:
    """F of two masks (H, W): the harmonic mean of precision and recall of the pixels of their contours.

    A pixel of one contour is right where the other has one within ceil(tolerance * diagonal) pixels. Of
    two empty contours F is 1; of a single one it is 0.
    """
    if void is not None:
        mask, truth = mask & ~void, truth & ~void
    radius = math.ceil(tolerance * math.hypot(*mask.shape))
    found, true = contour(mask), contour(truth)
    if not found.any() or not true.any():
        return float(found.any() == true.any())
    precision, recall = _share_near(found, true, radius), _share_near(true, found, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _share_near(pixels, others, radius):
    """The share of `pixels` (H, W) with one of `others` within `radius`, by sums over pieces of rows."""
    rows, columns = np.nonzero(pixels)  # (n,) each
    padded = np.pad(others, [(radius, radius), (radius + 1, radius)])
    sums = padded.cumsum(1, dtype=np.int32)  # at column x + radius those before and at x
    near = np.zeros(len(rows), bool)
    for down in range(-radius, radius + 1):
        half = math.isqrt(radius**2 - down**2)  # of the disk's width in this row
        row, column = rows + radius + down, columns + radius
        near |= sums[row, column + half + 1] > sums[row, column - half]
    return float(near.mean())


def measure_frame(labels: np.ndarray, truth: np.ndarray, num_objects: int) -> np.ndarray:
    """J and F of the objects 1 to num_objects in one frame: labels (H, W), twice -> (num_objects, 2)."""
    void = truth == VOID
    rows = []
    for number in range(1, num_objects + 1):
        mask, true = labels == number, truth == number
        rows.append([float(jaccard(mask, true, void)), contour_accuracy(mask, true, void)])
    return np.array(rows).reshape(num_objects, 2)


def mean_recall_decay(values: Sequence[float]) -> tuple[float, float, float]:
    """Of a measure of one object by frame: its mean, the share above 0.5, and what it loses.

    The loss is the mean of the first quarter of the frames less that of the last one. The quarters
    share the frames at their ends, which are at (i / 4)(T - 1), rounded, a half upwards.
    """
    values = np.asarray(values, np.float64)  # (T,)
    ends = np.linspace(1, len(values), QUARTERS + 1)
    ends = np.round(ends + 1e-10).astype(int) - 1
    first, last = values[ends[0] : ends[1] + 1], values[ends[-2] : ends[-1] + 1]
    return (
        float(values.mean()),
        float((values > RECALLED).mean()),
        float(first.mean() - last.mean()),
    )


def summarise(objects: Sequence[tuple[Sequence[float], Sequence[float]]]) -> dict[str, float]:
    """The figures of the benchmark, in percent, of J and F of every object by frame.

    Every object of every video counts the same. jf_mean is the mean of j_mean and f_mean, (J&F)_m of
    the papers.
    """
    result = {}
    for name, place in (("j", 0), ("f", 1)):
        figures = np.array([mean_recall_decay(pair[place]) for pair in objects])  # (objects, 3)
        for figure, value in zip(("mean", "recall", "decay"), figures.mean(0), strict=True):
            result[f"{name}_{figure}"] = 100 * float(value)
    return {"jf_mean": (result["j_mean"] + result["f_mean"]) / 2, **result}
