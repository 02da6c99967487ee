"""Names of tensors that other projects give to networks that are built here, turned into ours.

One function for each kind of file. What a function does not know it leaves as it is, so that layers
which no network here has are refused where the file is read (src.nets.weights.fit_weights).
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

Weights = dict[str, Tensor]

BLOCK = "blocks.0.attn.qkv.weight"  # of the first block of a vision transformer, under our names
PATCHES = "embeddings.patch_embeddings.projection.weight"  # of one of transformers
STEM = "embedder.embedder.convolution.weight"  # of a ResNet of transformers
NUMBERED_STAGE = re.compile(r"(.*?)(\d+)\.0\.conv1\.weight")  # of a ResNet without names
# Layers of a vision transformer of transformers, under our names. Dinov2's differ from ViT's.
OF_EMBEDDINGS = {
    "cls_token": "cls_token",
    "mask_token": "mask_token",
    "register_tokens": "register_tokens",
    "position_embeddings": "pos_embed",
    "patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "patch_embeddings.projection.bias": "patch_embed.proj.bias",
}
OF_LAYER = {
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
# Signs of layers that the vision transformers here lack, by the names of tensors.
LACKING = {
    r"\brope|storage_tokens": "rotary positions (RoPE, as DINOv3)",
    r"\bmlp\.(w12|w3|weights_in|weights_out)\.": "SwiGLU layers (as the ViT-g of DINOv2)",
    r"\bdist(illation)?_token": "a distillation token",
}
FINAL_NORM = re.compile(r"(^|\.)(norm|layernorm)\.weight")


def with_our_names(weights: Weights) -> Weights:
    """Tensors of a file under the names that they have in the networks here, as far as they have any."""
    for convert in CONVERSIONS:
        weights = convert(weights)
    return weights


def of_numbered_resnets(weights: Weights) -> Weights:
    """ResNets that were put together as torch.nn.Sequential(*resnet.children()), as lightly's are
    (https://github.com/lightly-ai/lightly): 0.weight -> conv1.weight, 4.1.bn1.bias -> layer1.1.bn1.bias."""
    stages = {}  # numbers of what holds blocks, by the start of the names
    for name in weights:
        if (match := NUMBERED_STAGE.fullmatch(name)) is not None:
            stages.setdefault(match[1], set()).add(int(match[2]))
    renamed = {}
    for start, numbers in stages.items():
        if f"{start}0.weight" not in weights or f"{start}1.running_mean" not in weights:
            continue
        renamed |= {f"{start}0.": f"{start}conv1.", f"{start}1.": f"{start}bn1."}
        for i, number in enumerate(sorted(numbers), start=1):
            renamed[f"{start}{number}."] = f"{start}layer{i}."
    if not renamed:
        return weights
    starts = re.compile("|".join(map(re.escape, sorted(renamed, key=len, reverse=True))))
    return {
        starts.sub(lambda m: renamed[m[0]], name, 1) if starts.match(name) else name: x
        for name, x in weights.items()
    }


def of_vissl(weights: Weights) -> Weights:
    """Trunks of VISSL (https://github.com/facebookresearch/vissl, vissl/models/trunks): convolutional ones
    begin with _feature_blocks., the class token and the positions of its ViT have longer names."""
    weights = {name.replace("_feature_blocks.", ""): x for name, x in weights.items()}
    longer = {"class_token": "cls_token", "pos_embedding": "pos_embed"}
    for start in _starts(weights, BLOCK):  # others, such as torchvision's, have no such blocks
        for theirs, ours in longer.items():
            if f"{start}{theirs}" in weights:
                weights[f"{start}{ours}"] = weights.pop(f"{start}{theirs}")
    return weights


def of_chunked_blocks(weights: Weights) -> Weights:
    """Vision transformers whose blocks are in chunks for FSDP, as in the training checkpoints of DINOv2
    (https://github.com/facebookresearch/dinov2, dinov2/models/vision_transformer.py):
    blocks.1.7.norm1.bias -> blocks.7.norm1.bias, since the second number counts through all chunks."""
    chunk = re.compile(r"\bblocks\.\d+\.(\d+)\.(?=(norm1|attn|ls1|norm2|mlp|ls2)\.)")
    if not any(re.search(r"\bblocks\.0\.0\.attn\.qkv\.weight$", name) for name in weights):
        return weights
    return {chunk.sub(r"blocks.\1.", name): x for name, x in weights.items()}


def of_timm(weights: Weights) -> Weights:
    """Tokens and positions of timm's vision transformers
    (https://github.com/huggingface/pytorch-image-models, timm/models/vision_transformer.py).

    There registers are called reg_token. A table of positions without the class token's (DeiT III, DINOv2
    with registers) gets zeros for it, and what one has for registers is added to them: here they have none.
    """
    converted = dict(weights)
    for start in _starts(weights, BLOCK):
        table, names = weights.get(f"{start}pos_embed"), (f"{start}cls_token", f"{start}reg_token")
        class_token, registers = (weights.get(name) for name in names)
        if table is None or table.ndim != 3 or class_token is None:
            continue
        num_registers = 0 if registers is None else registers.shape[1]
        others = table.shape[1] - _largest_square(table.shape[1])  # positions that are not patches'
        if others == 0:
            table = torch.cat([torch.zeros_like(class_token), table], dim=1)
        elif num_registers and others == 1 + num_registers:
            registers = registers + table[:, 1 : 1 + num_registers]
            table = torch.cat([table[:, :1], table[:, 1 + num_registers :]], dim=1)
        converted[f"{start}pos_embed"] = table
        if registers is not None:
            del converted[f"{start}reg_token"]
            converted[f"{start}register_tokens"] = registers
    return converted


def of_transformers_vit(weights: Weights) -> Weights:
    """ViTModel, ViTMAEModel, Dinov2Model and Dinov2WithRegistersModel of transformers, and those that have
    them as vit. or dinov2. (https://github.com/huggingface/transformers, src/transformers/models): query,
    key and value become one layer."""
    start = next((name.removesuffix(PATCHES) for name in weights if name.endswith(PATCHES)), None)
    if start is None:
        return weights
    converted, parts = {}, {}
    for whole_name, value in weights.items():
        name = whole_name.removeprefix(start) if whole_name.startswith(start) else ""
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        if name.startswith("embeddings."):
            name = name.removeprefix("embeddings.")
            converted[OF_EMBEDDINGS.get(name, f"patch_embed.{name}")] = value
        elif name.startswith("layernorm."):
            converted[name.replace("layernorm.", "norm.")] = value
        elif layer is not None:
            qkv = re.fullmatch(r"attention\.attention\.(query|key|value)\.(weight|bias)", layer[2])
            if qkv is None:
                converted[f"blocks.{layer[1]}.{_name_of_layer(layer[2])}"] = value
            else:
                parts.setdefault(f"blocks.{layer[1]}.attn.qkv.{qkv[2]}", {})[qkv[1]] = value
        else:
            converted[whole_name] = value
    for name, values in parts.items():
        if len(values) == 3:  # else a bias is missing, and so is the layer's
            converted[name] = torch.cat([values[part] for part in ("query", "key", "value")])
    return converted


def of_transformers_resnet(weights: Weights) -> Weights:
    """ResNetModel of transformers, and ResNetForImageClassification, which has it as resnet.
    (https://github.com/huggingface/transformers, src/transformers/models/resnet):
    encoder.stages.0.layers.1.layer.2.convolution.weight -> layer1.1.conv3.weight."""
    start = next((name.removesuffix(STEM) for name in weights if name.endswith(STEM)), None)
    if start is None:
        return weights
    block = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|(shortcut))\.(.+)")
    converted = {}
    for whole_name, value in weights.items():
        name = whole_name.removeprefix(start)
        name = re.sub(r"^embedder\.embedder\.convolution\.", "conv1.", name)
        name = re.sub(r"^embedder\.embedder\.normalization\.", "bn1.", name)
        if (match := block.fullmatch(name)) is not None:
            stage, index, layer, shortcut, rest = match.groups()
            convolution, norm = ("downsample.0.", "downsample.1.")
            if not shortcut:
                convolution, norm = f"conv{int(layer) + 1}.", f"bn{int(layer) + 1}."
            rest = rest.replace("convolution.", convolution).replace("normalization.", norm)
            name = f"layer{int(stage) + 1}.{index}.{rest}"
        converted[name] = value
    return converted


CONVERSIONS: tuple[Callable[[Weights], Weights], ...] = (
    of_numbered_resnets,
    of_vissl,
    of_chunked_blocks,
    of_transformers_vit,
    of_transformers_resnet,
    of_timm,
)


# ============ what names and shapes alone do not say ============
def heads_of(weights: Weights) -> int | None:
    """The heads of a vision transformer's attention where a file tells them, else None.

    Shapes do not tell. MoCo v3 (https://github.com/facebookresearch/moco-v3, vits.py; solo-learn has it
    too) has 12 heads in its smaller networks, where others have one for 64 dimensions. It is known by its
    table of fixed sines and cosines, whose first half is the same along a row of patches; MAE's is not.
    """
    for start in _starts(weights, BLOCK):
        table = weights.get(f"{start}pos_embed")
        if table is None or table.ndim != 3 or table.shape[1] < 3 or table.shape[2] % 4:
            continue
        of_class, first, second = table[0, :3].float()  # the last two are of patches in a row
        quarter = torch.ones(table.shape[2] // 4)
        angle_zero = torch.cat([0 * quarter, quarter]).to(first)
        is_fixed = not of_class.any() and torch.allclose(first, angle_zero.repeat(2), atol=1e-4)
        if is_fixed and torch.allclose(second[: len(angle_zero)], angle_zero, atol=1e-4):
            return 12 if table.shape[2] < 1024 else None
    return None


def is_of_solo_learn(weights: Weights) -> bool:
    """Whether a file has what solo-learn (https://github.com/vturrisi/solo-learn, solo/methods/base.py)
    saves: a linear classifier beside what its methods train. Its 3x3 stem for small images pads by 2."""
    names = ("backbone.conv1.weight", "classifier.weight")
    trained_beside = ("projector.", "head.", "momentum_backbone.")
    return all(name in weights for name in names) and any(
        name.startswith(trained_beside) for name in weights
    )


def what_is_lacking(weights: Weights) -> str:
    """What a vision transformer in a file has and those here lack, in words; "" if nothing is known."""
    if not any(re.search(r"\battn\.|\battention\.", name) for name in weights):
        return ""
    for pattern, words in LACKING.items():
        if any(re.search(pattern, name) for name in weights):
            return words
    first, second = (weights.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    if first is not None and second is not None and len(first) == 2 * second.shape[1]:
        return "SwiGLU layers (as the ViT-g of DINOv2)"
    if "fc_norm.weight" in weights and not any(map(FINAL_NORM.search, weights)):
        return "a norm after the mean of all patches, fc_norm, instead of the class token's"
    has_tokens = any(name.endswith(("cls_token", "reg_token")) for name in weights)
    has_positions = any(re.search(r"pos(ition)?_(embed|bias)", name) for name in weights)
    if has_tokens and not has_positions:
        return "rotary positions (RoPE, as DINOv3)"
    return ""


def _name_of_layer(rest):
    """Our name of what is in a layer of a vision transformer of transformers."""
    for theirs, ours in OF_LAYER.items():
        if rest == theirs or rest.startswith(f"{theirs}."):
            return ours + rest.removeprefix(theirs)
    return rest


def _starts(weights, end):
    """What comes before the names that end so, a module's at most."""
    starts = [name.removesuffix(end) for name in weights if name.endswith(end)]
    return [start for start in starts if not start or start.endswith(".")]


def _largest_square(number):
    """The largest square that is at most `number`."""
    return int(number**0.5) ** 2
