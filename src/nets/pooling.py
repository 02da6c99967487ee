"""What is taken from the last layer of a network as the features of an image: pooled, or by position."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import is_vit
from .pretrained import Pretrained
from .resnet import TIMM
from .top_layer import PlainNetwork

FEATURES = ("backbone", "cls", "mean", "gem", "cls_gem", "patches", "embedding")
SCALES = (1.0, 2**-0.5, 0.5)  # of multi-scale features, as published
TRIAL = 224  # pixels of the image that the stride of a network is found with
SMALLEST = 1e-6  # what generalised means are of, at least


def forward_of_feature(
    network: Pretrained, feature: str, gem_p: float = 3.0
) -> Callable[[Tensor], Tensor]:
    """Images (B, C, S, S), normalised, -> the features of --feature, (B, D) or (B, N, D).

    backbone   what evaluations use: the average of the last map, or the class token
    cls        the class token of a vision transformer
    mean       the average over the positions of the last map, or the patches
    gem        their generalised mean (Radenovic et al., arXiv:1711.02512, Eq. 3), with exponent gem_p
    cls_gem    the class token, and behind it gem, (B, 2 D): DINO's descriptor of copies
    patches    all positions, by rows, (B, N, D)
    embedding  the output of SwAV's projection head; the network is opened with that feature

    Raises ValueError for what a network does not have.
    """
    if feature in ("cls", "cls_gem") and not is_vit(network.arch):
        raise ValueError(
            f"--feature {feature} is the class token of vit_tiny, vit_small and vit_base, and --arch "
            f"{network.arch} has none: use --feature {'mean' if feature == 'cls' else 'gem'}"
        )
    if feature in ("backbone", "cls"):
        return network.model.forward_backbone
    if feature == "embedding":
        return network.model
    if feature == "cls_gem":
        model = network.model
        return lambda images: class_and_gem(
            model.get_intermediate_layers(images)[0], gem_p, num_registers=model.num_registers
        )
    if is_vit(network.arch):
        tokens = _positions_of_vit(network)
    elif network.arch.startswith(TIMM):
        tokens = _positions_of_timm(network)
    else:
        tokens = _positions_before_pooling(network)
    if feature == "patches":
        return tokens
    if feature == "mean":
        return lambda images: tokens(images).float().mean(1)
    return lambda images: generalised_mean(tokens(images), gem_p)


def generalised_mean(tokens: Tensor, p: float) -> Tensor:
    """(mean over positions of x^p)^(1/p) of tokens (B, N, D), at least SMALLEST each: (B, D) float32.

    Radenovic et al. 2017, arXiv:1711.02512, Eq. 3. Scaled by the largest value, so that nothing overflows.
    """
    x = tokens.float().clamp(min=SMALLEST)
    largest = x.amax(1, keepdim=True)  # (B, 1, D)
    return (x / largest).pow(p).mean(1).pow(1 / p) * largest[:, 0]


def class_and_gem(tokens: Tensor, p: float, num_registers: int = 0) -> Tensor:
    """The class token and the generalised mean of the patches, of tokens (B, 1 + R + N, D): (B, 2 D)."""
    return torch.cat([tokens[:, 0].float(), generalised_mean(tokens[:, 1 + num_registers :], p)], 1)


def multi_scale(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Images (B, C, H, W) -> the mean of the features at SCALES of their size, of length 1, (B, D).

    As DINO's image retrieval has it (arXiv:2104.14294, section 4.2.1), but that each image has length 1
    and not the batch. The smaller images are interpolated, without a filter.
    """

    def features_of(images):
        total = forward(images).float()
        for scale in SCALES[1:]:
            smaller = F.interpolate(images, scale_factor=scale, mode="bilinear")
            total = total + forward(smaller).float()
        return F.normalize(total / len(SCALES), dim=1)

    return features_of


def forward_of_map(network: Pretrained) -> Callable[[Tensor], Tensor]:
    """Images (B, C, H, W) -> the last map of a network, (B, D, h, w), with a last max-pooling left out.

    That of a vision transformer is its patches. Raises ValueError for a network without a map.
    """
    model = network.model
    if is_vit(network.arch):
        patches, side = _positions_of_vit(network), model.patch_size
        return lambda images: (
            patches(images).transpose(1, 2).unflatten(2, (images.shape[2] // side, -1))
        )
    if isinstance(model, PlainNetwork):
        return lambda images: model.forward_conv(images, model.num_convs)
    if network.arch.startswith("xcit") or network.arch.startswith(TIMM):
        raise ValueError(
            f"R-MAC needs the last map of a network, which is not known of --arch {network.arch}: use "
            "--protocol dino"
        )
    return _map_before_pooling(network, before_max_pooling=True)


def _positions_of_vit(network):
    """Images -> the patches after the last block and LayerNorm, (B, N, D)."""
    model = network.model
    return lambda images: model.get_intermediate_layers(images)[0][:, 1 + model.num_registers :]


def _positions_of_timm(network):
    """Images -> the last map or the patches of a network of timm, without class token and registers."""
    trunk = network.model.trunk

    def positions(images):
        x = trunk.forward_features(images)
        if x.ndim == 4 and getattr(trunk, "output_fmt", "NCHW") != "NHWC":
            x = x.movedim(1, 3)  # (B, H, W, D)
        return x.flatten(1, 2) if x.ndim == 4 else x[:, getattr(trunk, "num_prefix_tokens", 0) :]

    return positions


def _positions_before_pooling(network):
    """Images -> what the last adaptive average pooling of a convolutional network takes, (B, N, D)."""
    last_map = _map_before_pooling(network)
    return lambda images: last_map(images).flatten(2).transpose(1, 2)


def _map_before_pooling(network, before_max_pooling=False):
    """Images -> what the last adaptive average pooling of a convolutional network takes, (B, D, h, w).

    before_max_pooling: or the max-pooling that torchvision's alexnet and vgg end with.
    """
    maps = []

    def keep(module, inputs):
        maps.append(inputs[0])

    modules = [m for m in network.model.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    layers = getattr(getattr(network.model, "trunk", None), "features", None)
    if before_max_pooling and layers is not None and isinstance(layers[-1], nn.MaxPool2d):
        modules = [layers[-1]]
    for module in modules:
        module.register_forward_pre_hook(keep)

    def last_map(images):
        maps.clear()
        network.model.forward_backbone(images)
        if not maps or maps[-1].ndim != 4:
            raise ValueError(
                f"--feature mean, gem and patches, and R-MAC, need a last map, which --arch {network.arch} "
                "has not: use --feature backbone"
            )
        return maps[-1]

    return last_map


@torch.no_grad()
def shape_of_features(
    forward: Callable[[Tensor], Tensor], in_chans: int, size: int, arch: str, flag: str
) -> tuple[int, ...]:
    """The shape of the features of one image of size x size pixels, by trying it on a black one.

    arch, and flag, which says the size: for the message. Raises ValueError where such images are too small
    for the network.
    """
    try:
        return tuple(forward(torch.zeros(1, in_chans, size, size)).shape[1:])
    except RuntimeError as error:
        if "too small" not in str(error) and "greater than" not in str(error):
            raise
        raise ValueError(f"{flag} {size} is too small for --arch {arch}") from None
    except ValueError as error:  # of our own networks, which do not know the flag
        if "too small" not in str(error) and "exceeds images" not in str(error):
            raise
        raise ValueError(f"{flag} {size} is too small for --arch {arch}: {error}") from None


def stride_of_positions(network: Pretrained, forward: Callable[[Tensor], Tensor]) -> int:
    """Side in pixels of what a position of the features stands for: the patch size, or 32 of a ResNet.

    forward: of the feature "patches". Raises ValueError where it is no whole number of pixels.
    """
    if is_vit(network.arch):
        return network.model.patch_size
    images = torch.zeros(1, network.in_chans, TRIAL, TRIAL)
    with torch.no_grad():
        number = forward(images).shape[1]
    stride = TRIAL / math.sqrt(number)
    if not stride.is_integer():
        raise ValueError(
            f"--arch {network.arch} makes {number} positions of an image of {TRIAL} x {TRIAL} px, which are "
            "no whole number of pixels each: use a vision transformer or a ResNet"
        )
    return int(stride)
