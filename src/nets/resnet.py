"""ResNet trunks with the head and prototypes of SwAV; any trunk of torchvision or timm with the same head.

ResNet (He et al. 2016, arXiv:1512.03385) with the stride in the 3x3 convolution, ResNeXt (Xie et
al. 2017, arXiv:1611.05431), and SwAV's wide ResNet-50 (arXiv:2006.09882, B.2), all of whose layers
are wider, not the 3x3 alone. The names of parameters are those of the released SwAV checkpoints.

    model = resnet50(normalize=True, hidden_mlp=2048, output_dim=128, nmb_prototypes=3000)
    embedding, scores = model([crops_224, crops_224, crops_96])  # (3B, 128), (3B, 3000)
"""

import math
import re
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from .heads import apply_head, build_head, forward_crops


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; (B, in_planes, H, W) -> (B, planes, H/stride, W/stride)."""

    expansion = 1

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int = 1,
        groups: int = 1,
        width_per_group: int = 64,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_planes, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out.add_(self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped, strided), 1x1; (B, in_planes, H, W) -> (B, 4 planes, H/stride, ...)."""

    expansion = 4

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int = 1,
        groups: int = 1,
        width_per_group: int = 64,
    ):
        super().__init__()
        width = max(1, planes * width_per_group // 64) * groups
        self.conv1 = nn.Conv2d(in_planes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_planes, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out.add_(self.downsample(x)))


def shortcut(in_planes: int, out_planes: int, stride: int) -> nn.Module:
    """A strided 1x1 convolution where the residual branch changes the shape, else the identity."""
    if stride == 1 and in_planes == out_planes:
        return nn.Identity()
    convolution = ProjectionShortcut(in_planes, out_planes, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_planes))


class ProjectionShortcut(nn.Conv2d):
    """A 1x1 convolution: images (B, in_channels, H, W) -> (B, out_channels, H/stride, W/stride).

    He et al. 2016, arXiv:1512.03385, section 3.3. On a CPU with few channels it convolves the pixels that the
    stride keeps, which is the same. Seen with torch 2.14.1 on two processors: with fewer than 16 channels,
    channels last, oneDNN's backward pass of a strided 1x1 convolution writes outside of its tensors, and
    the process aborts or computes nonsense.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels >= 16 or x.device.type != "cpu":
            return super().forward(x)
        across, down = self.stride
        return nn.functional.conv2d(x[:, :, ::across, ::down], self.weight, self.bias)


def train_safely(trunk: nn.Module) -> nn.Module:
    """Make the strided 1x1 convolutions of somebody else's network, in place, what ProjectionShortcut is."""
    for module in trunk.modules():
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (1, 1)
            and module.stride != (1, 1)
            and (module.groups, module.padding) == (1, (0, 0))
        ):
            module.__class__ = ProjectionShortcut
    return trunk


class ResNet(nn.Module):
    """A residual trunk, its head and its prototypes.

    normalize           L2-normalise the embedding before the prototypes
    output_dim, hidden_mlp, head_dims, head_bn    the projection head, see src.nets.heads.build_head
    nmb_prototypes      K; a list gives several sets; 0 none
    eval_mode           no pooling and no head: forward gives the last map (B, num_features, H, W)
    in_chans            channels of the images
    stem                "imagenet": 7x7 stride 2 and max-pooling; "small" (32 px): 3x3 stride 1 and
                        no pooling, so that only conv1.weight differs in shape
    stem_padding        zeros around the image at the 3x3 convolution of the small stem, 2 in solo-learn
    zero_init_residual  every residual branch starts at 0 (weight of its last BatchNorm)
    width, widen        multiply the width of every layer; widen belongs to the architecture
    groups, width_per_group    of the 3x3 convolutions (ResNeXt)

    Convolutions start as Kaiming normal (fan out), BatchNorm at 1 and 0. Raises ValueError.
    """

    def __init__(
        self,
        block: type[nn.Module],
        depths: Sequence[int],
        normalize: bool = False,
        output_dim: int = 0,
        hidden_mlp: int = 0,
        nmb_prototypes: int | Sequence[int] = 0,
        eval_mode: bool = False,
        in_chans: int = 3,
        stem: str = "imagenet",
        stem_padding: int = 1,
        zero_init_residual: bool = False,
        head_dims: Sequence[int] | None = None,
        head_bn: bool = True,
        width: float = 1.0,
        widen: int = 1,
        groups: int = 1,
        width_per_group: int = 64,
    ):
        super().__init__()
        if stem not in ("imagenet", "small"):
            raise ValueError(f"--stem {stem} is not known: use imagenet or small")
        planes = round(64 * widen * width)
        if in_chans < 1 or planes < 1:
            raise ValueError(f"--in_chans {in_chans} with --width {width} leaves no channel")
        if eval_mode and (output_dim or head_dims or nmb_prototypes):
            raise ValueError("eval_mode=True returns maps: leave out the head and the prototypes")
        self.eval_mode, self.normalize = eval_mode, normalize
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_chans, planes, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_chans, planes, 3, padding=stem_padding, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)

        self.num_features = planes
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(self.num_features, planes, stride, groups, width_per_group))
                self.num_features = planes * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            planes *= 2
        self.avgpool = nn.AdaptiveAvgPool2d(1)

        self.projection_head, self.prototypes = build_head(
            self.num_features, output_dim, hidden_mlp, nmb_prototypes, head_dims, head_bn
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_(getattr(module, "bn3", module.bn2).weight)

    def forward_backbone(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, S, S) -> features (B, num_features); in eval_mode the last map."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, 64, S/4, S/4), small stem S, S
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, num_features, S/32, S/32)
        return x if self.eval_mode else self.avgpool(x).flatten(1)

    def forward_head(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | list[Tensor]]:
        """Features (B, num_features) -> embedding, or (embedding, scores), see apply_head."""
        return apply_head(x, self.projection_head, self.prototypes, self.normalize)

    def forward(
        self, crops: Tensor | Sequence[Tensor]
    ) -> Tensor | tuple[Tensor, Tensor | list[Tensor]]:
        """A tensor or a list of crops -> embedding (N, D) or (embedding, scores), crop-major."""
        x = forward_crops(self.forward_backbone, crops)
        return x if self.eval_mode else self.forward_head(x)


resnet10 = partial(ResNet, BasicBlock, (1, 1, 1, 1))  # for small images on small machines
resnet18 = partial(ResNet, BasicBlock, (2, 2, 2, 2))
resnet34 = partial(ResNet, BasicBlock, (3, 4, 6, 3))
resnet50 = partial(ResNet, Bottleneck, (3, 4, 6, 3))
resnet101 = partial(ResNet, Bottleneck, (3, 4, 23, 3))
resnet152 = partial(ResNet, Bottleneck, (3, 8, 36, 3))
resnet50w2 = partial(resnet50, widen=2)
resnet50w4 = partial(resnet50, widen=4)
resnet50w5 = partial(resnet50, widen=5)
resnext50_32x4d = partial(resnet50, groups=32, width_per_group=4)
resnext101_32x8d = partial(resnet101, groups=32, width_per_group=8)

# What --arch takes: every name above, and the networks of torchvision and timm of build_model.
ARCHITECTURES = {name: network for name, network in globals().items() if type(network) is partial}
# Vision transformers, which main_dino.py trains; see src.nets.backbones.
TRANSFORMERS = re.compile(r"(vit|deit)_(micro|tiny|small|base|large)|xcit_.*")
TIMM = "timm:"  # before the name of a network of timm


class LibraryTrunk(nn.Module):
    """A network of torchvision or timm without its classifier, under our head; see ResNet."""

    def __init__(
        self,
        arch: str,
        normalize: bool = False,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head,
    ):
        super().__init__()
        self.arch, self.normalize = arch, normalize
        if arch.startswith(TIMM):
            from .timm_trunks import timm_trunk

            name = arch.removeprefix(TIMM)
            self.trunk, self.num_features = timm_trunk(name, in_chans, drop_path_rate)
        else:
            self.trunk, self.num_features = torchvision_trunk(arch)
        train_safely(self.trunk)
        self.projection_head, self.prototypes = build_head(self.num_features, **head)

    def forward_backbone(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, S, S) -> features (B, num_features)."""
        size = getattr(self.trunk, "image_size", None)  # of the position table of a ViT
        if size is not None and x.shape[2:] != (size, size):
            raise ValueError(f"--arch {self.arch} takes images of {size} px only, not {x.shape[2]}")
        return self.trunk(x)

    def forward_head(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | list[Tensor]]:
        """Embeddings, and scores where there are prototypes, of features (B, F): see apply_head."""
        return apply_head(x, self.projection_head, self.prototypes, self.normalize)

    def forward(
        self, crops: Tensor | Sequence[Tensor]
    ) -> Tensor | tuple[Tensor, Tensor | list[Tensor]]:
        return self.forward_head(forward_crops(self.forward_backbone, crops))


def torchvision_trunk(arch: str) -> tuple[nn.Module, int]:
    """The untrained torchvision network `arch` up to its pooled features, and their number.

    Of the classifier only what comes before its first layer with weights stays (a LayerNorm, say).
    """
    from torchvision import models  # here, so that our own trunks do without it

    auxiliary = arch in ("googlenet", "inception_v3")  # classifiers beside the trunk, left out
    options = {"aux_logits": False, "init_weights": True} if auxiliary else {}
    trunk = models.get_model(arch, weights=None, **options)
    name = next(name for name in ("fc", "classifier", "heads", "head") if hasattr(trunk, name))
    classifier = getattr(trunk, name)
    kept = []
    for layer in classifier if isinstance(classifier, nn.Sequential) else [classifier]:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            break
        if not isinstance(layer, nn.Dropout):
            kept.append(layer)
    num_features = layer.weight.shape[1]
    if isinstance(layer, nn.Conv2d):  # SqueezeNet classifies every position and averages after
        kept.append(nn.AdaptiveAvgPool2d(1))
    setattr(trunk, name, nn.Sequential(*kept))
    if hasattr(trunk, "dropout"):
        trunk.dropout = nn.Identity()
    if arch == "alexnet" or arch.startswith("vgg"):  # these classify 6 x 6 or 7 x 7 cells
        num_features //= math.prod(trunk.avgpool.output_size)
        trunk.avgpool = nn.AdaptiveAvgPool2d(1)
    return trunk, num_features


def build_model(arch: str, **options) -> nn.Module:
    """The untrained network of a name in ARCHITECTURES, of torchvision's classification networks, or
    of timm's, which have timm: before their name.

    `options` are those of ResNet; a torchvision trunk takes those of the head, and images of 3
    channels and of the sizes that it was made for; one of timm also in_chans and drop_path_rate.
    Raises ValueError on an unknown name.
    """
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch](**options)
    if not arch.startswith(TIMM):
        refuse_unknown(arch)
    ours = dict(in_chans=3, stem="imagenet", width=1.0, zero_init_residual=False, eval_mode=False)
    ours["stem_padding"] = 1
    if arch.startswith(TIMM):
        del ours["in_chans"]
    for name, default in ours.items():
        if options.pop(name, default) != default:
            hint = "leave it out" if default is False else f"use --{name} {default}"
            raise ValueError(f"--{name} needs a ResNet of ours: for --arch {arch} {hint}")
    return LibraryTrunk(arch, **options)


def refuse_unknown(arch: str) -> None:
    """Raise ValueError unless `arch` is a torchvision classification network."""
    if TRANSFORMERS.fullmatch(arch):
        raise ValueError(
            f"--arch {arch} is a vision transformer, which main_dino.py trains and the evaluations load: "
            f"here use one of {', '.join(ARCHITECTURES)}, or another network of torchvision or timm"
        )
    from torchvision import models

    if arch not in models.list_models(module=models):
        raise ValueError(
            f"--arch {arch} is not known: use one of {', '.join(ARCHITECTURES)}, any torchvision "
            "classification model, such as vgg16 or convnext_tiny, or timm:NAME for one of timm"
        )
