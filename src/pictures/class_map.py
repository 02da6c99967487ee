"""A map of the classes of images: each where the mean of its features lies, by t-SNE or PCA.

Figure 5.2 of Caron's thesis: means of the validation images of each class, reduced to 30 dimensions by
PCA, then t-SNE (van der Maaten and Hinton 2008) with perplexity 20, learning rate 200, 5,000 iterations.
"""

import csv
import inspect
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..data.datasets import ImageDataset
from .patches import principal_axes
from .sheets import INK, MARGIN, PALE, PAPER, cut, font_of, to_picture, wrap

SIDE = 1500  # pixels of the map
SMALLEST, LARGEST = 28, 110  # pixels of the longer side of a thumbnail
NAMED = 120  # classes, up to which their names are drawn


def class_means(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(means (C, D) float64, classes (C,), rows (C,)) of features (N, D) with labels (N,).

    classes: those that have a row, in order; rows: of each class the one that is nearest to its mean.
    """
    classes, places = labels.unique(return_inverse=True)
    features = features.double()
    sums = torch.zeros(len(classes), features.shape[1], dtype=torch.float64)
    sums.index_add_(0, places, features)
    means = sums / places.bincount()[:, None]
    distances = (features - means[places]).norm(dim=1)  # (N,)
    rows = [
        int(torch.where(places == c, distances, torch.inf).argmin()) for c in range(len(classes))
    ]
    return means, classes, torch.tensor(rows)


def place_by_pca(means: Tensor, dim: int) -> Tensor:
    """Means (C, D) -> their principal components, (C, at most `dim`), float64."""
    mean, axes = principal_axes(means, min(dim, means.shape[1], max(1, len(means) - 1)))
    return (means - mean) @ axes


def place_by_tsne(
    means: Tensor, dim: int, perplexity: float, learning_rate: float, iterations: int, seed: int
) -> Tensor:
    """Means (C, D) -> (C, 2) float64 by t-SNE of their first `dim` components, by scikit-learn.

    Raises ValueError where scikit-learn is not installed, or for a perplexity that is too large.
    """
    if perplexity >= len(means):
        raise ValueError(
            f"--perplexity {perplexity:g} must be below the number of classes, {len(means)}: use a third "
            "of it, or --method pca"
        )
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ValueError(
            "--method tsne needs the package scikit-learn: pip install scikit-learn, or use --method pca"
        ) from error
    tsne = TSNE(perplexity=perplexity, learning_rate=learning_rate, init="pca", random_state=seed)
    is_new = "max_iter" in inspect.signature(TSNE).parameters  # from version 1.5 on
    tsne.set_params(**{"max_iter" if is_new else "n_iter": iterations})
    return torch.from_numpy(tsne.fit_transform(place_by_pca(means, dim).numpy())).double()


def draw_class_map(
    points: Tensor,
    names: Sequence[str],
    thumbnails: Sequence[Image.Image],
    path: Path,
    title: str,
    notes: Sequence[str],
) -> None:
    """Write a PNG with a thumbnail for each class at its point (C, 2), and its name below it.

    Those near the middle are drawn last. One scale for both directions.
    """
    side = int(min(LARGEST, max(SMALLEST, 0.55 * SIDE / math.sqrt(len(names)))))
    low, high = points.amin(0), points.amax(0)
    scale = (SIDE - 2 * side) / (high - low).max().clamp(min=torch.finfo(points.dtype).tiny)
    centres = ((points - (low + high) / 2) * scale).numpy()  # (C, 2), pixels from the middle
    heading, small, tiny = font_of(20), font_of(14), font_of(12)
    lines = [(line, INK, heading, 28) for line in wrap(title, heading, SIDE)]
    lines += [(line, PALE, small, 20) for note in notes for line in wrap(note, small, SIDE)]
    top = MARGIN + sum(height for *_, height in lines) + MARGIN
    extent = (np.abs(centres).max(0) * 2).astype(int) + 2 * side
    width, height = SIDE + 2 * MARGIN, top + int(extent[1]) + MARGIN
    image = Image.new("RGB", (width, height), PAPER)
    canvas, y = ImageDraw.Draw(image), MARGIN
    for line, colour, font, line_height in lines:
        canvas.text((MARGIN, y), line, colour, font)
        y += line_height
    for c in np.argsort(-np.abs(centres).max(1), kind="stable"):
        picture = thumbnails[c].copy()
        picture.thumbnail((side, side), Image.Resampling.BICUBIC)
        if max(picture.size) < side:
            factor = side / max(picture.size)
            size = [max(1, round(factor * length)) for length in picture.size]
            picture = picture.resize(size, Image.Resampling.NEAREST)
        x = int(width / 2 + centres[c, 0] - picture.width / 2)
        y = int(top + extent[1] / 2 - centres[c, 1] - picture.height / 2)
        image.paste(picture, (x, y))
        if len(names) <= NAMED:
            text = cut(names[c], tiny, 1.6 * side)
            x = int(width / 2 + centres[c, 0] - tiny.getlength(text) / 2)
            canvas.text((x, y + picture.height), text, INK, tiny)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def draw_classes(
    dataset: ImageDataset,
    points: Tensor,
    classes: Tensor,
    rows: Tensor,
    folder: Path,
    title: str,
    notes: Sequence[str],
) -> None:
    """Write classes.png, see draw_class_map, and classes.csv with the point and the image of each class."""
    names = [dataset.classes[c] if dataset.classes else f"class {c}" for c in classes.tolist()]
    thumbnails = [to_picture(dataset.load(row), (LARGEST, LARGEST)) for row in rows.tolist()]
    points = torch.cat([points, torch.zeros(len(points), 2, dtype=points.dtype)], 1)[:, :2]
    draw_class_map(points, names, thumbnails, folder / "classes.png", title, notes)
    with open(folder / "classes.csv", "w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "x", "y", "file"])
        for name, c, point, row in zip(names, classes, points.tolist(), rows.tolist(), strict=True):
            count = int((dataset.labels == c).sum())
            writer.writerow([name, count, *(f"{x:.6g}" for x in point), dataset.file_name(row)])
