"""How strongly the filters of a layer respond to images, in any network with convolutions.

The response of a filter to an image is the mean of its map, over all positions.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nets.layers import module_name
from ..nets.pretrained import HEADS

# Convolutions beside the path, not on it: of ResNets, and of RegNets.
SHORTCUT = re.compile(r"(^|\.)(downsample|trunk_output\..*\.proj)\.")


@dataclass
class Call:
    """One use of a module in a forward pass; after: the modules that got its output untouched."""

    name: str
    module: nn.Module
    output: object
    version: int = 0
    after: "Call | None" = None


@dataclass(frozen=True)
class Layer:
    """A module whose output is a map of filters (B, num_filters, *cells).

    name: conv13, say, or that of the module. uses: how often the network applies it; the last one
    counts. rectified: whether the ReLU right after the module belongs to the layer.
    """

    name: str
    module: nn.Module
    num_filters: int
    cells: tuple[int, int]
    uses: int = 1
    rectified: bool = False


class _Reached(Exception):
    """What comes after the layer is not needed."""


@torch.no_grad()
def trace(model: nn.Module, size: int, in_chans: int = 3) -> list[Call]:
    """Every use of a named module of `model`, in order, for an image of size x size pixels.

    Raises ValueError where the network does not take such images.
    """
    calls, entered, previous = [], [None], [None]

    def enter(module, inputs):
        # Not the same tensor: what adds to it in between, as a residual block does, counts.
        last, x = previous[0], inputs[0] if inputs else None
        follows = last is not None and x is last.output and x._version == last.version
        entered[0] = last if follows else None

    def leave(module, inputs, output):
        call = Call(names[module], module, output)
        calls.append(call)
        if not any(module.children()) and isinstance(output, Tensor):
            call.version = output._version
            if entered[0] is not None:
                entered[0].after = call
            previous[0] = call

    names = {module: name for name, module in model.named_modules() if name}
    handles = []
    for module in names:
        handles.append(module.register_forward_hook(leave))
        if not any(module.children()):
            handles.append(module.register_forward_pre_hook(enter))
    weight = next(model.parameters())
    try:
        model.forward_backbone(torch.zeros(1, in_chans, size, size, device=weight.device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--size {size}: this network takes no such images ({reason})") from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def convolutions(model: nn.Module, calls: list[Call]) -> list[Call]:
    """The convolutions in the order of their use; Sobel filters and shortcuts are not among them.

    Raises ValueError where the only one cuts an image into patches, as in a vision transformer.
    """
    fixed = set(model.sobel.modules()) if getattr(model, "sobel", None) is not None else set()
    found = [call for call in calls if isinstance(call.module, nn.Conv2d)]
    if all(call.module.kernel_size == call.module.stride for call in found):
        raise ValueError(
            "this network is not convolutional, it has no convolution but that of patches: give a "
            "convolutional --arch, or see `visualize.py attention`"
        )
    found = [call for call in found if call.module not in fixed]
    return [call for call in found if not SHORTCUT.search(call.name)]


def find_layer(
    model: nn.Module, calls: list[Call], conv: int | None = None, name: str | None = None
) -> Layer:
    """The layer of convolution number `conv`, from 1 on, or of the module `name`; or else the last.

    A convolution has with it the batch norm and the ReLU that follow it at once, where they are
    modules; calls: of trace. Raises ValueError for what is not there or has no map.
    """
    convolution_calls = convolutions(model, calls)
    if name is not None:
        return _named(model, calls, name, convolution_calls[-1].name)
    count = len(convolution_calls)
    number = count if conv is None else conv
    if number > count:
        raise ValueError(f"--conv {conv} is not one of the {count} convolutions: use 1 to {count}")
    last, rectified = convolution_calls[number - 1], False
    if last.after is not None and isinstance(last.after.module, nn.modules.batchnorm._BatchNorm):
        last = last.after
    if last.after is not None and isinstance(last.after.module, nn.ReLU):
        rectified = True
    shape = last.output.shape
    uses = sum(call.module is last.module for call in calls)
    return Layer(
        f"conv{number}",
        last.module,
        num_filters=shape[1],
        cells=tuple(shape[2:]),
        uses=uses,
        rectified=rectified,
    )


def _named(model, calls, name, last_convolution):
    whole, near = module_name(model, name)
    is_head = name.split(".")[0] in HEADS  # which open_pretrained has taken off
    if whole is None and not is_head:
        near = f"near to it are {', '.join(near)}" if near else f"there is {last_convolution}, say"
        raise ValueError(f"--layer {name} is not a module of this network: {near}")
    uses = [call for call in calls if call.name == whole]
    if not uses:
        raise ValueError(
            f"--layer {name} comes after the features, or is not used: take one before, such "
            f"as {last_convolution}, the last convolution"
        )
    output = uses[-1].output
    if not isinstance(output, Tensor) or output.dim() != 4:
        kind = f"{tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"--layer {name} gives {kind}, which is no map (images, filters, height, width): take "
            f"one before it, such as {last_convolution}, the last convolution"
        )
    return Layer(
        name,
        uses[-1].module,
        num_filters=output.shape[1],
        cells=tuple(output.shape[2:]),
        uses=len(uses),
    )


def filter_responses(model: nn.Module, layer: Layer, images: Tensor, leak: float = 0.0) -> Tensor:
    """Normalised images (B, C, S, S) -> mean of the map of each filter, (B, num_filters) float32.

    leak: slope below zero of the ReLU of the layer, so that a filter that is off everywhere has a
    gradient. The network is not computed beyond the layer.
    """
    found = []

    def hook(module, inputs, output):
        found.append(None)
        if len(found) == layer.uses:
            maps = output.float()
            found[-1] = (F.leaky_relu(maps, leak) if layer.rectified else maps).mean((2, 3))
            raise _Reached

    handle = layer.module.register_forward_hook(hook)
    try:
        model.forward_backbone(images)
    except _Reached:
        return found[-1]
    finally:
        handle.remove()
    raise RuntimeError(f"{layer.name} was not used")
