"""What a network is fine-tuned on: augmented crops of images with their targets, in batches.

DeiT's recipe (Touvron et al. 2020, arXiv:2012.12877, Table 9) by torchvision.transforms.v2: RandAugment
(arXiv:1909.13719), random erasing (arXiv:1708.04896), mixup (arXiv:1710.09412) and CutMix
(arXiv:1905.04899); repeated augmentation (arXiv:1902.05509). Multi-crop and photometry are those of the
training scripts. What is drawn depends on the seed, the epoch, and the image or its place in the batch
of all processes, and so not on their number.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import dist
from ..data.augment import Augment, apply_draws, draw_parameters
from ..data.datasets import EpochSampler, ImageDataset, epoch_permutation
from ..data.loading import TIMEOUT
from ..data.multicrop import MultiCropDataset, generator, multicrop_loader

MAGNITUDES = 31  # of torchvision's RandAugment: 0 changes nothing, 30 most


@dataclass(frozen=True)
class Strength:
    """Regularisation by images; the defaults are none of it.

    randaugment: operations on each crop, of strength `magnitude`, 0 to 30. erasing: probability that
    part of a crop is replaced by noise. mixup, cutmix: parameter alpha of the Beta distribution, 0:
    none; with both a batch has either, by chance. repeats: how often an image is in a batch, each time with
    other draws; an epoch then holds fewer of the images.
    """

    randaugment: int = 0
    magnitude: int = 27
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1


class RandAugmentedCrops(MultiCropDataset):
    """Crops of images after RandAugment, each with its own draws; as MultiCropDataset otherwise.

    fill: value of each channel for what comes from beyond a crop.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        num_operations: int,
        magnitude: int,
        fill: list[float],
        **crops,
    ):
        from torchvision.transforms import v2  # here, since only these recipes need it

        super().__init__(dataset, **crops)
        self.change = v2.RandAugment(
            num_operations, magnitude, num_magnitude_bins=MAGNITUDES, fill=fill
        )

    def __getitem__(self, item):
        crops, index = super().__getitem__(item)
        epoch, place = (item[0], item[-1]) if isinstance(item, tuple) else (0, item)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                generator(self.seed, epoch, int(place)).initial_seed()
            )
            changed = [torch.stack([self.change(crop) for crop in same]) for same in crops]
        return changed, index


class RepeatingSampler(EpochSampler):
    """Triples (epoch, index, place): each image `repeats` times in a batch, as many rows as images.

    An epoch has the first 1 / repeats of the images in its order. The copies of an image lie apart, a b c
    a b c, so that mixup and CutMix, which mix neighbours, mix different images. See EpochSampler for the
    rest.
    """

    def __init__(self, *args, repeats: int, **options):
        super().__init__(*args, **options)
        self.repeats = repeats

    def __iter__(self):
        order = epoch_permutation(self.num_samples, self.seed, self.epoch, self.groups)
        order = order.repeat(self.repeats)[: self.num_samples]
        batches = self.num_samples // (self.batch_size * self.world_size)
        total = self.batch_size * self.world_size
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for batch in range(self.start_iteration, batches):
            places = np.arange(batch * total, (batch + 1) * total)
            apart = np.concatenate([order[places[i :: self.repeats]] for i in range(self.repeats)])
            for index, place in zip(apart[own], places[own], strict=True):
                yield self.epoch, int(index), int(place)


class TrainingImages:
    """`images(epoch, start)` yields (crops, targets) of this process from iteration `start` on.

    crops: a list of normalised (B, C, S_i, S_i), one a crop, on the device. targets: labels
    (number of crops * B,), crop-major; with mixup or CutMix shares of the classes (..., num_classes).

    crops: the arguments of MultiCropDataset. augment: photometry and normalisation. labels: of the
    dataset (N,); num_classes: of them.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        crops: dict,
        augment: Augment,
        *,
        num_classes: int,
        batch_size: int,
        process: dist.Process,
        seed: int,
        workers: int,
        loader_timeout: float = TIMEOUT,
        strength: Strength | None = None,
    ):
        strength = strength or Strength()
        self.labels, self.seed, self.augment = dataset.labels, seed, augment
        self.process, self.batch_size = process, batch_size
        self.erase, self.mix = _erasing(strength), _mixing(strength, num_classes)
        options = {**crops, "seed": seed}
        if strength.randaugment:
            images = RandAugmentedCrops(
                dataset,
                strength.randaugment,
                strength.magnitude,
                fill=[255 * value for value in augment.mean.flatten().tolist()],
                **options,
            )
        else:
            images = MultiCropDataset(dataset, **options)
        self.num_crops = images.num_crops
        sampling = {
            "rank": process.rank,
            "world_size": process.world_size,
            "seed": seed,
            "groups": dataset.groups,
        }
        if strength.repeats > 1:
            self.sampler = RepeatingSampler(
                len(dataset), batch_size, repeats=strength.repeats, **sampling
            )
        else:
            self.sampler = EpochSampler(len(dataset), batch_size, **sampling)
        self.loader = multicrop_loader(
            images,
            self.sampler,
            batch_size,
            num_workers=workers,
            device_type=process.device.type,
            timeout=loader_timeout,
        )

    def __call__(self, epoch: int, start: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        self.sampler.set_epoch(epoch, start)
        for it, (batch, indices) in enumerate(self.loader, start):
            labels = self.labels[indices].to(self.process.device)
            crops, targets = [], []
            for number, crop in enumerate(self._augmented(batch, epoch, it)):
                mixed, target = self._mixed(crop, labels, (epoch, it, number))
                crops.append(mixed.contiguous(memory_format=torch.channels_last))
                targets.append(target)
            yield crops, torch.cat(targets)

    def _augmented(self, batch, epoch, it):
        """The crops of a batch after photometry and erasing, (B, C, S_i, S_i) each."""
        total = self.batch_size * self.process.world_size
        first = self.process.rank * self.batch_size
        keys = (self.seed, epoch, it)
        draws = draw_parameters(
            generator(*keys), sum(self.num_crops), total, **self.augment.options
        )
        own = first + np.arange(self.batch_size)
        number = 0  # of the crop
        for images in batch:  # uint8 (B, n, C, S, S)
            count = images.shape[1]
            rows = (total * (number + np.arange(count))[:, None] + own).flatten()  # (n * B,)
            flat = images.to(self.process.device, non_blocking=True).transpose(0, 1).flatten(0, 1)
            flat = apply_draws(flat, draws[rows], self.augment.mean, self.augment.std)
            if self.erase is not None:
                flat = self._erased(flat, rows, keys)
            yield from flat.unflatten(0, (count, -1)).unbind(0)
            number += count

    def _erased(self, images, rows, keys):
        """Each image (n, C, S, S) erased by the draws of its place, `rows` (n,), or left as it is."""
        with torch.random.fork_rng(devices=[]):
            for i, row in enumerate(rows.tolist()):
                torch.default_generator.manual_seed(generator(*keys, row).initial_seed())
                images[i] = self.erase(images[i])
        return images

    def _mixed(self, images, labels, keys):
        """The images (B, C, S, S) of a crop and their targets, mixed with those before them in the batch.

        torchvision mixes each image with the one before it: the first of a process with the last of
        the process before, so that the batch is mixed as on one process.
        """
        if self.mix is None:
            return images, labels
        before = (self.process.rank - 1) % self.process.world_size
        last_image = dist.all_gather_rows(images[-1:])[before : before + 1]
        last_label = dist.all_gather_rows(labels[-1:])[before : before + 1]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator(self.seed, *keys).initial_seed())
            images, targets = self.mix(
                torch.cat([last_image, images]), torch.cat([last_label, labels])
            )
        return images[1:], targets[1:]


def _erasing(strength: Strength) -> Callable | None:
    if not strength.erasing:
        return None
    from torchvision.transforms import v2

    return v2.RandomErasing(strength.erasing, value="random", inplace=True)


def _mixing(strength: Strength, num_classes: int) -> Callable | None:
    """What mixes a batch with itself, None for nothing."""
    if not strength.mixup and not strength.cutmix:
        return None
    from torchvision.transforms import v2

    kinds = []
    if strength.mixup:
        kinds.append(v2.MixUp(alpha=strength.mixup, num_classes=num_classes))
    if strength.cutmix:
        kinds.append(v2.CutMix(alpha=strength.cutmix, num_classes=num_classes))
    return v2.RandomChoice(kinds) if len(kinds) > 1 else kinds[0]
