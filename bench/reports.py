"""What a report of measurements begins with, machine and versions, and its tables in Markdown.

Needs only Python's standard library, as scripts/on_gpu.py does, which starts with it.
"""

import datetime
import json
import os
import subprocess
import sys

from bench.processes import ROOT, error_line

QUESTIONS = """
import json, sys, torch
try:
    from torchvision import __version__ as torchvision
except ImportError:
    torchvision = "none"
facts = {"torch": torch.__version__, "torchvision": torchvision, "python": sys.version.split()[0]}
facts |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
facts |= {"card": "no GPU", "card_memory": "-"}
device = torch.device(sys.argv[1])
if device.type == "cuda" and torch.cuda.is_available():
    card = torch.cuda.get_device_properties(device)
    facts |= {"card": card.name, "card_memory": f"{card.total_memory / 2**30:.0f} GiB"}
from bench.measure import processor
facts["processor"] = processor()
print(json.dumps(facts))
"""


def describe_machine(device: str) -> dict:
    """Card, driver, processor, versions, commit and date; ValueError where PyTorch or the GPU is missing."""
    asked = [sys.executable, "-c", QUESTIONS, device]
    answer = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT)
    if answer.returncode:
        raise ValueError(f"PyTorch does not work here: {error_line(answer.stderr)}")
    facts = json.loads(answer.stdout.splitlines()[-1])
    if device != "cpu" and facts["card"] == "no GPU":
        raise ValueError(
            f"--device {device} is not there for PyTorch: --device cpu --smoke tries this script"
        )
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        **facts,
        "driver": (output_of(question) or "none").splitlines()[0],
        "cores": num_cores(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def commit() -> str:
    """The commit, and whether tracked files differ from it; "unknown" where git does not say it."""
    head = output_of(["git", "rev-parse", "--short=10", "HEAD"])
    if not head:
        return "unknown"
    changed = output_of(["git", "status", "--porcelain", "--untracked-files=no"])
    return f"{head} with changes" if changed else head


def output_of(command):
    try:
        answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def markdown_table(header: list[str], rows: list[list]) -> list[str]:
    """Lines of a table with a blank one behind it; a bar in a cell is written so that it is none."""
    table = [header, ["---"] * len(header), *rows]
    lines = []
    for row in table:
        cells = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in row]
        cells = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]
