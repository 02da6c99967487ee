"""The photometric operations of a batch in three launches on a GPU, by Triton.

src.data.photometry is their definition, and what runs where there is no Triton. There each operation
takes the samples that need it, about 450 launches for the crops of SwAV; here each sample has a program of
its own, that reads from a table what is done to it.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from . import photometry
from .augment import Draws

# Values that a program works on at a time. That of a whole image has the more threads: it goes over it
# up to ten times, and there are not many more images than multiprocessors.
BLOCK, IMAGE_BLOCK, IMAGE_WARPS = 1024, 4096, 16


def table(draws: Draws, kernels: np.ndarray) -> np.ndarray:
    """What is done to each sample, (N, 14 + r + 1) float32, by these columns:

    0-3 operation of each place (-1: none), 4-6 factors of brightness, contrast and saturation, 7-9 peaks
    of the hue, 10 flip, 11 grayscale, 12 solarize, 13 radius of the blur, from 14 on half its kernel,
    centre first. draws: of N samples; kernels: (N, r + 1), see
    photometry.blur_kernels.
    """
    columns = [
        draws.order,
        draws.factors[:, :3],
        photometry.hue_peaks(draws.factors[:, 3]),
        *(values[:, None] for values in (draws.flip, draws.grayscale, draws.solarize)),
        (kernels > 0).sum(axis=1, keepdims=True) - 1,
        kernels,
    ]
    return np.concatenate([np.asarray(column, np.float32) for column in columns], axis=1)


def apply(
    images: torch.Tensor, values: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> normalised float32 of the same shape.

    values: rows of table() on the device, contiguous. mean, scale: (3, 1, 1), there too.
    """
    images = images.contiguous()
    num_samples, _, height, width = images.shape
    first, second = (torch.empty(images.shape, device=images.device) for _ in range(2))
    size, columns = height * width, values.shape[1]
    grid = (num_samples, triton.cdiv(3 * size, BLOCK))
    _colours[(num_samples,)](
        images, first, values, columns, size, width, BLOCK=IMAGE_BLOCK, num_warps=IMAGE_WARPS
    )
    _blur_rows[grid](first, second, values, columns, size, width, BLOCK=BLOCK)
    _blur_columns[grid](
        second, first, values, mean, scale, columns, size, width, height, BLOCK=BLOCK
    )
    return first


@triton.jit
def _pixels(image, at, size, inside):
    """Red, green and blue."""
    red = tl.load(image + at, mask=inside, other=0.0)
    green = tl.load(image + size + at, mask=inside, other=0.0)
    blue = tl.load(image + 2 * size + at, mask=inside, other=0.0)
    return red, green, blue


@triton.jit
def _luminance(red, green, blue):
    return 0.299 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _turned(low, chroma, angle, peak):
    wave = _clamp(tl.abs(tl.abs(angle - peak) - 3.0), 1.0, 2.0)
    return low - chroma + wave * chroma


@triton.jit
def _colours(images, out, values, columns, size, width, BLOCK: tl.constexpr):
    """All that a pixel needs only its own image for: flip, jitter in its order, grayscale. One image."""
    sample = tl.program_id(0).to(tl.int64)
    values += sample * columns
    images += sample * 3 * size
    out += sample * 3 * size
    lanes = tl.arange(0, BLOCK)
    flip = tl.load(values + 10) > 0
    for start in range(0, size, BLOCK):
        at = start + lanes
        inside = at < size
        column = at % width
        source = tl.where(flip, at - column + (width - 1 - column), at)
        for channel in tl.static_range(3):
            pixels = tl.load(images + channel * size + source, mask=inside, other=0)
            tl.store(
                out + channel * size + at, pixels.to(tl.float32) * 0.00392156862745098, mask=inside
            )
    for place in range(5):
        # The fifth is grayscale.
        if place < 4:
            operation = tl.load(values + place).to(tl.int32)
        else:
            operation = tl.where(tl.load(values + 11) > 0, 4, -1)
        if operation >= 0:
            factor = tl.load(values + 4 + tl.minimum(operation, 2))
            mean = 0.0 * factor
            if operation == 1:
                sums = tl.zeros((BLOCK,), tl.float32)
                for start in range(0, size, BLOCK):
                    at = start + lanes
                    inside = at < size
                    red, green, blue = _pixels(out, at, size, inside)
                    sums += _luminance(red, green, blue)
                mean = tl.sum(sums) / size
            for start in range(0, size, BLOCK):
                at = start + lanes
                inside = at < size
                red, green, blue = _pixels(out, at, size, inside)
                gray = _luminance(red, green, blue)
                if operation == 3:
                    low = tl.minimum(tl.minimum(red, green), blue)
                    chroma = tl.maximum(tl.maximum(red, green), blue) - low + 1e-9
                    angle = tl.abs((green + blue - red - low) / chroma + 1.0)
                    angle = tl.where(green - blue < 0.0, -angle, angle)
                    red = _turned(low, chroma, angle, tl.load(values + 7))
                    green = _turned(low, chroma, angle, tl.load(values + 8))
                    blue = _turned(low, chroma, angle, tl.load(values + 9))
                elif operation == 4:
                    red, green, blue = gray, gray, gray
                else:
                    # brightness: nothing, contrast: the mean, saturation: the luminance is added
                    away = tl.where(operation == 2, gray, mean) * (1.0 - factor)
                    away = tl.where(operation == 0, 0.0, away)
                    red = _clamp(red * factor + away, 0.0, 1.0)
                    green = _clamp(green * factor + away, 0.0, 1.0)
                    blue = _clamp(blue * factor + away, 0.0, 1.0)
                tl.store(out + at, red, mask=inside)
                tl.store(out + size + at, green, mask=inside)
                tl.store(out + 2 * size + at, blue, mask=inside)


@triton.jit
def _blur_rows(x, out, values, columns, size, width, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    values += sample * columns
    x += sample * 3 * size
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < 3 * size
    column = at % width
    row_start = at - column
    blurred = tl.load(x + at, mask=inside, other=0.0) * tl.load(values + 14)
    for tap in range(1, tl.load(values + 13).to(tl.int32) + 1):
        before = tl.load(x + row_start + tl.maximum(column - tap, 0), mask=inside, other=0.0)
        after = tl.load(x + row_start + tl.minimum(column + tap, width - 1), mask=inside, other=0.0)
        blurred += (before + after) * tl.load(values + 14 + tap)
    tl.store(out + sample * 3 * size + at, blurred, mask=inside)


@triton.jit
def _blur_columns(x, out, values, mean, scale, columns, size, width, height, BLOCK: tl.constexpr):
    """The second half of the blur, then solarize and normalise."""
    sample = tl.program_id(0).to(tl.int64)
    values += sample * columns
    x += sample * 3 * size
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < 3 * size
    channel = at // size
    row = (at % size) // width
    top = at - row * width
    blurred = tl.load(x + at, mask=inside, other=0.0) * tl.load(values + 14)
    for tap in range(1, tl.load(values + 13).to(tl.int32) + 1):
        before = tl.load(x + top + tl.maximum(row - tap, 0) * width, mask=inside, other=0.0)
        after = tl.load(x + top + tl.minimum(row + tap, height - 1) * width, mask=inside, other=0.0)
        blurred += (before + after) * tl.load(values + 14 + tap)
    if tl.load(values + 12) > 0:
        blurred = tl.minimum(blurred, 1.0 - blurred)
    normal = blurred - tl.load(mean + channel, mask=inside, other=0.0)
    normal *= tl.load(scale + channel, mask=inside, other=0.0)
    tl.store(out + sample * 3 * size + at, normal, mask=inside)
