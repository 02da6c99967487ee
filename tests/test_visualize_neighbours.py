"""visualize.py neighbours: who is nearest, queries that are of the data, named files, misuse."""

import csv
import os
import shlex

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import visualize
from src.data.datasets import open_dataset
from src.pictures.neighbours import nearest_of_others

QUICK = shlex.split("--device cpu --workers 0 --arch resnet10 --stem small --width 0.125 --size 16")


def find(folder, *argv):
    words = ["neighbours", *QUICK, "--dump_path", folder, *argv]
    assert visualize.main([str(word) for word in words]) == 0
    with open(folder / "neighbours.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four images of each of three colours, in class folders."""
    folder, rng = tmp_path_factory.mktemp("data") / "images", np.random.default_rng(0)
    for channel, kind in enumerate(("red", "green", "blue")):
        (folder / kind).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 60, (20, 20, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / kind / f"{i}.png")
    return folder


def test_the_nearest_are_those_of_the_largest_cosine_without_the_query_itself():
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(30, 5, generator=draws)
    features[7] = 3 * features[2]  # the same direction: not the query itself
    cosines, indices = nearest_of_others(features, features[[2, 5, 9]], [2, None, 9], 4)
    unit = F.normalize(features.double(), dim=1)
    for row, query, own in ((0, 2, 2), (1, 5, None), (2, 9, 9)):
        similar = unit @ unit[query]
        order = [i for i in similar.argsort(descending=True).tolist() if i != own][:4]
        # 2 and 7 are equally near to the others: which comes first is not defined.
        assert set(indices[row].tolist()) == set(order)
        torch.testing.assert_close(similar[indices[row]], similar[order], atol=1e-6, rtol=0)
        torch.testing.assert_close(cosines[row].double(), similar[order], atol=1e-6, rtol=0)
    assert indices[0, 0] == 7 and indices[1, 0] == 5


def test_neighbours_of_images_of_the_data_are_of_their_class(tmp_path, images, drawn):
    rows = find(tmp_path, "--data_path", images, "--num_images", 3, "--top", 3)
    assert len(rows) == 9 and [row["rank"] for row in rows[:3]] == ["1", "2", "3"]
    for row in rows:
        assert os.path.dirname(row["query"]) == os.path.dirname(row["file"]), row
        assert row["class"] == os.path.basename(os.path.dirname(row["file"]))
        assert row["file"] != row["query"]
    assert len(drawn["neighbours.png"].boxes) == 3


def test_named_files_are_queries_and_left_out_where_they_are_of_the_data(tmp_path, images):
    other = tmp_path / "other.jpg"
    Image.new("RGB", (40, 30), (20, 200, 20)).save(other)
    own = images / "blue" / "2.png"
    rows = find(tmp_path, "--data_path", images, "--top", 4, "--queries", other, own)
    assert {row["query"] for row in rows} == {str(other), str(own)}
    assert {row["class"] for row in rows[:4]} == {"green"}
    assert str(own) not in {row["file"] for row in rows[4:]}
    # Where the query is in the data, its neighbours are those that it has as one of the images.
    dataset = open_dataset(str(images))
    place = [dataset.file_name(i) for i in range(12)].index(str(own))
    all_rows = find(tmp_path / "all", "--data_path", images, "--top", 4, "--num_images", 12)
    expected = [row["file"] for row in all_rows[4 * place : 4 * place + 4]]
    assert [row["file"] for row in rows[4:]] == expected


def test_images_without_labels_are_drawn_too(tmp_path, images):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in images.rglob("*.png"):
        (flat / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
    rows = find(tmp_path, "--data_path", flat, "--num_images", 2, "--top", 2)
    assert len(rows) == 4 and {row["class"] for row in rows} == {""}


def test_what_does_not_fit_is_one_sentence(tmp_path, images):
    with pytest.raises(FileNotFoundError, match="--queries .*none.jpg does not exist: give files"):
        find(tmp_path, "--data_path", images, "--queries", tmp_path / "none.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="--queries .*broken.jpg cannot be read"):
        find(tmp_path, "--data_path", images, "--queries", tmp_path / "broken.jpg")
    with pytest.raises(ValueError, match="--top 12 is not fewer than the 12 images"):
        find(tmp_path, "--data_path", images, "--top", 12)
