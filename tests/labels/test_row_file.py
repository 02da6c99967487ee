"""src.labels.row_file on a disk that is full."""

from pathlib import Path

import pytest
import torch

from src.errors import CheckpointError
from src.labels.row_file import RowFile, write_array, write_tensors

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
ROWS = torch.zeros(2000, 3)  # more than a file's buffer holds


def write_rows(folder):
    file = RowFile(folder, "rows", 2000, 3)
    file.path.unlink()
    file.path.symlink_to("/dev/full")
    file.write(0, ROWS)


def mark_rows(folder):
    file = RowFile(folder, "rows", 2000, 3)
    (folder / "rows.0.done").symlink_to("/dev/full")
    file.mark(0)


def write_part(write):
    def act(folder):
        (folder / "rows.part").symlink_to("/dev/full")
        write(folder / "rows.npy")

    return act


@pytest.mark.parametrize(
    "act, name",
    [
        (write_rows, "rows.npy"),
        (mark_rows, "rows.0.done"),
        (
            lambda folder: write_part(lambda path: RowFile(folder, "rows", 2000, 3))(folder),
            "rows.npy",
        ),
        (write_part(lambda path: write_array(path, ROWS)), "rows.npy"),
        (write_part(lambda path: write_tensors(path, {"rows": ROWS})), "rows.npy"),
    ],
    ids=["rows", "mark", "new file", "array", "tensors"],
)
def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path, act, name):
    with pytest.raises(CheckpointError, match=f"{name} cannot be written .No space left on device"):
        act(tmp_path)
