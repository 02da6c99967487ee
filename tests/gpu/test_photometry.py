"""Photometry on the device equals that of each sample alone on the CPU, for the same draws."""

import pytest
import torch

from src.data.augment import Augment, apply_draws, draw_parameters
from tests.data.test_augment import MEAN, OFF, STD, SWAV, generator, random_batch

pytestmark = pytest.mark.gpu

# Of normalised values, whose standard deviation is about 0.225 of the range: 0.006 levels of 255.
TOLERANCE = 1e-4
ALWAYS = {"jitter_prob": 1.0}
OPERATIONS = {
    "none": {},
    "flip": {"flip_prob": 1.0},
    "brightness": {"color_jitter": (0.8, 0.0, 0.0, 0.0), **ALWAYS},
    "contrast": {"color_jitter": (0.0, 0.8, 0.0, 0.0), **ALWAYS},
    "saturation": {"color_jitter": (0.0, 0.0, 0.8, 0.0), **ALWAYS},
    "hue": {"color_jitter": (0.0, 0.0, 0.0, 0.5), **ALWAYS},
    "grayscale": {"grayscale_prob": 1.0},
    "blur": {"blur_prob": 1.0, "blur_sigma": (0.1, 2.0)},
    "solarize": {"solarize_prob": 1.0},
    "swav": SWAV,
    "dino": {**SWAV, "blur_prob": [1.0, 0.1, 0.5, 0.5, 0.5, 0.5], "solarize_prob": 0.2},
}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_crops_equal_those_of_each_sample_alone_on_the_cpu(device, operation, channels):
    options = {"jitter_prob": 0.0, "blur_sigma": (0.1, 2.0), **OFF, **OPERATIONS[operation]}
    batch = random_batch(batch_size=5, counts=(2, 4), sizes=(48, 32), channels=channels)
    augment = Augment(MEAN[:channels], STD[:channels], **options)
    crops = augment([images.to(device) for images in batch], generator(3))
    assert all(crop.device.type == device.type for crop in crops)
    draws = draw_parameters(generator(3), num_crops=6, batch_size=5, **options)
    samples = [images[:, i] for images in batch for i in range(images.shape[1])]
    samples = [sample for crop in samples for sample in crop]  # crop-major, as the draws
    for i, found in enumerate(sample for crop in crops for sample in crop):
        expected = apply_draws(
            samples[i][None], draws[i : i + 1], mean=augment.mean, std=augment.std
        )
        torch.testing.assert_close(found.cpu(), expected[0], rtol=0, atol=TOLERANCE)
