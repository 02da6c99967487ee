"""The table beside a file of features: which image each row is, and what is known about it.

files.csv has a line for each image, in the order of the features: row, path, label and class where
there are any, cluster and cosine where images were clustered, then the metadata of a list.
"""

import csv
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ..data.datasets import ImageDataset
from ..errors import writing
from ..run.log import whole

ROWS = 4096  # of a Parquet file at once


def columns_of(
    dataset: ImageDataset, assignments: Tensor | None = None, cosines: Tensor | None = None
) -> dict[str, list]:
    """The columns of the table by name, a value for each image.

    assignments, cosines (N,): of clusters. Metadata of the name of another column is kept as meta_<name>.
    """
    columns = {
        "row": list(range(len(dataset))),
        "path": [dataset.file_name(index) for index in range(len(dataset))],
    }
    if dataset.labels is not None and dataset.labels.ndim == 1:
        labels = dataset.labels.tolist()
        columns["label"] = labels
        if dataset.classes:
            columns["class"] = [dataset.classes[label] for label in labels]
    if assignments is not None:
        columns["cluster"] = assignments.tolist()
        columns["cosine"] = [round(cosine, 6) for cosine in cosines.tolist()]
    for name, values in dataset.metadata.items():
        columns[f"meta_{name}" if name in columns else name] = values
    return columns


def write_csv(path: Path, columns: dict[str, list]) -> None:
    """Write the table, whole or not at all. Raises CheckpointError where it cannot be written."""
    with writing(path), whole(path) as spare:
        with open(spare, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


def write_parquet(path: Path, columns: dict[str, list], features: np.ndarray) -> None:
    """Write the table with a column `features` (D numbers an image) as Parquet, as write_csv does.

    Raises ValueError where the package pyarrow is missing.
    """
    pyarrow = import_pyarrow()
    from pyarrow import parquet

    texts = {name: _without_surrogates(values) for name, values in columns.items()}
    width = int(np.prod(features.shape[1:]))
    with writing(path), whole(path) as spare:
        writer = None
        for start in range(0, max(1, len(features)), ROWS):
            block = np.ascontiguousarray(features[start : start + ROWS])
            rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(block.reshape(-1)), width)
            parts = {name: values[start : start + ROWS] for name, values in texts.items()}
            table = pyarrow.table({**parts, "features": rows})
            writer = writer or parquet.ParquetWriter(spare, table.schema)
            writer.write_table(table)
        writer.close()


def import_pyarrow() -> ModuleType:
    """The package; ValueError where it is missing."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError("--parquet needs the package pyarrow: pip install pyarrow") from None
    return pyarrow


def unreadable_rows(features: np.ndarray) -> Tensor:
    """Which images could not be read, (N,) bool: extract.py writes NaN in their place.

    features: (N, ...), of which the first number of each row is looked at.
    """
    first = features.reshape(len(features), -1)[:, 0]
    return torch.from_numpy(np.isnan(first))


def _without_surrogates(values):
    """Texts that Parquet takes: bytes that are no text become \\xe9 and the like."""
    if not values or not isinstance(values[0], str):
        return values
    return [
        text.encode(errors="surrogateescape").decode(errors="backslashreplace") for text in values
    ]
