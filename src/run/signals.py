"""Signals while there is nothing to save, and the end of a process that must not hang.

Loads no torch, since a script calls `catch` before the seconds that loading torch takes.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time

from ..errors import STOP_SIGNALS

logger = logging.getLogger(__name__)

LAST_WORDS = 2.0  # seconds for the line that says why a process leaves
LEAVE_SECONDS = 8.0  # from the end of a script's main to that of its process
RANK_0_FIRST = 5.0  # seconds that the other processes wait while rank 0 asks for a requeue


# ============ nothing to save: leave at once ============
def catch() -> None:
    """From here on a signal of STOP_SIGNALS ends the script with 128 + its number, and one line.

    A thread does it, since the main thread may be in C++ for long: waiting for other processes,
    reading weights, multiplying matrices. SIGUSR1 and SIGUSR2 have a Slurm job requeued first. While a
    src.run.stop.StopSignal is there to save the run, signals are its own, but for a second SIGINT.
    What was ignored when the script started, as SIGINT of a job in the background, is left so.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=[reading], daemon=True).start()
    for name in STOP_SIGNALS:
        number = getattr(signal, name, None)  # Windows has no user signals
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _left_to_the_thread)


def _left_to_the_thread(number, frame):
    """The handler of a signal that `_watch` acts on."""


def _watch(reading):
    """Act on the numbers of signals that Python writes to a pipe."""
    numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    interrupts = 0
    while True:
        for number in os.read(reading, 64):
            if number not in numbers:  # a child has ended
                continue
            nothing_to_save = signal.getsignal(signal.SIGTERM) is _left_to_the_thread
            interrupts += number == signal.SIGINT
            if nothing_to_save or (number == signal.SIGINT and interrupts > 1):
                _leave(number)


def _leave(number):
    """Say which signal it was, have the job requeued where it asks for that, end the process."""
    name, status = signal.Signals(number).name, 128 + number
    if name in ("SIGUSR1", "SIGUSR2"):
        _requeue()
    # The main thread may hold the locks of the log, or of a screen that nobody reads.
    speaker = threading.Thread(target=_say, args=[f"stopped by {name}"], daemon=True)
    speaker.start()
    speaker.join(LAST_WORDS)
    lock = sys.modules.get(f"{__package__}.lock")
    if lock is not None:  # writers on other hosts would wait for a sign of life
        lock.release_folders()
    loading = sys.modules.get(f"{__package__.rpartition('.')[0]}.data.loading")
    if loading is not None:  # the main thread may be starting workers that nobody knows of yet
        loading.let_workers_leave()
    end_workers()
    os._exit(status)


def _requeue():
    """Have the Slurm job run again: rank 0 asks, the others give it time."""
    # The main thread loads torch, and no other thread may load it at the same time.
    package = __package__.rpartition(".")[0]
    while not hasattr(sys.modules.get(f"{package}.dist"), "slurm_job_id"):
        time.sleep(0.05)
    from .stop import requeue_alone

    if not requeue_alone():
        time.sleep(RANK_0_FIRST)


def _say(sentence):
    if logging.getLogger().handlers:
        logger.info(sentence)  # on the screen of the main process only
    else:
        sys.stderr.write(f"{sentence}\n")
    sys.stdout.flush()
    sys.stderr.flush()


# ============ the end of a process ============
def end_workers() -> None:
    """Kill what is left of the loaders' processes, which only read: some may be stuck or stopped."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # of torch: an error when a worker is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def leave_within(seconds: float, status: int) -> None:
    """End the process with `status` if it has not ended by itself by then.

    Libraries wait at the end of a process for threads and for other processes, which may be dead.
    """
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()
