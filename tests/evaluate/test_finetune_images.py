"""src.evaluate.finetune_images: what is drawn depends on no process, and is torchvision's; multi-crop."""

import numpy as np
import pytest
import torch

from src import dist
from src.data.augment import Augment
from src.evaluate.finetune_images import RandAugmentedCrops, Strength, TrainingImages
from src.evaluate.linear_features import ONLY_FLIP
from tests.gloo import run_ranks

CROPS = {
    "num_crops": [1, 2],
    "size_crops": [8, 4],
    "min_scale_crops": [0.3, 0.2],
    "max_scale_crops": [1.0, 0.5],
}
ALL = Strength(randaugment=2, erasing=0.5, mixup=0.8, cutmix=1.0, repeats=3)


class Images:
    """24 images of noise in 4 classes."""

    def __init__(self):
        draws = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (24, 3, 10, 12), dtype=torch.uint8, generator=draws)
        self.labels, self.groups = torch.arange(24) % 4, None

    def __len__(self):
        return 24

    def load(self, index):
        return self.images[index]


def batches_of(process, batch_size, strength=None, crops=CROPS):
    return TrainingImages(
        Images(),
        crops,
        Augment([0.5] * 3, [0.25] * 3, **ONLY_FLIP, flip_prob=0.5),
        num_classes=4,
        batch_size=batch_size,
        process=process,
        seed=31,
        workers=0,
        strength=strength,
    )


def test_labels_are_those_of_the_images_for_each_crop():
    for crops, targets in batches_of(dist.init("cpu"), 6)(0, 0):
        assert [tuple(x.shape) for x in crops] == [(6, 3, 8, 8), (6, 3, 4, 4), (6, 3, 4, 4)]
        assert targets.shape == (18,) and torch.equal(targets[:6], targets[12:])


def test_batches_go_on_in_the_middle_of_an_epoch():
    images = batches_of(dist.init("cpu"), 6, ALL)
    whole = list(images(1, 0))
    assert len(whole) == 4
    for (crops, targets), (again, same) in zip(whole[2:], images(1, 2), strict=True):
        assert all(map(torch.equal, crops, again)) and torch.equal(targets, same)
    assert not torch.equal(whole[0][0][0], next(images(2, 0))[0][0])


def _batches(rank, world_size, total, mixup):
    process = dist.Process(rank, world_size, rank, "test", torch.device("cpu"))
    strength = Strength(randaugment=2, erasing=0.5, repeats=3, cutmix=1.0, mixup=mixup)
    found = batches_of(process, total // world_size, strength)(0, 0)
    return [
        ([x.numpy() for x in crops], targets.unflatten(0, (3, -1)).numpy())
        for crops, targets in found
    ]


@pytest.mark.slow
def test_two_processes_have_the_batches_of_one_mixed_across_them():
    one = _batches(0, 1, 6, 0.8)
    halves = run_ranks(_batches, 2, 6, 0.8)
    for (crops, targets), *parts in zip(one, *halves, strict=True):
        for i, crop in enumerate(crops):
            both = np.concatenate([part[0][i] for part in parts])
            np.testing.assert_allclose(both, crop, atol=1e-6)
        np.testing.assert_allclose(np.concatenate([p[1] for p in parts], 1), targets, atol=1e-6)
        assert targets.shape == (3, 6, 4)
        np.testing.assert_allclose(targets.sum(2), 1, atol=1e-5)


def test_mixup_mixes_images_and_labels_with_those_before_by_one_share():
    plain = next(batches_of(dist.init("cpu"), 6)(0, 0))
    crops, targets = next(batches_of(dist.init("cpu"), 6, Strength(mixup=1.0))(0, 0))
    labels = torch.nn.functional.one_hot(plain[1][:6], 4).float()
    others = labels.roll(1, 0)
    differ = (labels != others).any(1)
    share = (targets[:6] * labels).sum(1)[differ][0]
    assert 0 < share < 1
    torch.testing.assert_close(targets[:6], share * labels + (1 - share) * others)
    image = plain[0][0]
    torch.testing.assert_close(crops[0], share * image + (1 - share) * image.roll(1, 0))


def test_cutmix_replaces_a_rectangle_and_its_share_of_the_label():
    plain = next(batches_of(dist.init("cpu"), 6)(0, 0))
    crops, targets = next(batches_of(dist.init("cpu"), 6, Strength(cutmix=1.0))(0, 0))
    image, before = plain[0][0], plain[0][0].roll(1, 0)
    is_own = (crops[0] == image).all(1)  # (B, S, S)
    assert (is_own | (crops[0] == before).all(1)).all()
    labels = torch.nn.functional.one_hot(plain[1][:6], 4).float()
    share = is_own[0].float().mean()
    torch.testing.assert_close(targets[:6], share * labels + (1 - share) * labels.roll(1, 0))


def test_erasing_replaces_a_rectangle_by_noise_in_as_many_crops_as_asked():
    plain, erased = (
        torch.cat([c[0] for c, _ in batches_of(dist.init("cpu"), 6, s)(0, 0)])
        for s in (None, Strength(erasing=0.5))
    )
    changed = (plain != erased).any(1).flatten(1).sum(1)  # pixels
    assert 5 <= (changed > 0).sum() <= 19 and changed.max() <= 8 * 8 * 0.5
    every = [c[0] for c, _ in batches_of(dist.init("cpu"), 6, Strength(erasing=1.0))(0, 0)]
    assert ((plain != torch.cat(every)).flatten(1).any(1)).float().mean() > 0.9


def test_an_epoch_of_repeats_has_a_third_of_the_images_three_times_with_other_draws():
    crop = {name: values[:1] for name, values in CROPS.items()}
    images = batches_of(dist.init("cpu"), 6, Strength(repeats=3), crop)
    rows = list(images.sampler)
    assert len({index for _, index, _ in rows}) == 8 and len(rows) == 24
    assert [place for *_, place in rows] == list(range(24))
    crops, targets = next(images(0, 0))
    indices = [index for _, index, _ in rows[:6]]
    assert (
        indices[:2] == indices[2:4] == indices[4:] and indices[0] != indices[1]
    )  # neighbours differ
    assert targets[0] == targets[2] == targets[4] and not torch.equal(crops[0][0], crops[0][2])


def test_randaugment_is_torchvisions_and_leaves_the_random_state():
    from torchvision.transforms import v2

    before = torch.get_rng_state()
    dataset = RandAugmentedCrops(Images(), 2, 27, fill=[127.5] * 3, **CROPS, seed=5)
    first, again, other = dataset[(0, 3)], dataset[(0, 3)], dataset[(1, 3)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, first[0], again[0])) and not torch.equal(first[0][0], other[0][0])
    assert isinstance(dataset.change, v2.RandAugment) and first[0][1].dtype == torch.uint8
    assert (dataset.change.num_ops, dataset.change.magnitude) == (2, 27)
    # Nine tenths of the largest change, which is what DeiT's 9 of 10 means.
    shears = dataset.change._AUGMENTATION_SPACE["ShearX"][0](31, 8, 8)
    assert float(shears[27]) == pytest.approx(0.9 * 0.3)
