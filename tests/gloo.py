"""Run a function in several gloo processes, or a script's main in one: cheap forks of one server."""

import contextlib
import importlib
import multiprocessing
import os
import queue
import signal
import socket
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from src import dist as distributed
from src.run import flags
from tests.runs import children_of

# The fork server imports once what test modules import; each rank is then a cheap fork of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("torch", "torch.distributed", "torch._dynamo", "pytest", "tests.reference", "tests.runs"),
        *("main_swav", "main_dino", "main_deepercluster", "eval_knn", "eval_linear", "eval_voc07"),
        *("eval_semisup", "eval_finetune", "eval_image_retrieval", "eval_copy_detection"),
        *("eval_video_segmentation", "eval_detection"),
        *("matplotlib.pyplot", "sklearn.datasets"),
        *("main_deepcluster", "main_deepclusterv2", "main_selav2", "main_simclr", "main_rotnet"),
        *("main_clusterfit", "matplotlib.pyplot", "sklearn.datasets", "sklearn.metrics"),
        "tests.faults.methods",
    ]
)
TIMEOUT = 120  # seconds


def run_ranks(function, world_size, *args):
    """Call function(rank, world_size, *args) in `world_size` gloo processes; their results by rank.

    `function` must be defined at the top level of a test module; what it returns is pickled, so
    return numpy arrays, numbers or lists rather than tensors. With one process it is called here,
    without a process group. Raises RuntimeError with the traceback of the first rank that failed.
    """
    if world_size == 1:
        return [function(0, 1, *args)]
    with tempfile.TemporaryDirectory() as folder:
        results = CONTEXT.Queue()
        processes = [
            CONTEXT.Process(
                target=_rank_main, args=(function, rank, world_size, folder, results, args)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        collected = {}
        try:
            while len(collected) < world_size:  # read first: a rank ends when its result is taken
                rank, result, error = results.get(timeout=TIMEOUT)
                if error:
                    raise RuntimeError(f"rank {rank} of {world_size} failed:\n{error}")
                collected[rank] = result
        except queue.Empty:
            missing = sorted(set(range(world_size)) - set(collected))
            raise RuntimeError(f"ranks {missing} of {world_size} hung for {TIMEOUT} s") from None
        finally:
            for process in processes:
                process.join(10 if len(collected) == world_size else 0)
                process.kill()
        return [collected[rank] for rank in range(world_size)]


def has_faiss():
    """Whether faiss can be imported; its wheels are not made for every numpy."""
    try:
        importlib.import_module("faiss")
    except ImportError:
        return False
    return True


def settle():
    """What a fresh process does first: as many threads as the tests have, and src.dist's."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # which tests.conftest has set
    distributed.settle_vector_functions()


def _rank_main(function, rank, world_size, folder, results, args):
    settle()
    result, error = None, None
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{Path(folder) / 'rendezvous'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT),
        )
        result = function(rank, world_size, *args)
        dist.barrier()
        distributed.shutdown()
    except BaseException:
        error = traceback.format_exc()
    results.put((rank, result, error))


class Main:
    """main(argv) of a script in a process of its own, to be watched, signalled and killed.

    As subprocess.Popen where tests.runs needs it, and seconds faster: nothing is imported again.
    """

    def __init__(self, script, folder, argv, environ=None):
        self.log = Path(f"{folder}.out{(environ or {}).get('RANK', '')}")
        self.log.write_text("")
        words = ["--dump_path", str(folder), *map(str, argv)]
        arguments = (script, words, str(self.log), environ or {})
        self.process = CONTEXT.Process(target=_call_main, args=arguments)
        self.process.start()
        self.pid, self.stdout = self.process.pid, self

    def read(self):
        return self.log.read_text()

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=TIMEOUT):
        """Its exit status, minus the signal if one killed it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise RuntimeError(f"it ran for {timeout} s more:\n{self.read()}")
        return self.process.exitcode


def start_mains(script, folder, argv, world_size):
    """A Main for each rank, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)]
    environs = [{name: str(value) for name, value in rank.items()} for rank in ranks]
    return [Main(script, folder, argv, environ) for environ in environs]


def run_mains(script, folder, argv, world_size):
    """main(argv) of a script in so many processes, which must end well; what they have said."""
    ranks = start_mains(script, folder, argv, world_size)
    statuses = [rank.wait(5 * TIMEOUT) for rank in ranks]
    said = "\n".join(rank.read() for rank in ranks)
    assert statuses == [0] * world_size, said
    return said


def kill_mains(ranks):
    """Kill -9 all ranks, and the loaders that they have started."""
    for rank in ranks:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            for pid in [*children_of(rank), rank.pid]:
                os.kill(pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def load_script(script, log, environ):
    """In a fork of the server, set its environment and a file in place of its screen, and load a script."""
    settle()
    multiprocessing.set_start_method(None, force=True)  # the fork has that of its server
    os.environ.update(environ)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    return importlib.import_module(script)


def _call_main(script, argv, log, environ):
    module = load_script(script, log, environ)
    flags.run(lambda: module.main(argv))
