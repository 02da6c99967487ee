"""Features of a frozen network in a file beside the results: computed once, continued where they stopped."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .. import dist
from ..data.datasets import ImageDataset
from ..errors import CheckpointError
from ..labels.features import extract_features
from ..labels.row_file import RowFile, check_space
from ..run.log import write_whole
from ..run.stop import StopSignal


def stored_features(
    folder: Path,
    name: str,
    forward: Callable[[Tensor], Tensor],
    dataset: ImageDataset,
    width: int,
    settings: dict,
    stop: StopSignal,
    indices: Tensor | None = None,
    **extraction,
) -> Tensor | None:
    """Features (n, width) float32 of all images of a dataset, mapped; None when a signal asked to stop.

    They lie in <folder>/<name>.npy, with what they depend on in <name>.json: settings, as JSON has them,
    the images and the precision. indices: of the images to take, (n,), instead of all. extraction: the
    arguments of src.labels.features.extract_features after the images. All processes call it, and each
    computes its share. Raises CheckpointError where the folder holds features of other images or
    settings, and ValueError for features that are not finite, or for want of space.
    """
    count = len(dataset) if indices is None else len(indices)
    settings = {**settings, "images": images_digest(dataset, indices), "width": width}
    settings["precision"] = extraction["precision"]
    path = folder / f"{name}.json"
    complete = dist.broadcast_object(dist.on_main(lambda: _is_complete(path, settings)))
    if complete is None:
        check_space(folder, 4 * count * width, "the features", "evaluate fewer images")
        if dist.is_main():
            _write_settings(path, settings, complete=False)
    rows = RowFile(folder, name, count, width)
    if not complete:

        def extract(numbers, write):
            def write_finite(first, features):
                if not features.isfinite().all():
                    raise ValueError(
                        "--pretrained makes features that are not finite: take another checkpoint"
                    )
                write(first, features)

            chosen = numbers if indices is None else indices.numpy()[numbers]
            extract_features(forward, dataset, indices=chosen, write=write_finite, **extraction)

        rows.fill(extract, stop)
        if stop.agreed():  # all processes come here when their rows are written
            return None
        if dist.is_main():
            _write_settings(path, settings, complete=True)
            rows.forget_chunks()
        dist.barrier()
    return rows.read()


def images_digest(dataset: ImageDataset, indices: Tensor | None = None) -> str:
    """What tells the images of a dataset, or those with these indices, from others: a few letters."""
    digest = dataset.digest()
    if indices is None:
        return digest
    return f"{digest}-{hashlib.blake2b(indices.numpy().tobytes(), digest_size=8).hexdigest()}"


def labelled_digest(dataset: ImageDataset, indices: Tensor | None = None) -> str:
    """The same, of the images and their labels: others where a class of an image is another."""
    labels = dataset.labels if indices is None else dataset.labels[indices]
    digest = hashlib.blake2b(labels.contiguous().numpy().tobytes(), digest_size=8).hexdigest()
    return f"{images_digest(dataset, indices)}-{digest}"


def _is_complete(path, settings):
    """Whether all features are there, None where none are. Raises CheckpointError for others' features."""
    if not path.is_file() or not path.with_suffix(".npy").is_file():
        return None
    stored = json.loads(path.read_text())
    check_settings(stored["settings"], settings, path.parent)
    return stored["complete"]


def check_settings(stored: dict, settings: dict, folder: Path) -> None:
    """Raise CheckpointError where the features in a folder depend on other settings than these, by name."""
    words = {"weights": "of other weights", "images_digest": "of other images"}
    for name, value in settings.items():
        before = stored.get(name)
        if name == "precision" and before is None:  # earlier versions do not say it
            continue
        if before != value:
            what = words.get(name, f"with {name} {before}, not {value}")
            raise CheckpointError(
                f"{folder} holds features {what}: name another --dump_path, or remove that folder"
            )


def _write_settings(path, settings, complete):
    contents = {"settings": settings, "complete": complete}
    write_whole(path, json.dumps(contents, indent=1) + "\n")
