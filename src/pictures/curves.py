"""Pictures of a run: curves, a sheet of crops, a sheet of nearest neighbours."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..run.log import read_log, whole

GAP = 2  # pixels between images of a sheet
PAPER = 215  # grey level behind the images, which are often white or black themselves
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
    ("embedding_std", "std of the embeddings (1: spread)"),
    ("rankme", "RankMe"),
    ("knn", "k-NN top-1 (%)"),
]


def plot_curves(folder: str | Path, num_prototypes: int | None = None) -> Path:
    """Draw the run's log.jsonl to plots/curves.png; ln(K), the loss of constant codes, is dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(folder)
    shown = [(key, title) for key, title in PANELS if any(key in line for line in lines)]
    columns = min(4, max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (key, title) in zip(axes.flat, shown, strict=False):
        points = [(line["epoch_float"], line[key]) for line in lines if line.get(key) is not None]
        marker = "o" if key == "knn" or len(points) == 1 else None
        axis.plot(*zip(*points, strict=True), marker=marker, markersize=3)
        if key == "loss" and num_prototypes:
            axis.axhline(math.log(num_prototypes), linestyle="--", color="grey", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch", fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path = Path(folder) / "plots" / "curves.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole(path) as spare:
            figure.savefig(spare, dpi=110, format="png")
    finally:
        pyplot.close(figure)
    return path


def to_uint8(crops: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Undo the normalisation: (B, C, S, S) float -> uint8."""
    mean, std = (torch.as_tensor(x, device=crops.device).view(-1, 1, 1) for x in (mean, std))
    return (crops.float() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)


def crop_sheet(crops: list[torch.Tensor], path: str | Path, side: int = 96) -> Path:
    """One row per image, one column per crop: list of uint8 (B, C, S, S), crop-major.

    Crops keep their relative sizes; the largest is drawn `side` pixels wide.
    """
    largest = max(crop.shape[-1] for crop in crops)
    rows = []
    for row in zip(*crops, strict=True):
        tiles = [_tile(crop, max(1, round(side * crop.shape[-1] / largest)), side) for crop in row]
        rows.append(np.concatenate(tiles, 1))
    return _save(np.concatenate(rows), path)


def neighbour_sheet(
    queries: list[torch.Tensor],
    neighbours: list[list[torch.Tensor]],
    correct: list[list[bool]] | None,
    path: str | Path,
    side: int = 64,
) -> Path:
    """One row per query: the query, then its neighbours; framed green (same label) or red.

    queries: uint8 (C, H, W); neighbours: a list of such for each query; correct: alike, or None.
    """
    rows = []
    for i, (query, row) in enumerate(zip(queries, neighbours, strict=True)):
        tiles = [_tile(query, side, side), np.full((side + GAP, 3 * GAP, 3), PAPER, np.uint8)]
        for j, image in enumerate(row):
            tile = Image.fromarray(_tile(image, side, side))
            if correct is not None:
                colour = (40, 160, 60) if correct[i][j] else (210, 40, 40)
                ImageDraw.Draw(tile).rectangle([0, 0, side - 1, side - 1], outline=colour, width=3)
            tiles.append(np.asarray(tile))
        rows.append(np.concatenate(tiles, 1))
    return _save(np.concatenate(rows), path)


def _tile(image, size, side):
    """uint8 (C, H, W) -> (side + GAP, side + GAP, 3) array, the image `size` wide on grey."""
    channels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    picture = Image.fromarray(channels.permute(1, 2, 0).contiguous().cpu().numpy())
    smooth = Image.Resampling.NEAREST if picture.width < size else Image.Resampling.BILINEAR
    tile = np.full((side + GAP, side + GAP, 3), PAPER, np.uint8)
    tile[:size, :size] = np.asarray(picture.resize((size, size), smooth))
    return tile


def _save(array, path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as spare:
        Image.fromarray(array).save(spare, format="PNG")
    return path
