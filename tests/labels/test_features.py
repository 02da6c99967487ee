"""Features and their files: the published geometry, order, every size of dataset, processes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from src.evaluate.feature_files import dump_features, load_features
from src.labels import features
from src.labels.features import centre_crop, extract_features, raw_pixels
from tests.gloo import run_ranks

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


class Images:
    """A dataset in memory: image i is noise of its own, seeded by i."""

    name = "noise"

    def __init__(self, num, height=12, width=10, channels=3):
        self.num, self.shape = num, (channels, height, width)

    def __len__(self):
        return self.num

    def load(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(256, self.shape, generator=generator, dtype=torch.uint8)


def flatten(images):
    return images.flatten(1)


def smooth_picture(height, width):
    noise = np.random.default_rng(0).integers(0, 256, (height // 16 + 2, width // 16 + 2, 3))
    return Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "height, width", [(373, 500), (500, 375), (300, 300), (90, 181), (641, 427)]
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_crop_is_that_of_pil_and_torchvision(height, width, interpolation):
    transforms = pytest.importorskip("torchvision.transforms")
    picture = smooth_picture(height, width)
    mode = transforms.InterpolationMode(interpolation)
    published = transforms.Compose([transforms.Resize(256, mode), transforms.CenterCrop(224)])
    expected = np.asarray(published(picture)).astype(int)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    found = centre_crop(image, 224, 256, interpolation).permute(1, 2, 0).numpy().astype(int)
    assert found.shape == (224, 224, 3)
    difference = np.abs(found - expected)
    assert difference.mean() < 0.02 and difference.max() <= 2  # of 255


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 2, 9000), (4, 9000, 1), (13, 40, 30), (3, 24, 24)]
)
def test_any_shape_and_number_of_channels_gives_the_size_asked_for(shape):
    crop = centre_crop(torch.full(shape, 7, dtype=torch.uint8), 24, 24)
    assert crop.shape == (shape[0], 24, 24) and (crop == 7).all()


def test_an_image_of_the_size_is_left_as_it_is():
    image = Images(1, 24, 24).load(0)
    assert torch.equal(centre_crop(image, 24, 24), image)


def test_the_middle_is_taken_of_a_very_long_image():
    image = torch.zeros(1, 10, 1000, dtype=torch.uint8)
    image[:, :, 495:505] = 200
    assert (centre_crop(image, 10, 10) == 200).all()


@pytest.mark.parametrize("size, resize", [(224, 256), (96, 110), (32, 32), (24, 24), (95, 95)])
def test_the_shorter_side_is_resized_as_published_and_small_crops_take_all(
    size, resize, monkeypatch
):
    seen = []

    def record(image, *geometry):
        seen.append(geometry)
        return centre_crop(image, *geometry)

    monkeypatch.setattr(features, "centre_crop", record)
    extract_features(flatten, Images(1), size, MEAN, STD, "cpu")
    assert seen == [(size, resize, "bicubic")]


@pytest.mark.parametrize(
    "num, batch_size, num_workers", [(1, 256, 0), (7, 3, 0), (7, 3, 2), (6, 3, 9)]
)
def test_features_are_those_of_each_image_alone_in_order(num, batch_size, num_workers):
    dataset = Images(num)
    found, indices = extract_features(
        flatten, dataset, 10, MEAN, STD, "cpu", batch_size=batch_size, num_workers=num_workers
    )
    assert indices.tolist() == list(range(num)) and found.dtype == torch.float32
    for i in range(num):
        image = centre_crop(dataset.load(i), 10, 10).permute(1, 2, 0).double() / 255
        expected = ((image - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).flatten()
        np.testing.assert_allclose(found[i].numpy(), expected.numpy(), atol=1e-5)


def test_no_image_gives_no_rows_but_the_width():
    layer = torch.nn.Linear(300, 4)
    found, indices = extract_features(
        lambda x: layer(x.flatten(1)), Images(0), 10, MEAN, STD, "cpu", precision="bf16"
    )
    assert found.shape == (0, 4) and found.dtype == torch.float32 and indices.shape == (0,)


def test_features_carry_no_gradient_and_come_in_float32_from_low_precision():
    layer = torch.nn.Linear(300, 4)
    found, _ = extract_features(
        lambda x: layer(x.flatten(1)), Images(3), 10, MEAN, STD, "cpu", precision="bf16"
    )
    full, _ = extract_features(lambda x: layer(x.flatten(1)), Images(3), 10, MEAN, STD, "cpu")
    assert found.dtype == torch.float32 and not found.requires_grad and not found.is_inference()
    assert not torch.equal(found, full)
    torch.testing.assert_close(found, full, atol=0.05, rtol=0.05)


def test_a_crop_larger_than_the_resized_image_is_named():
    with pytest.raises(ValueError, match="crop of 24 px .* not 20"):
        extract_features(flatten, Images(1), 24, MEAN, STD, "cpu", resize=20)


def test_progress_tells_rate_and_times(caplog, monkeypatch):
    monkeypatch.setattr(features, "LOG_SECONDS", 0.0)
    with caplog.at_level("INFO"):
        extract_features(flatten, Images(5), 10, MEAN, STD, "cpu", batch_size=2)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in lines] == [
        f"features of noise: {n} of 5 images" for n in (2, 4, 5)
    ]
    assert all(word in lines[0] for word in ("images/s", "data", "compute", "ETA"))


def test_raw_pixels_are_pixels_between_0_and_1_at_most_32_px():
    found, indices = raw_pixels(Images(3, 8, 8), batch_size=2)
    assert found.shape == (3, 192) and indices.tolist() == [0, 1, 2]
    np.testing.assert_allclose(found[2].numpy() * 255, Images(3, 8, 8).load(2).flatten(), atol=1e-4)
    assert raw_pixels(Images(1, 100, 60))[0].shape == (1, 3 * 32 * 32)
    assert raw_pixels(Images(1, 12, 10, channels=1), size=5)[0].shape == (1, 25)


# ============ processes and files ============

SETTINGS = {"arch": "resnet18", "checkpoint": "runs/a/checkpoint.pth", "size": 10}


def _extract_and_dump(rank, world_size, num, folder):
    found, indices = extract_features(flatten, Images(num), 10, MEAN, STD, "cpu", batch_size=2)
    dump_features(folder, "train", found, indices * 2, SETTINGS)
    loaded, labels, stored = load_features(folder, "train", {"arch": "resnet18"})
    assert stored == SETTINGS
    assert torch.equal(loaded, found) and torch.equal(labels, indices * 2)
    return found.numpy(), indices.numpy()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num", [1, 9])
def test_the_shares_of_all_ranks_are_the_dataset_in_order_also_in_the_file(
    tmp_path, num, world_size
):
    shares = run_ranks(_extract_and_dump, world_size, num, str(tmp_path))
    sizes = [len(indices) for _, indices in shares]
    assert max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(np.concatenate([i for _, i in shares]), np.arange(num))
    expected, _ = extract_features(flatten, Images(num), 10, MEAN, STD, "cpu")
    np.testing.assert_array_equal(np.concatenate([f for f, _ in shares]), expected.numpy())
    # another number of processes reads the same
    loaded, labels, _ = load_features(tmp_path, "train", SETTINGS)
    assert torch.equal(loaded, expected) and labels.tolist() == list(range(0, 2 * num, 2))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train.json", "train_features.npy", "train_labels.npy"}
    np.testing.assert_array_equal(np.load(tmp_path / "train_features.npy"), expected.numpy())


def test_features_of_other_settings_are_neither_overwritten_nor_loaded(tmp_path):
    found, labels = torch.rand(4, 3), torch.arange(4)
    dump_features(tmp_path, "train", found, labels, SETTINGS)
    dump_features(tmp_path, "train", found + 1, labels, SETTINGS)  # the same again: replaced
    other = {**SETTINGS, "arch": "resnet50"}
    with pytest.raises(ValueError, match="--dump_features .* arch resnet18, not resnet50"):
        dump_features(tmp_path, "train", found, labels, other)
    with pytest.raises(ValueError, match="--load_features .* arch resnet18, not resnet50"):
        load_features(tmp_path, "train", other)
    assert torch.equal(load_features(tmp_path, "train", SETTINGS)[0], found + 1)


def test_what_is_not_there_or_half_written_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--load_features .* no val features"):
        load_features(tmp_path, "val", {})
    dump_features(tmp_path, "val", torch.rand(4, 3), torch.arange(4), SETTINGS)
    (tmp_path / "val.json").unlink()  # written last: without it the rest does not count
    with pytest.raises(FileNotFoundError, match="no val features"):
        load_features(tmp_path, "val", {})
    (tmp_path / "val.json").write_text(json.dumps(SETTINGS))
    content = (tmp_path / "val_features.npy").read_bytes()
    (tmp_path / "val_features.npy").write_bytes(content[:-20])
    with pytest.raises(ValueError, match="val_features.npy"):
        load_features(tmp_path, "val", {})


def _dump_into_a_file(rank, world_size, folder):
    try:
        dump_features(folder, "train", torch.rand(2, 3), torch.arange(2), SETTINGS)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_folder_that_cannot_be_made_stops_all_ranks(tmp_path, world_size):
    path = tmp_path / "file"
    path.write_text("")
    for message in run_ranks(_dump_into_a_file, world_size, str(path)):
        assert "--dump_features" in message
