"""src.evaluate.label_subsets: published lists of names, balanced draws."""

import tarfile

import pytest
import torch
from PIL import Image

from src.data.datasets import open_dataset
from src.evaluate.label_subsets import draw, images_per_class, read_list
from src.evaluate.splits import Joined, hold_out

NAMES = ("n01/n01_10.JPEG", "n01/n01_7.JPEG", "n02/n02_10.JPEG", "n02/same.JPEG", "n03/same.JPEG")


@pytest.fixture
def photos(tmp_path):
    """A folder of three classes, its images called as ImageNet's are."""
    for name in NAMES:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name)
    return open_dataset(str(tmp_path / "train"))


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def names(dataset, indices):
    return [dataset.file_name(i).partition("train/")[2] for i in indices.tolist()]


# ============ lists ============
def test_a_list_of_bare_file_names_finds_its_images_in_their_folders(photos, tmp_path):
    path = write(tmp_path / "1percent.txt", "n02_10.JPEG", "", "n01_7.JPEG", "n02_10.JPEG")
    assert names(photos, read_list(path, photos)) == ["n01/n01_7.JPEG", "n02/n02_10.JPEG"]


def test_folders_tell_images_of_one_name_apart_and_are_asked_for_where_they_lack(photos, tmp_path):
    path = write(tmp_path / "list.txt", "train/n03/same.JPEG", "n01/n01_10.jpg")
    assert names(photos, read_list(path, photos)) == ["n01/n01_10.JPEG", "n03/same.JPEG"]
    path = write(tmp_path / "list.txt", "same.JPEG")
    with pytest.raises(ValueError, match="--train_list .*2 images .* same.JPEG: .*class/image.jpg"):
        read_list(path, photos, "--train_list")


def test_images_in_shards_are_found_by_their_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.jpg")
    with tarfile.open("a.tar", "w") as archive:
        for key in ("n01/n01_1", "n01_2", "n02_1.x"):
            archive.add("a.jpg", arcname=f"{key}.jpg")
    dataset = open_dataset("a.tar")
    path = write(tmp_path / "list.txt", "n01_1.JPEG", "n01_2.JPEG")
    assert len(read_list(path, dataset)) == 2


def test_names_of_images_that_are_not_there_are_counted_in_one_sentence(photos, tmp_path):
    path = write(tmp_path / "list.txt", "n01_10.JPEG", "n01_8.JPEG", "01_7.JPEG", "n04/n01_7.JPEG")
    with pytest.raises(ValueError, match=r"3 of its 4 names are not in .*n01_8.JPEG") as error:
        read_list(path, photos)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="names no image"):
        read_list(write(tmp_path / "empty.txt", " "), photos)
    with pytest.raises(FileNotFoundError, match="--label_list .*none.txt does not exist"):
        read_list(str(tmp_path / "none.txt"), photos)
    with pytest.raises(ValueError, match="--label_list .* cannot be read"):
        read_list(str(tmp_path), photos)


def test_parts_and_joined_sets_name_the_files_of_their_images(photos, tmp_path):
    train, val = hold_out(photos)  # image 0 is held out
    path = write(tmp_path / "list.txt", "n02_10.JPEG")
    assert read_list(path, train).tolist() == [1]
    assert read_list(path, Joined(val, train)).tolist() == [2]


# ============ draws ============
def test_one_percent_of_imagenet_is_13_images_of_each_class_and_ten_percent_128():
    labels = torch.arange(1_281_167) % 1000
    assert [images_per_class(labels, share) for share in (0.01, 0.1)] == [13, 128]
    drawn = draw(labels, fraction=0.01)
    assert labels[drawn].bincount().eq(13).all() and len(drawn.unique()) == 13_000


def test_a_class_with_fewer_images_gives_all_and_one_without_gives_none():
    labels = torch.tensor([0] * 5 + [2] * 2 + [3] * 9)[torch.randperm(16)]
    drawn = draw(labels, per_class=3, seed=1)
    assert labels[drawn].bincount().tolist() == [3, 0, 2, 3]
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert labels[draw(labels, fraction=1e-6)].bincount().tolist() == [1, 0, 1, 1]


def test_the_seed_makes_the_draw_and_a_larger_one_holds_the_smaller():
    labels = torch.arange(200) % 4
    small, large = draw(labels, per_class=5, seed=3), draw(labels, per_class=20, seed=3)
    assert torch.equal(small, draw(labels, per_class=5, seed=3))
    assert not torch.equal(small, draw(labels, per_class=5, seed=4))
    assert torch.isin(small, large).all()


def test_a_draw_needs_one_size_and_one_label_an_image():
    with pytest.raises(ValueError, match="number in a class, or their share"):
        draw(torch.arange(4), per_class=1, fraction=0.5)
    with pytest.raises(ValueError, match="number in a class, or their share"):
        draw(torch.arange(4))
    with pytest.raises(ValueError, match="several labels"):
        draw(torch.zeros(4, 20, dtype=torch.int64), per_class=1)
