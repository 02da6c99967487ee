"""Ranks, devices and collectives, under torchrun, submitit, srun or nothing, on GPUs or a CPU.

Every function works in one process without a process group: a collective returns its input then.
Nothing else in src reads environment variables or names a kind of device."""

import logging
import math
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from src.launch import Launch, gpu_index, gpu_numbers, read_launch, rendezvous

logger = logging.getLogger(__name__)

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Process(Launch):
    """A launch, and the device that this process computes on."""

    device: torch.device


# ============ start and end ============


def read_environment(environ: Mapping[str, str] = os.environ) -> Launch:
    """Rank, world size, local rank and launcher of this process; see src.launch.read_launch."""
    return read_launch(environ)


def slurm_job_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """The Slurm job to requeue; None elsewhere, and under submitit, which requeues by itself."""
    return None if "SUBMITIT_EXECUTOR" in environ else environ.get("SLURM_JOB_ID")


def init(device: str = "auto", timeout: float = 1800.0) -> Process:
    """Find rank and device; start a process group (nccl on GPUs, else gloo) if there are others.

    `timeout` in seconds is how long any collective, the first meeting included, waits for the rest.
    A group that is up already is used. Raises ValueError or ConnectionError with what to change.
    """
    launch = read_launch(os.environ)
    if _has_group():
        launch = Launch(dist.get_rank(), dist.get_world_size(), launch.local_rank, launch.launcher)
    chosen = resolve_device(device)
    if launch.world_size > 1 and (chosen.type == "mps" or chosen.index is not None):
        if device != "auto":
            raise ValueError(
                f"--device {device} is for one process, not {launch.world_size}; use cuda or cpu"
            )
        chosen = torch.device("cpu")
    if chosen.type == "cuda":
        if chosen.index is None:
            chosen = torch.device("cuda", gpu_index(launch, torch.cuda.device_count(), os.environ))
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True  # the shapes of the crops stay the same
    if launch.world_size > 1 and not _has_group():
        method = rendezvous(launch, os.environ)
        logger.info("%s meets the others at %s", launch, method)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        place = {"rank": launch.rank, "world_size": launch.world_size}
        try:
            dist.init_process_group(backend, method, timedelta(seconds=timeout), **place)
        except RuntimeError as error:
            raise ConnectionError(
                f"rank {launch.rank} of {launch.world_size} did not meet the others at {method} "
                f"({str(error).splitlines()[0]}): start all, or set MASTER_ADDR and MASTER_PORT"
            ) from error
    return Process(launch.rank, launch.world_size, launch.local_rank, launch.launcher, chosen)


def _has_group():
    return dist.is_available() and dist.is_initialized()


def shutdown() -> None:
    """End the process group, if there is one."""
    if _has_group():
        dist.destroy_process_group()


def rank() -> int:
    """Rank of this process, 0 without a process group."""
    return dist.get_rank() if _has_group() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if _has_group() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return rank() == 0


# ============ collectives: all ranks call them, in the same order ============


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over processes; half precision is added in float32, a bool tensor as a logical or."""
    return _all_reduce(tensor, dist.ReduceOp.SUM) if world_size() > 1 else tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over processes."""
    return _all_reduce(tensor, dist.ReduceOp.MAX) if world_size() > 1 else tensor


def _wire():
    # NCCL reaches the memory of GPUs only, gloo is used with that of the CPU only.
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


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
        dist.all_reduce(copy, op=operation)
    return copy.to(tensor.device, tensor.dtype)


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, (n_0 + ... + n_{W-1}, ...), ordered by rank; any n_r may be 0.

    Raises ValueError on every rank when the rows of the ranks differ in size.
    """
    if world_size() == 1:
        return tensor
    row = tensor.element_size() * math.prod(tensor.shape[1:])  # bytes: any dtype travels as such
    mine = _copy(tensor).reshape(-1).view(torch.uint8)  # (n_r * row,)
    sizes = mine.new_empty(world_size(), 2, dtype=torch.int64)
    dist.all_gather(list(sizes.unbind(0)), sizes.new_tensor([len(tensor), row]))
    lengths, rows = sizes.T.tolist()
    if len(set(rows)) > 1:
        raise ValueError(f"all_gather_rows: rows of {rows} bytes on ranks 0 to {len(rows) - 1}")
    longest = max(lengths) * row
    padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
    gathered = mine.new_empty(world_size(), longest)
    if longest:
        dist.all_gather(list(gathered.unbind(0)), padded)
    whole = torch.cat([part[: n * row] for part, n in zip(gathered, lengths, strict=True)])
    return whole.view(tensor.dtype).reshape(sum(lengths), *tensor.shape[1:]).to(tensor.device)


def broadcast(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """The tensor of rank `source`; shape and dtype must be the same on all ranks."""
    if world_size() == 1:
        return tensor
    copy = _copy(tensor)
    if copy.numel():
        dist.broadcast(copy.reshape(-1).view(torch.uint8), src=source)
    return copy.to(tensor.device)


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The picklable object of rank `source`."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=_wire())
    return box[0]


def barrier() -> None:
    """Return when all processes have come here."""
    all_reduce_sum(torch.zeros(1))


# ============ devices ============


def resolve_device(name: str = "auto") -> torch.device:
    """Device of a name; "auto" is the first of cuda, mps and cpu that there is, or ValueError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, is_there in there.items() if is_there), "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cuda", "mps", "cpu") or (index and not index.isdecimal()):
        raise ValueError(f"--device must be auto, cuda, cuda:N, mps or cpu, not {name!r}")
    if not there.get(kind, True) or (
        kind == "cuda" and int(index or 0) >= torch.cuda.device_count()
    ):
        raise ValueError(f"--device {name} is not there for PyTorch; use --device auto or cpu")
    return torch.device(name)


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[int]:
    """The GPUs that this process sees, by the numbers that CUDA_VISIBLE_DEVICES uses."""
    return gpu_numbers(torch.cuda.device_count(), environ)


def default_precision(device: torch.device) -> str:
    """What --precision auto means: bf16 on a GPU that has it, fp16 on older ones, else fp32."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def resolve_precision(name: str, device: torch.device) -> str:
    return default_precision(device) if name == "auto" else name


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Context in which operations run in `precision`; "fp32" switches an outer autocast off."""
    if precision not in DTYPES:
        raise ValueError(f"--precision must be one of {', '.join(DTYPES)}, not {precision!r}")
    return torch.autocast(device.type, DTYPES[precision], enabled=DTYPES[precision] is not None)


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Loss scaling for fp16 on a GPU, and a scaler that does nothing everywhere else."""
    return torch.amp.GradScaler("cuda", enabled=device.type == "cuda" and precision == "fp16")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type != "cpu":
        (torch.cuda if device.type == "cuda" else torch.mps).synchronize()


def peak_memory_mb(device: torch.device) -> float:
    """Peak of allocated GPU memory, or of the process's resident memory, in 1e6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:  # first, since ru_maxrss of Linux begins at the peak of the process that started this one
        with open("/proc/self/status") as status:
            return int(status.read().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        if sys.platform == "win32":
            return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
