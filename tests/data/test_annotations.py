"""src.data.annotations: Places205 and iNaturalist 2018 as they are distributed, COCO's format as a list."""

import json

import pytest

from src.data.datasets import open_dataset
from src.evaluate.splits import open_labelled_splits
from tests.data.test_datasets import values, write_image
from tests.test_transfer import write_inat18, write_places205


def test_inaturalist_is_known_by_its_annotations_and_its_classes_by_their_names(tmp_path):
    write_inat18(tmp_path)
    train, val = open_labelled_splits(str(tmp_path))
    assert (len(train), len(val)) == (12, 6)
    assert train.classes == ["Aves rara", "Fungi rufi", "Insecta una"]
    for dataset in (train, val):  # the images are as bright as the numbers of their classes say
        brightness = [dataset.load(i).float().mean().item() for i in range(len(dataset))]
        order = {"Fungi rufi": 0, "Insecta una": 1, "Aves rara": 2}
        for value, label in zip(brightness, dataset.labels.tolist(), strict=True):
            assert round(value / 80) == order[dataset.classes[label]]


def test_places_is_known_by_its_lists_without_a_header(tmp_path):
    for place in ("", "trainvalsplit_places205"):
        folder = tmp_path / (place or "flat")
        write_places205(folder, place)
        train, val = open_labelled_splits(str(folder))
        assert (len(train), len(val)) == (12, 6)
        assert train.labels.tolist() == [0, 1, 2] * 4 and train.classes == ["0", "1", "2"]
        assert "images256/a/abbey" in train.file_name(0)
    alone = tmp_path / "flat" / "val_places205.csv"
    images = tmp_path / "flat" / "data" / "vision" / "torralba" / "deeplearning" / "images256"
    assert len(open_dataset(str(alone), data_root=str(images))) == 6


def test_images_that_lie_elsewhere_are_found_by_data_root(tmp_path):
    write_inat18(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "train_val2018").rename(tmp_path / "b" / "train_val2018")
    with pytest.raises(FileNotFoundError, match="--data_root"):
        open_dataset(str(tmp_path / "a"))
    assert len(open_dataset(str(tmp_path / "a"), data_root=str(tmp_path / "b"))) == 12


def test_a_split_whose_annotations_are_not_there_is_named(tmp_path):
    write_inat18(tmp_path)
    (tmp_path / "val2018.json").unlink()
    with pytest.raises(FileNotFoundError, match="has train2018.json, but no val2018.json"):
        open_dataset(str(tmp_path), "val")


def test_json_without_one_class_for_each_image_is_a_list_without_labels(tmp_path):
    for value in (0, 1):
        write_image(tmp_path / f"{value}.png", value)
    images = [{"id": i, "file_name": f"{i}.png"} for i in (1, 0)]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    dataset = open_dataset(str(path))
    assert values(dataset) == [1, 0] and dataset.labels is None
    twice = [{"image_id": i, "category_id": 7} for i in (0, 1, 1)]
    path.write_text(json.dumps({"images": images, "annotations": twice}))
    assert open_dataset(str(path)).labels is None
    alike = [{"id": 4, "name": "same"}, {"id": 7, "name": "same"}]
    once = [{"image_id": 0, "category_id": 7}, {"image_id": 1, "category_id": 4}]
    path.write_text(json.dumps({"images": images, "annotations": once, "categories": alike}))
    assert open_dataset(str(path)).labels.tolist() == [4, 7]  # by number, as a name says too little


def test_other_json_is_refused_in_one_sentence(tmp_path):
    for text in ("{", "[]", '{"images": [{"id": 1}]}', '{"pictures": []}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(
            ValueError, match="a.json is no list of images in COCO's format"
        ) as error:
            open_dataset(str(tmp_path / "a.json"))
        assert "\n" not in str(error.value)
