"""What a linear classifier is trained on: features of a frozen network, in batches or all at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import dist
from ..data.augment import apply_draws, draw_parameters
from ..data.datasets import EpochSampler, ImageDataset, epoch_permutation
from ..data.loading import TIMEOUT
from ..data.multicrop import MultiCropDataset, generator, multicrop_loader
from ..labels.features import extract_features, share
from ..nets.resnet import ResNet
from ..nets.vision_transformer import VisionTransformer
from .conv_features import CentreRegionCrops
from .ten_crops import VIEWS, TenCrops, ten_crop_forward

WINDOW = 6  # cells a side that --global_pooling false averages, as published: 7 x 7 -> 2 x 2
SCALE = (0.08, 1.0)  # share of the image's area in a training crop, as published
ONLY_FLIP = {
    **dict.fromkeys(("jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob"), 0.0),
    "color_jitter": (0.0, 0.0, 0.0, 0.0),
    "blur_sigma": (0.1, 2.0),
}


def linear_input(
    model: nn.Module, n_last_blocks: int = 4, avgpool: bool = False, global_pooling: bool = True
) -> Callable[[Tensor], Tensor]:
    """Images (B, C, S, S) -> what the classifier gets of them, (B, D).

    A vision transformer gives the class tokens of its last n_last_blocks blocks, D = n times its
    width; avgpool adds the mean of the last block's patch tokens, registers left out: behind them,
    or for one block, as the published linear weights have it, in turns (class 0, mean 0, class 1,
    ...). Other networks give their pooled features; global_pooling=False the means of all 6 x 6
    windows of the last map, 2048 x 2 x 2 of a ResNet-50 at 224 px. Raises ValueError for what the
    network has not.
    """
    if not global_pooling:
        if not isinstance(model, ResNet):
            raise ValueError("--global_pooling false is for a ResNet of ours: leave it out")
        model.eval_mode = True  # maps instead of features
        return lambda images: _windows(model.forward_backbone(images))
    if not isinstance(model, VisionTransformer):
        return model.forward_backbone
    if not 1 <= n_last_blocks <= model.depth:
        raise ValueError(
            f"--n_last_blocks {n_last_blocks} must be between 1 and {model.depth}, the blocks that "
            "the network has"
        )

    def tokens(images):
        blocks = model.get_intermediate_layers(images, n_last_blocks)  # n of (B, T, D)
        classes = torch.cat([block[:, 0] for block in blocks], 1)  # (B, n D)
        if not avgpool:
            return classes
        mean = blocks[-1][:, 1 + model.num_registers :].mean(1)  # (B, D)
        if n_last_blocks == 1:
            return torch.stack([classes, mean], 2).flatten(1)  # (B, 2 D)
        return torch.cat([classes, mean], 1)  # (B, (n + 1) D)

    return tokens


def _windows(maps):
    if min(maps.shape[2:]) < WINDOW:
        cells = " x ".join(map(str, maps.shape[2:]))
        raise ValueError(
            f"--global_pooling false averages {WINDOW} x {WINDOW} cells, and the last map has "
            f"{cells}: use a larger --size, such as 224"
        )
    return F.avg_pool2d(maps, WINDOW, stride=1).flatten(1)  # (B, C * h * w)


class ImageBatches:
    """Features of random resized crops with a random flip, computed anew in every epoch.

    `batches(epoch, start, stopwatch)` yields features (B, D) and labels (B,) of this process, from
    iteration `start` of the epoch. The crops depend on (seed, epoch, index), the flips on (seed,
    epoch, iteration) and the place in the global batch: both not on the number of processes.
    forward: normalised images on the device -> (B, D). normalisation: mean and standard deviation of
    each channel. unscaled: windows of the image's centre instead of resized crops, see
    src.evaluate.conv_features.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        dataset: ImageDataset,
        size: int,
        *,
        normalisation: tuple[Sequence[float], Sequence[float]],
        batch_size: int,
        process: dist.Process,
        precision: str,
        seed: int,
        workers: int,
        flip: bool,
        unscaled: bool = False,
        loader_timeout: float = TIMEOUT,
    ):
        self.forward, self.labels, self.seed = forward, dataset.labels, seed
        self.process, self.precision, self.batch_size = process, precision, batch_size
        self.mean, self.std = (torch.tensor(x).view(-1, 1, 1) for x in normalisation)  # (C, 1, 1)
        self.options = {**ONLY_FLIP, "flip_prob": 0.5 if flip else 0.0}
        if unscaled:
            crops = CentreRegionCrops(dataset, size, seed)
        else:
            smallest, largest = SCALE
            crops = MultiCropDataset(dataset, [1], [size], [smallest], [largest], seed=seed)
        self.sampler = EpochSampler(
            len(dataset),
            batch_size,
            rank=process.rank,
            world_size=process.world_size,
            seed=seed,
            groups=dataset.groups,
        )
        self.loader = multicrop_loader(
            crops,
            self.sampler,
            batch_size,
            num_workers=workers,
            device_type=process.device.type,
            timeout=loader_timeout,
        )

    def __call__(self, epoch, start, stopwatch) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.set_epoch(epoch, start)
        device, first = self.process.device, self.process.rank * self.batch_size
        total = self.process.world_size * self.batch_size
        for it, ((images,), indices) in enumerate(stopwatch.watch(self.loader), start):
            draws = draw_parameters(generator(self.seed, epoch, it), 1, total, **self.options)
            images = images.to(device, non_blocking=True).flatten(0, 1)  # (B, C, S, S)
            own_draws = draws[slice(first, first + len(images))]
            images = apply_draws(images, own_draws, self.mean, self.std)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), dist.autocast(device, self.precision):
                features = self.forward(images).flatten(1)
            yield features.float(), self.labels[indices].to(device)


class CachedBatches:
    """The same, from features (n, D) computed once: those of this process's share of the images.

    Of each global batch a process has the images that lie in its share, which may be none.
    """

    def __init__(
        self,
        features: Tensor,
        dataset: ImageDataset,
        batch_size: int,
        process: dist.Process,
        seed: int,
    ):
        self.features, self.labels = features, dataset.labels  # (n, D), (N,)
        self.total, self.device, self.seed = batch_size * process.world_size, process.device, seed

    def __call__(self, epoch, start, stopwatch) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(epoch_permutation(len(self.labels), self.seed, epoch))
        own = share(len(self.labels))
        for it in stopwatch.watch(range(start, len(order) // self.total)):
            batch = order[it * self.total : (it + 1) * self.total]
            batch = batch[(batch >= own.start) & (batch < own.stop)]
            features = self.features[batch - own.start]
            yield features.to(self.device), self.labels[batch].to(self.device)


@dataclass
class FrozenFeatures:
    """A frozen network, and how it sees images: features of whole sets, or of random crops.

    forward: normalised images (B, C, S, S) on the device -> (B, dim). normalisation: mean and standard
    deviation of each channel.
    """

    forward: Callable[[Tensor], Tensor]
    dim: int
    size: int
    normalisation: tuple[list[float], list[float]]
    interpolation: str
    process: dist.Process
    precision: str
    workers: int
    loader_timeout: float = TIMEOUT

    def of(
        self, dataset: ImageDataset, batch_size: int, ten_crops: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Features (n, dim) of the centre crops of this process's share, and their labels (n, ...).

        ten_crops: (n, 10 dim), those of ten crops of an image, one after the other.
        """
        forward, images, resize, (mean, std) = self.forward, dataset, None, self.normalisation
        if ten_crops:
            images = TenCrops(dataset, self.size, interpolation=self.interpolation)
            forward, resize = ten_crop_forward(forward), self.size
            mean, std = list(mean) * VIEWS, list(std) * VIEWS
            batch_size = max(1, batch_size // VIEWS)
        features, indices = extract_features(
            forward,
            images,
            self.size,
            mean=mean,
            std=std,
            device=self.process.device,
            batch_size=batch_size,
            num_workers=self.workers,
            loader_timeout=self.loader_timeout,
            precision=self.precision,
            resize=resize,
            interpolation=self.interpolation,
        )
        return features, dataset.labels[indices]

    def batches(
        self, dataset: ImageDataset, batch_size: int, seed: int, flip: bool, unscaled: bool
    ) -> ImageBatches:
        """Those of random crops, see ImageBatches."""
        return ImageBatches(
            self.forward,
            dataset,
            self.size,
            normalisation=self.normalisation,
            batch_size=batch_size,
            process=self.process,
            precision=self.precision,
            seed=seed,
            workers=self.workers,
            flip=flip,
            unscaled=unscaled,
            loader_timeout=self.loader_timeout,
        )
