"""Multi-crop: several random resized crops of one image, at several resolutions, as uint8.

Only geometry happens here; colours are changed on the device, a batch at a time (src.data.augment).
Source: the SwAV paper, section 3.3; crop geometry as in torchvision's RandomResizedCrop.
"""

import functools
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler, default_collate

from .loading import TIMEOUT, Loader

TRIES = 10  # of RandomResizedCrop, before it takes the centre


def generator(*keys: int) -> torch.Generator:
    """A CPU generator seeded by all of `keys`, such as (seed, epoch, iteration, rank)."""
    seed = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) % 2**63)


class MultiCropDataset(Dataset):
    """`[i]`, `[(epoch, i)]` or `[(epoch, i, place)]` -> `([uint8 (n_r, C, S_r, S_r) ...], i)`.

    `num_crops`, `size_crops`, `min_scale_crops` and `max_scale_crops` have one value a resolution:
    how many crops, their side in pixels, and the range of their area as a share of the image.
    `ratio` is the range of width / height. With `reduced_decoding` a JPEG is decoded at a half, a
    quarter or an eighth of its size where that enlarges no crop. What is drawn depends on
    (seed, epoch, i) alone, or on (seed, epoch, place): an image that an epoch holds in two places
    has other crops in each.
    Raises ValueError when the lists do not fit together.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_crops: list[int],
        size_crops: list[int],
        min_scale_crops: list[float],
        max_scale_crops: list[float],
        seed: int = 31,
        interpolation: str = "bilinear",
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        reduced_decoding: bool = False,
    ):
        check_crops(num_crops, size_crops, min_scale_crops, max_scale_crops)
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation {interpolation} must be bilinear or bicubic")
        self.dataset, self.seed = dataset, seed
        self.num_crops, self.size_crops = list(num_crops), list(size_crops)
        self.scales = list(zip(min_scale_crops, max_scale_crops, strict=True))
        self.interpolation, self.ratio = interpolation, ratio
        self.reduced_decoding = reduced_decoding

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        item = item if isinstance(item, tuple) else (0, item)
        epoch, index, place = *item[:2], item[-1]
        if self.reduced_decoding:
            image, windows = self._load_reduced(index, epoch, place)
        else:
            image = self.dataset.load(index)  # (C, H, W)
            windows = self.windows(epoch, place, *image.shape[1:])
        crops = []
        for size, same_size in zip(self.size_crops, windows, strict=True):
            parts = [
                crop_and_resize(image, window, size, self.interpolation) for window in same_size
            ]
            crops.append(torch.cat(parts))  # (n_r, C, S, S)
        return crops, index

    def windows(
        self, epoch: int, place: int, height: int, width: int
    ) -> list[list[tuple[int, int, int, int]]]:
        """Windows (top, left, height, width) of the crops of an image of this size, by resolution."""
        generator = crop_generator(self.seed, epoch, place)
        return [
            [draw_window(height, width, scale, self.ratio, generator) for _ in range(number)]
            for number, scale in zip(self.num_crops, self.scales, strict=True)
        ]

    def _load_reduced(self, index, epoch, place):
        """An image, (C, H, W), at most as large as its windows need, and these windows in it."""
        windows = functools.cache(functools.partial(self.windows, epoch, place))  # drawn once

        def scale_for(height, width):
            return reduction(windows(height, width), self.size_crops)

        image, height, width, scale = self.dataset.load_reduced(index, scale_for)
        of_file = windows(height, width)
        return image, [[reduced_window(w, scale) for w in same_size] for same_size in of_file]


def check_crops(
    num_crops: list[int],
    size_crops: list[int],
    min_scale_crops: list[float],
    max_scale_crops: list[float],
) -> None:
    """Raise ValueError, naming the flag, when the lists of crops do not make sense."""
    lists = {
        "--nmb_crops": num_crops,
        "--size_crops": size_crops,
        "--min_scale_crops": min_scale_crops,
        "--max_scale_crops": max_scale_crops,
    }
    if len({len(values) for values in lists.values()}) != 1 or len(num_crops) == 0:
        lengths = ", ".join(f"{flag} has {len(values)}" for flag, values in lists.items())
        raise ValueError(f"the lists of crops need one value a resolution each: {lengths}")
    for flag, values in list(lists.items())[:2]:
        if min(values) < 1:
            raise ValueError(f"{flag} {' '.join(map(str, values))} must be at least 1 everywhere")
    for low, high in zip(min_scale_crops, max_scale_crops, strict=True):
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"--min_scale_crops {low} and --max_scale_crops {high} must satisfy "
                f"0 < min <= max <= 1"
            )


def crop_generator(seed: int, epoch: int, index: int) -> random.Random:
    """Generator of one sample in one epoch; the key is mixed by the Mersenne Twister's seeding."""
    return random.Random((int(seed) << 96) + (int(epoch) << 64) + int(index))


def draw_window(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: random.Random,
) -> tuple[int, int, int, int]:
    """Window (top, left, height, width) of a random resized crop, drawn as torchvision does.

    The area is uniform in `scale`, the logarithm of width / height uniform in `ratio`, the place
    uniform; after ten draws that do not fit, the largest central window within `ratio`.
    """
    area = height * width
    for _ in range(TRIES):
        target = area * generator.uniform(scale[0], scale[1])
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.random() * (height - h + 1))
            left = int(generator.random() * (width - w + 1))
            return top, left, h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    w, h = max(w, 1), max(h, 1)
    return (height - h) // 2, (width - w) // 2, h, w


def reduction(windows: list[list[tuple[int, int, int, int]]], sizes: list[int]) -> int:
    """The largest of 8, 4, 2, 1 by which an image can be reduced without enlarging a crop.

    windows: (top, left, height, width) for each of `sizes`, the sides of the crops in pixels.
    """
    for scale in (8, 4, 2):
        if all(
            min(reduced_window(window, scale)[2:]) >= size
            for size, same_size in zip(sizes, windows, strict=True)
            for window in same_size
        ):
            return scale
    return 1


def reduced_window(window: tuple[int, int, int, int], scale: int) -> tuple[int, int, int, int]:
    """A window (top, left, height, width) in the image at 1 / scale of the size, edges rounded to pixels."""
    top, left, height, width = window
    first_row, first_column = round(top / scale), round(left / scale)
    end_row, end_column = round((top + height) / scale), round((left + width) / scale)
    return first_row, first_column, end_row - first_row, end_column - first_column


def crop_and_resize(
    image: torch.Tensor, window: tuple[int, int, int, int], size: int, interpolation: str
) -> torch.Tensor:
    """Resize a window of uint8 `(C, H, W)` to `(1, C, size, size)`, with antialiasing.

    The channels of a pixel lie together in memory, before and after: torch then resizes 8-bit
    images with integer vector instructions, within one level of PIL's result.
    """
    top, left, height, width = window
    part = image[None, :, top : top + height, left : left + width]
    part = part.contiguous(memory_format=torch.channels_last)
    return F.interpolate(part, size=(size, size), mode=interpolation, antialias=True)


def multicrop_loader(
    dataset: Dataset,
    sampler: Sampler,
    batch_size: int,
    num_workers: int,
    device_type: str,
    timeout: float = TIMEOUT,
) -> Loader:
    """Loader of a MultiCropDataset.

    A batch is `([uint8 (B, n_r, C, S_r, S_r) per resolution], indices (B,))`, in pinned memory
    when it goes to a GPU. Workers stay alive between epochs, and signals do not end them. timeout:
    seconds that a batch of theirs may take, 0: any.
    """
    return Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        device_type=device_type,
        timeout=timeout,
        collate=collate_crops,
        persistent_workers=num_workers > 0,
    )


def collate_crops(
    samples: list[tuple[list[torch.Tensor], int]],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Stack samples of a MultiCropDataset; pixels stay as `crop_and_resize` left them."""
    resolutions = zip(*[crops for crops, _ in samples], strict=True)
    by_pixel = [[crops.permute(0, 2, 3, 1) for crops in same_size] for same_size in resolutions]
    # In a worker default_collate stacks straight into shared memory.
    crops = [default_collate(same_size).permute(0, 1, 4, 2, 3) for same_size in by_pixel]
    return crops, torch.tensor([index for _, index in samples])
