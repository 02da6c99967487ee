"""Shared by the benchmarks: flags, medians of interleaved runs, peak memory, one format of tables."""

import argparse
import json
import platform
import re
import statistics
import time
from pathlib import Path

import torch


def get_parser(doc, repeats):
    """A parser with the flags that every benchmark has; `repeats` is the default of --repeats."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each form")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="tiny sizes and one repeat: shows in seconds that all runs, and says nothing about time",
    )
    parser.add_argument(
        "--json",
        default=None,
        metavar="FILE",
        help="append each table to it, one line of JSON each",
    )
    return parser


def parse_args(parser, smoke, argv=None):
    """Parse `argv`. smoke: the defaults of --smoke, which a flag on the command line wins over."""
    args = parser.parse_args(argv)
    if args.smoke:
        parser.set_defaults(repeats=1, **smoke)
        args = parser.parse_args(argv)
    return args


def waiting(device):
    """A function that waits until `device` has done all that was asked of it."""
    device = torch.device(device)
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def median_seconds(functions, repeats=10, warmup=2, device="cpu"):
    """Median seconds of each function in `functions` (a list), run in turn so that drift hits all."""
    wait = waiting(device)
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
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # in order of time
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def print_table(title, header, rows, json_file=None):
    """Print `rows` (lists of strings or numbers) under `header`, columns aligned.

    json_file: where to append the table as one line of JSON: title, header, rows and machine.
    """
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    print(f"\n{title} (torch {torch.__version__}, {torch.get_num_threads()} threads)")
    for row in [header, *cells]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(),
            flush=True,
        )
    if json_file is not None:
        with open(json_file, "a") as file:
            table = {"title": title, "header": header, "rows": rows, "machine": machine()}
            file.write(json.dumps(table) + "\n")


def machine():
    """What ratios depend on: the GPU where one is in use, else the processor, and the threads."""
    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor():
    """The model of the processor, as Linux names it, else as Python does.

    Virtual machines call generations that differ in their vector instructions by one name, such as
    AMD EPYC; family and model, where Linux says them, tell these apart.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    name = facts.get("model name", platform.machine()).strip()
    if "cpu family" not in facts or "model" not in facts:
        return name
    return f"{name} (family {facts['cpu family']}, model {facts['model']})"
