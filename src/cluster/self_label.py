"""Pseudo-labels of SeLa in equal shares: Sinkhorn-Knopp over a whole memory bank.

SwAV paper (arXiv:2006.09882), appendix D.2, Eq. 12; the algorithm, its stopping rule and its times
are those of Asano, Rupprecht, Vedaldi: Self-labelling via simultaneous clustering and
representation learning (arXiv:1911.05371), section 3.1 and appendix.
"""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dist
from .label_plan import TINY, Plan
from .neighbours import full_precision

logger = logging.getLogger(__name__)

CHECK_EVERY = 10  # iterations between two looks at the error, as published


class SelfLabels(NamedTuple):
    """Labels of this process's rows, and how Sinkhorn-Knopp came to them.

    labels: (n,) int64, on the device of the embeddings. iterations: made, one above a multiple of 10
    unless the limit ended them. error: at the last check. log_scales: (K,) float64, log r of the
    plan diag(c) P diag(r), whose rows are softmax(log P + log r) / N.
    """

    labels: Tensor
    iterations: int
    error: float
    log_scales: Tensor


@torch.no_grad()
@full_precision()
def self_labels(
    embeddings: Tensor,
    prototypes: Tensor,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    tolerance: float = 0.1,
    max_iterations: int = 10001,
    max_bytes: int = 2**30,
) -> SelfLabels:
    """Give every row the prototype that it takes most of when all prototypes get the same share.

    With P = softmax(z^T c / temperature) ^ (temperature / epsilon), N x K, iterations of
      r = (1/K) / (P^T c),   c = (1/N) / (P r),   from c = 1/N,
    make the rows of diag(c) P diag(r) sum to 1/N and the columns to 1/K. Every 10th iteration looks
    at the sum over all rows of |c before / c after - 1| and ends when it is at most `tolerance`.
    The sum grows with N: what is asked of one row tightens as the data grow.

    embeddings: (n, D) any floating type; with a process group, this process's rows, n may be 0.
    prototypes: (K, D), the same on all processes. temperature: tau of Eq. 8. epsilon: > 0, the
    entropy regularisation; SeLa's lambda is temperature / epsilon. max_iterations: four times what
    50,000 rows took at epsilon 0.01 (up to 2531; the number grows with log N). A warning is logged
    when they do not reach the tolerance, and the labels are those of the last one.
    max_bytes: the kernel of src/cluster/label_plan.py (n, K) is kept between the iterations where it fits
    into this, and else computed anew each time, in blocks: the same numbers, but nine
    times slower on a CPU (D = 128).

    Scores and the kernel are computed in float32 (float64 for float64 input, or where float32 would
    overflow), all else in float64: the error can reach any tolerance, and log_scales are exact to
    1e-6 or so. Memory beside the input: n x 24 bytes, 20 bytes for each entry of a block (of 2**18
    entries on a CPU, 2**23 on a GPU), and at most `max_bytes`. For N = 1.28 million and K = 3000, a
    head at a time: on each of 64 processes 0.5 MB, 240 MB of kernel and the block; on one process
    31 MB and the block, where P of one head in float64 would take 31 GB.
    Labels that tie go to the lowest prototype. Finite for all finite scores.
    Raises ValueError on all processes for embeddings or prototypes that are not finite, for no row
    at all, and for shapes and numbers that cannot be.
    """
    _check(embeddings, prototypes, temperature, epsilon, tolerance, max_iterations)
    if embeddings.device.type == "mps":  # which has no float64
        numbers = (temperature, epsilon, tolerance, max_iterations, max_bytes)
        found = self_labels(embeddings.cpu(), prototypes.cpu(), *numbers)
        return found._replace(labels=found.labels.to(embeddings.device))
    total, dtype = _agree(embeddings, prototypes, epsilon)
    plan = Plan(embeddings, prototypes.to(embeddings.device, dtype), epsilon, max_bytes)
    log_scales = plan.first_scales(total, temperature)
    for iteration in range(max_iterations):
        sums = dist.all_reduce_sum(plan.step(log_scales))
        mass = sums[:-1] / total  # (K,), of the plan: P^T c is mass / r
        last = iteration + 1 == max_iterations
        if last or iteration % CHECK_EVERY == 0:
            error, smallest = torch.stack([sums[-1], mass.amin()]).tolist()
            converged = error <= tolerance and smallest >= TINY
            if converged or last:
                break
        log_scales = log_scales - math.log(len(prototypes)) - mass.clamp(min=TINY).log()
    if not converged and dist.is_main():
        logger.warning(
            "the assignment did not converge in %d iterations: its error is %.3g, "
            "--sinkhorn_tolerance %g; raise the tolerance, or --epsilon %g",
            *(max_iterations, error, tolerance, epsilon),
        )
    return SelfLabels(plan.labels(log_scales), iteration + 1, error, log_scales)


def _check(embeddings, prototypes, temperature, epsilon, tolerance, max_iterations):
    numbers = {
        "--temperature": temperature,
        "--epsilon": epsilon,
        "--sinkhorn_tolerance": tolerance,
    }
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} {value} must be a number above 0")
    if max_iterations < 1:
        raise ValueError(f"max_iterations {max_iterations} must be at least 1")
    shapes = tuple(embeddings.shape), tuple(prototypes.shape)
    if (
        [len(shape) for shape in shapes] != [2, 2]
        or shapes[0][1] != shapes[1][1]
        or not shapes[1][0]
    ):
        raise ValueError(
            "self_labels needs embeddings (n, D) and prototypes (K, D), not {} and {}".format(
                *shapes
            )
        )


def _agree(embeddings, prototypes, epsilon):
    """Rows of all processes, and the type in which no score overflows; ValueError if there is none."""
    largest = [_largest(embeddings), _largest(prototypes.double().abs().sum(1))]
    bound = largest[0] * largest[1] if all(map(math.isfinite, largest)) else math.inf
    double = torch.float64 in (embeddings.dtype, prototypes.dtype)
    facts = torch.tensor([bound, float(double)], dtype=torch.float64)
    bound, double = dist.all_reduce_max(facts).tolist()
    if not math.isfinite(bound):
        raise ValueError(
            "the assignment needs finite embeddings and prototypes, and some are NaN, infinite or "
            "too large to multiply"
        )
    total = dist.all_reduce_sum(torch.tensor(len(embeddings))).item()
    if total == 0:
        raise ValueError("there is no embedding to assign: the memory bank is empty")
    wide = double or max(bound, 1 / epsilon) > torch.finfo(torch.float32).max
    return total, torch.float64 if wide else torch.float32


def _largest(x):
    """The largest absolute value, 0 without any, NaN if there is a NaN."""
    return torch.stack(torch.aminmax(x)).double().abs().max().item() if x.numel() else 0.0


def reassignment_times(epochs: int, num_reassignments: int) -> list[float]:
    """When SeLa computes labels, in epochs, the latest first: often at first, seldom later.

    The squares of evenly spaced numbers, up to just above `epochs`; before them one time that never
    comes, as published.
    """
    last = max(1, num_reassignments - 1)
    squares = [(i / last) ** 2 for i in range(num_reassignments)]
    return [epochs + 2.0] + [(epochs + 1.01) * square for square in reversed(squares)]


def reassignment_epochs(epochs: int, num_reassignments: int) -> list[int]:
    """The epochs at whose start labels are computed, ascending; 0 reassignments mean every epoch.

    A time of `reassignment_times` within an epoch waits for the start of the next; the first epoch
    always needs labels.
    """
    if num_reassignments == 0:
        return list(range(epochs))
    times = map(math.ceil, reassignment_times(epochs, num_reassignments))
    return sorted({0} | {time for time in times if time < epochs})
