"""Run a function in several gloo processes and collect what each returns."""

import multiprocessing
import queue
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# The fork server imports torch and all of src once; each rank is then a cheap fork of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "main_swav"])
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


def _rank_main(function, rank, world_size, folder, results, args):
    torch.set_num_threads(1)
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
        dist.destroy_process_group()
    except BaseException:
        error = traceback.format_exc()
    results.put((rank, result, error))
