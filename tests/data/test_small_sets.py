import hashlib

import numpy as np
import pytest
import torch
import torchvision

from src.data.datasets import NAMES, open_dataset
from src.data.small_sets import STATISTICS, TORCHVISION, read_small_set, split_evenly


def test_digits_are_split_the_same_way_in_every_run():
    from sklearn.datasets import load_digits

    train, train_labels, classes = read_small_set("digits", "train", "--data_path", "data")
    val, val_labels, _ = read_small_set("digits", "val", "--data_path", "data")
    assert train.shape == (1297, 1, 8, 8) and val.shape == (500, 1, 8, 8)
    assert train.dtype == torch.uint8 and train_labels.dtype == torch.int64
    assert classes == [str(i) for i in range(10)]
    whole = np.bincount(load_digits().target)
    assert np.abs(val_labels.bincount().numpy() - whole * 500 / 1797).max() < 1
    together = torch.cat([train, val]).flatten(1).numpy()
    expected = np.rint(load_digits().images.reshape(-1, 64) * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, together)) == sorted(map(bytes, expected))
    assert together.max() == 255
    digest = hashlib.sha256(bytes(val_labels.tolist()) + bytes(val.flatten().tolist())).hexdigest()
    assert digest.startswith("991e84a6bb946b26")


def test_statistics_of_digits_are_those_of_its_training_images():
    images = read_small_set("digits", "train", "--data_path", "data")[0].double() / 255
    mean, std = STATISTICS["digits"]
    assert abs(images.mean() - mean[0]) < 1e-4
    assert abs(images.std(correction=0) - std[0]) < 1e-4


def test_digits_are_gray_repeated_or_one_channel():
    colour, gray = open_dataset("digits"), open_dataset("digits", in_chans=1)
    assert colour.load(7).shape == (3, 8, 8) and gray.load(7).shape == (1, 8, 8)
    assert (colour.load(7) == gray.load(7)).all()
    assert len(colour.mean) == 3 and len(gray.std) == 1
    assert len(open_dataset("digits", "val")) == 500


def test_every_name_has_its_images_and_its_statistics():
    assert {*NAMES} == {"digits", *TORCHVISION} == STATISTICS.keys()


def test_even_split_is_exact_and_in_proportion():
    labels = np.repeat(np.arange(4), [50, 30, 19, 1])
    train, val = split_evenly(labels, 33, seed=0)
    assert len(val) == 33 and sorted([*train, *val]) == list(range(100))
    assert np.abs(np.bincount(labels[val], minlength=4) - [16.5, 9.9, 6.27, 0.33]).max() < 1
    assert not np.array_equal(val, split_evenly(labels, 33, seed=1)[1])


def test_digits_have_no_other_split():
    with pytest.raises(ValueError, match="--data_path digits has no split extra"):
        open_dataset("digits", "extra")


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_what_cannot_be_downloaded_is_one_sentence(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"--train {name} cannot be downloaded to the folder"):
        open_dataset(name, flag="--train", root=str(tmp_path / "file" / "below"))


def test_layouts_of_torchvision_become_nchw(tmp_path, monkeypatch):
    class Fake:
        classes = ["a", "b"]

        def __init__(self, root, download, **split):
            generator = np.random.default_rng(len(split))
            self.data = generator.integers(0, 256, type(self).shape, dtype=np.uint8)
            self.targets = [0, 1]

    for shape, channels in (((2, 32, 32, 3), 3), ((2, 28, 28), 1), ((2, 3, 96, 96), 3)):
        Fake.shape = shape
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
        images, labels, classes = read_small_set("cifar10", "val", "--data_path", str(tmp_path))
        side = 96 if shape[1] == 3 else shape[1]
        assert images.shape == (2, channels, side, side) and labels.tolist() == [0, 1]
        source = np.moveaxis(Fake(None, None, train=False).data, -1, 1) if shape[-1] == 3 else None
        assert source is None or np.array_equal(images.numpy(), source)


def test_unlabelled_part_of_stl10_has_no_labels(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, download, split):
            self.data = np.zeros((4, 3, 96, 96), np.uint8)
            self.labels = np.full(4, -1 if split == "unlabeled" else 2)

    monkeypatch.setattr(torchvision.datasets, "STL10", Fake)
    dataset = open_dataset("stl10_unlabeled", root=str(tmp_path))
    assert dataset.labels is None and dataset.classes is None
    assert open_dataset("stl10_unlabeled", "val", root=str(tmp_path)).labels.tolist() == [2] * 4
