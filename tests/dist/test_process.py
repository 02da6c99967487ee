"""Ranks from real environments, the process group, collectives, devices."""

import os
import resource
import stat
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from src import dist
from src.dist.launch import Launch, gpu_index, read_launch, rendezvous
from src.errors import RunError
from src.run import flags
from tests.gloo import CONTEXT, run_ranks

ROOT = Path(__file__).parents[2]

# ============ environments as launchers make them ============

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "MASTER_ADDR": "node7", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
# An allocation of 8 nodes, as a batch script or an salloc shell sees it: no task was started.
ALLOCATION = {
    "SLURM_JOB_ID": "4217", "SLURM_JOBID": "4217", "SLURM_NTASKS": "64", "SLURM_NPROCS": "64",
    "SLURM_NNODES": "8", "SLURM_JOB_NUM_NODES": "8", "SLURM_NODELIST": "gpu[001-008]",
    "SLURM_JOB_NODELIST": "gpu[001-008]", "SLURM_TASKS_PER_NODE": "8(x8)", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0", "SLURM_NTASKS_PER_NODE": "8",
}  # fmt: skip
# A task of `srun` in it.
STEP = ALLOCATION | {
    "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NUM_NODES": "8",
    "SLURM_STEP_NODELIST": "gpu[001-008]", "SLURM_STEP_NUM_TASKS": "64", "SLURM_PROCID": "13",
    "SLURM_LOCALID": "5", "SLURM_NODEID": "1",
}  # fmt: skip
# 20 tasks on nodes of 8, 8 and 4, and 24 on two nodes of 12.
UNEVEN = STEP | {
    "SLURM_NTASKS": "20", "SLURM_TASKS_PER_NODE": "8(x2),4", "SLURM_PROCID": "19",
    "SLURM_LOCALID": "3", "SLURM_STEP_NUM_NODES": "3",
}  # fmt: skip
TWELVE = STEP | {
    "SLURM_NTASKS": "24", "SLURM_TASKS_PER_NODE": "12(x2)", "SLURM_PROCID": "23",
    "SLURM_LOCALID": "11", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip
ONE_NODE = STEP | {
    "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "8", "SLURM_PROCID": "7", "SLURM_LOCALID": "7",
    "SLURM_STEP_NUM_NODES": "1", "SLURM_NODELIST": "gpu001", "SLURM_STEP_NODELIST": "gpu001",
}  # fmt: skip
LOCAL = {
    "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_JOB_ID": "31337", "SUBMITIT_LOCAL_NODEID": "0",
    "SUBMITIT_LOCAL_JOB_NUM_NODES": "1", "SUBMITIT_FOLDER": "/tmp/runs/submitit/%j",
}  # fmt: skip
SUBMITIT = {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": "/checkpoint/runs/%j"}

ENVIRONMENTS = {
    "nothing": ({}, (0, 1, 0, "single")),
    "torchrun": (TORCHRUN, (3, 4, 1, "torchrun")),
    "torchrun of one process": (
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        (0, 1, 0, "torchrun"),
    ),
    "one process without LOCAL_RANK": ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, "torchrun")),
    "torchrun inside salloc": (ALLOCATION | TORCHRUN, (3, 4, 1, "torchrun")),
    "torchrun started by srun": (STEP | TORCHRUN, (3, 4, 1, "torchrun")),
    "torchrun inside submitit": (LOCAL | TORCHRUN, (3, 4, 1, "torchrun")),
    "submitit local": (LOCAL, (1, 2, 1, "submitit")),
    "submitit local inside salloc": (STEP | LOCAL, (1, 2, 1, "submitit")),
    "submitit on slurm": (STEP | SUBMITIT, (13, 64, 5, "submitit")),
    "submitit debug": ({"SUBMITIT_DEBUG_JOB_ID": "DEBUG_1"}, (0, 1, 0, "single")),
    "srun on one node": (ONE_NODE, (7, 8, 7, "srun")),
    "srun on many nodes": (STEP, (13, 64, 5, "srun")),
    "srun with 8(x2),4 tasks a node": (UNEVEN, (19, 20, 3, "srun")),
    "srun with 12 tasks a node": (TWELVE, (23, 24, 11, "srun")),
    "second srun of a job": (STEP | {"SLURM_STEP_ID": "1"}, (13, 64, 5, "srun")),
    "srun of an older Slurm": (
        {k: v for k, v in STEP.items() if k != "SLURM_STEP_ID"},
        (13, 64, 5, "srun"),
    ),
    "python in a batch script": (ALLOCATION, (0, 1, 0, "single")),
    "python in a numbered batch step": (
        ALLOCATION | {"SLURM_STEP_ID": "4294967291"},
        (0, 1, 0, "single"),
    ),
    "python in an interactive step": (
        ALLOCATION | {"SLURM_STEP_ID": "4294967290", "SLURM_PTY_PORT": "44263"},
        (0, 1, 0, "single"),
    ),
    "python on a login node with a job id": ({"SLURM_JOB_ID": "4217"}, (0, 1, 0, "single")),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_ranks_of_real_environments(name):
    environ, expected = ENVIRONMENTS[name]
    assert dist.read_environment(environ) == Launch(*expected)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4, WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_RANK": "5"}, "LOCAL_RANK=5 contradict"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "contradict"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'"),
        (STEP | {"SLURM_NTASKS": "8(x8)"}, "SLURM_NTASKS is '8(x8)'"),
        ({k: v for k, v in STEP.items() if k != "SLURM_NTASKS"}, "SLURM_NTASKS is not set"),
        (LOCAL | {"SUBMITIT_LOCAL_GLOBALID": "2"}, "SUBMITIT_LOCAL_GLOBALID=2"),
    ],
)
def test_contradictions_are_one_sentence(environ, words):
    with pytest.raises(ValueError, match=".") as error:
        dist.read_environment(environ)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# ============ where the processes meet ============


def address(environ):
    return rendezvous(dist.read_environment(environ), environ)


def fake_program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_addresses_without_asking_slurm():
    assert address(TORCHRUN) == "env://"
    assert address(ONE_NODE) == "tcp://127.0.0.1:20727"  # 10000 + 31 * 4217 mod 20000
    assert address(LOCAL) == "tcp://127.0.0.1:21447"
    set_by_hand = {"MASTER_ADDR": "gpu009", "MASTER_PORT": "2345"}
    assert address(STEP | set_by_hand) == "tcp://gpu009:2345"
    assert address(STEP | SUBMITIT | set_by_hand) == "tcp://gpu009:2345"
    assert address(STEP | {"MASTER_ADDR": "gpu009"}) == "tcp://gpu009:20727"
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT"):
        address({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


def test_two_steps_of_a_job_and_two_jobs_meet_at_different_ports():
    later = STEP | {"MASTER_ADDR": "a"}
    environs = [later, later | {"SLURM_STEP_ID": "1"}, later | {"SLURM_JOB_ID": "4218"}]
    ports = [int(address(environ).rsplit(":", 1)[1]) for environ in environs]
    assert len(set(ports)) == 3
    assert all(10000 <= port < 30000 for port in ports)


def test_scontrol_names_the_first_host_of_the_step(tmp_path, monkeypatch):
    fake_program(
        tmp_path, "scontrol", 'test "$*" = "show hostnames big[03-04]" && printf "big03\\nbig04\\n"'
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    environ = STEP | {"SLURM_STEP_NODELIST": "big[03-04]"}
    assert address(environ) == "tcp://big03:20727"
    assert address(environ | SUBMITIT) == "tcp://big03:20727"


@pytest.mark.parametrize("script", [None, "exit 1", "true"])
def test_without_an_answer_of_scontrol_the_user_is_told_of_master_addr(
    script, tmp_path, monkeypatch
):
    if script:
        fake_program(tmp_path, "scontrol", script)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConnectionError, match="set MASTER_ADDR"):
        address(STEP)


def test_each_process_takes_the_gpu_of_its_local_rank():
    launch = Launch(13, 64, 5, "srun")
    assert gpu_index(launch, 8, STEP) == 5
    assert gpu_index(launch, 1, STEP | {"SLURM_GPUS_PER_TASK": "1"}) == 0
    with pytest.raises(ValueError, match="at most 4 processes a node"):
        gpu_index(launch, 4, STEP)
    with pytest.raises(ValueError, match="at most 1 processes a node"):
        gpu_index(launch, 1, STEP)


def test_the_job_to_requeue():
    assert dist.slurm_job_id(STEP) == "4217"
    assert dist.slurm_job_id({}) is None
    assert dist.slurm_job_id(STEP | SUBMITIT) is None


# ============ the first thing of a process ============
def test_scripts_and_whoever_starts_without_them_settle_the_vector_functions_first(monkeypatch):
    done = []
    for module in (dist, dist.process):
        monkeypatch.setattr(module, "settle_vector_functions", lambda: done.append("settled"))
    with pytest.raises(SystemExit):
        flags.run(lambda: done.append("main"))
    assert done == ["settled", "main"]
    dist.init("cpu")  # as a task of submitit, or a user's own code
    assert done == ["settled", "main", "settled"]


FIRST_EXPONENTIALS = """
import math, os, torch
from src import dist

def is_wrong():
    dist.settle_vector_functions()
    torch.set_num_threads(2)
    torch.ones(210, 16) @ torch.ones(16, 420)
    x = torch.linspace(2, 13, 2100)
    pairs = zip(torch.exp(x).tolist(), x.tolist())
    return any(abs(y / math.exp(value) - 1) > 1e-6 for y, value in pairs)

failures = 0
for _ in range(125):
    children = []
    for _ in range(4):  # more threads than cores: one of two is late more often
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                status = int(is_wrong())
            finally:
                os._exit(status)
    failures += sum(os.waitpid(child, 0)[1] != 0 for child in children)
print(failures)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on a machine that has nothing else to do
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_first_exponential_of_500_processes_on_two_threads_is_right():
    """Without settle_vector_functions it is wrong by 1.5e-4 in up to 1 of 300, on some processors: in
    500 that is seen with 81 %."""
    command = [sys.executable, "-c", FIRST_EXPONENTIALS]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert (found.stdout, found.stderr) == ("0\n", "")


# ============ the process group ============


def _sum_of_ranks(environ, queue, timeout):
    torch.set_num_threads(1)
    os.environ.update(environ)
    try:
        process = dist.init("cpu", timeout=timeout)
        total = dist.all_reduce_sum(torch.tensor(process.rank + 1)).item()
        again = dist.init("cpu")
        dist.shutdown()
        queue.put((process.rank, process.launcher, again == process, total, dist.world_size()))
    except Exception as error:  # the parent shows it
        queue.put((-1, repr(error)))


def started(environs, timeout=60):
    queue = CONTEXT.SimpleQueue()
    processes = [CONTEXT.Process(target=_sum_of_ranks, args=(e, queue, timeout)) for e in environs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    return sorted(queue.get() for _ in environs)


def test_srun_and_submitit_processes_meet_without_a_fixed_port(tmp_path):
    fake_program(tmp_path, "scontrol", "echo localhost")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    job = str(os.getpid())
    srun = [
        STEP | {"SLURM_JOB_ID": job, "SLURM_NTASKS": "2", "SLURM_PROCID": rank, "PATH": path}
        for rank in ("0", "1")
    ]
    for environ in srun:
        environ["SLURM_LOCALID"] = "0"  # two nodes
    local = [
        LOCAL | {"SUBMITIT_LOCAL_GLOBALID": rank, "SUBMITIT_LOCAL_LOCALID": rank}
        for rank in ("0", "1")
    ]
    for environ in local:
        environ["SUBMITIT_LOCAL_JOB_ID"] = job + "7"
    assert started(srun) == [(0, "srun", True, 3, 1), (1, "srun", True, 3, 1)]
    assert started(local) == [(0, "submitit", True, 3, 1), (1, "submitit", True, 3, 1)]


@pytest.mark.parametrize("port", ["abc", "99999", "0", "-1", "29400 "])
def test_a_port_that_is_none_is_named(port):
    for environ in (TORCHRUN, ONE_NODE):
        environ = environ | {"MASTER_ADDR": "node7", "MASTER_PORT": port}
        with pytest.raises(ValueError, match=f"MASTER_PORT={port} must be a whole number from 1"):
            rendezvous(read_launch(environ), environ)


def test_half_precision_on_a_cpu_is_said_to_be_slow(caplog):
    caplog.set_level("INFO")
    assert dist.resolve_precision("bf16", torch.device("cpu")) == "bf16" and not caplog.text
    assert dist.resolve_precision("fp16", torch.device("cuda")) == "fp16" and not caplog.text
    assert dist.resolve_precision("fp16", torch.device("cpu")) == "fp16"
    assert "--precision fp16 is slow on a CPU" in caplog.text


@pytest.mark.slow
def test_a_rank_that_waits_in_vain_says_where():
    [(rank, message)] = started([ONE_NODE | {"MASTER_PORT": "9"}], timeout=1)
    assert rank == -1
    assert "rank 7 of 8 did not meet the others at tcp://127.0.0.1:9" in message
    assert "start all within --dist_timeout 1 seconds" in message


@pytest.mark.slow
def test_torchrun_and_plain_python_run_the_same_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom src import dist\n"
        "process = dist.init('cpu')\n"
        "total = dist.all_reduce_sum(torch.tensor(1))\n"
        f"open(f'{tmp_path}/' + str(process.rank), 'w').write(f'{{process.launcher}} {{total}}')\n"
        "dist.shutdown()\n"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, str(script)], env=environ | ALLOCATION, check=True, timeout=100)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "torchrun 2"
    subprocess.run([sys.executable, str(script)], env=environ | ALLOCATION, check=True, timeout=100)
    assert (tmp_path / "0").read_text() == "single 1"


# ============ collectives ============

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def _reduce_all(rank, world_size):
    found = {}
    for dtype in DTYPES:
        tensor = (torch.arange(6).reshape(2, 3).T + rank).to(dtype)  # not contiguous
        before = tensor.clone()
        total = dist.all_reduce_sum(tensor)
        assert total.dtype == dtype and torch.equal(tensor, before) and total is not tensor
        found[str(dtype), "sum"] = total.to(torch.complex64).numpy()
        if not dtype.is_complex:
            top = dist.all_reduce_max(tensor)
            assert top.dtype == dtype and torch.equal(tensor, before)
            found[str(dtype), "max"] = top.to(torch.complex64).numpy()
    assert dist.all_reduce_sum(torch.zeros(0, 3)).shape == (0, 3)
    assert dist.all_reduce_max(torch.tensor(rank)).item() == world_size - 1
    assert dist.is_main() == (rank == 0) and dist.rank() == rank
    assert dist.world_size() == world_size
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_reductions_of_every_dtype(world_size):
    start = np.arange(6).reshape(2, 3).T[None] + np.arange(world_size)[:, None, None]  # (W, 3, 2)
    if world_size == 1:
        tensor = torch.ones(3)
        assert dist.all_reduce_sum(tensor) is tensor
        assert dist.all_reduce_max(tensor) is tensor
        return
    for found in run_ranks(_reduce_all, world_size):
        for (dtype, kind), value in found.items():
            each = start != 0 if dtype == "torch.bool" else start
            expected = getattr(each, kind)(0)
            if dtype == "torch.bool":
                expected = expected > 0
            np.testing.assert_array_equal(value, expected, err_msg=f"{dtype} {kind}")


def _half_sum(rank, world_size):
    value = torch.tensor([6e4 if rank < 2 else -6e4], dtype=torch.float16)
    return dist.all_reduce_sum(value).item()


def test_half_precision_is_added_in_float32():
    assert run_ranks(_half_sum, 4) == [0.0] * 4  # 6e4 + 6e4 is infinite in float16


def _gather_all(rank, world_size, lengths):
    found = {}
    for dtype in DTYPES:
        for shape in [(), (3,), (2, 2), (0,)]:
            rows = lengths[rank]
            size = [rows, *shape]
            tensor = (torch.arange(torch.Size(size).numel()) + 10 * rank).reshape(size).to(dtype)
            gathered = dist.all_gather_rows(tensor)
            assert gathered.dtype == dtype
            assert gathered.shape == (sum(lengths), *shape), (gathered.shape, shape)
            found[str(dtype), shape] = gathered.to(torch.complex64).numpy()
    return found


@pytest.mark.parametrize("lengths", [[2, 2], [3, 0], [0, 0], [1, 4, 0, 2], [0, 0, 0, 5]])
def test_rows_are_gathered_by_rank_however_many_each_has(lengths):
    for found in run_ranks(_gather_all, len(lengths), lengths):
        for (dtype, shape), value in found.items():
            parts = [
                np.arange(n * int(np.prod(shape))).reshape(n, *shape) + 10 * rank
                for rank, n in enumerate(lengths)
            ]
            expected = np.concatenate(parts)
            if dtype == "torch.bool":
                expected = expected != 0
            np.testing.assert_array_equal(value, expected, err_msg=f"{dtype} {shape}")


def _gather_other_rows(rank, world_size):
    with pytest.raises(ValueError, match=r"rows of \[12, 16\] bytes"):
        dist.all_gather_rows(torch.zeros(2, 3 + rank))
    return dist.all_gather_rows(torch.tensor([rank])).tolist()  # and nobody hangs


def test_rows_of_different_size_are_an_error_on_every_rank():
    assert run_ranks(_gather_other_rows, 2) == [[0, 1], [0, 1]]
    tensor = torch.ones(3, 2)
    assert dist.all_gather_rows(tensor) is tensor


def _broadcast_all(rank, world_size):
    source = world_size - 1
    for dtype in DTYPES:
        tensor = torch.full((3, 2), rank).to(dtype).T
        result = dist.broadcast(tensor, source=source)
        assert result.dtype == dtype and result.shape == (2, 3)
        assert torch.equal(result, torch.full((2, 3), source).to(dtype))
        assert torch.equal(tensor, torch.full((2, 3), rank).to(dtype))
    assert dist.broadcast(torch.zeros(0), source=source).shape == (0,)
    numbers = [dist.broadcast(torch.tensor(rank + 0.5)).item()]
    numbers.append(dist.broadcast_object({"rank": rank, "name": "x" * rank}, source))
    dist.barrier()
    return numbers


@pytest.mark.parametrize("world_size", [2, 4])
def test_broadcasts(world_size):
    last = world_size - 1
    expected = [0.5, {"rank": last, "name": "x" * last}]
    assert run_ranks(_broadcast_all, world_size) == [expected] * world_size


def test_one_process_needs_no_group():
    process = dist.init("cpu")
    assert (process.rank, process.world_size, process.local_rank) == (0, 1, 0)
    assert process.device == torch.device("cpu")
    tensor, value = torch.ones(2), object()
    assert dist.broadcast(tensor) is tensor
    assert dist.broadcast_object(value) is value
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    dist.barrier()
    dist.shutdown()


def _barrier_times(rank, world_size, folder):
    if rank == 0:
        import time

        time.sleep(0.3)
        (Path(folder) / "here").touch()
    dist.barrier()
    return (Path(folder) / "here").exists()


def test_nobody_passes_the_barrier_before_the_last_has_come(tmp_path):
    assert run_ranks(_barrier_times, 2, str(tmp_path)) == [True, True]


def _wait_for_main(rank, world_size, limit, seconds):
    """What on_main gives where collectives wait for `limit` seconds, and what all are told of an error."""
    group = torch.distributed.new_group(list(range(world_size)), timedelta(seconds=limit))

    def work():
        time.sleep(seconds)
        return "done"

    def fail():
        raise KeyError("no such cluster")

    with dist.within(group):
        result = dist.on_main(work)
        with pytest.raises((RunError, KeyError)) as error:
            dist.on_main(fail)
        total = dist.all_reduce_sum(torch.ones(1)).item()  # the group goes on
    return result, type(error.value).__name__, str(error.value), total


@pytest.mark.slow
def test_work_of_the_main_process_may_take_longer_than_a_collective():
    first, second = run_ranks(_wait_for_main, 2, 1.0, 1.5)
    assert first == ("done", "KeyError", "'no such cluster'", 2.0)
    assert second[:2] == (None, "RunError") and second[3] == 2.0
    assert "process 0" in second[2] and "no such cluster" in second[2]
    assert dist.on_main(lambda: 3) == 3


def _inside_a_group(rank, world_size):
    halves = [[0, 1], [2, 3]]
    mine = dist.new_groups(halves)[rank // 2]
    alone = dist.new_groups([[0], [1], [2], [3]])[rank]
    with dist.within(mine):
        found = {
            "place": (dist.rank(), dist.world_size(), dist.is_main()),
            "sum": dist.all_reduce_sum(torch.tensor([float(rank)])).item(),
            "max": dist.all_reduce_max(torch.tensor(rank)).item(),
            "rows": dist.all_gather_rows(torch.full((rank % 2 + 1,), rank)).tolist(),
            "from 1": dist.broadcast(torch.tensor(rank), source=1).item(),
            "object from 1": dist.broadcast_object(str(rank), source=1),
        }
    found["outside"] = dist.all_reduce_sum(torch.tensor(rank)).item()
    with dist.within(alone):
        found["alone"] = dist.all_reduce_sum(torch.tensor(rank)).item()
    return found


def test_inside_a_group_collectives_and_ranks_are_those_of_its_processes():
    for rank, found in enumerate(run_ranks(_inside_a_group, 4)):
        first = rank // 2 * 2
        assert found == {
            "place": (rank % 2, 2, rank % 2 == 0),
            "sum": 2.0 * first + 1,
            "max": first + 1,
            "rows": [first, first + 1, first + 1],
            "from 1": first + 1,
            "object from 1": str(first + 1),
            "outside": 6,
            "alone": rank,
        }


# ============ devices ============


def test_device_names():
    assert dist.resolve_device("cpu") == torch.device("cpu")
    assert dist.resolve_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "cuda:x", "cpux"):
        with pytest.raises(ValueError, match="--device must be auto"):
            dist.resolve_device(name)
    with pytest.raises(ValueError, match="--device cuda:99 is not there"):
        dist.resolve_device("cuda:99")


def test_precision_of_the_cpu():
    cpu = torch.device("cpu")
    assert dist.default_precision(cpu) == "fp32"
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with dist.autocast(cpu, "bf16"):
        assert layer(x).dtype == torch.bfloat16
        with dist.autocast(cpu, "fp32"):
            assert layer(x).dtype == torch.float32
    assert not dist.grad_scaler(cpu, "fp16").is_enabled()
    with pytest.raises(ValueError, match="--precision"):
        dist.autocast(cpu, "fp8")
    dist.synchronize(cpu)


@pytest.mark.slow
def test_peak_memory_grows_by_what_is_held():
    """In a process of its own: a peak is not reached twice, nor inherited from one that holds more."""
    code = (
        "import torch; from src import dist; cpu = torch.device('cpu')\n"
        "first = torch.ones(50_000_000)  # beyond what importing needed at its peak\n"
        "before = dist.peak_memory_mb(cpu); held = torch.ones(50_000_000)  # 200 MB\n"
        "assert 150 < dist.peak_memory_mb(cpu) - before < 300"
    )
    command = [sys.executable, "-c", code]
    parent = f"import subprocess; x = bytearray(12 * 10**8); subprocess.run({command}, check=True)"
    subprocess.run([sys.executable, "-c", parent], cwd=ROOT, check=True)


@pytest.mark.parametrize("status", [None, "Name: python\nVmRSS: 5 kB\n"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads files of Linux")
def test_peak_memory_where_the_system_does_not_say_it_is_that_of_getrusage(
    status, monkeypatch, tmp_path
):
    if status:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(dist.process, "open", lambda path: open(tmp_path / "status"), raising=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    assert dist.peak_memory_mb(torch.device("cpu")) == pytest.approx(peak, rel=0.01)
