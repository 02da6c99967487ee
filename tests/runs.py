"""Starting, killing and reading training runs, and making images for them: what their tests share."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.pictures import curves
from src.run.log import read_log

ROOT = Path(__file__).parent.parent


def losses(folder):
    return {line["iteration"]: line["loss"] for line in read_log(folder) if "loss" in line}


def start(script, folder, *argv, processes=1, **options):
    """Run a script as a user does, in a process group of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, script, "--dump_path", str(folder), *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **{**pipes, **options})


def wait_for_lines(folder, process, lines):
    """Wait until the log has so many lines."""
    log, deadline = Path(folder) / "log.jsonl", time.monotonic() + 300
    while not log.exists() or log.read_text().count("\n") < lines:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no progress for five minutes"
        time.sleep(0.01)


def children_of(process):
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def finish(process):
    try:
        output = process.communicate(timeout=1200)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    return output


@pytest.fixture
def signal_handlers():
    """A run that ends in an error leaves its handlers to the process, which is about to end."""
    names = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, before, strict=True):
        signal.signal(name, handler)


@pytest.fixture(scope="module")
def one_panel():
    """Have curves.png show the loss alone: the other panels take a second a picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "PANELS", curves.PANELS[:1])
        yield


def images(folder, count, broken_every=0, size=16):
    """A flat folder of JPEG files of noise; every n-th is cut short."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:05}.jpg"
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(path)
        if broken_every and i % broken_every == 0:
            path.write_bytes(path.read_bytes()[:200])
    return folder


def write_noise(folder, counts, names=("blue", "red"), suffix=".png", stem="{name}_{i}"):
    """A folder of class folders with noise of two colours: counts: of the images of each class, by split.

    stem: of the names of files, by the name of their class and their number in it.
    """
    draws = np.random.default_rng(0)
    for split, numbers in counts.items():
        for name, channel, count in zip(names, (2, 0), numbers, strict=True):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 100, (10, 12, 3), dtype=np.uint8)
                pixels[:, :, channel] += 100
                file = f"{stem.format(name=name, i=i)}{suffix}"
                Image.fromarray(pixels).save(folder / split / name / file)
    return folder


def changed_images(folder, into):
    """Two copies of a folder of two classes: one with a renamed file, one with the classes exchanged."""
    renamed, labelled = into / "renamed", into / "labelled"
    shutil.copytree(folder, renamed)
    first = sorted((renamed / "train").rglob("*.*"))[0]
    first.rename(first.with_stem("another"))
    shutil.copytree(folder, labelled)
    for part in ("train", "val"):
        first, second = sorted(path for path in (labelled / part).iterdir() if path.is_dir())
        first.rename(labelled / part / "moved")
        second.rename(first)
        (labelled / part / "moved").rename(second)
    return renamed, labelled
