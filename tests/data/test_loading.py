"""Loader processes start deaf, share what they say, end with the main process; their errors are ours."""

import os
import signal

import pytest
import torch
from torch.utils.data import Dataset

from src.data import loading
from src.data.loading import Loader, shared_bytes
from src.errors import NO_SHARED_MEMORY, RunError, explain

fork_only = pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="no fork here")


class Numbers(Dataset):
    """Its samples are what a function of their index returns."""

    def __init__(self, function, length=8):
        self.function, self.length = function, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor(self.function(index))


def load(function, workers=1, **options):
    return Loader(Numbers(function), num_workers=workers, device_type="cpu", **options)


def test_what_processes_share_is_not_in_dev_shm():
    shared = shared_bytes(3)
    assert shared.tolist() == [0, 0, 0] and len(shared_bytes(0)) == 0
    if not hasattr(os, "fork"):
        return
    child = os.fork()
    if child == 0:
        shared[1] = 7
        os._exit(0)
    os.waitpid(child, 0)
    assert shared.tolist() == [0, 7, 0] and not shared.is_shared()


def test_a_batch_of_a_worker_is_shared_before_it_is_sent():
    (batch,) = list(load(lambda index: index, batch_size=8))
    assert batch.tolist() == list(range(8)) and batch.is_shared()


SENDS = []  # signals that each forked process gets at once, before it can do anything


@fork_only
@pytest.mark.parametrize("name", loading.STOP_SIGNALS)
def test_a_signal_does_not_end_a_worker_that_is_being_started(name):
    if not SENDS:
        os.register_at_fork(
            after_in_child=lambda: [os.kill(os.getpid(), getattr(signal, name)) for name in SENDS]
        )
    SENDS[:] = [name]
    try:
        assert len(list(load(lambda index: index, workers=2, batch_size=2))) == 4
    finally:
        SENDS[:] = ["SIGCHLD"]  # which does nothing: what is registered stays


@fork_only
def test_a_worker_hears_no_signal_of_the_group():
    def send(index):
        for name in loading.STOP_SIGNALS:
            os.kill(os.getpid(), getattr(signal, name))
        return index

    assert torch.cat(list(load(send, batch_size=2))).tolist() == list(range(8))


@fork_only
@pytest.mark.parametrize("blocks", [False, True])
def test_a_worker_that_sends_nothing_ends_the_wait(blocks):
    import time

    loader = load(lambda index: time.sleep(60) or index, timeout=0.5)
    if blocks:  # as where torch itself waits for more than its limit
        loader.timeout, waiting = 0, loading._CheckedBatches(iter(loader), 0.5)
    else:
        waiting = iter(loader)
    with pytest.raises((RuntimeError, TimeoutError), match="timed out") as error:
        next(waiting)
    assert "--loader_timeout" in explain(error.value)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch complains of those killed
    for worker in torch.multiprocessing.active_children():
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, before)


def test_no_shared_memory_is_said_before_a_process_is_started(monkeypatch):
    def refuse():
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(loading.multiprocessing, "Event", refuse)
    with pytest.raises(RunError, match=r"--workers 1: .*\(Read-only file system\).*--workers 0"):
        iter(load(lambda index: index))
    assert len(list(load(lambda index: index, workers=0))) == 8


@fork_only
def test_a_dead_worker_is_one_sentence():
    with pytest.raises(RuntimeError) as error:
        list(load(lambda index: os.kill(os.getpid(), signal.SIGKILL)))
    assert explain(error.value).startswith("a loader process was killed")


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()]
)
def test_a_worker_that_dies_while_its_batch_is_taken_over_is_the_same_sentence(error):
    def batches():
        yield 0
        raise error

    checked = loading._CheckedBatches(batches(), seconds=0)
    assert next(checked) == 0
    with pytest.raises(RuntimeError) as raised:
        next(checked)
    assert explain(raised.value).startswith("a loader process was killed")


def test_a_connection_that_a_living_worker_lost_is_its_own_error():
    def batches():
        raise ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0.")
        yield

    with pytest.raises(ConnectionResetError):
        next(loading._CheckedBatches(batches(), seconds=0))


@pytest.mark.parametrize(
    "message, words",
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is", NO_SHARED_MEMORY),
        ("unable to allocate shared memory(shm) for file </torch_1>: No space", NO_SHARED_MEMORY),
        ("unable to open shared memory object </torch_1> in read-write mode: x", NO_SHARED_MEMORY),
        ("unable to open shared memory object </t>: Too many open files (24)", "ulimit -n"),
        ("received 0 items of ancdata", "ulimit -n"),
        ("DataLoader timed out after 9 seconds", "--loader_timeout"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "--workers"),
        ("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [::1]:1", "another process"),
        ("[gloo/transport/tcp/pair.cc:1] Connection reset by peer", "another process"),
        ("[gloo/x.cc:1] Timed out waiting 5000ms for recv operation", "--dist_timeout"),
        ("Application timeout caused pair closure", "--dist_timeout"),
        ("NCCL error\nncclRemoteError: remote process exited or there was a network error", "log"),
    ],
)
def test_what_fails_outside_the_program_is_explained(message, words):
    assert words in explain(RuntimeError(message))
    wrapped = RuntimeError("something went wrong")
    wrapped.__cause__ = RuntimeError(message)
    assert words in explain(wrapped)


def test_other_errors_are_not_explained():
    for error in (RuntimeError("shapes do not match"), KeyError("x"), MemoryError()):
        assert explain(error) is None
