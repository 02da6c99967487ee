"""Region similarity and contour accuracy: on masks made by hand, and against their definitions."""

import math

import numpy as np
import pytest

from src.evaluate.segmentation_measures import (
    contour,
    contour_accuracy,
    jaccard,
    mean_recall_decay,
    measure_frame,
    summarise,
)


def square(shape, top, left, side):
    mask = np.zeros(shape, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def blobs(seed, shape):
    """A mask with curved contours, and one that is a little different."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    masks = []
    for shift in (0, rng.uniform(-4, 4)):
        y, x = shape[0] / 2 + shift, shape[1] / 2 - shift
        radius = min(shape) / 4 * (1 + 0.3 * np.cos(3 * np.arctan2(rows - y, columns - x) + seed))
        masks.append(np.hypot(rows - y, columns - x) < radius)
    return masks


def contour_by_definition(mask):
    """Pixel by pixel: unlike a neighbour to the right, below or across, where these exist."""
    height, width = mask.shape
    found = np.zeros_like(mask)
    for i in range(height):
        for j in range(width):
            for y, x in ((i, j + 1), (i + 1, j), (i + 1, j + 1)):
                if y < height and x < width:
                    found[i, j] |= mask[i, j] != mask[y, x]
    return found


def accuracy_by_definition(mask, truth, tolerance):
    """F from the distances of all pairs of pixels of the two contours, in float64."""
    radius = np.ceil(tolerance * np.sqrt(np.float64(mask.shape[0] ** 2 + mask.shape[1] ** 2)))
    found, true = (np.argwhere(contour_by_definition(x)).astype(np.float64) for x in (mask, truth))
    distances = np.sqrt(((found[:, None] - true[None]) ** 2).sum(2))  # (n, m)
    precision = (distances.min(1) <= radius).mean()
    recall = (distances.min(0) <= radius).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_the_similarity_of_squares_is_their_intersection_over_their_union():
    mask, truth = square((10, 12), 2, 2, 4), square((10, 12), 2, 4, 4)
    assert jaccard(mask, truth) == 8 / 24
    assert jaccard(mask, mask) == 1 and jaccard(mask, square((10, 12), 6, 7, 3)) == 0
    empty = np.zeros((10, 12), bool)
    assert jaccard(empty, empty) == 1 and jaccard(mask, empty) == 0
    both = jaccard(np.stack([mask, truth])[:, None], np.stack([mask, truth, empty])[None])
    assert both.tolist() == [[1, 1 / 3, 0], [1 / 3, 1, 0]]


def test_void_pixels_count_for_neither_measure():
    mask, truth = square((40, 40), 5, 5, 10), square((40, 40), 5, 5, 10)
    void = square((40, 40), 25, 25, 8)
    assert jaccard(mask | void, truth, void) == 1
    assert contour_accuracy(mask | void, truth, void) == 1
    assert jaccard(mask | void, truth) < 1 and contour_accuracy(mask | void, truth) < 1


def test_a_contour_is_where_the_next_pixels_differ_at_the_edges_too():
    expected = [[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert contour(square((4, 4), 1, 1, 2)).astype(int).tolist() == expected
    for seed in range(3):
        mask = np.random.default_rng(seed).random((9, 11)) < 0.5
        assert np.array_equal(contour(mask), contour_by_definition(mask))
    assert not contour(np.ones((5, 5), bool)).any()


@pytest.mark.parametrize("tolerance", [0.008, 0.03, 0.08])
def test_contour_accuracy_is_that_of_the_definition_in_float64(tolerance):
    for seed, shape in enumerate([(30, 40), (64, 48), (50, 50)]):
        mask, truth = blobs(seed, shape)
        noise = np.random.default_rng(seed).random(shape) < 0.02
        for found in (mask, mask ^ noise):
            expected = accuracy_by_definition(found, truth, tolerance)
            value = contour_accuracy(found, truth, tolerance=tolerance)
            assert math.isclose(value, expected, abs_tol=1e-12)
            assert expected < 1 or found is mask


def test_contours_match_within_eight_pixels_at_480_times_854():
    truth = square((480, 854), 100, 100, 200)
    for shift, right in ((8, True), (9, False)):
        value = contour_accuracy(square((480, 854), 100, 100 + shift, 200), truth)
        assert (value == 1) == right, (shift, value)


def test_the_accuracy_of_empty_contours_is_1_and_of_a_single_one_0():
    empty, mask = np.zeros((20, 20), bool), square((20, 20), 5, 5, 5)
    assert contour_accuracy(empty, empty) == 1
    assert contour_accuracy(mask, empty) == contour_accuracy(empty, mask) == 0
    assert contour_accuracy(square((90, 90), 2, 2, 9), square((90, 90), 70, 70, 9)) == 0


def test_every_object_of_a_frame_is_measured_by_itself():
    truth = np.zeros((40, 40), np.uint8)
    truth[5:15, 5:15], truth[25:35, 25:35], truth[0, :] = 1, 2, 255
    labels = np.where(truth == 2, 0, truth)
    labels[0, :] = 1
    expected = [[1, 1], [0, 0], [1, 1]]  # right but for void pixels, missed, neither here nor there
    assert measure_frame(labels, truth, 3).tolist() == expected


def test_decay_is_the_first_quarter_less_the_last_one_as_the_benchmark_divides_frames():
    values = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    mean, recall, decay = mean_recall_decay(values)
    assert (mean, recall) == (pytest.approx(0.5), pytest.approx(4 / 9))  # 0.5 is not above 0.5
    assert decay == pytest.approx(0.8 - 0.2)  # frames 0 to 2 and 6 to 8
    # Eight frames: the ends are at 1, 2.75, 4.5, 6.25 and 8, which round to 1, 3, 5, 6 and 8.
    _, _, decay = mean_recall_decay(values[:8])
    assert decay == pytest.approx(np.mean(values[:3]) - np.mean(values[5:8]))
    assert mean_recall_decay([0.75]) == (0.75, 1.0, 0.0)


def test_the_figures_are_means_over_objects_in_percent():
    result = summarise([([1.0, 1.0], [0.5, 0.5]), ([0.0, 0.5], [0.0, 0.0])])
    assert result["j_mean"] == pytest.approx(100 * (1 + 0.25) / 2)
    assert result["f_mean"] == pytest.approx(25)
    assert result["jf_mean"] == pytest.approx((62.5 + 25) / 2)
    assert (result["j_recall"], result["f_recall"]) == (50, 0)
    assert set(result) == {"jf_mean"} | {
        f"{x}_{y}" for x in "jf" for y in ("mean", "recall", "decay")
    }
