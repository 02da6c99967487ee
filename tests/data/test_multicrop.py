import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from src.data.datasets import EpochSampler, open_dataset
from src.data.multicrop import (
    MultiCropDataset,
    collate_crops,
    crop_and_resize,
    crop_generator,
    draw_window,
    multicrop_loader,
)
from src.labels.sampling import PlannedSampler

ROOT = Path(__file__).parents[2]
SWAV = {
    "num_crops": [2, 3],
    "size_crops": [12, 6],
    "min_scale_crops": [0.14, 0.05],
    "max_scale_crops": [1.0, 0.14],
}


def digits(**options):
    return MultiCropDataset(open_dataset("digits"), **{**SWAV, **options})


def photo(height, width, seed=0):
    """A smooth random image, (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def tensor(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


# ============ geometry ============


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(375, 500, (0.14, 1.0)), (375, 500, (0.05, 0.14)), (500, 100, (0.5, 1.0)), (32, 32, (0.3, 1))],
)
def test_windows_are_distributed_as_torchvisions(height, width, scale):
    ratio, num = (3 / 4, 4 / 3), 4000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(num)]
    ours = [draw_window(height, width, scale, ratio, crop_generator(0, 0, i)) for i in range(num)]
    theirs, ours = np.array(theirs, dtype=float), np.array(ours, dtype=float)
    for name, column in {
        "top": lambda x: x[:, 0],
        "left": lambda x: x[:, 1],
        "height": lambda x: x[:, 2],
        "width": lambda x: x[:, 3],
        "area": lambda x: x[:, 2] * x[:, 3],
        "log ratio": lambda x: np.log(x[:, 3] / x[:, 2]),
        "place": lambda x: x[:, 0] / np.maximum(height - x[:, 2], 1),
    }.items():
        a, b = np.sort(column(ours)), np.sort(column(theirs))
        grid = np.unique(np.concatenate([a, b]))
        distance = np.abs(
            np.searchsorted(a, grid, side="right") - np.searchsorted(b, grid, side="right")
        ).max()
        # Kolmogorov-Smirnov, two samples: exceeded once in 10,000 tries.
        assert distance / num < 2.23 * np.sqrt(2 / num), name


def test_windows_lie_within_the_image_and_the_ratio():
    for i in range(2000):
        generator = crop_generator(1, 2, i)
        height, width = generator.randint(1, 60), generator.randint(1, 60)
        top, left, h, w = draw_window(height, width, (0.05, 1.0), (3 / 4, 4 / 3), generator)
        assert 0 <= top and 0 <= left and 1 <= h and 1 <= w
        assert top + h <= height and left + w <= width


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 1), (1, 300)])
def test_images_that_no_window_fits_give_the_centre_as_torchvision(height, width):
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [0.75, 4 / 3])
    ours = draw_window(height, width, (0.9, 1.0), (0.75, 4 / 3), crop_generator(0, 0, 0))
    if theirs[2] > 0 and theirs[3] > 0:  # torchvision rounds a side of 1 pixel to 0
        assert ours == theirs


@pytest.mark.parametrize(
    ("size", "window"), [(24, (3, 5, 70, 90)), (60, (0, 10, 33, 29)), (9, (80, 99, 20, 1))]
)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resized_crop_is_pils_within_one_level(size, window, mode):
    pixels = photo(100, 120)
    top, left, height, width = window
    box = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    theirs = box.resize((size, size), Image.BILINEAR if mode == "bilinear" else Image.BICUBIC)
    ours = crop_and_resize(tensor(pixels), window, size, mode)
    assert ours.shape == (1, 3, size, size) and ours.dtype == torch.uint8
    difference = ours[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs)
    assert np.abs(difference).max() <= 1
    assert np.abs(difference).mean() < 0.1


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resized_crop_of_noise_is_pils_within_one_level(mode):
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    resample = Image.BILINEAR if mode == "bilinear" else Image.BICUBIC
    for size, side in ((30, 70), (70, 30)):
        theirs = np.asarray(Image.fromarray(noise[:side, :side]).resize((size, size), resample))
        ours = crop_and_resize(tensor(noise), (0, 0, side, side), size, mode)
        difference = ours[0].permute(1, 2, 0).numpy().astype(int) - theirs
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_channels_are_resized_one_like_the_other(channels):
    image = torch.randint(0, 256, (channels, 40, 30), dtype=torch.uint8)
    window = (2, 3, 31, 20)
    together = crop_and_resize(image, window, 16, "bilinear")[0]
    for c in range(channels):
        alone = crop_and_resize(image[c : c + 1].repeat(3, 1, 1), window, 16, "bilinear")[0, 0]
        assert (together[c].int() - alone.int()).abs().max() <= 1


# ============ the dataset ============


def test_item_has_one_tensor_a_resolution():
    crops, index = digits()[5]
    assert index == 5 and [tuple(x.shape) for x in crops] == [(2, 3, 12, 12), (3, 3, 6, 6)]
    assert all(x.dtype == torch.uint8 for x in crops)
    crops, _ = MultiCropDataset(open_dataset("digits", in_chans=1), **SWAV)[5]
    assert crops[0].shape == (2, 1, 12, 12)


def test_draws_depend_on_seed_epoch_and_index_alone():
    dataset, other = digits(), digits(seed=32)
    first = dataset[(3, 7)][0]
    torch.rand(3), np.random.rand(3)
    assert all(map(torch.equal, first, dataset[(3, 7)][0]))
    assert all(map(torch.equal, dataset[7][0], dataset[(np.int64(0), np.int64(7))][0]))
    assert not torch.equal(first[0], dataset[(4, 7)][0][0])
    assert not torch.equal(first[0], other[(3, 7)][0][0])
    assert not torch.equal(first[0][0], first[0][1])  # nor are two crops the same


def test_a_place_draws_the_crops_so_that_an_image_drawn_twice_is_seen_in_two_ways():
    dataset = digits()
    crops, index = dataset[(3, 7, 1200)]
    again = dataset[(np.int64(3), np.int64(7), np.int64(1200))]
    assert index == 7 and again[1] == 7 and all(map(torch.equal, crops, again[0]))
    assert all(map(torch.equal, dataset[(3, 7, 7)][0], dataset[(3, 7)][0]))
    for item in [(3, 7, 1201), (4, 7, 1200), (3, 7), (3, 1200)]:
        assert not torch.equal(crops[0], dataset[item][0][0]), item


def test_generators_of_neighbours_are_unrelated():
    def first(seed, epoch, index):
        return crop_generator(seed, epoch, index).random()

    by_index = np.array([first(31, 0, i) for i in range(4000)])
    by_epoch = np.array([first(31, e, 0) for e in range(4000)])
    by_seed = np.array([first(s, 0, 0) for s in range(4000)])
    for draws in (by_index, by_epoch, by_seed):
        assert abs(draws.mean() - 0.5) < 0.02 and abs(draws.std() - 12**-0.5) < 0.01
        assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.07
    assert abs(np.corrcoef(by_index, by_epoch)[0, 1]) < 0.07


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_crops": [12]}, "--size_crops has 1"),
        ({"num_crops": [2, 0]}, "--nmb_crops 2 0 must be at least 1"),
        ({"size_crops": [12, 0]}, "--size_crops 12 0"),
        ({"min_scale_crops": [0.0, 0.05]}, "--min_scale_crops 0.0"),
        ({"max_scale_crops": [1.0, 0.01]}, "--max_scale_crops 0.01"),
        ({"max_scale_crops": [1.5, 0.14]}, "--max_scale_crops 1.5"),
        ({"interpolation": "nearest"}, "interpolation nearest"),
        ({name: [] for name in SWAV}, "one value a resolution"),
    ],
)
def test_crops_that_make_no_sense_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        digits(**options)


# ============ the loader ============


def epoch_batches(num_workers, epoch=2, start=0):
    dataset = digits()
    sampler = EpochSampler(len(dataset), 32, 0, 1, seed=5)
    sampler.set_epoch(epoch, start)
    return list(multicrop_loader(dataset, sampler, 32, num_workers, "cpu"))


@pytest.mark.slow
def test_batches_are_the_same_for_any_number_of_workers():
    alone, helped = epoch_batches(0), epoch_batches(2)
    assert len(alone) == len(helped) == 1297 // 32
    for (crops, indices), (other_crops, other_indices) in zip(alone, helped, strict=True):
        assert torch.equal(indices, other_indices)
        assert all(map(torch.equal, crops, other_crops))
    assert [tuple(x.shape) for x in alone[0][0]] == [(32, 2, 3, 12, 12), (32, 3, 3, 6, 6)]
    dataset = digits()
    for row, index in enumerate(alone[1][1].tolist()):
        assert torch.equal(alone[1][0][1][row], dataset[(2, index)][0][1])


@pytest.mark.slow
def test_batches_go_on_from_the_middle_as_if_never_stopped():
    whole, rest = epoch_batches(0), epoch_batches(0, start=30)
    assert len(rest) == len(whole) - 30
    for (crops, indices), (other_crops, other_indices) in zip(whole[30:], rest, strict=True):
        assert torch.equal(indices, other_indices)
        assert all(map(torch.equal, crops, other_crops))


@pytest.mark.slow
def test_epochs_differ_with_persistent_workers():
    dataset = digits()
    sampler = EpochSampler(len(dataset), 400, 0, 1, seed=5)
    loader = multicrop_loader(dataset, sampler, 400, 1, "cpu")
    batches = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        batches.append(next(iter(loader)))
    assert torch.equal(batches[0][1], batches[2][1])
    assert torch.equal(batches[0][0][0], batches[2][0][0])
    assert not torch.equal(batches[0][1], batches[1][1])


def test_a_planned_epoch_has_the_same_batches_for_any_number_of_workers_and_from_its_middle():
    dataset, order = digits(), np.random.default_rng(0).integers(0, 9, (4, 8))
    batches = {}
    for workers, start in [(0, 0), (1, 0), (0, 2)]:
        sampler = PlannedSampler(8, 1, 2)
        sampler.set_epoch(5, order, start)
        batches[workers, start] = list(multicrop_loader(dataset, sampler, 8, workers, "cpu"))
    for other, start in [((1, 0), 0), ((0, 2), 2)]:
        for batch, expected in zip(batches[other], batches[0, 0][start:], strict=True):
            assert torch.equal(batch[1], expected[1])
            assert all(map(torch.equal, batch[0], expected[0]))
    crops, indices = batches[0, 0][3]
    assert indices.tolist() == order[3].tolist()
    at = (3 * 2 + 1) * 8 + 5
    assert torch.equal(crops[0][5], dataset[(5, int(order[3, 5]), at)][0][0])


def test_collation_keeps_pixels_together_and_values_in_place():
    samples = [([torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)], i) for i in (4, 9)]
    (crops,), indices = collate_crops(samples)
    assert indices.tolist() == [4, 9]
    assert torch.equal(crops, torch.stack([samples[0][0][0], samples[1][0][0]]))
    assert crops.permute(0, 1, 3, 4, 2).is_contiguous()


SCRIPT = textwrap.dedent("""
    import os, signal, sys
    from src.data.datasets import EpochSampler, open_dataset
    from src.data.multicrop import MultiCropDataset, multicrop_loader

    if __name__ == "__main__":
        dataset = MultiCropDataset(open_dataset("digits"), [1], [8], [0.5], [1.0])
        sampler = EpochSampler(len(dataset), 8, 0, 1, seed=0)
        batches = iter(multicrop_loader(dataset, sampler, 8, 2, "cpu"))
        next(batches)
        caught = []
        for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
            signal.signal(getattr(signal, name), lambda number, frame: caught.append(number))
            os.killpg(os.getpgrp(), getattr(signal, name))
        print(len(caught), sum(1 for _ in batches), flush=True)
        if sys.argv[1] == "raise":
            raise RuntimeError("the end")
""")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups")
@pytest.mark.parametrize("end", ["return", "raise"])
def test_workers_outlive_signals_to_the_group_but_not_the_main_process(tmp_path, end):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", end],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert out.split() == ["3", str(1297 // 8 - 1)]
    assert process.returncode == (1 if end == "raise" else 0)
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        os.killpg(process.pid, 0)
