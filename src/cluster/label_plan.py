"""The transport plan between a memory bank and prototypes, for src/cluster/self_label.py.

Scaling vectors on a kernel that is made anew when they have moved far: the stabilised Sinkhorn of
Schmitzer (arXiv:1610.06519); and on logarithms where no kernel would do.
"""

import math

import torch

from .. import dist

# Entries of the N x K plan worked on at a time: what a CPU's cache holds, 100 MB of a GPU.
BLOCK, BLOCK_GPU = 2**18, 2**23
LARGEST_CHANGE = 600.0  # logarithm: exp() of it, summed over any data, stays a number
# Logarithms: the kernel serves while no scale has moved by more than NEAR, and is made where all
# scales are within FAR of 0, so that float32 holds its exponents to 2e-5.
NEAR, FAR = 20.0, 250.0
SMALLEST_EXPONENT = -87.0  # exp() of it is a normal float32 number; denormal ones are slow
TINY = torch.finfo(torch.float64).tiny
HUGE = torch.finfo(torch.float64).max


class Plan:
    """The plan diag(c) P diag(r) of this process's rows, in blocks; it is never held as a whole.

    1 / (N c) is row_sums * exp(log_sums), both (n,). The kernel is P diag(r) with rows that sum to
    1, r being that of the last logarithmic step. Where r has moved little from there, two products
    with the kernel are an iteration: no exponential, and nothing out of range, as every row of it
    sums to 1 and every column to at least exp(-NEAR) of its share.
    """

    def __init__(self, embeddings, prototypes, epsilon, max_bytes):
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

    def first_scales(self, total, temperature):
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

    def step(self, log_scales):
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

    def labels(self, log_scales):
        """The largest entry of each row of the plan, (n,) int64."""
        labels = torch.zeros_like(self.log_sums, dtype=torch.int64)
        for rows, x in self._log_plan():
            labels[rows] = x.add_(log_scales).argmax(1)
        return labels
