"""Layers of a network by their names, and what they put out."""

import difflib
from collections.abc import Callable

from torch import Tensor, nn

WRAPPERS = ("", "trunk.", "backbone.")  # what ours put before the names of a network of others


def module_name(model: nn.Module, name: str) -> tuple[str | None, list[str]]:
    """(the whole name of the module that `name` means, names that are near to it).

    The whole name has what wraps a trunk before it, as trunk.layer4 for layer4. It is None where no
    module has the name; only then there are near names.
    """
    names = [module for module, _ in model.named_modules() if module]
    whole = next((start + name for start in WRAPPERS if start + name in names), None)
    if whole is not None:
        return whole, []
    short = [x.removeprefix(start) for start in WRAPPERS for x in names if x.startswith(start)]
    return None, difflib.get_close_matches(name, list(dict.fromkeys(short)), n=4, cutoff=0.3)


def forward_of_layer(model: nn.Module, layer: str = "") -> Callable[[Tensor], Tensor]:
    """Images (B, C, S, S) -> (B, D): what the module `layer` puts out, averaged over positions.

    layer: its name in model.named_modules(), "" for the pooled features of the model. Raises
    ValueError for another name and, when called, for a layer that has no part in the features.
    """
    if not layer:
        return model.forward_backbone
    whole, near = module_name(model, layer)
    if whole is None:
        near = ", ".join(near or [name for name, _ in model.named_children()])
        raise ValueError(f"--layer {layer} is not in the network; near to it are {near}")
    outputs = []

    def keep(module, inputs, output):  # at once, as the next layer may work in place
        output = output[0] if isinstance(output, tuple) else output
        positions = {4: (2, 3), 3: (1,)}.get(output.ndim)  # of a map, of the tokens of a ViT
        outputs.append(output.float().mean(positions) if positions else output.clone())

    def forward(images):
        outputs.clear()
        model.forward_backbone(images)
        if not outputs:
            raise ValueError(f"--layer {layer} has no part in the features of the network")
        return outputs[-1]

    model.get_submodule(whole).register_forward_hook(keep)
    return forward
