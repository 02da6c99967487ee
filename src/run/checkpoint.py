"""Saving and resuming a run without ever losing it.

A run's folder has checkpoint.pth (the newest), checkpoint.prev.pth (the one before) and
checkpoints/<name>.pth (kept). Each is written under another name, flushed to disk and then renamed,
so that at every moment one whole file is there. All are read with weights_only=True. Weights from
elsewhere are read by src.nets.weights.
"""

import contextlib
import errno
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import dist
from ..data.datasets import NAMES
from ..errors import CheckpointError, beneath, cause, writing

logger = logging.getLogger(__name__)

NEWEST, PREVIOUS = "checkpoint.pth", "checkpoint.prev.pth"
BEST = "best.pth"  # in checkpoints/, of --guard_knn
MAPPED = 2**31  # bytes beyond which a checkpoint is mapped, not read as a whole
# What a storage says that may give the file another time: nothing is known to be wrong with it.
OF_STORAGE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM)
# Which flag decides about a tensor, by the start of its name.
FLAGS = {
    "prototypes": "--nmb_prototypes and --feat_dim",
    "projection_head": "--hidden_mlp, --feat_dim, --head_dims and --head_bn",
    "head.": "--out_dim, --head_layers, --hidden_dim, --bottleneck_dim and the other flags of the head",
    "backbone.": "--arch, --patch_size, --width, --depth, --stem and --in_chans",
    "": "--arch, --stem and --in_chans",
}

# What a saved network, optimizer or queue cannot do without.
SAME = (
    "optimizer",
    "fixed_prototypes",
    "crops_for_assign",
    "norm_last_layer",
    "super_classes",
    "rotnet",
    "image_padding",
)
# Parts of a method's state that have a row for each image, by its number.
BY_IMAGE = ("memory_bank", "pseudo_labels")


def check_writable(folder: str | Path) -> None:
    """Make sure, before a run starts, that it can save. Raises CheckpointError if not."""
    probe = Path(folder) / f"{NEWEST}.tmp-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        _write(probe, lambda file: file.write(bytes(4096)))
        probe.unlink(missing_ok=True)  # another node may use the same name
    except OSError as error:
        raise CheckpointError(
            f"--dump_path {folder} cannot be written to ({cause(error)}): choose another folder"
        ) from error


def save_checkpoint(folder: str | Path, state: dict, keep_as: str | None = None) -> None:
    """Write `state` to checkpoint.pth; the file before becomes checkpoint.prev.pth.

    state: dicts and lists of tensors, numbers, strings and None. keep_as: also keep the file as
    checkpoints/<keep_as>.pth. Call it in one process. Raises ValueError naming a key that is not
    plain, and CheckpointError when the disk does not take it; the files before are untouched then.
    """
    folder = Path(folder)
    size = _check_plain(state, "")
    target = newest = folder / NEWEST
    spare = folder / f"{NEWEST}.tmp-{os.getpid()}"
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        _write(spare, lambda file: torch.save(state, file))
        if newest.exists():
            _copy(newest, folder / PREVIOUS)
        os.replace(spare, newest)
        if keep_as is not None:
            target = folder / "checkpoints" / f"{keep_as}.pth"
            _copy(newest, target)
        _flush_folder(folder)
    except (OSError, RuntimeError) as error:
        _remove([spare])
        free = shutil.disk_usage(folder).free / 1e6 if folder.is_dir() else 0.0
        raise CheckpointError(
            f"{target} cannot be written ({cause(beneath(error))}): it needs {size / 1e6:.1f} MB and "
            f"{free:.1f} MB are free; what was saved before is untouched"
        ) from error


def save_together(folder: str | Path, state: dict, keep_as: str | None = None) -> None:
    """save_checkpoint by the main process; all call it, and all raise CheckpointError if it fails."""
    by_main(lambda: save_checkpoint(folder, state, keep_as=keep_as), "save")


def keep_best(folder: str | Path) -> None:
    """Keep the newest checkpoint as checkpoints/best.pth; all processes call it. Raises CheckpointError."""

    def copy():
        folder_of_best = Path(folder) / "checkpoints"
        with writing(folder_of_best / BEST):
            folder_of_best.mkdir(parents=True, exist_ok=True)
            _copy(Path(folder) / NEWEST, folder_of_best / BEST)

    by_main(copy, "keep the best state")


def go_back_to_best(folder: str | Path) -> None:
    """Make checkpoints/best.pth the newest checkpoint; the one before it stays as checkpoint.prev.pth.

    All processes call it. Raises CheckpointError.
    """

    def copy():
        with writing(Path(folder) / NEWEST):
            _copy(Path(folder) / NEWEST, Path(folder) / PREVIOUS)
            _copy(Path(folder) / "checkpoints" / BEST, Path(folder) / NEWEST)

    by_main(copy, "go back to the best state")


def by_main(action: Callable[[], Any], what: str) -> Any:
    """What `action` returns in the main process, None in others; all call it.

    what: it does, for people. All raise CheckpointError if it does.
    """
    result = failed = None
    if dist.is_main():
        try:
            result = action()
        except CheckpointError as error:
            failed = error
    if dist.all_reduce_max(torch.tensor(int(failed is not None))).item():
        raise failed or CheckpointError(f"rank 0 could not {what}, see its message")
    return result


def load_checkpoint(folder: str | Path) -> dict | None:
    """The newest readable checkpoint of a run (tensors on the CPU), None if it has none.

    A torn or damaged file is set aside as *.unreadable and the one before it is taken, with a warning. All
    processes may call this. Raises CheckpointError when there are files and none can be read, or the
    storage does not give one.
    """
    from ..nets.downloads import archive_fault  # here, since --help does without it

    folder = Path(folder)
    if dist.is_main():  # which holds the folder's lock: nobody else is writing these
        for pattern in (f"{NEWEST}.tmp-*", f"{PREVIOUS}.tmp-*", "checkpoints/*.pth.tmp-*"):
            _remove(folder.glob(pattern))
    unreadable = []
    for path in (folder / NEWEST, folder / PREVIOUS):
        try:
            # Of a large file each process reads what it needs: DeeperCluster's holds 42 GB.
            mapped = os.path.getsize(path) > MAPPED
            if not mapped or dist.is_main():
                if (fault := archive_fault(path)) is not None:
                    raise CheckpointError(f"it {fault}")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except FileNotFoundError:
            continue
        except Exception as error:  # a torn file raises whatever its last bytes make of it
            if getattr(error, "errno", None) in OF_STORAGE:
                raise CheckpointError(
                    f"{path} cannot be read now ({cause(error)}): start again when its storage gives it, or "
                    "move it away to go on from the checkpoint before"
                ) from error
            logger.warning("%s cannot be read (%s)", path, cause(error))
            unreadable.append(path)
            continue
        if path.name == PREVIOUS:
            logger.warning("going on from %s, the checkpoint before", path)
        if dist.is_main():
            for torn in unreadable:  # or the next save would put it in the place of the good one
                os.replace(torn, torn.with_name(f"{torn.name}.unreadable"))
        return state
    if unreadable:
        names = " and ".join(str(path) for path in unreadable)
        raise CheckpointError(f"{names} cannot be read: move away what is there to start afresh")
    return None


def load_state(module: torch.nn.Module, state: dict, source: str | Path = NEWEST) -> None:
    """Load all of a state dict or nothing, with or without DistributedDataParallel on either side.

    Raises CheckpointError with the flag to change and the first tensors that do not fit.
    """
    module = dist.unwrapped(module)
    state, own = dist.without_wrapper(state), module.state_dict()
    problems = {name: "only in this network" for name in own if name not in state}
    problems |= {name: "only in the file" for name in state if name not in own}
    resizing = tuple(
        f"{name}." for name, part in module.named_modules() if getattr(part, "resizable", False)
    )
    for name in own.keys() & state.keys():
        saved_shape, own_shape = tuple(state[name].shape), tuple(own[name].shape)
        if saved_shape != own_shape and not (
            name.startswith(resizing) and saved_shape[1:] == own_shape[1:]
        ):
            problems[name] = f"{saved_shape} in the file, {own_shape} here"
    if problems:
        order = [name for name in [*own, *state] if name in problems]
        first = order[0]
        flags = next(flags for start, flags in FLAGS.items() if first.startswith(start))
        details = "; ".join(f"{name} is {problems[name]}" for name in dict.fromkeys(order[:3]))
        raise CheckpointError(
            f"{source} is of another network ({details}; {len(problems)} tensors in all): start "
            f"with the {flags} that it was trained with, or with another --dump_path"
        )
    module.load_state_dict(state)


# ============ resuming ============
def check_same_run(
    state: dict,
    method: str,
    networks: list[str],
    arguments: dict,
    num_images: int,
    images_digest: str,
    folder: str | Path,
) -> None:
    """Log every flag that has changed; CheckpointError for another method, data or optimizer.

    images_digest: of ImageDataset. Images of other names are refused where something is known of each
    image by its number, and else logged.
    """
    other = state.get("method", method)  # runs of the first versions have none
    if other != method or not all(name in state for name in networks):
        raise CheckpointError(
            f"{folder} holds a run of another method ({state.get('method', 'unnamed')}, not {method}): use "
            "another --dump_path, or start from its weights with --init_from"
        )
    before, changed = state["args"], None
    if arguments["arch"] == "vgg16" and arguments.get("sobel") is False:
        before = {"image_padding": 0, **before}  # runs of the first versions padded none
    for name in sorted(before.keys() & arguments.keys()):
        if before[name] != arguments[name]:
            logger.info("--%s was %s and is now %s", name, before[name], arguments[name])
            if name in SAME:
                changed = f"--{name} {before[name]}, not {arguments[name]}"
    sets = {str(before.get("data_path")), str(arguments.get("data_path"))}
    if state["num_images"] != num_images:
        images = f"{state['num_images']:,} images, not {num_images:,}"
        changed = f"--data_path {before['data_path']} with {images}"
    elif len(sets) == 2 and sets <= set(NAMES):  # of as many images, which all have the same names
        changed = f"--data_path {before['data_path']}, not {arguments['data_path']}"
    elif _have_other_names(state.get("images_digest"), images_digest):
        by_image = [name for name in BY_IMAGE if name in state["method_state"]]
        if by_image:
            names = " and ".join(name.replace("_", " ") for name in by_image)
            changed = f"images of other names in --data_path, by whose order its {names} goes"
        else:
            logger.info(
                "note: the images of --data_path have other names than before, or another order"
            )
    if changed:
        raise CheckpointError(
            f"{folder} holds a run with {changed}: use another --dump_path, or start from its weights "
            "with --init_from"
        )


def check_is_of_a_run(state: Any, folder: str | Path) -> None:
    """CheckpointError for what is not the checkpoint of a run: weights alone, a list, another program's."""
    parts = {"epoch": int, "samples_done": int, "args": dict, "num_images": int, "optimizer": dict}
    wrong = list(parts)
    if isinstance(state, dict):
        wrong = [name for name, kind in parts.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise CheckpointError(
            f"{Path(folder) / NEWEST} is not the checkpoint of a run, which has {', '.join(wrong)}: use "
            "another --dump_path, or start from its weights with --init_from"
        )


def _have_other_names(before, now):
    """Whether digests are of as many images with other names; of another number their rows tell."""
    if before is None or before == now:  # checkpoints of the first versions have none
        return False
    return before.partition("-")[0] == now.partition("-")[0]


def check_same_place(epoch: int, samples_done: int, folder: str | Path) -> None:
    """CheckpointError unless all processes found the same checkpoint, (-1, 0) for none."""
    place = torch.tensor([[epoch, samples_done]])
    if len(dist.all_gather_rows(place).unique(dim=0)) > 1:
        raise CheckpointError(
            f"the processes do not see the same checkpoint in --dump_path {folder}: it must be a "
            "folder that all of them share"
        )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the optimizer's memory; its options, such as the weight decay, stay those of the flags."""
    options = [
        {key: group[key] for key in group if key != "params"} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


# ============ files ============
def _check_plain(value, name):
    """Bytes of the tensors in `value`; ValueError for what weights_only=True would not read."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if type(value) in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int):
                raise ValueError(
                    f"checkpoint{name} has the key {key!r}; use strings or whole numbers"
                )
        return sum(_check_plain(item, f"{name}[{key!r}]") for key, item in value.items())
    if type(value) in (list, tuple):
        return sum(_check_plain(item, f"{name}[{i}]") for i, item in enumerate(value))
    if type(value) not in (bool, int, float, str, type(None)):
        kind = f"{type(value).__module__}.{type(value).__name__}"
        raise ValueError(
            f"checkpoint{name} is a {kind}; store tensors, Python numbers, strings, lists and dicts"
        )
    return 0


def _write(path, write):
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _copy(source, target):
    """A second name for a file that nobody writes into; a real copy where there are no links."""
    spare = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    spare.unlink(missing_ok=True)
    try:
        os.link(source, spare)
    except OSError:
        _write(spare, lambda file: file.write(source.read_bytes()))
    os.replace(spare, target)
    spare.unlink(missing_ok=True)  # still there if both were names of one file


def _remove(paths):
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _flush_folder(folder):
    for path in (folder, folder / "checkpoints"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
