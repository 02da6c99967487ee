"""visualize.py patches: axes, colours, foreground, and whole runs of vision transformers and ResNets."""

import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from src.nets.backbones import build_backbone
from src.pictures.patches import colours_of_patches, principal_axes

VIT = shlex.split("--device cpu --seed 3 --arch vit_tiny --depth 1 --width 0.34 --patch_size 8")


def draw(folder, *argv):
    words = ["patches", "--dump_path", folder, *argv]
    assert visualize.main([str(word) for word in words]) == 0
    return {path.name for path in folder.iterdir() if path.suffix == ".png"}


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for name, height in (("a", 40), ("b", 56)):
        pixels = np.random.default_rng(height).integers(0, 256, (height, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def test_axes_are_the_singular_vectors_of_the_centred_features():
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(50, 7, generator=draws) * torch.arange(1.0, 8.0)
    mean, axes = principal_axes(features, 3)
    _, _, expected = torch.linalg.svd(features.double() - features.double().mean(0))
    torch.testing.assert_close((axes * expected[:3].T).sum(0).abs(), torch.ones(3).double())
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(mean, features.double().mean(0))


def test_equal_features_have_one_colour_in_all_images_and_different_ones_do_not():
    kinds = torch.eye(4)[:, None] * torch.tensor([[4.0, 3.0, 2.0, 1.0]]).T[:, None]  # (4, 1, 4)
    first = kinds[torch.tensor([[0, 1, 2], [3, 0, 0]])].squeeze(2)  # (2, 3, 4)
    second = kinds[torch.tensor([[2, 2], [1, 3]])].squeeze(2)
    one, two = colours_of_patches([first, second])
    assert one.shape == (2, 3, 3) and two.shape == (2, 2, 3) and one.dtype == np.uint8
    assert np.array_equal(one[0, 0], one[1, 1]) and np.array_equal(one[0, 2], two[0, 0])
    assert len({tuple(x) for x in one.reshape(-1, 3).tolist()}) == 4


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_side_that_the_edges_are_not_on(sign):
    draws = torch.Generator().manual_seed(1)
    features = 0.1 * torch.randn(8, 8, 5, generator=draws)
    features[2:6, 2:6] += sign * torch.tensor([5.0, 4.0, 0, 0, 0])
    (colours,) = colours_of_patches([features], foreground=True)
    inside = np.zeros((8, 8), bool)
    inside[2:6, 2:6] = True
    assert (colours[~inside] == 0).all()
    assert len({tuple(x) for x in colours[inside].tolist()}) > 8


def test_patches_of_images_of_any_shape_are_drawn_by_any_network(tmp_path, images):
    found = draw(tmp_path / "vit", *VIT, "--image_path", images, "--image_size", 40)
    assert found == {"a.png", "b.png", "sheet.png"}
    with Image.open(tmp_path / "vit" / "b.png") as image:
        assert image.size == (40, 40)  # 46 x 40 px, cut to patches
        pixels = np.asarray(image)
    assert (pixels[:8, :8] == pixels[0, 0]).all() and (pixels[8, 8] != pixels[0, 0]).any()
    resnet = shlex.split("--arch resnet10 --width 0.25 --stem small --device cpu --image_size 40")
    assert draw(tmp_path / "resnet", *resnet, "--image_path", images) == found
    with Image.open(tmp_path / "resnet" / "a.png") as image:
        assert image.size == (48, 40)


def test_images_of_the_data_and_weights_of_a_file_are_taken(tmp_path):
    model = build_backbone("vit_tiny", depth=1, patch_size=4, img_size=16)
    torch.save({"teacher": model.state_dict()}, tmp_path / "dino.pth")
    words = ["--pretrained", tmp_path / "dino.pth", "--device", "cpu", "--num_images", 3]
    found = draw(tmp_path / "out", *words, "--foreground")
    assert len(found) == 4
    with Image.open(tmp_path / "out" / "image_000000.png") as image:
        assert image.size == (32, 32)  # twice the 16 px that its positions are for
