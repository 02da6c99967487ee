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
from .neighbours import full_precision

logger = logging.getLogger(__name__)

CHECK_EVERY = 10  # iterations between two looks at the error, as published
# Entries of the N x K plan worked on at a time: what a CPU's cache holds, 100 MB of a GPU.
BLOCK, BLOCK_GPU = 2**18, 2**23
LARGEST_CHANGE = 600.0  # logarithm: exp() of it, summed over any data, stays a number
# Logarithms: the kernel serves while no scale has moved by more than NEAR, and is made where all
# scales are within FAR of 0, so that float32 holds its exponents to 2e-5.
NEAR, FAR = 20.0, 250.0
SMALLEST_EXPONENT = -87.0  # exp() of it is a normal float32 number; denormal ones are slow
TINY = torch.finfo(torch.float64).tiny
HUGE = torch.finfo(torch.float64).max


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
    max_bytes: the kernel of Plan (n, K) is kept between the iterations where it fits
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
        found = self_labels(
            embeddings.cpu(),
            prototypes.cpu(),
            temperature,
            epsilon,
            tolerance=tolerance,
            max_iterations=max_iterations,
            max_bytes=max_bytes,
        )
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
            max_iterations,
            error,
            tolerance,
            epsilon,
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
    are_tables = [len(shape) for shape in shapes] == [2, 2]
    if not are_tables or shapes[0][1] != shapes[1][1] or not shapes[1][0]:
        raise ValueError(
            "self_labels needs embeddings (n, D) and prototypes (K, D), not "
            f"{shapes[0]} and {shapes[1]}"
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


class Plan:
    """The plan diag(c) P diag(r) of this process's rows, in blocks; it is never held as a whole.

    Scaling vectors on a kernel that is made anew when they have moved far: the stabilised Sinkhorn of
    Schmitzer (arXiv:1610.06519); and on logarithms where no kernel would do.

    1 / (N c) is row_sums * exp(log_sums), both (n,). The kernel is P diag(r) with rows that sum to
    1, r being that of the last logarithmic step. Where r has moved little from there, two products
    with the kernel are an iteration: no exponential, and nothing out of range, as every row of it
    sums to 1 and every column to at least exp(-NEAR) of its share.
    """

    def __init__(self, embeddings: Tensor, prototypes: Tensor, epsilon: float, max_bytes: int):
        self.embeddings, self.epsilon = embeddings, epsilon
        self.weights = prototypes.t()  # (D, K)
        num_rows, num_prototypes = len(embeddings), len(prototypes)
        size = max(16, (BLOCK_GPU if embeddings.is_cuda else BLOCK) // num_prototypes)
        self.blocks = [slice(i, min(i + size, num_rows)) for i in range(0, num_rows, size)]
        rows = min(size, num_rows)
        self.buffer = prototypes.new_empty(rows, num_prototypes)
        self.wide = self.buffer.new_empty(rows, num_prototypes, dtype=torch.float64)
        self.keep = num_rows * num_prototypes * prototypes.dtype.itemsize <= max_bytes
        self.kernel = None  # (n, K), if kept
        self.at = None  # (K,), log r of the last logarithmic step
        self.log_sums = self.wide.new_zeros(num_rows)
        self.row_sums = self.wide.new_ones(num_rows)

    def _scores(self, rows, out):
        """z^T c of a block (b, K), and the largest of each row (b, 1)."""
        scores = torch.mm(self.embeddings[rows].to(out.dtype), self.weights, out=out)
        return scores, scores.amax(1, keepdim=True)

    def _log_plan(self):
        """Yield (rows, (score - largest score of the row) / epsilon), float64 (b, K), to overwrite.

        The subtraction comes first, so that rows of huge scores keep their differences.
        """
        for rows in self.blocks:
            scores, top = self._scores(rows, self.buffer[: rows.stop - rows.start])
            yield rows, self.wide[: len(scores)].copy_(scores).sub_(top).mul_(1 / self.epsilon)

    def first_scales(self, total: int, temperature: float) -> Tensor:
        """log r (K,) of the first iteration, where c = 1/N.

        A column of P can be 0 in float64, so it is summed on logarithms. Later that cannot be: r has
        made the columns sum to 1/K, so rows are at most 1, a column's largest entry is at least
        1/(K N), and it is no less in the softmax of its row. Only where logarithms overflow is there
        a 0.
        """
        num_prototypes, power = self.wide.shape[1], temperature / self.epsilon
        tops = self.wide.new_full((num_prototypes,), -HUGE)  # a running log-sum-exp of columns
        sums = self.wide.new_zeros(num_prototypes)
        for rows, x in self._log_plan():
            # log of P's normaliser: P = exp(x) / sum(exp(x / power)) ^ power
            normaliser = (x / power).exp_().sum(1).log() * power
            self.log_sums[rows] = normaliser
            x -= normaliser[:, None]
            before, tops = tops, tops.maximum(x.amax(0))
            sums *= (before - tops).exp()
            sums += x.sub_(tops).exp_().sum(0)
        top = dist.all_reduce_max(tops)
        sums = dist.all_reduce_sum(sums * (tops - top).exp())
        return -math.log(num_prototypes / total) - top - sums.clamp(min=TINY).log()

    def step(self, log_scales: Tensor) -> Tensor:
        """One iteration from log r (K,): the plan's rows are made to sum to 1/N.

        Returns (K + 1,), float64: for each prototype its mass in this process's rows times N, then
        the sum of |c before / c after - 1|.
        """
        if self.at is not None:
            moved = (log_scales - self.at).abs().amax()
            if moved <= NEAR and self.at.abs().amax() <= FAR:
                return self._scaling_step((log_scales - self.at).exp())
        self.at = log_scales
        return self._logarithmic_step(log_scales)

    def _logarithmic_step(self, log_scales):
        """In float64, for all finite scores; the next kernel is that of these scales."""
        sums = self.wide.new_zeros(len(log_scales) + 1)
        for rows, x in self._log_plan():
            top = x.add_(log_scales).amax(1)
            row_sums = x.sub_(top[:, None]).exp_().sum(1)  # (b,), at least 1
            sums[:-1].addmv_(x.t(), 1 / row_sums)
            before = self.log_sums[rows] + self.row_sums[rows].log()
            self.log_sums[rows] = top + row_sums.log()
            change = self.log_sums[rows] - before  # (b,), log(c before / c after)
            sums[-1] += change.clamp_(max=LARGEST_CHANGE).expm1_().abs_().sum()
        self.row_sums.fill_(1)
        self.kernel = None
        return sums

    def _scaling_step(self, scales):
        """On the kernel, with r (K,) relative to the kernel's: one look at a block for two products."""
        sums = self.wide.new_zeros(len(scales) + 1)
        for rows, block in self._kernel_blocks():
            row_sums = torch.mv(block, scales)
            sums[:-1].addmv_(block.t(), 1 / row_sums)
            sums[-1] += (row_sums / self.row_sums[rows]).sub_(1).abs_().sum()
            self.row_sums[rows] = row_sums
        sums[:-1] *= scales
        return sums

    def _kernel_blocks(self):
        """Yield (rows, block of the kernel) in float64, computed in the type of the scores."""
        make = self.kernel is None
        if make and self.keep:
            self.kernel = self.buffer.new_empty(len(self.embeddings), len(self.at))
        scales, offsets = self.at.to(self.buffer.dtype), self.log_sums.to(self.buffer.dtype)
        for rows in self.blocks:
            block = self.kernel[rows] if self.keep else self.buffer[: rows.stop - rows.start]
            if make:
                _, top = self._scores(rows, out=block)
                torch.add(scales, block.sub_(top), alpha=1 / self.epsilon, out=block)
                block.sub_(offsets[rows, None]).clamp_(min=SMALLEST_EXPONENT).exp_()
            wide = block.dtype == torch.float64
            yield rows, block if wide else self.wide[: len(block)].copy_(block)

    def labels(self, log_scales: Tensor) -> Tensor:
        """The largest entry of each row of the plan, (n,) int64."""
        labels = torch.zeros_like(self.log_sums, dtype=torch.int64)
        for rows, x in self._log_plan():
            labels[rows] = x.add_(log_scales).argmax(1)
        return labels
