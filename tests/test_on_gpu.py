"""scripts/on_gpu.py: choosing sections, times, killing, results as they come; and what it runs."""

import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import __main__ as all_benches
from bench import step_profile, throughput, train_step
from src.nets.backbones import build_backbone

ROOT = Path(__file__).parent.parent
MACHINE = {"card": "a card", "card_memory": "1 GiB", "driver": "1", "cuda": "1", "cudnn": "1"}
MACHINE |= {"torch": "2", "torchvision": "0", "python": "3", "cores": 2, "commit": "abc"}
MACHINE |= {"date": "a day", "command": "bash scripts/on_gpu.sh"}
# A training script in small: an epoch is 0.1 s, and a k-NN comes after every --knn_freq of them.
STAND_IN = """
import argparse, json, time
parser = argparse.ArgumentParser()
for flag in ("--dump_path", "--epochs", "--knn_freq"):
    parser.add_argument(flag)
args, others = parser.parse_known_args()
with open(args.dump_path + "/log.jsonl", "a", buffering=1) as log:
    for epoch in range(int(args.epochs)):
        time.sleep(0.1)
        rates = {"images_per_second": 1000.0, "data_share": 0.02}
        log.write(json.dumps({"epoch": epoch, "epoch_float": epoch + 1.0, "loss": 1.0, **rates}) + "\\n")
        if (epoch + 1) % int(args.knn_freq) == 0:
            log.write(json.dumps({"epoch": epoch, "epoch_float": epoch + 1.0, "knn": 40.0 + epoch}) + "\\n")
"""
# A part that writes a table, starts a process of its own, and hangs.
HANGING = """
import subprocess, sys, time
with open(sys.argv[sys.argv.index("--json") + 1], "a") as file:
    file.write('{"title": "a table", "header": ["a", "b|c"], "rows": [["x|y", 1.5]]}\\n')
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def on_gpu(monkeypatch):
    """The script as a module, on a machine that needs no look at it."""
    spec = importlib.util.spec_from_file_location("on_gpu", ROOT / "scripts" / "on_gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "describe_machine", lambda args: MACHINE)
    return module


def read(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def parts(folder):
    return {line["name"]: line for line in read(folder) if line["kind"] == "part"}


def check_folder(folder):
    """At most 8 files at one level, and Markdown tables whose rows have as many cells as their header."""
    files = sorted(folder.rglob("*"))
    assert len(files) <= 8 and all(path.is_file() and path.parent == folder for path in files)
    widths, tables = [], 0
    for line in [*(folder / "results.md").read_text().splitlines(), ""]:
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
            continue
        if widths:
            assert len(widths) > 2 and len(set(widths)) == 1, line
            tables += 1
        widths = []
    return tables


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ============ arguments ============
@pytest.mark.parametrize(
    "argv, words",
    [
        (["tets"], "no section tets"),
        (["tests", "--minutes", "0"], "--minutes 0 must be above 0"),
        (["tests", "--device", "gpu"], "--device gpu must be"),
        (["cifar", "--data_path", "/no/such/folder"], "/no/such/folder does not exist"),
        (["cifar", "--data_path", __file__], "no tar archive"),
        (["cifar"], "no network"),
        ([], "no network"),
    ],
)
def test_what_cannot_be_run_is_one_sentence_and_leaves_no_folder(
    argv, words, on_gpu, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(on_gpu, "is_online", lambda: False)
    monkeypatch.setattr(on_gpu, "CIFAR_FILES", "data/no_such_folder")
    out = tmp_path / "out"
    assert on_gpu.main([*argv, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "chosen, expected",
    [
        (["cifar", "tests"], ["tests", "cifar"]),
        (["bench"], ["bench"]),
        ([], ["tests", "bench", "profile", "cifar"]),
    ],
)
def test_the_chosen_sections_run_in_their_order(chosen, expected, on_gpu, monkeypatch, tmp_path):
    ran = []
    for name in on_gpu.SECTIONS:
        monkeypatch.setitem(on_gpu.SECTIONS, name, lambda task, name=name: ran.append(name))
    assert on_gpu.main([*chosen, "--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert ran == expected


def test_minutes_are_for_all_sections_and_what_one_leaves_is_for_the_next(
    on_gpu, monkeypatch, tmp_path
):
    assert on_gpu.section_limits(["tests", "bench"], None) == {"tests": 120, "bench": 180}
    assert on_gpu.section_limits(["tests", "bench"], 2.5) == {"tests": 60, "bench": 90}
    left = {}
    for name in on_gpu.SECTIONS:
        monkeypatch.setitem(
            on_gpu.SECTIONS, name, lambda task, name=name: left.update({name: task.left()})
        )
    argv = ["--smoke", "--minutes", "9", "--out", str(tmp_path)]
    assert on_gpu.main(argv) == 0
    assert 58 < left["tests"] <= 60  # 2 of 18 minutes
    assert 148 < left["bench"] <= 150  # its 90 s and those of the tests, which took none
    assert 175 < left["profile"] <= 180  # not more than its usual three minutes
    assert 535 < left["cifar"] <= 540


# ============ parts ============
@pytest.mark.slow
def test_a_part_that_fails_or_hangs_is_a_row_and_the_rest_goes_on(on_gpu, monkeypatch, tmp_path):
    commands = [
        """-c 'raise RuntimeError("no such kernel")'""",
        f"-c {shlex.quote(HANGING)}",
        "-c print(1)",
    ]
    monkeypatch.setattr(on_gpu, "BENCHES_IN_SMALL", commands)
    monkeypatch.setattr(on_gpu, "BENCH_SECONDS_IN_SMALL", 2)
    start = time.monotonic()
    assert on_gpu.main(["bench", "--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - start < 30
    lines = read(tmp_path)
    rows = [line for line in lines if line["kind"] == "part"]
    assert [row["status"] for row in rows] == ["failed", "time limit", "ok"]
    assert rows[0]["note"] == "RuntimeError: no such kernel"
    # The table that the killed part had written is there, and was before the part's own row.
    kinds = [line["kind"] for line in lines]
    assert kinds == ["machine", "part", "table", "part", "part"]
    child = re.search(r"^child (\d+)", (tmp_path / "log.txt").read_text(), re.MULTILINE)
    deadline = time.monotonic() + 10
    while is_alive(child[1]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child[1])
    assert check_folder(tmp_path) == 2


@pytest.mark.slow
def test_parts_behind_the_end_of_their_section_are_not_run(on_gpu, monkeypatch, tmp_path):
    sleeping = "-c 'import time; time.sleep(600)'"
    monkeypatch.setattr(on_gpu, "BENCHES_IN_SMALL", [sleeping, "-c print(1)"])
    argv = ["bench", "--minutes", "0.02", "--smoke", "--device", "cpu", "--out", str(tmp_path)]
    assert on_gpu.main(argv) == 1
    rows = [line for line in read(tmp_path) if line["kind"] == "part"]
    assert [row["status"] for row in rows] == ["time limit", "not run"]


def test_tables_come_while_a_part_runs_and_sigterm_takes_it_along(tmp_path):
    code = (
        "import runpy, sys\n"
        "script = runpy.run_path('scripts/on_gpu.py')\n"
        "script['signal'].signal(script['signal'].SIGTERM, script['stop'])\n"
        "names = script['main'].__globals__\n"
        f"names['describe_machine'] = lambda args: {MACHINE!r}\n"
        f"names['BENCHES_IN_SMALL'] = [{'-c ' + shlex.quote(HANGING)!r}]\n"
        f"sys.exit(names['main'](['bench', '--smoke', '--out', {str(tmp_path)!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    log, child, tables = tmp_path / "log.txt", None, ""
    deadline = time.monotonic() + 60
    while child is None or "| x\\|y |" not in tables:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
        text = log.read_text() if log.exists() else ""
        tables = (tmp_path / "results.md").read_text() if text else ""
        child = re.search(r"^child (\d+)\n", text, re.MULTILINE)
    process.terminate()
    assert process.wait(timeout=30) == 143
    while is_alive(child[1]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child[1])


def test_a_later_command_goes_on_in_the_same_files(on_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "BENCHES_IN_SMALL", ["-c print(1)"])
    for _ in range(2):
        assert on_gpu.main(["bench", "--smoke", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "results.md").read_text().count("## a card") == 2
    assert check_folder(tmp_path) == 2


def test_a_section_that_breaks_does_not_stop_the_next(on_gpu, monkeypatch, tmp_path):
    def broken(task):
        raise OSError("no space left")

    monkeypatch.setitem(on_gpu.SECTIONS, "tests", broken)
    monkeypatch.setattr(on_gpu, "BENCHES_IN_SMALL", ["-c print(1)"])
    assert on_gpu.main(["tests", "bench", "--smoke", "--out", str(tmp_path)]) == 1
    rows = [line for line in read(tmp_path) if line["kind"] == "part"]
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert "no space left" in rows[0]["note"]


@pytest.mark.slow
def test_the_row_of_the_tests_counts_them_and_names_those_that_fail(on_gpu, monkeypatch, tmp_path):
    file = tmp_path / "test_two.py"
    file.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_one_is_one(): pass\ndef test_one_is_two(): assert 1 == 2\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--device')\n"
    )
    monkeypatch.setattr(on_gpu, "TESTS_IN_SMALL", str(file))
    out = tmp_path / "out"
    assert on_gpu.main(["tests", "--smoke", "--out", str(out)]) == 1
    note = parts(out)[str(file)]["note"]
    assert "1 failed, 1 passed" in note and note.endswith("test_two.py::test_one_is_two")


def test_without_pytest_a_sentence_says_so(on_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu.importlib.util, "find_spec", lambda name: None)
    assert on_gpu.main(["tests", "--smoke", "--out", str(tmp_path)]) == 0
    row = parts(tmp_path)["tests/gpu/test_photometry.py"]
    assert (row["status"], row["note"]) == ("not run", "pytest is not installed")


# ============ cifar ============
@pytest.mark.parametrize("seconds", [120, 240, 600])
@pytest.mark.parametrize("epoch", [0.7, 4.0, 50.0])
def test_the_planned_run_fits_into_its_time_with_a_knn_about_every_minute(on_gpu, seconds, epoch):
    first, knn = 9.0, 5.0
    epochs, knn_freq = on_gpu.plan_run(seconds, first, epoch, knn)
    assert first + epochs * epoch + -(-epochs // knn_freq) * knn <= seconds
    assert first + (epochs + 2) * epoch + (epochs // knn_freq) * knn > 0.8 * seconds
    assert knn_freq * epoch <= 60 + epoch / 2 or knn_freq == 1
    assert epochs // knn_freq >= 2 or epoch == 50.0


@pytest.mark.slow
def test_every_method_of_cifar_trains_in_its_share_and_its_knn_comes_with_the_time(
    on_gpu, monkeypatch, tmp_path
):
    script = tmp_path / "train.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(
        on_gpu, "CIFAR_METHODS", {"swav": (str(script), 2), "dino": (str(script), 1)}
    )
    monkeypatch.setattr(on_gpu, "SHORTEST_RUN", 0.5)
    out = tmp_path / "out"
    argv = ["cifar", "--minutes", "0.4", "--data_path", str(tmp_path), "--out", str(out)]
    assert on_gpu.main(argv) == 0
    rows = [line for line in read(out) if line["kind"] == "knn"]
    for method in ("swav", "dino"):
        own = [row for row in rows if row["method"] == method]
        assert len(own) > 1 and own == sorted(own, key=lambda row: (row["minutes"], row["epoch"]))
        assert own[0]["minutes"] < own[-1]["minutes"]  # when each came, not when all were done
        assert all(row["top1"] == 39.0 + row["epoch"] for row in own)
        assert parts(out)[method]["status"] == "ok"
        assert f"k-NN {own[-1]['top1']:.2f} %" in parts(out)[method]["note"]
        assert (out / f"cifar_{method}.jsonl").exists()
    assert parts(out)["swav"]["seconds"] > parts(out)["dino"]["seconds"]
    kinds = [line["kind"] for line in read(out)]
    assert kinds.index("knn") < kinds.index("part")
    assert check_folder(out) == 2


def test_a_method_of_which_no_epoch_fits_is_not_run(on_gpu, monkeypatch, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(on_gpu, "CIFAR_METHODS", {"swav": (str(script), 1)})
    monkeypatch.setattr(on_gpu, "SHORTEST_RUN", 0.5)
    out = tmp_path / "out"
    monkeypatch.setattr(on_gpu, "epoch_times", lambda lines: (1.0, 100.0, 0.0))
    argv = ["cifar", "--minutes", "0.5", "--data_path", str(tmp_path), "--out", str(out)]
    assert on_gpu.main(argv) == 0
    row = parts(out)["swav"]
    assert row["status"] == "not run" and "an epoch 100 s" in row["note"]


@pytest.mark.slow
def test_a_method_that_fails_leaves_the_others_their_time(on_gpu, monkeypatch, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(STAND_IN)
    broken = tmp_path / "broken.py"
    broken.write_text("raise ValueError('--arch is not known')\n")
    methods = {"swav": (str(broken), 1), "dino": (str(script), 1)}
    monkeypatch.setattr(on_gpu, "CIFAR_METHODS", methods)
    monkeypatch.setattr(on_gpu, "SHORTEST_RUN", 0.5)
    out = tmp_path / "out"
    argv = ["cifar", "--minutes", "0.2", "--data_path", str(tmp_path), "--out", str(out)]
    assert on_gpu.main(argv) == 1
    assert parts(out)["swav"]["note"] == "ValueError: --arch is not known"
    assert parts(out)["dino"]["status"] == "ok"


def test_a_trial_without_a_knn_is_a_failure_that_says_so(on_gpu, monkeypatch, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(STAND_IN.replace("% int(args.knn_freq) == 0", "< 0"))
    monkeypatch.setattr(on_gpu, "CIFAR_METHODS", {"swav": (str(script), 1)})
    monkeypatch.setattr(on_gpu, "SHORTEST_RUN", 0.5)
    out = tmp_path / "out"
    argv = ["cifar", "--minutes", "0.5", "--data_path", str(tmp_path), "--out", str(out)]
    assert on_gpu.main(argv) == 1
    assert "the images need labels" in parts(out)["swav"]["note"]


def archive(path, names):
    with tarfile.open(path, "w:xz") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"abc"))
    return path


def test_an_archive_of_images_is_unpacked_to_the_folder_of_its_splits(on_gpu, tmp_path):
    names = ["set/train/cat/0.jpg", "set/train/dog/1.jpg", "set/test/cat/2.jpg"]
    folder = on_gpu.unpack(archive(tmp_path / "a.tar.xz", names), tmp_path / "unpacked")
    assert folder == tmp_path / "unpacked" / "set"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    assert files == ["test/cat/2.jpg", "train/cat/0.jpg", "train/dog/1.jpg"]
    assert (folder / "test/cat/2.jpg").read_bytes() == b"abc"


@pytest.mark.parametrize("name", ["../outside.jpg", "/tmp/outside.jpg"])
def test_an_archive_cannot_write_outside_of_its_folder(name, on_gpu, tmp_path):
    with pytest.raises(ValueError, match="outside"):
        on_gpu.unpack(archive(tmp_path / "a.tar.xz", [name]), tmp_path / "deep" / "unpacked")
    assert not (tmp_path / "deep" / "outside.jpg").exists()


# ============ benchmarks ============
class ParsedError(Exception):
    """The flags were taken, and nothing was run."""


def test_every_benchmark_is_run_with_flags_that_it_has(on_gpu, monkeypatch):
    commands = [shlex.split(text) for text in [*on_gpu.BENCHES, *on_gpu.PROFILES]]
    without_gpu = {"bench.house", "bench.reduced_decoding"}
    measured = {f"bench.{name}" for name in all_benches.names()} - without_gpu
    assert {module for _, module, *_ in commands} == measured
    for _, name, *flags in commands:
        module = importlib.import_module(name)
        parse = module.parse_args

        def parse_only(*args, parse=parse, **kwargs):
            parse(*args, **kwargs)
            raise ParsedError

        monkeypatch.setattr(module, "parse_args", parse_only)
        with pytest.raises(ParsedError):
            module.main([*flags, "--device", "cuda", "--json", "file"])
        monkeypatch.setattr(module, "parse_args", parse)


def test_the_training_runs_have_flags_that_their_scripts_have(on_gpu):
    for script, _ in [*on_gpu.CIFAR_METHODS.values(), *on_gpu.CIFAR_IN_SMALL.values()]:
        name, *flags = shlex.split(script)
        module = importlib.import_module(name.removesuffix(".py"))
        args = module.get_parser().parse_args([*flags, "--epochs", "9", "--knn_freq", "2"])
        assert args.knn_freq == 2 and args.epochs == 9


def test_a_table_is_also_a_line_of_json(tmp_path, capsys):
    file = tmp_path / "tables.jsonl"
    assert all_benches.main(["sinkhorn", "swav_loss", "--smoke", "--json", str(file)]) == 0
    tables = [json.loads(line) for line in file.read_text().splitlines()]
    assert [table["title"].split(",")[0] for table in tables] == [
        "Sinkhorn",
        "SwAV loss forward + backward",
    ]
    assert all(len(row) == len(table["header"]) for table in tables for row in table["rows"])
    assert tables[0]["rows"][0][0] == "published" and tables[0]["rows"][0][2] == 1.0


def test_a_benchmark_that_fails_does_not_stop_the_others(capsys):
    assert all_benches.main(["sinkhorn", "swav_loss", "--smoke", "--batch", "-1"]) == 1
    assert "failed: sinkhorn, swav_loss" in capsys.readouterr().err


@pytest.mark.slow
def test_throughput_has_the_columns_of_the_papers_tables(tmp_path, capsys):
    file = tmp_path / "tables.jsonl"
    assert all_benches.main(["throughput", "--smoke", "--json", str(file)]) == 0
    inference, training = [json.loads(line) for line in file.read_text().splitlines()]
    columns = ["model", "blocks", "dim", "heads", "tokens", "M params", "batch", "im/s", "peak GB"]
    assert inference["header"] == columns
    assert [row[:6] for row in inference["rows"]] == [
        ["resnet10", "-", 512, "-", "-", "4.9"],
        ["vit_micro/4", 4, 96, 3, 17, "0.5"],
    ]
    columns = ["method", "model", "multi-crop", "batch", "im/s", "h / 100 epochs", "peak GB"]
    assert training["header"] == columns
    assert [row[:3] for row in training["rows"]] == [
        [method, model, crops]
        for method, model in (("SwAV", "resnet10"), ("DINO", "vit_micro/4"))
        for crops in ("2 x 16", "2 x 16 + 2 x 8")
    ]
    for *_, batch, rate, hours, peak in training["rows"]:
        assert batch == 2 and peak > 0
        assert hours == pytest.approx(100 * 1_281_167 / rate / 3600)


@pytest.mark.parametrize(
    "name, blocks, dim, heads, tokens, millions",
    [("resnet50", "-", 2048, "-", "-", 23), ("vit_small/8", 12, 384, 6, 785, 21)],
)
def test_networks_have_the_sizes_of_the_thesis_table(name, blocks, dim, heads, tokens, millions):
    arch, patch_size = throughput.named_network(name)
    found = throughput.describe(build_backbone(arch, patch_size))
    assert found[:4] == [blocks, dim, heads, tokens] and int(float(found[4])) == millions


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--crops", "2x224+"], "must be crops such as 2x224+6x96"),
        (["--crops", "1x224"], "must be crops such as 2x224+6x96"),
        (["--arch", "vit_small/x"], "must be a network and a patch, as vit_small/8"),
    ],
)
def test_a_network_or_crops_that_cannot_be_read_are_one_sentence(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        throughput.main(flags)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    tried = []

    def run(batch):
        tried.append(batch)
        if batch > 16:
            raise torch.OutOfMemoryError
        return batch

    assert step_profile.with_memory(run, 64) == 16 and tried == [64, 32, 16]
    with pytest.raises(torch.OutOfMemoryError):
        step_profile.with_memory(lambda batch: run(64), 2)


def test_the_published_step_is_left_out_when_a_gradient_overflows():
    weight = torch.ones(3, requires_grad=True)
    optimizer = train_step.PublishedLARC([weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert weight.isfinite().all()
        assert (weight == 1).all() == (factor == float("inf"))


@pytest.mark.slow
def test_the_whole_command_runs_in_small_on_a_cpu(tmp_path):
    out = tmp_path / "out"
    command = ["bash", "scripts/on_gpu.sh", "--device", "cpu", "--smoke", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log = (out / "log.txt").read_text() if out.exists() else run.stderr
    assert run.returncode == 0, run.stdout + log
    assert {row["status"] for row in parts(out).values()} == {"ok"}
    assert {row["section"] for row in parts(out).values()} == {"tests", "bench", "profile", "cifar"}
    tables = [line["title"] for line in read(out) if line["kind"] == "table"]
    assert any("Sinkhorn" in title for title in tables)
    assert any(title.startswith("Parts of a step: dino") for title in tables)
    assert [line["epoch"] for line in read(out) if line["kind"] == "knn"] == [1]
    assert check_folder(out) == len(tables) + 2
    assert os.listdir(out) and "left]" in run.stdout
