"""Which network a file of weights is for, by the names and the shapes of its tensors."""

import math

from torch import Tensor

from . import foreign_names
from .backbones import is_vit
from .resnet import ARCHITECTURES, Bottleneck
from .weights import SOBEL

VIT_OF_DIMENSION = {96: "vit_micro", 192: "vit_tiny", 384: "vit_small", 768: "vit_base"}
VIT_OF_DIMENSION[1024] = "vit_large"
QKV = "blocks.0.attn.qkv.weight"  # of the first block of a vision transformer
LAYER_SCALE = 1e-5  # where DINOv2's starts; the file says where it ended
FIRST_BLOCK = "layer1.0.conv1.weight"  # of a ResNet
# The last linear layer of networks of src.nets.convnets, and the side of their first filters.
PLAIN = {"alexnet": ("classifier.4.weight", 11), "vgg16": ("classifier.3.weight", 3)}


def recognise(weights: dict[str, Tensor], arch: str | None = None) -> dict:
    """What the tensors of a file say about the trunk in it, by flag: arch, patch_size, width, ...

    weights: of src.nets.weights.read_weights. arch: the network that was asked for; what the file
    says of another one is left out. {} where it says nothing.
    """
    is_of_solo_learn = foreign_names.is_of_solo_learn(weights)
    weights = foreign_names.with_our_names(weights)
    if arch is None or is_vit(arch):
        said = _recognise_vit(weights)
        if said or arch is not None:
            return said
    sobel, plain = _recognise_sobel(weights), _recognise_plain(weights)
    said = {**sobel, **(plain or _recognise_resnet(weights))}
    if is_of_solo_learn and said.get("stem") == "small":
        said["stem_padding"] = 2
    if sobel:
        said.pop("in_chans", None)  # those of the Sobel filters, not those of the images
    if arch in (None, said.get("arch", arch)):
        return said
    return {} if plain else sobel  # a ResNet has several names: resnet50w2, resnet50 of width 2


def _recognise_vit(weights):
    """patch_size, depth; img_size where the table of positions is square; arch if its dimension is known."""
    start = next((name.removesuffix(QKV) for name in weights if name.endswith(QKV)), None)
    names = ("pos_embed", "patch_embed.proj.weight")
    if start is None or any(f"{start}{name}" not in weights for name in names):
        return {}  # an XCiT has blocks of these names, and no table
    table, patches = (weights[f"{start}{name}"] for name in names)  # (1, 1 + N, D), (D, C, P, P)
    patch_size = patches.shape[-1]
    blocks = {
        name.removeprefix(start).split(".")[1]
        for name in weights
        if name.startswith(f"{start}blocks.")
    }
    said = {"patch_size": patch_size, "depth": len(blocks)}
    side = math.isqrt(table.shape[1] - 1)
    if side**2 == table.shape[1] - 1:
        said["img_size"] = side * patch_size
    if table.shape[2] in VIT_OF_DIMENSION:
        said["arch"] = VIT_OF_DIMENSION[table.shape[2]]
    if f"{start}register_tokens" in weights:
        said["num_registers"] = weights[f"{start}register_tokens"].shape[1]
    if f"{start}blocks.0.ls1.gamma" in weights:
        said["layer_scale"] = LAYER_SCALE
    if (heads := foreign_names.heads_of(weights)) is not None:
        said["num_heads"] = heads
    return said


def _recognise_sobel(weights):
    """sobel and sobel_padding where Sobel filters come before the trunk."""
    if f"{SOBEL}0.weight" not in weights:
        return {}
    # DeeperCluster, whose trunk is called body, pads by 2.
    deeper = any(name.startswith("body.") for name in weights)
    return {"sobel": True, "sobel_padding": 2 if deeper else 1}


def _recognise_plain(weights):
    """arch, width and sobel of AlexNet or VGG-16 with batch norm, whose last linear layer tells the width.

    Without Sobel filters, DeeperCluster's VGG-16, whose trunk is called body, pads images by 1.
    """
    layers = {name.removeprefix("body."): x for name, x in weights.items()}
    # torchvision's networks end in classifier.6, and without batch norm 1 is a ReLU.
    if "features.1.running_mean" not in layers or "classifier.6.weight" in layers:
        return {}
    side = layers["features.0.weight"].shape[-1] if "features.0.weight" in layers else None
    for arch, (last, kernel) in PLAIN.items():
        if side == kernel and last in layers:
            width = len(layers[last]) / 4096
            said = {"arch": arch, "width": width, "sobel": f"{SOBEL}0.weight" in weights}
            is_padded = arch == "vgg16" and not said["sobel"] and layers.keys() != weights.keys()
            return {**said, "image_padding": 1} if is_padded else said
    return {}


def _recognise_resnet(weights):
    """arch, width, stem and in_chans of a ResNet of src.nets.resnet, torchvision's files included."""
    start = next(
        (name.removesuffix(FIRST_BLOCK) for name in weights if name.endswith(FIRST_BLOCK)), None
    )
    if start is None:
        return {}
    layers = {name.removeprefix(start): x for name, x in weights.items() if name.startswith(start)}
    names = ("conv1.weight", "layer1.0.conv2.weight")
    if any(name not in layers or layers[name].ndim != 4 for name in names):
        return {}
    stem, second = (layers[name] for name in names)  # (planes, C, k, k), (out, in / groups, 3, 3)
    planes = len(stem)
    depths = tuple(
        len({name.split(".")[1] for name in layers if name.startswith(f"layer{i}.")})
        for i in (1, 2, 3, 4)
    )
    has_bottlenecks = "layer1.0.conv3.weight" in layers
    width_of_arch = {}
    for arch, network in ARCHITECTURES.items():
        block, block_counts = network.args
        groups = network.keywords.get("groups", 1)
        inner = planes * network.keywords.get("width_per_group", 64) // 64 * groups
        if (block is Bottleneck, block_counts) != (has_bottlenecks, depths):
            continue
        if tuple(second.shape[:2]) == (inner, inner // groups):
            width_of_arch[arch] = planes / 64 / network.keywords.get("widen", 1)
    if not width_of_arch:
        return {}
    # Of names for the same network (resnet50 twice as wide is resnet50w2) the one of width 1.
    arch = min(width_of_arch, key=lambda name: width_of_arch[name] != 1)
    kind = "small" if stem.shape[-1] == 3 else "imagenet"
    return {"arch": arch, "width": width_of_arch[arch], "stem": kind, "in_chans": stem.shape[1]}
