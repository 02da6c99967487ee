"""Classifiers of clusters whose Sobel filters and first convolution are one convolution of colours."""

from torch import Tensor, nn

from .sobel import sobel_to_rgb
from .top_layer import Classifier, PlainNetwork


def first_layer(model: Classifier) -> str:
    """The name of the first convolution of a classifier."""
    return "features.0" if isinstance(model, PlainNetwork) else "trunk.conv1"


def fold_sobel(model: nn.Module) -> None:
    """Make Sobel filters and the first convolution one convolution of colours; see src.nets.sobel.

    Raises ValueError for a network without such filters.
    """
    if getattr(model, "sobel", None) is None:
        raise ValueError("--sobel2RGB true is for a network with Sobel filters: leave it out")
    parent, _, name = first_layer(model).rpartition(".")
    layers = model.get_submodule(parent)
    setattr(layers, name, sobel_to_rgb(getattr(layers, name), model.sobel.padding))
    model.sobel = None


def has_folded_sobel(weights: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether a file has one convolution of colours where a network has Sobel filters and the first one.

    weights: of src.nets.weights.read_weights, under whatever prefix.
    """
    if getattr(model, "sobel", None) is None:
        return False
    layer = first_layer(model)
    out, _, height, width = model.get_submodule(layer).weight.shape
    folded = (out, 3, height + 2, width + 2)
    return any(
        name.endswith(f"{layer}.weight") and x.shape == folded for name, x in weights.items()
    )
