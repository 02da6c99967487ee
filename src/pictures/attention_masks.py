"""How well masks of self-attention are objects: their Jaccard similarity with VOC 2012's.

Caron et al. 2021, arXiv:2104.14294, figure 4 (section 5.5.2 of Caron's thesis): of each head of the
last block the patches that hold 60 % of the mass; the best head of each image counts.
"""

import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.folders import read_file
from ..data.images import decode_image
from ..evaluate.davis import palette
from ..evaluate.segmentation_measures import VOID, jaccard
from ..evaluate.voc_segments import KINDS, SegmentedImage, read_labels, true_masks
from ..nets.pretrained import Pretrained
from ..run.log import write_whole
from .attention import (
    class_attention,
    fit_image,
    fit_labels,
    images_at_once,
    keep_mass,
    paint_mask,
    shrink,
)
from .frames import in_batches
from .sheets import Group, Header, Row, Tile, draw_sheet, three_channels

logger = logging.getLogger(__name__)

SIDE = 224  # pixels of the longer side of an image on the sheet
BEST, MEAN, RANDOM, BASELINE = "best head", "mean of the heads", "random places", "baseline"
TINT = (255, 40, 40)


def masks_of(attention: Tensor, mass: float, draws: torch.Generator) -> dict[str, Tensor]:
    """Masks of patches, bool (masks, rows, cols), by what they are of.

    attention: (heads, rows, cols). "best head": of each head; "mean of the heads": one, of the mean
    map; "random places": as many patches as each head has, but anywhere.
    """
    heads = keep_mass(attention, mass)
    counts = heads.flatten(1).sum(1, keepdim=True)  # (heads, 1)
    places = torch.rand(heads.flatten(1).shape, generator=draws).argsort(1)
    return {
        BEST: heads,
        MEAN: keep_mass(attention.mean(0, keepdim=True), mass),
        RANDOM: (places < counts).view(heads.shape),
    }


def enlarge_masks(masks: Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Masks of patches (n, rows, cols) -> of pixels, (n, H, W); H, W multiples of rows, cols."""
    tall, wide = (n // cells for n, cells in zip(shape, masks.shape[1:], strict=True))
    return masks.numpy().repeat(tall, 1).repeat(wide, 2)


class Overlaps:
    """Jaccard similarities of many images, of masks of several kinds with true masks of KINDS."""

    def __init__(self):
        self.values = {}  # (name of the masks, kind) -> for each image (masks,), (1,) the best of each

    def add(self, name: str, masks: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
        """Compare masks (n, H, W) with the labels (2, H, W) of read_labels; name: whose masks they are.

        Returns the similarity of each mask with the foreground (n,), None without an object.
        """
        by_kind, void = true_masks(labels)
        if not by_kind["objects"].size:
            return None
        for kind in KINDS:
            pairs = jaccard(masks[:, None], by_kind[kind][None], void)  # (n, true masks)
            best = pairs.max(0).mean()  # the best mask of each true one
            self.values.setdefault((name, kind), []).append((best, pairs.mean(1)))
        return pairs[:, 0]

    def table(self) -> list[dict]:
        """A row for each name: similarities in percent, means over images.

        By KINDS that of the mask which is best for each true one, and as <kind>_one that of the one
        mask that is best over all images, of number <kind>_number.
        """
        rows = {}
        for (name, kind), values in self.values.items():
            row = rows.setdefault(name, {"masks": name, "images": len(values)})
            by_mask = np.mean([by_mask for _, by_mask in values], axis=0)  # (n,)
            row[kind] = 100 * float(np.mean([best for best, _ in values]))
            row[f"{kind}_one"] = 100 * float(by_mask.max())
            row[f"{kind}_number"] = int(by_mask.argmax())
        return list(rows.values())


def report_masks(overlaps: Overlaps, settings: dict, path: Path) -> None:
    """Log the table of similarities and write it with the settings to `path` as one line of JSON.

    Raises ValueError where no image had an object.
    """
    rows = overlaps.table()
    if not rows:
        raise ValueError("--voc: none of the images has an object")
    width = max(len(row["masks"]) for row in rows)
    logger.info(f"{'':{width}}" + "".join(f"{kind:>12}{'one head':>10}" for kind in KINDS))
    for row in rows:
        values = "".join(f"{row[kind]:12.1f}{row[f'{kind}_one']:10.1f}" for kind in KINDS)
        logger.info(f"{row['masks']:{width}}{values}")
    write_whole(path, json.dumps({**settings, "results": rows}) + "\n")
    logger.info(f"{rows[0]['images']} images with objects, written to {path}")


def maps_of_segments(
    network: Pretrained,
    images: Sequence[SegmentedImage],
    size: Sequence[int],
    *,
    in_chans: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> Iterator[tuple[Tensor, np.ndarray, Tensor]]:
    """(image, labels, maps) of each image as a vision transformer sees it.

    The image, uint8 (C, H, W), is resized to `size` and cut to whole patches, see fit_image, and so are
    its labels (2, H, W); maps (heads, rows, cols): what the class token takes from the patches. mean,
    std: of each channel. Raises ValueError for attention that is not finite.
    """
    model, patch_size = network.model.to(device), network.model.patch_size
    mean, std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (mean, std))
    waiting = deque()  # labels of images whose maps are still to come

    def frames():
        for one in images:
            image = decode_image(read_file(one.image), in_chans)
            labels = torch.from_numpy(read_labels(one))
            if labels.shape[1:] != image.shape[1:]:
                raise ValueError(f"--voc: {one.objects} is not of the size of {one.image}")
            waiting.append(fit_labels(labels, size, patch_size).numpy())
            yield one.name, fit_image(image, size, patch_size)

    for _, batch in in_batches(frames(), partial(images_at_once, model)):
        x = (torch.stack(batch).to(device).float() / 255 - mean) / std  # (B, C, H, W)
        rows, cols = (side // patch_size for side in x.shape[2:])
        weights = model.get_last_selfattention(x)  # (B, heads, T, T)
        maps = class_attention(weights, rows, cols, num_registers=model.num_registers).float().cpu()
        if not maps.isfinite().all():
            raise ValueError(f"--pretrained: {network.origin} makes attention that is not finite")
        for image, heads in zip(batch, maps, strict=True):
            yield image, waiting.popleft(), heads


# ============ pictures ============
def picture_of_truth(image: Tensor, labels: np.ndarray) -> np.ndarray:
    """An image, uint8 (C, H, W), under its objects in their colours: (H, W, 3)."""
    picture = three_channels(image).permute(1, 2, 0).cpu().numpy()
    colours = np.array(palette()).reshape(-1, 3)
    for number in np.unique(labels[0]):
        if number not in (0, VOID):
            picture = paint_mask(picture, labels[0] == number, colours[number])
    return picture


def picture_of_mask(image: Tensor, mask: np.ndarray) -> np.ndarray:
    """An image, uint8 (C, H, W), under a mask (H, W): (H, W, 3)."""
    return paint_mask(three_channels(image).permute(1, 2, 0).cpu().numpy(), mask, TINT)


def draw_masks(
    rows: Sequence[tuple[str, dict[str, tuple[np.ndarray, str]]]],
    path: str | Path,
    notes: Sequence[str],
) -> None:
    """Write a PNG with a row for each image: (name, (picture, caption) by the name of its column)."""
    columns = list(dict.fromkeys(name for _, pictures in rows for name in pictures))
    lines = []
    for name, pictures in rows:
        tiles = [[Tile(shrink(pictures[x][0], SIDE), [pictures[x][1]])] for x in columns]
        lines.append(Row(tiles, [name]))
    header = Header("Masks of self-attention beside the objects", notes)
    draw_sheet(header, [Group(name) for name in columns], lines).save(path)
