"""Sinkhorn-Knopp assignments (SwAV, arXiv:2006.09882, Eq. 3-5)."""

import math
from collections.abc import Sequence

import torch

from .. import dist

# exp(x) stays a normal number for |x| below these bounds.
LARGEST_EXPONENT = {torch.float32: 87.0, torch.float64: 708.0}
BLOCK = 2**19  # entries of the exponential worked on at a time on a CPU, in its cache


@torch.no_grad()
def sinkhorn(
    scores: torch.Tensor,
    epsilon: float = 0.05,
    iterations: int = 3,
    dtype: torch.dtype = torch.float32,
    max_score: float | None = None,
    total_rows: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Assign samples to prototypes so that the batch is split equally among the prototypes.

    Each iteration scales Q = exp(scores / epsilon) so that all prototypes receive the same mass,
    then so that every sample gives away the same mass. With Q = Diag(v) exp(scores / epsilon) Diag(u)
    (Eq. 5) only u and v change: the exponential is computed once and is the only B x K buffer.

    scores: (B, K), any floating type; with a process group, this process's rows of the batch.
    epsilon: entropy regularisation of Eq. 3, > 0. iterations: at least 1 (appendix C.4: 3 suffice).
    dtype: float32 or float64, the precision to compute in.
    out: (B, K) in `dtype` to write to, if the caller has one: fresh memory costs a CPU a third more.
    max_score: a known bound on |score|, if any (1 for cosines), and total_rows: the number of rows of
    all processes, if known: together they save a pass and a synchronisation.
    Returns assignments (B, K) in `dtype`: non-negative, every row sums to 1. Finite for all finite
    scores: where the range of scores / epsilon is too wide for exp() in float32 the same computation
    runs in float64, and beyond that on logarithms.
    Raises ValueError for epsilon <= 0, iterations < 1, scores that are not (B, K).
    """
    if epsilon <= 0 or iterations < 1:
        raise ValueError(
            f"sinkhorn needs epsilon > 0 and iterations >= 1, not {epsilon} and {iterations}"
        )
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"sinkhorn needs scores of shape (B, K), not {tuple(scores.shape)}")
    top, spread, total_rows = _range(scores, max_score, total_rows)
    # u and v lie between exp(-spread / epsilon) / (B K) and its inverse. All that decides is the same
    # on all processes: they must exchange the same numbers.
    exponent = _exponent(spread, epsilon, total_rows, scores.shape[1])
    known = {"max_score": max_score, "total_rows": total_rows}
    if scores.device.type == "mps" and exponent > LARGEST_EXPONENT[torch.float32]:
        return sinkhorn(scores.cpu(), epsilon, iterations, dtype, **known).to(scores.device)
    if dtype == torch.float32 and exponent > LARGEST_EXPONENT[torch.float32]:
        return sinkhorn(scores, epsilon, iterations, torch.float64, **known).float()
    if exponent > LARGEST_EXPONENT[torch.float64]:
        return _log_sinkhorn(scores, epsilon, iterations).to(dtype)
    q = torch.empty(scores.shape, dtype=dtype, device=scores.device) if out is None else out
    _scaling_sinkhorn([scores], epsilon, iterations, top, [q])
    return q


@torch.no_grad()
def sinkhorn_of_each(
    problems: Sequence[torch.Tensor],
    max_score: float,
    total_rows: int,
    epsilon: float = 0.05,
    iterations: int = 3,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """sinkhorn() of several problems of one shape (B, K), in the collectives of one.

    Each is solved by itself, to the bits of sinkhorn(). max_score and total_rows must be known, and are
    those of every problem; the rest is as there.
    """
    exponent = math.inf
    if epsilon > 0:
        exponent = _exponent(2 * max_score, epsilon, total_rows, problems[0].shape[1])
    is_mps = problems[0].device.type == "mps"
    fits = exponent <= LARGEST_EXPONENT[torch.float32 if is_mps else dtype]
    if not fits or iterations < 1:  # sinkhorn() knows another way, or says what is wrong
        return [
            sinkhorn(x, epsilon, iterations, dtype, max_score=max_score, total_rows=total_rows)
            for x in problems
        ]
    codes = [torch.empty(x.shape, dtype=dtype, device=x.device) for x in problems]
    _scaling_sinkhorn(problems, epsilon, iterations, max_score, codes)
    return codes


def _exponent(spread, epsilon, total_rows, num_prototypes):
    """The largest logarithm of what is exponentiated, and of the scaling vectors."""
    return spread / epsilon + math.log(max(1, total_rows) * num_prototypes)


def _range(scores, max_score, total_rows):
    """The largest score of all processes, the distance from it to the smallest, and their rows.

    Where the rows are to be found, they are as many as if all processes had those of the largest.
    """
    if max_score is not None:
        if total_rows is None:
            num_rows = torch.tensor([len(scores)], device=scores.device)
            total_rows = int(dist.all_reduce_max(num_rows)) * dist.world_size()
        return max_score, 2 * max_score, total_rows
    extremes = torch.full((3,), -math.inf, dtype=torch.float64, device=scores.device)
    extremes[2] = len(scores)
    if scores.numel():
        low, high = torch.aminmax(scores)
        extremes[:2] = torch.stack([high, -low])
    high, minus_low, num_rows = dist.all_reduce_max(extremes).tolist()
    return high, high + minus_low, int(num_rows) * dist.world_size()


def _scaling_sinkhorn(problems, epsilon, iterations, top, codes):
    """Scaling vectors on one exponential each, in blocks of rows that stay in the cache on a CPU."""
    num_rows, num_prototypes = problems[0].shape
    size = num_rows if problems[0].is_cuda else max(16, BLOCK // num_prototypes)
    starts = range(0, num_rows, max(1, size))
    blocks = [(n, q[i : i + size]) for n, q in enumerate(codes) for i in starts]
    scores = [x[i : i + size] for x in problems for i in starts]
    scale = torch.tensor(1 / epsilon, dtype=codes[0].dtype)
    sums = codes[0].new_zeros(len(codes), num_prototypes)  # mass of each prototype
    # An autocast around this would compute its products in half precision.
    with torch.autocast(sums.device.type, enabled=False):
        for (n, block), given in zip(blocks, scores, strict=True):
            sums[n] += block.copy_(given).sub_(top).mul_(scale).exp_().sum(0)
        for iteration in range(iterations):
            sums = dist.all_reduce_sum(sums)
            u = [mass.mean() / mass for mass in sums]  # (K,) each, equal mass for all prototypes
            sums = torch.zeros_like(sums)
            for n, block in blocks:
                v = torch.mv(block, u[n]).reciprocal_()  # (b,), equal mass for all samples
                if iteration < iterations - 1:
                    sums[n].addmv_(block.t(), v)
                else:
                    block.mul_(u[n]).mul_(v[:, None])


def _log_sinkhorn(scores, epsilon, iterations):
    """The same on logarithms in float64, for score ranges that no exponential can hold."""
    log_q = scores.double() / epsilon  # (B, K)
    for _ in range(iterations):
        top = log_q.amax(0) if len(log_q) else log_q.new_full(log_q.shape[1:], -math.inf)
        top = dist.all_reduce_max(top)  # (K,)
        sums = dist.all_reduce_sum((log_q - top).exp_().sum(0))  # (K,)
        log_q -= top + sums.log()
        log_q -= log_q.logsumexp(1, keepdim=True)
    return log_q.exp_()
