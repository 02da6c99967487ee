"""src.run.log and src.pictures.curves: lines, rates, and curves that are really drawn."""

import io
import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.errors import CheckpointError
from src.pictures import curves
from src.run.log import (
    RunLog,
    Stopwatch,
    describe_run,
    divide,
    duration,
    read_log,
    setup_logging,
)
from tests.runs import images


@pytest.fixture
def root_handlers():
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    for handler in before:
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)


def test_lines_are_json_and_what_is_not_finite_is_null(tmp_path):
    log = RunLog(tmp_path, tensorboard=True)
    log.write(0, {"iteration": 0, "loss": 1.5, "eta_seconds": math.inf, "note": "x"})
    log.close()
    assert json.loads((tmp_path / "log.jsonl").read_text())["eta_seconds"] is None
    assert any(path.name.startswith("events") for path in tmp_path.iterdir())


def test_the_log_of_a_killed_run_keeps_the_later_of_two_lines_and_drops_a_torn_one(tmp_path):
    places = [(0.1, 1), (0.2, 2), (0.3, 3), (0.2, 4), (0.3, 5)]
    lines = [{"iteration": 0, "epoch_float": place, "loss": loss} for place, loss in places]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"iteration": 2, "lo'
    (tmp_path / "log.jsonl").write_text(text)
    assert [line["loss"] for line in read_log(tmp_path)] == [1, 4, 5]


def test_only_the_main_process_writes(tmp_path):
    log = RunLog(None)
    log.write(0, {"iteration": 0})
    log.close()
    assert not list(tmp_path.iterdir())


def test_console_has_sentences_and_train_log_the_tracebacks(tmp_path, capsys, root_handlers):
    setup_logging(tmp_path, is_main=True)
    logging.getLogger("src.x").info("hello")
    try:
        raise ValueError("inside")
    except ValueError:
        logging.getLogger("src.x").debug("stopped", exc_info=True)
    assert capsys.readouterr().out == "hello\n"
    text = (tmp_path / "train.log").read_text()
    assert "hello" in text and "Traceback" in text


def test_other_processes_speak_of_warnings_only(tmp_path, capsys, root_handlers):
    setup_logging(tmp_path, is_main=False)
    logging.getLogger("src.x").info("hello")
    logging.getLogger("src.x").warning("trouble")
    assert capsys.readouterr().out == "trouble\n" and not list(tmp_path.iterdir())


NAME = os.fsdecode(
    b"caf\xe9\x1b[31m.jpg"
)  # a file's name that is no UTF-8 and turns the terminal red


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_name_can_be_logged_to_any_terminal(
    tmp_path, capsys, monkeypatch, root_handlers, encoding
):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", terminal)
    setup_logging(tmp_path, is_main=True)
    logging.getLogger("src.x").warning(f"cannot read {NAME}\nthe next line, with \u00e9")
    terminal.flush()
    written = terminal.buffer.getvalue().decode(encoding)
    end = "\u00e9" if encoding == "utf-8" else "\\xe9"
    assert written == f"cannot read caf\\xe9\\x1b[31m.jpg\nthe next line, with {end}\n"
    assert r"cannot read caf\xe9\x1b[31m.jpg" in (tmp_path / "train.log").read_text("utf-8")
    assert "Logging error" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_a_damaged_file_of_any_name_is_named_in_any_locale(tmp_path, locale):
    folder = images(tmp_path / "images", 20)
    (folder / "00003.jpg").rename(folder / NAME)
    (folder / NAME).write_bytes(b"no")
    command = (
        "main_rotnet.py --arch resnet10 --width 0.125 --size_crops 8 --batch_size 10 --epochs 1 "
    )
    command += f"--workers 1 --no-tensorboard --data_path {folder} --dump_path {tmp_path / 'run'}"
    plain = {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    result = subprocess.run(
        [sys.executable, *command.split()], env={**os.environ, **plain}, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    for text in (result.stdout, (tmp_path / "run" / "train.log").read_bytes()):
        assert rb"images/caf\xe9\x1b[31m.jpg (" in text
    assert b"Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00:00"), (3725, "1:02:05"), (90061, "1d 1:01:01"), (math.inf, "?")]
)
def test_durations_are_written_as_people_read_them(seconds, text):
    assert duration(seconds) == text


def test_the_stopwatch_sees_who_waits_for_whom():
    def slow_loader():
        for _ in range(3):
            time.sleep(0.05)
            yield 1

    stopwatch = Stopwatch()
    for _ in stopwatch.watch(slow_loader()):
        pass
    rates = stopwatch.rates(images_per_iteration=10, iterations_to_go=30)
    assert rates["data_share"] > 0.8
    assert rates["eta_seconds"] == pytest.approx(300 / rates["images_per_second"])
    again = Stopwatch()
    for _ in again.watch(iter([1, 2, 3])):
        time.sleep(0.02)
    assert again.rates(10, 0)["data_share"] < 0.2


@pytest.mark.slow
def test_curves_are_drawn(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    for i in range(5):
        log.write(i, {"iteration": i, "epoch_float": i / 2, "loss": 5.0 - i, "lr": 0.1})
    log.write(4, {"iteration": 4, "epoch_float": 2.5, "knn": 90.0})
    log.close()
    (tmp_path / "args.json").write_text('{"arch": "resnet18", "data_path": "a$b", "epochs": 9}')
    with Image.open(curves.plot_curves(tmp_path, 60)) as picture:
        assert picture.width > 300 and len(np.unique(np.asarray(picture))) > 10
        header = np.asarray(picture.convert("L"))[: round(curves.HEADER * curves.DPI)]
    assert (header < 128).any()
    said = curves.describe_run(tmp_path, read_log(tmp_path))
    assert said == f"{tmp_path.name}: resnet18 on a$b, epoch 2.5 of 9"


def test_the_line_of_knowing_nothing_is_named_in_the_legend(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    log = RunLog(tmp_path, tensorboard=False)
    log.write(0, {"iteration": 0, "epoch_float": 1.0, "loss": 5.0})
    log.close()
    labels, draw_legend = [], Axes.legend

    def legend(axis, **options):
        labels.extend(axis.get_legend_handles_labels()[1])
        return draw_legend(axis, **options)

    monkeypatch.setattr(Axes, "legend", legend)
    curves.plot_curves(tmp_path, 3000)
    assert labels == ["ln K = 8.01, knowing nothing"]


# ============ a full disk ============
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@needs_dev_full
def test_a_train_log_on_a_full_disk_is_one_line_and_no_traceback(tmp_path, capsys, root_handlers):
    (tmp_path / "train.log").symlink_to("/dev/full")
    setup_logging(tmp_path, True)
    for text in ("first", "second"):
        logging.getLogger("src.run").info(text)
    output = capsys.readouterr()
    assert output.out.splitlines() == ["first", "second"]
    [line] = output.err.splitlines()
    assert "train.log cannot be written (No space left on device)" in line


@needs_dev_full
def test_a_log_on_a_full_disk_is_one_sentence_that_names_it(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path, tensorboard=False)
    with pytest.raises(CheckpointError, match="log.jsonl cannot be written .No space left"):
        log.write(0, {"epoch_float": 1.0})
    with pytest.raises(OSError):
        log.file.close()


@needs_dev_full
def test_a_full_disk_leaves_the_arguments_that_were_there(tmp_path):
    describe_run({"seed": 1}, tmp_path)
    (tmp_path / "args.json.part").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="args.json cannot be written .No space left"):
        describe_run({"seed": 2}, tmp_path)
    assert json.loads((tmp_path / "args.json").read_text()) == {"seed": 1}


# ============ the screen ============
def test_a_line_is_divided_between_its_parts_and_no_part_is_lost():
    line = "epoch 1/2 it 9 loss 1.0 | 900 img/s | codes H 1.17 of 4.09, 55 of 60 in use, rank 49"
    assert divide(line) == [line]
    assert divide(line, 50) == [
        "epoch 1/2 it 9 loss 1.0 | 900 img/s",
        "  codes H 1.17 of 4.09, 55 of 60 in use, rank 49",
    ]
    assert divide(line, 42)[1:] == ["  codes H 1.17 of 4.09, 55 of 60 in use,", "  rank 49"]
    plan = "codes       K = 60 prototypes; ln(K) = 4.094 is the loss of constant codes"
    assert divide(plan, 60) == [
        "codes       K = 60 prototypes;",
        "            ln(K) = 4.094 is the loss of constant codes",
    ]
    path = f"written to /{'x' * 120}/a.png and no more"
    assert divide(path) == ["written to", f"  /{'x' * 120}/a.png", "  and no more"]


def test_the_screen_has_lines_of_100_columns_and_train_log_whole_ones(
    tmp_path, capsys, root_handlers
):
    setup_logging(tmp_path, True)
    logging.getLogger("src.run").info("a word, " * 40)
    logging.getLogger("src.run").info(f"written to {tmp_path}, " + "and more, " * 20)
    logging.getLogger("src.run").warning("WARNING: " + "a sentence " * 20)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6 and max(map(len, said[:4])) <= 100 < min(map(len, said[4:]))
    assert len((tmp_path / "train.log").read_text().splitlines()) == 3
