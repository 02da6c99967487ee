"""The weights that torchvision and timm have of their networks: "torchvision:resnet50", "timm:resnet50"."""

from torch import Tensor

from .resnet import TIMM
from .weights import read_file

TORCHVISION = "torchvision:"


def read_library(name: str) -> dict[str, Tensor]:
    """The tensors of "torchvision:NAME" or "timm:NAME", downloaded unless they are there already.

    Raises ValueError on an unknown name or a missing package, and CheckpointError where they cannot be had.
    """
    if name.startswith(TIMM):
        from .timm_trunks import timm_weights  # here, as timm is optional

        return timm_weights(name.removeprefix(TIMM))
    return read_file(torchvision_address(name.removeprefix(TORCHVISION)))


def torchvision_address(name: str) -> str:
    """Where torchvision's newest weights of a classification network are. Raises ValueError on others."""
    from torchvision import models  # here, so that our own networks do without it

    if name not in models.list_models(module=models):
        raise ValueError(
            f"{TORCHVISION}{name} is not known to torchvision: name one of its classification networks, "
            "such as resnet50"
        )
    return models.get_model_weights(name).DEFAULT.url
