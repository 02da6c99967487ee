"""What clusters of images look like: a sheet of some, sizes and colours of all, a folder for each."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.datasets import ImageDataset
from .cluster_tables import UNREADABLE, Clusters
from .sheets import (
    Group,
    Header,
    Row,
    Tile,
    draw_sheet,
    enlarge,
    factor_for,
    three_channels,
    to_picture,
)

logger = logging.getLogger(__name__)

LEAST, MOST = 72, 128  # pixels of the longer side of an image
OTHER = (205, 45, 45)  # the frame of an image of another class
VALUE_LETTERS = 24
COLUMNS_SHOWN = 3  # of metadata, beside a cluster on the sheet


# ============ choice ============
def image_names(dataset: ImageDataset) -> tuple[list[str], Tensor]:
    """The file, the shard and key, or the number of each image; and which could be read, (N,) bool.

    The latter is known once all were asked for; another image takes the place of an unreadable one.
    """
    names = [dataset.file_name(index) for index in range(len(dataset))]
    broken = set(dataset.broken)
    return names, torch.tensor([name not in broken for name in names])


def choose_clusters(sizes: Tensor, number: int) -> list[int]:
    """So many clusters that are not empty, from the largest to the smallest, evenly by rank."""
    order = sizes.sort(descending=True, stable=True).indices[: int((sizes > 0).sum())]
    ranks = torch.linspace(0, len(order) - 1, min(number, len(order)), dtype=torch.float64)
    return order[ranks.round().long()].tolist()


def choose_images(clusters: Clusters, cluster: int, number: int, seed: int) -> tuple[list, list]:
    """Indices of the images nearest to the centroid, nearest first, and of others at random."""
    members = (clusters.assignments == cluster).nonzero().flatten()
    members = members[clusters.cosines[members].sort(descending=True, stable=True).indices]
    nearest, rest = members[:number].tolist(), members[number:].numpy()
    draws = np.random.default_rng([seed, cluster])
    return nearest, draws.permutation(rest)[:number].tolist()


# ============ sheet ============
def draw_clusters(
    clusters: Clusters,
    dataset: ImageDataset,
    shown: Sequence[int],
    num_images: int,
    seed: int,
    path: str | Path,
    source: str = "",
) -> Path:
    """A row for each of the clusters `shown`: what it is, its nearest images, others at random.

    Where labels are known, images of another class than most of their cluster have a red frame. source:
    of which network the clusters are, for the header.
    """
    rows = []
    for cluster in shown:
        chosen = choose_images(clusters, cluster, num_images, seed)
        tiles = [[_tile(clusters, dataset, cluster, i) for i in indices] for indices in chosen]
        rows.append(Row(tiles, _describe(clusters, cluster)))
    tiles = [tile for row in rows for group in row.tiles for tile in group]
    factor = factor_for([tile.picture for tile in tiles], LEAST)
    for tile in tiles:
        tile.picture = enlarge(tile.picture, factor)
    used = int((clusters.sizes > 0).sum())
    title = f"{len(rows)} of {used:,} clusters of {int(clusters.sizes.sum()):,} images"
    legend = []
    if clusters.labels is not None:
        legend.append(("red: of another class than most of its cluster", OTHER))
    header = Header(title, [f"{dataset.name}; {source}" if source else dataset.name], legend)
    groups = [Group("nearest to the centroid, and the cosine to it"), Group("others at random")]
    return draw_sheet(header, groups, rows).save(path)


def _tile(clusters, dataset, cluster, index):
    """An image with its file's name and its cosine to the centroid."""
    frame = None
    if clusters.labels is not None and clusters.labels[index] != clusters.majority[cluster]:
        frame = OTHER
    captions = [os.path.basename(dataset.file_name(index)), f"{float(clusters.cosines[index]):.2f}"]
    return Tile(to_picture(dataset.load(index), (MOST, MOST)), captions, frame)


def _describe(clusters, cluster):
    """Lines of text: number, size, purity and class of a cluster."""
    size = int(clusters.sizes[cluster])
    lines = [f"cluster {cluster}", f"{size:,} image{'s' * (size != 1)}" if size else "empty"]
    if size and clusters.labels is not None:
        lines.append(f"purity {100 * int(clusters.matching[cluster]) / size:.0f} %")
        lines.append(f"most: {clusters.class_name(int(clusters.majority[cluster]))}")
    if size and clusters.spread is not None:
        lines.append(f"colour spread {float(clusters.spread[cluster]):.0f}")
    dominant = {name: found[cluster] for name, found in clusters.dominant.items() if found[cluster]}
    # First what is most frequent in the cluster beyond what it is everywhere.
    by_excess = sorted(dominant.items(), key=lambda x: x[1]["share_of_all"] - x[1]["share"])
    for name, found in by_excess[:COLUMNS_SHOWN]:
        lines.append(f"{name}: {found['value'][:VALUE_LETTERS]} {100 * found['share']:.0f} %")
    return lines


# ============ sizes ============
def draw_sizes(clusters: Clusters, path: str | Path) -> None:
    """Bars of the sizes of all clusters that are not empty, largest first; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = clusters.sizes.sort(descending=True, stable=True).indices
    order = order[: int((clusters.sizes > 0).sum())]
    sizes, total = clusters.sizes[order].numpy(), len(clusters.sizes)
    edges = np.arange(len(sizes) + 1)
    figure, axis = pyplot.subplots(figsize=(8, 4))
    axis.stairs(sizes, edges, fill=True, color="#9ab8d6", label="all images")
    if clusters.labels is not None:
        matching = clusters.matching[order].numpy()
        label = "of the cluster's most frequent class"
        axis.stairs(matching, edges, fill=True, color="#2f6ca8", label=label)
    share = sizes.sum() / total
    label = f"equal share of {total:,} clusters: {share:.3g}"
    axis.axhline(share, linestyle="--", color="#c0392b", linewidth=1.3, label=label)
    axis.set_xlim(0, len(sizes))
    axis.set_xlabel(f"{len(sizes):,} clusters that are not empty, largest first")
    axis.set_ylabel("images")
    axis.set_title(f"{sizes.sum():,} images in {len(sizes):,} of {total:,} clusters", fontsize=11)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_colours(clusters: Clusters, path: str | Path) -> None:
    """The colour spread of the clusters, smallest first (thesis, Figure 3.6, left); needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    spread = clusters.spread[clusters.sizes > 1].sort().values.numpy()
    figure, axis = pyplot.subplots(figsize=(8, 4))
    axis.plot(
        np.arange(len(spread)), spread, color="#2f6ca8", marker="." if len(spread) < 50 else None
    )
    label = f"all images: {clusters.spread_of_all:.3g}"
    axis.axhline(
        clusters.spread_of_all, linestyle="--", color="#c0392b", linewidth=1.3, label=label
    )
    axis.set_ylim(bottom=0)
    axis.set_xlabel(f"{len(spread):,} clusters of two images or more, most alike in colour first")
    axis.set_ylabel("standard deviation to the mean colour")
    axis.set_title("Spread of colour in clusters, in levels of 0 to 255", fontsize=11)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ============ folders ============
def check_folders(folder: Path, wanted: bool) -> None:
    """Raise ValueError where `wanted` folders would be mixed with those of an earlier call."""
    path = folder / "folders"
    if not path.exists():
        return
    if wanted:
        raise ValueError(
            f"--folders: {path} is there already, of an earlier call: remove it, or choose another "
            "--dump_path"
        )
    logger.warning("%s is of an earlier call, and is left as it is", path)


def write_folders(
    folder: Path, clusters: Clusters, dataset: ImageDataset, names: Sequence[str]
) -> None:
    """A folder for each cluster with links to its image files, or PNGs where images are no files.

    They are named <index>_<class>_<file>, so that files of one name do not clash.
    """
    linked, digits = os.path.isfile(names[0]), len(str(len(clusters.sizes) - 1))
    for index, cluster in enumerate(clusters.assignments.tolist()):
        if cluster == UNREADABLE:
            continue
        target = folder / f"{cluster:0{digits}}"
        target.mkdir(parents=True, exist_ok=True)
        parts = [f"{index:06}"]
        if clusters.labels is not None:
            parts.append(_plain(clusters.class_name(int(clusters.labels[index])))[:20])
        if linked:
            parts.append(_plain(os.path.basename(names[index]))[-50:])
            os.symlink(os.path.abspath(names[index]), target / "_".join(parts))
        else:
            picture = three_channels(dataset.load(index)).permute(1, 2, 0).contiguous()
            Image.fromarray(picture.numpy()).save(target / f"{'_'.join(parts)}.png")


def _plain(name):
    return re.sub(r"[^\w.-]", "_", name)
