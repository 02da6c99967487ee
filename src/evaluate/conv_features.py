"""Maps of one convolution of AlexNet or VGG16, pooled to about 9,000 features for a classifier."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.datasets import ImageDataset
from ..data.multicrop import crop_generator
from ..labels.features import centre_crop


class Pooling(NamedTuple):
    """How maps of images of 224 px are pooled, as published: kernel = stride, and cells a side."""

    cells: int
    kernel: int
    padding: int = 0


ALEXNET = {
    1: Pooling(10, 6, 3),  # 96 channels: 9600 features
    2: Pooling(6, 4),  # 256: 9216
    3: Pooling(5, 3, 1),  # 384: 9600
    4: Pooling(5, 3, 1),
    5: Pooling(6, 2),  # 256: 9216
}
VGG16 = {
    **dict.fromkeys((1, 2), Pooling(12, 18)),  # 64 channels: 9216 features
    **dict.fromkeys((3, 4), Pooling(8, 14)),  # 128: 8192
    **dict.fromkeys((5, 6, 7), Pooling(6, 9)),  # 256: 9216
    **dict.fromkeys((8, 9, 10), Pooling(4, 6)),  # 512: 8192
    **dict.fromkeys((11, 12, 13), Pooling(4, 3)),
}
POOLING = {5: ALEXNET, 13: VGG16}  # by the number of convolutions
KINDS = {
    "max": (F.max_pool2d, F.adaptive_max_pool2d),
    "average": (F.avg_pool2d, F.adaptive_avg_pool2d),
}


def pool_map(maps: Tensor, pooling: Pooling, kind: str = "average") -> Tensor:
    """(B, C, H, W) -> (B, C, cells, cells), for maps of images of another size than 224 px too.

    Where the published kernel does not give the published number of cells, adaptive pooling does;
    along a side that is shorter than that the map stays as it is. kind: "max" or "average".
    """
    cells, kernel, padding = pooling
    fixed, adaptive = KINDS[kind]
    sides = maps.shape[2:]
    if all((side + 2 * padding - kernel) // kernel + 1 == cells for side in sides):
        return fixed(maps, kernel, kernel, padding)
    return adaptive(maps, [min(side, cells) for side in sides])


def conv_input(model: nn.Module, conv: int, kind: str = "average") -> Callable[[Tensor], Tensor]:
    """Images (B, C, S, S) -> the pooled map after convolution `conv`, its BN and ReLU, (B, D).

    model: src.nets.convnets.AlexNet or VGG16, convolutions counted from 1. Raises ValueError for
    another network, or a convolution that it has not.
    """
    count = getattr(model, "num_convs", None)
    if count not in POOLING:
        raise ValueError(
            f"--conv {conv} is for AlexNet and VGG16 with batch norm: use --arch alexnet or vgg16, or "
            "leave it out"
        )
    if not 1 <= conv <= count:
        raise ValueError(f"--conv {conv} must be between 1 and {count}, the convolutions there are")
    pooling = POOLING[count][conv]
    return lambda images: pool_map(model.forward_conv(images, conv), pooling, kind).flatten(1)


class CentreRegionCrops(Dataset):
    """`[(epoch, i)]` -> `([uint8 (1, C, size, size)], i)`: windows of the image's centre, unscaled.

    The shorter side is resized to size * 256 / 224, the middle square cut out, and a window of it
    drawn from (seed, epoch, i), as DeepCluster trains its classifiers. See MultiCropDataset.
    """

    def __init__(
        self, dataset: ImageDataset, size: int, seed: int, interpolation: str = "bilinear"
    ):
        self.dataset, self.size, self.seed = dataset, size, seed
        self.resize, self.interpolation = round(size * 256 / 224), interpolation

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        epoch, index = item
        image = centre_crop(self.dataset.load(index), self.resize, self.resize, self.interpolation)
        generator = crop_generator(self.seed, epoch, index)
        top, left = (int(generator.random() * (self.resize - self.size + 1)) for _ in range(2))
        return [image[None, :, top : top + self.size, left : left + self.size]], index
