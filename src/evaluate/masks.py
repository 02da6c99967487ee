"""Masks of objects in COCO's formats: polygons and runs of pixels, by pycocotools."""

import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def import_pycocotools() -> types.ModuleType:
    """The package pycocotools, with its masks; ValueError where it is not installed."""
    try:
        import pycocotools.mask
    except ImportError:
        raise ValueError(
            "masks, and results on COCO, need the package pycocotools: pip install pycocotools"
        ) from None
    return pycocotools


def masks_of_segments(segments: list, before: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Masks uint8 (n, h, w) of objects in an image that was (H, W) and is resized to (h, w).

    segments: of each object a list of polygons [x1, y1, x2, y2, ...], which are scaled before they are
    filled, or runs of pixels, COCO's {"size", "counts"}, whose mask is resized.
    """
    if not segments:
        return torch.zeros(0, *size, dtype=torch.uint8)
    coco = import_pycocotools().mask
    scale = np.array([size[1] / before[1], size[0] / before[0]])
    masks = []
    for segment in segments:
        if isinstance(segment, list):
            polygons = [(np.reshape(x, (-1, 2)) * scale).ravel().tolist() for x in segment]
            runs = coco.merge(coco.frPyObjects(polygons, *size))
            masks.append(torch.from_numpy(coco.decode(runs)))
        else:
            runs = coco.frPyObjects(segment, *before) if _is_plain(segment) else segment
            mask = torch.from_numpy(coco.decode(runs))[None, None]
            masks.append(F.interpolate(mask, size=size, mode="nearest-exact")[0, 0])
    return torch.stack(masks)


def _is_plain(runs):
    """Whether runs of pixels are numbers, and not COCO's compressed text."""
    return isinstance(runs["counts"], list)


def runs_of_masks(masks: np.ndarray) -> list[dict]:
    """COCO's compressed runs, {"size": [H, W], "counts": text}, of masks bool (n, H, W)."""
    coco = import_pycocotools().mask
    found = []
    for mask in masks:
        runs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        found.append({"size": list(runs["size"]), "counts": runs["counts"].decode()})
    return found
