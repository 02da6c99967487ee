"""src.data.torchvision_layouts: the folders of torchvision's classes, made as their archives are."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from src.data.datasets import open_dataset


def write_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(path)


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """flowers-102 with 9 images: 1 to 4 of train, 5 and 6 of val, 7 to 9 of test."""
    folder = tmp_path / "flowers-102"
    for number in range(1, 10):
        write_image(folder / "jpg" / f"image_{number:05}.jpg", 20 * number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 1, 2, 3, 1, 2, 3]])})
    splits = {"trnid": [[4, 1, 2, 3]], "valid": [[5, 6]], "tstid": [[9, 7, 8]]}
    savemat(folder / "setid.mat", {name: np.array(ids) for name, ids in splits.items()})
    for name in ("imagelabels", "setid"):  # torchvision compares them with the published ones
        md5 = hashlib.md5((folder / f"{name}.mat").read_bytes()).hexdigest()
        key = "label" if name == "imagelabels" else name
        monkeypatch.setitem(datasets.Flowers102._file_dict, key, (f"{name}.mat", md5))
    return folder


def test_flowers_are_trained_on_train_and_val_and_tested_on_test(flowers):
    train, val = open_dataset(str(flowers)), open_dataset(str(flowers), "val")
    assert (len(train), len(val)) == (6, 3)
    assert train.labels.tolist() == [0, 0, 1, 2, 1, 2] and val.labels.tolist() == [2, 0, 1]
    assert train.file_name(0).endswith("image_00004.jpg")
    assert abs(int(train.load(0)[0, 0, 0]) - 80) < 4 and not train.same_files(val)


def test_a_folder_that_is_not_whole_is_refused(flowers):
    (flowers / "imagelabels.mat").unlink()
    with pytest.raises(ValueError, match="--data_path .*flowers-102.*Flowers102"):
        open_dataset(str(flowers))


def test_class_folders_of_such_a_name_are_class_folders(tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / "stanford_cars" / name / "1.jpg", 10)
    assert open_dataset(str(tmp_path / "stanford_cars")).classes == ["a", "b"]


def test_cars_have_their_splits_and_labels(tmp_path):
    folder = tmp_path / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    kind = np.dtype([("fname", object), ("class", object)])
    for split, place, classes in (
        ("train", folder / "devkit" / "cars_train_annos.mat", [1, 2, 2]),
        ("test", folder / "cars_test_annos_withlabels.mat", [2, 1]),
    ):
        rows = [(f"{i:05}.jpg", label) for i, label in enumerate(classes, 1)]
        savemat(place, {"annotations": np.array(rows, dtype=kind)})
        for name, label in rows:
            write_image(folder / f"cars_{split}" / name, 100 * label)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    train, val = open_dataset(str(folder)), open_dataset(str(folder), "val")
    assert train.labels.tolist() == [0, 1, 1] and val.labels.tolist() == [1, 0]
    assert abs(int(val.load(0)[0, 0, 0]) - 200) < 4


def test_cifar_is_read_from_its_batches(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    draws = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    pixels = {name: draws.integers(0, 256, (4, 3072), dtype=np.uint8) for name in names}
    for name in names:
        batch = {"data": pixels[name], "labels": [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcd")}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", None)
    train, val = open_dataset(str(folder)), open_dataset(str(folder), "val")
    assert (len(train), len(val), train.classes) == (20, 4, list("abcd"))
    expected = torch.from_numpy(pixels["data_batch_2"][1].reshape(3, 32, 32))
    assert torch.equal(train.load(5), expected) and train.labels.tolist() == [0, 1, 2, 3] * 5
    assert train.mean[0] == 0.4914
