"""What a run owes is paid, what it saves is sound, and what is wrong with it is said once."""

import json
import random
import re
import time
from types import SimpleNamespace

import pytest
import torch

import main_deepclusterv2
import main_selav2
import main_swav
from src.errors import CheckpointError, RunError
from src.run import run as run_module
from src.run.checkpoint import check_is_of_a_run, load_checkpoint, save_checkpoint
from src.run.health import Trouble
from src.run.log import RunLog
from src.run.run import Run
from tests.gloo import run_ranks
from tests.runs import signal_handlers as signal_handlers

pytestmark = pytest.mark.usefixtures("signal_handlers")

TINY = "--width 0.125 --nmb_prototypes 12 --nmb_crops 2 --batch_size 432 --log_freq 1".split()


def train(folder, *argv):
    return main_swav.main([*TINY, "--no-tensorboard", "--dump_path", str(folder), *argv])


def log_of(folder):
    return [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]


def places(folder):
    return [(line["iteration"], "knn" in line) for line in log_of(folder)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs of three iterations, with k-NN after each."""
    folder = tmp_path_factory.mktemp("trained")
    assert train(folder, "--epochs", "2", "--knn_freq", "1") == 0
    return folder


# ============ owed ============
@pytest.mark.slow
def test_a_run_that_was_killed_before_its_knn_and_curves_makes_up_for_them(
    tmp_path, monkeypatch, trained, signal_handlers
):
    def killed(self, epoch):
        if epoch == 1:
            raise SystemExit(137)
        return probe(self, epoch)

    with monkeypatch.context() as patch:
        probe = Run.probe
        patch.setattr(Run, "probe", killed)
        with pytest.raises(SystemExit):
            train(tmp_path, "--epochs", "2", "--knn_freq", "1")
    assert not (tmp_path / "plots" / "curves.png").exists()
    assert places(tmp_path)[-1] == (5, False)
    for _ in range(2):  # and not a second time
        assert train(tmp_path, "--epochs", "2", "--knn_freq", "1") == 0
        assert places(tmp_path) == places(trained)
        assert log_of(tmp_path)[-1] == log_of(trained)[-1]
    assert (tmp_path / "plots" / "curves.png").exists()


@pytest.mark.slow
def test_curves_take_a_small_part_of_the_time_and_are_there_at_the_end(tmp_path, monkeypatch):
    clock, drawn = [0.0], []

    def draw_for_three_seconds(folder, num_prototypes):
        drawn.append(clock[0])
        clock[0] += 3

    def epoch_of_half_a_minute(run, epoch, done, keep):
        clock[0] += 30

    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("src.pictures.curves.plot_curves", draw_for_three_seconds)
    monkeypatch.setattr(Run, "save", epoch_of_half_a_minute)
    assert train(tmp_path, "--epochs", "8") == 0
    assert drawn == [30, 123, 216, 8 * 30 + 3 * 3]  # after 20 s, then each 60 s, and at the end


# ============ time to go ============
def test_the_time_to_go_counts_what_is_done_between_epochs(tmp_path, monkeypatch):
    clock = [0.0]
    patched = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr("src.run.log.time", patched)

    def save_for_an_hour(run, epoch, done, keep):
        clock[0] += 3600

    monkeypatch.setattr(Run, "save", save_for_an_hour)
    assert train(tmp_path, "--epochs", "4") == 0
    lines = [line for line in log_of(tmp_path) if "eta_seconds" in line]
    hours = [round(line["eta_seconds"] / 3600, 1) for line in lines]
    # Before the epochs: 0 hours, 1, 1 and 1.
    assert hours == [0, 0, 0, 1, 1, 1, 0.7, 0.7, 0.7, 0, 0, 0]


def test_the_pace_is_without_what_is_done_between_epochs(tmp_path, monkeypatch, capfd):
    clock = [0.0]
    patched = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr("src.run.log.time", patched)
    monkeypatch.setattr(run_module, "time", patched)
    monkeypatch.setattr(Run, "plot", lambda self: None)

    def pass_a_minute(run):
        clock[0] += 60
        return step(run)

    def save_for_an_hour(run, epoch, done, keep):
        clock[0] += 3600

    step = Run.step
    monkeypatch.setattr(Run, "step", pass_a_minute)
    monkeypatch.setattr(Run, "save", save_for_an_hour)
    assert train(tmp_path, "--epochs", "5") == 0
    # The tenth iteration of 15: five minutes, and the mean of pauses of 0, 1, 1 and 1 hour.
    assert "pace        7.2 images/s, 0:50:00 to go" in capfd.readouterr().out


@pytest.mark.parametrize("script", [main_deepclusterv2, main_selav2])
def test_the_pace_is_that_of_training_and_not_of_filling_the_memory_bank(tmp_path, capfd, script):
    words = [*TINY, "--no-tensorboard", "--dump_path", str(tmp_path), "--epochs", "5"]
    assert script.main(words) == 0
    said = capfd.readouterr().out
    [pace] = re.findall("^pace .* ([0-9:]+) to go", said, re.MULTILINE)
    lines = [said.index(x) for x in ("memory bank: ", "the first iteration is done", "\npace ")]
    assert lines == sorted(lines)
    assert pace.startswith("0:00:")


def test_lines_of_what_is_done_again_are_not_in_the_log_twice(tmp_path, trained):
    log = RunLog(tmp_path, tensorboard=False)
    lines = log_of(trained)
    text = (trained / "log.jsonl").read_text()
    log.file.write(text + '{"epoch": 2, "epoch_fl')
    log.file.flush()
    kept = log.rewind(1.0, assigned=False)
    assert kept == lines[:4] == log_of(tmp_path) and "knn" in kept[-1]
    redone = (tmp_path / "log.redone.jsonl").read_text().splitlines()
    assert [json.loads(x) for x in redone[:-1]] == lines[4:] and redone[-1].endswith("epoch_fl")
    log.write(3, {"epoch_float": 1.5})
    assert log_of(tmp_path)[-1] == {"epoch_float": 1.5}


@pytest.mark.parametrize("assigned", [False, True])
def test_the_line_of_an_assignment_stays_if_the_run_was_saved_with_it(tmp_path, assigned):
    log = RunLog(tmp_path, tensorboard=False)
    for line in ({"epoch_float": 1.0}, {"epoch_float": 1.0, "assignment_seconds": 2.0}):
        log.write(0, line)
    assert len(log.rewind(1.0, assigned=assigned)) == 1 + assigned


@pytest.mark.parametrize("text", ['{"epoch": 1', "[]", "7", '{"epoch_float": "x"}', "\x00\x00"])
def test_a_bad_line_in_the_log_ends_neither_a_run_nor_its_curves(tmp_path, trained, text):
    lines = (trained / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join([*lines[:2], text, *lines[2:], text]))
    log = RunLog(tmp_path, tensorboard=False)
    assert len(log.rewind(9.0, assigned=True)) == len(lines)
    log.write(6, {"epoch_float": 9.5})
    assert len(log_of(tmp_path)) == len(lines) + 1


# ============ sound ============
def test_no_flipped_bit_of_a_checkpoint_goes_unseen(tmp_path):
    torch.manual_seed(0)
    state = {"model": torch.randn(2000), "epoch": 1}
    save_checkpoint(tmp_path, {**state, "epoch": 0})
    save_checkpoint(tmp_path, state)
    path, draws = tmp_path / "checkpoint.pth", random.Random(0)
    good, seen = path.read_bytes(), 0
    for _ in range(60):
        bad = bytearray(good)
        bad[draws.randrange(len(bad))] ^= 1 << draws.randrange(8)
        path.write_bytes(bad)
        (tmp_path / "checkpoint.pth.unreadable").unlink(missing_ok=True)
        found = load_checkpoint(tmp_path)
        seen += found["epoch"] == 0
        assert torch.equal(found["model"], state["model"]) and found["epoch"] in (0, 1)
    assert seen > 40  # the others are in padding, or in what both copies of a header say


@pytest.mark.parametrize(
    "state", [[], {"model": {}}, {"epoch": 1, "model": {}}, torch.zeros(3), {"state_dict": {}}]
)
def test_what_is_no_checkpoint_of_a_run_is_one_sentence(tmp_path, state):
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="is not the checkpoint of a run.*--init_from"):
        train(tmp_path)
    with pytest.raises(CheckpointError, match="use another --dump_path"):
        check_is_of_a_run(state, tmp_path)


@pytest.mark.slow
def test_weights_that_are_beyond_all_bounds_are_not_saved(tmp_path, trained, signal_handlers):
    """A finite loss whose step wrecks the weights, just before a save."""
    for name in ("checkpoint.pth", "log.jsonl"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    before = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    argv = ["--epochs", "4", "--checkpoint_iters", "1", "--base_lr", "1e30", "--final_lr", "1e30"]
    with pytest.raises(RunError, match="checkpoint.pth holds the last good state"):
        train(tmp_path, *argv, "--optimizer", "sgd")
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["epoch"] == 2 and state["samples_done"] == 0
    assert all(torch.equal(before[name], x) for name, x in state["model"].items())


def test_leftovers_of_killed_runs_are_removed(tmp_path, trained):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoint.pth").write_bytes((trained / "checkpoint.pth").read_bytes())
    names = ["checkpoint.pth.tmp-1", "checkpoint.prev.pth.tmp-2", "checkpoints/ckp-1.pth.tmp-3"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    assert load_checkpoint(tmp_path)["epoch"] == 2
    assert not any((tmp_path / name).exists() for name in names)


# ============ said once ============
def test_a_trouble_is_said_once_while_it_lasts(caplog):
    run = SimpleNamespace(
        history=[], trouble=None, global_batch=8, arguments={"abort_on_collapse": False}
    )
    found = iter(
        [Trouble("loss", "is 1.0"), Trouble("loss", "is 1.1"), Trouble("codes", "x"), None]
        + [Trouble("loss", "is 1.2")]
    )
    for _ in range(5):
        Run.diagnose(run, {}, lambda lines: next(found))
    said = [record.message for record in caplog.records]
    assert said == ["WARNING: is 1.0", "WARNING: x", "WARNING: is 1.2"]


# ============ unique prototypes ============
def run_of_prototypes(done=1):
    return SimpleNamespace(done=done, iters_per_epoch=20, repeats=False)


def test_repeated_prototypes_are_counted_over_all_heads_and_said_once_while_it_lasts(caplog):
    run, eye = run_of_prototypes(), torch.eye(8)
    assert Run.count_unique(run, [eye, eye[[0] * 8]], "--k") == ({"unique": 9}, ", 9 of 16 unique")
    assert Run.count_unique(run, [eye[[0, 1] * 2]], "--k") == ({"unique": 2}, ", 2 of 4 unique")
    assert not caplog.records  # not fewer than half
    for prototypes in ([eye[[0, 0, 0]]], [eye[[1] * 5]], [eye], [eye[[2] * 3]]):
        Run.count_unique(run, prototypes, "--k")
    said = [record.message for record in caplog.records]
    assert [text.partition(" prototypes")[0] for text in said] == [
        "WARNING: only 1 of 3",
        "WARNING: only 1 of 3",
    ]
    assert said[0].endswith("lower --k")


def test_many_prototypes_are_counted_in_the_last_line_of_an_epoch(monkeypatch):
    monkeypatch.setattr(run_module, "UNIQUE_COST", 8 * 8 * 8 - 1)
    assert Run.count_unique(run_of_prototypes(done=19), [torch.eye(8)], "--k") == ({}, "")
    assert Run.count_unique(run_of_prototypes(done=20), [torch.eye(8)], "--k")[0] == {"unique": 8}
    assert Run.count_unique(run_of_prototypes(done=19), [torch.eye(8)[:7]], "--k")[0] == {
        "unique": 7
    }


def _unique_of_shared_heads(rank, world_size):
    held = [[0, 1, 2, 3], [0, 1], [1, 2, 3]][rank] if world_size > 1 else [0, 1, 2, 3]
    holders = [[2, 3, 2, 2], [2, 3], [3, 2, 2]][rank] if world_size > 1 else [1] * 4
    heads = [torch.eye(8)[torch.arange(6) % (head + 2)] for head in held]  # head + 2 unique ones
    return Run.count_unique(run_of_prototypes(), heads, "--k", holders)


def test_heads_that_are_shared_out_count_once_on_any_number_of_processes():
    (alone,) = run_ranks(_unique_of_shared_heads, 1)
    assert alone == ({"unique": 2 + 3 + 4 + 5}, ", 14 of 24 unique")
    assert run_ranks(_unique_of_shared_heads, 3) == [alone] * 3
