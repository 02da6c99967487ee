"""Reading weights from elsewhere into a network, safely, and saying what fitted.

Files: this repository's, the released SwAV, DeepCluster, DeeperCluster, DeepCluster-v2 and DINO
checkpoints, torchvision's, safetensors, folders of the Hugging Face hub, and those of
src.nets.foreign_names: VISSL's, lightly's, solo-learn's, MoCo's, DINOv2's, timm's, transformers'.
Only tensors, plain containers, argparse.Namespace and numpy scalars are unpickled.
"""

import argparse
import hashlib
import logging
import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import dist
from ..errors import CheckpointError, cause

logger = logging.getLogger(__name__)

# What published files wrap their weights in, and what they put before the names of a network. "average" is
# of eval_finetune.py --ema_decay, whose accuracies are those of the average; without that it is empty.
SECTIONS = ("state_dict", "average", "model", "teacher", "student", "trunk", "model_state_dict")
PREFIXES = ("", "backbone.", "trunk.", "encoder.", "encoder_q.", "base_encoder.", "model.", "body.",
            "model.backbone.", "teacher_backbone.", "student_backbone.", "backbone.vit.",
            "teacher_backbone.vit.", "student_backbone.vit.")  # fmt: skip
VISSL = ("classy_state_dict", "base_model", "model")  # what it nests its trunk and heads in
OWN_PREFIXES = PREFIXES[:3]  # networks of ours have them too
SOBEL = "sobel."  # filters before a trunk, whose names do not start as the trunk's do
COUNTER = "num_batches_tracked"  # of a batch normalisation: a file may lack it, and all fit
# What a file may have besides the layers of a trunk, by the first part of its name: classifiers, which
# some networks keep a normalisation under; and what makes a trunk another network, wherever it stands.
CLASSIFIERS = ("fc", "classifier", "heads", "head")
OF_A_TRUNK = re.compile(
    r"(layer|block|stage|stem|conv|bn\d*$|norm|patch_embed|pos_embed|rope|sobel$|(?!mask_)\w+_tokens?$)"
)
LIBRARIES = ("torchvision:", "timm:")  # before the name of a network, instead of a file
INDEX = ".index.json"  # behind the name of weights in several files: which file has which tensor
COUNTS_OF_A_PROFILER = ("total_ops", "total_params")  # thop leaves them in every layer


@dataclass(frozen=True)
class Report:
    """Names of the tensors that a network took from a file, that the file lacked, had besides, or
    had in another shape. Batch normalisation's num_batches_tracked never counts as missing."""

    matched: list[str]
    missing: list[str]
    left_over: list[str]
    wrong_shape: list[str]


def read_weights(path: str | Path, checkpoint_key: str | None = None) -> dict[str, torch.Tensor]:
    """Named tensors of a file, without the "module." of DistributedDataParallel and DataParallel.

    path: a file, the folder of a run or one in the layout of the Hugging Face hub, an http(s) address, or
    "torchvision:resnet50" or "timm:resnet50" for what these packages have. checkpoint_key: the section to
    take, such as "student", or what the names of the network begin with, such as "momentum_encoder"; None:
    the first of SECTIONS that has tensors. A file without any is taken whole. Raises FileNotFoundError,
    ValueError (another key would do) or CheckpointError (not a file of weights).
    """
    return tensors_of(read_file(path), path, checkpoint_key)


def tensors_of(
    contents: dict, path: str | Path, checkpoint_key: str | None = None
) -> dict[str, torch.Tensor]:
    """What read_weights gives, of the contents of a file that is read already; path: for messages."""
    names = _sections(contents)
    filled = [key for key in SECTIONS if key in names and _tensors(contents[key])]
    key = checkpoint_key if checkpoint_key in names else next(iter(filled), None)
    weights = dist.without_wrapper(_tensors(contents if key is None else contents[key]))
    if checkpoint_key is not None and checkpoint_key not in names:
        start = f"{checkpoint_key}."
        part = {
            name.removeprefix(start): weights[name] for name in weights if name.startswith(start)
        }
        if names and not part:
            raise ValueError(
                f"--checkpoint_key {checkpoint_key} is not in {path}, which has: {', '.join(names)}"
            )
        if not part:
            logger.info(f"{path} has no sections: --checkpoint_key {checkpoint_key} is not needed")
        weights = part or weights
    others = [name for name in names if _tensors(contents[name])]
    if not weights and others:
        raise ValueError(
            f"{path} has weights in its sections {', '.join(others)}: say which to take, as in "
            f"--checkpoint_key {others[0]}"
        )
    if not weights:
        raise CheckpointError(
            f"{path} holds no tensors by name; it has: {_some(map(str, contents))}"
        )
    # DeepCluster ran its convolutions alone, not the linear layers, on several GPUs.
    return {name.replace("features.module.", "features."): x for name, x in weights.items()}


def sections(path: str | Path) -> list[str]:
    """Names of the parts of a file, such as "student" and "teacher". Raises as read_weights."""
    return _sections(read_file(path))


def epoch_of(path: str | Path, method: str) -> int:
    """The epochs that a file says it was trained for, 0 if it does not.

    Raises as read_weights, and CheckpointError for a run of this repository of another method.
    """
    contents = read_file(path)
    epoch = contents.get("epoch", 0)
    if contents.get("method", method) != method:
        raise CheckpointError(
            f"--resume {path} is of another method ({contents['method']}, not {method}): start from "
            "its weights with --init_from"
        )
    logger.info(f"{path} was trained for {epoch} epochs")
    return epoch if isinstance(epoch, int) else 0


def load_weights(
    module: torch.nn.Module,
    path: str | Path,
    checkpoint_key: str | None = None,
    allow_missing: Sequence[str] = (),
) -> Report:
    """Give `module` the weights of a file, matched by name and shape, and log what fitted.

    Names are taken as they are, or as src.nets.foreign_names makes them if more fit so. Of the usual
    prefixes, the one under which most tensors fit is taken off the names (or put on, where the network
    has it and the file has not). allow_missing: starts of names that the file may lack, have in another
    shape or have more of. Raises as read_weights, and CheckpointError, before anything is changed, when
    nothing fits, when tensors outside allow_missing are missing, and when the file has layers outside
    allow_missing that the network lacks: heads, decoders and other networks may be left over.
    """
    return fit_weights(module, read_weights(path, checkpoint_key), path, allow_missing)


def fit_weights(
    module: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    source: str | Path,
    allow_missing: Sequence[str] = (),
) -> Report:
    """What load_weights does with tensors of a file, `source`, that is read already."""
    from . import foreign_names  # here, so that scripts that read no weights do without it

    module = dist.unwrapped(module)
    own = module.state_dict()
    lacking, heads = foreign_names.what_is_lacking(weights), _heads(module)
    weights, renamed = _best_names([weights, foreign_names.with_our_names(weights)], own)
    if heads and (said := foreign_names.heads_of(weights)) not in (None, heads):
        raise CheckpointError(
            f"{source} is of a vision transformer with {said} heads, and this network has {heads}: give "
            f"--num_heads {said}"
        )
    matched = [name for name in own if _fits(own, renamed, name)]
    wrong_shape = [name for name in own if name in renamed and name not in matched]
    missing = [name for name in own if name not in renamed and not name.endswith(COUNTER)]
    left_over = sorted(set(weights) - {renamed[name][0] for name in matched + wrong_shape})
    shapes = [
        f"{name} {tuple(renamed[name][1].shape)} for {tuple(own[name].shape)}"
        for name in wrong_shape
    ]
    if all(name.endswith(COUNTER) for name in matched):
        if lacking:
            raise CheckpointError(f"{source} has {lacking}, which no network here has")
        raise CheckpointError(
            f"{source}: none of its {len(weights)} tensors ({_some(weights)}) fits this network "
            f"({_some(own)}): check --arch and --checkpoint_key"
        )
    required = [n for n in missing + wrong_shape if not n.startswith(tuple(allow_missing))]
    if required:
        if lacking:
            raise CheckpointError(f"{source} has {lacking}, which no network here has")
        raise CheckpointError(
            f"{source} lacks {len(required)} of the {len(own)} tensors of this network, or has them "
            f"in another shape ({_some(required)}): check --arch and the flags of its head"
        )
    foreign = [
        renamed[name][0]
        for name in renamed
        if renamed[name][0] in left_over
        and not name.startswith(tuple(allow_missing))
        and _is_layer_of_trunk(name, own)
    ]
    if foreign:
        raise CheckpointError(
            f"{source} has {len(foreign)} tensors of layers that this network lacks ({_some(foreign)}), "
            "without which its features would be others: check --arch, or take the file of a network "
            "that is built here"
        )
    module.load_state_dict({name: renamed[name][1] for name in matched}, strict=False)
    logger.info(
        f"{source}: matched {len(matched)} of {len(own)} tensors; missing: {_some(missing)}; "
        f"left over: {_some(left_over)}; wrong shape: {_some(shapes)}"
    )
    return Report(matched, missing, left_over, wrong_shape)


def fingerprint(*modules: torch.nn.Module) -> str:
    """A few letters that tell networks with other weights apart.

    modules: the parts of one network, with different names of tensors.
    """
    digest, tensors = hashlib.sha256(), {}
    for module in modules:
        tensors |= module.state_dict()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _tensors(section):
    """{name: tensor} of what is one in a section of a file."""
    return {str(name): x for name, x in section.items() if isinstance(x, torch.Tensor)}


def _sections(contents):
    return [str(key) for key, value in contents.items() if isinstance(value, dict)]


def read_file(path: str | Path) -> dict:
    """What a file, the checkpoint of a run's folder or a folder of the hub holds; raises as read_weights."""
    path = str(path)
    if path.startswith(LIBRARIES):
        from .library_weights import (
            read_library,  # here, so that scripts that read no weights do without it
        )

        return read_library(path)
    if os.path.isdir(path):
        folder, path = path, os.path.join(path, "checkpoint.pth")
        if not os.path.isfile(path):
            from .weight_folders import read_folder  # here, as above

            return read_folder(folder)
    if path.endswith(INDEX) and os.path.isfile(path):
        from .weight_folders import read_shards

        return read_shards(path)
    file = _local(path)
    try:
        contents = _read(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no weights file {path}") from None
    except ImportError as error:
        raise ValueError(
            f"{path} needs the package safetensors: pip install safetensors"
        ) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds objects other than tensors and plain values, which are "
            f"not read because they could run code ({cause(error)})"
        ) from error
    except Exception as error:  # whatever the bytes of a damaged file make torch raise
        raise CheckpointError(f"{path} cannot be read as weights ({cause(error)})") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, not tensors by name")
    nested = contents
    for key in VISSL:
        nested = nested.get(key, {}) if isinstance(nested, dict) else {}
    return nested if isinstance(nested, dict) and "trunk" in nested else contents


def _local(path):
    """The file itself, or the copy of that at an address; raises CheckpointError if it is damaged."""
    from . import downloads  # here, so that scripts that read no weights do without it

    if path.startswith(("http://", "https://")):
        return str(downloads.fetch(path))
    if os.path.isfile(path):
        downloads.refuse_damaged(path)
    return path


def _read(path):
    # torch.load is banned in favour of this module and src.run.checkpoint.
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    with torch.serialization.safe_globals(_allowed_globals()):
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251


def _allowed_globals():
    """What DINO's training checkpoints hold besides tensors: a Namespace and numpy scalars."""
    scalar = np.float64(0).__reduce__()[0]
    old_and_new = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [argparse.Namespace, np.dtype, *old_and_new, *kinds]


def _best_names(candidates, own):
    """(one of the candidates for the tensors of a file, {name in the network: (name there, tensor)}),
    under the prefixes with which most tensors fit."""
    named = [
        (weights, _rename(weights, strip, put))
        for weights in candidates
        for strip in PREFIXES
        for put in OWN_PREFIXES
    ]
    return max(named, key=lambda pair: sum(_fits(own, pair[1], name) for name in pair[1]))


def _heads(module):
    """The attention heads of a vision transformer of ours, which may be the backbone of `module`."""
    return getattr(getattr(module, "backbone", module), "num_heads", None)


def _is_layer_of_trunk(name, own):
    """Whether a tensor that a network lacks changes its features: it is in a module of the network, or
    is called like part of a trunk. Heads, decoders, projectors and other networks beside it do not."""
    prefix = next(p for p in reversed(OWN_PREFIXES) if name.startswith(p))
    parts = name.removeprefix(prefix).split(".")
    if parts[0] in CLASSIFIERS or parts[-1] in (COUNTER, *COUNTS_OF_A_PROFILER):
        return False
    modules = [prefix + ".".join(parts[:i]) + "." for i in range(1, len(parts))]
    return any(n.startswith(tuple(modules)) for n in own) or bool(OF_A_TRUNK.match(parts[0]))


def _rename(weights, strip, put):
    """{name in the network: (name in the file, tensor)}"""
    renamed = {
        put + name.removeprefix(strip): (name, value)
        for name, value in weights.items()
        if name.startswith(strip)
    }
    sobel = {
        start + name: (name, value)
        for name, value in weights.items()
        for start in ("", put)
        if name.startswith(SOBEL)
    }
    return {**sobel, **renamed}


def _fits(own, renamed, name):
    return name in own and name in renamed and own[name].shape == renamed[name][1].shape


def _some(names, most=6):
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
