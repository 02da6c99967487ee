"""What filters look like: weights of the first layer, and images that make a filter respond most.

First layer: figure 3.7 of the thesis of M. Caron. Gradient ascent: figures 3.8 and 3.9, after
Yosinski et al. 2015, Understanding Neural Networks Through Deep Visualization, arXiv:1506.06579.
"""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data import photometry
from ..nets.sobel import sobel_to_rgb
from ..run.log import duration
from .responses import Layer, filter_responses
from .sheets import PAPER, Group, Header, Row, Scale, Tile, draw_sheet, to_uint8

logger = logging.getLogger(__name__)

# Pixels that a filter of the first layer is enlarged to, the fewer the filters the more.
CELLS = (44, 96)
GRIDS = 560  # pixels that the grids of the first layer shall fill
CELL_GAP = 2  # pixels between filters
NOISE = 20 / 255  # standard deviation of the pixels that ascent starts from
LEAK = 0.01  # slope below zero of the last ReLU, in ascent only
AT_ONCE = 1 << 21  # values that the images of one batch of ascent have at most
LOG_SECONDS = 5.0


# ============ first layer ============
def draw_first_layer(
    conv: nn.Conv2d, sobel: nn.Module | None, path: Path, source: str = ""
) -> Path:
    """The filters of the first convolution, zero as middle grey, each by its own largest weight.

    RGB in colour, other numbers of channels a grid each. sobel: the filters before the convolution
    (src.nets.sobel.Sobel); then both of its channels, and beside them the filters of RGB images that
    Sobel and the convolution together are. source: of which network, for the header.
    """
    weight = conv.weight.detach().float().cpu()  # (F, C, k, k)
    count = f"{len(weight)} filters of {conv.kernel_size[0]} x {conv.kernel_size[1]} pixels"
    if sobel is not None:
        rgb = sobel_to_rgb(conv, sobel.padding).weight.detach().float().cpu()
        size = f"{rgb.shape[2]} x {rgb.shape[3]}"
        panels = _channels(weight, ["Sobel along rows", "Sobel along columns"])
        panels.append((f"of RGB images, {size}", to_grid(_grey_zero(rgb), num_grids=2)))
    elif weight.shape[1] == 3:
        panels = [("red, green and blue", to_grid(_grey_zero(weight)))]
    else:
        panels = _channels(weight, [f"channel {i}" for i in range(weight.shape[1])])
    largest = weight.abs().amax((1, 2, 3))
    notes = [
        source,
        "grey is zero; each filter is drawn by its own largest weight, which goes from "
        f"{largest.min():.2g} to {largest.max():.2g}, median {largest.median():.2g}",
    ]
    shades = np.linspace(1, 255, 64).round().astype(np.uint8)
    scale = Scale(np.repeat(shades[:, None], 3, 1), "-largest", "+largest, of each filter")
    header = Header(f"The first layer: {count}", [x for x in notes if x], scale=scale)
    groups = [Group(caption) for caption, _ in panels]
    tiles = [[Tile(Image.fromarray(grid))] for _, grid in panels]
    return draw_sheet(header, groups, [Row(tiles)]).save(path)


def _channels(weight, captions):
    """(caption, grid) of each channel of (F, C, k, k); all channels of a filter have one scale."""
    shades = _grey_zero(weight)  # (F, C, k, k)
    channels = [shades[:, i : i + 1].expand(-1, 3, -1, -1) for i in range(shades.shape[1])]
    grids = [to_grid(channel, num_grids=len(channels)) for channel in channels]
    return list(zip(captions, grids, strict=True))


def _grey_zero(weight):
    """(F, C, k, k) float -> uint8, 128 for 0, and 1 or 255 for the largest of each filter."""
    largest = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return (128 + 127 * weight / largest).round().to(torch.uint8)


def to_grid(images: Tensor, num_grids: int = 1) -> np.ndarray:
    """uint8 (F, 3, k, k) -> one picture, row by row, without a gap at its borders.

    A filter is enlarged by a whole factor. num_grids: how many such pictures stand side by side.

    As many columns as the smallest divisor of F from its square root on, where that is at most
    twice the root, so that 96 are 8 rows of 12.
    """
    count, _, rows, cols = images.shape
    root = math.ceil(math.sqrt(count))
    columns = next((c for c in range(root, 2 * root + 1) if count % c == 0), root)
    least, most = CELLS
    cell = min(most, max(least, GRIDS // (columns * num_grids)))
    scale = max(1, cell // max(rows, cols))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    tall, wide = rows * scale + CELL_GAP, cols * scale + CELL_GAP
    shape = (math.ceil(count / columns) * tall - CELL_GAP, columns * wide - CELL_GAP, 3)
    grid = np.full(shape, PAPER, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = i // columns * tall, i % columns * wide
        grid[top : top + tall - CELL_GAP, left : left + wide - CELL_GAP] = image
    return grid


# ============ gradient ascent ============
@torch.backends.cudnn.flags(enabled=True, deterministic=True)
def ascend(
    model: nn.Module,
    layer: Layer,
    filters: Sequence[int],
    size: int,
    normalisation: tuple[Sequence[float], Sequence[float]],
    steps: int = 200,
    step_size: float = 0.1,
    decay: float = 0.01,
    blur_every: int = 4,
    blur_sigma: float = 0.5,
    clip: float = 0.0,
    grey: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `filters` an image that its mean response is large for, found from noise.

    normalisation: mean and standard deviation that images are normalised with; steps, distances and
    decay are of normalised images. A step goes step_size along the gradient of the response, as the
    root mean square over the image, whatever the gradient's length; then the image is multiplied by
    1 - decay, the share `clip` of its pixels that are nearest to the mean colour become it, every
    blur_every steps (0: never) but the last it is blurred with a Gaussian of blur_sigma pixels, and
    it is kept within what pixels can be. grey: all channels are alike. The noise depends on (seed,
    filter).

    Returns uint8 images (len(filters), C, size, size), the responses to the noise and to them, on
    the CPU. Raises ValueError for responses that are not finite.
    """
    weight = next(model.parameters())
    mean, std = (torch.tensor(x, device=weight.device).view(-1, 1, 1) for x in normalisation)
    kernel = torch.from_numpy(photometry.blur_kernels(np.array([blur_sigma])))
    kernel = kernel.view(1, -1, 1, 1).to(weight.device)
    at_once = max(1, AT_ONCE // (len(mean) * size**2))
    results, done, start, logged = [], 0, time.perf_counter(), time.perf_counter()
    for chosen in torch.tensor(filters).split(at_once):
        shape = (1 if grey else len(mean), size, size)
        x = torch.stack([_noise(seed, number, shape) for number in chosen.tolist()])
        x = (x.to(weight.device) / std).clamp(-mean / std, (1 - mean) / std)  # (n, C, S, S)
        column = chosen[:, None].to(weight.device)  # (n, 1)
        before = _measure(model, layer, column, x)
        for step in range(1, steps + 1):
            x.requires_grad_(True)
            responses = filter_responses(model, layer, x, LEAK).gather(1, column)
            (gradient,) = torch.autograd.grad(responses.sum(), x)
            with torch.no_grad():
                if grey:
                    gradient = gradient.mean(1, keepdim=True).expand_as(x)
                length = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
                x = x + step_size * gradient / length.clamp(min=torch.finfo(length.dtype).tiny)
                x *= 1 - decay
                if clip:
                    norms = x.square().sum(1, keepdim=True)
                    x *= norms >= norms.flatten(1).quantile(clip, dim=1).view(-1, 1, 1, 1)
                if blur_every and step % blur_every == 0 and step < steps:
                    photometry.blur(x, kernel)
                x = x.clamp(-mean / std, (1 - mean) / std)
            now = time.perf_counter()
            if now - logged > LOG_SECONDS:
                logged, rate = now, (done * steps + step * len(x)) / (now - start)
                left = duration(((len(filters) - done) * steps - step * len(x)) / rate)
                logger.info(
                    "step %d of %d of filters %s, ETA %s", step, steps, chosen.tolist(), left
                )
        images = to_uint8(x, mean, std)
        after = _measure(model, layer, column, (images.float() / 255 - mean) / std)
        results.append((images.cpu(), before, after))
        done += len(chosen)
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def _noise(seed, number, shape):
    draws = np.random.Generator(np.random.PCG64([seed, number]))
    noise = draws.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(noise * NOISE)


@torch.no_grad()
def _measure(model, layer, column, x):
    responses = filter_responses(model, layer, x).gather(1, column)[:, 0].cpu()
    if not responses.isfinite().all():
        raise ValueError(f"{layer.name} of these weights gives values that are not finite")
    return responses
