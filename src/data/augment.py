"""Photometry of a batch of crops on its device: flip, colour jitter, grayscale, blur, solarize.

Every sample has its own draw, its own order of jitter operations and its own blur; src.data.photometry
has the operations. Source: SimCLR's transformation, as section 3.3 of the SwAV paper uses it.
"""

import functools
import logging
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from .. import dist
from ..errors import cause
from . import photometry

logger = logging.getLogger(__name__)

JITTER = ("brightness", "contrast", "saturation", "hue")
# Columns of the table of values in which each operation finds its own; the blur's are the rest.
VALUES = {
    "brightness": slice(0, 1),
    "contrast": slice(1, 2),
    "saturation": slice(2, 3),
    "hue": slice(3, 6),
}
CHUNK_VALUES = 1 << 17  # on a CPU: values worked on at a time, so that they stay in the cache


@dataclass
class Draws:
    """What was drawn for N samples, as numpy arrays."""

    flip: np.ndarray  # (N,) bool
    order: np.ndarray  # (N, 4) indices into JITTER in their order, -1 where there is none
    factors: np.ndarray  # (N, 4) float32, as in JITTER; hue in turns
    grayscale: np.ndarray  # (N,) bool
    sigma: np.ndarray  # (N,) float64, standard deviation of the blur in pixels, 0 for none
    solarize: np.ndarray  # (N,) bool

    def __len__(self):
        return len(self.flip)

    def __getitem__(self, rows):
        return Draws(*(getattr(self, field.name)[rows] for field in fields(self)))


class Augment:
    """`augment(batch, generator)`: a list of uint8 `(B, n_r, C, S, S)`, one a resolution, to a list
    of normalised float32 `(B, C, S, S)`, one a crop, on the device of the batch.

    The crops of one resolution lie one after the other in memory. `generator` is on the CPU, so
    that all devices see the same draws. `color_jitter` has the strengths of brightness, contrast,
    saturation and hue; 0 switches one off. `blur_prob` and `solarize_prob` are numbers or lists
    with one value a crop. One channel has no saturation, hue and grayscale; other counts than 1
    and 3 neither, and their contrast is about the mean of all channels.
    Raises ValueError, naming the argument, for a value out of range.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        flip_prob: float = 0.5,
        color_jitter: Sequence[float] = (0.8, 0.8, 0.8, 0.2),
        jitter_prob: float = 0.8,
        grayscale_prob: float = 0.2,
        blur_prob: float | Sequence[float] = 0.5,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        solarize_prob: float | Sequence[float] = 0.0,
    ):
        probabilities = {
            "flip_prob": flip_prob,
            "jitter_prob": jitter_prob,
            "grayscale_prob": grayscale_prob,
            "blur_prob": blur_prob,
            "solarize_prob": solarize_prob,
        }
        for name, value in probabilities.items():
            if np.min(value) < 0 or np.max(value) > 1:
                raise ValueError(f"{name} {value} must be between 0 and 1")
        if len(color_jitter) != 4 or min(color_jitter) < 0 or color_jitter[3] > 0.5:
            raise ValueError(
                f"color_jitter {color_jitter} must be four strengths of at least 0 (brightness, "
                f"contrast, saturation, hue), hue at most 0.5"
            )
        if not 0 <= blur_sigma[0] <= blur_sigma[1]:
            raise ValueError(f"blur_sigma {blur_sigma} must be two numbers, 0 <= low <= high")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean {mean} and std {std} need one value a channel, std above 0")
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)  # (C, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.normalisation = {}  # mean and 1 / std by device, copied there once
        self.options = {**probabilities, "color_jitter": color_jitter, "blur_sigma": blur_sigma}

    def __call__(self, batch, generator):
        counts = [images.shape[1] for images in batch]
        draws = draw_parameters(generator, sum(counts), len(batch[0]), **self.options)
        device = batch[0].device
        if device not in self.normalisation:
            self.normalisation[device] = _normalisation(self.mean, self.std, device)
        mean, scale = self.normalisation[device]
        kernels = triton_kernels(device) if batch[0].is_cuda and batch[0].shape[2] == 3 else None
        if kernels is not None:
            table = kernels.table(draws, photometry.blur_kernels(draws.sigma))
            values = dist.to_device(torch.from_numpy(table), device)
        crops, start = [], 0
        for images, count in zip(batch, counts, strict=True):
            flat = images.transpose(0, 1).flatten(0, 1)  # (n_r * B, C, S, S), crop-major
            rows = slice(start, start + len(flat))
            if kernels is not None:
                out = kernels.apply(flat, values[rows], mean, scale)
            else:
                out = _apply_draws(flat, draws[rows], mean, scale)
            crops += out.view(count, -1, *out.shape[1:]).unbind(0)
            start = rows.stop
        return crops


def draw_parameters(
    generator: torch.Generator,
    num_crops: int,
    batch_size: int,
    flip_prob: float,
    color_jitter: Sequence[float],
    jitter_prob: float,
    grayscale_prob: float,
    blur_prob: float | Sequence[float],
    blur_sigma: Sequence[float],
    solarize_prob: float | Sequence[float],
) -> Draws:
    """Draw for `num_crops * batch_size` samples, crop-major.

    Every option uses its own column of one block of uniform numbers, so that switching one off
    changes no other. Brightness, contrast and saturation are uniform in [max(0, 1 - x), 1 + x],
    hue in [-x, x], sigma in `blur_sigma`. Raises ValueError for a list of the wrong length.
    """
    uniform = torch.rand(num_crops * batch_size, 14, generator=generator).numpy()
    strength = np.array(color_jitter, dtype=np.float32)
    low = np.append(np.maximum(0, 1 - strength[:3]), -strength[3])
    high = np.append(1 + strength[:3], strength[3])
    order = uniform[:, 4:8].argsort(axis=1)
    order[(strength == 0)[order]] = -1
    order[uniform[:, 8] >= jitter_prob] = -1
    blur = uniform[:, 10] < _a_sample(blur_prob, num_crops, batch_size, "blur_prob")
    sigma = blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * uniform[:, 11].astype(np.float64)
    return Draws(
        flip=uniform[:, 12] < flip_prob,
        order=order,
        factors=(low + (high - low) * uniform[:, :4]).astype(np.float32),
        grayscale=uniform[:, 9] < grayscale_prob,
        sigma=np.where(blur, sigma, 0.0),
        solarize=uniform[:, 13] < _a_sample(solarize_prob, num_crops, batch_size, "solarize_prob"),
    )


def _a_sample(probability, num_crops, batch_size, name):
    if np.ndim(probability) == 1 and len(probability) != num_crops:
        raise ValueError(f"{name} has {len(probability)} values, one a crop makes {num_crops}")
    return np.repeat(np.broadcast_to(probability, num_crops), batch_size)


def apply_draws(
    images: torch.Tensor, draws: Draws, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Apply `draws` to uint8 `(N, C, S, S)`; returns normalised float32 of the same shape.

    mean, std: `(C, 1, 1)`. On a CPU a few samples at a time, on other devices all at once.
    """
    mean, scale = _normalisation(mean, std, images.device)
    return _apply_draws(images, draws, mean, scale)


@functools.cache
def triton_kernels(device: torch.device) -> types.ModuleType | None:
    """src.data.photometry_kernels, or None, said once, where Triton is missing or cannot compile them."""
    try:
        from . import photometry_kernels

        black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=device)
        values = torch.zeros(1, 15, device=device)
        photometry_kernels.apply(black, values, *torch.ones(2, 3, 1, 1, device=device))
    except Exception as error:  # of Triton, of a compiler that is not there, of the driver
        logger.info(f"photometry by PyTorch, since Triton does not run here: {cause(error)}")
        return None
    return photometry_kernels


def _normalisation(mean, std, device):
    """What to subtract and what to multiply by, on the device; the quotient is the CPU's."""
    return mean.to(device, non_blocking=True), (1 / std).to(device, non_blocking=True)


def _apply_draws(images, draws, mean, scale):
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    peaks = photometry.hue_peaks(draws.factors[:, 3])  # (N, 3)
    kernels = photometry.blur_kernels(draws.sigma)  # (N, r + 1)
    radii = (kernels > 0).sum(axis=1) - 1  # 0 without blur
    values = np.concatenate([draws.factors[:, :3], peaks, kernels], axis=1).astype(np.float32)
    step = max(1, CHUNK_VALUES // images[0].numel()) if out.is_cpu else len(images)
    for start in range(0, len(images), step):
        rows = slice(start, start + step)
        x = out[rows]
        x.copy_(images[rows]).mul_(1 / 255)  # a product of mixed types takes twice as long
        _apply_steps(x, values[rows], plan_steps(draws[rows], radii[rows], x.shape[1]))
        x.sub_(mean).mul_(scale)
    return out


def plan_steps(
    draws: Draws, radii: np.ndarray, channels: int
) -> list[tuple[str, slice | None, np.ndarray]]:
    """The operations in their order: (name, columns of its values, indices of its samples)."""
    masks = [("flip", None, draws.flip)]
    usable = JITTER if channels == 3 else JITTER[:2]
    for position in range(len(JITTER)):
        here = draws.order[:, position]
        present = sorted(set(here.tolist()))
        masks += [
            (name, VALUES[name], here == number)
            for number, name in enumerate(usable)
            if number in present
        ]
    if channels == 3:
        masks.append(("grayscale", None, draws.grayscale))
    for radius in sorted(set(radii.tolist()) - {0}):
        masks.append(("blur", slice(6, 7 + radius), radii == radius))
    masks.append(("solarize", None, draws.solarize))
    steps = [(name, columns, np.flatnonzero(mask)) for name, columns, mask in masks]
    return [step for step in steps if len(step[2]) > 0]


def _apply_steps(x, values, steps):
    """Each step on its own samples, in place on float `(n, C, S, S)`."""
    if not steps:
        return
    # One transfer of all indices and one of all values, whatever the number of steps.
    rows = np.concatenate([rows for *_, rows in steps])
    sizes = [len(rows) for *_, rows in steps]
    values = dist.to_device(torch.from_numpy(values[rows]), x.device)[:, :, None, None]
    indices = dist.to_device(torch.from_numpy(rows), x.device).split(sizes)
    for (name, columns, rows), index, own in zip(steps, indices, values.split(sizes), strict=True):
        if rows[-1] - rows[0] < len(rows):  # neighbours: no copy is needed
            _operate(name, x[rows[0] : rows[-1] + 1], own, columns)
        else:
            part = x.index_select(0, index)
            _operate(name, part, own, columns)
            x.index_copy_(0, index, part)


def _operate(name, x, values, columns):
    operation = getattr(photometry, name)
    if columns is None:
        operation(x)
    else:
        operation(x, values[:, columns])
