"""Cross-entropy between views and the assignments of other views, value and gradient in one pass."""

from collections.abc import Sequence

import torch

# Scores worked on at a time: on a CPU what stays in the cache, on a GPU what needs few launches.
CPU_BLOCK, GPU_BLOCK = 2**18, 2**24


def swapped_cross_entropy(
    scores: torch.Tensor,
    assignments: Sequence[torch.Tensor],
    views: Sequence[int],
    temperature: float,
    weight: float = 1.0,
) -> torch.Tensor:
    """Predict the assignment of each assigned view from every other view.

    `weight` times the sum over all pairs (view i with an assignment q_i, another view v) of the mean
    over the batch of - sum_k q_i^(k) log softmax(scores_v / temperature)^(k): Eq. 2 and 6 of SwAV
    (arXiv:2006.09882), Eq. 3 of DINO (arXiv:2104.14294, 5.3 of the thesis).

    scores: (V, B, K), any floating type, carries gradient. assignments: one (B, K) for each entry of
    `views`, constants, rows need not sum to 1. views: the views that the assignments belong to.
    Returns a float32 scalar. Whatever the type of the scores, all is computed in float32, and the
    gradient is rounded to that type once: in float16 not before a loss scale has reached it, since
    most of its entries, of the size 1 / (K B), would be rounded to zero. All q_i share one softmax,
    and the gradient (softmax * mass - sum of q) / temperature is formed while a block of scores is in
    the cache: beyond the scores only the gradient is held, of float16 scores in float32. The result
    can be differentiated once.
    """
    return _SwappedCrossEntropy.apply(scores, assignments, views, temperature, weight)


class _SwappedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, assignments, views, temperature, weight):
        num_views, batch_size, num_prototypes = scores.shape
        scale = weight / (temperature * batch_size)
        sums = [q.sum(-1, keepdim=True, dtype=torch.float32) for q in assignments]  # each (B, 1)
        mass = sum(sums).repeat(num_views, 1, 1)  # (V, B, 1)
        for view, own in zip(views, sums, strict=True):
            mass[view] -= own  # no view predicts its own assignment
        mass *= scale
        max_logit, max_p = torch.empty_like(mass), torch.empty_like(mass)
        # Scores in float16 come with a loss scale, which reaches the gradient in the backward pass.
        kept_type = torch.float32 if scores.dtype == torch.float16 else scores.dtype
        gradient = scores.new_empty(scores.shape, dtype=kept_type)
        products = []  # -scale * (logits . assignments), pair by pair
        # A block is some rows of one view, or all rows of some views: contiguous in memory.
        block = GPU_BLOCK if scores.is_cuda else CPU_BLOCK
        rows_at_once = min(batch_size, max(1, block // num_prototypes))
        views_at_once = max(1, block // (batch_size * num_prototypes))
        memory = scores.new_empty(rows_at_once, num_prototypes, dtype=torch.float32)
        for row in range(0, batch_size, rows_at_once):
            rows = slice(row, row + rows_at_once)
            q = [assignment[rows].float() for assignment in assignments]  # each (b, K)
            minus_total = torch.mul(q[0], -scale, out=memory[: len(q[0])])  # (b, K)
            for other in q[1:]:
                minus_total.sub_(other, alpha=scale)
            tensors = (scores, gradient, mass, max_logit, max_p)
            blocks = zip(*(x[:, rows].split(views_at_once) for x in tensors), strict=True)
            for i, (s, g, m, largest, most) in enumerate(blocks):  # the logits, (n, b, K):
                if kept_type == torch.float32:
                    p = torch.mul(s.float(), 1 / temperature, out=g)
                else:
                    p = s.float().mul_(1 / temperature)
                inside = [view - i * views_at_once for view in views]
                own = [(p[v], x) for v, x in zip(inside, q, strict=True) if 0 <= v < len(p)]
                products += [torch.vdot(x, minus_total.flatten()) for x in p.flatten(1)]
                products += [torch.vdot(x.flatten(), y.flatten()) * scale for x, y in own]
                # log sum exp from the softmax: its largest entry is exp(largest logit - lse)
                torch.amax(p, -1, keepdim=True, out=largest)
                torch.softmax(p, -1, out=p)
                torch.amax(p, -1, keepdim=True, out=most)
                torch.addcmul(minus_total, p, m, out=p)
                for x, y in own:
                    x.add_(y, alpha=scale)
                if p is not g:
                    g.copy_(p)
        ctx.gradient, ctx.dtype = gradient, scores.dtype
        log_sum_exp = max_logit - max_p.log()  # (V, B, 1)
        loss = torch.vdot(mass.flatten(), log_sum_exp.flatten()) + torch.stack(products).sum()
        return loss * temperature

    @staticmethod
    def backward(ctx, grad_output):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("swapped_cross_entropy can be differentiated only once")
        if gradient.dtype != ctx.dtype:
            rounded = torch.empty_like(gradient, dtype=ctx.dtype)
            gradient = torch.mul(gradient, grad_output, out=rounded)
        elif grad_output.is_cuda or grad_output != 1:  # on a GPU looking would be a synchronisation
            gradient.mul_(grad_output)
        return gradient, None, None, None, None
