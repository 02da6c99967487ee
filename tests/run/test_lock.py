"""One run at a time writes into a folder."""

import json
import os
import subprocess
import sys
import time

import pytest

from src.errors import CheckpointError
from src.run import lock
from tests.gloo import CONTEXT, run_ranks

HOLD = """
import os, sys, time
from src.run.lock import hold_folder
hold_folder(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


def _hold_for_long(folder, told):
    lock.hold_folder(folder)
    told.send("held")
    time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    heard, told = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_hold_for_long, args=(tmp_path, told), daemon=True)
    process.start()
    assert heard.recv() == "held"
    yield process
    process.kill()
    process.join()


def test_a_folder_that_a_living_process_writes_into_is_refused_with_its_number(tmp_path, holder):
    with pytest.raises(CheckpointError, match=f"being written to by process {holder.pid} on "):
        lock.FolderLock(tmp_path, "run")
    lock.FolderLock(tmp_path, "eval_knn").release()  # an evaluation may work beside a run


def test_who_waits_for_a_process_sees_that_it_was_killed(tmp_path, holder):
    path = tmp_path / "run.lock"
    assert not lock.has_lost_its_writer(path)
    holder.kill()
    holder.join()
    assert lock.has_lost_its_writer(path)
    on_another_host = {**json.loads(path.read_text()), "host": "far"}
    path.write_text(json.dumps(on_another_host))
    assert not lock.has_lost_its_writer(path)  # it may live
    long_ago = time.time() - 2 * lock.SILENT_SECONDS
    os.utime(path, (long_ago, long_ago))
    assert lock.has_lost_its_writer(path)
    assert lock.has_lost_its_writer(tmp_path / "released.lock")


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, holder):
    holder.kill()
    holder.join()
    assert (tmp_path / "run.lock").exists()
    began = time.perf_counter()
    taken = lock.FolderLock(tmp_path, "run")
    assert time.perf_counter() - began < 1
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    taken.release()
    assert not (tmp_path / "run.lock").exists()


def of_another_host(folder, seconds_ago=0.0):
    path = folder / "run.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 2, "job": "17"}))
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def test_a_writer_on_another_host_that_touches_its_lock_is_alive(tmp_path, monkeypatch):
    path = of_another_host(tmp_path)
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.5)
    monkeypatch.setattr(time, "sleep", lambda seconds: os.utime(path, (1, time.time() + 1)))
    with pytest.raises(CheckpointError, match="process 1 on elsewhere, Slurm job 17"):
        lock.FolderLock(tmp_path, "run")


@pytest.mark.slow
def test_a_writer_on_another_host_that_is_silent_is_taken_over(tmp_path, monkeypatch):
    of_another_host(tmp_path, seconds_ago=lock.SILENT_SECONDS + 1)
    lock.FolderLock(tmp_path, "run").release()
    monkeypatch.setattr(lock, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.5)
    of_another_host(tmp_path)
    began = time.perf_counter()
    lock.FolderLock(tmp_path, "run").release()
    assert 0.5 < time.perf_counter() - began < 5


def test_the_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.05)
    held = lock.FolderLock(tmp_path, "run")
    os.utime(held.path, (1, 1))
    deadline = time.perf_counter() + 5
    while held.path.stat().st_mtime == 1 and time.perf_counter() < deadline:
        time.sleep(0.02)
    assert held.path.stat().st_mtime > 1
    held.release()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}'])
def test_a_lock_file_that_says_nothing_is_taken(tmp_path, text):
    (tmp_path / "run.lock").write_text(text)
    lock.FolderLock(tmp_path, "run").release()


def test_where_nothing_can_be_locked_a_dead_process_is_told_from_a_living_one(
    tmp_path, monkeypatch, holder
):
    monkeypatch.setattr(lock, "_lock", lambda file: None)
    with pytest.raises(CheckpointError, match=f"process {holder.pid}"):
        lock.FolderLock(tmp_path, "run")
    holder.kill()
    holder.join()
    lock.FolderLock(tmp_path, "run").release()


@pytest.mark.slow
def test_a_forked_child_does_not_keep_the_lock(tmp_path, holder):
    """Loader workers outlive a killed run for a moment."""
    code = HOLD.replace("print(", "if os.fork(): print(")
    folder = tmp_path / "forked"
    folder.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout.readline() == "held\n"
    parent.kill()
    parent.wait()
    lock.FolderLock(folder, "run").release()
    os.killpg(parent.pid, 9)


def _hold(rank, world_size, folder):
    try:
        lock.hold_folder(folder)
    except CheckpointError as error:
        return str(error)
    lock.release_folders()
    return "held"


def test_all_processes_are_refused_together(tmp_path, holder):
    first, second = run_ranks(_hold, 2, str(tmp_path))
    assert f"process {holder.pid}" in first and "rank 0 could not lock" in second


def test_two_processes_hold_a_folder_together(tmp_path):
    assert run_ranks(_hold, 2, str(tmp_path)) == ["held", "held"]
    assert not (tmp_path / "run.lock").exists()
