"""Sums, maxima, gathers and broadcasts over processes, or over a group of them.

Every function works in one process without a process group: a collective returns its input then.
All processes of the group call a collective, in the same order. Scripts have them from
src.dist.
"""

import contextlib
import contextvars
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import RunError, cause

TIMEOUT = 1800.0  # seconds that a collective waits for the other processes, of --dist_timeout
_limit = contextvars.ContextVar("limit", default=timedelta(seconds=TIMEOUT))
LONGEST_PAUSE = 5.0  # seconds between two looks whether the main process is done, see on_main
_within = contextvars.ContextVar("within", default=None)  # the group of `within`; None: all


def has_group() -> bool:
    """Whether there are several processes, or one that was started as such."""
    return dist.is_available() and dist.is_initialized()


def set_timeout(seconds: float) -> timedelta:
    """What groups that are made from here on allow a collective, 0: a year; returned as torch takes it."""
    _limit.set(timedelta(seconds=seconds) if seconds else timedelta(days=365))
    return _limit.get()


def new_groups(members: Sequence[Sequence[int]]) -> list:
    """A group of processes for each list of ranks; None where it is all of them.

    Every process must call it, with the same lists, those that it is not in included.
    """
    every = world_size()
    limit = _limit.get()
    return [dist.new_group(list(ranks), limit) if len(ranks) < every else None for ranks in members]


@contextlib.contextmanager
def within(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Inside, all collectives are among the processes of `group`, and so are ranks and their number.

    group: of torch.distributed, of which this process is one; None: all processes.
    """
    before = _within.set(group)
    try:
        yield
    finally:
        _within.reset(before)


def rank() -> int:
    """Rank of this process, 0 without a process group."""
    return dist.get_rank(_within.get()) if has_group() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size(_within.get()) if has_group() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over processes; half precision is added in float32, a bool tensor as a logical or."""
    return _all_reduce(tensor, dist.ReduceOp.SUM) if world_size() > 1 else tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over processes."""
    return _all_reduce(tensor, dist.ReduceOp.MAX) if world_size() > 1 else tensor


def _global(rank):
    return rank if _within.get() is None else dist.get_global_rank(_within.get(), rank)


def _wire():
    # NCCL reaches the memory of GPUs only, gloo is used with that of the CPU only.
    return torch.device("cuda" if dist.get_backend(_within.get()) == "nccl" else "cpu")


def _copy(tensor, dtype=None):
    return tensor.detach().to(
        _wire(), dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format
    )


def _all_reduce(tensor, operation):
    dtype = tensor.dtype
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    elif not dtype.is_floating_point and not dtype.is_complex:
        dtype = torch.int64  # the backends do not add bool or 16-bit integers
    copy = _copy(tensor, dtype)
    if copy.numel():
        dist.all_reduce(copy, op=operation, group=_within.get())
    return copy.to(tensor.device, tensor.dtype)


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, (n_0 + ... + n_{W-1}, ...), ordered by rank; any n_r may be 0.

    Raises ValueError on every rank when the rows of the ranks differ in size.
    """
    if world_size() == 1:
        return tensor
    row = tensor.element_size() * math.prod(tensor.shape[1:])  # bytes: any dtype travels as such
    own_bytes = _copy(tensor).reshape(-1).view(torch.uint8)  # (n_r * row,)
    sizes = own_bytes.new_empty(world_size(), 2, dtype=torch.int64)
    dist.all_gather(list(sizes.unbind(0)), sizes.new_tensor([len(tensor), row]), _within.get())
    lengths, rows = sizes.T.tolist()
    if len(set(rows)) > 1:
        raise ValueError(f"all_gather_rows: rows of {rows} bytes on ranks 0 to {len(rows) - 1}")
    longest = max(lengths) * row
    padded = torch.nn.functional.pad(own_bytes, (0, longest - len(own_bytes)))
    gathered = own_bytes.new_empty(world_size(), longest)
    if longest:
        dist.all_gather(list(gathered.unbind(0)), padded, _within.get())
    whole = torch.cat([part[: n * row] for part, n in zip(gathered, lengths, strict=True)])
    return whole.view(tensor.dtype).reshape(sum(lengths), *tensor.shape[1:]).to(tensor.device)


def broadcast(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """The tensor of rank `source`; shape and dtype must be the same on all ranks."""
    if world_size() == 1:
        return tensor
    copy = _copy(tensor)
    if copy.numel():
        dist.broadcast(copy.reshape(-1).view(torch.uint8), _global(source), _within.get())
    return copy.to(tensor.device)


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The picklable object of rank `source`."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, _global(source), _within.get(), device=_wire())
    return box[0]


def on_main(work: Callable[[], Any]) -> Any:
    """The result of work() on the main process, None on the others, which wait as long as it takes.

    Work of hours would outlast the time limit of one collective; here a short one is repeated while a
    thread works. work: without collectives, and mostly outside of Python's lock. What it raises is
    raised there, and as RunError on the others. All processes call it.
    """
    if world_size() == 1:
        return work()
    results, errors, thread = [], [], None

    def run():
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    if is_main():
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
    pause = 0.001
    while True:
        if thread is not None:
            thread.join(pause)
        working = thread is not None and thread.is_alive()
        if not all_reduce_max(torch.tensor([int(working)])).item():
            break
        pause = min(LONGEST_PAUSE, 1.5 * pause)
    failure = broadcast_object(cause(errors[0]) if errors else None)
    if errors:
        raise errors[0]
    if failure is not None:
        raise RunError(f"process 0, for which all others wait, has failed: {failure}")
    return results[0] if results else None


def all_gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, (W * n, ...), ordered by rank, that carry gradient to where they are from.

    tensor: (n, ...), the same n on every process. The gradient of a row is the sum of what the losses
    of all processes say about it, as if one process had added up the losses: all processes must run
    the backward pass.
    """
    if world_size() == 1:
        return tensor
    return _GatherRows.apply(tensor)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        ctx.num_rows = len(tensor)
        parts = [torch.empty_like(tensor.contiguous()) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous(), _within.get())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        start = rank() * ctx.num_rows
        return all_reduce_sum(gradient)[start : start + ctx.num_rows]


def barrier() -> None:
    """Return when all processes have come here."""
    all_reduce_sum(torch.zeros(1))
