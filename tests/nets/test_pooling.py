"""Pooled features: class token and generalised mean, several scales, the last map."""

import pytest
import torch
import torch.nn.functional as F

from src.nets.pooling import class_and_gem, forward_of_feature, forward_of_map, multi_scale
from src.nets.pretrained import open_pretrained


def test_class_token_and_generalised_mean_are_the_published_descriptor(golden):
    arrays = golden("retrieval")
    found = class_and_gem(torch.from_numpy(arrays["gem_tokens"]), float(arrays["gem_p"]))
    expected = torch.from_numpy(arrays["gem_out"])
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_features_of_several_scales_are_the_published_ones_image_by_image(golden):
    arrays = golden("retrieval")
    images = torch.from_numpy(arrays["ms_x"])
    found = multi_scale(lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1))(images)
    expected = torch.from_numpy(arrays["ms_out_single"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # Divided by the norm of the whole batch, as published, they would be those of no single image.
    batch = torch.from_numpy(arrays["ms_out_batch"])
    assert (batch - expected).abs().max() > 0.01


def test_class_token_and_gem_of_a_network_leave_registers_out():
    network = open_pretrained("", "vit_micro", patch_size=4, image_size=16, num_registers=2)
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        found = forward_of_feature(network, "cls_gem", 4.0)(images)  # (2, 192)
        cls = forward_of_feature(network, "cls")(images)
        gem = forward_of_feature(network, "gem", 4.0)(images)
    torch.testing.assert_close(found, torch.cat([cls, gem], 1), atol=1e-5, rtol=1e-5)
    resnet = open_pretrained("", "resnet10", stem="small", width=0.125)
    with pytest.raises(ValueError, match="--feature cls_gem is the class token.*use --feature gem"):
        forward_of_feature(resnet, "cls_gem")


@pytest.mark.parametrize(
    "arch, options, size, shape",
    [
        ("vit_micro", {"patch_size": 4, "image_size": 16}, (8, 21), (96, 2, 5)),
        ("resnet10", {"stem": "small", "width": 0.125}, (16, 24), (64, 2, 3)),
        ("vgg16", {"sobel": True, "width": 0.125}, (64, 96), (64, 4, 6)),
        ("alexnet", {"sobel": False, "width": 0.125}, (127, 159), (32, 7, 9)),
        pytest.param("vgg11_bn", {}, (64, 96), (512, 4, 6), marks=pytest.mark.slow),  # torchvision
    ],
)
def test_the_last_map_is_that_before_any_pooling(arch, options, size, shape):
    network = open_pretrained("", arch, **options)
    with torch.no_grad():
        found = forward_of_map(network)(torch.randn(2, 3, *size))
    assert found.shape == (2, *shape)
    if arch == "resnet10":
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            means = forward_of_map(network)(images).mean((2, 3))
            torch.testing.assert_close(means, network.model(images))


def test_patches_lie_in_the_map_where_they_are_in_the_image():
    network = open_pretrained("", "vit_micro", patch_size=4, image_size=16)
    images = torch.randn(1, 3, 8, 12)
    with torch.no_grad():
        found = forward_of_map(network)(images)  # (1, 96, 2, 3)
        tokens = network.model.get_intermediate_layers(images)[0]
    torch.testing.assert_close(found[0, :, 1, 2], tokens[0, 1 + 5])


def test_a_network_without_a_known_map_is_refused():
    network = open_pretrained("", "resnet10", stem="small", width=0.125)
    network.arch = "timm:resnet10t"
    with pytest.raises(ValueError, match="R-MAC needs the last map.*--protocol dino"):
        forward_of_map(network)
