"""Processes that are started, followed by what they write, and ended in time.

Needs only Python's standard library, as scripts/on_gpu.py does, which starts with it.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.1
PROGRESS_SECONDS = 20
STOP_SECONDS = (
    600  # that a process which was told to stop has for saving and for drawing its curves
)
OK, FAILED, KILLED, NOT_RUN, STOPPED = "ok", "failed", "time limit", "not run", "stopped"


class NewLines:
    """The JSON lines that a file has got since the last look; the file may not be there yet."""

    def __init__(self, path):
        self.path = Path(path)
        self.read_to = 0

    def read(self):
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.read_to)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # a line that is being written comes next time
        self.read_to += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def run_process(
    command: list[str],
    log: Path,
    deadline: float,
    say: Callable[[str], None],
    environment: dict | None = None,
    watch: Callable[[], bool | None] = lambda: None,
) -> tuple[str, float, str]:
    """Run `command` until it ends or `deadline` comes, when its whole process group is killed.

    log: the file that its output is appended to. deadline: of time.monotonic(). watch: called several
    times a second and at the end; once it returns true, the process is told to stop by SIGTERM, and has
    STOP_SECONDS to save and leave. Returns the status, the seconds, and the output.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    start = last_word = time.monotonic()
    told = False
    with open(log, "ab") as file:
        file.write(f"\n===== {shlex.join(command)}\n".encode())
        file.flush()
        output_from = file.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,  # no pipe, which a grandchild that lives on would keep open
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                if watch() and not told:
                    told = True
                    process.terminate()
                    deadline = min(deadline, time.monotonic() + STOP_SECONDS)
                if time.monotonic() - last_word > PROGRESS_SECONDS:
                    last_word = time.monotonic()
                    rest = max(0, deadline - last_word)
                    say(f"    {last_word - start:.0f} s, and {rest:.0f} s more at most")
            killed = process.poll() is None
        finally:  # also when this script itself is told to end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    watch()
    seconds = time.monotonic() - start
    with open(log, "rb") as file:
        file.seek(output_from)
        output = file.read().decode(errors="replace")
    return status_of(process.returncode, killed, told), seconds, output


def status_of(returncode, killed, told):
    """What became of a process; one that was told to stop may also have come to its end before."""
    if killed:
        return KILLED
    if returncode == 0:
        return OK
    is_signal = returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    return STOPPED if told and is_signal else FAILED


def error_line(output):
    """The last line of `output` that names an error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [x for x in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b|error:|failed:", x)]
    return (errors or lines or ["no output"])[-1][:300]


def note_of(status, seconds, output):
    """What a row says of a part that did not go well; nothing of one that did."""
    if status == KILLED:
        return f"killed after {seconds:.0f} s; its last line: {error_line(output)}"
    return error_line(output) if status == FAILED else ""
