"""Ten crops of an image, whose scores are averaged: fixed ones, or drawn at random.

A dataset of them gives the crops of an image one after the other in the channels, (10 C, S, S), so
that an image is decoded once and its crops stay together, whatever the number of processes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.datasets import ImageDataset
from ..data.multicrop import crop_and_resize, crop_generator, draw_window

VIEWS = 10
# Random crops of an evaluation are those of an epoch that no training reaches.
EVALUATION_EPOCH = 2**31


class TenCrops:
    """The four corners and the centre, and their mirror images, of the resized images of a dataset.

    load(i) -> uint8 (10 C, size, size); the shorter side is first resized to `resize` pixels, by
    default size * 256 / 224, the published 256 for 224.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        size: int,
        resize: int | None = None,
        interpolation: str = "bilinear",
    ):
        self.dataset, self.size, self.interpolation = dataset, size, interpolation
        self.resize = round(size * 256 / 224) if resize is None else resize
        self.name, self.labels = dataset.name, dataset.labels
        if self.resize < size:
            raise ValueError(f"crops of {size} px need images of at least that, not {self.resize}")

    def __len__(self):
        return len(self.dataset)

    def load(self, index: int) -> Tensor:
        image = self.dataset.load(index)
        shorter = min(image.shape[1:])
        if shorter != self.resize:
            shape = [self.resize * side // shorter for side in image.shape[1:]]
            image = F.interpolate(image[None], shape, mode=self.interpolation, antialias=True)[0]
        bottom, right = (side - self.size for side in image.shape[1:])
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
        corners.append((round(bottom / 2), round(right / 2)))
        crops = [image[:, y : y + self.size, x : x + self.size] for y, x in corners]
        return torch.cat([*crops, *(crop.flip(2) for crop in crops)])  # (10 C, S, S)


class RandomTenCrops:
    """Ten random resized crops, each mirrored or not; they depend on (seed, index) alone.

    scale: range of the area as a share of the image, ratio: of width / height.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        size: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        seed: int,
    ):
        self.dataset, self.size, self.scale, self.ratio = dataset, size, scale, ratio
        self.seed, self.name, self.labels = seed, dataset.name, dataset.labels

    def __len__(self):
        return len(self.dataset)

    def load(self, index: int) -> Tensor:
        image = self.dataset.load(index)
        generator = crop_generator(self.seed, EVALUATION_EPOCH, index)
        crops = []
        for _ in range(VIEWS):
            window = draw_window(*image.shape[1:], self.scale, self.ratio, generator)
            crop = crop_and_resize(image, window, self.size, "bilinear")[0]  # (C, S, S)
            crops.append(crop.flip(2) if generator.random() < 0.5 else crop)
        return torch.cat(crops)  # (10 C, S, S)


def ten_crop_forward(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function (B, 10 C, S, S) -> (B, 10, D) that applies `forward` to each crop."""

    def apply(images):
        crops = images.unflatten(1, (VIEWS, -1)).flatten(0, 1)  # (B * 10, C, S, S)
        crops = crops.contiguous(memory_format=torch.channels_last)
        return forward(crops).flatten(1).unflatten(0, (-1, VIEWS))

    return apply
