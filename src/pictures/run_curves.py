"""The curves of several runs in one picture, and what their evaluations say by the epochs trained.

As figures 3 (right) and 7 of SwAV (Caron et al. 2020, arXiv:2006.09882) compare runs.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ..errors import cause
from ..run.log import read_log, whole
from .curves import DPI, PANELS, describe_run, panels_of_probe_sets

LINE = 0.2  # inches of a line of the legend
EVALUATIONS = {"linear": "best linear top-1 (%)", "knn": "best k-NN top-1 (%)"}  # by --curves
MARKED = 12  # points of a curve that are drawn as points, at most


def read_runs(folders: Sequence[str], flag: str = "--runs") -> dict[str, list[dict]]:
    """The lines of each run's log, by folder. Raises FileNotFoundError or ValueError naming `flag`."""
    runs = {}
    for folder in folders:
        if folder in runs:
            raise ValueError(f"{flag} {folder} is named twice")
        try:
            runs[folder] = read_log(folder)
        except OSError as error:
            raise FileNotFoundError(
                f"{flag} {folder} has no log.jsonl that can be read ({cause(error)}): give folders of runs"
            ) from error
        if not runs[folder]:
            raise ValueError(f"{flag} {folder}: its log.jsonl has no line yet")
    return runs


def choose_panels(
    runs: dict[str, list[dict]], wanted: Sequence[str] | None, flag: str = "--curves"
) -> list[tuple[str, str]]:
    """(key of the lines of a log, title) of the panels: those wanted, or all that two runs have.

    Of a single run all are drawn. Raises ValueError for what no run has logged.
    """
    everything = dict(PANELS)
    for lines in runs.values():
        everything |= dict(panels_of_probe_sets(lines))
    counts = {
        key: sum(any(line.get(key) is not None for line in lines) for lines in runs.values())
        for key in everything
    }
    if not wanted:
        least = min(2, len(runs))
        return [(key, title) for key, title in everything.items() if counts[key] >= least]
    for key in wanted:
        if not counts.get(key):
            there = ", ".join(key for key, count in counts.items() if count)
            raise ValueError(f"{flag} {key} is in no log of these runs, which have {there}")
    return [(key, everything[key]) for key in wanted]


def results_of_run(folder: str | Path) -> dict[str, float]:
    """The best accuracies that evaluations have left in a run's folder, by EVALUATIONS."""
    results = {}
    linear, knn = (_read(Path(folder) / f"eval_{name}.json") for name in ("linear", "knn"))
    if isinstance(linear.get("best_top1"), int | float):
        results["linear"] = linear["best_top1"]
    rows = [row for row in knn.get("results", []) if row.get("labels") == "all"]
    own = [row["top1"] for row in rows if row.get("features") in ("backbone", "embedding")]
    if own:
        results["knn"] = max(own)
    return results


def _read(path):
    try:
        contents = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}


def draw_runs(runs: dict[str, list[dict]], panels: Sequence[tuple[str, str]], path: Path) -> None:
    """Write a PNG: a panel for each of `panels`, a line for each run, the legend below them.

    Evaluations that two runs have get a panel of their own, by the epochs that the runs were trained.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = {folder: results_of_run(folder) for folder in runs}
    evaluated = [x for x in EVALUATIONS if sum(x in found for found in results.values()) >= 2]
    count = len(panels) + len(evaluated)
    columns = min(4, max(1, count))
    rows = max(1, math.ceil(count / columns))
    legend = LINE * (len(runs) + 1)
    height = 2.9 * rows + legend
    width = max(4 * columns, 6)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    labels = [describe_run(folder, lines).replace("$", r"\$") for folder, lines in runs.items()]
    for axis, (key, title) in zip(axes.flat, panels, strict=False):
        for number, lines in enumerate(runs.values()):
            points = [(x["epoch_float"], x[key]) for x in lines if x.get(key) is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    linewidth=1.3,
                    marker="o" if len(points) <= MARKED else None,
                    markersize=3,
                    color=f"C{number % 10}",
                )
        _describe(axis, title, "epoch")
    for axis, kind in zip(axes.flat[len(panels) :], evaluated, strict=False):
        for number, (folder, lines) in enumerate(runs.items()):
            if kind in results[folder]:
                epochs = max(line["epoch_float"] for line in lines)
                axis.plot([epochs], [results[folder][kind]], "o", color=f"C{number % 10}")
        _describe(axis, EVALUATIONS[kind], "epochs of training")
    handles = [pyplot.Line2D([], [], color=f"C{i % 10}") for i in range(len(runs))]
    figure.tight_layout(rect=(0, legend / height, 1, 1))
    figure.legend(handles, labels, loc="lower left", fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole(path) as spare:
            figure.savefig(spare, dpi=DPI, format="png")
    finally:
        pyplot.close(figure)


def _describe(axis, title, below):
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(below, fontsize=8)
    axis.grid(alpha=0.3)
