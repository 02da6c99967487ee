"""Starting a script as people do, hurting it at a moment, and seeing how it ends and how soon.

    script = start("main_swav.py", tmp_path, *DIGITS, "--workers", 2)
    script.wait_until(script.workers)       # the moment: any function that becomes true
    script.send("SIGTERM")                  # to the whole group, as a terminal or Slurm does
    ending = script.ending()                # fails after ten seconds
    assert (ending.status, ending.screen) == (143, ...)

Linux only: it looks into /proc.
"""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
END_SECONDS = 10.0  # that a script may take to end, whatever happens to it
MOMENT_SECONDS = 180.0  # that a moment may take to come on a busy machine
# Flags of training on digits that make it quick to start and long enough to be hurt.
DIGITS = ["--data_path", "digits", "--no-tensorboard", "--knn_freq", "0", "--device", "cpu"]
# Mounts another /dev/shm that only the script sees, then becomes the script.
MOUNT = 'mount -t tmpfs -o {} tmpfs /dev/shm && exec "$@"'


@dataclass
class Ending:
    """How a script ended: its status as a shell says it, the seconds it took, all that it said."""

    status: int
    seconds: float
    screen: str


class Script:
    """A script that was started, in a process group of its own."""

    def __init__(self, process: subprocess.Popen, screen: Path):
        self.process, self.screen_path = process, screen
        self.hurt_at = time.monotonic()

    # ============ moments ============
    def wait_until(self, condition: Callable[[], object]) -> None:
        """Return when a condition holds; fails if the script ends before, or after three minutes."""
        deadline = time.monotonic() + MOMENT_SECONDS
        while not condition():
            assert self.process.poll() is None, f"ended before its moment: {self.screen()}"
            assert time.monotonic() < deadline, f"its moment never came: {self.screen()}"
            time.sleep(0.001)

    def screen(self) -> str:
        """What the script has said so far, errors included."""
        return self.screen_path.read_text(errors="replace")

    def says(self, text: str) -> Callable[[], bool]:
        """A condition: that the script has said something."""
        return lambda: text in self.screen()

    def catches(self) -> bool:
        """A condition: that SIGUSR1 has a handler, as from the first line of a script on."""
        return _has_signal(self.process.pid, "SigCgt", signal.SIGUSR1)

    def workers(self) -> list[int]:
        """Numbers of the processes that were forked from the script's: those of its loaders."""
        own = Path(f"/proc/{self.process.pid}")
        found = []
        try:
            for task in (own / "task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
            command = (own / "cmdline").read_bytes()
            # What is about to become another program, such as git, blocks all signals for that time.
            return [
                pid
                for pid in found
                if Path(f"/proc/{pid}/cmdline").read_bytes() == command
                and not _has_signal(pid, "SigBlk", signal.SIGHUP)
            ]
        except OSError:  # one has ended meanwhile
            return []

    # ============ what happens to it ============
    def send(self, name: str, to: int | None = None) -> None:
        """Send a signal to the whole group, or to one process; the clock of `ending` starts."""
        self.hurt_at = time.monotonic()
        if to is None:
            os.killpg(self.process.pid, getattr(signal, name))
        else:
            os.kill(to, getattr(signal, name))

    # ============ how it ends ============
    def ending(self, within: float = END_SECONDS) -> Ending:
        """Wait for the end; fails when it takes longer, or when a process of the group is left."""
        try:
            status = self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs after {within} s: {self.screen()}") from None
        finally:
            left = self._end_group()
        seconds = time.monotonic() - self.hurt_at
        assert not left, f"a process of it lives on: {self.screen()}"
        return Ending(128 - status if status < 0 else status, seconds, self.screen())

    def _end_group(self):
        """Kill what lives of the group a second after; whether there was anything."""
        for _ in range(100):
            if self.process.poll() is None:
                break
            if not _living_of(self.process.pid):
                return False
            time.sleep(0.01)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.process.wait()
        return True


def _has_signal(pid, mask, number):
    """Whether a process has a signal in one of its masks, such as SigCgt, those with a handler."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition(f"{mask}:")[2].split()[0], 16) >> (number - 1) & 1)


def _living_of(group):
    """Whether a process of a group is there that is not just waiting to be forgotten."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own_group = path.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):  # has ended meanwhile
            continue
        if int(own_group) == group and state != "Z":
            return True
    return False


def start(
    script: str,
    folder: Path,
    *argv,
    environ: dict[str, str] | None = None,
    shared_memory: str = "",
    name: str = "screen",
) -> Script:
    """Start a script of the checkout in `folder`, which is also its --dump_path.

    shared_memory: options of a mount of /dev/shm that it shall have, such as "size=64m" or "ro"; see
    can_mount. name: of the file in the folder that has what it says.
    """
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / script), *map(str, argv), "--dump_path", str(folder)]
    if shared_memory:
        command = ["unshare", "-m", "sh", "-c", MOUNT.format(shared_memory), "sh", *command]
    screen = folder / name
    with open(screen, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environ or {})},
            preexec_fn=_as_from_a_terminal,
        )
    return Script(process, screen)


def _as_from_a_terminal():
    """Signals as a terminal sets them: a shell has background jobs ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_ranks(script: str, folder: Path, *argv, processes: int, absent: int = 0) -> list[Script]:
    """Start one script of each rank, as srun does; the last `absent` ranks are awaited but not started."""
    scripts = []
    for rank, environ in enumerate(environments_of_ranks(processes)[: processes - absent]):
        scripts.append(start(script, folder, *argv, environ=environ, name=f"screen{rank}"))
    return scripts


def environments_of_ranks(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each rank of some on this machine, with a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


@functools.cache
def can_mount() -> bool:
    """Whether a process may have a /dev/shm of its own, as root mostly may."""
    command = ["unshare", "-m", "sh", "-c", MOUNT.format("size=1m"), "sh", "true"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def jpegs(folder: Path, each: int, classes: int = 2, size: int = 64) -> Path:
    """A folder of noise as JPEG files, `each` of them in every class folder."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        place = folder / f"class{c}"
        place.mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(place / f"{i:04}.jpg")
    return folder


def fake_scontrol(folder: Path) -> tuple[dict[str, str], Path]:
    """The environment of the one task of a Slurm job, and the file of what scontrol was asked."""
    asked, program = folder / "asked", folder / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    program.chmod(0o755)
    environ = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "4217"}
    return environ, asked
