"""Lists of image files: a path a line, or a table with labels and whatever else is known of each image.

images.txt has a path in each line; where every line ends in a number behind the file's name
(`cats/1.jpg 3`), that is its label. images.csv (separated by commas, semicolons or tabs) has a header
with a column `path`, and may have labels, the split of each image, and further columns, its metadata; or
it has a path and a number in each line, the first included. images.json is in COCO's format.
"""

import csv
import os
import re
from pathlib import Path

import numpy as np

from ..errors import printable
from .annotations import read_coco
from .folders import SPLITS, SPLITS_IN_PLACE_OF, FileSource
from .images import IMAGE_SUFFIXES

# What columns may be called; the first that is there is taken.
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
LABEL_COLUMNS = ("label", "class")
SPLIT_COLUMN = "split"
PATH_AND_LABEL = re.compile(
    rf"(.*({'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))}))\s+(\d+)", re.I
)
PROBES = 8  # files that are looked for before a list is believed


class ListSource(FileSource):
    """Image files of a list, in its order.

    root: the folder that paths are relative to. `labels` is (N,) bytes, as they stand there, or None;
    `metadata` has the further columns, N texts each, by name; `unlabelled_since` what is in the way of
    labels, in words.

    Raises FileNotFoundError where nothing is there of a split, or none of the files that are looked for,
    and ValueError, naming `flag` or another, for a list that cannot be read.
    """

    def __init__(
        self, path: str, split: str, data_root: str | None, label_column: str | None, flag: str
    ):
        self.root = os.fsencode(data_root or os.path.dirname(path) or ".")
        if data_root and not os.path.isdir(data_root):
            raise ValueError(f"--data_root {data_root} is no folder")
        self.unlabelled_since = ""
        suffix = os.path.splitext(path)[1].lower()
        if label_column and suffix in (".txt", ".json"):
            raise ValueError(f"--label_column {label_column} is for a table, not for {path}")
        try:
            columns = READERS.get(suffix, read_table)(path, flag)
        except OSError as error:
            raise ValueError(f"{flag} {path} cannot be read ({error.strerror})") from None
        except csv.Error as error:
            raise ValueError(
                f"{flag} {path} is no table as spreadsheets write it ({error}): look for a quote without its "
                "second, and save it as UTF-8"
            ) from None
        columns = rows_of_split(columns, split, path, flag)
        names = columns.pop(_name_of_column(columns, PATH_COLUMNS))
        labels = columns.pop(_label_column(columns, label_column, path), None)
        self.metadata = columns
        self.labels = self._read_labels(labels)
        self.paths = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self._check_some_are_there(path, flag)

    def _read_labels(self, labels):
        """Labels as an array of bytes, None where an image has none."""
        if labels is None:
            return None
        if "" in labels:
            self.unlabelled_since = f"row {labels.index('') + 1} of its images has no label"
            return None
        return np.array([os.fsencode(label) for label in labels], dtype=np.bytes_)

    def _check_some_are_there(self, path, flag):
        if not len(self):
            return
        probes = np.unique(np.linspace(0, len(self) - 1, PROBES).astype(int)).tolist()
        if not any(os.path.lexists(self._path(index)) for index in probes):
            raise FileNotFoundError(
                f"{flag} {path}: {printable(self.name(0))} is not there, nor is any other of its images "
                "that was looked for: paths are relative to the folder of the list, or to --data_root"
            )


# ============ reading ============
def read_lines(path: str, flag: str = "--data_path") -> dict[str, list[str]]:
    """Columns `path`, and `label` where each line ends in one, of a text with a path a line."""
    text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    matches = [PATH_AND_LABEL.fullmatch(line) for line in lines]
    if lines and all(matches):
        return {"path": [match[1] for match in matches], "label": [match[3] for match in matches]}
    return {"path": lines}


def read_table(path: str, flag: str) -> dict[str, list[str]]:
    """The columns of a table with a header, by name. Raises ValueError, naming `flag`."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        header = file.readline()
        separator = max(",;\t", key=header.count)
        file.seek(0)
        rows = csv.reader(file, delimiter=separator, strict=True)
        names = [name.strip() for name in next(rows, [])]
        if len(names) == 2 and _is_image(names[0]) and names[1].isdecimal():
            file.seek(0)  # the first line is an image too, as in the lists of Places205
            rows, names = csv.reader(file, delimiter=separator, strict=True), ["path", "label"]
        if len(set(names)) < len(names):
            raise ValueError(f"{flag} {path}: two columns of its header have one name")
        if _name_of_column(names, PATH_COLUMNS) is None:
            raise ValueError(
                f"{flag} {path} has no column of paths: call one of {', '.join(names) or 'its columns'} "
                f"path in its first line (or {', '.join(PATH_COLUMNS[1:])})"
            )
        columns = [[] for _ in names]
        for row in rows:
            if not row:
                continue
            if len(row) != len(names):
                raise ValueError(
                    f"{flag} {path}, line {rows.line_num}: {len(row)} values, and the header has "
                    f"{len(names)} columns"
                )
            for column, value in zip(columns, row, strict=True):
                column.append(value.strip())
    return dict(zip(names, columns, strict=True))


def _is_image(name):
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


# By the suffix of the list; others are tables.
READERS = {".txt": read_lines, ".json": read_coco}


def rows_of_split(
    columns: dict[str, list[str]], split: str, path: str, flag: str
) -> dict[str, list[str]]:
    """The rows of a split, where a column says the split of each image; else all of them.

    As with folders, those of test will do for val. Raises FileNotFoundError where there is none.
    """
    name = _name_of_column(columns, (SPLIT_COLUMN,))
    if name is None:
        return columns
    values = [value.lower() for value in columns.pop(name)]
    for candidate in SPLITS_IN_PLACE_OF.get(split, (split,)):
        spellings = SPLITS.get(candidate, (candidate,))
        kept = [row for row, value in enumerate(values) if value in spellings]
        if kept:
            return {name: [column[row] for row in kept] for name, column in columns.items()}
    raise FileNotFoundError(
        f"{flag} {path} has no image whose {SPLIT_COLUMN} is {split}, but "
        f"{', '.join(sorted(set(values)))}"
    )


def _name_of_column(names, wanted):
    """The name of a column that is called like one of `wanted`, in any case, or None."""
    for want in wanted:
        for name in names:
            if name.lower() == want:
                return name
    return None


def _label_column(columns, label_column, path):
    if label_column is None:
        return _name_of_column(columns, LABEL_COLUMNS)
    if label_column not in columns:
        raise ValueError(
            f"--label_column {label_column} is not a column of {path}, which has: {', '.join(columns)}"
        )
    return label_column
