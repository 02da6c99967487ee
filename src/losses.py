"""Cross-entropy between views and the assignments of other views, value and gradient in one pass."""

from collections.abc import Sequence

import torch

CPU_BLOCK, GPU_BLOCK = 2**16, 2**24  # scores worked on at a time: small, few launches


def swapped_cross_entropy(
    scores: torch.Tensor,
    assignments: Sequence[torch.Tensor],
    views: Sequence[int],
    temperature: float,
    weight: float = 1.0,
) -> torch.Tensor:
    """Predict the assignment of each assigned view from every other view (SwAV, Eq. 2 and 6).

    `weight` times the sum over all pairs (view i with an assignment q_i, another view v) of the mean
    over the batch of - sum_k q_i^(k) log softmax(scores_v / temperature)^(k).

    scores: (V, B, K), any floating type, carries gradient. assignments: one (B, K) for each entry of
    `views`, constants, rows need not sum to 1. views: the views that the assignments belong to.
    Returns a float32 scalar. The softmax is computed in float32 whatever the type of the scores.
    All q_i share one log-softmax, and the gradient (softmax * mass - sum of q) / temperature is
    formed while the block of rows is in the cache: beyond the scores only the gradient is held.
    The result can be differentiated once.
    """
    return _SwappedCrossEntropy.apply(scores, assignments, views, temperature, weight)


class _SwappedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, assignments, views, temperature, weight):
        num_views, batch_size, num_prototypes = scores.shape
        scale = weight / (temperature * batch_size)
        gradient = torch.empty_like(scores)
        loss = scores.new_zeros((), dtype=torch.float32)
        if scores.is_cuda:  # few launches
            views_at_once, rows_at_once = (
                num_views,
                max(1, GPU_BLOCK // (num_views * num_prototypes)),
            )
        else:  # little memory
            views_at_once, rows_at_once = 1, max(1, CPU_BLOCK // num_prototypes)
        for row in range(0, batch_size, rows_at_once):
            rows = slice(row, row + rows_at_once)
            q = [assignment[rows].float() for assignment in assignments]  # each (b, K)
            total = sum(q[1:], start=q[0])  # (b, K)
            mass = total.sum(-1, keepdim=True).repeat(num_views, 1, 1)  # (V, b, 1)
            for view, own in zip(views, q, strict=True):
                mass[view] -= own.sum(-1, keepdim=True)  # no view predicts its own assignment
            scaled_mass, minus_total = mass * scale, total * -scale
            for first in range(0, num_views, views_at_once):
                some = slice(first, first + views_at_once)
                logits = scores[some, rows].float().mul(1 / temperature)  # (n, b, K)
                p = gradient[some, rows]
                in_place = p.dtype == torch.float32 and p.is_contiguous()
                p = torch.softmax(logits, -1, out=p) if in_place else torch.softmax(logits, -1)
                # log sum exp from the softmax: its largest entry is exp(largest logit - lse)
                lse = logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()  # (n, b, 1)
                summed = logits.sum(0) if len(logits) > 1 else logits[0]  # (b, K)
                loss += torch.vdot(mass[some].flatten(), lse.flatten())
                loss -= torch.vdot(summed.flatten(), total.flatten())
                torch.addcmul(minus_total, p, scaled_mass[some], out=p)
                for view, own in zip(views, q, strict=True):
                    if first <= view < first + views_at_once:
                        loss += torch.vdot(logits[view - first].flatten(), own.flatten())
                        p[view - first].add_(own, alpha=scale)
                if not in_place:
                    gradient[some, rows] = p
        ctx.gradient = gradient
        return loss * (weight / batch_size)

    @staticmethod
    def backward(ctx, grad_output):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("swapped_cross_entropy can be differentiated only once")
        if grad_output.is_cuda or grad_output != 1:  # on a GPU looking would be a synchronisation
            gradient.mul_(grad_output)
        return gradient, None, None, None, None
