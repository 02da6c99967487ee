"""Trunks under the names of other libraries: torchvision, timm, Detectron2, DETR.

A ResNet is the same network in all four, but for the names of its tensors; a vision transformer of ours
is timm's. A ResNet of ours that is narrower is theirs with channels that are zero; one with another stem
has no counterpart.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .backbones import is_vit
from .pretrained import Pretrained
from .resnet import TIMM, LibraryTrunk, build_model
from .vision_transformer import VisionTransformer
from .weights import COUNTER

# ResNets that torchvision, timm and DETR have under the same name, and their depth in Detectron2.
DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
DEPTHS |= {"resnext50_32x4d": 50, "resnext101_32x8d": 101}
DEPTHS |= {"wide_resnet50_2": 50, "wide_resnet101_2": 101, "resnext101_64x4d": 101}
# timm's names of vision transformers, by their dimension and the side of a patch, with the number of
# heads; any other is the first of its dimension with options.
TIMM_VITS = {
    (192, 16): ("vit_tiny_patch16_224", 3),
    (384, 16): ("vit_small_patch16_224", 6),
    (384, 8): ("vit_small_patch8_224", 6),
    (384, 32): ("vit_small_patch32_224", 6),
    (768, 16): ("vit_base_patch16_224", 12),
    (768, 8): ("vit_base_patch8_224", 12),
    (768, 32): ("vit_base_patch32_224", 12),
}
WHOLE = "use --format safetensors, torch_export or onnx, which take every network"


@dataclass(frozen=True)
class Renamed:
    """A trunk as another library has it.

    weights    its tensors, by their names there
    model      the name of the network there
    options    what that network is built with besides its name
    missing    tensors of that network that the trunk has not: its classifier
    settings   what a configuration file there has to say
    features   (those of the trunk, all of that network), where the rest are zeros; else None
    """

    weights: dict[str, Tensor]
    model: str
    options: dict = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    settings: dict = field(default_factory=dict)
    features: tuple[int, int] | None = None


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network by its own names, contiguous, each with memory of its own."""
    return {
        name: x.detach().clone(memory_format=torch.contiguous_format)
        for name, x in model.state_dict().items()
    }


# ============ torchvision ============
def to_torchvision(network: Pretrained, zero_classifier: bool = False) -> Renamed:
    """The trunk as torchvision.models.<arch>(weights=None) has it, strictly but for `missing`.

    network: with the feature "backbone", as in all functions here. zero_classifier: what the trunk has
    not, a classifier of 1,000 classes, is zeros and not missing. Raises ValueError for a network that
    torchvision has not.
    """
    from torchvision import models  # here, so that the other formats do without it

    weights, features = _torchvision_tensors(network, "torchvision")
    auxiliary = network.arch in ("googlenet", "inception_v3")  # as our trunk of them is built
    options = {"aux_logits": False, "init_weights": False} if auxiliary else {}
    with torch.device("meta"):
        target = models.get_model(network.arch, weights=None, **options).state_dict()
    missing = [name for name in target if name not in weights and not name.endswith(COUNTER)]
    if zero_classifier:
        weights |= {name: torch.zeros(target[name].shape) for name in missing}
        missing = []
    options.pop("init_weights", None)
    if network.options.get("transform_input"):
        options["transform_input"] = True
    return Renamed(weights, network.arch, options, missing, features=features)


def _torchvision_tensors(network, library):
    """full_width's of a trunk that torchvision has, by its names; ValueError for another one."""
    if network.arch.startswith(TIMM):
        raise ValueError(f"--format {library}: --arch {network.arch} is of timm: use --format timm")
    if isinstance(network.model, LibraryTrunk):
        return own_tensors(network.model.trunk), None
    return full_width(network, own_tensors(_resnet(network, library)))


# ============ narrow ResNets ============
def full_width(
    network: Pretrained, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """The tensors of a ResNet of --width below 1 in those of the whole one, and Renamed.features.

    That one computes the same: the other channels are zero, their filters, and the weight and the bias of
    their batch norms. A whole one is returned as it is, with None.
    """
    if not _is_narrow(network):
        return tensors, None
    with torch.device("meta"):
        whole = build_model(network.arch, in_chans=network.in_chans)
    filled, shapes = {}, whole.state_dict()
    for name, x in tensors.items():
        empty = torch.ones if name.endswith("running_var") else torch.zeros
        filled[name] = empty(shapes[name].shape, dtype=x.dtype)
        filled[name][tuple(slice(side) for side in x.shape)] = x
    return filled, (network.model.num_features, whole.num_features)


def _is_narrow(network):
    """Whether it is a ResNet that fits into the whole one, which groups of channels do not."""
    planes = round(64 * network.options.get("width", 1))  # as ResNet has it
    return planes < 64 and network.arch in DEPTHS and not network.arch.startswith("resnext")


def _resnet(network, library, *, any_channels=False, any_width=False):
    """The ResNet of a network, if another library has it; else ValueError with what it lacks.

    any_channels: it has it for images of any number of channels. any_width: and of any width.
    """
    model, arch, options = network.model, network.arch, network.options
    if getattr(model, "sobel", None) is not None:
        raise ValueError(
            f"--format {library}: the network sees Sobel filters, which no network there has: {WHOLE}"
        )
    model = getattr(model, "trunk", model)
    if arch not in DEPTHS and not (any_width and arch.startswith("resnet50w")):
        names = ", ".join(name for name in DEPTHS if name.startswith("resnet"))
        raise ValueError(
            f"--format {library} is for {names} and the like: --arch {arch} has no counterpart there, "
            f"{WHOLE}"
        )
    reason = ""
    if options.get("stem", "imagenet") != "imagenet":
        reason = f"--stem {options['stem']} is not the 7x7 convolution with pooling of {arch} there"
    elif round(64 * options.get("width", 1)) != 64 and not (any_width or _is_narrow(network)):
        reason = f"--width {options['width']:g} makes another network than {arch} there"
    elif network.in_chans != 3 and not any_channels:
        reason = f"--in_chans {network.in_chans} are other images than the three channels of {arch} there"
    if reason:
        raise ValueError(f"--format {library}: {reason}: {WHOLE}")
    return model


# ============ timm ============
def to_timm(network: Pretrained) -> Renamed:
    """The trunk as timm.create_model(model, num_classes=0, **options) has it, strictly.

    Raises ValueError for a network that timm has not under names that we know.
    """
    if is_vit(network.arch):
        return _timm_vit(network.model)
    in_chans = {"in_chans": network.in_chans} if network.in_chans != 3 else {}
    if network.arch.startswith(TIMM):
        return Renamed(own_tensors(network.model.trunk), network.arch.removeprefix(TIMM), in_chans)
    if network.arch.startswith("xcit"):  # which is timm's
        return Renamed(own_tensors(network.model), network.model.pretrained_cfg["architecture"])
    resnet = _resnet(network, "timm", any_channels=True)
    weights, features = full_width(network, own_tensors(resnet))
    return Renamed(weights, network.arch, in_chans, features=features)


def _timm_vit(model: VisionTransformer):
    dim, patch_size = model.embed_dim, model.patch_size
    depth, in_chans = model.depth, model.patch_embed.proj.in_channels
    name, num_heads = TIMM_VITS.get((dim, patch_size)) or TIMM_VITS.get(
        (dim, 16), TIMM_VITS[192, 16]
    )
    table_side = [cells * patch_size for cells in model.grid]
    is_square = table_side[0] == table_side[1]
    said = {"img_size": table_side[0] if is_square else table_side}
    said |= {"patch_size": patch_size, "embed_dim": dim, "depth": depth, "in_chans": in_chans}
    said["num_heads"] = model.num_heads
    usual = {"img_size": 224, "depth": 12, "in_chans": 3, "num_heads": num_heads}
    if (dim, 16) in TIMM_VITS:
        usual["embed_dim"] = dim
    if f"_patch{patch_size}_" in name:
        usual["patch_size"] = patch_size
    options = {key: value for key, value in said.items() if usual.get(key) != value}
    weights = own_tensors(model)
    if "blocks.0.ls1.gamma" in weights:  # LayerScale, whose first value the weights replace
        options["init_values"] = 1.0
    if model.num_registers:
        # timm gives registers positions, too, unless only patches have one: then that of the class
        # token is part of the token.
        options |= {"reg_tokens": model.num_registers, "no_embed_class": True}
        table = weights.pop("pos_embed")  # (1, 1 + N, D)
        weights["reg_token"] = weights.pop("register_tokens")
        weights["cls_token"] = weights["cls_token"] + table[:, :1]
        weights["pos_embed"] = table[:, 1:].clone()
    return Renamed(weights, name, options)


# ============ Detectron2 and DETR ============
def to_detectron2(network: Pretrained, prefix: str = "") -> Renamed:
    """A ResNet as Detectron2's backbones have it: stem.conv1.weight, res2.0.conv1.norm.weight, ...

    prefix: before each name. Without one, Detectron2 finds the backbone of a C4 and of an FPN model, and
    the res5 in the head of the former, by the ends of their names. `settings` are for its configuration
    file, without the images'. Raises ValueError for a network that Detectron2 has not.
    """
    resnet = _resnet(network, "detectron2", any_channels=True, any_width=True)
    tensors, features = own_tensors(resnet), None
    has_bottlenecks = "layer1.0.conv3.weight" in tensors
    if not has_bottlenecks:  # of which Detectron2 has one width
        tensors, features = full_width(network, tensors)
    first, second = tensors["layer1.0.conv1.weight"], tensors["layer1.0.conv2.weight"]
    if not has_bottlenecks and len(first) > 64:
        raise ValueError(
            f"--format detectron2: --arch {network.arch} has one width there, --width 1, not "
            f"{network.options['width']:g}: {WHOLE}"
        )
    last = tensors["layer1.0.conv3.weight"] if has_bottlenecks else second
    groups = len(first) // second.shape[1] if has_bottlenecks else 1
    settings = {
        "DEPTH": DEPTHS.get(network.arch, 50),
        "NUM_GROUPS": groups,
        "WIDTH_PER_GROUP": len(first) // groups,
        "STEM_OUT_CHANNELS": len(tensors["conv1.weight"]),
        "RES2_OUT_CHANNELS": len(last),
        "STRIDE_IN_1X1": False,
    }
    weights = _without_counters(tensors, lambda name: prefix + detectron2_name(name))
    settings = {f"MODEL.RESNETS.{name}": value for name, value in settings.items()}
    name = f"R-{DEPTHS.get(network.arch, 50)}"
    return Renamed(weights, name, settings=settings, features=features)


def detectron2_name(name: str) -> str:
    """Detectron2's name of a tensor of a ResNet: layer1.0.bn2.bias -> res2.0.conv2.norm.bias."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def to_detr(network: Pretrained) -> Renamed:
    """A ResNet as the backbone of facebookresearch/detr: backbone.0.body.conv1.weight, ...

    Its batch norms are frozen there: weight, bias, running_mean, running_var. Raises ValueError for
    another network.
    """
    tensors, features = full_width(network, own_tensors(_resnet(network, "detr")))
    weights = _without_counters(tensors, lambda name: f"backbone.0.body.{name}")
    return Renamed(weights, network.arch, features=features)


def _without_counters(tensors, rename: Callable[[str], str]):
    """The tensors that a frozen batch normalisation has, too, under new names."""
    return {rename(name): x for name, x in tensors.items() if not name.endswith(COUNTER)}
