"""Files of features: written by all ranks, whole or not at all, and only with one set of settings.

<split>_features.npy (N, D) float32, <split>_labels.npy (N,) int64 and, written last, <split>.json
with the settings they were made with. Every rank writes and reads its rows of the same file.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import dist
from ..labels.features import share


def check_settings(folder: str | Path, split: str, settings: dict, flag: str) -> dict | None:
    """The settings stored in `folder` for `split`, or None where there are none.

    Raises ValueError, naming `flag`, if one that is also in `settings` has another value there.
    """
    path = Path(folder) / f"{split}.json"
    if not path.is_file():
        return None
    stored = json.loads(path.read_text())
    for name, value in settings.items():
        if name in stored and stored[name] != value:
            raise ValueError(
                f"{flag} {folder} holds {split} features with {name} {stored[name]}, not {value}: "
                "name another folder"
            )
    return stored


def check_dump(folder: str | Path, settings: dict) -> None:
    """Raise ValueError if features with `settings` cannot be dumped there; makes the folder."""
    for split in ("train", "val"):
        check_settings(folder, split, settings, "--dump_features")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--dump_features {folder} cannot be made: {error.strerror}") from None


def dump_features(
    folder: str | Path, split: str, features: Tensor, labels: Tensor, settings: dict
) -> None:
    """Write the features (n, D) and labels (n,) of every rank's share, whole or not at all.

    `settings` is what the features depend on, as JSON. Raises ValueError on every rank if the
    folder holds features of this split with other settings, or if it cannot be written to.
    """
    folder = Path(folder)
    check_settings(folder, split, settings, "--dump_features")
    counts = dist.all_gather_rows(torch.tensor([len(features)])).tolist()
    before, total = sum(counts[: dist.rank()]), sum(counts)
    arrays = {"features": features.float().numpy(), "labels": labels.long().numpy()}
    parts = {name: folder / f"{split}_{name}.npy.part" for name in [*arrays, "settings"]}

    def begin():
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            header = np.lib.format.header_data_from_array_1_0(array)
            with open(parts[name], "wb") as file:
                shape = (total, *array.shape[1:])
                np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})

    def write_my_rows():
        for name, array in arrays.items():
            with open(parts[name], "r+b") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                file.seek(before * array.itemsize * array[:1].size, os.SEEK_CUR)
                file.write(np.ascontiguousarray(array).data)
                file.flush()
                os.fsync(file.fileno())

    def finish():
        parts["settings"].write_text(json.dumps(settings, indent=1))
        for name in arrays:
            os.replace(parts[name], folder / f"{split}_{name}.npy")
        os.replace(parts["settings"], folder / f"{split}.json")

    nothing = dict  # what the other ranks do meanwhile
    for step in (begin if dist.is_main() else nothing, write_my_rows):
        _together(step, folder)
    _together(finish if dist.is_main() else nothing, folder)


def _together(step, folder):
    """Run `step` on every rank; when it fails on one, all of them raise."""
    error = ""
    try:
        step()
    except OSError as reason:
        error = str(reason)
    if dist.all_reduce_max(torch.tensor(int(bool(error)))).item():
        raise ValueError(f"--dump_features {folder} cannot be written: {error or 'see rank 0'}")


def load_features(folder: str | Path, split: str, settings: dict) -> tuple[Tensor, Tensor, dict]:
    """This rank's share of what `dump_features` wrote: features, labels, and the settings stored.

    Raises FileNotFoundError where there is nothing, ValueError where a value of `settings` differs
    or a file is damaged.
    """
    stored = check_settings(folder, split, settings, "--load_features")
    if stored is None:
        raise FileNotFoundError(
            f"--load_features {folder} holds no {split} features: there is no {split}.json in it"
        )
    arrays = []
    for name in ("features", "labels"):
        path = Path(folder) / f"{split}_{name}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as reason:
            raise ValueError(f"--load_features: {path} cannot be read: {reason}") from None
        rows = share(len(array))
        arrays.append(torch.from_numpy(np.array(array[rows.start : rows.stop])))
    return *arrays, stored
