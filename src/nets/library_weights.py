"""The weights that torchvision and timm have of their networks: "torchvision:resnet50", "timm:resnet50"."""

from torch import Tensor

from .resnet import TIMM
from .weights import read_file

TORCHVISION = "torchvision:"
# Networks that, under torchvision's weights, turn images normalised as ImageNet's into those from -1 to 1.
TRANSFORMED = ("googlenet", "inception_v3")


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
    return _torchvision_weights(name).url


def described_by_torchvision(name: str) -> dict:
    """What torchvision says of the images that these weights are for: mean, std.

    Of the networks in TRANSFORMED also transform_input, an option of src.nets.pretrained.open_pretrained.
    Raises as torchvision_address.
    """
    images = _torchvision_weights(name).transforms()
    said = {"mean": list(images.mean), "std": list(images.std)}
    return {**said, "transform_input": True} if name in TRANSFORMED else said


def _torchvision_weights(name):
    """torchvision's entry of its newest weights of a classification network."""
    from torchvision import models  # here, so that our own networks do without it

    if name not in models.list_models(module=models):
        raise ValueError(
            f"{TORCHVISION}{name} is not known to torchvision: name one of its classification networks, "
            "such as resnet50"
        )
    return models.get_model_weights(name).DEFAULT
