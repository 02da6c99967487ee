"""Rows of all processes that carry gradient back to the process that each row is from."""

import torch

from . import collectives


def gather_rows_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, (W * n, ...), ordered by rank; in one process the tensor itself.

    tensor: (n, ...), the same n on every process. The gradient of a row is the sum of what the losses
    of all processes say about it, as if one process had added up the losses: all processes must run
    the backward pass. Raises ValueError where the processes have different numbers of rows.
    """
    return tensor if collectives.world_size() == 1 else _GatherRows.apply(tensor)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        gathered = collectives.all_gather_rows(tensor)
        num_rows, num_processes = len(tensor), collectives.world_size()
        if len(gathered) != num_processes * num_rows:
            raise ValueError(
                f"gather_rows_with_gradient: {num_rows} rows here and {len(gathered)} on all "
                f"{num_processes} processes; give every process the same number"
            )
        start = collectives.rank() * num_rows
        ctx.own = slice(start, start + num_rows)
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        return collectives.all_reduce_sum(gradient)[ctx.own]
