"""Features of whole images, of their own shapes, kept in a file that a stopped evaluation goes on with.

Images are resized by PIL, as the published evaluations do it. A feature depends on its image alone, or on
its batch, which is always the same one: neither on the number of processes nor on where the work was
interrupted.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .. import dist
from ..data.datasets import ImageDataset
from ..data.loading import TIMEOUT, Loader
from ..errors import Stopped
from ..labels.features import LOG_SECONDS, log_progress
from ..labels.row_file import RowFile, check_space
from ..run.stop import StopSignal

CHUNK = (
    64  # images, or as many more as fill batches: what each process computes again, at most, after
)
# an interruption


# ============ sizes ============
def fit_inside(image: Tensor, index: int, side: int) -> Tensor:
    """uint8 (C, H, W) -> the same, made smaller where a side exceeds `side`, its shape kept.

    As DINO's image retrieval does it, by Image.thumbnail with Lanczos' filter. index: not used.
    """

    def shrink(picture):
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        return picture

    return _by_pil(image, shrink)


def to_square(image: Tensor, index: int, side: int) -> Tensor:
    """uint8 (C, H, W) -> (C, side, side), bicubic, whatever its shape, as DINO's copy detection has it."""
    return _by_pil(image, lambda picture: picture.resize((side, side), Image.Resampling.BICUBIC))


def longer_side(
    image: Tensor, index: int, side: int | None, boxes: Sequence[Sequence[float]] | None = None
) -> Tensor:
    """uint8 (C, H, W) -> (C, h, w) whose longer side is `side`, bilinear; None: the image's own size.

    boxes: one an image, (left, top, right, bottom) in its pixels, of which what is inside is kept after the
    resize, as DeepCluster's retrieval and R-MAC (arXiv:1511.05879) have it; None: the whole image.
    """
    ratio = 1.0 if side is None else side / max(image.shape[1:])
    if side is not None:
        height, width = (max(1, round(length * ratio)) for length in image.shape[1:])
        image = _by_pil(
            image, lambda picture: picture.resize((width, height), Image.Resampling.BILINEAR)
        )
    if boxes is None:
        return image
    left, top, right, bottom = (max(0, round(float(x) * ratio)) for x in boxes[index])
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)].contiguous()


def _by_pil(image, change):
    """What `change` makes of the image as a picture of PIL, or of each channel, if there are not 3."""
    if len(image) == 3:
        picture = change(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    channels = [np.array(change(Image.fromarray(x.contiguous().numpy()))) for x in image]
    return torch.from_numpy(np.stack(channels))


# ============ features ============
class _Resized(Dataset):
    """[i] -> image i of a dataset, as `resize` makes it, uint8 (C, h, w)."""

    def __init__(self, dataset, resize):
        self.dataset, self.resize = dataset, resize

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.resize(self.dataset.load(index), index)


@torch.no_grad()
def store_features(
    rows: RowFile,
    dataset: ImageDataset,
    resize: Callable[[Tensor, int], Tensor],
    forward: Callable[[Tensor], Tensor],
    stop: StopSignal,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    batch_size: int = 1,
    num_workers: int = 0,
    loader_timeout: float = TIMEOUT,
    precision: str = "fp32",
) -> None:
    """Write the rows of `rows` that are missing; those of unreadable images become NaN.

    resize: image, uint8 (C, H, W), and its index -> uint8 (C, h, w), of one shape where batch_size is above
    1. forward: normalised images (B, C, h, w) on the device -> (B, *width of a row). A chunk of the file is
    to be a multiple of batch_size. Other arguments as of src.labels.features.extract_features. All
    processes call this, each computes its chunks, and all have come to the end when it returns; a signal
    ends it earlier: ask stop.agreed(). Raises ValueError for features that are not finite.
    """
    mean, std = (torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (mean, std))

    def features_of(images):
        images = (images.to(device, non_blocking=True).float() / 255 - mean) / std
        images = images.contiguous(memory_format=torch.channels_last)
        with dist.autocast(device, precision):
            return forward(images).float().cpu()

    def extract(numbers, write):
        batches = batches_of_chunks(numbers, rows.chunk, batch_size)
        loader = Loader(
            _Resized(dataset, resize),
            batch_sampler=batches,
            num_workers=min(num_workers, len(batches)),
            device_type=device.type,
            timeout=loader_timeout,
        )
        done, waited, start = 0, 0.0, time.perf_counter()
        images_of_batches, last_line = iter(loader), start
        for indices in batches:
            before = time.perf_counter()
            images = next(images_of_batches)
            waited += time.perf_counter() - before
            features = features_of(images)
            broken = dataset.is_broken(indices)
            if not features[~broken].isfinite().all():
                raise ValueError(
                    "--pretrained makes features that are not finite: take another checkpoint"
                )
            features[broken] = torch.nan
            write(done, features)
            done += len(indices)
            now = time.perf_counter()
            if now - last_line > LOG_SECONDS or done == len(numbers):
                last_line = now
                log_progress(dataset.name, done, len(numbers), now - start, waited)

    rows.fill(extract, stop)
    dataset.share_broken()
    dist.barrier()  # before anybody reads what others have written


def batches_of_chunks(numbers: Sequence[int], chunk: int, batch_size: int) -> list[list[int]]:
    """Numbers, in order, in lists of at most batch_size that begin where they would without any missing.

    numbers: of whole chunks of rows.
    """
    batches = []
    for number in map(int, numbers):
        begins = number % chunk % batch_size == 0
        if begins or not batches:
            batches.append([])
        batches[-1].append(number)
    return batches


class FeatureFolder:
    """A folder of features of whole images, which are computed where they are not there yet.

    settings: all that features depend on but the images, as JSON; a file's name has a digest of them, so
    that features of other settings do not get into each other's way. options: of store_features.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        stop: StopSignal,
        *,
        device: torch.device,
        batch_size: int = 1,
        **options,
    ):
        self.folder, self.settings, self.stop, self.device = folder, settings, stop, device
        self.options = {**options, "device": device, "batch_size": batch_size}
        self.chunk = batch_size * -(-CHUNK // batch_size)

    def path(self, name: str, **settings) -> Path:
        """<folder>/<name>_<digest>, the digest being that of the settings and these."""
        everything = {**self.settings, **settings, "batch_size": self.options["batch_size"]}
        text = json.dumps(everything, sort_keys=True)
        return self.folder / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def rows(
        self,
        name: str,
        dataset: ImageDataset,
        resize: Callable[[Tensor, int], Tensor],
        forward: Callable[[Tensor], Tensor],
        width: Sequence[int],
        **settings,
    ) -> RowFile:
        """The features of all images, each of the shape `width`. All processes call it.

        settings: what these features depend on besides. Raises Stopped on all processes after a signal,
        and ValueError where the disk has too little room.
        """
        path = self.path(name, images=dataset.digest(), **settings)
        if not dist.broadcast_object(path.with_name(f"{path.name}.npy").is_file()):
            needed = 4 * len(dataset) * math.prod(width)
            check_space(self.folder, needed, f"the {name} features", "give fewer images")
        file = RowFile(path.parent, path.name, len(dataset), width, chunk=self.chunk)
        store_features(file, dataset, resize, forward, self.stop, **self.options)
        if self.stop.agreed():
            raise Stopped
        return file
