import io
import logging
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from src.data.datasets import open_dataset
from src.data.shards import OPEN_SHARDS, ShardSource, expand_shards
from tests.data.test_folders import away_for


def png(value, size=(6, 5)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as shard:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            shard.addfile(header, io.BytesIO(data))


def write_shards(folder, num_shards=4, each=5, labels=True):
    """Sample number i is an image of value i, with label i % 3."""
    folder.mkdir(exist_ok=True)
    for shard in range(num_shards):
        members = []
        for i in range(shard * each, (shard + 1) * each):
            members.append((f"part/{i:05d}.png", png(i)))
            if labels:
                members.append((f"part/{i:05d}.cls", b"%d\n" % (i % 3)))
        write_shard(folder / f"shard-{shard:06d}.tar", members)
    return num_shards * each


@pytest.mark.parametrize(
    "pattern",
    [
        "{folder}/shard-{{000000..000003}}.tar",
        "{folder}/shard-*.tar",
        "{folder}/shard-000000.tar,{folder}/shard-{{000001,000002}}.tar,{folder}/shard-000003.tar",
        "{folder}",
    ],
)
def test_every_spelling_opens_the_same_samples(tmp_path, pattern):
    num = write_shards(tmp_path)
    path = pattern.format(folder=tmp_path)
    dataset = open_dataset(path, root=str(tmp_path / "cache"))
    assert [int(dataset.load(i)[0, 0, 0]) for i in range(len(dataset))] == list(range(num))
    assert dataset.labels.tolist() == [i % 3 for i in range(num)]
    assert dataset.classes == ["0", "1", "2"]
    assert np.asarray(dataset.groups).tolist() == [i // 5 for i in range(num)]
    assert dataset.broken == []


def test_a_list_of_paths_opens_them_all(tmp_path):
    write_shards(tmp_path)
    paths = [tmp_path / f"shard-{i:06d}.tar" for i in (2, 0)]
    dataset = open_dataset(paths, root=str(tmp_path / "cache"))
    assert int(dataset.load(0)[0, 0, 0]) == 10 and len(dataset) == 10


def test_braces_keep_their_zeros():
    with pytest.raises(FileNotFoundError, match="there is no tar shard x-008.tar"):
        expand_shards("x-{008..011}.tar", "--data_path")


def test_shards_without_cls_have_no_labels(tmp_path):
    write_shards(tmp_path, labels=False)
    dataset = open_dataset(str(tmp_path), root=str(tmp_path / "cache"))
    assert dataset.labels is None and dataset.classes is None


def test_names_in_cls_become_sorted_classes(tmp_path):
    members = []
    for i, name in enumerate([b"dog", b"ant", b"dog", b"cat"]):
        members += [(f"{i}.png", png(i)), (f"{i}.cls", name)]
    write_shard(tmp_path / "a.tar", members)
    dataset = open_dataset(str(tmp_path / "a.tar"), root=str(tmp_path / "cache"))
    assert dataset.classes == ["ant", "cat", "dog"] and dataset.labels.tolist() == [2, 0, 2, 1]


def test_other_members_are_left_alone(tmp_path):
    long = "d" * 90 + "/" + "k" * 150  # beyond the 100 characters of a plain header
    members = [("a.json", b"{}"), ("a.png", png(1)), ("b.txt", b"?"), (long + ".seg.png", png(2))]
    write_shard(tmp_path / "a.tar", members)
    dataset = open_dataset(str(tmp_path / "a.tar"), root=str(tmp_path / "cache"))
    assert [int(dataset.load(i)[0, 0, 0]) for i in range(len(dataset))] == [1, 2]


def test_index_is_kept_and_renewed_when_the_shard_changes(tmp_path, monkeypatch):
    write_shards(tmp_path, num_shards=1)
    path, cache = str(tmp_path / "shard-000000.tar"), str(tmp_path / "cache")
    first = ShardSource([path], cache, "--data_path")
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # a second scan would call it
        again = ShardSource([path], cache, "--data_path")
    assert again.keys.tolist() == first.keys.tolist()
    assert again.offsets.tolist() == first.offsets.tolist()
    write_shards(tmp_path, num_shards=1, each=7)
    assert len(ShardSource([path], cache, "--data_path")) == 7
    for stored in (tmp_path / "cache").iterdir():
        stored.write_bytes(stored.read_bytes()[:50])
    assert len(ShardSource([path], cache, "--data_path")) == 7


def test_index_stays_in_memory_when_the_cache_cannot_be_written(tmp_path):
    write_shards(tmp_path, num_shards=1)
    (tmp_path / "file").touch()
    source = ShardSource([str(tmp_path / "shard-000000.tar")], str(tmp_path / "file" / "x"), "")
    assert len(source) == 5


def test_few_files_stay_open(tmp_path):
    num = OPEN_SHARDS + 8
    write_shards(tmp_path, num_shards=num, each=1)
    paths = sorted(str(path) for path in tmp_path.glob("*.tar"))
    source = ShardSource(paths, str(tmp_path / "cache"), "")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for i in [*range(num), *range(num)]:
        assert source.read(i) == png(i)
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= OPEN_SHARDS + 2
    assert pickle.loads(pickle.dumps(source)).read(3) == png(3)  # noqa: S301


@pytest.mark.parametrize("end", [8 * 1024 + 100, 8 * 1024 + 612, 9 * 1024 + 100, 9 * 1024 + 612])
def test_torn_shard_gives_its_whole_samples(tmp_path, caplog, end):
    write_shards(tmp_path, num_shards=1, each=6)  # a header and a block for each of 12 members
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:end])
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(str(path), root=str(tmp_path / "cache"))
    assert "ends early" in caplog.text
    assert len(dataset) in (3, 4) and dataset.labels.tolist() == [0, 1, 2, 0][: len(dataset)]
    assert [int(dataset.load(i)[0, 0, 0]) for i in range(len(dataset))] == [0, 1, 2, 3][
        : len(dataset)
    ]
    assert dataset.broken == []


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100])
def test_what_is_no_tar_file_is_one_sentence(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match="--data_path.*a.tar"):
        open_dataset(str(tmp_path / "a.tar"), root=str(tmp_path / "cache"))


def test_compressed_shard_is_one_sentence(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as shard:
        shard.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(ValueError, match="unpack .tar.gz to .tar"):
        open_dataset(str(tmp_path / "a.tar.gz"), root=str(tmp_path / "cache"))


# ============ damage ============


def tar_bytes(numbers, kind=tarfile.GNU_FORMAT):
    """An archive of sample numbers, as of write_shards, each of 4 blocks, and where each begins."""
    buffer, places = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as shard:
        for i in numbers:
            places.append(shard.offset)
            for name, data in ((f"{i:05d}.png", png(i)), (f"{i:05d}.cls", b"%d" % (i % 3))):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                shard.addfile(header, io.BytesIO(data))
    return bytearray(buffer.getvalue()), places


def open_bytes(folder, data):
    (folder / "a.tar").write_bytes(data)
    dataset = open_dataset(str(folder / "a.tar"), root=str(folder / "cache"))
    return [int(dataset.load(i)[0, 0, 0]) for i in range(len(dataset))], dataset


def test_a_damaged_header_costs_its_member_alone_and_is_named(tmp_path, caplog):
    data, places = tar_bytes(range(96))
    data[places[40] + 3] ^= 1
    seen, dataset = open_bytes(tmp_path, data)
    assert seen == [*range(40), *range(41, 96)]
    assert dataset.labels.tolist() == [i % 3 for i in seen]
    assert f"a.tar is damaged (no header of a member at byte {places[40]:,}" in caplog.text
    assert not os.path.exists(tmp_path / "cache")  # what is short is not kept


def test_a_damaged_first_header_costs_its_member_alone(tmp_path, caplog):
    data, _ = tar_bytes(range(5))
    data[3] ^= 1
    assert open_bytes(tmp_path, data)[0] == [1, 2, 3, 4]
    assert "at byte 0" in caplog.text


def test_a_damaged_label_leaves_a_word(tmp_path, caplog):
    data, places = tar_bytes(range(5))
    data[places[2] + 1024 + 3] ^= 1  # the header of 00002.cls
    with caplog.at_level(logging.INFO):
        seen, dataset = open_bytes(tmp_path, data)
    assert seen == [0, 1, 2, 3, 4] and dataset.labels is None
    assert "1 of 5 have no .cls" in caplog.text and "00002 first" in caplog.text


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_one_after_the_other_in_a_file_are_read(tmp_path, caplog, kind):
    caplog.set_level(logging.WARNING)
    data = tar_bytes(range(3), kind)[0] + tar_bytes(range(2, 7), kind)[0]
    seen, dataset = open_bytes(tmp_path, data)
    assert seen == [0, 1, 2, 2, 3, 4, 5, 6]  # keys may come again
    assert dataset.labels.tolist() == [i % 3 for i in seen]
    assert not caplog.records and os.path.exists(tmp_path / "cache")


def test_data_behind_the_last_member_is_a_warning_that_names_shard_and_offset(tmp_path, caplog):
    data, _ = tar_bytes(range(3))
    assert open_bytes(tmp_path, data + b"x" * 1024)[0] == [0, 1, 2]
    assert f"a.tar is damaged (data behind the last member at byte {len(data):,}" in caplog.text


def test_padding_of_any_length_is_no_damage(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    data, _ = tar_bytes(range(3))
    assert open_bytes(tmp_path, data + bytes(3_000_000))[0] == [0, 1, 2]
    assert not caplog.records


def test_a_negative_size_names_the_file(tmp_path, caplog):
    data, places = tar_bytes(range(5))
    header = data[places[2] : places[2] + 512]
    header[124:136] = b"\xff" * 11 + b"\xf0"  # -16 in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[places[2] : places[2] + 512] = header
    assert open_bytes(tmp_path, data)[0] == [0, 1, 3, 4]
    assert (
        f"a.tar is damaged (00002.png has a size of -16 bytes at byte {places[2]:,}" in caplog.text
    )


def test_a_shard_cut_between_two_members_is_said_to_end_early(tmp_path, caplog):
    data, places = tar_bytes(range(5))
    for _ in range(2):
        assert open_bytes(tmp_path, data[: places[4]])[0] == [0, 1, 2, 3]
    assert caplog.text.count("ends early (it ends without an empty block") == 2


def test_a_shard_that_became_shorter_is_waited_for_and_not_broken(tmp_path):
    data, places = tar_bytes(range(5))
    (tmp_path / "a.tar").write_bytes(data)
    dataset = open_dataset(
        str(tmp_path / "a.tar"), root=str(tmp_path / "cache"), storage_timeout=0.2
    )
    (tmp_path / "a.tar").write_bytes(data[: places[3]])
    with pytest.raises(RuntimeError, match="a.tar is shorter than when it was indexed"):
        dataset.load(4)
    (tmp_path / "a.tar").write_bytes(data)
    assert int(dataset.load(4)[0, 0, 0]) == 4 and dataset.broken == []


def test_a_shard_that_was_away_for_a_moment_is_opened_again(tmp_path):
    num = write_shards(tmp_path / "data")
    dataset = open_dataset(str(tmp_path / "data"), root=str(tmp_path / "cache"))
    thread = away_for(0.3, tmp_path / "data")
    assert [int(dataset.load(i)[0, 0, 0]) for i in range(num)] == list(range(num))
    thread.join()
    assert dataset.broken == []


def test_the_digest_of_shards_is_of_their_keys_and_sizes(tmp_path):
    first = open_bytes(tmp_path, tar_bytes(range(5))[0])[1].digest()
    assert open_bytes(tmp_path, tar_bytes([4, 1, 2, 3, 0])[0])[1].digest() != first
