"""Learning per minute: k-NN on CIFAR-10 after so many minutes of training, method by method.

    python -m bench.cifar_minutes --data_path cifar10_folder            two CPU cores, 3 seeds
    python -m bench.cifar_minutes --data_path cifar10_folder --held_out --methods swav --flags "--width 0.5"
    python -m bench.cifar_minutes --data_path cifar10 --device cuda     one GPU
    python -m bench.cifar_minutes --smoke                               tiny, on digits

A run of a method is one schedule that ends with the last of --minutes: a trial tells how long an epoch
takes, --epochs is what fits. At each of the other moments the run is stopped by SIGTERM, evaluated by
eval_knn.py (k = 20, temperature 0.07), and started again, which continues it to the last bit; from a fifth
of the time on with as many --epochs as fit at its own rate, since a trial of seconds is some percent off.

What counts as time: from the moment at which a run has opened its images and describes itself (args.json)
until its checkpoint is written, so loading, every iteration, slow first ones too, clustering, saving and
drawing. What does not: starting Python, opening the images, evaluating. Where that differs from the title
of a column by more than 5 %, the cell says after how many minutes it was.

The images that count are the test images; settings are chosen with --held_out, which splits the training
images: every tenth is classified by the others, and trained on are the others alone.
lightly's own recipe of SwAV (bench/lightly_swav.py) runs beside these where the package is installed.

Each result is a line of --out/results.jsonl as it comes; --out/results.md is the table. What is there is not
done again: the same command goes on where it was stopped, in the middle of a training too. A run that fails
is said, the others go on, and the exit status is 1. Loading this file needs only the standard library.
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

from bench.processes import (
    OK,
    POLL_SECONDS,
    PROGRESS_SECONDS,
    STOPPED,
    NewLines,
    note_of,
    run_process,
)
from bench.reports import describe_machine, markdown_table, num_cores


# ============ settings ============
class Settings(NamedTuple):
    """How a method trains. threads: of PyTorch, None for its own choice; workers: loader processes, None
    for a core less than there are; knn: further flags of eval_knn.py."""

    command: str
    threads: int | None = None
    workers: int | None = None
    knn: str = ""


NORMALISATION = "--mean 0.4914 0.4822 0.4465 --std 0.2470 0.2435 0.2616"
RUN = "--knn_freq 0 --checkpoint_freq 100000 --no-tensorboard"
# ResNet-10 of a quarter of the width, small stem, crops of 2 x 24 + 4 x 12 px, 64 images, in bf16. Two
# processes of one thread are up to a sixth faster, but SwAV learned much less by them (RESULTS.md).
CPU = (
    f"--preset cifar {NORMALISATION} --arch resnet10 --stem small --width 0.25 --precision bf16 "
    f"--batch_size 64 --color_jitter 0.4 0.4 0.4 0.1 --log_freq 20 {RUN}"
)
CROPS = "--nmb_crops 2 4 --size_crops 24 12 --base_lr 0.1"
# k-NN sees whole images, which are larger than the crops, as crops enlarge what is in them.
CORES = {"threads": 2, "workers": 1, "knn": "--size 32 --precision bf16"}
# ResNet-18 (DINO: ViT-Tiny with patches of 4 px), small stem, crops of 2 x 32 + 2 x 16 px. Learning rates
# are the preset's for 128 images, times 2.
CUDA = f"--preset cifar {NORMALISATION} --batch_size 256 --log_freq 50 {RUN}"
CUDA_RATES = "--base_lr 0.4 --final_lr 0.0004"
SETTINGS = {
    "cpu": {
        "swav": Settings(f"main_swav.py {CPU} {CROPS}", **CORES),
        "simclr": Settings(f"main_simclr.py {CPU} {CROPS} --temperature 0.2", **CORES),
        "dino": Settings(
            f"main_dino.py {CPU} --local_crops_number 4 --global_crops_size 24 --local_crops_size 12 "
            "--warmup_epochs 1 --lr 0.002",
            **CORES,
        ),
        "deepclusterv2": Settings(f"main_deepclusterv2.py {CPU} {CROPS}", **CORES),
        "lightly": Settings(
            "-m bench.lightly_swav --width 0.25 --log_freq 20", threads=1, workers=1
        ),
    },
    "cuda": {
        "swav": Settings(f"main_swav.py {CUDA} {CUDA_RATES}"),
        "simclr": Settings(f"main_simclr.py {CUDA} {CUDA_RATES}"),
        "dino": Settings(f"main_dino.py {CUDA}"),
        "deepclusterv2": Settings(f"main_deepclusterv2.py {CUDA} {CUDA_RATES}"),
        "lightly": Settings("-m bench.lightly_swav --log_freq 50"),
    },
}
CHOSEN = {  # where, for the foot of the table
    "cpu": "settings: those of --preset cifar, but for network, precision, crops, batch, colour jitter, "
    "learning rate (not DINO's) and SimCLR's temperature, chosen for SimCLR by --held_out; "
    "lightly's recipe has a ResNet-18 of the same width in fp32",
    "cuda": "settings: --preset cifar at twice the batch and learning rate; none was chosen on a GPU",
}
TINY = f"--preset tiny {RUN}"
SMOKE = {
    "swav": Settings(f"main_swav.py {TINY}", threads=1, workers=0),
    "simclr": Settings(f"main_simclr.py {TINY}", threads=1, workers=0),
    "dino": Settings(f"main_dino.py {TINY}", threads=1, workers=0),
    "deepclusterv2": Settings(f"main_deepclusterv2.py {TINY}", threads=1, workers=0),
    "lightly": Settings(
        "-m bench.lightly_swav --width 0.125 --crop_size 8 --batch_size 64", threads=1, workers=0
    ),
}
SMOKE_FLAGS = {"data_path": "digits", "minutes": [0.02, 0.05], "seeds": 1, "trial_seconds": 0.5}
NAMES = {
    "swav": "SwAV",
    "simclr": "SimCLR",
    "dino": "DINO",
    "deepclusterv2": "DeepCluster-v2",
    "lightly": "lightly's SwAV",
}
KNN = "eval_knn.py --nb_knn 20 --temperature 0.07"  # Wu et al. 2018, arXiv:1805.01978

TRIAL_EPOCHS = 1000  # of the schedule of a trial, which is stopped long before
OVERRUN = 1.03  # of the last moment, that a planned schedule may take
LATE = 1.05  # of it, that a run may take which is slower than its trial was; it is stopped then
OWN_RATE = 0.2  # of the last moment, from which on a run's own rate tells how many epochs fit
HELD_OUT = 10  # every tenth image, as src/evaluate/splits.py


# ============ how long an epoch takes, and how many fit ============
def epoch_times(lines: list[tuple[float, dict]]) -> tuple[float, float, float] | None:
    """Seconds before the first epoch, of an epoch, and of a k-NN if one came; None where lines are too few.

    lines: of log.jsonl, each with the seconds since the start. From the ends of epochs where there are
    two; else from iterations, of which the first is slow, and from what an assignment took.
    """
    losses = [(moment, line["epoch_float"]) for moment, line in lines if "loss" in line]
    ends = [(moment, place) for moment, place in losses if place % 1 == 0]
    if len(ends) >= 2:
        (begin, first), (end, last) = ends[0], ends[-1]
        epoch = max((end - begin) / (last - first), POLL_SECONDS)
        knn = [moment - end for moment, line in lines if "knn" in line]
        return max(0.0, begin - first * epoch), epoch, max([0.0, *knn])
    if len(losses) < 3:
        return None
    (begin, first), (end, last) = losses[1], losses[-1]
    clusterings = [
        (moment, line["assignment_seconds"])
        for moment, line in lines
        if "assignment_seconds" in line
    ]
    inside = sum(seconds for moment, seconds in clusterings if begin < moment <= end)
    passing = (end - begin - inside) / (last - first)
    clustering = clusterings[-1][1] if clusterings else 0.0
    epoch = max(passing + clustering, POLL_SECONDS)
    return max(0.0, begin - first * passing - clustering), epoch, 0.0


def plan_epochs(seconds: float, first: float, epoch: float) -> int:
    """Epochs of a schedule that ends after `seconds`, or up to 3 % later; at least one.

    first, epoch: seconds as epoch_times has them.
    """
    return max(1, int((OVERRUN * seconds - first) / epoch))


def epochs_that_fit(plan: dict, clock: dict | None) -> int:
    """Epochs of a run that goes on: those that fit at its own rate once it has shown one, else the plan's.

    plan, clock: what Minutes.plan_of and read_clock return.
    """
    if clock is not None and clock["finished"]:
        return round(clock["epochs"])
    seconds, first = 60 * plan["schedule"], plan["seconds_before"]
    if clock is None or clock["epochs"] == 0 or clock["seconds"] - first < OWN_RATE * seconds:
        return plan["epochs"]
    epoch = (clock["seconds"] - first) / clock["epochs"]
    return max(plan_epochs(seconds, first, epoch), math.ceil(clock["epochs"]))


# ============ one session of a run ============
class Session:
    """What a training process writes between its start and its end, on the clock of this table.

    folder: of the run. after: the epochs, as in `epoch_float`, that were done before.
    """

    def __init__(self, folder: Path, after: float = 0.0):
        self.folder, self.after = folder, after
        self.spawned, self.begun = time.time(), None
        self.log, self.lines = NewLines(folder / "log.jsonl"), []

    def look(self) -> None:
        """Read what is new."""
        if self.begun is None:
            with contextlib.suppress(FileNotFoundError):
                described = (self.folder / "args.json").stat().st_mtime
                self.begun = described if described > self.spawned else None
        if self.begun is not None:
            moment = time.time() - self.begun
            new = [line for line in self.log.read() if line["epoch_float"] > self.after]
            self.lines += [(moment, line) for line in new]

    def losses(self) -> list[tuple[float, dict]]:
        """Lines of iterations, with their moments."""
        return [(moment, line) for moment, line in self.lines if "loss" in line]

    def elapsed(self) -> float:
        """Seconds on the clock so far."""
        return 0.0 if self.begun is None else time.time() - self.begun

    def seconds(self) -> float:
        """Seconds on the clock up to the checkpoint that is there; 0 if this session saved none."""
        saved = time_of_checkpoint(self.folder)
        return 0.0 if self.begun is None or saved is None else max(0.0, saved - self.begun)


def time_of_checkpoint(folder: Path) -> float | None:
    """When the newest checkpoint of a run was written, None where it has none."""
    try:
        return (folder / "checkpoint.pth").stat().st_mtime
    except FileNotFoundError:
        return None


def read_clock(folder: Path) -> dict | None:
    """Where a run was when it was last stopped: seconds, epochs, finished; None where that is unknown.

    A process that was killed may have saved later than the clock says, or may not have saved at all.
    """
    try:
        clock = json.loads((folder / "clock.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return clock if clock["checkpoint"] == time_of_checkpoint(folder) else None


# ============ all runs ============
class Minutes:
    """The runs of all methods and seeds, what they gave, and where that is written."""

    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.file, self.log = self.out / "results.jsonl", self.out / "log.txt"
        self.start, self.stopped, self.failed = time.monotonic(), False, 0
        self.settings = SMOKE if args.smoke else SETTINGS[args.device.partition(":")[0]]
        self.methods = [x for x in args.methods if x != "lightly" or is_installed("lightly")]
        self.data, self.lines = args.data_path, []
        if args.held_out:
            self.data = str(held_out_list(args.data_path, self.out))
        if self.file.exists():
            for line in self.file.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
                    self.lines.append(json.loads(line))
        self.check_lines()

    def check_lines(self):
        """ValueError where --out holds what was made by another command: that is not one table."""
        for line in self.lines:
            method = line.get("method")
            if method not in self.methods:
                continue
            if line["command"] != self.command(method):
                raise ValueError(
                    f"--out {self.out} holds {method} by another command ({line['command']}): use another "
                    "--out"
                )
            if line.get("knn_flags", "") != self.knn_flags(method):
                raise ValueError(
                    f"--out {self.out} holds {method} with '{line.get('knn_flags', '')}' for eval_knn.py: "
                    "use another --out"
                )
            if line["schedule"] != self.args.minutes[-1]:
                raise ValueError(
                    f"--out {self.out} holds {method} with a schedule of {line['schedule']:g} minutes: use "
                    "another --out, or end --minutes with that"
                )

    def workers(self, method):
        """Loader processes of a method's training and of its k-NN."""
        workers = self.settings[method].workers
        return max(1, num_cores() - 1) if workers is None else workers

    def command(self, method):
        """The command of a method without what differs between its runs."""
        return (
            f"{self.settings[method].command} --data_path {shlex.quote(self.data)} "
            f"--workers {self.workers(method)} --device {self.args.device} {self.args.flags}"
        ).strip()

    def knn_flags(self, method):
        """Flags of eval_knn.py beside those of all methods."""
        return f"{self.settings[method].knn} {self.args.knn_flags}".strip()

    def knn_command(self, method, folder):
        """The command that evaluates a run."""
        return (
            f"{KNN} --data_path {shlex.quote(self.data)} --pretrained {shlex.quote(str(folder))} "
            f"--workers {self.workers(method)} --device {self.args.device} {self.knn_flags(method)}"
        ).strip()

    def train_command(self, method, folder, seed, epochs):
        """The command of a run."""
        return (
            f"{self.command(method)} --seed {seed} --epochs {epochs} --dump_path {quoted(folder)}"
        )

    def execute(self, method, command, watch=lambda: False, seconds=3600.0):
        """(status, note, seconds) of a command; a stop of this script stops it too."""
        threads = self.settings[method].threads
        status, spent, output = run_process(
            [sys.executable, *shlex.split(command)],
            self.log,
            time.monotonic() + seconds,
            say=lambda text: None,  # `train` says more
            environment=None if threads is None else {"OMP_NUM_THREADS": str(threads)},
            watch=lambda: watch() or self.stopped,
        )
        return status, note_of(status, spent, output), spent

    def find(self, kind, **values):
        """The last line of a kind that has these values, None without one."""
        return find(self.lines, kind, **values)

    def add(self, kind, **values):
        """Keep a line, and write the table anew."""
        self.lines.append({"kind": kind, **values})
        with self.file.open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")
        (self.out / "results.md").write_text(report(self.lines, self.args))

    def fail(self, text):
        """Say that something failed, unless this script was told to stop."""
        if not self.stopped:
            self.failed += 1
            self.say(f"FAILED {text}; see {self.log}")

    def say(self, text):
        """A line on the screen, with the minutes since the start."""
        print(f"{(time.monotonic() - self.start) / 60:6.1f} min  {text}", flush=True)

    # ============ a run ============
    def plan_of(self, method):
        """How many epochs fit the last moment, from a trial; of a method once, for all seeds."""
        minutes = self.args.minutes[-1]
        plan = self.find("plan", method=method)
        if plan is not None:
            return plan
        folder = self.out / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        session = Session(folder)

        def watch():
            session.look()
            losses = session.losses()
            return len(losses) > 2 and losses[-1][0] - losses[1][0] > self.args.trial_seconds

        command = self.train_command(method, folder, seed=0, epochs=TRIAL_EPOCHS)
        self.say(f"{method}: a trial")
        status, note, _ = self.execute(method, command, watch)
        times = epoch_times(session.lines)
        if self.stopped:
            return None
        if status not in (OK, STOPPED) or times is None:
            self.fail(f"{method}, trial: {note or status}")
            return None
        line = session.losses()[-1][1]
        iterations = round((line["iteration"] + 1) / line["epoch_float"])
        batch = json.loads((folder / "args.json").read_text())["batch_size"]
        shutil.rmtree(folder)
        first, epoch, _ = times
        epochs = plan_epochs(60 * minutes, first, epoch)
        self.say(
            f"{method}: {first:.1f} s, then {epoch:.1f} s an epoch: {epochs} epochs in "
            f"{(first + epochs * epoch) / 60:.1f} minutes"
        )
        self.add(
            "plan",
            method=method,
            command=self.command(method),
            knn_flags=self.knn_flags(method),
            schedule=minutes,
            epochs=epochs,
            seconds_before=round(first, 2),
            seconds_an_epoch=round(epoch, 3),
            images_an_epoch=iterations * batch,
        )
        return self.lines[-1]

    def run(self, method, seed):
        """Do what is left of a run: train to each moment, and evaluate."""
        missing = [
            moment
            for moment in self.args.minutes
            if self.find("result", method=method, seed=seed, moment=moment) is None
        ]
        plan = self.plan_of(method) if missing else None
        folder = self.out / f"{method}_{seed}"
        clock = read_clock(folder)
        if clock is None and plan is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for moment in missing if plan else []:
            plan = {**plan, "epochs": epochs_that_fit(plan, clock)}
            is_last = moment == self.args.minutes[-1]
            seconds = 60 * moment * (LATE if is_last else 1)
            if clock is None or not (clock["finished"] or clock["seconds"] >= seconds):
                clock = self.train(method, seed, plan, clock, seconds)
            if clock is None or self.stopped:
                return
            if clock["finished"] and not is_last:
                self.say(f"{method} seed {seed}: its end came before {moment:g} minutes")
                continue
            self.evaluate(method, seed, plan, clock, moment)

    def train(self, method, seed, plan, clock, until):
        """Train until the clock shows `until` seconds, or to the end; the clock then, None on a failure."""
        folder = self.out / f"{method}_{seed}"
        before = clock or {"seconds": 0.0, "epochs": 0.0}
        session, said = Session(folder, before["epochs"]), time.monotonic()

        def watch():
            nonlocal said
            session.look()
            losses, seconds = session.losses(), before["seconds"] + session.elapsed()
            if losses and seconds < until and time.monotonic() - said > PROGRESS_SECONDS:
                said, line = time.monotonic(), losses[-1][1]
                self.say(
                    f"{method} seed {seed}: epoch {line['epoch_float']:.2f} of {plan['epochs']}, "
                    f"{line['images_per_second']:.0f} images/s, {until - seconds:.0f} s to go"
                )
            return bool(losses) and seconds >= until

        command = self.train_command(method, folder, seed, plan["epochs"])
        status, note, _ = self.execute(method, command, watch, seconds=3 * until + 3600)
        if status not in (OK, STOPPED):
            self.fail(f"{method} seed {seed}: {note}")
            return None
        losses = session.losses()
        clock = {
            "seconds": before["seconds"] + session.seconds(),
            "epochs": losses[-1][1]["epoch_float"] if losses else before["epochs"],
            "checkpoint": time_of_checkpoint(folder),
        }
        # A run may come to its end after it was told to stop.
        clock["finished"] = status == OK or clock["epochs"] >= plan["epochs"]
        if clock["checkpoint"] is None or (
            status == STOPPED and clock["checkpoint"] == before.get("checkpoint")
        ):
            self.fail(f"{method} seed {seed}: it saved nothing when it was stopped")
            return None
        (folder / "clock.json").write_text(json.dumps(clock) + "\n")
        return clock

    def evaluate(self, method, seed, plan, clock, moment):
        """k-NN of what a run has saved, as a result."""
        folder = self.out / f"{method}_{seed}"
        status, note, _ = self.execute(method, self.knn_command(method, folder))
        if self.stopped:
            return
        if status != OK:
            self.fail(f"{method} seed {seed}, k-NN: {note}")
            return
        top1 = json.loads((folder / "eval_knn.json").read_text())["results"][0]["top1"]
        minutes, epochs = clock["seconds"] / 60, clock["epochs"]
        self.add(
            "result",
            method=method,
            seed=seed,
            moment=moment,
            minutes=round(minutes, 3),
            epochs=round(epochs, 3),
            planned=plan["epochs"],
            images_per_second=round(epochs * plan["images_an_epoch"] / clock["seconds"], 1),
            top1=round(top1, 3),
            command=self.command(method),
            knn_flags=self.knn_flags(method),
            schedule=self.args.minutes[-1],
        )
        self.say(f"{method} seed {seed}: {top1:.2f} % after {minutes:.1f} minutes")

    def stop(self, number, frame):
        """A signal: what runs is told to save and to leave; the same command goes on from there."""
        self.stopped = True


def find(lines, kind, **values):
    """The last line of a kind that has these values, None without one."""
    for line in reversed(lines):
        if line["kind"] == kind and all(line.get(name) == x for name, x in values.items()):
            return line
    return None


def is_installed(package):
    return importlib.util.find_spec(package) is not None


def quoted(path):
    return shlex.quote(str(path))


# ============ images to choose settings with ============
def held_out_list(data_path: str, folder: Path) -> Path:
    """Where hold_out writes the list of some images: other images have another list."""
    return folder / f"held_out_{zlib.crc32(data_path.encode()):08x}.csv"


def hold_out(data_path: str, folder: Path) -> Path:
    """Write a list that splits training images, every tenth for validation; returns its path.

    It names the files of a folder where they lie; images that are no files are written to `folder` as PNG.
    Raises ValueError and FileNotFoundError for images that cannot be opened or have no labels.
    """
    from src.data.datasets import open_dataset

    dataset = open_dataset(data_path, "train")
    if dataset.labels is None:
        raise ValueError(f"--data_path {data_path} has no labels, which k-NN needs")
    path = held_out_list(data_path, folder)
    spare = path.with_suffix(".part")
    with spare.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for index, label in enumerate(dataset.labels.tolist()):
            name = dataset.file_name(index)
            if not os.path.isfile(name):
                name = write_png(dataset.read(index), folder / "held_out" / f"{index:06}.png")
            label = dataset.classes[label] if dataset.classes else label
            rows.writerow([os.path.abspath(name), label, "train" if index % HELD_OUT else "val"])
    os.replace(spare, path)
    return path


def write_png(image, path):
    """Write an image, uint8 (C, H, W), as PNG; returns the path."""
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path


# ============ the table ============
def rows_of(lines: list[dict], args) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean and standard deviation (of a sample) over the seeds that are done."""
    header = ["method", *(f"{moment:g} min" for moment in args.minutes), "epochs", "images/s"]
    rows = []
    for method in args.methods:
        cells = []
        for moment in args.minutes:
            found = [
                find(lines, "result", method=method, seed=seed, moment=moment)
                for seed in range(args.seeds)
            ]
            cells.append(accuracy([line for line in found if line], moment, args.seeds))
        ends = [
            find(lines, "result", method=method, seed=seed, moment=args.minutes[-1])
            for seed in range(args.seeds)
        ]
        ends = [line for line in ends if line]
        if not ends and method == "lightly" and not is_installed("lightly"):
            cells[0] = "not run: lightly is not installed"
        rows.append([NAMES[method], *cells, epochs_of(ends), rate_of(ends)])
    return header, rows


def accuracy(results, moment, wanted):
    """ "53.1 ± 0.4"; the true minutes where they are others, the number of values where some are missing."""
    if not results:
        return "-"
    values = [line["top1"] for line in results]
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    minutes = statistics.mean(line["minutes"] for line in results)
    if abs(minutes - moment) > 0.05 * moment:
        text += f" (after {minutes:.3g} min)"
    return text if len(values) == wanted else f"{text} (n = {len(values)})"


def epochs_of(ends):
    """Epochs of the last moment, and of the schedules where one did not come to its end: means over runs."""
    if not ends:
        return "-"
    done, planned = (statistics.mean(line[name] for line in ends) for name in ("epochs", "planned"))
    if all(line["epochs"] > line["planned"] - 0.01 for line in ends):
        return f"{planned:.3g}"
    return f"{done:.1f} of {planned:.3g}"


def rate_of(ends):
    return f"{statistics.mean(line['images_per_second'] for line in ends):,.0f}" if ends else "-"


def report(lines: list[dict], args) -> str:
    """The Markdown of results.md: machine, table, and where the settings come from."""
    machine = find(lines, "machine") or {}
    commits = list(dict.fromkeys(line["commit"] for line in lines if line["kind"] == "machine"))
    device = machine.get("card") if args.device != "cpu" else machine.get("processor")
    about = [
        f"{device}, {machine.get('cores')} CPU cores; torch {machine.get('torch')}, torchvision "
        f"{machine.get('torchvision')}, Python {machine.get('python')}; commit {', '.join(commits)}; "
        f"{machine.get('date')}; `{machine.get('command')}`",
        "",
    ]
    images = "a tenth of the training images, held out" if args.held_out else "the test images"
    lead = [f"20-NN top-1 (%) on {images} after minutes of training, {args.seeds} seeds:", ""]
    header, rows = rows_of(lines, args)
    foot = (
        "settings: tiny, they say nothing" if args.smoke else CHOSEN[args.device.partition(":")[0]]
    )
    if args.flags:
        foot += f"; and `{args.flags}`"
    knn = {line["knn_flags"] for line in lines if line.get("knn_flags")}
    if knn:
        foot += f"; k-NN with `{'`, `'.join(sorted(knn))}`"
    return "\n".join([*about, *lead, *markdown_table(header, rows), f"{foot}.", ""])


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Run what is left; returns 0, 1 where something failed, 2 for what cannot be, 130 after a signal."""
    args = parse_args(argv)
    try:
        check_args(args)
        minutes = Minutes(args)
        if args.held_out and not Path(minutes.data).exists():
            minutes.say("writing the list of the images that are held out")
            hold_out(args.data_path, minutes.out)
        machine = describe_machine(args.device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    before = {name: signal.signal(name, minutes.stop) for name in (signal.SIGINT, signal.SIGTERM)}
    given = sys.argv[1:] if argv is None else argv
    minutes.add(
        "machine", **machine, command=shlex.join(["python", "-m", "bench.cifar_minutes", *given])
    )
    for method in set(args.methods) - set(minutes.methods):
        minutes.say(f"{method}: not run, the package is not installed: pip install {method}")
    for seed in range(args.seeds):
        for method in minutes.methods:
            if not minutes.stopped:
                minutes.run(method, seed)
    for name, handler in before.items():
        signal.signal(name, handler)
    text = report(minutes.lines, args)
    (minutes.out / "results.md").write_text(text)
    print(text)
    if minutes.stopped:
        print("stopped; the same command goes on")
        return 130
    if args.json:
        from bench.measure import print_table

        header, rows = rows_of(minutes.lines, args)
        print_table(f"k-NN after minutes, {args.device}", header, rows, args.json)
    return 1 if minutes.failed else 0


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--data_path",
        default="cifar10",
        help="a folder with train/ and val/ or test/, or a named set",
    )
    add("--out", default="runs/cifar_minutes", help="folder of everything")
    add("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    add("--seeds", type=int, default=3, help="runs of each method")
    add(
        "--minutes",
        type=float,
        nargs="+",
        default=[1.0, 2.0, 5.0, 10.0],
        help="of training, after which k-NN evaluates; the schedule ends with the last",
    )
    add("--device", default="cpu", help="cpu or cuda")
    add("--held_out", action="store_true", help="evaluate on a tenth of the training images")
    add("--flags", default="", help="added to the command of each method, such as '--width 0.5'")
    add("--knn_flags", default="", help="added to that of eval_knn.py, such as '--size 32'")
    add(
        "--trial_seconds",
        type=float,
        default=20.0,
        help="of training that tell how long an epoch takes",
    )
    add("--json", default=None, metavar="FILE", help="append the table to it, as a line of JSON")
    add("--smoke", action="store_true", help="tiny, on digits: shows that all runs, says nothing")
    args = parser.parse_args(argv)
    if args.smoke:
        parser.set_defaults(**SMOKE_FLAGS, methods=["swav"], out="runs/cifar_minutes_smoke")
        args = parser.parse_args(argv)
    if Path(args.data_path).exists():
        args.data_path = str(Path(args.data_path).resolve())
    args.out = str(Path(args.out).resolve())
    return args


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    if args.device.partition(":")[0] not in SETTINGS:
        raise ValueError(f"--device {args.device} must be cpu or cuda")
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds} must be at least 1")
    if args.minutes != sorted(set(args.minutes)) or args.minutes[0] <= 0:
        given = " ".join(f"{moment:g}" for moment in args.minutes)
        raise ValueError(f"--minutes {given} must be above 0 and rise, as 1 2 5 10")


if __name__ == "__main__":
    sys.exit(main())
