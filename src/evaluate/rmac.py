"""R-MAC: the maxima of a map over a grid of square regions, whitened and added up to one descriptor.

Tolias, Sicre and Jegou 2016, arXiv:1511.05879, section 3.2. DeepCluster (arXiv:1807.05520) and VISSL
evaluate instance retrieval with it.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dist
from ..cluster.pca import Whitening, fit_whitening, whiten

OVERLAP = 0.4  # of neighbouring regions, as the paper has it
MOST_EXTRA = 6  # regions that the longer side of a map has more than the shorter one


def regions(height: int, width: int, levels: int) -> list[tuple[int, int, int]]:
    """(top, left, side) of the regions of a map, by levels.

    At level l from 1, the side is 2 min(height, width) / (l + 1), and l regions are spread evenly over the
    shorter side, l + m over the longer one; m from 1 to 6 makes neighbours of level 1 overlap by a share as
    near to OVERLAP as can be, and is 0 for a square. All are rounded down.
    """
    shorter, difference = min(height, width), abs(height - width)
    extra = 0
    if difference:
        extra = min(
            range(1, MOST_EXTRA + 1), key=lambda m: abs(1 - difference / m / shorter - OVERLAP)
        )
    found = []
    for level in range(1, levels + 1):
        side = max(1, 2 * shorter // (level + 1))
        rows = level + (extra if height > width else 0)
        columns = level + (extra if width > height else 0)
        for top in _starts(height - side, rows):
            found += [(top, left, side) for left in _starts(width - side, columns)]
    return found


def most_regions(levels: int) -> int:
    """The number of regions of the longest maps."""
    return sum(level * (level + MOST_EXTRA) for level in range(1, levels + 1))


def _starts(room, count):
    """Where `count` regions begin that are spread evenly over a side with so much room beside one."""
    return [i * room // max(1, count - 1) for i in range(count)]


def region_maxima(maps: Tensor, levels: int) -> Tensor:
    """The last maps of images (B, D, h, w) -> the maxima over each region, of length 1, (B, R, D).

    A region without any activation is 0 in all its D entries.
    """
    maps = maps.float()
    maxima = [
        maps[:, :, top : top + side, left : left + side].amax((2, 3))  # (B, D)
        for top, left, side in regions(*maps.shape[2:], levels)
    ]
    return F.normalize(torch.stack(maxima, 1), dim=2)


def padded_maxima(maps: Tensor, levels: int) -> Tensor:
    """region_maxima with zeros behind them, (B, most_regions(levels), D), for maps of any shape."""
    maxima = region_maxima(maps, levels)
    return F.pad(maxima, (0, 0, 0, most_regions(levels) - maxima.shape[1]))


def learn_whitening(maxima: Tensor, dim: int, device: torch.device) -> Whitening:
    """PCA to `dim` entries of the regions of all processes' images, from padded_maxima (n, R, D).

    Images that are NaN, and regions that are 0, are left out. Raises ValueError as fit_whitening.
    """
    rows = maxima.flatten(0, 1)  # (n R, D)
    present = rows.ne(0).any(1) & ~rows[:, 0].isnan()
    return fit_whitening(rows[present], dim, device=device)


def descriptors(maps: Tensor, levels: int, whitening: Whitening) -> Tensor:
    """The last maps of images (B, D, h, w) -> their R-MAC, of length 1, (B, d).

    The maxima of each region are whitened and brought to length 1 again before they are added up. Regions
    without any activation, whose direction nobody knows, add nothing.
    """
    maxima = region_maxima(maps, levels)  # (B, R, D)
    whitened = whiten(maxima.flatten(0, 1), whitening).unflatten(0, maxima.shape[:2])  # (B, R, d)
    whitened = whitened * maxima.ne(0).any(2, keepdim=True)
    return F.normalize(whitened.sum(1), dim=1)


def as_tensors(whitening: Whitening) -> dict[str, Tensor]:
    """What is to be saved of a whitening, on the CPU."""
    return {name: value.cpu() for name, value in vars(whitening).items()}


def digest(whitening: Whitening) -> str:
    """A few letters that tell a whitening from others."""
    found = hashlib.blake2b(digest_size=8)
    for _, value in sorted(as_tensors(whitening).items()):
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def broadcast_whitening(tensors: dict[str, Tensor] | None) -> Whitening:
    """The whitening that the main process has read, on all; the others give None."""
    return Whitening(**dist.broadcast_object(tensors))
