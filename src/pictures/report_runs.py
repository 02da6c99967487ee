"""What the folders of runs hold, side by side: plans, settings, figures of evaluations."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import printable
from ..run.checkpoint import NEWEST
from ..run.log import read_log

# A line of the plan in train.log: its time, a word, at least two spaces, a sentence.
PLAN_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d):\d\d\S* INFO \S+: (\w+) {2,}(\S.*)")
COMMAND_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d):\d\d\S* INFO \S+: command: (\S+)(.*)")
VERSION_LINE = re.compile(r"INFO \S+: (torch \S+, python \S+, git \S+)$")
PLAN = ("preset", "data", "crops", "batch", "optimizer", "network")
LEFT_OUT = ("watch", "pace")  # lines of the plan that are of no use afterwards
# Rows of the plan in which any two runs differ, and which say nothing of what they set out to do.
OF_ITS_OWN = {"folder", "command", "epochs done", "last loss", "images a second", "peak memory"}
OF_ITS_OWN |= {"started"}
LONGEST = 400  # characters of a value on the page
# Where a run is and how it was started, which is no setting of it.
NO_SETTINGS = {"dump_path", "rank", "local_rank", "dist_url", "world_size", "debug_slurm"}

# Average precisions of detection.
PRECISIONS = {"ap": "AP", "ap50": "AP50", "ap75": "AP75"}
PRECISIONS |= {f"ap_{size}": f"AP, {size} objects" for size in ("small", "medium", "large")}
# What figures are called, and whether more is better; those that are not here keep their name.
FIGURES = {
    "top1": ("top-1 (%)", True),
    "top5": ("top-5 (%)", True),
    "best_top1": ("best top-1 (%)", True),
    "best_top5": ("best top-5 (%)", True),
    "map": ("mAP (%)", True),
    "best_map": ("best mAP (%)", True),
    "map_11points": ("11-point mAP (%)", True),
    "best_map_11points": ("best 11-point mAP (%)", True),
    "map_interpolated": ("interpolated mAP (%)", True),
    "map_of_all": ("mAP, whole ranking (%)", True),
    "map_eval_binary": ("mAP by the published program (%)", True),
    "micro_ap": ("micro-AP (%)", True),
    "mp@1": ("mP@1 (%)", True),
    "mp@5": ("mP@5 (%)", True),
    "mp@10": ("mP@10 (%)", True),
    **{key: (f"{name} (%)", True) for key, name in PRECISIONS.items()},
    **{f"mask_{key}": (f"mask {name} (%)", True) for key, name in PRECISIONS.items()},
    **{f"{key}_11points": (f"11-point {key.upper()} (%)", True) for key in ("ap", "ap50", "ap75")},
}
# Numbers of result files that are settings or costs.
NO_FIGURES = {"lr", "penalty", "cost", "temperature", "seconds", "loss", "mass", "epoch"}
NESTED = {"settings", "history", "folds", "held_out", "videos", "networks"}  # not looked into
CLUSTER_FIGURES = {
    "images": ("images", None),
    "num_clusters": ("clusters", None),
    "empty": ("empty clusters", None),
    "unique": ("unique centroids", None),
    "accuracy": ("accuracy, clusters matched with classes", True),
    "purity": ("purity", None),  # comparable at equal numbers of clusters only, as NMI is
    "nmi": ("NMI with the classes", None),
    "ami": ("AMI with the classes", True),
    "ari": ("ARI with the classes", True),
    "same_class_edges": ("nearest neighbours of one class", True),
    "colour_spread": ("spread of colour in clusters", None),
    "colour_spread_of_all": ("spread of colour in all images", None),
}


@dataclass
class Row:
    """A line of a table: its name, a text for each run ("" for none), and what is to be marked.

    best: numbers of the runs with the best figure. differs: whether the runs say different things.
    """

    name: str
    values: list[str]
    best: list[int] = field(default_factory=list)
    differs: bool = False


@dataclass
class RunFolder:
    """A run's folder as a report shows it.

    name: short and unlike those of the other runs. arguments: of args.json, {} without one. lines: of
    log.jsonl. plan: by heading, see plan_of.
    """

    folder: Path
    name: str
    arguments: dict
    lines: list[dict]
    plan: dict[str, str] = field(default_factory=dict)

    def is_older(self, path: Path) -> bool:
        """Whether a file is older than the run's last checkpoint."""
        try:
            return path.stat().st_mtime < (self.folder / NEWEST).stat().st_mtime
        except OSError:
            return False


# ============ reading ============
def open_runs(folders: Sequence[str]) -> list[RunFolder]:
    """The runs of some folders. Raises FileNotFoundError or ValueError for what is no run's folder."""
    runs, seen = [], set()
    for path, name in zip(folders, short_names(folders), strict=True):
        folder = Path(path)
        if folder.resolve() in seen:
            raise ValueError(f"{printable(path)} is named twice: give each run once")
        seen.add(folder.resolve())
        if not any((folder / file).is_file() for file in ("args.json", "log.jsonl")):
            raise FileNotFoundError(
                f"{printable(path)} is not the folder of a run: it has neither args.json nor log.jsonl"
            )
        try:
            lines = [line for line in read_log(folder) if is_number(line["epoch_float"])]
        except OSError:
            lines = []
        run = RunFolder(folder, name, read_object(folder / "args.json"), lines)
        run.plan = plan_of(run)
        runs.append(run)
    return runs


def short_names(folders: Sequence[str]) -> list[str]:
    """The ends of paths, as short as they differ from each other, for people."""
    parts = [Path(path).absolute().parts for path in folders]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(x[-count:]) for x in parts]
        if len(set(names)) == len(names):
            break
    return [printable(name) for name in names]


def read_object(path: Path) -> dict:
    """The object in a JSON file, {} where there is none that can be read."""
    try:
        contents = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return contents if isinstance(contents, dict) else {}


def plan_of(run: RunFolder) -> dict[str, str]:
    """What a run set out to do and how far it has come: by train.log, else by its arguments."""
    about, said = {}, {}
    try:
        text = (run.folder / "train.log").read_text(errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        if found := COMMAND_LINE.match(line):
            about["started"], script, flags = found.groups()
            about["command"] = script + flags
        elif found := VERSION_LINE.search(line):
            about["versions"] = found[1]
        elif (found := PLAN_LINE.match(line)) and found[2] not in LEFT_OUT:
            said[found[2]] = found[3]
    arguments = run.arguments
    if not said:
        names = {"data": "data_path", "network": "arch", "batch": "batch_size"}
        said = {x: str(arguments[name]) for x, name in names.items() if name in arguments}
    ordered = {name: said[name] for name in PLAN if name in said} | said
    done = max((line["epoch_float"] for line in run.lines), default=0)
    of = f" of {arguments['epochs']}" if "epochs" in arguments else ""
    plan = {
        "folder": str(run.folder),
        "command": about.get("command", ""),
        **ordered,
        "epochs done": f"{done:.4g}{of}",
        **_pace(run.lines),
        "started": about.get("started", ""),
        "versions": about.get("versions", ""),
    }
    return {name: text for name, text in plan.items() if text}


def _pace(lines):
    """Last loss, rate and memory of a log."""
    found = {}
    for key, name, form in (
        ("loss", "last loss", "{:.4f}"),
        ("images_per_second", "images a second", "{:,.0f}"),
        ("peak_memory_mb", "peak memory", "{:,.0f} MB"),
    ):
        values = [line[key] for line in lines if is_number(line.get(key))]
        if values:
            value = sorted(values)[len(values) // 2] if key == "images_per_second" else values[-1]
            found[name] = form.format(value)
    return found


def is_number(value: object) -> bool:
    """Whether a value of a log or a result is a finite number."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return is_one and math.isfinite(value)
    except OverflowError:  # a whole number beyond those of float
        return False


# ============ tables ============
def plan_rows(runs: Sequence[RunFolder]) -> list[Row]:
    """The plans of runs, a row for each heading."""
    rows = rows_of([run.plan for run in runs])
    for row in rows:
        row.differs &= row.name not in OF_ITS_OWN
    return rows


def setting_rows(runs: Sequence[RunFolder]) -> list[Row]:
    """The arguments of runs by name; a row differs where two runs that have it say different things."""
    texts = [
        {x: json.dumps(value) for x, value in run.arguments.items() if x not in NO_SETTINGS}
        for run in runs
    ]
    return sorted(rows_of(texts), key=lambda row: row.name)


def rows_of(columns: Sequence[dict[str, str]]) -> list[Row]:
    """A row for each name in any of the columns; see union."""
    rows = []
    for name in union(columns):
        values = [shorten(column.get(name, "")) for column in columns]
        told = {column[name] for column in columns if name in column}
        rows.append(Row(name, values, differs=len(told) > 1))
    return rows


def union(columns: Sequence[Iterable]) -> list:
    """What is in any of the columns, in their order: what is new in one comes after what it follows there."""
    merged = []
    for column in columns:
        place = 0
        for name in column:
            if name in merged:
                place = merged.index(name) + 1
            else:
                merged.insert(place, name)
                place += 1
    return merged


def shorten(text: str) -> str:
    """A text without its middle where it is longer than LONGEST."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def evaluation_rows(runs: Sequence[RunFolder]) -> list[Row]:
    """The figures of all result files of runs, a row for each evaluation and figure.

    Evaluations of different data, features, labels, ... are different rows. A figure whose file is
    older than the run's last checkpoint ends in a dagger.
    """
    rows = _figure_rows([evaluations_of(run) for run in runs])
    return sorted(rows, key=lambda row: row.name.partition(": ")[0])


def cluster_rows(runs: Sequence[RunFolder]) -> list[Row]:
    """What plots/clusters/clusters.json of runs says of their clusters."""
    columns = []
    for run in runs:
        said = read_object(run.folder / "plots" / "clusters" / "clusters.json")
        columns.append(
            {
                (name, more): (said[key], f"{said[key]:,}" if is_count(said[key]) else None)
                for key, (name, more) in CLUSTER_FIGURES.items()
                if is_number(said.get(key))
            }
        )
    return _figure_rows(columns)


def is_count(value: object) -> bool:
    """Whether a number is a whole one."""
    return isinstance(value, int)


def evaluations_of(run: RunFolder) -> dict:
    """(name, whether more is better) -> (figure, its text or None) of all result files of a run."""
    found = {}
    values = [line["knn"] for line in run.lines if is_number(line.get("knn"))]
    if values:
        found["while training: k-NN, top-1 (%)", True] = (values[-1], f"{values[-1]:.2f}")
    files = sorted(run.folder.glob("eval_*.json"))
    files += [run.folder / "plots" / "attention" / "attention_voc.json"]
    for path in files:
        contents = read_object(path)
        settings = contents.get("settings")
        data = settings.get("data_path") if isinstance(settings, dict) else None
        title = path.stem.removeprefix("eval_").replace("_", " ")
        title = title.replace("knn", "k-NN").replace("voc", "VOC").replace("VOC07", "VOC 2007")
        title += f" on {shorten(str(data))}" if data else ""
        split = settings.get("test_split") if isinstance(settings, dict) else None
        title += f", {shorten(str(split))}" if split else ""
        for names, key, value, std in figures_of(contents):
            name, more = FIGURES.get(key, (key.replace("_", " "), None))
            name = f"{title}: {', '.join([*names, name])}"
            text = f"{value:.2f}" if abs(value) >= 1 else f"{value:.4g}"
            text += f" ± {std:.2f}" if std is not None else ""
            found[name, more] = (value, text + (" †" if run.is_older(path) else ""))
    return found


def figures_of(contents: dict) -> Iterable[tuple[list[str], str, float, float | None]]:
    """(what tells it from others, key, figure, standard deviation or None) of a result file.

    The figures are the fractions at the top level, or else those in `results`: a list, whose rows are
    told apart by their other values, or an object of objects, which are by their names.
    """
    own = list(_figures(contents))
    if own:
        yield from (([], *figure) for figure in own)
        return
    results = contents.get("results")
    if isinstance(results, list):
        for row in filter(lambda row: isinstance(row, dict), results):
            texts = [
                value if isinstance(value, str) and key != "labels" else f"{key} {value}"
                for key, value in row.items()
                if isinstance(value, str | int) and not isinstance(value, bool) and key != "images"
            ]
            yield from ((texts, *figure) for figure in _figures(row))
    elif isinstance(results, dict):
        for name, row in results.items():
            if isinstance(row, dict):
                yield from (([name], *figure) for figure in _figures(row))


def _figures(row):
    """(key, value, standard deviation or None) of the fractions in an object."""
    for key, value in row.items():
        is_std = key == "std" or key.endswith("_std")
        if isinstance(value, float) and math.isfinite(value) and not is_std:
            std = row.get(f"{key}_std", row.get("std"))
            if key not in NO_FIGURES | NESTED:
                yield key, value, std if is_number(std) else None


def _figure_rows(columns):
    """Rows of (name, whether more is better) -> (figure, text or None) of each run."""
    rows = []
    for name, more in union(columns):
        told = [column.get((name, more)) for column in columns]
        texts = ["" if x is None else x[1] or f"{x[0]:.4g}" for x in told]
        row = Row(name, texts)
        numbers = {i: x[0] for i, x in enumerate(told) if x is not None}
        if more and len(numbers) > 1 and len(set(numbers.values())) > 1:
            row.best = [i for i, x in numbers.items() if x == max(numbers.values())]
        rows.append(row)
    return rows
