"""Obvious float64 versions of the mathematics, written from the equations, slow and plain."""

import numpy as np


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
