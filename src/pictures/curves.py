"""The curves of a run, drawn from its log."""

import json
import math
from pathlib import Path

from ..errors import printable
from ..run.log import read_log, whole

DPI = 110
HEADER = 0.45  # inches above the panels
PANELS = [
    ("loss", "loss"),
    ("lr", "learning rate"),
    ("gradient_norm", "gradient norm"),
    ("code_entropy", "entropy of the codes (nats)"),
    ("prediction_entropy", "entropy of the predictions (nats)"),
    ("accuracy", "predictions that agree with the pseudo-label (%)"),
    ("nmi_previous", "NMI with the previous assignment"),
    ("nmi_labels", "NMI with the labels"),
    ("cluster_max", "images in the largest cluster"),
    ("clusters_empty", "empty clusters"),
    ("positive_cosine", "cosine of crops of one image"),
    ("negative_cosine", "cosine of crops of different images"),
    ("teacher_entropy", "entropy of the teacher's output (nats)"),
    ("student_kl", "KL of teacher and student (nats)"),
    ("kl_to_uniform", "KL of the mean output to uniform (nats)"),
    ("center_norm", "norm of the center"),
    ("prototypes_used", "prototypes or classes in use"),
    ("unique", "unique prototypes"),
    ("embedding_std", "std of the embeddings (1: spread)"),
    ("rankme", "RankMe"),
    ("knn", "k-NN top-1 (%)"),
]
NETWORKS = ("student", "teacher")  # whose k-NN and probes share a panel


def plot_curves(folder: str | Path, num_prototypes: int | None = None) -> Path:
    """Draw the run's log.jsonl to plots/curves.png; ln(K), the loss of constant codes, is dashed.

    The header says which run it is, on what, and how far it has come.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(folder)
    shown = [(key, title) for key, title in PANELS if any(key in line for line in lines)]
    shown += panels_of_probe_sets(lines)
    columns = min(4, max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    height = 2.8 * rows + HEADER
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, height), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (key, title) in zip(axes.flat, shown, strict=False):
        for name in series_of(key, lines):
            points = [
                (line["epoch_float"], line[name]) for line in lines if line.get(name) is not None
            ]
            marker = "o" if key.startswith(("knn", "linear_")) or len(points) == 1 else None
            label = None if name == key else name.removesuffix(f"_{key}")
            axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=label)
            if label:
                axis.legend(fontsize=8, frameon=False)
        if key == "loss" and num_prototypes:
            ceiling = math.log(num_prototypes)
            label = f"ln K = {ceiling:.2f}, knowing nothing"
            axis.axhline(ceiling, linestyle="--", color="grey", linewidth=1.3, label=label)
            axis.legend(fontsize=8, frameon=False)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch", fontsize=8)
        axis.grid(alpha=0.3)
    title = describe_run(folder, lines).replace("$", r"\$")  # no formula
    figure.text(0.5, 1 - 0.15 / height, title, ha="center", va="top", fontsize=12)
    figure.tight_layout(rect=(0, 0, 1, 1 - HEADER / height))
    path = Path(folder) / "plots" / "curves.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole(path) as spare:
            figure.savefig(spare, dpi=DPI, format="png")
    finally:
        pyplot.close(figure)
    return path


def series_of(key: str, lines: list[dict]) -> list[str]:
    """The keys that a panel shows: those of each network where k-NN evaluates several, else `key`."""
    names = [f"{network}_{key}" for network in NETWORKS]
    return [name for name in names if any(line.get(name) is not None for line in lines)] or [key]


def panels_of_probe_sets(lines: list[dict]) -> list[tuple[str, str]]:
    """(key, title) of what the lines of a log say of the sets of --probe_data."""
    keys = dict.fromkeys(key for line in lines for key in line)
    kinds = {"knn_": "k-NN top-1 (%)", "linear_": "linear top-1 (%)"}
    return [
        (key, f"{title}, {key.removeprefix(start)}")
        for key in keys
        for start, title in kinds.items()
        if key.startswith(start)
    ]


def describe_run(folder: str | Path, lines: list[dict]) -> str:
    """What a run's folder says of it: '.../mine: resnet18 on digits, epoch 3 of 100'."""
    try:
        arguments = json.loads((Path(folder) / "args.json").read_text())
    except (OSError, ValueError):
        arguments = {}
    name = _end_of(Path(folder).absolute().name)
    if "arch" in arguments and "data_path" in arguments:
        name += f": {arguments['arch']} on {_end_of(str(arguments['data_path']))}"
    done = max((line["epoch_float"] for line in lines), default=0)
    of = f" of {arguments['epochs']}" if "epochs" in arguments else ""
    return f"{name}, epoch {done:.3g}{of}"


def _end_of(text, letters=32):
    """The last letters of a name, which tell more than the first ones."""
    text = printable(text)
    return text if len(text) <= letters else f"...{text[3 - letters :]}"
