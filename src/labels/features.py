"""Features of a whole dataset, by sample index, across processes; their files: feature_files.py.

Every rank takes a contiguous share, so that the shares of all ranks, one after the other, are in
the order of the dataset whatever the number of processes.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .. import dist
from ..data.datasets import ImageDataset
from ..data.loading import TIMEOUT, Loader

logger = logging.getLogger(__name__)

LOG_SECONDS = 5.0
RAW_PIXELS = 32  # side in pixels at which raw pixels are compared at most
LONGEST_SHAPE = 4  # longer images are cut to this ratio before they are resized


def share(num_samples: int) -> range:
    """The samples of this rank: contiguous, at most one more than those of another rank."""
    rank, world_size = dist.rank(), dist.world_size()
    return range(num_samples * rank // world_size, num_samples * (rank + 1) // world_size)


def centre_crop(image: Tensor, size: int, resize: int, interpolation: str = "bicubic") -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, size, size): shorter side to `resize`, then the middle."""
    height, width = image.shape[1:]
    longest = LONGEST_SHAPE * min(height, width)
    if max(height, width) > longest:
        image = _middle(image, min(height, longest), min(width, longest))
        height, width = image.shape[1:]
    if min(height, width) != resize:
        shape = [max(resize, resize * side // min(height, width)) for side in (height, width)]
        image = F.interpolate(image[None], size=shape, mode=interpolation, antialias=True)[0]
    return _middle(image, size, size)


def _middle(image, height, width):
    top, left = (round((a - b) / 2) for a, b in zip(image.shape[1:], (height, width), strict=True))
    return image[:, top : top + height, left : left + width].contiguous()


class _CentreCrops(Dataset):
    """Centre crops of the samples `indices` of a dataset of open_dataset."""

    def __init__(self, dataset, indices, size, resize, interpolation):
        self.dataset, self.indices = dataset, indices
        self.geometry = (size, resize, interpolation)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, position):
        return centre_crop(self.dataset.load(int(self.indices[position])), *self.geometry)


@torch.no_grad()  # not inference_mode: what is returned may be trained on
def extract_features(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    batch_size: int = 256,
    num_workers: int = 0,
    precision: str = "fp32",
    resize: int | None = None,
    interpolation: str = "bicubic",
    indices: Sequence[int] | None = None,
    write: Callable[[int, Tensor], None] | None = None,
    loader_timeout: float = TIMEOUT,
) -> tuple[Tensor | None, Tensor]:
    """Features of this rank's share of `dataset`, from one centre crop of each image.

    forward: normalised images (B, C, size, size) on `device` -> (B, D); the caller has put the
    network into evaluation mode. size, resize: pixels of the crop, and of the shorter side before;
    `resize` is by default size * 256 / 224, the published 256 for 224, and below 96 px size itself.
    batch_size, num_workers: per process, of workers at most as many as there are CPUs or batches.
    precision: of the forward pass, fp32, bf16 or fp16. indices: the samples to take instead of the
    share. write: called with the number of the first row of a batch and its features (B, D), which
    are then not kept. loader_timeout: seconds that a batch of the workers may take, 0: any.
    Returns features (n, D) float32 on the CPU and their sample indices (n,), in order; n may be 0.
    Raises ValueError for a resize below the crop.
    """
    if resize is None:
        resize = round(size * 256 / 224) if size >= 96 else size
    if not 1 <= size <= resize:
        raise ValueError(f"a crop of {size} px needs images resized to at least that, not {resize}")
    device = torch.device(device)
    indices = share(len(dataset)) if indices is None else indices
    loader = Loader(
        _CentreCrops(dataset, indices, size, resize, interpolation),
        batch_size=batch_size,
        num_workers=min(num_workers, -(-len(indices) // batch_size)),
        device_type=device.type,
        timeout=loader_timeout,
    )
    mean, std = (torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (mean, std))

    def features_of(images):
        images = (images.to(device, non_blocking=True).float() / 255 - mean) / std
        images = images.contiguous(memory_format=torch.channels_last)
        with dist.autocast(device, precision):
            return forward(images).flatten(1).float().cpu()  # (B, D)

    if not len(indices):  # the width of the features is still needed
        empty = torch.zeros(1, mean.shape[1], size, size, dtype=torch.uint8)
        return features_of(empty)[:0], torch.empty(0, dtype=torch.int64)
    features, done, waited = None, 0, 0.0
    start = last_line = time.perf_counter()
    batches = iter(loader)
    while done < len(indices):
        before = time.perf_counter()
        images = next(batches)
        waited += time.perf_counter() - before
        batch = features_of(images)
        if write is not None:
            write(done, batch)
        else:
            if features is None:
                features = torch.empty(len(indices), batch.shape[1])
            features[done : done + len(batch)] = batch
        done += len(batch)
        now = time.perf_counter()
        if now - last_line > LOG_SECONDS or done == len(indices):
            last_line = now
            log_progress(dataset.name, done, len(indices), now - start, waited)
    return features, torch.as_tensor(indices)


def log_progress(name: str, done: int, total: int, seconds: float, waited: float) -> None:
    """A line of how far an extraction is; by the main process.

    waited: of the seconds, those for images.
    """
    if dist.is_main():
        logger.info(
            f"features of {name}: {done} of {total} images, {done / seconds:.0f} images/s, "
            f"data {waited:.1f} s, compute {seconds - waited:.1f} s, "
            f"ETA {seconds / done * (total - done):.0f} s"
        )


def raw_pixels(dataset: ImageDataset, size: int | None = None, **options) -> tuple[Tensor, Tensor]:
    """The pixels themselves as features, between 0 and 1: what a network has to beat.

    size: side in pixels, by default that of the first image, at most 32. `options` are batch_size,
    num_workers, loader_timeout and interpolation of `extract_features`, and what is returned is the same.
    """
    first = dataset.load(0)
    size = min(*first.shape[1:], RAW_PIXELS) if size is None else size
    mean, std = [0.0] * len(first), [1.0] * len(first)
    return extract_features(
        lambda images: images.flatten(1), dataset, size, mean, std, "cpu", resize=size, **options
    )
