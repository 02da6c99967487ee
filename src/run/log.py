"""What a run says: lines for people, JSON for programs, TensorBoard events, a rate and an ETA."""

import contextlib
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..errors import cause, printable, writing

logger = logging.getLogger(__name__)

COLUMNS = 100  # of the screen, that a line takes at most
SEPARATORS = (" | ", "; ", ", ", " ")  # where a line is divided, the first one that fits


def setup_logging(folder: str | Path | None, is_main: bool) -> None:
    """Send log lines to the console and, with a folder, to its train.log (which also has tracebacks).

    Processes other than the main one only speak of warnings and errors.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if is_main else logging.WARNING)
    if hasattr(sys.stdout, "reconfigure"):  # what the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    console.setFormatter(ScreenFormatter("%(message)s"))
    root.addHandler(console)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    if folder is not None and is_main:
        path = Path(folder) / "train.log"
        file = LogFile(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file)
        for name in (__name__.partition(".")[0], "__main__"):
            logging.getLogger(name).setLevel(logging.DEBUG)


class LogFile(logging.FileHandler):
    """A file of log lines that a run can do without: where the disk is full, one line on stderr says so."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not getattr(self, "has_failed", False):
            self.has_failed = True
            name = printable(self.baseFilename)
            sys.stderr.write(
                f"{name} cannot be written ({cause(error)}): going on without its lines\n"
            )


class PlainFormatter(logging.Formatter):
    """Lines without control characters, and with bytes that are no text written as \\xe9."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


class ScreenFormatter(PlainFormatter):
    """The same, in lines of at most COLUMNS.

    Warnings, and lines to be copied, with a path or a command, of a table or of JSON, stay whole.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        is_copied = text.startswith(("command: ", "watch  ", "| ", '{"'))
        if record.levelno > logging.INFO or is_copied or re.search(r"(^|\s)[/~]\S", text):
            return text
        return "\n".join(line for part in text.split("\n") for line in divide(part))


def divide(text: str, columns: int = COLUMNS) -> list[str]:
    """A line as lines of at most so many columns, divided between its parts, the later ones indented.

    A word that is longer, such as a path, is not divided.
    """
    heading = re.match(r"\w+ {2,}", text)  # of a line of the plan
    indent, lines = " " * (len(heading[0]) if heading else 2), []
    while len(text) > columns:
        for separator in SEPARATORS:
            end = text.rfind(separator, len(indent) + 1, columns)
            if end > 0:
                break
        else:
            end = text.find(" ", columns)
        if end < 0:
            break
        lines.append(text[:end] + separator.strip(" |"))
        text = indent + text[end + len(separator) :]
    return [*lines, text]


def describe_run(arguments: dict, folder: str | Path) -> None:
    """Log the command, the versions and the git state; write the resolved arguments to args.json."""
    logger.info("command: %s", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    logger.info("torch %s, python %s, git %s", torch.__version__, sys.version.split()[0], _git())
    write_whole(Path(folder) / "args.json", json.dumps(arguments, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write a file under, which takes its place when it is whole, and only then."""
    spare = path.with_name(f"{path.name}.part")
    try:
        yield spare
        os.replace(spare, path)
    except BaseException:
        with contextlib.suppress(OSError):
            spare.unlink(missing_ok=True)
        raise


def write_whole(path: Path, contents: str | bytes) -> None:
    """Write a file, whole or not at all. Raises CheckpointError where it cannot be written."""
    with writing(path), whole(path) as spare:
        spare.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def _git():
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'; unknown or endless -> '?'."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{seconds:02}"
    return f"{days}d {clock}" if days else clock


class RunLog:
    """Writes one JSON object a line to log.jsonl, and the same numbers to TensorBoard.

    folder: of the run; None: write nothing (the processes other than the main one). Raises
    CheckpointError where the file cannot be written.
    """

    def __init__(self, folder: str | Path | None, tensorboard: bool = True):
        self.path = Path(folder) / "log.jsonl" if folder is not None else None
        self.file = self._opened() if folder is not None else None
        self.events = None
        if folder is not None and tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                logger.info("no TensorBoard events: pip install tensorboard, or --no-tensorboard")
            else:
                self.events = SummaryWriter(str(folder))

    def write(self, step: int, values: dict) -> None:
        """values: numbers and strings; what is not finite is written as null."""
        if self.file is None:
            return
        clean = {
            key: None if isinstance(x, float) and not math.isfinite(x) else x
            for key, x in values.items()
        }
        with writing(self.path):
            self.file.write(json.dumps(clean) + "\n")
            self.file.flush()
        if self.events is not None:
            for key, x in clean.items():
                if isinstance(x, int | float) and not isinstance(x, bool):
                    self.events.add_scalar(key, x, step)

    def rewind(self, epoch_float: float, assigned: bool) -> list[dict]:
        """Move the lines of what is done again to log.redone.jsonl; the others, which stay.

        epoch_float: epochs done when the run was saved. assigned: the clusters for what comes next
        are among what was saved. Torn lines go too, so that log.jsonl is what it would have been.
        """
        if self.file is None:
            return []
        kept, redone = [], []
        for text in self.path.read_text(errors="replace").splitlines():
            line = _parse(text)
            if line and _is_before(line, epoch_float, assigned):
                kept.append(line)
            elif text.strip():
                redone.append(text)
        if redone:
            others = self.path.with_name("log.redone.jsonl")
            with writing(others), open(others, "a") as file:
                file.write("".join(f"{text}\n" for text in redone))
            self.file.close()
            write_whole(self.path, "".join(f"{json.dumps(line)}\n" for line in kept))
            self.file = self._opened()
        return kept

    def flush(self) -> None:
        """Hand over what TensorBoard still holds back; the lines of log.jsonl are handed over at once."""
        if self.events is not None:
            self.events.flush()

    def _opened(self):
        with writing(self.path):
            return open(self.path, "a")

    def close(self) -> None:
        """Close the files; nothing is written after it."""
        for stream in (self.file, self.events):
            if stream is not None:
                stream.close()


def read_log(folder: str | Path) -> list[dict]:
    """The lines of a run's log.jsonl that led to its present state.

    Where a killed run went on from before its last line, what came after that point is left out, and
    so is a torn line.
    """
    lines = []
    for text in (Path(folder) / "log.jsonl").read_text(errors="replace").splitlines():
        line = _parse(text)
        if line is None:
            continue
        while lines and _place(lines[-1]) >= _place(line):
            lines.pop()
        lines.append(line)
    return lines


def _parse(text):
    """The line of a run's log that a text is, None if it is torn or something else."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    is_line = isinstance(line, dict) and isinstance(line.get("epoch_float"), int | float)
    return line if is_line else None


def _is_before(line, epoch_float, assigned):
    """Whether a line was written before the run was saved at that place; see RunLog.rewind."""
    written_at, *kind = _place(line)
    if math.isclose(written_at, epoch_float, rel_tol=1e-12):
        return kind <= [assigned, True]
    return written_at < epoch_float


def _place(line):
    """When a line was written: an iteration, then a probe, then the assignment of the next epoch."""
    return line["epoch_float"], "assignment_seconds" in line, "knn" in line


class Pauses:
    """How long a run takes before each epoch: for assignments, and for k-NN and saving after the last.

    begin() where an epoch is over, or the run is ready for its first; end() where an epoch begins. What
    comes after the last epoch is no pause.
    """

    def __init__(self):
        self.begun, self.seconds, self.number = time.monotonic(), 0.0, 0

    def begin(self) -> None:
        self.begun = time.monotonic()

    def end(self) -> None:
        self.seconds += time.monotonic() - self.begun
        self.number += 1

    def mean(self) -> float:
        """Seconds of a pause so far, 0 before the first."""
        return self.seconds / max(1, self.number)


class Stopwatch:
    """Rate, share of time spent waiting for data, and time to go.

    Wrap the loader: `for batch in stopwatch.watch(loader)`; then `stopwatch.rates(images)`.
    """

    def __init__(self):
        self.waited, self.started, self.iterations = 0.0, time.perf_counter(), 0

    def watch(self, loader: Iterable) -> Iterator:
        """Yield from `loader`, measuring how long each next() takes."""
        iterator = iter(loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            self.iterations += 1
            yield batch

    def rates(self, images_per_iteration: int, iterations_to_go: int) -> dict:
        """Since the last call: images per second, share of time waiting, seconds to go."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        speed = self.iterations / elapsed
        rates = {
            "images_per_second": speed * images_per_iteration,
            "data_share": min(1.0, self.waited / elapsed),
            "eta_seconds": iterations_to_go / speed if speed else math.inf,
        }
        self.waited, self.started, self.iterations = 0.0, time.perf_counter(), 0
        return rates
