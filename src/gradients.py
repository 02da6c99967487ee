"""Norms and clipping of gradients, many tensors at a time, nothing read by the host."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def same_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors by device and dtype, as the foreach operations want them."""
    kinds = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each of n tensors of one kind, (n,), in float32 at least."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype))


def clip_gradients(parameters: Iterable[Tensor], most: float) -> Tensor:
    """Scale every gradient whose norm exceeds `most` down to it, each parameter by itself, in place.

    g <- g min(1, most / (|g| + 1e-6)); most = 0 clips nothing. Returns the norms before, (n,) float32,
    of the n parameters that have a gradient. A gradient that is not finite stays so.
    """
    found = []
    for grads in same_kind(p.grad for p in parameters if p.grad is not None):
        before = norms(grads)  # (n,)
        if most:
            torch._foreach_mul_(grads, (most / (before + 1e-6)).clamp(max=1).unbind())
        found.append(before.float())
    return torch.cat(found) if found else torch.zeros(0)


def grad_norm(parameters: Tensor | Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together: a 0-d float32 tensor, nothing read by the host.

    Parameters without a gradient are left out; without any gradient the norm is 0.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    found = [norms(kind).to(grads[0].device, torch.float32) for kind in same_kind(grads)]
    return torch.linalg.vector_norm(torch.cat(found))
