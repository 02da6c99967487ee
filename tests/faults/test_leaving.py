"""Every script ends within ten seconds of a signal, a dead process, a full /dev/shm; with what status."""

import signal
import sys

import pytest

from tests.faults import methods
from tests.faults.harness import (
    DIGITS,
    END_SECONDS,
    can_mount,
    fake_scontrol,
    jpegs,
    start,
    start_ranks,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
LONG = [*DIGITS, "--epochs", 1000, "--log_freq", 1]
# Command lines that start processes which read images for features or for training.
STARTING_WORKERS = {
    "main_swav": LONG,
    "main_deepcluster": LONG,
    "main_deepercluster": LONG,
    "main_clusterfit": ["--data_path", "digits", "--device", "cpu"],
    "eval_knn": ["--data_path", "digits", "--device", "cpu"],
    "eval_linear": ["--data_path", "digits", "--device", "cpu", "--epochs", 500],
}


def fork(script, folder, *argv):
    """Start a script without the seconds in which it loads torch."""
    [started] = methods.start_forks(script, folder, argv, 1)
    return started


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return jpegs(tmp_path_factory.mktemp("data") / "images", each=600, size=200)


# ============ signals ============
@pytest.mark.parametrize("script", ["main_swav.py", "eval_knn.py", "visualize.py"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_while_torch_is_loaded_is_one_line(script, name, tmp_path):
    environ, asked = fake_scontrol(tmp_path)
    script = start(script, tmp_path / "run", environ=environ)
    script.wait_until(script.catches)
    script.send(name)
    ending = script.ending()
    assert ending.status == 128 + getattr(signal, name)
    assert ending.screen.splitlines()[-1] == f"stopped by {name}"
    assert "Traceback" not in ending.screen
    assert (asked.read_text() if asked.exists() else "") == "requeue 4217\n" * (name == "SIGUSR1")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_wait_for_processes_that_never_come(name, tmp_path):
    [script] = start_ranks("main_swav.py", tmp_path / "run", *LONG, processes=2, absent=1)
    script.wait_until(script.says("meets the others"))
    script.send(name)
    ending = script.ending()
    assert ending.status == 128 + getattr(signal, name)
    assert ending.screen.splitlines()[-1] == f"stopped by {name}"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
@pytest.mark.parametrize("script", STARTING_WORKERS)
def test_a_signal_to_the_group_while_loaders_start_is_not_theirs(script, name, tmp_path):
    argv = STARTING_WORKERS[script]
    script = fork(script, tmp_path / "run", *argv, "--workers", 2)
    script.wait_until(script.workers)
    script.send(name)
    ending = script.ending(within=30)  # training finishes an iteration and is saved first
    assert ending.status == 128 + getattr(signal, name), ending.screen
    assert "Traceback" not in ending.screen and f"stopped by {name}" in ending.screen


def test_a_signal_in_the_knn_of_a_run_is_not_delayed_and_the_next_start_makes_up_for_it(
    photographs, tmp_path
):
    argv = [*DIGITS, "--data_path", photographs, "--preset", "tiny", "--workers", 0]
    argv += ["--knn_freq", 1, "--epochs", 1, "--batch_size", 600]
    folder = tmp_path / "run"
    script = fork("main_swav", folder, *argv)
    script.wait_until((folder / "checkpoint.pth").exists)
    script.send("SIGTERM")
    ending = script.ending()
    assert ending.status == 143 and "20-NN" not in ending.screen
    assert ending.screen.splitlines()[-1].startswith("stopped by SIGTERM")
    assert not (folder / "run.lock").exists()
    again = fork("main_swav", folder, *argv).ending(within=120)
    assert again.status == 0 and again.screen.count("20-NN") == 1


# ============ dead and stopped processes ============
def evaluate_slowly(images, folder, *argv):
    """k-NN by a network that is slow enough to be hurt meanwhile."""
    argv = ["--data_path", images, "--arch", "resnet50", "--device", "cpu", *argv]
    script = fork("eval_knn", folder, *argv, "--workers", 2, "--batch_size", 8)
    script.wait_until(lambda: len(script.workers()) == 2 and script.says("images/s")())
    return script


def test_a_killed_loader_of_an_evaluation_is_one_sentence(photographs, tmp_path):
    script = evaluate_slowly(photographs, tmp_path / "run")
    script.send("SIGKILL", to=script.workers()[0])
    ending = script.ending()
    assert ending.status == 1 and "Traceback" not in ending.screen
    assert ending.screen.splitlines()[-1].startswith("error: a loader process was killed")


def test_one_ctrl_c_ends_an_evaluation(photographs, tmp_path):
    script = evaluate_slowly(photographs, tmp_path / "run")
    script.send("SIGINT")
    ending = script.ending()
    assert ending.status == 130 and "Traceback" not in ending.screen
    assert ending.screen.splitlines()[-1] == "stopped by SIGINT"


def test_a_killed_loader_of_a_run_is_one_sentence_and_a_traceback_in_the_log(tmp_path):
    script = fork("main_swav", tmp_path / "run", *LONG, "--workers", 2)
    script.wait_until(script.says("epoch 2/"))
    script.send("SIGKILL", to=script.workers()[0])
    ending = script.ending()
    assert ending.status == 1 and "Traceback" not in ending.screen
    assert ending.screen.splitlines()[-1].startswith("error: a loader process was killed")
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()


def test_stopped_loaders_end_a_run_after_the_loader_timeout(tmp_path):
    script = fork("main_swav", tmp_path / "run", *LONG, "--workers", 2, "--loader_timeout", 3)
    script.wait_until(script.says("epoch 2/"))
    for pid in script.workers():
        script.send("SIGSTOP", to=pid)
    ending = script.ending(within=13)
    assert ending.status == 1 and "Traceback" not in ending.screen
    assert "--loader_timeout" in ending.screen.splitlines()[-1]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_process_whose_peer_is_gone_says_where_to_look(name, tmp_path):
    argv = [*LONG, "--workers", 0, "--dist_timeout", 20]
    ranks = methods.start_forks("main_swav", tmp_path / "run", argv, 2)
    ranks[0].wait_until(ranks[0].says("epoch 2/"))
    ranks[0].hurt_at = ranks[1].hurt_at
    ranks[1].send(name)
    ending = ranks[0].ending(within=END_SECONDS + 20)
    assert ending.status == 1 and "Traceback" not in ending.screen
    assert ending.screen.splitlines()[-1].startswith("error: another process of the run has")
    assert ("--dist_timeout" in ending.screen.splitlines()[-1]) == (name == "SIGSTOP")
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()
    if name == "SIGSTOP":
        ranks[1].send("SIGKILL")
    ranks[1].ending()


def test_a_process_that_waits_in_the_clustering_leaves_when_its_peer_is_killed(tmp_path):
    folder = tmp_path / "run"
    argv = [*LONG, "--workers", 0, "--rotnet", "true", "--k", 64, "--batch_size", 64]
    ranks = methods.start_forks("main_deepercluster", folder, argv, 2)
    ranks[0].wait_until((folder / "clustering" / "process1.lock").exists)
    ranks[0].hurt_at = ranks[1].hurt_at
    ranks[1].send("SIGKILL")
    ending = ranks[0].ending(within=2 * END_SECONDS)
    assert ending.status == 1 and "Traceback" not in ending.screen
    assert ending.screen.splitlines()[-1].startswith("error: another process of the run has ended")
    ranks[1].ending()


# ============ /dev/shm ============
mounted = pytest.mark.skipif(not can_mount(), reason="may not mount another /dev/shm")


@mounted
@pytest.mark.parametrize("options", ["size=1m", "size=8k", "ro"])
def test_too_little_shared_memory_is_one_sentence(options, photographs, tmp_path):
    argv = [*LONG, "--data_path", photographs, "--preset", "cifar", "--size_crops", 96, 32]
    argv += ["--workers", 4, "--batch_size", 64]
    script = start("main_swav.py", tmp_path / "run", *argv, shared_memory=options)
    ending = script.ending(within=60)
    assert ending.status == 1 and "Traceback" not in ending.screen, ending.screen
    assert "--workers 0" in ending.screen.splitlines()[-1] and "/dev/shm" in ending.screen


@mounted
@pytest.mark.parametrize("options", ["size=8k", "ro"])
def test_without_loader_processes_no_shared_memory_is_needed(options, photographs, tmp_path):
    argv = [*DIGITS, "--data_path", photographs, "--preset", "tiny", "--epochs", 1, "--workers", 0]
    script = start("main_swav.py", tmp_path / "run", *argv, shared_memory=options)
    assert script.ending(within=120).status == 0
