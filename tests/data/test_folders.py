import errno
import logging
import os
import threading
import time

import numpy as np
import pytest

from src.data.datasets import open_dataset
from src.data.folders import list_images, read_file, split_folders, walk_images
from src.data.images import BrokenImage
from tests.data.test_datasets import values, write_image


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# ============ what is an image of the data ============


def test_junk_of_file_managers_is_no_image(tmp_path):
    touch(
        tmp_path,
        "a/1.png",
        "a/@eaDir/1.png/thumb.jpg",
        "__MACOSX/a/1.png",
        "b/Thumbs.db",
        "b/2.png",
    )
    assert walk_images(str(tmp_path)) == (["a/1.png", "b/2.png"], {})


def test_junk_takes_no_labels_away(tmp_path):
    for name in (
        "train/a/1.png",
        "train/b/2.png",
        "val/b/3.png",
        "val/c/3.png",
        "train/@eaDir/x/t.png",
    ):
        write_image(tmp_path / name)
    touch(tmp_path, "train/.c/1.png")
    assert open_dataset(str(tmp_path)).labels.tolist() == [0, 1]
    assert open_dataset(str(tmp_path), "val").labels.tolist() == [1, 2]


def test_files_left_out_are_counted_and_named_by_their_kind(tmp_path):
    touch(tmp_path, "1.heic", "2.HEIC", "a/3.heic", "notes", "list.txt")
    with pytest.raises(
        FileNotFoundError, match="has no image.*left out: 3 .heic, 1 .txt, 1 without a"
    ):
        open_dataset(str(tmp_path))
    write_image(tmp_path / "1.png")
    assert open_dataset(str(tmp_path)).left_out.startswith("3 .heic")


def test_pipes_and_devices_are_no_images(tmp_path):
    touch(tmp_path, "1.png")
    os.mkfifo(tmp_path / "2.png")
    os.symlink("/dev/zero", tmp_path / "3.jpg")
    os.symlink("4.png", tmp_path / "4.png")  # a circle of one link
    os.symlink("gone.png", tmp_path / "5.png")  # missing, which reading it will say
    assert walk_images(str(tmp_path)) == (["1.png", "5.png"], {"pipes and devices": 3})
    for name in ("2.png", "3.jpg"):
        with pytest.raises(BrokenImage, match="no regular file"):
            read_file(tmp_path / name)


def test_a_file_larger_than_any_image_is_broken(tmp_path):
    with open(tmp_path / "1.png", "wb") as file:
        file.truncate(2**32 + 1)
    with pytest.raises(BrokenImage, match="4,294,967,297 bytes"):
        read_file(tmp_path / "1.png")


def test_folders_that_link_to_each_other_are_visited_once(tmp_path):
    folders = [tmp_path / f"d{i}" for i in range(8)]
    touch(tmp_path, *[f"d{i}/{i}.png" for i in range(8)], "d3/deep/x.png")
    for folder in folders:
        for other in folders:
            if folder != other:
                os.symlink(other, folder / f"to_{other.name}")
    names = sorted([f"d{i}/{i}.png" for i in range(8)] + ["d3/deep/x.png"])
    assert list_images(str(tmp_path)) == names


def test_a_folder_outside_that_two_links_lead_to_has_the_name_of_the_first(tmp_path):
    touch(tmp_path, "outside/1.png", "root/z/2.png")
    os.symlink(tmp_path / "outside", tmp_path / "root" / "b")
    os.symlink(tmp_path / "outside", tmp_path / "root" / "a")
    assert list_images(str(tmp_path / "root")) == ["a/1.png", "z/2.png"]


@pytest.mark.parametrize("run", [".", "runs/a"])
def test_files_of_a_run_are_no_images(tmp_path, run):
    touch(tmp_path, "a/1.png", "b/2.png")
    names = ["log.jsonl", "args.json", "train.log", "checkpoint.pth", "plots/crops.png"]
    names += [
        "plots/clusters/folders/0/1.png",
        "clustering/features.npy",
        "clusters/assignments.npy",
    ]
    touch(tmp_path / run, *names)
    names, left_out = walk_images(str(tmp_path))
    assert names == ["a/1.png", "b/2.png"] and left_out == {"folders of runs": 3}


def test_images_beside_a_run_are_images(tmp_path):
    touch(tmp_path, "cats/1.png", "cats/deep/2.png", "cats/checkpoint.pth", "cats/plots/curves.png")
    assert list_images(str(tmp_path)) == ["cats/1.png", "cats/deep/2.png"]


@pytest.mark.parametrize("folder", [".", "out", "plots/clusters"])
def test_pictures_and_tables_of_clusters_are_no_images(tmp_path, folder):
    touch(tmp_path, "a/1.png")
    names = [
        "clusters.csv",
        "clusters.json",
        "assignments.npy",
        "similarities.npy",
        "centroids.npy",
    ]
    touch(tmp_path / folder, *names, "clusters.png", "sizes.png", "folders/00/000000_1.png")
    assert list_images(str(tmp_path)) == ["a/1.png"]


def test_pictures_of_attention_are_no_images(tmp_path):
    touch(tmp_path, "a/1.png", "plots/attention/image_0/img.png", "plots/attention/sheet.png")
    touch(tmp_path, "out/attn-mean.png", "out/attn-head0.png", "out/img.png", "out/2.png")
    assert list_images(str(tmp_path)) == ["a/1.png", "out/2.png"]


def test_a_class_may_be_named_as_a_folder_of_runs(tmp_path):
    touch(tmp_path, "plots/1.png", "clusters/2.png", "linear/3.png")
    assert list_images(str(tmp_path)) == ["clusters/2.png", "linear/3.png", "plots/1.png"]


# ============ classes ============


def test_images_in_a_folder_of_that_name_inside_each_class_have_labels(tmp_path):
    for name in ("n1/images/1.JPEG", "n2/images/2.JPEG", "n2/Images/3.JPEG"):
        write_image(tmp_path / "train" / name, kind="JPEG")
    for name in ("n2/4.JPEG", "n3/4.JPEG"):
        write_image(tmp_path / "val" / name, kind="JPEG")
    touch(tmp_path, "train/n1/n1_boxes.txt")
    dataset = open_dataset(str(tmp_path))
    assert dataset.classes == ["n1", "n2"] and dataset.labels.tolist() == [0, 1, 1]
    assert open_dataset(str(tmp_path), "val").labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("overview.png", "overview.png lies beside the folders"),
        ("d/deep/3.png", "d/deep/3.png lies deeper, and d has no image directly in it"),
    ],
)
def test_a_file_that_is_in_the_way_of_labels_is_named(tmp_path, caplog, extra, words):
    for name in ("a/1.png", "b/1.png", "c/1.png", extra):
        write_image(tmp_path / name)
    with caplog.at_level(logging.INFO):
        dataset = open_dataset(str(tmp_path))
    assert dataset.labels is None and words in dataset.unlabelled_since
    assert words in caplog.text


# ============ splits ============


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Train", "Val"),
        ("training", "validation"),
        ("train", "valid"),
        ("TRAIN", "Test"),
        ("train", "val"),
    ],
)
def test_every_spelling_of_the_splits_is_known(tmp_path, train, val):
    write_image(tmp_path / train / "a" / "1.png", 1)
    write_image(tmp_path / val / "a" / "1.png", 2)
    assert values(open_dataset(str(tmp_path))) == [1]
    assert values(open_dataset(str(tmp_path), "val")) == [2]


def test_classes_that_sound_like_a_split_stay_classes(tmp_path):
    for name in ("valid/1.png", "invalid/1.png"):
        write_image(tmp_path / "quality" / name)
    for name in ("Bus/1.png", "Train/1.png"):
        write_image(tmp_path / "vehicles" / name)
    assert open_dataset(str(tmp_path / "quality"), "val").classes == ["invalid", "valid"]
    assert open_dataset(str(tmp_path / "vehicles")).classes == ["Bus", "Train"]
    assert split_folders(tmp_path / "quality") == {}


def test_the_usual_spelling_comes_first(tmp_path):
    for name in ("Train", "train", "training", "val"):
        (tmp_path / name).mkdir()
    assert split_folders(str(tmp_path))["train"] == str(tmp_path / "train")


def test_images_to_evaluate_are_not_trained_on_without_a_word(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    write_image(tmp_path / "one" / "val" / "1.png")
    assert len(open_dataset(str(tmp_path / "one"))) == 1
    assert "has the folder val and none of training images" in caplog.text
    caplog.clear()
    for name in ("train/a/1.png", "val/a/1.png"):
        write_image(tmp_path / "two" / "ILSVRC" / name)
    assert len(open_dataset(str(tmp_path / "two"))) == 2
    assert f"--data_path {tmp_path}/two/ILSVRC takes those of train alone" in caplog.text
    caplog.clear()
    assert len(open_dataset(str(tmp_path / "two" / "ILSVRC"))) == 1 and not caplog.text


# ============ storages ============


def away_for(seconds, folder):
    """Rename a folder away and back, in a thread that is returned."""
    folder.rename(folder.with_name("away"))

    def come_back():
        time.sleep(seconds)
        folder.with_name("away").rename(folder)

    thread = threading.Thread(target=come_back)
    thread.start()
    return thread


def test_a_storage_that_was_away_for_a_moment_costs_no_image(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for i in range(8):
        write_image(tmp_path / "data" / f"{i}.png", i)
    dataset = open_dataset(str(tmp_path / "data"))
    thread = away_for(0.5, tmp_path / "data")
    assert values(dataset) == list(range(8)) and dataset.broken == []
    thread.join()
    texts = [record.message for record in caplog.records]
    assert len(texts) == 2 and "waiting up to 600 s" in texts[0] and "answers again" in texts[1]


def test_a_mount_point_that_is_empty_is_a_storage_that_is_away(tmp_path):
    for i in range(3):
        write_image(tmp_path / "data" / f"{i}.png", i)
    dataset = open_dataset(str(tmp_path / "data"), storage_timeout=0.2)
    (tmp_path / "data").rename(tmp_path / "away")
    (tmp_path / "data").mkdir()
    with pytest.raises(RuntimeError, match="--data_path: .*0.png cannot be read for 0.2 s"):
        dataset.load(0)
    assert dataset.broken == []


def test_a_storage_that_links_lead_to_is_waited_for(tmp_path):
    for i in range(3):
        write_image(tmp_path / "storage" / f"{i}.png", i)
    (tmp_path / "data").mkdir()
    for i in range(3):
        os.symlink(tmp_path / "storage" / f"{i}.png", tmp_path / "data" / f"{i}.png")
    dataset = open_dataset(str(tmp_path / "data"))
    thread = away_for(0.3, tmp_path / "storage")
    assert values(dataset) == [0, 1, 2] and dataset.broken == []
    thread.join()
    (tmp_path / "storage" / "1.png").unlink()
    assert values(dataset) == [0, 2, 2] and len(dataset.broken) == 1


def test_an_error_of_the_storage_stops_the_run_after_its_time(tmp_path, monkeypatch):
    write_image(tmp_path / "1.png")
    dataset = open_dataset(str(tmp_path), storage_timeout=0.3)

    def fail(index):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(dataset._source, "read", fail)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"Input/output error.*--storage_timeout"):
        dataset.load(0)
    assert 0.3 <= time.monotonic() - start < 1
    assert dataset.broken == []


def test_a_file_that_nobody_may_read_is_broken_and_not_waited_for(tmp_path, monkeypatch):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", i)
    dataset = open_dataset(str(tmp_path))
    read = dataset._source.read

    def refuse(index):
        if index == 1:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read(index)

    monkeypatch.setattr(dataset._source, "read", refuse)
    assert values(dataset) == [0, 2, 2]


# ============ names ============


def test_names_of_any_bytes_are_written_without_what_moves_the_cursor(tmp_path, caplog):
    write_image(tmp_path / "1.png")
    broken = b"caf\xe9\x1b[31m\n.jpg"
    with open(os.path.join(os.fsencode(tmp_path), broken), "wb") as file:
        file.write(b"no")
    dataset = open_dataset(str(tmp_path))
    assert values(dataset) == [0, 0]
    assert rf"{tmp_path}/caf\xe9\x1b[31m\n.jpg (" in caplog.text
    assert os.fsencode(dataset.broken[0]).endswith(broken)  # as it is, for those who open it


def test_the_array_of_names_is_the_fingerprint(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "one" / name)
        write_image(tmp_path / "two" / name, 9)
    first, second = (open_dataset(str(tmp_path / name)) for name in ("one", "two"))
    assert first.digest() == second.digest() and first.digest().startswith("2-")
    (tmp_path / "two" / "b.png").rename(tmp_path / "two" / "c.png")
    assert open_dataset(str(tmp_path / "two")).digest() != first.digest()
    assert np.char.str_len(first._source.paths).tolist() == [5, 5]
