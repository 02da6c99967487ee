"""Whole images: their sizes are the published ones; features are the same however they were computed."""

import functools
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.datasets import open_dataset
from src.evaluate.whole_images import (
    batches_of_chunks,
    fit_inside,
    longer_side,
    store_features,
    to_square,
)
from src.labels.row_file import RowFile
from src.run.stop import StopSignal
from tests.gloo import run_ranks
from tests.runs import signal_handlers  # noqa: F401, used by name


@pytest.fixture(autouse=True)
def handlers(signal_handlers):  # noqa: F811
    """Those of before, after every test."""


def noise(height, width, channels=3):
    draws = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=draws)


def as_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


# ============ sizes ============
@pytest.mark.parametrize("height, width, shape", [(30, 47, (14, 22)), (47, 30, (22, 14))])
def test_an_image_is_fitted_into_a_square_as_published_and_never_enlarged(height, width, shape):
    image = noise(height, width)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((22, 22), Image.Resampling.LANCZOS)
    found = fit_inside(image, 0, side=22)
    assert found.shape == (3, *shape) and torch.equal(found, as_tensor(picture))
    assert torch.equal(fit_inside(image, 0, side=64), image)


def test_an_image_becomes_a_square_as_published():
    image = noise(30, 47)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((20, 20), Image.BICUBIC)
    assert torch.equal(to_square(image, 0, side=20), as_tensor(picture))


def test_the_longer_side_is_as_asked_for_and_a_box_is_cut_out_after_the_resize():
    image = noise(30, 40)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((80, 60), Image.BILINEAR)
    assert torch.equal(longer_side(image, 0, side=80), as_tensor(picture))
    boxes = [(0, 0, 40, 30), (5.2, 10.0, 20.0, 29.8)]
    cut = longer_side(image, 1, side=80, boxes=boxes)
    assert torch.equal(cut, as_tensor(picture)[:, 20:60, 10:40])
    assert torch.equal(longer_side(image, 0, side=None), image)
    assert torch.equal(longer_side(image, 1, side=None, boxes=boxes), image[:, 10:30, 5:20])


@pytest.mark.parametrize("channels", [1, 2])
def test_other_numbers_of_channels_are_resized_one_by_one(channels):
    image = noise(30, 47, channels)
    for change in (fit_inside, to_square, longer_side):
        found = change(image, 0, side=20)
        of_first = change(image[:1].expand(3, -1, -1), 0, side=20)
        assert len(found) == channels and torch.equal(found[0], of_first[0])


# ============ features ============
def test_batches_begin_where_they_would_without_any_missing():
    everything = batches_of_chunks(range(11), chunk=4, batch_size=2)
    assert everything == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert batches_of_chunks([4, 5, 6, 7, 8, 9, 10], chunk=4, batch_size=2) == everything[2:]
    assert batches_of_chunks(range(5), chunk=4, batch_size=3) == [[0, 1, 2], [3], [4]]


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(11):
        pixels = noise(20 + number, 30 - number).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:02}.png")
    return tmp_path / "photos"


WEIGHTS = torch.linspace(-1, 1, 15).view(3, 5)


def forward(images):
    return images.mean((2, 3)) @ WEIGHTS


def store(folder, photos, forward=forward, stop=None):
    """features.npy of the photos in chunks of 3."""
    folder.mkdir(exist_ok=True)
    stop = stop or StopSignal()
    dataset = open_dataset(str(photos))
    rows = RowFile(folder, "features", len(dataset), 5, chunk=3)
    store_features(
        rows,
        dataset,
        functools.partial(fit_inside, side=16),
        forward,
        stop,
        mean=dataset.mean,
        std=dataset.std,
        device=torch.device("cpu"),
    )
    return rows.read().numpy()


def test_features_are_those_of_each_image_on_its_own(tmp_path, photos):
    found = store(tmp_path / "out", photos)
    dataset = open_dataset(str(photos))
    mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
    for number, row in enumerate(found):
        pixels = fit_inside(dataset.load(number), number, 16).double() / 255
        expected = ((pixels.mean((1, 2)) - mean) / std) @ WEIGHTS.double()
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_after_an_interruption_only_the_missing_chunks_are_computed_and_the_bits_are_the_same(
    tmp_path, photos
):
    whole = store(tmp_path / "whole", photos)
    seen = []

    def stopped(images):
        seen.append(1)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(images)

    stop = StopSignal()
    store(tmp_path / "out", photos, stopped, stop)
    assert stop.agreed() and len(seen) == 5
    again = []
    found = store(tmp_path / "out", photos, lambda x: again.append(1) or forward(x))
    assert len(again) == 11 - 3  # the first chunk was whole
    np.testing.assert_array_equal(found, whole)


def test_an_image_that_cannot_be_read_has_nan_and_others_their_features(tmp_path, photos):
    whole = store(tmp_path / "whole", photos)
    (photos / "04.png").write_bytes(b"no image")
    found = store(tmp_path / "out", photos)
    assert np.isnan(found[4]).all()
    np.testing.assert_array_equal(np.delete(found, 4, 0), np.delete(whole, 4, 0))


def test_features_that_are_not_finite_are_refused(tmp_path, photos):
    with pytest.raises(ValueError, match="not finite"):
        store(tmp_path / "out", photos, lambda images: forward(images) * torch.inf)


def store_on_rank(rank, world_size, folder, photos):
    return store(folder, photos)


def test_two_processes_write_the_same_bits_as_one(tmp_path, photos):
    one = store(tmp_path / "one", photos)
    (tmp_path / "two").mkdir()
    for found in run_ranks(store_on_rank, 2, tmp_path / "two", photos):
        np.testing.assert_array_equal(found, one)
