"""src.nets.sobel: golden values, the derivatives of a grey image, and one RGB convolution for them."""

import numpy as np
import pytest
import torch
from torch import nn

from src.nets.sobel import Sobel, sobel_to_rgb


def images(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(x, padding):
    """Differences across the middle, weighted 1 2 1 along it, of the mean colour; float64."""
    grey = np.pad(x.mean(1), ((0, 0), (padding, padding), (padding, padding)))
    across = grey[:, :, :-2] - grey[:, :, 2:]
    down = grey[:, :-2] - grey[:, 2:]
    across = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    down = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    return np.stack([across, down], 1)


@pytest.mark.parametrize(
    ("arrays", "name", "padding"),
    [
        ("deepcluster", "sobel_deepcluster", 1),
        ("deepcluster", "sobel_deepcluster_vgg16", 1),
        ("deepercluster", "sobel_deepercluster_with_pad2", 2),
        ("deepercluster", "sobel_deepercluster_nopad", 0),
    ],
)
def test_the_filters_of_both_papers_are_golden(golden, arrays, name, padding):
    arrays = golden(arrays)
    x, expected = torch.from_numpy(arrays["sobel_x"]), arrays[name]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = Sobel(padding)(x.contiguous(memory_format=memory_format))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_they_are_the_derivatives_of_the_mean_colour(padding, scale):
    x = images(2, 3, 9, 14) * scale
    expected = reference(x.numpy().astype(np.float64), padding)
    assert expected.shape == (2, 2, 9 + 2 * padding - 2, 14 + 2 * padding - 2)
    np.testing.assert_allclose(Sobel(padding)(x).numpy(), expected, rtol=1e-5, atol=3e-6 * scale)


def test_nothing_is_trained_and_the_names_are_the_published_ones():
    sobel = Sobel(2)
    assert not any(parameter.requires_grad for parameter in sobel.parameters())
    assert list(sobel.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x = images(1, 3, 6, 6).requires_grad_()
    sobel(x).square().sum().backward()  # and gradients pass through
    assert x.grad.abs().sum() > 0 and sobel[1].weight.grad is None


def test_low_precision_does_not_round_a_difference_away():
    x = 2 + images(2, 3, 16, 16) / 100  # steps of bfloat16 are 0.016 here
    expected = Sobel()(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = Sobel()(x)
    assert torch.equal(found, expected)
    assert Sobel()(x.bfloat16()).dtype == torch.float32
    assert Sobel().double()(x).dtype == torch.float64


# ============ one convolution for RGB images ============


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "own"), [(11, 4, 2), (3, 1, 1), (7, 2, 3), ((3, 5), (2, 1), (0, 2))]
)
def test_a_convolution_of_rgb_images_is_the_same_inside_the_image(kernel, stride, own, padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, kernel, stride, own).double()
    x = images(2, 3, 37, 42, dtype=torch.float64)
    rgb = sobel_to_rgb(conv, padding)
    assert rgb.weight.shape[1:] == (3, *(k + 2 for k in conv.kernel_size))
    sobel = Sobel(padding).double()
    sobel[0].weight.fill_(1 / 3)  # in float64
    with torch.no_grad():
        expected, found = conv(sobel(x)), rgb(x)
    assert found.shape == expected.shape
    inside = torch.ones(found.shape[2:], dtype=torch.bool)
    for axis, size in enumerate(x.shape[2:]):
        first = torch.arange(found.shape[2 + axis]) * rgb.stride[axis] - rgb.padding[axis]
        fits = (first >= 0) & (first + rgb.kernel_size[axis] <= size)
        inside &= fits[:, None] if axis == 0 else fits[None]
    assert inside.sum() > 20
    torch.testing.assert_close(found[..., inside], expected[..., inside], rtol=1e-12, atol=1e-12)
    border = (found - expected)[..., ~inside].abs()
    if padding == 2:
        assert border.max() < 1e-12
    elif max(conv.padding):
        assert border.max() > 0.01  # as its docstring says


def test_the_new_convolution_is_trained_where_and_as_the_old_one():
    for bias in (True, False):
        conv = nn.Conv2d(2, 4, 3, bias=bias).to(torch.bfloat16)
        rgb = sobel_to_rgb(conv, 1)
        assert rgb.weight.dtype == torch.bfloat16 and rgb.weight.requires_grad
        assert rgb.bias is None if not bias else torch.equal(rgb.bias, conv.bias)


def test_what_cannot_be_done_is_one_sentence():
    with pytest.raises(ValueError, match="--sobel_padding 3 must be 1"):
        Sobel(3)
    for conv in (nn.Conv2d(3, 4, 3), nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(2, 4, 3, dilation=2)):
        with pytest.raises(ValueError, match="must have 2 input channels, 1 group and no dilation"):
            sobel_to_rgb(conv, 1)
