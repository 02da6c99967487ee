"""Networks for torch.hub: torch.hub.load("<owner>/<this repository>", "dino_vits16").

Also from a checkout, with weights of one's own:

  torch.hub.load("/path/to/this", "dino_vits16", source="local", pretrained="runs/dino")

pretrained: True for the released weights, False for none, or the path or address of a file: a run of
this repository, a full training checkpoint, a released file. checkpoint_key: its section, such as
"student"; the teacher unless given. Other keyword arguments go to the network. Weights that are
missing or do not fit stop the loading. What is returned is the trunk in training mode, without a
head: images (B, 3, H, W), normalised with the mean and standard deviation of ImageNet, to features
(B, D). The entry `trunk` needs no name of a network, loads whatever the evaluations do, and is in
evaluation mode: torch.hub.load("/path/to/this", "trunk", "runs/mine", source="local").
Published: arXiv:2104.14294 (DINO), arXiv:2006.09882 (SwAV), arXiv:1807.05520 (DeepCluster),
arXiv:1905.01278 (DeeperCluster). The last two take the derivatives of a grey image first (Sobel);
with rgb=True these are part of the first convolution, exactly but for DeepCluster's image border.

Our package src is imported under a name of its own, so that a `src` or `utils` of the caller stays
what it is, and torch.save and torch.compile of the network find its classes.
"""

import hashlib as _hashlib
import importlib as _importlib
import importlib.util as _importlib_util
import os as _os
import sys as _sys

import torch as _torch

dependencies = ["torch", "torchvision"]

_SOURCES = _os.path.join(_os.path.dirname(_os.path.abspath(__file__)), "src")
_PACKAGE = "hub_" + _hashlib.sha256(_SOURCES.encode()).hexdigest()[:12]  # stands for "src"
_RELEASED = "https://dl.fbaipublicfiles.com/"


# ============ ViT, DINO ============
def dino_vits16(pretrained=True, **options):
    """ViT-S/16 by DINO, (B, 3, H, W) -> (B, 384); 74.5 % k-NN on ImageNet as published."""
    return _dino("vit_small", "dino_deitsmall16", pretrained, patch_size=16, **options)


def dino_vits8(pretrained=True, **options):
    """ViT-S/8 by DINO, (B, 3, H, W) -> (B, 384); 78.3 % k-NN on ImageNet as published."""
    return _dino("vit_small", "dino_deitsmall8", pretrained, patch_size=8, **options)


def dino_vitb16(pretrained=True, **options):
    """ViT-B/16 by DINO, (B, 3, H, W) -> (B, 768); 76.1 % k-NN on ImageNet as published."""
    return _dino("vit_base", "dino_vitbase16", pretrained, patch_size=16, **options)


def dino_vitb8(pretrained=True, **options):
    """ViT-B/8 by DINO, (B, 3, H, W) -> (B, 768); 77.4 % k-NN on ImageNet as published."""
    return _dino("vit_base", "dino_vitbase8", pretrained, patch_size=8, **options)


# ============ ResNet and XCiT, DINO ============
def dino_resnet50(pretrained=True, **options):
    """ResNet-50 by DINO, (B, 3, H, W) -> (B, 2048); 75.3 % linear on ImageNet as published."""
    return _dino("resnet50", "dino_resnet50", pretrained, **options)


def dino_xcit_small_12_p16(pretrained=True, **options):
    """XCiT-S12/16 by DINO, (B, 3, H, W) -> (B, 384); needs the package timm."""
    return _xcit("small_12", 16, pretrained, **options)


def dino_xcit_small_12_p8(pretrained=True, **options):
    """XCiT-S12/8 by DINO, (B, 3, H, W) -> (B, 384); needs the package timm."""
    return _xcit("small_12", 8, pretrained, **options)


def dino_xcit_medium_24_p16(pretrained=True, **options):
    """XCiT-M24/16 by DINO, (B, 3, H, W) -> (B, 512); needs the package timm."""
    return _xcit("medium_24", 16, pretrained, **options)


def dino_xcit_medium_24_p8(pretrained=True, **options):
    """XCiT-M24/8 by DINO, (B, 3, H, W) -> (B, 512); needs the package timm."""
    return _xcit("medium_24", 8, pretrained, **options)


# ============ ResNet, SwAV ============
def resnet50(pretrained=True, **options):
    """ResNet-50 by SwAV, 800 epochs, (B, 3, H, W) -> (B, 2048), without the random fc that the
    published entry has; 75.3 % linear on ImageNet as published."""
    return _load("resnet50", "deepcluster/swav_800ep_pretrain.pth.tar", pretrained, **options)


def resnet50w2(pretrained=True, **options):
    """ResNet-50, twice as wide, by SwAV, (B, 3, H, W) -> (B, 4096); 77.3 % linear as published."""
    return _swav_wide("resnet50w2", "RN50w2", pretrained, **options)


def resnet50w4(pretrained=True, **options):
    """ResNet-50, 4 times as wide, by SwAV, (B, 3, H, W) -> (B, 8192); 77.9 % linear as published."""
    return _swav_wide("resnet50w4", "RN50w4", pretrained, **options)


def resnet50w5(pretrained=True, **options):
    """ResNet-50, 5 times as wide, by SwAV, (B, 3, H, W) -> (B, 10240); 78.5 % linear as published."""
    return _swav_wide("resnet50w5", "RN50w5", pretrained, **options)


swav_resnet50, swav_resnet50w2 = resnet50, resnet50w2
swav_resnet50w4, swav_resnet50w5 = resnet50w4, resnet50w5


# ============ AlexNet and VGG-16, DeepCluster and DeeperCluster ============
def deepcluster_alexnet(pretrained=True, rgb=False, **options):
    """AlexNet with batch norm by DeepCluster, (B, 3, H, W) -> (B, 4096), from 63 px on; weights from
    a file, pretrained="alexnet/checkpoint.pth.tar", since we know no address of them."""
    return _of_clusters("alexnet", 1, pretrained, rgb, **options)


def deepcluster_vgg16(pretrained=True, rgb=False, **options):
    """VGG-16 with batch norm by DeepCluster, (B, 3, H, W) -> (B, 4096), from 32 px on; weights from
    a file, pretrained="vgg16/checkpoint.pth.tar", since we know no address of them."""
    return _of_clusters("vgg16", 1, pretrained, rgb, **options)


def deepercluster_vgg16(pretrained=True, rgb=False, **options):
    """VGG-16 with batch norm by DeeperCluster, (B, 3, H, W) -> (B, 4096), from 30 px on; weights
    from a file, pretrained="ours.pth", since we know no address of them."""
    return _of_clusters("vgg16", 2, pretrained, rgb, **options)


# ============ whatever a run or a file holds ============
def trunk(pretrained, checkpoint_key=None, **options):
    """The trunk of a run's folder, a checkpoint, a released file or an address, in evaluation mode,
    (B, 3, H, W) -> (B, D), or with as many channels as the run's images have. Normalise images with
    model.mean and model.std; the run's largest crops have model.image_size pixels a side. options:
    arch and other flags of the network, where neither the run nor the file says them."""
    if not pretrained or isinstance(pretrained, bool):
        raise ValueError(
            f"pretrained={pretrained!r} must be a run's folder, or the path or address of a file"
        )
    network = _ours("nets.pretrained").open_pretrained(
        pretrained, checkpoint_key=checkpoint_key, **options
    )
    data_path = network.run_args.get("data_path")
    images = _ours("data.datasets").images_like(data_path, network.in_chans)
    model = network.model
    model.mean, model.std = network.normalisation(images)
    model.image_size = network.image_size
    return model


# ============ building and loading ============
def _dino(arch, name, pretrained, **options):
    return _load(arch, f"dino/{name}_pretrain/{name}_pretrain.pth", pretrained, **options)


def _xcit(size, patch_size, pretrained, **options):
    arch = f"xcit_{size}_p{patch_size}"
    return _dino(arch, f"dino_{arch}", pretrained, patch_size=patch_size, **options)


def _swav_wide(arch, name, pretrained, **options):
    return _load(arch, f"deepcluster/swav_{name}_400ep_pretrain.pth.tar", pretrained, **options)


def _of_clusters(arch, sobel_padding, pretrained, rgb, checkpoint_key=None, **options):
    """A network of src.nets.convnets with the weights of a file, under Sobel filters if the file has them."""
    if pretrained is True or pretrained is None or pretrained == "":
        raise ValueError(
            f"pretrained={pretrained!r} must be the path or address of a file, or False: no address "
            "of these weights is known here for sure"
        )
    said, weights = {"arch": arch, "sobel": True}, {}
    if pretrained is not False:
        weights = _ours("nets.weights").read_weights(pretrained, checkpoint_key)
        said |= _ours("nets.recognise").recognise(weights, arch)
    # Without Sobel filters DeeperCluster pads by one less. What the caller says wins.
    said |= {"sobel_padding": sobel_padding, "image_padding": sobel_padding - 1, **options}
    model = _ours("nets.convnets").build_convnet(**said)
    if pretrained is not False:
        _ours("nets.weights").fit_weights(model, weights, pretrained)
    if rgb and model.sobel is not None:
        _ours("nets.folded_sobel").fold_sobel(model)
    return model


def _load(arch, released, pretrained, checkpoint_key=None, **options):
    """The network `arch`, with the weights that `pretrained` asks for."""
    if pretrained is None or pretrained == "":
        raise ValueError(f"pretrained={pretrained!r} must be True, False, or the path of a file")
    if pretrained is False:
        return _ours("nets.backbones").build_backbone(arch, **options)
    path = _RELEASED + released if pretrained is True else pretrained
    network = _ours("nets.pretrained").open_pretrained(
        path, arch, checkpoint_key=checkpoint_key, **options
    )
    return network.model.to(memory_format=_torch.contiguous_format).train()


# ============ importing src under another name ============
def _ours(name):
    """The module src.<name> of this repository, as <_PACKAGE>.<name>; inside src imports are relative."""
    if _PACKAGE not in _sys.modules:
        spec = _importlib_util.spec_from_file_location(
            _PACKAGE,
            _os.path.join(_SOURCES, "__init__.py"),
            submodule_search_locations=[_SOURCES],
        )
        package = _sys.modules[_PACKAGE] = _importlib_util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return _importlib.import_module(f"{_PACKAGE}.{name}")
