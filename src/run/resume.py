"""Whether a checkpoint and a command line belong together, and how both decide what goes on."""

import logging

import torch

from .. import dist
from ..nets.weights import CheckpointError

logger = logging.getLogger(__name__)

# What a saved optimizer or queue cannot do without.
SAME = ("optimizer", "fixed_prototypes", "crops_for_assign", "norm_last_layer")
SAME += ("super_classes", "rotnet")


def check_same_run(
    state: dict, method: str, networks: list[str], arguments: dict, num_images: int, folder
):
    """Log every flag that has changed; CheckpointError for another method, data or optimizer."""
    other = state.get("method", method)  # runs of the first versions have none
    if other != method or not all(name in state for name in networks):
        raise CheckpointError(
            f"{folder} holds a run of another method ({state.get('method', 'unnamed')}, not {method}): use "
            "another --dump_path, or start from its weights with --init_from"
        )
    before, changed = state["args"], None
    for name in sorted(before.keys() & arguments.keys()):
        if before[name] != arguments[name]:
            logger.info("--%s was %s and is now %s", name, before[name], arguments[name])
            if name in SAME:
                changed = f"--{name} {before[name]}, not {arguments[name]}"
    if state["num_images"] != num_images:
        images = f"{state['num_images']:,} images, not {num_images:,}"
        changed = f"--data_path {before['data_path']} with {images}"
    if changed:
        raise CheckpointError(
            f"{folder} holds a run with {changed}: use another --dump_path, or start from its weights "
            "with --init_from"
        )


def check_same_place(epoch: int, samples_done: int, folder) -> None:
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
