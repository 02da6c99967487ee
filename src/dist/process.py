"""Ranks, devices and collectives, under torchrun, submitit, srun or nothing, on GPUs or a CPU.

The collectives are those of src.dist.collectives. Nothing else in src reads environment variables or names
a kind of device."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .collectives import (
    TIMEOUT,
    has_group,
    set_timeout,
)
from .launch import Launch, gpu_index, gpu_numbers, read_launch, rendezvous

logger = logging.getLogger(__name__)

LAST_COLLECTIVE = 0.1  # seconds that the threads of gloo may still be busy with it
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What torch hands to MKL's vector mathematics on a CPU, in float32 and float64.
VECTOR_FUNCTIONS = (
    torch.acos, torch.asin, torch.atan, torch.cos, torch.erf, torch.erfc, torch.erfinv, torch.exp,
    torch.log, torch.log10, torch.log2, torch.sin, torch.sqrt, torch.tan, torch.tanh, torch.trunc,
)  # fmt: skip


@dataclass(frozen=True)
class Process(Launch):
    """A launch, and the device that this process computes on."""

    device: torch.device


# ============ start and end ============


def settle_vector_functions() -> None:
    """Let MKL choose its kernels for this processor, before anything is computed on several threads.

    MKL chooses the kernel of each vector function at its first call. Where that call comes from two
    threads at once, one of them may take another, coarser kernel for its part: relative errors of
    1.5e-4 in the first torch.exp of one process in some hundreds (torch 2.14 with MKL 2024.2 on an
    Intel Xeon), and so runs that are not repeated to the last bit. A tensor this small is computed
    on one thread. The choice holds for the process and for those that are forked from it. Called
    first by all that starts a process: src.run.flags.run, init below, the tests and their ranks.
    """
    for dtype in (torch.float32, torch.float64):
        numbers = torch.full((16,), 0.5, dtype=dtype, device="cpu")
        for function in VECTOR_FUNCTIONS:
            function(numbers)


def read_environment(environ: Mapping[str, str] = os.environ) -> Launch:
    """Rank, world size, local rank and launcher of this process; see src.dist.launch.read_launch."""
    return read_launch(environ)


def slurm_job_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """The Slurm job to requeue; None elsewhere, and under submitit, which requeues by itself."""
    return None if "SUBMITIT_EXECUTOR" in environ else environ.get("SLURM_JOB_ID")


def init(device: str = "auto", timeout: float = TIMEOUT) -> Process:
    """Find rank and device; start a process group (nccl on GPUs, else gloo) if there are others.

    `timeout` in seconds is how long any collective, the first meeting included, waits for the rest; it
    holds for groups that are made later too.
    A group that is up already is used. Raises ValueError or ConnectionError with what to change.
    """
    settle_vector_functions()
    launch, limit = read_launch(os.environ), set_timeout(timeout)
    if has_group():
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
    if launch.world_size > 1 and not has_group():
        method = rendezvous(launch, os.environ)
        logger.info("%s meets the others at %s", launch, method)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        try:
            dist.init_process_group(
                backend,
                init_method=method,
                timeout=limit,
                rank=launch.rank,
                world_size=launch.world_size,
            )
        except RuntimeError as error:
            raise ConnectionError(
                f"rank {launch.rank} of {launch.world_size} did not meet the others at {method} "
                f"({str(error).splitlines()[0]}): start all within --dist_timeout {timeout:g} seconds, "
                "or set MASTER_ADDR and MASTER_PORT"
            ) from error
    return Process(launch.rank, launch.world_size, launch.local_rank, launch.launcher, chosen)


def sharing_processes(group_size: int, world_size: int) -> int:
    """Processes that share statistics: `group_size`, or all for 0 or more than there are.

    Raises ValueError naming --syncbn_process_group_size where that does not divide `world_size`.
    """
    size = min(group_size, world_size) or world_size
    if size < 0 or world_size % size:
        fitting = [str(n) for n in range(1, world_size) if world_size % n == 0]
        raise ValueError(
            f"--syncbn_process_group_size {group_size} does not divide {world_size} processes; "
            f"use {', '.join(fitting)} or 0 (all of them)"
        )
    return size


def shutdown() -> None:
    """End the process group, if there is one."""
    if has_group():
        # A thread of gloo may still hold what the last collective worked on, and needs Python's lock to let
        # it go; ending the group keeps that lock while it waits for the thread. Seen in torch 2.6 and 2.7.
        time.sleep(LAST_COLLECTIVE)
        dist.destroy_process_group()


# ============ devices ============


def resolve_device(name: str = "auto") -> torch.device:
    """Device of a name; "auto" is the first of cuda, mps and cpu that there is, or ValueError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, is_there in available.items() if is_there), "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cuda", "mps", "cpu") or (index and not index.isdecimal()):
        raise ValueError(f"--device must be auto, cuda, cuda:N, mps or cpu, not {name!r}")
    if not available.get(kind, True) or (
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
    """The precision that --precision means on a device."""
    if name == "fp16" and device.type == "cpu":
        logger.info("note: --precision fp16 is slow on a CPU, many times slower than fp32")
    return default_precision(device) if name == "auto" else name


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Context in which operations run in `precision`; "fp32" switches an outer autocast off."""
    if precision not in DTYPES:
        raise ValueError(f"--precision must be one of {', '.join(DTYPES)}, not {precision!r}")
    return torch.autocast(device.type, DTYPES[precision], enabled=DTYPES[precision] is not None)


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Loss scaling for fp16 on a GPU, and a scaler that does nothing everywhere else."""
    return torch.amp.GradScaler("cuda", enabled=device.type == "cuda" and precision == "fp16")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device, for which the host does not wait.

    Without pinned memory, CUDA may wait with more than 64 KB until its stream has come that far.
    """
    tensor = tensor if device.type in ("cpu", "mps") else tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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


# ============ wrapped networks ============
def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The network inside DistributedDataParallel or DataParallel and torch.compile, if it is."""
    wrappers = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    while isinstance(module, wrappers) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, wrappers) else module._orig_mod
    return module


def without_wrapper(weights: dict) -> dict:
    """The same tensors, without the "module." and "_orig_mod." of wrappers before every name."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights
