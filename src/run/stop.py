"""Stopping a run on request: finish the iteration, save, leave, and come back if that was meant."""

import contextlib
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator

import torch

from .. import dist
from ..errors import STOP_SIGNALS
from .lock import release_folders

logger = logging.getLogger(__name__)


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and SIGUSR2 into a flag; a second signal does not kill either.

    Create one in the main thread of each training process; loader workers must ignore the signals.
    The training loop asks `agreed()` between iterations; when it is true, it saves,
    calls `requeue_slurm_job(stop)` and ends the process group. `name` is the signal's, None before.
    """

    def __init__(self):
        self.name = None
        self._said = False
        self._pid = os.getpid()
        self._previous = {}
        self._take_over()

    def _take_over(self):
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread catch signals
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)  # Windows has SIGTERM only
            if number is not None:
                self._previous[name] = signal.signal(number, self._catch)

    def _catch(self, number, frame):
        # Setting a flag is all that is safe here; in a forked process even that is not wanted.
        name = signal.Signals(number).name
        if os.getpid() == self._pid and STOP_SIGNALS.index(name) > self._place():
            self.name = name
        if name == "SIGINT":  # who presses Ctrl-C again does not want to wait
            signal.signal(number, self._previous[name])

    def _place(self):
        return -1 if self.name is None else STOP_SIGNALS.index(self.name)

    @property
    def requested(self) -> bool:
        """Whether this process was signalled, or has agreed with one that was."""
        return self.name is not None

    def agreed(self) -> bool:
        """Whether any process was signalled: a collective, so all stop at the same iteration."""
        highest = int(dist.all_reduce_max(torch.tensor(self._place())))
        if highest < 0:
            return False
        self.name = STOP_SIGNALS[max(highest, self._place())]
        if not self._said:
            if dist.is_main():
                logger.warning("%s: saving, then stopping", self.name)
            self._said = True
        return True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For long work with nothing to save: a signal means what it meant before this object was made.

        In a script it ends the process at once, and so does one that came before and that nobody has
        acted on. Where processes shall leave together after a signal of before, ask `agreed()` first.
        """
        self.restore()
        try:
            if self.requested:
                signal.raise_signal(getattr(signal, self.name))
            yield
        finally:
            self._take_over()

    def restore(self) -> None:
        """Put the earlier signal handlers back."""
        for name, handler in self._previous.items():
            signal.signal(getattr(signal, name), handler)
        self._previous = {}


def requeue_slurm_job(stop: StopSignal | None = None) -> bool:
    """Have the job run again after a time limit or a preemption; True if that was asked for.

    All processes call it, before the process group ends; rank 0 asks, and only if `stop` caught
    SIGUSR1 or SIGUSR2 (None: whatever the reason). Under Slurm it runs `scontrol requeue`. Under
    submitit it hands over to submitit's own handler, which requeues and leaves by SystemExit.
    Elsewhere it does nothing.
    """
    if stop is not None and stop.name not in ("SIGUSR1", "SIGUSR2"):
        return False
    launch = dist.read_environment()
    if launch.launcher == "submitit":
        handler = None if stop is None else stop._previous.get(stop.name)
        if not callable(handler):
            return False
        handler(getattr(signal, stop.name), None)
        return True
    job = dist.slurm_job_id()
    asked = job is not None and launch.rank == 0 and dist.is_main() and _requeue(job)
    # srun may kill all tasks when the first one ends: nobody leaves before rank 0 has asked.
    dist.barrier()
    return asked


def requeue_alone() -> bool:
    """Have the Slurm job run again, without the other processes; whether this was the one to ask.

    For the time before there is a process group: rank 0 asks, and the others should let it.
    """
    job = dist.slurm_job_id()
    if job is None:
        return True
    if dist.read_environment().rank != 0:
        return False
    _requeue(job)
    return True


def leave(stop: StopSignal, hint: str = "the same command continues") -> int:
    """End a process that was asked to stop and has saved; under Slurm, have the job run again.

    hint: what comes next, for people. All processes call it. Returns the exit status.
    """
    if dist.is_main():
        logger.warning("stopped by %s; %s", stop.name, hint)
    requeue_slurm_job(stop)  # before any process leaves: srun then ends the step
    finish(stop)
    return 128 + getattr(signal, stop.name)


def finish(stop: StopSignal | None = None) -> int:
    """End a process whose work is done: folders, signals, process group. Returns the exit status, 0."""
    release_folders()
    if stop is not None:
        stop.restore()
    dist.shutdown()
    return 0


def _requeue(job):
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        logger.error("`%s`: %s; submit the job again to go on", " ".join(command), reason)
        return False
    logger.warning("asked Slurm to run job %s again", job)
    return True
