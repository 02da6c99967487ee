"""Sinkhorn-Knopp assignments (SwAV, arXiv:2006.09882, Eq. 3-5)."""

import math

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
    exponent = spread / epsilon + math.log(max(1, total_rows) * scores.shape[1])
    known = {"max_score": max_score, "total_rows": total_rows}
    if scores.device.type == "mps" and exponent > LARGEST_EXPONENT[torch.float32]:
        return sinkhorn(scores.cpu(), epsilon, iterations, dtype, **known).to(scores.device)
    if dtype == torch.float32 and exponent > LARGEST_EXPONENT[torch.float32]:
        return sinkhorn(scores, epsilon, iterations, torch.float64, **known).float()
    if exponent > LARGEST_EXPONENT[torch.float64]:
        return _log_sinkhorn(scores, epsilon, iterations).to(dtype)
    q = torch.empty(scores.shape, dtype=dtype, device=scores.device) if out is None else out
    # An autocast around this would compute its products in half precision.
    with torch.autocast(scores.device.type, enabled=False):
        return _scaling_sinkhorn(scores, epsilon, iterations, top, q)


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


def _scaling_sinkhorn(scores, epsilon, iterations, top, q):
    """Scaling vectors on one exponential, in blocks of rows that stay in the cache on a CPU."""
    num_rows, num_prototypes = scores.shape
    size = num_rows if scores.is_cuda else max(16, BLOCK // num_prototypes)
    blocks = range(0, num_rows, max(1, size))
    scale = torch.tensor(1 / epsilon, dtype=q.dtype)
    sums = q.new_zeros(num_prototypes)  # (K,), mass of each prototype
    for i in blocks:
        block = q[i : i + size].copy_(scores[i : i + size])
        sums += block.sub_(top).mul_(scale).exp_().sum(0)
    for iteration in range(iterations):
        sums = dist.all_reduce_sum(sums)
        u = sums.mean() / sums  # (K,), equal mass for all prototypes
        sums = torch.zeros_like(sums)
        for i in blocks:
            block = q[i : i + size]
            v = torch.mv(block, u).reciprocal_()  # (b,), equal mass for all samples
            if iteration < iterations - 1:
                sums.addmv_(block.t(), v)
            else:
                block.mul_(u).mul_(v[:, None])
    return q


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
