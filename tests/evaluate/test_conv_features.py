"""Convolutional maps and ten crops: pooled maps, unscaled windows, ten crops of an image."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import ten_crop

from src.evaluate.conv_features import (
    ALEXNET,
    POOLING,
    VGG16,
    CentreRegionCrops,
    Pooling,
    conv_input,
    pool_map,
)
from src.evaluate.ten_crops import VIEWS, RandomTenCrops, TenCrops, ten_crop_forward
from src.labels.features import centre_crop
from src.nets.convnets import VGG16 as VGG16Network
from src.nets.convnets import AlexNet
from src.nets.resnet import build_model


class Noise:
    """A dataset of images of noise, of the sizes given."""

    def __init__(self, *sizes, channels=3):
        generator = torch.Generator().manual_seed(0)
        self.images = [
            torch.randint(256, (channels, *size), generator=generator, dtype=torch.uint8)
            for size in sizes
        ]
        self.name, self.labels, self.loaded = "noise", torch.arange(len(sizes)), 0

    def __len__(self):
        return len(self.images)

    def load(self, index):
        self.loaded += 1
        return self.images[index]


def windows(maps, kernel, padding, reduce):
    """Pooling written out: of kernel x kernel cells, kernel apart, around the map `padding` empty."""
    empty = -torch.inf if reduce is torch.amax else 0.0
    maps = F.pad(maps.double(), [padding] * 4, value=empty)
    starts = range(0, maps.shape[2] - kernel + 1, kernel)
    rows = [maps[:, :, y : y + kernel] for y in starts]
    cells = [[reduce(row[..., x : x + kernel], (2, 3)) for x in starts] for row in rows]
    return torch.stack([torch.stack(row, -1) for row in cells], -2)


@pytest.mark.parametrize("kind, reduce", [("max", torch.amax), ("average", torch.mean)])
@pytest.mark.parametrize(
    "pooling, side",
    [(Pooling(4, 3), 14), (Pooling(5, 3, 1), 13), (Pooling(10, 6, 3), 55), (Pooling(6, 4), 27)],
)
def test_a_map_of_224_px_is_pooled_by_the_published_windows(pooling, side, kind, reduce):
    maps = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side))
    found = pool_map(maps, pooling, kind)
    assert found.shape == (2, 3, pooling.cells, pooling.cells)
    expected = windows(maps, pooling.kernel, pooling.padding, reduce)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_maps_of_other_images_have_as_many_cells_or_stay_as_they_are():
    pooling, generator = Pooling(4, 3), torch.Generator().manual_seed(0)
    for side, cells in ((20, 4), (11, 4), (4, 4), (3, 3), (1, 1)):
        maps = torch.randn(1, 2, side, side, generator=generator)
        found = pool_map(maps, pooling, "max")
        assert found.shape == (1, 2, cells, cells), side
        assert torch.equal(found, maps) == (side <= 4)
        assert found.amax() == maps.amax() or (side == 20)
    found = pool_map(maps.expand(1, 2, 12, 3), pooling)
    assert found.shape == (1, 2, 4, 3)  # each side by itself


def test_windows_are_the_published_ones():
    assert [pooling.kernel for pooling in ALEXNET.values()] == [6, 4, 3, 3, 2]
    assert [pooling.padding for pooling in ALEXNET.values()] == [3, 0, 1, 1, 0]
    kernels = [VGG16[conv].kernel for conv in range(1, 14)]
    assert kernels == [18, 18, 14, 14, 9, 9, 9, 6, 6, 6, 3, 3, 3]
    sides = [224] * 2 + [112] * 2 + [56] * 3 + [28] * 3 + [14] * 3
    for side, pooling in zip(sides, (VGG16[conv] for conv in range(1, 14)), strict=True):
        assert (
            pooling.padding == 0 and (side - pooling.kernel) // pooling.kernel + 1 == pooling.cells
        )


PUBLISHED = {
    5: [9600, 9216, 9600, 9600, 9216],
    13: [9216, 9216, 8192, 8192, 9216, 9216, 9216, *[8192] * 6],
}


@pytest.mark.parametrize("network", [AlexNet, VGG16Network])
@pytest.mark.parametrize("sobel", [False, True])
@torch.no_grad()
def test_every_convolution_gives_the_published_number_of_features(network, sobel):
    torch.manual_seed(0)
    model = network(width=1 / 16, sobel=sobel, sobel_padding=2).eval()
    assert sorted(POOLING[model.num_convs]) == list(range(1, model.num_convs + 1))
    images = torch.randn(1, 3, 224, 224)
    for conv, expected in enumerate(PUBLISHED[model.num_convs], 1):
        features = conv_input(model, conv)(images)
        assert features.shape == (1, expected // 16), conv
        assert (features >= 0).all()  # after a ReLU


@torch.no_grad()
def test_the_map_is_that_after_the_batch_norm_and_the_relu_of_its_convolution():
    torch.manual_seed(0)
    model = VGG16Network(width=1 / 16).eval()
    images = torch.randn(2, 3, 64, 64)
    maps, convs = images, 0
    for layer in model.features:
        maps = layer(maps)
        convs += isinstance(layer, torch.nn.Conv2d)
        if convs == 4 and isinstance(layer, torch.nn.ReLU):
            break
    expected = F.adaptive_max_pool2d(maps, 8).flatten(1)  # 32 x 32 cells, 8 a side as published
    torch.testing.assert_close(conv_input(model, 4, "max")(images), expected)
    mean = F.adaptive_avg_pool2d(maps, 8).flatten(1)  # what the authors' code takes
    torch.testing.assert_close(conv_input(model, 4)(images), mean)


def test_other_networks_and_convolutions_are_refused():
    with pytest.raises(ValueError, match="--conv 3 is for AlexNet and VGG16.*--arch"):
        conv_input(build_model("resnet10", width=0.125), 3)
    with pytest.raises(ValueError, match="--conv 6 must be between 1 and 5"):
        conv_input(AlexNet(width=1 / 16), 6)


def test_unscaled_windows_are_cut_from_the_centre_and_drawn_by_epoch_and_index():
    dataset = Noise((64, 96), (48, 32))
    crops = CentreRegionCrops(dataset, 28, seed=5)
    assert crops.resize == 32
    places = set()
    for epoch in range(40):
        for index in range(2):
            (crop,), found = crops[epoch, index]
            assert crop.shape == (1, 3, 28, 28) and crop.dtype == torch.uint8 and found == index
            square = centre_crop(dataset.images[index], 32, 32, "bilinear")
            patches = square.unfold(1, 28, 1).unfold(2, 28, 1)  # (3, 5, 5, 28, 28)
            same = (patches == crop[0][:, None, None]).all(4).all(3).all(0)  # (5, 5)
            assert same.sum() == 1
            places.add((index, *same.nonzero()[0].tolist()))
    assert len(places) > 35 and {(0, 0), (4, 4)} <= {place[1:] for place in places}
    assert torch.equal(crops[3, 1][0][0], CentreRegionCrops(dataset, 28, seed=5)[3, 1][0][0])


def test_ten_crops_are_those_of_torchvision():
    dataset = Noise((40, 56), (32, 32), (64, 48))
    crops = TenCrops(dataset, 28)
    for index, image in enumerate(dataset.images):
        found = crops.load(index)
        assert found.shape == (VIEWS * 3, 28, 28)
        shape = [32 * side // min(image.shape[1:]) for side in image.shape[1:]]
        resized = F.interpolate(image[None], shape, mode="bilinear", antialias=True)[0]
        found, expected = found.unflatten(0, (VIEWS, 3)), torch.stack(ten_crop(resized, 28))
        same = (found[:, None] == expected).flatten(2).all(2)  # (10, 10): in another order
        assert same.any(0).all() and same.any(1).all()
        assert same[:5, :5].diagonal().all()  # first those that are not mirrored
    assert dataset.loaded == 3  # an image is decoded once
    with pytest.raises(ValueError, match="28 px"):
        TenCrops(dataset, 28, resize=20)


def test_random_ten_crops_depend_on_seed_and_index_alone_and_lie_in_the_scale():
    dataset = Noise((40, 60), (50, 50))
    crops = RandomTenCrops(dataset, 16, (0.1, 0.5), (1.0, 1.0), seed=3)
    first, second = crops.load(0), crops.load(1)
    again = RandomTenCrops(dataset, 16, (0.1, 0.5), (1.0, 1.0), seed=3)
    assert torch.equal(again.load(1), second) and torch.equal(again.load(0), first)
    views = first.unflatten(0, (VIEWS, 3))
    assert len({tuple(view.flatten().tolist()) for view in views}) == VIEWS
    dataset.images.append(dataset.images[0])
    assert not torch.equal(crops.load(2), first)  # the same image at another index
    other = RandomTenCrops(dataset, 16, (0.1, 0.5), (1.0, 1.0), seed=4)
    assert not torch.equal(other.load(0), first)
    ramp = Noise((40, 60))  # brighter to the right: a mirrored crop falls
    ramp.images[0] = torch.arange(60).mul(4).to(torch.uint8).expand(3, 40, 60)
    views = RandomTenCrops(ramp, 16, (0.1, 0.5), (1.0, 1.0), seed=3).load(0)
    rises = views.unflatten(0, (VIEWS, 3)).float().diff(dim=3).mean((1, 2, 3)) > 0
    assert 2 <= rises.sum() <= 8
    spans = views.unflatten(0, (VIEWS, 3))[:, 0, 0].float()
    widths = (spans.amax(1) - spans.amin(1)) / 4 * 16 / 15  # pixels of a crop
    areas = widths.square() / (40 * 60)
    assert areas.min() > 0.07 and areas.max() < 0.56


def test_each_crop_is_passed_through_the_network_by_itself():
    images = torch.randn(4, VIEWS * 3, 6, 6, generator=torch.Generator().manual_seed(0))
    found = ten_crop_forward(lambda x: x.mean((2, 3)))(images)  # (4, 10, 3)
    expected = images.unflatten(1, (VIEWS, 3)).mean((3, 4))
    torch.testing.assert_close(found, expected)
