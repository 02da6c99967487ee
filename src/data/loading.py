"""The DataLoader of all that reads images, and its processes: how they start, fail and end."""

import atexit
import contextlib
import functools
import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ..errors import STOP_SIGNALS, RunError, cause

TIMEOUT = 1800.0  # seconds that a batch may take, of --loader_timeout
GRACE = 2.0  # seconds after it until torch, whose limit it is first, is interrupted
LEAVING: list[torch.Tensor] = []  # a byte of each Loader, shared with its processes: 1 to end


@atexit.register
def let_workers_leave() -> None:
    """The main process ends: a worker that starts now ends at once, others when SIGTERM asks them to."""
    for leaving in LEAVING:
        leaving.fill_(1)


def num_cores() -> int:
    """Cores of the CPU that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Loader(DataLoader):
    """A DataLoader whose processes end when the main process does, and not before.

    num_workers: as many processes are started, but no more than there are cores. device_type: where
    batches go; they are pinned for a GPU. timeout: seconds that a batch may take,
    0: any; in the main process itself nothing is timed. Other arguments as of DataLoader. Raises
    RunError where no process can be started.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        num_workers: int,
        device_type: str,
        timeout: float = TIMEOUT,
        collate: Callable = default_collate,
        **options,
    ):
        num_workers = min(num_workers, num_cores())
        leaving = shared_bytes(1)
        LEAVING.append(leaving)
        super().__init__(
            dataset,
            num_workers=num_workers,
            pin_memory=device_type not in ("cpu", "mps"),
            timeout=timeout if num_workers else 0,
            collate_fn=functools.partial(_collate_shared, collate=collate),
            worker_init_fn=functools.partial(_start_worker, leaving=leaving),
            **options,
        )

    def __iter__(self):
        try:
            self._rehearse()
            with blocked_signals():
                batches = super().__iter__()
        except OSError as error:
            raise RunError(
                f"--workers {self.num_workers}: no loader process could be started ({cause(error)}); they "
                "need a /dev/shm that can be written to, memory and free process numbers: mend that, "
                "or use --workers 0"
            ) from error
        is_main_thread = threading.current_thread() is threading.main_thread()
        if not (self.num_workers and is_main_thread and hasattr(signal, "SIGALRM")):
            return batches
        # Torch looks for processes that have failed when this signal comes, and not while it starts them.
        signal.raise_signal(signal.SIGCHLD)
        return _CheckedBatches(batches, self.timeout + GRACE if self.timeout else 0.0)

    def _rehearse(self):
        """Make what torch makes for its processes: where its own fails, a half-made object complains."""
        if self.num_workers:
            context = self.multiprocessing_context or multiprocessing
            context.Event(), [context.Queue() for _ in range(self.num_workers + 1)]


class _CheckedBatches:
    """The batches of an iterator, each within some seconds, 0: any time.

    Torch's own limit does not hold where it takes a batch over from a process that has been stopped. And
    torch says that a process was killed only if the system has told so already: before, what it says is
    that a connection has ended.
    """

    def __init__(self, batches, seconds):
        self.batches, self.seconds = batches, seconds

    def __iter__(self):
        return self

    def __next__(self):
        if not self.seconds:
            return self._next()
        before = signal.signal(signal.SIGALRM, self._give_up)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            return self._next()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _next(self):
        try:
            return next(self.batches)
        except (ConnectionError, EOFError) as error:
            if "DataLoader worker" in str(error):  # an error of a dataset, in a process that lives
                raise
            raise RuntimeError(
                "DataLoader worker (pid unknown) ended while its batch was taken over"
            ) from error

    def _give_up(self, number, frame):
        raise TimeoutError(f"DataLoader timed out after {self.seconds:g} seconds")


def shared_bytes(count: int) -> torch.Tensor:
    """Zeros, uint8 (count,), that this process and those forked from it change together.

    Not in /dev/shm, which may be full, read-only or missing.
    """
    return torch.frombuffer(mmap.mmap(-1, max(count, 1)), dtype=torch.uint8)[:count]


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Inside, signals wait; in processes that are started inside, until `_start_worker` lets them in.

    Else a process would die of one that reaches the whole group while it starts.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    numbers = [getattr(signal, name) for name in STOP_SIGNALS]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker, leaving):
    """One thread, and deaf to the signals that reach a whole process group: the main process acts
    on them, and needs its workers until it has saved. When it ends, SIGTERM is its own, to obey."""
    torch.set_num_threads(1)
    signal.set_wakeup_fd(-1)  # that of the main process
    for name in ("SIGUSR1", "SIGUSR2", "SIGINT"):
        if hasattr(signal, name):  # Windows has no user signals
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: leaving.item() and os._exit(0))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [getattr(signal, name) for name in STOP_SIGNALS])
    if leaving.item():
        os._exit(0)


def _collate_shared(samples, collate):
    """A batch, in a worker already in shared memory: there an error reaches the main process.

    What is first shared when it is sent is sent by a thread, whose errors nobody hears of.
    """
    batch = collate(samples)
    if get_worker_info() is not None:
        _share(batch)
    return batch


def _share(batch):
    """Move the tensors of nested lists and tuples to shared memory."""
    if isinstance(batch, torch.Tensor):
        batch.share_memory_()
    elif isinstance(batch, list | tuple):
        for part in batch:
            _share(part)
