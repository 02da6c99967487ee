"""Faster and Mask R-CNN of torchvision with a trunk of ours, in three forms.

faster_rcnn_c4   proposals on the map of stride 16; the trunk's last stage, a batch norm and a linear layer
                 judge each (SwAV, arXiv:2006.09882, A.5; MoCo, arXiv:1911.05722, A)
faster_rcnn_fpn  a feature pyramid (Lin et al., arXiv:1612.03144) on four maps of the trunk
mask_rcnn_fpn    the same with masks (He et al., arXiv:1703.06870)

All layers are trained, batch norms too, as in MoCo, and the pyramid and the heads of masks have batch norm.
Where nothing else is said values are Detectron2's, by which the papers trained.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ..data.multicrop import generator
from ..nets.backbones import is_vit
from ..nets.pooling import forward_of_map
from ..nets.pretrained import Pretrained
from ..nets.top_layer import PlainNetwork
from .detection_samples import SamplesByImage

TRIAL = 224  # pixels of the image that the maps of a trunk are found with
LEVELS = 4  # maps of a trunk that a feature pyramid is made of
CHANNELS, HIDDEN = 256, 1024  # of a pyramid and of its heads, for a trunk of --width 1
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors
C4_SIZES = (2, 4, 8, 16, 32)  # sides of anchors in strides: 32 to 512 px at stride 16
FPN_SIZE = 8  # of the one anchor of each level: 32 px at stride 4
CLASS_STD, BOX_STD = 0.01, 0.001  # of the last layers' weights at the start


# ============ maps of a trunk ============
class TrunkMaps(nn.Module):
    """Images (B, C, H, W) -> maps of a convolutional trunk by stride, {"0": (B, D_0, H/4, W/4), ...}.

    Maps are the outputs of the modules that are least nested, the last one for each stride: layer1 to layer4
    of a ResNet, the stages of others. layers: their names, strides: one for each, channels: D_i. Raises
    ValueError for a trunk without maps at strides that double.
    """

    def __init__(self, network: Pretrained, num_levels: int):
        super().__init__()
        if "xcit" in network.arch:
            raise ValueError(
                f"--arch {network.arch} has no maps that are known here: use a ResNet, a vision transformer "
                "or another convolutional network"
            )
        self.model = network.model
        self._forward = self.model.forward_backbone
        if isinstance(self.model, PlainNetwork):  # whose linear layers are left out
            self._forward = lambda images: self.model.forward_conv(images, self.model.num_convs)
        self._maps = {}
        found = self._find(network.in_chans)
        strides = sorted(found)[-num_levels:]
        if len(strides) < num_levels or strides[-1] != strides[0] * 2 ** (num_levels - 1):
            raise ValueError(
                f"--arch {network.arch} has maps at the strides {sorted(found) or 'none'}, where a detector "
                f"needs {num_levels}, each twice the one before: use a ResNet, or another --arch"
            )
        self.strides = strides
        self.layers = [found[stride][0] for stride in strides]
        self.channels = [found[stride][1] for stride in strides]
        modules = dict(self.model.named_modules())
        for i, name in enumerate(self.layers):
            modules[name].register_forward_hook(self._keep(str(i)))

    def _keep(self, key):
        def keep(module, inputs, output):
            self._maps[key] = output

        return keep

    @torch.no_grad()
    def _find(self, in_chans):
        """{stride: (name of the module, channels)} of the maps, by a trial."""
        found, hooks = {}, []

        def look(name, depth):
            def hook(module, inputs, output):
                is_map = isinstance(output, Tensor) and output.ndim == 4
                if not is_map or output.shape[2] != output.shape[3] or TRIAL % output.shape[2]:
                    return
                stride = TRIAL // output.shape[2]
                is_power = stride & (stride - 1) == 0
                if is_power and depth <= found.get(stride, ("", 0, math.inf))[2]:
                    found[stride] = (name, output.shape[1], depth)

            return hook

        for name, module in self.model.named_modules():
            if name:
                hooks.append(module.register_forward_hook(look(name, name.count("."))))
        self._forward(torch.zeros(1, in_chans, TRIAL, TRIAL))
        for hook in hooks:
            hook.remove()
        return found

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        self._maps.clear()
        self._forward(images)
        maps = OrderedDict((str(i), self._maps[str(i)]) for i in range(len(self.layers)))
        self._maps.clear()
        return maps


class PatchMaps(nn.Module):
    """Images (B, C, H, W) -> four maps of a vision transformer's patches, of a quarter to twice their stride.

    The simple pyramid of ViTDet (Li et al., arXiv:2203.16527) with batch norm: two, one and no transposed
    convolution, and a max-pooling. Raises ValueError for patches whose side is no multiple of 4 px.
    """

    def __init__(self, network: Pretrained):
        super().__init__()
        self.model = network.model
        self._forward = forward_of_map(network)
        dim, side = self.model.num_features, self.model.patch_size
        if side % 4:
            raise ValueError(f"--patch_size {side} must be a multiple of 4 for a detector: 8 or 16")
        halves = [max(1, dim // 2), max(1, dim // 4)]
        self.larger = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(dim, halves[0], 2, stride=2),
                    nn.BatchNorm2d(halves[0]),
                    nn.GELU(),
                    nn.ConvTranspose2d(halves[0], halves[1], 2, stride=2),
                ),
                nn.ConvTranspose2d(dim, halves[0], 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.layers = [f"patches of {side} px"]
        self.strides = [side // 4, side // 2, side, 2 * side]
        self.channels = [halves[1], halves[0], dim, dim]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        patches = self._forward(images)  # (B, D, H / P, W / P)
        return OrderedDict((str(i), layer(patches)) for i, layer in enumerate(self.larger))


class PyramidTrunk(nn.Module):
    """Images -> the maps of a feature pyramid, and one more of half the size, all of out_channels."""

    def __init__(self, maps: TrunkMaps | PatchMaps, out_channels: int):
        super().__init__()
        self.maps, self.out_channels = maps, out_channels
        self.pyramid = FeaturePyramidNetwork(
            maps.channels, out_channels, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.pyramid(self.maps(images))


def take_last_stage(network: Pretrained) -> nn.Module:
    """Take layer4 off a ResNet, and return it. Raises ValueError for another network."""
    trunk = getattr(network.model, "trunk", network.model)
    if not all(isinstance(getattr(trunk, f"layer{i}", None), nn.Module) for i in (3, 4)):
        raise ValueError(
            f"--detector faster_rcnn_c4 is for ResNets, whose layer4 it takes as its head: for --arch "
            f"{network.arch} use --detector faster_rcnn_fpn"
        )
    stage, trunk.layer4 = trunk.layer4, nn.Identity()
    return stage


# ============ what is prepared elsewhere ============
class ResizedElsewhere(GeneralizedRCNNTransform):
    """Normalises and pads images that come in their size; boxes and masks are given for original_sizes.

    original_sizes: height and width of the images of the next batch before they were resized.
    """

    original_sizes: list[tuple[int, int]] | None = None

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        return image, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        sizes = self.original_sizes or original_image_sizes
        return super().postprocess(result, image_shapes, sizes)


def _in_float32(module, inputs, output):
    """A hook: what comes out of a module under autocast, in float32.

    Coordinates of boxes take their type from it, and in bfloat16 they would be 4 px apart at 1,000.
    """
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return OrderedDict((name, x.float()) for name, x in output.items())
    return tuple(
        [x.float() for x in part] if isinstance(part, list) else part.float() for part in output
    )


# ============ detectors ============
def build_detector(
    network: Pretrained,
    detector: str,
    num_classes: int,
    *,
    mean: list[float],
    std: list[float],
    seed: int,
    proposals: int = 512,
) -> GeneralizedRCNN:
    """A detector on the trunk of a network, which becomes part of it; the rest as the seed makes it.

    detector: one of those above. num_classes: without the background. mean, std: of the channels of images
    from 0 to 1. proposals: of an image, that the loss is of. In training mode a list of images (C, h, w) and
    one of targets, each boxes, labels and masks -> the losses by name; in evaluation mode images -> boxes,
    labels, scores and masks of each. Raises ValueError for a trunk that does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        build = _with_last_stage if detector == "faster_rcnn_c4" else _with_pyramid
        built = build(network, detector, num_classes, proposals)
    built.transform = ResizedElsewhere(1, 1, mean, std)
    for part in (built.rpn, built.roi_heads):
        sampler = part.fg_bg_sampler
        part.fg_bg_sampler = SamplesByImage(sampler.batch_size_per_image, sampler.positive_fraction)
    heads = built.roi_heads
    nn.init.normal_(
        heads.box_predictor.cls_score.weight, std=CLASS_STD, generator=generator(seed, 0)
    )
    nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=BOX_STD, generator=generator(seed, 1))
    for layer in (heads.box_predictor.cls_score, heads.box_predictor.bbox_pred):
        nn.init.zeros_(layer.bias)
    for module in (built.backbone, built.rpn.head, heads.box_predictor, heads.mask_predictor):
        if module is not None:
            module.register_forward_hook(_in_float32)
    return built


def _with_last_stage(network, detector, num_classes, proposals):
    stage = take_last_stage(network)
    num_features = network.model.num_features
    trunk = TrunkMaps(network, 1)
    _freeze_unused(trunk, network.in_chans)
    trunk.out_channels = trunk.channels[0]
    head = nn.Sequential(stage, nn.BatchNorm2d(num_features), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return FasterRCNN(
        trunk,
        rpn_anchor_generator=AnchorGenerator(
            (tuple(trunk.strides[0] * size for size in C4_SIZES),), (RATIOS,)
        ),
        rpn_pre_nms_top_n_train=12000,
        rpn_pre_nms_top_n_test=6000,
        rpn_post_nms_top_n_train=2000,
        rpn_post_nms_top_n_test=1000,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0),
        box_head=head,
        box_predictor=FastRCNNPredictor(num_features, num_classes + 1),
        box_batch_size_per_image=proposals,
    )


def _with_pyramid(network, detector, num_classes, proposals):
    width = network.options.get("width") or 1.0
    channels, hidden = max(1, round(CHANNELS * width)), max(1, round(HIDDEN * width))
    maps = PatchMaps(network) if is_vit(network.arch) else TrunkMaps(network, LEVELS)
    trunk = PyramidTrunk(maps, channels)
    _freeze_unused(trunk, network.in_chans)
    first, names = maps.strides[0], [str(i) for i in range(LEVELS)]

    def pool(side):  # boxes of 224 px are of the level of stride 16, and so on
        return MultiScaleRoIAlign(
            names,
            output_size=side,
            sampling_ratio=2,
            canonical_scale=56 * first,
            canonical_level=round(math.log2(first)) + 2,
        )

    anchors = tuple((FPN_SIZE * first * 2**i,) for i in range(LEVELS + 1))
    built = FasterRCNN(
        trunk,
        rpn_anchor_generator=AnchorGenerator(anchors, (RATIOS,) * (LEVELS + 1)),
        rpn_post_nms_top_n_train=1000,
        box_roi_pool=pool(7),
        box_head=TwoMLPHead(channels * 7 * 7, hidden),
        box_predictor=FastRCNNPredictor(hidden, num_classes + 1),
        box_batch_size_per_image=proposals,
    )
    if detector == "mask_rcnn_fpn":  # torchvision's MaskRCNN is the same with these
        heads = built.roi_heads
        heads.mask_roi_pool = pool(14)
        heads.mask_head = MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=nn.BatchNorm2d)
        heads.mask_predictor = MaskRCNNPredictor(channels, channels, num_classes + 1)
    return built


def _freeze_unused(trunk: nn.Module, in_chans: int) -> None:
    """Train no parameter that the maps do not depend on, such as a classifier's: DDP would wait for it."""
    for parameter in trunk.parameters():
        parameter.requires_grad_(True)
    was_training = trunk.training
    trunk.eval()
    maps = trunk(torch.zeros(1, in_chans, TRIAL, TRIAL))
    sum(x.sum() for x in maps.values()).backward()
    for parameter in trunk.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    trunk.train(was_training)
