"""Signals stop all processes at the same iteration, and a job that shall go on is requeued."""

import os
import signal
import threading

import pytest

from src.run.stop import StopSignal, requeue_slurm_job
from tests.dist.test_process import ALLOCATION, ONE_NODE, STEP, fake_program
from tests.gloo import run_ranks

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no user signals here")


@pytest.fixture
def stop():
    stop = StopSignal()
    yield stop
    stop.restore()


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_sets_a_flag_and_a_second_one_does_not_kill(name, stop):
    assert not stop.requested and stop.name is None and not stop.agreed()
    send(name)
    send(name)
    assert stop.requested and stop.name == name
    assert stop.agreed() and stop.agreed()


def test_a_user_signal_outweighs_a_cancellation(stop):
    send("SIGTERM")
    send("SIGUSR1")
    send("SIGTERM")
    assert stop.name == "SIGUSR1"


def test_handlers_are_put_back():
    caught = []
    before = signal.signal(signal.SIGUSR1, lambda *args: caught.append(args[0]))
    stop = StopSignal()
    send("SIGUSR1")
    assert stop.requested and not caught
    stop.restore()
    send("SIGUSR1")
    assert caught == [signal.SIGUSR1]
    signal.signal(signal.SIGUSR1, before)


def test_while_nothing_is_to_be_saved_a_signal_means_what_it_meant_before():
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *args: caught.append(args[0]))
    stop = StopSignal()
    with stop.at_once():
        send("SIGTERM")
    assert caught == [signal.SIGTERM] and not stop.requested
    send("SIGTERM")
    assert caught == [signal.SIGTERM] and stop.requested
    with stop.at_once():  # and one of before is not forgotten
        assert caught == [signal.SIGTERM] * 2
    stop.restore()
    signal.signal(signal.SIGTERM, before)


def test_a_forked_worker_neither_dies_of_the_signal_nor_takes_it_for_its_own(stop):
    child = os.fork()
    if child == 0:
        send("SIGTERM")
        os._exit(1 if stop.requested else 0)
    assert os.waitpid(child, 0)[1] == 0
    assert not stop.requested


def test_a_thread_catches_nothing():
    made, before = [], signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=lambda: made.append(StopSignal()))
    thread.start()
    thread.join()
    assert not made[0].requested
    assert signal.getsignal(signal.SIGUSR1) == before


def _iterations_until_stopped(rank, world_size, sender):
    stop = StopSignal()
    for iteration in range(100):
        if iteration == 3 and rank in sender:
            send(sender[rank])
        if stop.agreed():
            return iteration, stop.name
    return None


@pytest.mark.parametrize(
    ("sender", "name"),
    [
        ({1: "SIGUSR1"}, "SIGUSR1"),
        ({0: "SIGTERM", 1: "SIGUSR1"}, "SIGUSR1"),
        ({0: "SIGTERM", 1: "SIGTERM"}, "SIGTERM"),
    ],
)
def test_all_processes_stop_at_the_same_iteration(sender, name):
    assert run_ranks(_iterations_until_stopped, 2, sender) == [(3, name)] * 2


# ============ requeueing ============


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(environ) makes the environment of a job; returns what a fake scontrol was asked."""
    record = tmp_path / "asked"
    fake_program(tmp_path, "scontrol", f'echo "$@" >> {record}')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def start(environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return lambda: record.read_text().splitlines() if record.exists() else []

    return start


RANK_0 = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environ", "name", "asked"),
    [
        (RANK_0, "SIGUSR1", ["requeue 4217"]),
        (RANK_0, "SIGUSR2", ["requeue 4217"]),
        (RANK_0, "SIGTERM", []),  # scancel: the user wants it to end
        (RANK_0, None, []),
        (ONE_NODE, "SIGUSR1", []),  # rank 7
        (ALLOCATION, "SIGUSR1", ["requeue 4217"]),  # python in a batch script
        ({}, "SIGUSR1", []),
    ],
)
def test_a_timed_out_slurm_job_is_requeued_by_rank_0(environ, name, asked, stop, slurm):
    record = slurm(environ)
    if name:
        send(name)
    assert requeue_slurm_job(stop) == bool(asked)
    assert record() == asked


def test_without_a_stop_signal_the_caller_has_decided(slurm):
    record = slurm(RANK_0)
    assert requeue_slurm_job()
    assert record() == ["requeue 4217"]


def test_a_failed_requeue_says_what_to_do(stop, slurm, tmp_path, caplog):
    slurm(RANK_0)
    fake_program(tmp_path, "scontrol", "echo Job can not be requeued >&2; exit 1")
    send("SIGUSR1")
    assert not requeue_slurm_job(stop)
    assert "`scontrol requeue 4217`: Job can not be requeued; submit the job again" in caplog.text


def test_under_submitit_its_own_handler_requeues(slurm):
    record = slurm(RANK_0 | {"SUBMITIT_EXECUTOR": "slurm"})
    calls = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(number))
    stop = StopSignal()
    send("SIGUSR2")
    assert not calls  # not in the middle of an iteration
    assert requeue_slurm_job(stop)
    assert calls == [signal.SIGUSR2] and record() == []
    stop.restore()
    signal.signal(signal.SIGUSR2, before)
