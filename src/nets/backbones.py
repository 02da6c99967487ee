"""Networks without a head, by the name of --arch: ViT, XCiT, ResNet, VGG, torchvision's, timm's."""

import re

from torch import nn

from . import resnet, vision_transformer


def is_vit(arch: str) -> bool:
    """Whether `arch` is a vision transformer of ours, with tokens and attention to look at."""
    return arch in vision_transformer.ARCHITECTURES


def is_transformer(arch: str) -> bool:
    """Whether `arch` is a vision transformer of ours or an XCiT."""
    return is_vit(arch) or arch.startswith("xcit")


def build_backbone(
    arch: str,
    patch_size: int = 16,
    img_size: int = 224,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    num_registers: int = 0,
    depth: int | None = None,
    num_heads: int | None = None,
    layer_scale: float | None = None,
    stem: str = "imagenet",
    stem_padding: int = 1,
    width: float = 1.0,
    zero_init_residual: bool = False,
    sobel: bool | None = None,
    sobel_padding: int = 1,
    image_padding: int = 0,
) -> nn.Module:
    """An untrained network of (B, in_chans, S, S) -> (B, num_features), which is its attribute.

    It has forward_backbone, the same as calling it. arch: one of vision_transformer.ARCHITECTURES,
    xcit_* (El-Nouby et al. 2021, arXiv:2106.09681; timm's network), one of resnet.ARCHITECTURES, a
    torchvision classification network, or timm:NAME. depth, num_heads: blocks and heads of a vision
    transformer, None: its usual ones; layer_scale: see VisionTransformer; width: factor on the channels or
    dimensions of all layers; stem_padding: see ResNet. sobel: true or false for a network of
    src.nets.convnets without its top layer, whose alexnet and vgg16 are not torchvision's.

    What published commands and presets give whatever the arch is not used where it has no meaning:
    patch_size and img_size by all but ViTs, drop_path_rate by convolutional networks, stem by transformers,
    image_padding by all but the vgg16 of src.nets.convnets. Raises
    ValueError on any other option that arch has no use for, and on an unknown name.
    """
    of_resnets = {"zero_init_residual": zero_init_residual, "sobel": bool(sobel)}
    if is_vit(arch):
        refuse_unusual(arch, "a ResNet of ours", **of_resnets)
        return vision_transformer.ARCHITECTURES[arch](
            patch_size=patch_size,
            img_size=img_size,
            drop_path_rate=drop_path_rate,
            in_chans=in_chans,
            num_registers=num_registers,
            width=width,
            layer_scale=layer_scale,
            **({} if depth is None else {"depth": depth}),
            **({} if num_heads is None else {"num_heads": num_heads}),
        )
    refuse_unusual(
        arch,
        "a ViT, such as vit_small",
        num_registers=num_registers,
        depth=depth,
        num_heads=num_heads,
        layer_scale=layer_scale,
    )
    if arch.startswith("xcit"):
        refuse_unusual(arch, "a ResNet of ours", **of_resnets)
        refuse_unusual(arch, "a ViT or a ResNet of ours", width=width)
        return build_xcit(arch, in_chans, drop_path_rate)
    options = {"stem": stem, "width": width, "zero_init_residual": zero_init_residual}
    if sobel is not None:
        from .convnets import build_convnet

        options |= {"sobel": sobel, "sobel_padding": sobel_padding, "image_padding": image_padding}
        return build_convnet(arch, in_chans=in_chans, **options)
    if arch.startswith(resnet.TIMM):
        options["drop_path_rate"] = drop_path_rate
    elif arch in resnet.ARCHITECTURES:
        options["stem_padding"] = stem_padding
    else:
        from torchvision import models

        if arch not in models.list_models(module=models):
            names = [*vision_transformer.ARCHITECTURES, "xcit_*", *resnet.ARCHITECTURES]
            raise ValueError(
                f"--arch {arch} is not known: use one of {', '.join(names)}, any torchvision "
                "classification model, such as vgg16 or convnext_tiny, or timm:NAME for one of timm"
            )
    return resnet.build_model(arch, in_chans=in_chans, **options)


def refuse_unusual(arch: str, kind: str, **options) -> None:
    """Raise ValueError naming the first option that was changed, of those that `kind` alone has."""
    defaults = {"num_registers": 0, "width": 1.0}
    defaults |= {"zero_init_residual": False, "sobel": False}
    for name, value in options.items():
        if value != defaults.get(name):
            hint = f"use --{name} {defaults[name]}" if defaults.get(name) else "leave it out"
            raise ValueError(f"--{name} needs {kind}: for --arch {arch} {hint}")


def build_xcit(arch: str, in_chans: int, drop_path_rate: float) -> nn.Module:
    """timm's XCiT of a published name, such as xcit_small_12_p16, which says the size of a patch.

    What follows in the longer names (_224, _384, _dist) is about weights, not about the network.
    """
    try:
        import timm
    except ImportError:
        raise ValueError(f"--arch {arch} needs the package timm: pip install timm") from None
    names = [name.removesuffix("_224") for name in timm.list_models("xcit_*_224")]
    name = re.sub(r"(_224|_384)?(_dist)?$", "", arch)
    if name not in names:
        raise ValueError(f"--arch {arch} is not known: use one of {', '.join(names)}")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"--drop_path_rate {drop_path_rate} must be at least 0 and below 1")
    model = timm.create_model(
        f"{name}_224", num_classes=0, in_chans=in_chans, drop_path_rate=drop_path_rate
    )
    model.forward_backbone = model.forward
    return model
