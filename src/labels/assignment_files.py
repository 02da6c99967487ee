"""The clusters of all images in files: written whole or not at all, read with what they are of.

A folder with assignments.npy (N,) int64, centroids.npy (K, D) float32 and clusters.json: settings,
number of images and of clusters, their sizes and what is known of them.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import dist

SUMMARY = "clusters.json"


def check_clusters(
    folder: str | Path,
    num_images: int,
    settings: dict | None = None,
    images_digest: str | None = None,
) -> bool:
    """Whether the folder holds clusters. Raises ValueError if they are of other images or settings.

    settings: what they should have been made with, None if that does not matter. images_digest: of
    ImageDataset, likewise.
    """
    if not (Path(folder) / SUMMARY).is_file():
        return False
    summary = _read_summary(folder)
    if summary["num_images"] != num_images:
        raise ValueError(
            f"--clusters {folder} holds clusters of {summary['num_images']:,} images, and "
            f"--data_path has {num_images:,}: give the images that were clustered"
        )
    stored = summary["images_digest"]
    if None not in (stored, images_digest) and stored != images_digest:
        raise ValueError(
            f"--clusters {folder} holds clusters of images with other names than those of --data_path, by "
            "whose order they go: give the images that were clustered"
        )
    stored = summary["settings"]
    for name, value in (settings or {}).items():
        if name in stored and stored[name] != value:
            raise ValueError(
                f"--clusters {folder} holds clusters with --{name} {stored[name]}, not {value}: name "
                "another folder, or another --dump_path"
            )
    return True


def write_clusters(
    folder: str | Path, assignments: Tensor, centroids: Tensor, summary: dict
) -> None:
    """Write the clusters (N,) and their centroids (K, D); all processes call it, one writes.

    summary: JSON, with settings, num_images and num_clusters. Raises ValueError on all processes if
    the folder cannot be written or is not empty; nothing is left behind then.
    """
    folder, failed = Path(folder), ""
    spare = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    if dist.is_main():
        try:
            spare.mkdir(parents=True, exist_ok=True)
            np.save(spare / "assignments.npy", assignments.cpu().numpy())
            np.save(spare / "centroids.npy", centroids.float().cpu().numpy())
            (spare / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
            os.replace(spare, folder)
        except OSError as error:
            shutil.rmtree(spare, ignore_errors=True)
            failed = f"--clusters {folder} cannot be written: {error.strerror or error}"
    failed = dist.broadcast_object(failed)
    if failed:
        raise ValueError(failed)


def read_clusters(folder: str | Path) -> tuple[Tensor, int]:
    """The clusters (N,) int64 of all images, and their number K. Raises ValueError."""
    summary, path = _read_summary(folder), Path(folder) / "assignments.npy"
    try:
        assignments = torch.from_numpy(np.load(path, allow_pickle=False)).long()
    except (OSError, ValueError) as error:
        raise ValueError(f"--clusters: {path} cannot be read: {error}") from None
    num_clusters = summary["num_clusters"]
    shape = (summary["num_images"],)
    if assignments.shape != shape or not 0 <= assignments.min() <= assignments.max() < num_clusters:
        raise ValueError(f"--clusters: {path} is not {shape} numbers from 0 to {num_clusters - 1}")
    return assignments, num_clusters


def _read_summary(folder):
    path = Path(folder) / SUMMARY
    try:
        summary = json.loads(path.read_text())
        digest = summary.get("images_digest")  # those of the first versions have none
        names = ("settings", "num_images", "num_clusters")
        return {**{name: summary[name] for name in names}, "images_digest": digest}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--clusters: {path} cannot be read: {error!r}") from None
