"""src.evaluate.splits: which validation images can be classified by the training images at all."""

import logging
import tarfile

import pytest
import torch
from PIL import Image

from src.data.datasets import open_dataset
from src.evaluate.probe import open_validation
from src.evaluate.splits import open_labelled_splits, open_splits


def make_split(folder, classes):
    """One image for each name of a class, as often as it is given."""
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(folder / name / f"{i}.png")


@pytest.fixture
def other_names(tmp_path):
    make_split(tmp_path / "train", ["n00", "n01", "n02"])
    make_split(tmp_path / "val", ["0", "1", "2"])
    return tmp_path


SENTENCE = r"none of the classes .*0, 1, 2.* is one of .*n00, n01, n02.*_path"


def test_splits_without_a_class_in_common_are_refused_in_one_sentence(other_names):
    train, val = str(other_names / "train"), str(other_names / "val")
    for paths in ((str(other_names),), ("digits", train, val)):
        with pytest.raises(ValueError, match=SENTENCE) as error:
            open_labelled_splits(*paths)
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=SENTENCE):
            open_splits(*(*paths, None, None)[:3], 3, "train")
    with pytest.raises(ValueError, match=f"{SENTENCE}.*--knn_freq 0"):
        open_validation(open_dataset(str(other_names)), str(other_names), 3)


def test_some_classes_that_training_lacks_are_a_warning_with_names_and_share(tmp_path, caplog):
    make_split(tmp_path / "train", ["cat", "dog", "fox"])
    make_split(tmp_path / "val", ["cat", "ant", "ant", "dog", "yak", "cat", "cat", "dog"])
    words = (
        "3 of 8 validation images (37.5 %) are of 2 classes that no training image has (ant, yak)"
    )
    for opened in (
        lambda: open_labelled_splits(str(tmp_path))[1],
        lambda: open_labelled_splits("", str(tmp_path / "train"), str(tmp_path / "val"))[1],
        lambda: open_validation(open_dataset(str(tmp_path)), str(tmp_path), 3),
    ):
        caplog.clear()
        val = opened()
        assert [record.levelno for record in caplog.records if words in record.message] == [
            logging.WARNING
        ]
        assert val.labels.bincount().tolist() == [3, 2, 0, 2, 1]  # cat, dog, fox, ant, yak


def test_equal_classes_say_nothing_and_classes_without_validation_images_do_not_matter(
    tmp_path, caplog
):
    make_split(tmp_path / "train", ["cat", "dog", "fox"])
    make_split(tmp_path / "val", ["dog", "cat"])
    _, val = open_labelled_splits(str(tmp_path))
    assert val.labels.tolist() == [0, 1]
    open_validation(open_dataset(str(tmp_path)), str(tmp_path), 3)
    open_labelled_splits("digits")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_classes_of_the_test_split_are_those_of_training_and_validation_together(tmp_path, caplog):
    make_split(tmp_path / "train", ["cat", "dog"])
    make_split(tmp_path / "val", ["cat", "emu"])
    make_split(tmp_path / "test", ["dog", "fox", "emu"])
    both, test = open_splits(str(tmp_path), None, None, 3, "trainval")
    assert both.labels.tolist() == [0, 1, 0, 2] and both.classes == ["cat", "dog", "emu"]
    assert test.labels.tolist() == [1, 2, 3]  # dog, emu, fox: in the order of the files
    assert "1 of 3 validation images" in caplog.text and "(fox)" in caplog.text


def shard(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    for i, label in enumerate(labels):
        Image.new("RGB", (8, 8)).save(path.parent / f"{i}.png")
        (path.parent / f"{i}.cls").write_text(label)
    with tarfile.open(path, "w") as archive:
        for i in range(len(labels)):
            for suffix in ("png", "cls"):
                archive.add(path.parent / f"{i}.{suffix}", arcname=f"{i}.{suffix}")
                (path.parent / f"{i}.{suffix}").unlink()


def test_names_in_shards_are_compared_as_names_in_training_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shard(tmp_path / "data" / "train" / "a.tar", ["cat", "dog", "fox"])
    shard(tmp_path / "data" / "val" / "a.tar", ["fox", "dog"])
    data_path = str(tmp_path / "data")
    _, val = open_labelled_splits(data_path)
    assert val.labels.tolist() == [2, 1]
    val = open_validation(open_dataset(data_path), data_path, 3)
    assert torch.equal(val.labels, torch.tensor([2, 1]))
