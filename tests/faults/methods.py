"""A tiny run of each method on images in folders, how it is started, and what must come out of it.

A start is a fork of a server that has loaded torch, which takes 0.1 s, or a fresh process, which takes
seconds and can be hurt while it loads. What a run leaves is compared to the last bit: every line of
log.jsonl but for times and memory, the newest checkpoint and the picture of the curves.
"""

import atexit
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from src.run import flags, signals
from tests.faults import harness
from tests.gloo import CONTEXT, load_script

CONVNET = "--arch resnet10 --width 0.125 --stem small --size_crops 8 "
CROPS = (
    "--arch resnet10 --width 0.125 --stem small --hidden_mlp 16 --feat_dim 8 --nmb_crops 2 1 "
    "--size_crops 8 6 --warmup_epochs 0 --base_lr 0.2 "
)
METHODS = {
    "swav": CROPS + "--nmb_prototypes 10 --freeze_prototypes_niters 3 --queue_length 96 "
    "--epoch_queue_starts 0",
    "deepclusterv2": CROPS + "--nmb_prototypes 10 12",
    "selav2": CROPS + "--nmb_prototypes 10 12",
    "simclr": CROPS,
    "dino": "--arch vit_micro --width 0.25 --patch_size 4 --out_dim 32 --hidden_dim 16 --bottleneck_dim 8 "
    "--global_crops_size 8 --local_crops_size 8 --local_crops_number 1 --warmup_epochs 0 --lr 0.002 "
    "--drop_path_rate 0.1",
    "deepcluster": CONVNET + "--k 8 --dim_pca 8 --lr 0.02 --reassign 1 --niter 3",
    "deepercluster": CONVNET
    + "--k 8 --dim_pca 8 --lr 0.02 --reassignment 1 --niter 3 --super_classes 8",
    "rotnet": CONVNET + "--lr 0.05",
    "clusterfit": CONVNET + "--lr 0.05 --nmb_cluster 8 --niter 3",
}
OF_ALL = (
    "--preset tiny --batch_size {} --epochs 2 --workers 0 --log_freq 1 --knn_freq 1 --checkpoint_iters 2 "
    "--no-tensorboard --device cpu"
)
NUM_TRAIN, NUM_VAL, BATCH = 192, 40, 32
# What a line of the log says of the machine, not of the run.
OF_THE_MACHINE = {
    "images_per_second",
    "data_share",
    "eta_seconds",
    "peak_memory_mb",
    "assignment_seconds",
}
RUN_SECONDS = 120.0  # that a run may take to its end on a busy machine


# ============ starting ============
def digits_in_folders(folder: Path) -> Path:
    """Scans of digits as PNG files: train/<digit>/*.png and val/<digit>/*.png; returns train."""
    digits = load_digits()
    pixels = (digits.images[: NUM_TRAIN + NUM_VAL] * 15.9).astype(np.uint8)
    for i, (picture, label) in enumerate(zip(pixels, digits.target, strict=False)):
        place = folder / ("train" if i < NUM_TRAIN else "val") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{i:03}.png")
    return folder / "train"


def arguments(method: str, images: Path, *argv, ranks: int = 1) -> list[str]:
    """The command line of a tiny run; later arguments hold."""
    common = shlex.split(OF_ALL.format(BATCH // ranks))
    words = [*common, *shlex.split(METHODS[method]), "--data_path", images, *argv]
    return [str(word) for word in words]


def start_fork(
    script: str,
    folder: Path,
    argv: list[str],
    *,
    prepare: Callable[[], object] | None = None,
    environ: dict[str, str] | None = None,
) -> harness.Script:
    """Start main(argv) of a script in a fork, in a process group of its own; folder: its --dump_path.

    prepare: called in the fork first, a function that can be pickled. What it says is beside the folder.
    """
    environ = environ or {}
    screen = folder.with_name(f"{folder.name}.screen{environ.get('RANK', '')}")
    words = [*map(str, argv), "--dump_path", str(folder)]
    process = _Fork(script, words, screen, prepare, environ)
    return harness.Script(process, screen)


def start_fresh(script: str, folder: Path, argv: list[str]) -> harness.Script:
    """Start a script as a user does."""
    screen = folder.with_name(f"{folder.name}.screen")
    command = [sys.executable, str(harness.ROOT / f"{script}.py"), *map(str, argv)]
    with open(screen, "w") as file:
        process = subprocess.Popen(
            [*command, "--dump_path", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return harness.Script(process, screen)


def begin(
    method: str, folder: Path, argv: list[str], *, ranks: int = 1, fresh: bool = False
) -> list[harness.Script]:
    """Start a tiny run: one process a rank, forked, or a fresh one."""
    script = f"main_{method}"
    if fresh:
        return [start_fresh(script, folder, argv)]
    environs = harness.environments_of_ranks(ranks) if ranks > 1 else [{}]
    return [
        start_fork(script, folder, argv, prepare=few_panels, environ=environ)
        for environ in environs
    ]


def finish(method: str, folder: Path, argv: list[str], **options) -> float:
    """Start a tiny run and wait for its end, which must be a good one; returns the seconds it took."""
    started = time.monotonic()
    for script in begin(method, folder, argv, **options):
        ending = script.ending(within=RUN_SECONDS)
        assert ending.status == 0, ending.screen
    return time.monotonic() - started


def kill_at(scripts: list[harness.Script], seconds: float, victim: int = 0) -> bool:
    """Kill the group of one of the processes after some seconds, unless it ends by itself before."""
    deadline = time.monotonic() + seconds
    script = scripts[victim]
    while time.monotonic() < deadline:
        if script.process.poll() is not None:
            break
        time.sleep(0.002)
    if script.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # it ends by itself at the same moment
            script.send("SIGKILL")
    ending = script.ending()
    assert ending.status in (0, 137), ending.screen
    return ending.status == 137


class _Fork:
    """A process that was forked from the server, as harness.Script needs it of subprocess.Popen."""

    def __init__(self, script, argv, screen, prepare, environ):
        screen.write_text("")
        self._process = CONTEXT.Process(
            target=_call_main, args=(script, argv, str(screen), prepare, environ)
        )
        self._process.start()
        self.pid = self._process.pid
        while self.poll() is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("fork", timeout)
        return self._process.exitcode


def _call_main(script, argv, screen, prepare, environ):
    """What a fresh process does from `flags.run(main)` on."""
    os.setsid()
    module = load_script(script, screen, environ)
    if prepare is not None:
        prepare()

    def main():
        return module.main(argv)

    main.__module__ = "__main__"
    try:
        flags.run(main)
    finally:
        atexit._run_exitfuncs()  # which a fork leaves out


def start_forks(script: str, folder: Path, argv: list[str], processes: int) -> list[harness.Script]:
    """Start main(argv) of a script in a fork for each rank, to be hurt as a script of a user."""
    return [
        start_fork(script, folder, argv, prepare=as_a_script, environ=environ)
        for environ in (harness.environments_of_ranks(processes) if processes > 1 else [{}])
    ]


def as_a_script() -> None:
    """Have signals do what they do in a script that a terminal has started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.catch()


def few_panels() -> None:
    """Have curves.png show the loss alone: the other panels take a second a picture."""
    from src.pictures import curves

    del curves.PANELS[1:]


# ============ comparing ============
def log_of(folder: Path) -> list[dict]:
    """The lines of log.jsonl, all of which must be whole, without what is of the machine."""
    lines = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in OF_THE_MACHINE}
        | {name: True for name in line if name == "assignment_seconds"}
        for line in lines
    ]


def num_lines_of(folder: Path) -> int:
    """Lines of log.jsonl so far, those included that will be done again."""
    path = folder / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def state_of(folder: Path, name: str = "checkpoint.pth") -> dict:
    """A checkpoint, without the paths and the loaders among its arguments."""
    state = torch.load(folder / name, weights_only=True)
    arguments_kept = {
        name: value
        for name, value in state["args"].items()
        if name not in ("dump_path", "clusters", "workers")
    }
    return {**state, "args": arguments_kept}


def first_difference(one, other, place: str = "") -> str | None:
    """Where two nested values differ in a bit, None if nowhere."""
    if type(one) is not type(other):
        return f"{place}: {type(one).__name__}, not {type(other).__name__}"
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return None if same and _bytes_of(one) == _bytes_of(other) else f"{place}: other values"
    if isinstance(one, dict):
        if list(one) != list(other):
            return f"{place}: the keys {list(one)}, not {list(other)}"
        pairs = [(one[key], other[key], f"{place}[{key!r}]") for key in one]
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{place}: {len(one)} values, not {len(other)}"
        pairs = [(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return None if repr(one) == repr(other) else f"{place}: {one!r}, not {other!r}"
    found = (first_difference(a, b, inner) for a, b, inner in pairs)
    return next((difference for difference in found if difference), None)


def _bytes_of(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def check_equal(folder: Path, expected: Path, note: str) -> None:
    """Fail, with the note, unless a run has left what an uninterrupted one has left."""
    lines, wanted = log_of(folder), log_of(expected)
    places = [[(line["epoch_float"], sorted(line)) for line in log] for log in (lines, wanted)]
    missing = [place for place in places[1] if place not in places[0]]
    assert places[0] == places[1], f"{note}: missing lines {missing}, or others twice: {places[0]}"
    difference = first_difference(lines, wanted)
    assert difference is None, f"{note}: log.jsonl{difference}"
    difference = first_difference(state_of(folder), state_of(expected))
    assert difference is None, f"{note}: checkpoint.pth{difference}"
    from src.pictures import curves

    picture, wanted_picture = (path / "plots" / "curves.png" for path in (folder, expected))
    if wanted_picture.exists():
        assert picture.exists(), f"{note}: no curves.png"
        header = round(curves.HEADER * curves.DPI)  # has the name of the folder
        images = [np.asarray(Image.open(path))[header:] for path in (picture, wanted_picture)]
        assert np.array_equal(*images), f"{note}: curves.png shows other curves"
