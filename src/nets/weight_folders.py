"""Folders in the layout of the Hugging Face hub: config.json beside weights, in one file or in shards.

The names are those that save_pretrained of transformers (https://github.com/huggingface/transformers)
and timm write.
"""

import json
import logging
import os
from pathlib import Path

from ..errors import CheckpointError, cause
from .weights import INDEX, read_file

logger = logging.getLogger(__name__)

FILES = ("model.safetensors", "pytorch_model.bin")  # the first that is there is taken


def read_folder(folder: str) -> dict:
    """The tensors of a folder of the hub, by name.

    Raises FileNotFoundError where it holds no weights or lacks one of their shards, CheckpointError for an
    index that cannot be used, and as src.nets.weights.read_file.
    """
    for name in FILES:
        for found in (name, name + INDEX):
            path = os.path.join(folder, found)
            if os.path.isfile(path):
                logger.info(f"{folder}: reading {found}")
                return read_shards(path) if found.endswith(INDEX) else read_file(path)
    raise FileNotFoundError(
        f"{folder} holds no weights: a run has checkpoint.pth, a folder of the Hugging Face hub "
        f"{' or '.join(FILES)}, or one of these with {INDEX} behind its name"
    )


def read_shards(index: str) -> dict:
    """The tensors of all files that an index names; raises as read_folder."""
    try:
        contents = json.loads(Path(index).read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{index} cannot be read ({cause(error)})") from error
    file_of = contents.get("weight_map") if isinstance(contents, dict) else None
    is_usable = isinstance(file_of, dict) and all(
        isinstance(file, str) and file == os.path.basename(file) and file.strip(".")
        for file in file_of.values()
    )
    if not is_usable or not file_of:
        raise CheckpointError(
            f"{index} must have a weight_map of names of tensors to names of files beside it"
        )
    weights = {}
    for file in sorted(set(file_of.values())):
        path = os.path.join(os.path.dirname(index), file)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{index} names {file}, which is not beside it: fetch it")
        shard = read_file(path)
        names = [name for name in file_of if file_of[name] == file]
        lacking = [name for name in names if name not in shard]
        if lacking:
            raise CheckpointError(
                f"{index} names tensors that {file} lacks ({lacking[0]} for one): fetch both anew"
            )
        weights |= {name: shard[name] for name in names}
    return weights


def heads_of_config(path: str | Path) -> int | None:
    """The attention heads that config.json says beside weights of the hub, a folder or a file; else None."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    try:
        is_of_hub = path == folder or path.name.removesuffix(INDEX) in FILES
        config = json.loads((folder / "config.json").read_text()) if is_of_hub else None
    except (ValueError, OSError):
        return None  # as of a folder without it: the tensors say the rest
    heads = config.get("num_attention_heads") if isinstance(config, dict) else None
    return heads if type(heads) is int and heads > 0 else None
