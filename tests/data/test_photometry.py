import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps

from src.data import photometry

LEVEL = 1 / 255
FACTORS = (0.2, 0.6, 1.0, 1.4, 1.8)
TURNS = (-0.5, -0.2, -0.13, -0.01, 0.0, 0.04, 0.1, 0.2, 0.5)
SIGMAS = (0.1, 0.2, 0.35, 0.5, 0.8, 1.0, 1.4, 1.5, 1.75, 2.0)


def noise(seed=0, side=48):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def smooth(seed=0, side=48):
    return np.asarray(Image.fromarray(noise(seed, 7)).resize((side, side), Image.BICUBIC))


def extremes():
    """Gray, black, white, pure colours and near-gray, in 8 by 8 squares."""
    colours = [(0, 0, 0), (255, 255, 255), (127, 127, 127), (128, 128, 128), (255, 0, 0)]
    colours += [(0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
    colours += [(100, 101, 100), (0, 0, 1), (254, 255, 255), (200, 100, 100), (3, 200, 200)]
    colours.append((100, 200, 100))
    return np.array(colours, np.uint8).reshape(4, 4, 3).repeat(8, axis=0).repeat(8, axis=1)


IMAGES = {"noise": noise(), "smooth": smooth(), "extremes": extremes()}


def as_float(pixels):
    """(H, W, 3) uint8 to (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255


def ours(name, pixels, *values):
    x = as_float(pixels)
    getattr(photometry, name)(x, *values)
    assert torch.isfinite(x).all() and x.min() >= -1e-6 and x.max() <= 1 + 1e-6
    return x


def value(*numbers):
    return torch.tensor(numbers, dtype=torch.float32).view(1, -1, 1, 1)


def peaks(turn):
    return value(*photometry.hue_peaks(np.array([turn]))[0])


def kernel(sigma):
    return value(*photometry.blur_kernels(np.array([sigma]))[0])


def mean_difference(a, b):
    return float((a - b).abs().mean())


@pytest.mark.parametrize("image", sorted(IMAGES))
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factor_operations_agree_with_pil_and_torchvision(name, factor, image):
    pixels = IMAGES[image]
    result = ours(name, pixels, value(factor))
    theirs = getattr(TF, f"adjust_{name}")
    assert mean_difference(result, theirs(as_float(pixels), factor)) < 0.05 * LEVEL
    assert mean_difference(result, as_float(theirs(Image.fromarray(pixels), factor))) < LEVEL


@pytest.mark.parametrize("image", sorted(IMAGES))
@pytest.mark.parametrize("turn", TURNS)
def test_hue_agrees_with_torchvision_and_pil(turn, image):
    pixels = IMAGES[image]
    result = ours("hue", pixels, peaks(turn))
    assert (result - TF.adjust_hue(as_float(pixels), turn)).abs().max() < 1e-5
    theirs = as_float(TF.adjust_hue(Image.fromarray(pixels), turn))
    assert mean_difference(result, theirs) < 1.8 * LEVEL
    # PIL's hue has 256 steps, and torchvision hands it trunc(255 * turn) of them.
    steps = int(turn * 255) / 256
    assert mean_difference(ours("hue", pixels, peaks(steps)), theirs) < LEVEL


def test_hue_keeps_gray_and_the_extremes_of_each_pixel():
    gray = np.repeat(noise()[..., :1], 3, axis=-1)
    assert (ours("hue", gray, peaks(0.17)) - as_float(gray)).abs().max() < 1e-6
    before, after = as_float(noise()), ours("hue", noise(), peaks(0.17))
    assert (before.amax(1) - after.amax(1)).abs().max() < 1e-6
    assert (before.amin(1) - after.amin(1)).abs().max() < 1e-6


@pytest.mark.parametrize("image", sorted(IMAGES))
def test_grayscale_and_solarize_agree_with_pil_and_torchvision(image):
    pixels = IMAGES[image]
    picture = Image.fromarray(pixels)
    gray = ours("grayscale", pixels)
    assert mean_difference(gray, as_float(TF.to_grayscale(picture, 3))) < LEVEL
    assert mean_difference(gray, TF.rgb_to_grayscale(as_float(pixels), 3)) < 0.05 * LEVEL
    solarized = ours("solarize", pixels)
    assert (solarized - as_float(ImageOps.solarize(picture))).abs().max() < 1e-6
    assert (solarized - TF.solarize(as_float(pixels), 0.5)).abs().max() < 1e-6


@pytest.mark.parametrize("sigma", SIGMAS)
def test_blur_agrees_with_pil_and_on_smooth_images_with_torchvision(sigma):
    for image, pixels in IMAGES.items():
        theirs = as_float(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))
        result = ours("blur", pixels, kernel(sigma))
        bound = 1.1 if image == "noise" and sigma < 0.15 else 1.0  # PIL rounds six times
        assert mean_difference(result, theirs) < bound * LEVEL
    pixels = smooth(side=96)
    theirs = TF.gaussian_blur(as_float(pixels), [23, 23], [sigma, sigma])
    assert mean_difference(ours("blur", pixels, kernel(sigma)), theirs) < LEVEL


@pytest.mark.parametrize("sigma", SIGMAS)
def test_blur_kernel_has_unit_mass_and_the_variance_asked_for(sigma):
    half = photometry.blur_kernels(np.array([sigma]))[0].astype(np.float64)
    distance = np.arange(len(half))
    assert half[0] + 2 * half[1:].sum() == pytest.approx(1, abs=1e-6)
    assert 2 * (half * distance**2).sum() == pytest.approx(sigma**2, rel=1e-4)
    assert (half >= 0).all() and (np.diff(half) <= 0).all()


def test_blur_kernels_of_a_batch_are_those_of_each():
    sigmas = np.array([0.0, 0.1, 1.0, 2.0, 5.0])
    together = photometry.blur_kernels(sigmas)
    assert together[0].tolist() == [1.0] + [0.0] * (together.shape[1] - 1)
    for sigma, row in zip(sigmas, together, strict=True):
        alone = photometry.blur_kernels(np.array([sigma]))[0]
        assert np.allclose(row[: len(alone)], alone, atol=1e-7) and not row[len(alone) :].any()


def test_blur_continues_the_edge_and_takes_tiny_images():
    flat = np.full((5, 5, 3), 77, np.uint8)
    assert (ours("blur", flat, kernel(2.0)) - as_float(flat)).abs().max() < 1e-6
    assert ours("blur", noise(0, 1), kernel(2.0)).shape == (1, 3, 1, 1)


def test_samples_of_a_batch_have_their_own_values():
    pictures = [noise(i) for i in range(3)]
    batch = torch.cat([as_float(pixels) for pixels in pictures])
    for name, values in {
        "brightness": [value(f) for f in (0.3, 1.0, 1.7)],
        "contrast": [value(f) for f in (0.3, 1.0, 1.7)],
        "saturation": [value(f) for f in (0.3, 1.0, 1.7)],
        "hue": [peaks(f) for f in (-0.2, 0.0, 0.15)],
        "blur": [kernel(f) for f in (1.5, 2.0, 1.7)],
    }.items():
        together = batch.clone()
        getattr(photometry, name)(together, torch.cat(values))
        for i, pixels in enumerate(pictures):
            assert (together[i] - ours(name, pixels, values[i])[0]).abs().max() < 1e-6


def test_contrast_without_colour_is_about_the_mean_of_all_values():
    gray = torch.rand(2, 1, 9, 9)
    expected = TF.adjust_contrast(gray, 0.5)
    photometry.contrast(gray, value(0.5))
    assert (gray - expected).abs().max() < 1e-6
    many = torch.rand(2, 5, 9, 9)
    mean = many.mean(dim=(1, 2, 3), keepdim=True)
    expected = (mean + 1.5 * (many - mean)).clamp(0, 1)
    photometry.contrast(many, value(1.5))
    assert (many - expected).abs().max() < 1e-6


def test_flip_mirrors_left_and_right():
    assert torch.equal(ours("flip", noise()), TF.hflip(as_float(noise())))
