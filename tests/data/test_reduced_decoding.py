"""--reduced_decoding: JPEGs at a half, a quarter or an eighth of their size where all crops are small."""

import importlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from sklearn.datasets import load_sample_images

from src.data import images, multicrop
from src.data.datasets import EpochSampler, open_dataset
from src.data.images import BrokenImage, decode_image, decode_reduced
from src.data.multicrop import (
    MultiCropDataset,
    crop_and_resize,
    crop_generator,
    draw_window,
    multicrop_loader,
    reduced_window,
    reduction,
)
from src.evaluate.splits import Joined, Part
from tests.data.test_shards import write_shard

CROPS = {
    "num_crops": [2, 3],
    "size_crops": [96, 48],
    "min_scale_crops": [0.14, 0.05],
    "max_scale_crops": [1.0, 0.14],
}


def encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def texture(height, width, seed=0):
    """A smooth random image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def pair(path, **options):
    """Crops of a folder without and with the option."""
    dataset = open_dataset(str(path))
    options = {**CROPS, **options}
    plain = MultiCropDataset(dataset, **options)
    return plain, MultiCropDataset(dataset, reduced_decoding=True, **options)


def are_equal(crops, others):
    return all(map(torch.equal, crops, others))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """scikit-learn's photographs of 640x427, half as large again and cut to an odd size."""
    folder = tmp_path_factory.mktemp("photographs")
    for i, pixels in enumerate(load_sample_images().images):
        enlarged = Image.fromarray(pixels).resize((961, 641), Image.LANCZOS)
        enlarged.save(folder / f"{i}.jpg", quality=90)
    return folder


# ============ one image ============
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_pixel_stands_for_a_square_of_the_files_also_of_odd_sizes(scale, options, in_chans):
    data = encode(texture(101, 203), quality=95, **options)
    found = decode_reduced(data, in_chans, lambda height, width: scale)
    assert (found.height, found.width, found.scale) == (101, 203, scale)
    assert found.pixels.shape == (in_chans, -(-101 // scale), -(-203 // scale))
    whole = decode_image(data, in_chans).double()
    rows, columns = 101 // scale, 203 // scale  # without the squares that the edge cuts
    squares = whole[:, : rows * scale, : columns * scale].unflatten(1, (-1, scale))
    means = squares.unflatten(3, (-1, scale)).mean((2, 4))
    difference = (found.pixels[:, :rows, :columns] - means).abs()
    assert difference.mean() < 1 and difference.max() < 16
    shifted = found.pixels[:, :rows, 1:columns] - means[:, :, :-1]
    assert shifted.abs().mean() > 2 * difference.mean()  # by one pixel, it would be seen


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_are_reduced_too(mode):
    data = encode(texture(64, 96).convert(mode), quality=95)
    whole = decode_image(data, 3).double().unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).mean((2, 4))
    found = decode_reduced(data, 3, lambda height, width: 2).pixels
    assert (found - whole).abs().mean() < 1


def test_other_files_and_channels_are_decoded_whole_and_nobody_is_asked():
    def asked(height, width):
        raise AssertionError

    image = texture(64, 96)
    for kind in ("PNG", "BMP", "TIFF", "WebP"):
        found = decode_reduced(encode(image, kind), 3, asked)
        assert torch.equal(found.pixels, decode_image(encode(image, kind), 3))
        assert found[1:] == (64, 96, 1)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((5, 7, 4), np.uint8))
    assert decode_reduced(buffer.getvalue(), 4, asked)[1:] == (5, 7, 1)


def test_a_jpeg_that_pillow_does_not_reduce_is_decoded_whole(monkeypatch):
    data = encode(texture(64, 96))
    monkeypatch.setattr(JpegImageFile, "draft", lambda *_: None)
    found = decode_reduced(data, 3, lambda height, width: 2)
    assert found.scale == 1 and torch.equal(found.pixels, decode_image(data, 3))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_jpeg_beyond_pillows_limit_is_reduced_as_without_the_option(monkeypatch):
    monkeypatch.setattr(images, "JPEG_PIXELS", 100)
    data = encode(Image.new("RGB", (20, 20)))
    assert decode_reduced(data, 3, lambda height, width: 4)[1:] == (10, 10, 1)


def test_what_is_broken_at_full_size_is_broken_at_reduced_size_and_nothing_else():
    def is_broken(decode, *args):
        try:
            decode(*args)
            return False
        except BrokenImage:
            return True

    generator, broken = np.random.default_rng(0), []
    for options in ({}, {"progressive": True}):
        whole = encode(texture(45, 61), **options)
        damaged = [whole[:length] for length in (*range(0, len(whole), 40), *range(-9, 0))]
        for _ in range(40):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), 4):
                data[place] = generator.integers(0, 256)
            damaged.append(bytes(data))
        for data in damaged:
            broken.append(is_broken(decode_image, data, 3))
            for scale in (2, 8):
                found = is_broken(decode_reduced, data, 3, lambda height, width, s=scale: s)
                assert found == broken[-1]
    assert 0.2 < np.mean(broken) < 0.95


# ============ the scale ============
@pytest.mark.parametrize(
    "windows, sizes, scale",
    [
        ([[(0, 0, 448, 448)]], [224], 2),
        ([[(0, 0, 447, 500)]], [224], 2),  # of 223.5 pixels, which are rounded to 224
        ([[(0, 0, 446, 500)]], [224], 1),
        ([[(0, 0, 500, 446)]], [224], 1),
        ([[(1, 0, 447, 448)]], [224], 2),
        ([[(0, 0, 896, 896)]], [224], 4),
        ([[(0, 0, 4000, 3000)]], [224], 8),
        ([[(0, 0, 896, 896), (0, 0, 448, 896)]], [224], 2),  # the smallest window counts
        ([[(0, 0, 896, 896)], [(9, 9, 300, 300)]], [224, 96], 2),  # of each resolution
        ([[(0, 0, 896, 896)], [(9, 9, 150, 300)]], [224, 96], 1),
        ([[(0, 0, 375, 500)]], [224], 1),
    ],
)
def test_the_scale_is_the_largest_that_enlarges_no_crop(windows, sizes, scale):
    assert reduction(windows, sizes) == scale
    for size, same_size in zip(sizes, windows, strict=True):
        assert all(
            min(reduced_window(window, scale)[2:]) >= size or scale == 1 for window in same_size
        )


def test_windows_lie_within_the_reduced_image_and_move_by_half_a_pixel_at_most():
    for i in range(500):
        generator = crop_generator(0, 0, i)
        height, width = generator.randint(8, 90), generator.randint(8, 90)
        window = draw_window(height, width, (0.05, 1.0), (3 / 4, 4 / 3), generator)
        for scale in (1, 2, 4, 8):
            top, left, h, w = reduced_window(window, scale)
            assert 0 <= top and top + h <= -(-height // scale)
            assert 0 <= left and left + w <= -(-width // scale)
            edges = np.array([top, left, top + h, left + w])
            exact = np.array([*window[:2], window[0] + window[2], window[1] + window[3]]) / scale
            assert np.abs(edges - exact).max() <= 0.5
        assert reduced_window(window, 1) == window


# ============ crops ============
def test_without_the_option_crops_are_cut_from_the_whole_image(photographs, monkeypatch):
    plain, _ = pair(photographs)
    monkeypatch.setattr(plain.dataset, "load_reduced", None)
    generator = crop_generator(31, 3, 1)
    for crops, size, scale in zip(plain[3, 1][0], [96, 48], plain.scales, strict=True):
        for crop in crops:
            image = decode_image((photographs / "1.jpg").read_bytes(), 3)
            window = draw_window(641, 961, scale, (3 / 4, 4 / 3), generator)
            assert torch.equal(crop, crop_and_resize(image, window, size, "bilinear")[0])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_of_photographs_differ_by_two_levels_of_255_on_average(photographs, interpolation):
    plain, reduced = pair(photographs, interpolation=interpolation)
    differences = []
    for epoch in range(12):
        for index in range(2):
            crops, others = plain[epoch, index][0], reduced[epoch, index][0]
            assert [x.shape for x in others] == [x.shape for x in crops]
            for same_size, others_of_size in zip(crops, others, strict=True):
                difference = (same_size.double() - others_of_size).abs()
                differences += difference.mean((1, 2, 3)).tolist()
    assert 0.5 < np.mean(differences) < 2.5 and max(differences) < 8


def test_the_same_windows_are_drawn_with_the_same_random_numbers(photographs, monkeypatch):
    drawn = []

    def record(height, width, scale, ratio, generator):
        window = draw_window(height, width, scale, ratio, generator)
        drawn[-1].append((height, width, window, generator.getstate()))
        return window

    monkeypatch.setattr(multicrop, "draw_window", record)
    for crops in pair(photographs):
        drawn.append([])
        for item in [(0, 0), (0, 1), (5, 0, 40), 1]:
            crops[item]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4 * 5


def test_images_that_no_crop_is_much_smaller_than_are_the_same_to_the_last_bit(tmp_path):
    for i, kind in enumerate(["jpg", "png", "bmp"]):
        size = (100, 130) if kind == "jpg" else (300, 400)
        texture(*size, seed=i).save(tmp_path / f"{i}.{kind}")
    plain, reduced = pair(tmp_path)
    for index in range(3):
        assert are_equal(plain[2, index][0], reduced[2, index][0])
    for options in ({}, {"in_chans": 1}):
        digits = open_dataset("digits", **options)  # no files
        crops = {**CROPS, "size_crops": [2, 1]}
        reduced = MultiCropDataset(digits, reduced_decoding=True, **crops)
        assert are_equal(MultiCropDataset(digits, **crops)[5][0], reduced[5][0])


def test_a_broken_jpeg_is_replaced_by_the_next_and_by_its_windows(photographs, tmp_path):
    data = (photographs / "0.jpg").read_bytes()
    (tmp_path / "0.jpg").write_bytes(data[: len(data) // 2])
    texture(700, 900).save(tmp_path / "1.jpg")
    plain, reduced = pair(tmp_path)
    crops, index = reduced[1, 0, 0]
    assert index == 0 and reduced.dataset.broken == plain.dataset.broken != []
    assert are_equal(crops, reduced[1, 1, 0][0])
    difference = [
        (x.double() - y).abs().mean() for x, y in zip(crops, plain[1, 0, 0][0], strict=True)
    ]
    assert 0 < max(difference) < 6


def test_shards_lists_and_parts_of_data_give_the_crops_of_the_folder(photographs, tmp_path):
    _, reduced = pair(photographs)
    files = sorted(photographs.iterdir())
    write_shard(tmp_path / "a.tar", [(file.name, file.read_bytes()) for file in files])
    (tmp_path / "images.txt").write_text("".join(f"{file}\n" for file in files))
    shards = open_dataset(str(tmp_path / "a.tar"), root=str(tmp_path / "cache"))
    listed = open_dataset(str(tmp_path / "images.txt"))
    listed.labels = torch.tensor([0, 1])
    part, joined = Part(listed, [1]), Joined(listed, listed)
    for dataset, index in ((shards, 1), (listed, 1), (part, 0), (joined, 3)):
        crops = MultiCropDataset(dataset, reduced_decoding=True, **CROPS)
        assert are_equal(crops[4, index, 1][0], reduced[4, 1, 1][0])


def test_batches_are_the_same_with_workers_and_from_the_middle(photographs):
    _, reduced = pair(photographs)
    found = {}
    for workers, start in [(0, 0), (1, 0), (0, 1)]:
        sampler = EpochSampler(2, 1, 0, 1, seed=5)
        sampler.set_epoch(3, start)
        found[workers, start] = list(multicrop_loader(reduced, sampler, 1, workers, "cpu"))
    for other, start in [((1, 0), 0), ((0, 1), 1)]:
        for batch, expected in zip(found[other], found[0, 0][start:], strict=True):
            assert torch.equal(batch[1], expected[1]) and are_equal(batch[0], expected[0])


# ============ scripts ============
class Reached(Exception):
    pass


@pytest.mark.parametrize(
    "script",
    ["swav", "dino", "deepclusterv2", "selav2", "simclr", "deepcluster", "deepercluster", "rotnet"],
)
def test_scripts_hand_the_flag_to_their_crops(script, tmp_path, monkeypatch):
    def crops(dataset, **options):
        raise Reached(options["reduced_decoding"])

    script = importlib.import_module(f"main_{script}")
    assert script.get_parser().get_default("reduced_decoding") is False
    monkeypatch.setattr(script, "MultiCropDataset", crops)
    argv = ["--device", "cpu", "--dump_path", str(tmp_path), "--reduced_decoding"]
    with pytest.raises(Reached, match="True"):
        script.main(argv)
