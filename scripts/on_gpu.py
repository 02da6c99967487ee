"""Test, measure and train on a GPU, each part in a process and a time of its own.

  tests    tests/gpu                                                       2 minutes at most
  bench    every benchmark of bench/, those with open targets first        3 minutes
  profile  bench/step_profile.py: parts of a SwAV and of a DINO step       3 minutes
  cifar    SwAV on CIFAR-10 with a k-NN every minute, then other methods  10 minutes

    bash scripts/on_gpu.sh [tests] [bench] [profile] [cifar] [flags]

The folder --out gets results.jsonl (everything, a line each), results.md (the same as tables, which
go into RESULTS.md as they are), log.txt (all output) and cifar_<method>.jsonl (the log of a training
run). Each is written as results come, and a later command goes on in the same files. A part that
fails, or that is killed at the end of its time, is a row that says so; the rest goes on, and the exit
status is 1.
Needs only Python's standard library; the parts need what requirements.txt names.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from bench import reports
from bench.cifar_minutes import SETTINGS, epoch_times
from bench.processes import FAILED, KILLED, NOT_RUN, OK, ROOT, NewLines, note_of, run_process
from bench.reports import markdown_table, num_cores

# ============ what is run ============
MINUTES = {"tests": 2.0, "bench": 3.0, "profile": 3.0, "cifar": 10.0}  # at most, in this order

PYTEST = "-m pytest -m gpu -p no:cacheprovider -vv -rfE --tb=short --durations=10"
TESTS, TESTS_IN_SMALL = "tests/gpu", "tests/gpu/test_photometry.py"

# Those with open targets first. With --smoke, all in one process and in tiny: `python -m bench`.
BENCHES = [
    "-m bench.sinkhorn",
    "-m bench.train_step --arch resnet50 --batch 64",
    "-m bench.train_step --arch resnet50 --batch 64 --compile",
    "-m bench.kmeans --repeats 2",
    "-m bench.swav_loss",
    "-m bench.dino_loss --batch 64",
    "-m bench.dino_step --arch vit_small --batch 64 --local_crops 8",
    "-m bench.larc_step",
    "-m bench.teacher_update",
    "-m bench.self_label",
    "-m bench.knn_search",
    "-m bench.svm --classes 0",
    "-m bench.deeper_clustering --repeats 1",
    "-m bench.input_pipeline --repeats 3",
    "-m bench.throughput --arch resnet50 vit_small/16 vit_small/8 vit_base/16 vit_base/8 --batch 128 "
    "--train_arch resnet50 vit_small/16 --train_batch 64 --repeats 3",
]
BENCHES_IN_SMALL = ["-m bench"]
BENCH_SECONDS, BENCH_SECONDS_IN_SMALL = 75, 170  # at most for one of these commands

PROFILES = [
    "-m bench.step_profile --method swav --repeats 3",
    "-m bench.step_profile --method dino --repeats 3",
]

# Ten minutes on one large GPU and 16 cores: the command of a method, and the share of the time it gets.
CIFAR_SHARES = {"swav": 4, "simclr": 2, "dino": 2, "deepclusterv2": 2}
CIFAR_METHODS = {
    method: (SETTINGS["cuda"][method].command, share) for method, share in CIFAR_SHARES.items()
}
CIFAR_IN_SMALL = {"swav": ("main_swav.py --data_path digits --epochs 1 --knn_freq 1", 1)}
KNN_SECONDS = 60  # between two k-NN evaluations
SHORTEST_RUN = 45  # seconds; less is not worth a start
CIFAR_FILES = "data/cifar-10-batches-py"  # where torchvision has put CIFAR-10, if it was downloaded
CIFAR_SERVER = ("www.cs.toronto.edu", 443)


# ============ results ============
class Results:
    """Appends to results.jsonl, and writes results.md anew each time, so that both are always whole."""

    def __init__(self, folder):
        self.lines_file = folder / "results.jsonl"
        self.tables_file = folder / "results.md"
        self.lines = []
        if self.lines_file.exists():
            self.lines = [json.loads(line) for line in self.lines_file.read_text().splitlines()]
        self.any_failed = False

    def add(self, kind, **values):
        line = {"kind": kind, **values}
        self.lines.append(line)
        with open(self.lines_file, "a") as file:
            file.write(json.dumps(line) + "\n")
        beside = self.tables_file.with_suffix(".tmp")
        beside.write_text(markdown(self.lines))
        os.replace(beside, self.tables_file)

    def add_part(self, section, name, command, status, seconds, note):
        self.any_failed |= status in (FAILED, KILLED)
        self.add(
            "part",
            section=section,
            name=name,
            command=command,
            status=status,
            seconds=round(seconds, 1),
            note=note,
        )


def markdown(lines):
    """All results as Markdown: for each start of this script a heading, the machine and tables."""
    starts = [i for i, line in enumerate(lines) if line["kind"] == "machine"]
    ends = [*starts[1:], len(lines)]
    texts = [markdown_of_a_start(lines[i:j]) for i, j in zip(starts, ends, strict=True)]
    return "\n".join(texts)


def markdown_of_a_start(lines):
    machine = lines[0]
    parts = [line for line in lines if line["kind"] == "part"]
    tables = [line for line in lines if line["kind"] == "table"]
    knn = [line for line in lines if line["kind"] == "knn"]
    text = [
        f"## {machine['card']}, {machine['date']}, commit {machine['commit']}",
        "",
        f"{machine['card']} ({machine['card_memory']}), driver {machine['driver']}, CUDA "
        f"{machine['cuda']}, cuDNN {machine['cudnn']}; {machine['cores']} CPU cores; torch "
        f"{machine['torch']}, torchvision {machine['torchvision']}, Python {machine['python']}; "
        f"`{machine['command']}`",
        "",
    ]
    header = ["section", "part", "result", "seconds", "command"]
    rows = [
        [line["section"], line["name"], result_of(line), line["seconds"], f"`{line['command']}`"]
        for line in parts
    ]
    text += markdown_table(header, rows)
    for table in tables:
        text += [f"{table['title']} (`{table['command']}`):", ""]
        text += markdown_table(table["header"], table["rows"])
    if knn:
        text += ["k-NN top-1 (%) against the time since the training's start:", ""]
        rows = [[line["method"], line["minutes"], line["epoch"], line["top1"]] for line in knn]
        text += markdown_table(["method", "minutes", "epoch", "k-NN"], rows)
    return "\n".join(text)


def result_of(part):
    return f"{part['status']}: {part['note']}" if part["note"] else part["status"]


# ============ processes and their time ============
class Screen:
    """Lines for people, each with the time that is left for everything."""

    def __init__(self, deadline):
        self.deadline = deadline

    def say(self, text):
        left = max(0, round(self.deadline - time.monotonic()))
        print(f"[{left // 60:2}:{left % 60:02} left] {text}", flush=True)


class Task:
    """What the sections share: arguments, results, log, scratch folder, and the end of the section."""

    def __init__(self, args, results, screen, scratch):
        self.args, self.results, self.screen, self.scratch = args, results, screen, scratch
        self.log = args.out / "log.txt"
        self.deadline = 0.0
        self.environment = {"OMP_NUM_THREADS": "1"} if args.smoke else {}
        self.num_tables = 0

    def left(self):
        return self.deadline - time.monotonic()

    def run(self, section, name, arguments, seconds):
        """Run `python arguments` as a part, for at most `seconds`, and add its tables and its row."""
        command = f"python {arguments}"
        if self.left() <= 0:
            note = f"the time of {section} was over"
            self.results.add_part(section, name, command, NOT_RUN, 0, note)
            self.screen.say(f"{section}, {name}: not run, {note}")
            return
        self.num_tables += 1
        tables = NewLines(self.scratch / f"tables_{self.num_tables}.jsonl")
        self.screen.say(f"{section}, {name}")

        def watch():
            for table in tables.read():
                self.results.add("table", section=section, name=name, command=command, **table)

        status, seconds, output = run_process(
            [sys.executable, *shlex.split(arguments), "--json", str(tables.path)],
            self.log,
            min(self.deadline, time.monotonic() + seconds),
            self.screen.say,
            self.environment,
            watch,
        )
        self.finish(section, name, command, status, seconds, note_of(status, seconds, output))

    def finish(self, section, name, command, status, seconds, note):
        self.results.add_part(section, name, command, status, seconds, note)
        about = f", {note}" if note else ""
        self.screen.say(f"{section}, {name}: {status} in {seconds:.0f} s{about}")


# ============ sections ============
def run_tests(task):
    tests = TESTS_IN_SMALL if task.args.smoke else TESTS
    command = f"{PYTEST} {tests} --device {task.args.device}"
    if importlib.util.find_spec("pytest") is None:
        note = "pytest is not installed"
        task.finish("tests", tests, f"python {command}", NOT_RUN, 0, note)
        return
    task.screen.say(f"tests, {tests}")
    status, seconds, output = run_process(
        [sys.executable, *shlex.split(command)],
        task.log,
        task.deadline,
        task.screen.say,
        task.environment,
    )
    note = note_of(status, seconds, output)
    counts = [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.:]+", line)]
    if counts and status != KILLED:
        note = counts[-1].strip("= ")
    failures = re.findall(r"^(?:FAILED|ERROR) (?:tests/gpu/)?(\S+)", output, re.MULTILINE)
    if failures:
        note += f": {', '.join(dict.fromkeys(failures))}"
    task.finish("tests", tests, f"python {command}", status, seconds, note)


def run_bench(task):
    seconds = BENCH_SECONDS_IN_SMALL if task.args.smoke else BENCH_SECONDS
    for arguments in BENCHES_IN_SMALL if task.args.smoke else BENCHES:
        name = arguments.removeprefix("-m bench").strip(". ") or "all"
        flags = f" --device {task.args.device}" + (" --smoke" if task.args.smoke else "")
        task.run("bench", name, arguments + flags, seconds)


def run_profile(task):
    flags = f" --device {task.args.device}" + (" --smoke" if task.args.smoke else "")
    for done, arguments in enumerate(PROFILES):
        name = arguments.partition("--method ")[2].split()[0]
        seconds = task.left() / (len(PROFILES) - done)  # the others keep theirs
        task.run("profile", name, arguments + flags, seconds)


def run_cifar(task):
    if task.args.smoke:
        data, methods = "digits", CIFAR_IN_SMALL
    else:
        data, methods = task.args.data_path, CIFAR_METHODS
        if os.path.isfile(data):
            start = time.monotonic()
            task.screen.say(f"cifar, unpacking {data}")
            data = str(unpack(data, task.scratch / "images"))
            task.screen.say(f"cifar, unpacked in {time.monotonic() - start:.0f} s")
    shares = sum(share for _, share in methods.values())
    for method, (script, share) in methods.items():
        seconds = task.left() * share / shares
        shares -= share
        try:
            train(task, method, script, data, seconds)
        finally:
            shutil.rmtree(task.scratch / method, ignore_errors=True)


SECTIONS = {"tests": run_tests, "bench": run_bench, "profile": run_profile, "cifar": run_cifar}


# ============ training on CIFAR-10 ============
def train(task, method, script, data, seconds):
    """Train by a method for `seconds`: two epochs to see how long one takes, then as many as fit."""
    deadline = time.monotonic() + seconds
    workers = max(1, num_cores() - 1)  # one core is the training's own
    arguments = f"{script} --data_path {shlex.quote(data)} --workers {workers}"
    if task.args.smoke:
        arguments = script
    arguments += f" --device {task.args.device}"
    shown = f"python {arguments}".replace(str(task.scratch / "images"), "FOLDER")
    if seconds < SHORTEST_RUN and not task.args.smoke:
        note = f"{max(0, seconds):.0f} s were left for it"
        task.finish("cifar", method, shown, NOT_RUN, 0, note)
        return
    if not task.args.smoke:
        trial = follow(task, method, f"{arguments} --epochs 2 --knn_freq 2", deadline, "trial")
        times = epoch_times(trial["lines"])
        has_knn = any("knn" in line for _, line in trial["lines"])
        if trial["status"] != OK or times is None or not has_knn:
            note = trial["note"] or "the log of two epochs has no k-NN: the images need labels"
            status = FAILED if trial["status"] == OK else trial["status"]
            command = f"{shown} --epochs 2 --knn_freq 2"
            task.finish("cifar", method, command, status, trial["seconds"], note)
            return
        first, epoch, knn = times
        left = deadline - time.monotonic()
        epochs, knn_freq = plan_run(left, first, epoch, knn)
        if epochs == 0:
            note = f"a start takes {first:.0f} s, an epoch {epoch:.0f} s, a k-NN {knn:.0f} s, and "
            note += f"{max(0, left):.0f} s were left"
            task.finish("cifar", method, shown, NOT_RUN, 0, note)
            return
        task.screen.say(
            f"    an epoch takes {epoch:.1f} s, a k-NN {knn:.1f} s, a start {first:.1f} s: "
            f"{epochs} epochs, a k-NN every {knn_freq}"
        )
        arguments += f" --epochs {epochs} --knn_freq {knn_freq}"
        shown += f" --epochs {epochs} --knn_freq {knn_freq}"
    run = follow(task, method, arguments, deadline, "run")
    accuracies = [(moment, line["knn"]) for moment, line in run["lines"] if "knn" in line]
    rates = [line for _, line in run["lines"] if "images_per_second" in line]
    note = run["note"]
    if run["status"] == OK and not accuracies:
        run["status"], note = FAILED, "no k-NN came"
    elif run["status"] == OK:
        moment, top1 = accuracies[-1]
        note = f"k-NN {top1:.2f} % after {moment / 60:.1f} minutes, "
        note += f"{rates[-1]['images_per_second']:,.0f} images/s, "
        note += f"{100 * rates[-1]['data_share']:.0f} % of the time waiting for data"
    task.finish("cifar", method, shown, run["status"], run["seconds"], note)


def follow(task, method, arguments, deadline, folder):
    """Run a training script and read its log as it grows: status, seconds, note, and lines.

    The lines are pairs of the seconds since the start and a line of log.jsonl. Those with a k-NN are
    added to the results, unless the folder is that of a trial.
    """
    path = task.scratch / method / folder
    path.mkdir(parents=True)
    log, lines, start = NewLines(path / "log.jsonl"), [], time.monotonic()
    task.screen.say(f"cifar, {method}, {folder}")

    def watch():
        for line in log.read():
            moment = time.monotonic() - start
            lines.append((moment, line))
            if "knn" in line and folder != "trial":
                minutes, epoch = round(moment / 60, 2), line["epoch"] + 1
                top1 = round(line["knn"], 2)
                task.results.add("knn", method=method, minutes=minutes, epoch=epoch, top1=top1)
                task.screen.say(f"    epoch {epoch}: k-NN {top1:.2f} %")

    status, seconds, output = run_process(
        [sys.executable, *shlex.split(arguments), "--dump_path", str(path)],
        task.log,
        deadline,
        task.screen.say,
        task.environment,
        watch,
    )
    if folder != "trial" and lines:
        shutil.copyfile(log.path, task.args.out / f"cifar_{method}.jsonl")
    note = note_of(status, seconds, output)
    return {"status": status, "seconds": seconds, "note": note, "lines": lines}


def plan_run(seconds, first, epoch, knn):
    """Epochs that fit into `seconds`, a tenth of which is kept back, and epochs between two k-NN.

    first, epoch, knn: seconds as epoch_times has them. No epoch may fit.
    """
    every = min(KNN_SECONDS, seconds / 3)
    knn_freq = max(1, round(every / epoch))
    epochs = max(0, int((0.9 * seconds - first) / (epoch + knn / knn_freq)))
    return epochs, min(knn_freq, epochs)


def unpack(archive, folder):
    """Write the files of a tar archive of images to `folder`; returns the folder that has the splits."""
    made = set()
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if not member.isfile():
                continue
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"--data_path {archive} has a file outside of it: {member.name}")
            target = folder / path
            if target.parent not in made:
                target.parent.mkdir(parents=True, exist_ok=True)
                made.add(target.parent)
            target.write_bytes(tar.extractfile(member).read())
    inside = list(folder.iterdir()) if folder.exists() else []
    while len(inside) == 1 and inside[0].is_dir():
        folder = inside[0]
        inside = list(folder.iterdir())
    if not inside:
        raise ValueError(f"--data_path {archive} has no file in it")
    return folder


# ============ the machine ============
def describe_machine(args):
    """Machine, versions, commit, date and command; ValueError where PyTorch or the GPU is missing."""
    facts = reports.describe_machine(args.device)
    command = shlex.join(["bash", "scripts/on_gpu.sh", *args.given])
    return {**facts, "commit": args.commit or facts["commit"], "command": command}


# ============ arguments ============
def get_parser():
    parser = argparse.ArgumentParser(
        prog="on_gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all by default"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="for all sections; their usual times shrink or grow alike, and what one leaves the next have",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/on_gpu"), help="folder of the results"
    )
    parser.add_argument(
        "--data_path",
        default="cifar10",
        help="of cifar: a folder with train/<class>/ and test/<class>/, such a folder in a tar archive, "
        "or cifar10, which torchvision downloads to data/ (default: cifar10)",
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (default: cuda)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that all works")
    parser.add_argument("--commit", default=None, help="what is run, where git does not say it")
    return parser


def check_args(args):
    """ValueError for what cannot be, before anything is started; fills in `sections`."""
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        raise ValueError(f"there is no section {unknown[0]}: take {', '.join(SECTIONS)}")
    args.sections = [name for name in SECTIONS if name in (args.sections or SECTIONS)]
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes:g} must be above 0")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device {args.device} must be cuda, cuda:N or cpu")
    if "cifar" in args.sections and not args.smoke:
        check_data(args.data_path)


def check_data(data_path):
    if data_path == "cifar10":
        if not (ROOT / CIFAR_FILES).is_dir() and not is_online():
            raise ValueError(
                "--data_path cifar10 is not in data/ and there is no network to download it: give a "
                "folder or a tar archive of its images, or leave the section cifar out"
            )
    elif os.path.isfile(data_path):
        if not tarfile.is_tarfile(data_path):
            raise ValueError(f"--data_path {data_path} is a file, but no tar archive")
    elif not os.path.isdir(data_path):
        raise ValueError(f"--data_path {data_path} does not exist")


def is_online():
    try:
        socket.create_connection(CIFAR_SERVER, timeout=3).close()
    except OSError:
        return False
    return True


def section_limits(sections, minutes):
    """{section: seconds}: the usual ones, or all alike shorter or longer, `minutes` together."""
    usual_minutes = sum(MINUTES[name] for name in sections)
    factor = 1.0 if minutes is None else minutes / usual_minutes
    return {name: 60 * factor * MINUTES[name] for name in sections}


# ============ main ============
def main(argv):
    """Run the sections; returns 0, 1 if a part failed, or 2 for arguments that cannot be."""
    args = get_parser().parse_args(argv)
    args.given = argv
    start = time.monotonic()
    try:
        check_args(args)
        args.out = args.out.resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        machine = describe_machine(args)
    except (ValueError, OSError) as error:
        print(f"on_gpu.sh: {error}", file=sys.stderr)
        return 2
    limits = section_limits(args.sections, args.minutes)
    screen = Screen(start + sum(limits.values()))
    results = Results(args.out)
    results.add("machine", **machine)
    screen.say(f"{machine['card']}, torch {machine['torch']}, commit {machine['commit']}")
    with tempfile.TemporaryDirectory(prefix="on_gpu_", ignore_cleanup_errors=True) as scratch:
        task = Task(args, results, screen, Path(scratch))
        end = start
        for name in args.sections:
            # What earlier sections left is this one's too, up to what it has at most.
            end += limits[name]
            most = max(limits[name], 60 * MINUTES[name])
            task.deadline = min(end, time.monotonic() + most)
            try:
                SECTIONS[name](task)
            # A fault of this script, or a full disk: the other sections still run.
            except Exception as error:
                note = f"{type(error).__name__}: {error}"
                task.finish(name, "all", "", FAILED, 0, note)
    print(f"\n{results.tables_file}")
    return 1 if results.any_failed else 0


def stop(number, frame):
    """Leave through the `finally` clauses, which kill what was started."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main(sys.argv[1:]))
