import pytest
import torch

from src.data.datasets import open_dataset
from src.errors import RunError
from tests.data.test_datasets import values, write_image


def write_photos(folder, names=("a/1.png", "b/2.png", "b/3 x.png", "c.png")):
    for value, name in enumerate(names):
        write_image(folder / name, value)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


# ============ texts ============
def test_a_text_has_a_path_a_line_relative_to_its_folder(tmp_path):
    write_photos(tmp_path)
    absolute = tmp_path / "a" / "1.png"
    path = write(tmp_path / "list.txt", f"c.png\n\nb/3 x.png\r\n{absolute}\n")
    dataset = open_dataset(path)
    assert values(dataset) == [3, 2, 0]
    assert dataset.labels is None and dataset.classes is None and dataset.metadata == {}
    assert dataset.file_name(0) == str(tmp_path / "c.png")


def test_data_root_is_where_the_paths_of_a_list_begin(tmp_path):
    write_photos(tmp_path / "photos")
    path = write(tmp_path / "lists" / "list.txt", "c.png\n")
    assert values(open_dataset(path, data_root=str(tmp_path / "photos"))) == [3]
    with pytest.raises(FileNotFoundError, match="c.png is not there.*--data_root"):
        open_dataset(path)
    with pytest.raises(ValueError, match="--data_root nowhere is no folder"):
        open_dataset(path, data_root="nowhere")


def test_numbers_behind_every_path_of_a_text_are_labels(tmp_path):
    write_photos(tmp_path)
    path = write(tmp_path / "list.txt", "a/1.png 2\nb/3 x.png\t0\nc.png 2\n")
    dataset = open_dataset(path)
    assert values(dataset) == [0, 2, 3]
    assert dataset.labels.tolist() == [2, 0, 2] and dataset.labels.dtype == torch.int64
    assert dataset.classes == ["0", "1", "2"]


def test_a_name_that_ends_in_a_number_is_not_taken_for_a_label(tmp_path):
    write_image(tmp_path / "a.png 1.png", 7)
    write_image(tmp_path / "b.png", 8)
    dataset = open_dataset(write(tmp_path / "list.txt", "a.png 1.png\nb.png\n"))
    assert values(dataset) == [7, 8] and dataset.labels is None


def test_names_of_any_bytes_are_read_from_a_list(tmp_path):
    import os

    name = b"caf\xe9.png"
    write_image(tmp_path / "plain.png", 5)
    os.rename(tmp_path / "plain.png", os.path.join(os.fsencode(tmp_path), name))
    (tmp_path / "list.txt").write_bytes(name + b"\n")
    assert values(open_dataset(str(tmp_path / "list.txt"))) == [5]


# ============ tables ============
@pytest.mark.parametrize("separator, suffix", [(",", "csv"), (";", "csv"), ("\t", "tsv")])
def test_a_table_has_paths_labels_and_metadata(tmp_path, separator, suffix):
    write_photos(tmp_path)
    rows = [["Path", "label", "place"], ["c.png", "dog", "Oslo"], ["a/1.png", "ant", "Rome"]]
    text = "\ufeff" + "\n".join(separator.join(row) for row in rows) + "\n"
    dataset = open_dataset(write(tmp_path / f"list.{suffix}", text))
    assert values(dataset) == [3, 0]
    assert dataset.labels.tolist() == [1, 0] and dataset.classes == ["ant", "dog"]
    assert dataset.metadata == {"place": ["Oslo", "Rome"]}


def test_label_column_says_which_column_has_the_labels(tmp_path):
    write_photos(tmp_path)
    path = write(tmp_path / "list.csv", "file,label,place\nc.png,1,Rome\na/1.png,0,Oslo\n")
    dataset = open_dataset(path, label_column="place")
    assert dataset.labels.tolist() == [1, 0] and dataset.classes == ["Oslo", "Rome"]
    assert dataset.metadata == {"label": ["1", "0"]}
    with pytest.raises(ValueError, match="--label_column tag is not a column.*label, place"):
        open_dataset(path, label_column="tag")


def test_a_column_says_the_split_of_each_image(tmp_path):
    write_photos(tmp_path)
    rows = ["path,class,split", "a/1.png,x,train", "b/2.png,y,Training", "c.png,x,test"]
    path = write(tmp_path / "list.csv", "\n".join(rows))
    train, val = open_dataset(path), open_dataset(path, "val")
    assert values(train) == [0, 1] and train.labels.tolist() == [0, 1]
    assert values(val) == [3] and val.classes == ["x"]
    assert train.metadata == {}
    only_train = write(tmp_path / "train.csv", "\n".join(rows[:3]))
    with pytest.raises(FileNotFoundError, match="no image whose split is val, but train, training"):
        open_dataset(only_train, "val")


def test_a_label_that_is_missing_is_named_and_leaves_the_list_unlabelled(tmp_path):
    write_photos(tmp_path)
    path = write(tmp_path / "list.csv", "path,label\nc.png,1\na/1.png,\n")
    dataset = open_dataset(path)
    assert dataset.labels is None and "row 2" in dataset.unlabelled_since


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("name,label\na.png,1\n", "no column of paths: call one of name, label path"),
        ("path,x\nc.png,1\na.png\n", "line 3: 1 values, and the header has 2 columns"),
        ("path,x,x\nc.png,1,2\n", "two columns of its header have one name"),
        ("", "no column of paths"),
        ('path,x\nc.png,"1\na/1.png,2\n', "no table .* a quote without its second"),
        ("path\n", "has no image"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(tmp_path, text, sentence):
    write_photos(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        open_dataset(write(tmp_path / "list.csv", text))


def test_a_file_of_a_list_that_is_gone_is_a_broken_image(tmp_path):
    write_photos(tmp_path)
    path = write(tmp_path / "list.txt", "c.png\ngone.png\na/1.png\n")
    dataset = open_dataset(path)
    assert values(dataset) == [3, 0, 0] and len(dataset.broken) == 1
    dataset = open_dataset(path, max_broken=0)
    with pytest.raises(RunError, match="gone.png"):
        values(dataset)


@pytest.mark.parametrize("first", ["48600000000", "1000000", "9" * 30])
def test_numbers_that_are_ids_are_names_of_classes(tmp_path, first):
    write_photos(tmp_path)
    path = write(tmp_path / "list.csv", f"path,label\nc.png,{first}\na/1.png,7\nb/2.png,{first}\n")
    dataset = open_dataset(path)
    assert dataset.classes == sorted([first, "7"])
    assert [dataset.classes[label] for label in dataset.labels] == [first, "7", first]


def test_flags_of_lists_are_said_to_be_of_no_use_for_a_folder(tmp_path, caplog):
    write_photos(tmp_path)
    open_dataset(str(tmp_path), label_column="breed")
    assert "--data_root and --label_column are for lists" in caplog.text


def test_lists_of_other_images_have_other_digests(tmp_path):
    write_photos(tmp_path)
    first = open_dataset(write(tmp_path / "1.txt", "c.png\na/1.png\n"))
    second = open_dataset(write(tmp_path / "2.csv", "path\na/1.png\nc.png\n"))
    same = open_dataset(write(tmp_path / "3.csv", "path,x\nc.png,1\na/1.png,2\n"))
    assert first.digest() != second.digest() and first.digest() == same.digest()
