"""Obvious float64 versions of the mathematics, written from the equations, slow and plain."""

import numpy as np


# ============ labels ============
def margins(scores):
    """(N,): how far the largest entry of each row of scores (N, K) is above the next, in float64."""
    scores = np.asarray(scores, np.float64)
    if scores.shape[1] == 1:
        return np.full(len(scores), np.inf)
    second, first = np.partition(scores, -2, axis=1)[:, -2:].T
    return first - second


def assert_best(labels, scores, tolerance):
    """Each label (N,) names an entry of its row of scores (N, K) that is within `tolerance` of the largest.

    scores: from a computation in float64. tolerance: a number or (N,), what rounding may move an
    entry by. Entries that lie no further apart tie: processors that sum in different orders choose
    differently among them, and all of them are right.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    assert labels.shape == scores.shape[:1] and labels.min() >= 0
    short = scores.max(1) - np.take_along_axis(scores, labels[:, None], 1)[:, 0]
    wrong = np.flatnonzero(~(short <= tolerance))
    assert not len(wrong), f"row {wrong[0]}: {labels[wrong[0]]} is {short[wrong[0]]} below the best"


def assert_nearest(ids, scores, tolerance):
    """ids (N, k) are the k largest of each row of scores (N, M), the largest first, none of them twice.

    scores: from a computation in float64. Entries that lie no further apart than `tolerance`, what
    rounding may move one by, tie, and may stand in any order.
    """
    ids, scores = np.asarray(ids), np.asarray(scores, np.float64)
    assert len(ids) == len(scores) and all(len(set(row)) == len(row) for row in ids.tolist())
    best = -np.sort(-scores, axis=1)[:, : ids.shape[1]]
    np.testing.assert_allclose(np.take_along_axis(scores, ids, 1), best, rtol=0, atol=tolerance)


# ============ losses and assignments ============
def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logsumexp(x, axis):
    top = x.max(axis, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis, keepdims=True))


def sinkhorn(scores, epsilon, iterations):
    """SwAV, Eq. 3-5, on logarithms: (B, K) -> (B, K), rows sum to 1."""
    log_q = np.asarray(scores, np.float64) / epsilon
    for _ in range(iterations):
        log_q = log_q - logsumexp(log_q, 0)
        log_q = log_q - logsumexp(log_q, 1)
    return np.exp(log_q)


def swav_loss(scores, assignments, num_crops, crops_for_assign, temperature):
    """SwAV, Eq. 2 and 6, averaged over the pairs: scores (sum(num_crops) B, K), crop-major."""
    total = sum(num_crops)
    log_p = log_softmax(
        np.asarray(scores, np.float64).reshape(total, -1, scores.shape[-1]) / temperature
    )
    loss = 0.0
    for i, q in zip(crops_for_assign, assignments, strict=True):
        others = [v for v in range(total) if v != i]
        loss += np.mean([-(q * log_p[v]).sum(-1).mean() for v in others])
    return loss / len(crops_for_assign)


def dino_loss(student, teacher, center, num_crops, student_temp, teacher_temp):
    """DINO, Eq. 5.3, averaged over the pairs: student (V B, K), teacher (2 B, K), crop-major."""
    log_p = log_softmax(
        np.asarray(student, np.float64).reshape(num_crops, -1, student.shape[-1]) / student_temp
    )
    targets = np.exp(log_softmax((np.asarray(teacher, np.float64) - center) / teacher_temp))
    pairs = [
        -(q * log_p[v]).sum(-1).mean()
        for i, q in enumerate(targets.reshape(2, -1, teacher.shape[-1]))
        for v in range(num_crops)
        if v != i
    ]
    return np.mean(pairs)
