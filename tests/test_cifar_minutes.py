"""python -m bench.cifar_minutes: planning, moments, going on after a stop, held-out images, the table."""

import csv
import importlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import cifar_minutes
from tests.runs import write_noise

ROOT = Path(__file__).parent.parent
MACHINE = {
    "card": "no GPU",
    "processor": "a processor",
    "cores": 2,
    "torch": "2",
    "torchvision": "0",
}
MACHINE |= {"python": "3", "commit": "abc", "date": "a day"}
# A training script in small: an epoch of 10 iterations takes a second; SIGTERM has it save and leave.
STAND_IN = """
import argparse, json, os, signal, sys, time
parser = argparse.ArgumentParser()
for flag in ("--dump_path", "--epochs", "--data_path"):
    parser.add_argument(flag)
args, others = parser.parse_known_args()
os.makedirs(args.dump_path, exist_ok=True)
stop = []
signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
checkpoint = args.dump_path + "/checkpoint.pth"
done = int(open(checkpoint).read()) if os.path.exists(checkpoint) else 0
time.sleep(0.3)  # a start, which is not on the clock
open(args.dump_path + "/args.json", "w").write(json.dumps({"batch_size": 8}))
with open(args.dump_path + "/log.jsonl", "a", buffering=1) as log:
    for iteration in range(done, 10 * int(args.epochs)):
        time.sleep(0.1)
        line = {"epoch_float": (iteration + 1) / 10, "iteration": iteration, "loss": 1.0}
        log.write(json.dumps({**line, "images_per_second": 80.0}) + "\\n")
        if stop:
            break
open(checkpoint, "w").write(str(iteration + 1))
sys.exit(143 if stop else 0)
"""
# An evaluation in small: the accuracy is the number of iterations that are done.
STAND_IN_KNN = """
import argparse, json
parser = argparse.ArgumentParser()
parser.add_argument("--pretrained")
args, others = parser.parse_known_args()
top1 = float(open(args.pretrained + "/checkpoint.pth").read())
open(args.pretrained + "/eval_knn.json", "w").write(json.dumps({"results": [{"top1": top1}]}))
"""


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Training and evaluation in small; returns the file that a broken training would be."""
    for name, text in (
        ("train", STAND_IN),
        ("knn", STAND_IN_KNN),
        ("broken", "raise OSError('no')"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    settings = cifar_minutes.Settings(str(tmp_path / "train.py"), threads=1, workers=0)
    monkeypatch.setitem(cifar_minutes.SETTINGS, "cpu", {"swav": settings, "dino": settings})
    monkeypatch.setattr(cifar_minutes, "KNN", str(tmp_path / "knn.py"))
    monkeypatch.setattr(cifar_minutes, "describe_machine", lambda device: MACHINE)
    return tmp_path / "broken.py"


def arguments(tmp_path, *more):
    argv = ["--data_path", "digits", "--out", tmp_path / "out", "--methods", "swav", "--seeds", 1]
    argv += ["--minutes", 0.01, 0.05, "--trial_seconds", 0.4, *more]
    return list(map(str, argv))


def results(tmp_path):
    lines = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "result"]


# ============ planning ============
def test_two_ends_of_epochs_tell_the_times_of_a_start_an_epoch_and_a_knn():
    lines = [(11.0, {"loss": 1, "epoch_float": 0.5}), (12.0, {"loss": 1, "epoch_float": 1.0})]
    lines += [(15.0, {"loss": 1, "epoch_float": 2.0}), (19.0, {"knn": 50.0, "epoch_float": 2.0})]
    assert cifar_minutes.epoch_times(lines) == (9.0, 3.0, 4.0)
    assert cifar_minutes.epoch_times(lines[:3]) == (9.0, 3.0, 0.0)
    assert cifar_minutes.epoch_times(lines[:2]) is None


def test_a_part_of_an_epoch_tells_how_long_one_takes_without_its_slow_first_iteration():
    lines = [(3.0, {"loss": 1, "epoch_float": 0.01}), (5.0, {"loss": 1, "epoch_float": 0.1})]
    lines += [(8.0, {"loss": 1, "epoch_float": 0.2}), (11.0, {"loss": 1, "epoch_float": 0.3})]
    first, epoch, knn = cifar_minutes.epoch_times(lines)
    assert (first, epoch, knn) == pytest.approx((2.0, 30.0, 0.0))


def test_a_clustering_is_a_part_of_each_epoch():
    lines = [(24.0, {"assignment_seconds": 4.0, "epoch_float": 0.0})]  # 20 s filled the memory
    lines += [(24 + 10 * x, {"loss": 1, "epoch_float": x}) for x in (0.01, 0.1, 0.3)]
    assert cifar_minutes.epoch_times(lines)[:2] == pytest.approx((20.0, 14.0))
    # The trial went on into the second epoch, whose clustering came in between.
    lines += [(38.0, {"assignment_seconds": 4.0, "epoch_float": 1.0})]
    lines += [(40.0, {"loss": 1, "epoch_float": 1.2})]
    assert cifar_minutes.epoch_times(lines)[:2] == pytest.approx((20.0, 14.0))


@pytest.mark.parametrize("epoch", [0.9, 17.0, 118.0])
def test_a_schedule_fills_the_minutes_and_ends_at_most_three_percent_late(epoch):
    epochs = cifar_minutes.plan_epochs(600, first=8.0, epoch=epoch)
    assert 8 + epochs * epoch <= 618 < 8 + (epochs + 1) * epoch


def test_a_schedule_has_one_epoch_at_least():
    assert cifar_minutes.plan_epochs(600, first=8.0, epoch=900.0) == 1


def test_a_run_that_goes_on_has_as_many_epochs_as_fit_at_its_own_rate():
    plan = {"schedule": 10.0, "epochs": 5, "seconds_before": 20.0}
    clock = {"seconds": 140.0, "epochs": 1.0, "finished": False}
    assert cifar_minutes.epochs_that_fit(plan, None) == 5
    assert (
        cifar_minutes.epochs_that_fit(plan, {**clock, "seconds": 139.0}) == 5
    )  # too early to tell
    assert (
        cifar_minutes.epochs_that_fit(plan, {**clock, "epochs": 0.0}) == 5
    )  # it fills a memory bank
    assert cifar_minutes.epochs_that_fit(plan, {**clock, "epochs": 1.5}) == 7  # 20 + 7 * 80 seconds
    assert cifar_minutes.epochs_that_fit(plan, {**clock, "epochs": 0.5}) == 2
    late = {"seconds": 615.0, "epochs": 4.2, "finished": False}
    assert cifar_minutes.epochs_that_fit(plan, late) == 5  # not fewer than it has begun
    assert cifar_minutes.epochs_that_fit(plan, {**late, "epochs": 4.0, "finished": True}) == 4


@pytest.mark.parametrize("device", cifar_minutes.SETTINGS)
def test_every_command_is_one_that_its_script_takes(device, tmp_path):
    argv = ["--out", str(tmp_path), "--device", device, "--data_path", "digits"]
    minutes = cifar_minutes.Minutes(cifar_minutes.parse_args(argv))
    for settings in (cifar_minutes.SETTINGS[device], cifar_minutes.SMOKE):
        minutes.settings = settings
        assert set(settings) == set(cifar_minutes.NAMES)
        for method in set(settings) - {"lightly"}:
            script, *flags = shlex.split(minutes.command(method))
            parser = importlib.import_module(script.removesuffix(".py")).get_parser()
            args = parser.parse_args([*flags, "--epochs", "3", "--seed", "2"])
            assert args.knn_freq == 0 and not args.tensorboard and args.device == device
        knn, *flags = shlex.split(minutes.knn_command("swav", "a folder"))
        args = importlib.import_module(knn.removesuffix(".py")).get_parser().parse_args(flags)
        assert (args.nb_knn, args.temperature, args.pretrained) == ([20], 0.07, "a folder")
        lightly = importlib.import_module("bench.lightly_swav")
        module, name, *flags = shlex.split(minutes.command("lightly"))
        assert (module, name) == ("-m", "bench.lightly_swav")
        args = lightly.parse_args([*flags, "--epochs", "3", "--seed", "2", "--dump_path", "x"])
        assert args.device == device


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--minutes", "2", "1"], "--minutes 2 1 must be above 0 and rise"),
        (["--minutes", "0", "1"], "--minutes 0 1 must be above 0"),
        (["--device", "tpu"], "--device tpu must be cpu or cuda"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--held_out", "--data_path", "/no/such/folder"], "/no/such/folder does not exist"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(argv, words, tmp_path, capsys):
    assert cifar_minutes.main(["--out", str(tmp_path / "out"), *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


# ============ images to choose with ============
def read_list(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_tenth_training_image_is_held_out_and_the_list_is_the_same_each_time(tmp_path):
    images = write_noise(tmp_path / "a folder", {"train": (25, 15), "test": (3, 3)})
    rows = read_list(cifar_minutes.hold_out(str(images), tmp_path))
    assert rows == read_list(cifar_minutes.hold_out(str(images), tmp_path))
    split = {name: [x["path"] for x in rows if x["split"] == name] for name in ("train", "val")}
    assert (len(split["train"]), len(split["val"])) == (36, 4)
    assert not set(split["train"]) & set(split["val"])
    assert all(Path(path).parent.parent == images / "train" for path in sum(split.values(), []))
    assert [x["label"] for x in rows] == [Path(x["path"]).parent.name for x in rows]


def test_the_list_opens_as_two_splits_with_the_labels_of_the_folder(tmp_path):
    from src.evaluate.splits import open_labelled_splits

    images = write_noise(tmp_path / "images", {"train": (25, 15), "test": (3, 3)})
    path = cifar_minutes.hold_out(str(images), tmp_path)
    train, val = open_labelled_splits(str(path))
    assert (len(train), len(val), train.classes) == (36, 4, ["blue", "red"])
    assert val.labels.tolist() == [0, 0, 0, 1]  # images 0, 10 and 20 of 25, and 30


def test_images_that_are_no_files_are_written_as_they_are(tmp_path, monkeypatch):
    from src.data import datasets

    whole = datasets.open_dataset("digits", "train")
    monkeypatch.setattr(whole, "labels", whole.labels[:12])
    monkeypatch.setattr(datasets, "open_dataset", lambda path, split: whole)
    rows = read_list(cifar_minutes.hold_out("digits", tmp_path))
    monkeypatch.undo()
    assert [x["split"] for x in rows] == ["val", *["train"] * 9, "val", "train"]
    val = datasets.open_dataset(str(next(tmp_path.glob("held_out_*.csv"))), "val")
    assert (val.read(1) == whole.read(10)).all()


# ============ moments, and going on ============
@pytest.mark.slow
def test_a_run_is_evaluated_at_its_moments_and_what_is_done_is_not_done_again(
    stand_ins, tmp_path, capsys
):
    assert cifar_minutes.main(arguments(tmp_path)) == 0
    first, last = results(tmp_path)
    assert (first["moment"], last["moment"]) == (0.01, 0.05)
    assert 0.01 <= first["minutes"] < last["minutes"] == pytest.approx(0.05, rel=0.5)
    assert last["top1"] == 10 * last["epochs"] > first["top1"] > 0
    assert last["images_per_second"] == pytest.approx(
        8 * last["top1"] / 60 / last["minutes"], rel=0.05
    )
    before = (tmp_path / "out" / "results.jsonl").read_text()
    assert cifar_minutes.main(arguments(tmp_path)) == 0
    after = (tmp_path / "out" / "results.jsonl").read_text()
    assert after.startswith(before) and len(results(tmp_path)) == 2
    assert "| SwAV |" in capsys.readouterr().out
    # Another seed needs no second trial.
    assert cifar_minutes.main(arguments(tmp_path, "--seeds", 2)) == 0
    assert [(x["seed"], x["moment"]) for x in results(tmp_path)][2:] == [(1, 0.01), (1, 0.05)]
    lines = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert [line["kind"] for line in lines].count("plan") == 1


@pytest.mark.slow
def test_a_plan_that_does_not_fit_is_changed_at_the_next_moment(stand_ins, tmp_path):
    argv = arguments(tmp_path, "--minutes", 0.02, 0.05)
    assert cifar_minutes.main([*argv, "--seeds", "1"]) == 0
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    plan = next(line for line in map(json.loads, lines) if line["kind"] == "plan")
    other = [*argv, "--out", str(tmp_path / "other")]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.jsonl").write_text(json.dumps({**plan, "epochs": 30}) + "\n")
    assert cifar_minutes.main(other) == 0
    lines = map(json.loads, (tmp_path / "other" / "results.jsonl").read_text().splitlines())
    planned = [line["planned"] for line in lines if line["kind"] == "result"]
    assert planned[0] == 30 and 2 <= planned[1] <= 3


@pytest.mark.slow
def test_a_run_that_does_not_save_when_it_is_stopped_has_no_result(stand_ins, tmp_path, capsys):
    save = 'open(checkpoint, "w").write(str(iteration + 1))'
    assert save in STAND_IN
    (tmp_path / "train.py").write_text(STAND_IN.replace(save, f"if not done: {save}"))
    assert cifar_minutes.main(arguments(tmp_path, "--minutes", 0.02, 0.04, 0.2)) == 1
    assert [line["moment"] for line in results(tmp_path)] == [0.02]
    assert "swav seed 0: it saved nothing when it was stopped" in capsys.readouterr().out


CODE = """
import sys
from bench import cifar_minutes
settings = cifar_minutes.Settings({train!r}, threads=1, workers=0)
cifar_minutes.SETTINGS["cpu"] = {{"swav": settings}}
cifar_minutes.KNN = {knn!r}
cifar_minutes.describe_machine = lambda device: {machine!r}
sys.exit(cifar_minutes.main({argv!r}))
"""


@pytest.mark.slow
def test_a_bench_that_is_stopped_goes_on_in_the_middle_of_a_training(stand_ins, tmp_path):
    argv = arguments(tmp_path, "--minutes", 0.02, 0.2)
    train, knn = str(tmp_path / "train.py"), str(tmp_path / "knn.py")
    code = CODE.format(train=train, knn=knn, machine=MACHINE, argv=argv)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    log, deadline = tmp_path / "out" / "swav_0" / "log.jsonl", time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < 30:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command goes on" in output
    clock = json.loads((tmp_path / "out" / "swav_0" / "clock.json").read_text())
    assert clock["epochs"] >= 3.0 and 0.02 * 60 < clock["seconds"] and not clock["finished"]
    assert [x["moment"] for x in results(tmp_path)] == [0.02]
    assert cifar_minutes.main(argv) == 0
    assert [x["moment"] for x in results(tmp_path)] == [0.02, 0.2]
    places = [json.loads(line)["iteration"] for line in log.read_text().splitlines()]
    assert places == list(range(len(places)))  # nothing was done twice, nothing left out
    assert results(tmp_path)[-1]["top1"] == len(places)


def test_a_checkpoint_that_the_clock_does_not_know_is_no_place_to_go_on_from(tmp_path):
    checkpoint = tmp_path / "checkpoint.pth"
    checkpoint.write_text("10")
    saved = {"seconds": 60.0, "epochs": 1.0, "finished": False}
    saved["checkpoint"] = cifar_minutes.time_of_checkpoint(tmp_path)
    (tmp_path / "clock.json").write_text(json.dumps(saved))
    assert cifar_minutes.read_clock(tmp_path) == saved
    os.utime(checkpoint, (1.0, 1.0))  # it saved again, and then all was killed
    assert cifar_minutes.read_clock(tmp_path) is None
    (tmp_path / "clock.json").write_text('{"seco')
    assert cifar_minutes.read_clock(tmp_path) is None


def test_the_clock_starts_when_a_run_describes_itself_and_ends_with_its_checkpoint(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    os.utime(tmp_path / "args.json", (1.0, 1.0))  # of the session before
    session = cifar_minutes.Session(tmp_path, after=1.5)
    session.look()
    assert session.elapsed() == session.seconds() == 0.0
    begun = session.spawned + 3
    os.utime(tmp_path / "args.json", (begun, begun))
    line = {"loss": 1.0, "iteration": 0}
    lines = [{**line, "epoch_float": x} for x in (1.0, 1.5, 2.0)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    session.look()
    assert [line["epoch_float"] for _, line in session.losses()] == [2.0]  # of this session
    assert session.seconds() == 0.0  # it has saved nothing
    (tmp_path / "checkpoint.pth").touch()
    os.utime(tmp_path / "checkpoint.pth", (begun - 1, begun - 1))
    assert session.seconds() == 0.0  # what is there is of the session before
    os.utime(tmp_path / "checkpoint.pth", (begun + 60, begun + 60))
    assert session.seconds() == pytest.approx(60.0)


@pytest.mark.slow
def test_a_method_that_fails_is_said_and_the_others_go_on(stand_ins, tmp_path, capsys, monkeypatch):
    broken = cifar_minutes.Settings(str(stand_ins), threads=1, workers=0)
    monkeypatch.setitem(cifar_minutes.SETTINGS["cpu"], "dino", broken)
    argv = arguments(tmp_path, "--methods", "dino", "swav", "--minutes", 0.02)
    assert cifar_minutes.main(argv) == 1
    assert "FAILED dino, trial: OSError: no" in capsys.readouterr().out
    assert [x["method"] for x in results(tmp_path)] == ["swav"]


def test_results_of_other_settings_or_another_schedule_are_not_taken_over(tmp_path, capsys):
    argv = arguments(tmp_path)
    minutes = cifar_minutes.Minutes(cifar_minutes.parse_args(argv))
    knn_flags = minutes.knn_flags("swav")
    line = result(
        0, 0.01, 30.0, command=minutes.command("swav"), knn_flags=knn_flags, schedule=0.05
    )
    minutes.add("result", **line)
    assert cifar_minutes.Minutes(cifar_minutes.parse_args(argv)).find("result", method="swav")
    assert cifar_minutes.main([*argv, "--flags", "--width 0.5"]) == 2
    assert "holds swav by another command" in capsys.readouterr().err
    assert cifar_minutes.main([*argv, "--knn_flags", "--nb_knn 1"]) == 2
    assert f"holds swav with '{knn_flags}' for eval_knn.py" in capsys.readouterr().err
    assert cifar_minutes.main([*argv, "--minutes", "1", "10"]) == 2
    assert "with a schedule of 0.05 minutes" in capsys.readouterr().err


def test_runs_with_other_plans_come_to_their_ends_each_by_its_own():
    plans = [result(seed, 10.0, 60.0, epochs=n, planned=n) for seed, n in enumerate((5, 5, 6))]
    assert cifar_minutes.epochs_of(plans) == "5.33"
    plans[2]["epochs"] = 5.2
    assert cifar_minutes.epochs_of(plans) == "5.1 of 5.33"


def test_held_out_images_of_another_folder_have_a_list_of_their_own(tmp_path):
    one, other = (
        cifar_minutes.held_out_list(path, tmp_path) for path in ("/a/images", "/b/images")
    )
    assert one != other and one.parent == other.parent == tmp_path


# ============ the table ============
def result(seed, moment, top1, **values):
    line = {"method": "swav", "seed": seed, "moment": moment, "minutes": moment, "top1": top1}
    line |= {"epochs": 5.0, "planned": 5, "images_per_second": 1000.0 + seed}
    return {**line, **values}


def test_the_table_has_mean_and_spread_and_says_what_is_missing_or_late(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_minutes, "is_installed", lambda package: False)
    argv = ["--minutes", "1", "2", "10", "--methods", "swav", "dino", "lightly"]
    args = cifar_minutes.parse_args(argv)
    lines = [result(seed, 1.0, 50.0 + 2 * seed, minutes=1.02) for seed in range(3)]
    lines += [result(seed, 2.0, 55.0, minutes=2.3) for seed in range(3)]
    lines += [result(seed, 10.0, 60.0 + seed, epochs=4.5) for seed in range(2)]
    lines = [{"kind": "machine", **MACHINE, "command": "a command"}] + [
        {"kind": "result", **line} for line in lines
    ]
    text = cifar_minutes.report(lines, args)
    assert "a processor, 2 CPU cores; torch 2" in text and "commit abc" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| method | 1 min | 2 min | 10 min | epochs | images/s |"
    assert rows[2:] == [
        "| SwAV | 52.0 ± 2.0 | 55.0 ± 0.0 (after 2.3 min) | 60.5 ± 0.7 (n = 2) | 4.5 of 5 | 1,000 |",
        "| DINO | - | - | - | - | - |",
        "| lightly's SwAV | not run: lightly is not installed | - | - | - | - |",
    ]


# ============ with the real scripts ============
@pytest.mark.slow
def test_the_whole_bench_runs_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cifar_minutes, "describe_machine", lambda device: MACHINE)
    out, table = tmp_path / "out", tmp_path / "table.jsonl"
    argv = ["--smoke", "--minutes", "0.03", "--held_out", "--out", str(out), "--json", str(table)]
    assert cifar_minutes.main(argv) == 0, (out / "log.txt").read_text()
    (line,) = results(tmp_path)
    assert 10 < line["top1"] <= 100 and 0 < line["epochs"] <= line["planned"]
    assert json.loads(table.read_text())["rows"][0][0] == "SwAV"
    assert "a tenth of the training images, held out" in (out / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="needs the package lightly")
def test_lightlys_recipe_trains_stops_and_goes_on(tmp_path):
    from bench import lightly_swav

    argv = [
        "--data_path",
        "digits",
        "--dump_path",
        str(tmp_path),
        "--epochs",
        "2",
        "--width",
        "0.125",
    ]
    argv += ["--crop_size", "8", "--batch_size", "128", "--log_freq", "1"]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert lightly_swav.main(argv) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    lines = list(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()))
    assert [line["iteration"] for line in lines] == list(range(20))
    assert lines[-1]["epoch_float"] == 2.0


def test_without_lightly_its_script_says_what_to_install(tmp_path, monkeypatch, capsys):
    from bench import lightly_swav

    monkeypatch.setitem(sys.modules, "lightly", None)
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    argv = ["--data_path", "digits", "--dump_path", str(tmp_path), "--epochs", "1"]
    assert lightly_swav.main(argv) == 2
    assert "pip install lightly" in capsys.readouterr().err
