"""Timing shared by the benchmarks: medians of interleaved runs, peak memory, one table format."""

import statistics
import time

import torch


def median_seconds(functions, repeats=10, warmup=2, device="cpu"):
    """Median seconds of each function in `functions` (a list), run in turn so that drift hits all."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    times = [[] for _ in functions]
    for repeat in range(warmup + repeats):
        for function, record in zip(functions, times, strict=True):
            wait()
            start = time.perf_counter()
            function()
            wait()
            if repeat >= warmup:
                record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in times]


def peak_megabytes(function, device="cpu"):
    """Largest amount of tensor memory that `function` holds at once, beyond what was there before."""
    function()  # allocations that happen once are not counted
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # in order of time
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def print_table(title, header, rows):
    """Print `rows` (lists of strings or numbers) under `header`, columns aligned."""
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    print(f"\n{title} (torch {torch.__version__}, {torch.get_num_threads()} threads)")
    for row in [header, *cells]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
