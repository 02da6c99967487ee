"""What a script turns into one sentence for people, instead of a traceback."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that one sentence explains."""


class CheckpointError(OSError):
    """A file of weights or a run's folder that cannot be read or written, or is not what was asked for."""


class Stopped(Exception):
    """A signal asked for a stop in the middle of work that a later run does again, or goes on with."""


# What asks a script to stop. The later one wins where processes got different ones. A user signal
# announces a time limit or a preemption, after which the job shall run again; SIGTERM alone is a
# cancellation.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


# ============ what others' errors mean ============
NO_SHARED_MEMORY = (
    "the loader processes have no room in shared memory, /dev/shm: use fewer --workers, --workers 0, or "
    "a larger /dev/shm (docker run --shm-size 8g)"
)
# What libraries say when something outside the program fails, and what it means. The first that is found
# holds.
MEANINGS = {
    r"DataLoader timed out after \S+ seconds": (
        "a loader process has sent no batch for --loader_timeout seconds: look at the storage of "
        "--data_path, or give more seconds, or 0 for no limit"
    ),
    r"Too many open files|items of ancdata": (
        "there are too many open files: raise their number (ulimit -n), or use fewer --workers"
    ),
    r"DataLoader worker \(pid \d+\) is killed by signal: Bus error": NO_SHARED_MEMORY,
    r"shared memory ?\(shm\)|shared memory object|file </torch_": NO_SHARED_MEMORY,
    r"DataLoader worker \(pid": (
        "a loader process was killed, for want of memory or by hand: use fewer --workers, --workers 0, "
        "or more memory (with Slurm --mem), and look at /dev/shm too"
    ),
    r"(gloo|NCCL)[^\n]*\n?[^\n]*([Tt]imed out|[Tt]imeout)|Application timeout caused pair closure": (
        "another process of the run has not answered within --dist_timeout seconds: what it says on its "
        "screen or in its log tells why; give more seconds if it was only slow"
    ),
    r"gloo[^\n]*(closed by peer|reset by peer|Broken pipe|[Cc]onnection)"
    r"|NCCL[^\n]*\n?[^\n]*remote process exited"
    r"|failed to recv, got 0 bytes|remote server shutdown": (
        "another process of the run has ended or cannot be reached: what it says on its screen or in its "
        "log tells why; the same command continues the run"
    ),
}


# What networks of torch, torchvision and timm say of images that they do not take.
WRONG_SIZE = re.compile(
    r"Kernel size can't be greater than actual input size|[Oo]utput size is too small"
    r"|Input (height|width) \(\d+\) (should be divisible|doesn't match)"
)


def explain_size(error: BaseException) -> str | None:
    """What people need to know where a network does not take images of their size; None otherwise."""
    if not isinstance(error, RuntimeError | AssertionError) or not WRONG_SIZE.search(str(error)):
        return None
    return (
        "the network of --arch does not take images of this size: give another one (--size_crops, with "
        "main_dino.py --global_crops_size and --local_crops_size, in the evaluations --size, --imsize or "
        f"--S) or another --arch ({_gist(error)})"
    )


def explain(error: BaseException) -> str | None:
    """What people need to know of an error from outside the program, in a sentence; None for others.

    Looks at what the error came from as well, since libraries wrap one error in another.
    """
    while error is not None:
        for pattern, meaning in MEANINGS.items():
            if re.search(pattern, str(error)):
                return f"{meaning} ({_gist(error)})"
        error = error.__cause__ or error.__context__
    return None


def _gist(error):
    """The line of an error's message that says what has happened."""
    return str(error).strip().splitlines()[-1][:200]


def cause(error: BaseException) -> str:
    """The first words of an error, for a sentence of ours."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].split(". ")[0]


def beneath(error: BaseException) -> BaseException:
    """What the system said, where torch covers it by an error of its own; else the first error of all."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, what cannot be written is a CheckpointError that names the file of a run."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be written ({cause(beneath(error))}): mend that, and the same command continues "
            "the run"
        ) from error


def printable(name: str | bytes) -> str:
    """A file's name for a terminal or a log: bytes that are no text, and what would move the cursor,
    are written as \\xe9 or \\n."""
    text = name.decode(errors="surrogateescape") if isinstance(name, bytes) else name
    if text.isprintable():
        return text
    return "".join(
        x if x.isprintable() else x.encode("unicode_escape").decode().replace("\\udc", "\\x")
        for x in text
    )
