"""What a launcher says about this process: pure functions of a mapping of environment variables.

src.dist passes the real environment. Ranks come from RANK, SUBMITIT_LOCAL_GLOBALID or
SLURM_PROCID and the like, which are plain numbers, never from parts of node lists or task counts.
"""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

# Slurm numbers its pseudo-steps (batch script, interactive shell, ...) from here on; in them
# SLURM_NTASKS counts tasks that nobody has started.
FIRST_PSEUDO_STEP = 0xFFFFFFF0
LAST_PORT = 65535
FIRST_PORT, NUM_PORTS = 10000, 20000  # below the range that Linux hands out by itself (32768-)


@dataclass(frozen=True)
class Launch:
    """Who this process is; launcher is "torchrun", "submitit", "srun" or "single"."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Rank, world size and local rank from torchrun, submitit, srun or nothing, in that order.

    torchrun inside salloc counts as torchrun; plain python in a batch script or an salloc shell is
    one process, whatever SLURM_NTASKS says. Raises ValueError for values that contradict.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _launch("torchrun", environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    executor = environ.get("SUBMITIT_EXECUTOR")
    if executor == "local":
        names = [f"SUBMITIT_LOCAL_{name}" for name in ("GLOBALID", "NTASKS", "LOCALID")]
        return _launch("submitit", environ, *names)
    if _srun_step(environ) is not None:
        launcher = "submitit" if executor == "slurm" else "srun"
        return _launch(launcher, environ, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    return Launch(0, 1, 0, "single")


def _launch(launcher, environ, *names):
    values = [environ.get(name) for name in names]
    if values[2] is None and values[1] == "1":
        values[2] = "0"
    for name, value in zip(names, values, strict=True):
        if value is None or not value.isdecimal():
            found = "is not set" if value is None else f"is {value!r}"
            raise ValueError(
                f"{name} {found}: {launcher} sets {', '.join(names)} to whole numbers; "
                "set all of them, or unset them all to run one process"
            )
    rank, world_size, local_rank = map(int, values)
    if rank >= world_size or local_rank >= world_size:
        pairs = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise ValueError(f"{pairs} contradict each other: ranks run from 0 to {names[1]} - 1")
    return Launch(rank, world_size, local_rank, launcher)


def _srun_step(environ):
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    return int(step) if step.isdecimal() and int(step) < FIRST_PSEUDO_STEP else None


def rendezvous(launch: Launch, environ: Mapping[str, str]) -> str:
    """The address where the processes meet: "env://" under torchrun, else "tcp://host:port".

    MASTER_ADDR and MASTER_PORT win where they are set; else it is the first host of the job step
    and a port derived from job and step. Raises ValueError or ConnectionError without an address.
    """
    port = environ.get("MASTER_PORT", "")
    if port and not (port.isdecimal() and 1 <= int(port) <= LAST_PORT):
        raise ValueError(f"MASTER_PORT={port} must be a whole number from 1 to {LAST_PORT}")
    if launch.launcher == "torchrun":
        if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
            raise ValueError("RANK is set, but MASTER_ADDR and MASTER_PORT are not: set both")
        return "env://"
    local = environ.get("SUBMITIT_EXECUTOR") == "local"
    job = environ.get("SUBMITIT_LOCAL_JOB_ID" if local else "SLURM_JOB_ID", "0")
    step = 0 if local else _srun_step(environ) or 0
    port = port or FIRST_PORT + (31 * int(job) + step) % NUM_PORTS
    one_node = local or environ.get("SLURM_STEP_NUM_NODES") == "1"
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if one_node else _first_host(environ))
    return f"tcp://{address}:{port}"


def _first_host(environ):
    names = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    nodes = next((environ[name] for name in names if environ.get(name)), "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return answer.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ConnectionError(
            f"`{' '.join(command)}` names no host ({error}): set MASTER_ADDR to the host of rank 0"
        ) from error


def gpu_index(launch: Launch, count: int, environ: Mapping[str, str]) -> int:
    """Which of the `count` visible GPUs this process takes. Raises ValueError if they run out."""
    if launch.local_rank < count:
        return launch.local_rank
    if count == 1 and ("SLURM_GPUS_PER_TASK" in environ or "SLURM_GPU_BIND" in environ):
        return 0  # Slurm shows each task its own GPU only
    raise ValueError(
        f"local rank {launch.local_rank} has no GPU, {count} visible on this node: "
        f"start at most {count} processes a node, or use --device cpu"
    )


def gpu_numbers(count: int, environ: Mapping[str, str]) -> list[int]:
    """The first `count` numbers in CUDA_VISIBLE_DEVICES; ValueError if it has names instead."""
    names = environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = names.split(",")[:count] if names else [str(n) for n in range(count)]
    if not all(number.strip().isdecimal() for number in numbers):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={names}: submitit needs numbers of GPUs, not names")
    return [int(number) for number in numbers]
