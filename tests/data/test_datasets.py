import io
import logging
import os
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.datasets import (
    SHARD_WINDOW,
    EpochSampler,
    ImageDataset,
    epoch_permutation,
    open_dataset,
)
from src.data.folders import FolderSource
from src.data.multicrop import MultiCropDataset, multicrop_loader
from src.errors import RunError
from tests.gloo import run_ranks


def write_image(path, value=0, size=(6, 5), kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path, kind)


def values(dataset):
    return [int(dataset.load(i)[0, 0, 0]) for i in range(len(dataset))]


# ============ folders ============


def test_class_folders_have_sorted_classes(tmp_path):
    for value, name in enumerate(["zebra/1.png", "ant/2.png", "ant/1.png", "zebra/deep/3.png"]):
        write_image(tmp_path / name, value)
    (tmp_path / "empty").mkdir()
    (tmp_path / "readme.txt").touch()
    dataset = open_dataset(str(tmp_path))
    assert dataset.classes == ["ant", "zebra"] and dataset.labels.tolist() == [0, 0, 1, 1]
    assert dataset.labels.dtype == torch.int64
    assert values(dataset) == [2, 1, 0, 3]
    assert dataset.load(0).shape == (3, 5, 6) and dataset.load(0).dtype == torch.uint8


@pytest.mark.parametrize(
    "names",
    [
        ["1.png", "2.png"],  # flat
        ["1.png", "a/2.png", "b/3.png"],  # some at the top
        ["a/1.png", "b/x/2.png"],  # no level at which all folders are classes
        ["2021/01/1.png", "2022/02/2.png"],  # only deeper down
        ["images/1.png", "images/2.png"],  # one folder is no classification
    ],
)
def test_other_folders_are_unlabelled(tmp_path, names):
    for value, name in enumerate(sorted(names)):
        write_image(tmp_path / name, value)
    dataset = open_dataset(str(tmp_path))
    assert dataset.labels is None and dataset.classes is None
    assert values(dataset) == list(range(len(names)))


def test_split_folders_are_found(tmp_path):
    for value, split in enumerate(["train", "test"]):
        for name in ("a", "b"):
            write_image(tmp_path / split / name / "1.png", value)
    assert values(open_dataset(str(tmp_path))) == [0, 0]
    assert values(open_dataset(str(tmp_path), "val")) == [1, 1]
    assert values(open_dataset(str(tmp_path), "test")) == [1, 1]
    write_image(tmp_path / "val" / "a" / "1.png", 2)
    assert values(open_dataset(str(tmp_path), "val")) == [2]
    assert values(open_dataset(str(tmp_path), "test")) == [1, 1]


def test_val_labels_are_numbered_as_in_train(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png"):
        write_image(tmp_path / name)
    for name in ("val/b/1.png", "val/c/1.png", "val/0new/1.png"):
        write_image(tmp_path / name)
    (tmp_path / "train" / "0empty").mkdir()
    assert open_dataset(str(tmp_path)).labels.tolist() == [0, 1, 2]
    val = open_dataset(str(tmp_path), "val")
    assert val.classes == ["a", "b", "c", "0new"] and val.labels.tolist() == [3, 1, 2]


def test_folder_without_split_folders_serves_every_split(tmp_path):
    write_image(tmp_path / "1.png", 9)
    assert values(open_dataset(str(tmp_path), "val")) == [9]


def test_train_without_val_is_one_sentence(tmp_path):
    write_image(tmp_path / "train" / "1.png")
    with pytest.raises(
        FileNotFoundError, match=f"--x {re.escape(str(tmp_path))} has a folder train"
    ):
        open_dataset(str(tmp_path), "val", flag="--x")


def test_names_that_are_no_utf8_are_read(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (7, 7, 7)).save(buffer, "PNG")
    with open(name, "wb") as file:
        file.write(buffer.getvalue())
    dataset = open_dataset(str(tmp_path))
    assert values(dataset) == [7] and dataset.broken == []


# ============ errors ============


@pytest.mark.parametrize("in_chans", [0, -1])
def test_channel_count_must_be_positive(in_chans):
    with pytest.raises(ValueError, match="--in_chans"):
        open_dataset("digits", in_chans=in_chans)


def test_missing_path_names_the_path_and_the_flag(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_path /no/such does not exist") as error:
        open_dataset("/no/such")
    assert "\n" not in str(error.value) and "digits" in str(error.value)
    with pytest.raises(ValueError, match="--train .*1.png is a file"):
        write_image(tmp_path / "1.png")
        open_dataset(str(tmp_path / "1.png"), flag="--train")


def test_empty_folder_names_the_path_and_the_flag(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        FileNotFoundError, match=f"--data_path {re.escape(str(tmp_path))} has no image"
    ):
        open_dataset(str(tmp_path))


def test_folder_of_broken_files_is_one_sentence(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8 no")
    with pytest.raises(ValueError, match="--data_path .*: none of its 3 images is readable"):
        open_dataset(str(tmp_path))


def test_channels_that_do_not_fit_are_found_at_once(tmp_path):
    write_image(tmp_path / "1.png")
    with pytest.raises(ValueError, match="1.png cannot be used.*3 channels.*--in_chans is 5"):
        open_dataset(str(tmp_path), in_chans=5)


# ============ what a dataset knows ============


def test_statistics_follow_the_data_and_the_channels(tmp_path):
    write_image(tmp_path / "1.png")
    photos = open_dataset(str(tmp_path))
    assert photos.mean == [0.485, 0.456, 0.406] and photos.std == [0.228, 0.224, 0.225]
    gray = open_dataset(str(tmp_path), in_chans=1)
    assert gray.mean == pytest.approx([np.mean(photos.mean)])
    assert gray.std == pytest.approx([np.mean(photos.std)])
    assert open_dataset("digits").mean != photos.mean
    np.save(tmp_path / "1.npy", np.zeros((4, 4, 5), np.uint8))
    (tmp_path / "1.png").unlink()
    many = open_dataset(str(tmp_path), in_chans=5)
    assert many.mean == pytest.approx([np.mean(photos.mean)] * 5) and len(many.std) == 5


def test_broken_file_is_replaced_by_the_next_and_named_once(tmp_path, caplog):
    for i in range(6):
        write_image(tmp_path / f"{i}.png", i)
    for i in (2, 3, 5):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    dataset = open_dataset(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert values(dataset) == [0, 1, 4, 4, 4, 0]
    assert [os.path.basename(name) for name in dataset.broken] == ["2.png", "3.png", "5.png"]
    for i in (2, 3, 5):
        assert sum(f"{i}.png" in record.message for record in caplog.records) == 1
    assert "3 so far" in caplog.records[-1].message


def test_file_that_vanishes_is_replaced(tmp_path):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", i)
    dataset = open_dataset(str(tmp_path))
    (tmp_path / "1.png").unlink()
    assert values(dataset) == [0, 2, 2]


def read_through(folder, num_images, num_broken):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (num_images, 8, 8, 3), dtype=np.uint8)
    broken = set(generator.choice(num_images, num_broken, replace=False).tolist())
    for i in range(num_images):
        path = folder / f"{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise[i]).save(path, "JPEG")
        if i in broken:
            path.write_bytes(path.read_bytes()[: generator.integers(0, 300)])
    crops = MultiCropDataset(open_dataset(str(folder)), [1], [8], [0.5], [1.0])
    sampler = EpochSampler(num_images, 50, 0, 1, seed=0)
    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch, indices in multicrop_loader(crops, sampler, 50, 2, "cpu"):
            assert batch[0].shape == (50, 1, 3, 8, 8)
            seen += indices.tolist()
    assert sorted(seen) == sorted([*range(num_images)] * 2)
    names = {os.path.basename(name) for name in crops.dataset.broken}  # found by the workers
    assert names == {f"{i:05d}.jpg" for i in broken}


@pytest.mark.slow
def test_folder_with_one_percent_of_broken_files_reads_through(tmp_path):
    read_through(tmp_path, 1000, 10)


@pytest.mark.slow
def test_large_folder_with_one_percent_of_broken_files_reads_through(tmp_path):
    read_through(tmp_path, 10_000, 100)


# ============ how much may be broken ============


def broken_folder(folder, num_images, num_broken):
    for i in range(num_images):
        write_image(folder / f"{i:04}.png", 7)
        if i < num_broken:
            (folder / f"{i:04}.png").write_bytes(b"no")
    return str(folder)


def test_more_broken_images_than_allowed_stop_the_run_with_one_sentence(tmp_path):
    dataset = open_dataset(broken_folder(tmp_path, 100, 20), max_broken=0.1)
    with pytest.raises(
        RunError, match="11 of its 100 images are broken, .*0010.png.*--max_broken 0.1"
    ):
        values(dataset)
    assert values(open_dataset(str(tmp_path), max_broken=0.2)) == [7] * 100


def test_a_few_broken_images_do_not_stop_a_small_set_unless_none_is_allowed(tmp_path):
    path = broken_folder(tmp_path, 20, 5)
    assert values(open_dataset(path)) == [7] * 20
    with pytest.raises(RunError, match="1 of its 20 images"):
        values(open_dataset(path, max_broken=0))
    (tmp_path / "0019.png").write_bytes(b"no")
    with pytest.raises(RunError, match="6 of its 20 images"):
        values(open_dataset(path))


def test_images_of_other_channels_are_skipped_whichever_comes_first(tmp_path):
    for folder, unfit in (("first", 0), ("last", 9)):
        for i in range(10):
            write_image(tmp_path / folder / f"{i}.png", i)
        np.save(tmp_path / folder / f"{unfit}.npy", np.zeros((4, 4, 5), np.uint8))
        (tmp_path / folder / f"{unfit}.png").unlink()
        dataset = open_dataset(str(tmp_path / folder))
        assert len(values(dataset)) == 10
        assert [os.path.basename(name) for name in dataset.broken] == [f"{unfit}.npy"]


def _share_broken(rank, world_size, path):
    dataset = open_dataset(path)
    counts = [dataset.share_broken()]
    dataset.load(rank)  # each process has another broken image
    counts.append(dataset.share_broken())
    counts.append(dataset.share_broken())
    return counts, len(dataset.broken)


def test_all_processes_know_of_the_broken_images_of_each(tmp_path):
    path = broken_folder(tmp_path, 20, 1)
    (tmp_path / "0001.png").write_bytes(b"no")
    assert run_ranks(_share_broken, 2, path) == [([0, 2, 2], 2)] * 2


# ============ which images ============


def test_the_digest_is_of_the_names_in_their_order(tmp_path):
    assert open_dataset("digits").digest() == open_dataset("digits").digest()
    assert open_dataset("digits").digest() != open_dataset("digits", "val").digest()


def test_the_digest_of_many_names_is_cheap():
    source = FolderSource.__new__(FolderSource)
    source.paths = np.full(1_280_000, b"n01440764/n01440764_10026.JPEG")
    dataset = ImageDataset.__new__(ImageDataset)
    dataset._source = source
    start = time.process_time()
    dataset.digest()
    assert time.process_time() - start < 2


# ============ the sampler ============


def drain(sampler):
    return list(sampler)


@pytest.mark.parametrize("num_groups", [None, 1, 5, 40])
def test_epoch_is_a_permutation_that_changes_with_seed_and_epoch(num_groups):
    groups = None if num_groups is None else np.arange(1000) * num_groups // 1000
    orders = {
        (seed, epoch): epoch_permutation(1000, seed, epoch, groups)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    for key, order in orders.items():
        assert np.array_equal(np.sort(order), np.arange(1000))
        assert np.array_equal(order, epoch_permutation(1000, *key, groups))
    assert len({tuple(order) for order in orders.values()}) == 4
    assert not np.array_equal(orders[0, 1], orders[1, 0])


def test_shards_are_shuffled_and_mixed_within_a_window():
    groups = np.repeat(np.arange(40), 25)
    order = groups[epoch_permutation(1000, 0, 0, groups)]
    windows = order.reshape(-1, SHARD_WINDOW * 25)
    for window in windows:
        assert len(set(window)) == SHARD_WINDOW
        assert len(set(window[:25])) > SHARD_WINDOW // 2  # mixed, not shard after shard
    assert sorted(windows[0]) != sorted(groups[: SHARD_WINDOW * 25])  # shards in another order


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_see_the_global_batches_of_one(world_size):
    one = drain(EpochSampler(50, 8, 0, 1, seed=3))
    ranks = [
        drain(EpochSampler(50, 8 // world_size, r, world_size, seed=3)) for r in range(world_size)
    ]
    size = 8 // world_size
    joined = [pair for b in range(6) for rank in ranks for pair in rank[b * size : (b + 1) * size]]
    assert joined == one and len(one) == 48  # the last 2 of 50 are dropped
    assert len({index for _, index in one}) == 48


def test_sampler_goes_on_from_the_middle_of_an_epoch():
    sampler = EpochSampler(50, 4, 1, 2, seed=3)
    sampler.set_epoch(7)
    whole = drain(sampler)
    assert {epoch for epoch, _ in whole} == {7} and len(sampler) == len(whole) == 24
    sampler.set_epoch(7, start_iteration=4)
    assert drain(sampler) == whole[16:] and len(sampler) == 8
    sampler.set_epoch(7, start_iteration=6)
    assert drain(sampler) == [] and len(sampler) == 0
    sampler.set_epoch(8)
    assert len(sampler) == 24 and [i for _, i in sampler] != [i for _, i in whole]


def test_batch_larger_than_the_dataset_is_one_sentence():
    with pytest.raises(ValueError, match="--batch_size 30 times 2 processes.* 50 images.*most 25"):
        EpochSampler(50, 30, 0, 2, seed=0)
    with pytest.raises(ValueError, match="--batch_size 0"):
        EpochSampler(50, 0, 0, 1, seed=0)
    assert len(EpochSampler(50, 25, 0, 2, seed=0)) == 25
