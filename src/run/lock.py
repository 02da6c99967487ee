"""One writer at a time: the lock of a folder that a run or an evaluation writes into.

The main process holds an operating-system lock on <name>.lock for as long as it lives, and touches
the file every few seconds. Where the file system passes locks on between hosts, a second writer is
told by the first; where it does not, by a file that was touched a moment ago.
"""

import atexit
import contextlib
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path

from .. import dist
from ..errors import CheckpointError, cause
from .checkpoint import by_main

try:
    import fcntl
except ImportError:  # Windows: the time of the last touch alone decides
    fcntl = None

logger = logging.getLogger(__name__)

TOUCH_SECONDS = 15.0
SILENT_SECONDS = 120.0  # since the last touch, after which a writer on another host counts as dead
_held = []  # locks of this process


class FolderLock:
    """The right to write into a folder, from the making to release() or the end of the process.

    name: what is locked, "run" or the name of an evaluation, which may work in a run's folder while
    that trains. Raises CheckpointError with who holds it, and where the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, name: str):
        self.path = Path(folder) / f"{name}.lock"
        try:
            self._file = self._take()
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path} cannot be written ({cause(error)}): choose another --dump_path"
            ) from error
        self._released = threading.Event()
        self._pid = os.getpid()
        threading.Thread(target=self._touch, daemon=True).start()
        atexit.register(self.release)

    def _take(self):
        """The open lock file, with this process written into it."""
        while True:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
            try:
                is_ours = _lock(file)
                if not _is_file(file, self.path):  # its last owner removed it just now
                    file.close()
                    continue
                holder = _read(file)
                if is_ours is False:
                    self._refuse(holder)
                if holder and not _is_this_process(holder):
                    if _is_elsewhere(holder):
                        self._wait_for_a_sign(holder)
                    elif is_ours is None and not _has_ended(holder):
                        self._refuse(holder)
                    logger.info("%s was left behind by %s", self.path, _describe(holder))
                file.seek(0)
                file.truncate()
                json.dump(_this_process(), file)
                file.flush()
                os.utime(self.path)
                return file
            except BaseException:
                file.close()
                raise

    def _wait_for_a_sign(self, holder):
        """Refuse where a writer on another host touches the file; return when it was silent for long.

        The file system may not pass locks on between hosts, so that only this tells the living from
        the dead. A job that was killed and runs again on another host waits here for two minutes.
        """
        first = self.path.stat().st_mtime
        silent = _now(self.path.parent) - first
        if silent < SILENT_SECONDS:
            logger.info(
                f"{self.path} is of {_describe(holder)}: waiting up to {SILENT_SECONDS - silent:.0f} s "
                "for a sign of life"
            )
        while silent < SILENT_SECONDS:
            time.sleep(min(TOUCH_SECONDS / 5, SILENT_SECONDS - silent))
            if self.path.stat().st_mtime != first:
                self._refuse(holder)
            silent = _now(self.path.parent) - first

    def _refuse(self, holder):
        raise CheckpointError(
            f"--dump_path {self.path.parent} is being written to by {_describe(holder)}: end that first, "
            "or use another --dump_path"
        )

    def _touch(self):
        while not self._released.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):  # the storage may come back
                os.utime(self.path)

    def release(self) -> None:
        """Let others write; more than once does no harm."""
        if self._released.is_set() or os.getpid() != self._pid:
            return
        self._released.set()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError):  # the file first, for who waits for it
            if _is_file(self._file, self.path):
                self.path.unlink()
        with contextlib.suppress(OSError):
            self._file.close()


def hold_folder(folder: str | Path, name: str = "run") -> None:
    """Lock a folder for all processes, which all call it, until release_folders() or their end.

    Raises CheckpointError on all of them if it is taken.
    """
    lock = by_main(lambda: FolderLock(folder, name), "lock its --dump_path")
    if lock is not None:
        _held.append(lock)


def release_folders() -> None:
    """Let others write into the folders that this process holds."""
    while _held:
        _held.pop().release()


def has_lost_its_writer(path: Path) -> bool:
    """Whether the process that a lock file names is no more: at once on this host, after two minutes else."""
    try:
        with open(path) as file:
            holder, touched = _read(file), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return True
    if _is_elsewhere(holder):
        return _now(path.parent) - touched > SILENT_SECONDS
    return bool(holder) and _has_ended(holder)


# ============ who holds it ============
def _this_process():
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "job": dist.slurm_job_id(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _start_of(pid):
    """When a process of this host was started, in the kernel's ticks; None if that is not known."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _is_this_process(holder):
    own = _this_process()
    return all(holder.get(name) == own[name] for name in ("host", "pid", "started"))


def _is_elsewhere(holder):
    return holder.get("host") not in (None, socket.gethostname())


def _has_ended(holder):
    """Whether the holder is a process of this host that is no more."""
    if _is_elsewhere(holder):
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError):
        return True
    except OSError:  # of another user
        return False
    return _start_of(holder["pid"]) != holder.get("started")


def _describe(holder):
    if not holder:
        return "another process"
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job} (since {holder.get('since')})"


# ============ the file ============
def _lock(file):
    """Whether the file is ours now, False if it is another's; None where nothing can be locked.

    A POSIX lock, which forked loader workers do not inherit: they may outlive the run for a moment.
    """
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _is_file(file, path):
    """Whether `path` still names the open file."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _read(file):
    try:
        found = json.loads(file.read())
    except ValueError:  # empty, or torn
        return {}
    return found if isinstance(found, dict) else {}


def _now(folder):
    """The present time by the clock of the file system, which other hosts may share."""
    probe = folder / f"clock.tmp-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
