"""src.nets.export_names: each library takes the tensors under its names, and computes the same features."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision import models

from src.nets.backbones import build_backbone
from src.nets.export_names import to_detectron2, to_detr, to_timm, to_torchvision
from src.nets.pretrained import open_pretrained
from tests.exports import IMAGES, TinyDETR, assert_same, saved_trunk

# Names and shapes of Detectron2's ResNet-50, without what stands before them in a model.
DETECTRON2_R50 = {
    name: tuple(int(side) for side in shape.split("x"))
    for name, shape in (
        line.split()
        for line in (Path(__file__).parent / "detectron2_r50.txt").read_text().splitlines()
    )
}


def trunk(folder, arch, **options):
    torch.manual_seed(0)
    return saved_trunk(folder, build_backbone(arch, **options), arch, **options)


@pytest.fixture(scope="module")
def network50(tmp_path_factory):
    return trunk(tmp_path_factory.mktemp("resnet50"), "resnet50")


@pytest.fixture(scope="module")
def network18(tmp_path_factory):
    return trunk(tmp_path_factory.mktemp("resnet18"), "resnet18")


# ============ torchvision ============
@torch.no_grad()
def test_torchvision_takes_a_resnet_but_for_its_classifier_and_has_its_features(network18):
    renamed = to_torchvision(network18)
    target = models.resnet18(weights=None).eval()
    report = target.load_state_dict(renamed.weights, strict=False)
    assert report.missing_keys == renamed.missing == ["fc.weight", "fc.bias"]
    assert not report.unexpected_keys
    target.fc = torch.nn.Identity()
    assert_same(target(IMAGES), network18.model(IMAGES))


@torch.no_grad()
def test_torchvision_takes_a_resnet_strictly_where_zeros_are_asked_for(network18):
    renamed = to_torchvision(network18, zero_classifier=True)
    target = models.resnet18(weights=None).eval()
    target.load_state_dict(renamed.weights)
    assert renamed.missing == [] and not target(IMAGES).any()


@pytest.mark.slow
@torch.no_grad()
def test_torchvision_takes_the_resnet_of_a_classifier_of_clusters_without_sobel(tmp_path):
    network = trunk(tmp_path, "resnet18", sobel=False)
    renamed = to_torchvision(network)
    target = models.resnet18(weights=None).eval()
    target.load_state_dict(renamed.weights, strict=False)
    target.fc = torch.nn.Identity()
    assert_same(target(IMAGES), network.model(IMAGES))


@torch.no_grad()
def test_torchvision_takes_its_own_networks_back(tmp_path):
    network = trunk(tmp_path, "mobilenet_v3_small")
    renamed = to_torchvision(network)
    target = models.mobilenet_v3_small(weights=None).eval()
    report = target.load_state_dict(renamed.weights, strict=False)
    assert report.missing_keys == renamed.missing and not report.unexpected_keys
    assert {name.split(".")[0] for name in renamed.missing} == {"classifier"}
    target.classifier = torch.nn.Identity()
    assert_same(target(IMAGES), network.model(IMAGES))


def test_networks_with_a_second_classifier_say_how_they_are_built(tmp_path):
    renamed = to_torchvision(trunk(tmp_path, "googlenet"))
    target = models.googlenet(weights=None, init_weights=False, **renamed.options)
    assert target.load_state_dict(renamed.weights, strict=False).unexpected_keys == []


# ============ narrow ResNets ============
@pytest.mark.parametrize(("arch", "whole"), [("resnet18", 512), ("resnet50", 2048)])
@torch.no_grad()
def test_a_narrow_resnet_is_the_whole_one_of_torchvision_with_zeros(tmp_path, arch, whole):
    network = trunk(tmp_path, arch, width=0.125)
    renamed = to_torchvision(network)
    target = models.get_model(arch, weights=None)
    assert target.load_state_dict(renamed.weights, strict=False).missing_keys == renamed.missing
    target.fc = torch.nn.Identity()
    features = target.eval()(IMAGES)
    own = whole // 8
    assert renamed.features == (own, whole) == (network.model.num_features, features.shape[1])
    assert_same(features[:, :own], network.model(IMAGES))
    assert not features[:, own:].any()
    assert not target.train()(IMAGES)[:, own:].any()


@torch.no_grad()
def test_a_narrow_resnet_fits_into_timm_detr_and_detectron2(tmp_path):
    timm = pytest.importorskip("timm")
    network = trunk(tmp_path, "resnet18", width=0.25, in_chans=4)
    renamed = to_timm(network)
    target = timm.create_model(renamed.model, num_classes=0, **renamed.options).eval()
    target.load_state_dict(renamed.weights)
    images = torch.rand(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert_same(target(images)[:, :128], network.model(images))
    network = trunk(tmp_path, "resnet18", width=0.25)
    filled = to_torchvision(network).weights
    for rename, first in (
        (to_detr, "backbone.0.body.conv1.weight"),
        (to_detectron2, "stem.conv1.weight"),
    ):
        renamed = rename(network)
        assert renamed.features == (128, 512)
        assert torch.equal(renamed.weights[first], filled["conv1.weight"])
        norms = ("norm.weight", "bn1.weight", "bn2.weight")
        shapes = {x.shape[0] for name, x in renamed.weights.items() if name.endswith(norms)}
        assert shapes == {64, 128, 256, 512}
        counters = [name for name in filled if name.endswith("num_batches_tracked")]
        assert len(renamed.weights) == len(filled) - len(counters)
    assert to_torchvision(trunk(tmp_path, "resnet18", width=0.999)).features is None  # 64 planes
    bottlenecks = to_detectron2(trunk(tmp_path, "resnet50", width=0.25))
    assert bottlenecks.features is None  # which there has any width
    assert bottlenecks.settings["MODEL.RESNETS.STEM_OUT_CHANNELS"] == 16


# ============ timm ============
VITS = {
    "as timm's": ({"img_size": 224}, "vit_tiny_patch16_224", set()),
    "64 px": ({"img_size": 64}, "vit_tiny_patch16_224", {"img_size"}),
    "registers": (
        {"img_size": 64, "num_registers": 3},
        "vit_tiny_patch16_224",
        {"img_size", "reg_tokens", "no_embed_class"},
    ),
    "LayerScale": (
        {"img_size": 64, "layer_scale": 0.3},
        "vit_tiny_patch16_224",
        {"img_size", "init_values"},
    ),
    "grey, small patches, narrow": (
        {"img_size": 64, "patch_size": 8, "in_chans": 1, "width": 0.5, "depth": 2},
        "vit_tiny_patch16_224",
        {"img_size", "patch_size", "in_chans", "embed_dim", "depth"},
    ),
}


@pytest.mark.parametrize("case", VITS)
@torch.no_grad()
def test_timm_takes_a_vision_transformer_strictly_and_has_its_features(tmp_path, case):
    timm = pytest.importorskip("timm")
    options, name, said = VITS[case]
    network = trunk(tmp_path, "vit_tiny", **options)
    renamed = to_timm(network)
    assert (renamed.model, set(renamed.options)) == (name, said)
    target = timm.create_model(renamed.model, num_classes=0, **renamed.options).eval()
    target.load_state_dict(renamed.weights)
    images = F.interpolate(IMAGES[:, : network.in_chans], options["img_size"])
    assert_same(target(images), network.model(images))


@pytest.mark.parametrize(
    "arch, patch_size, name",
    [
        ("vit_small", 16, "vit_small_patch16_224"),
        ("vit_small", 8, "vit_small_patch8_224"),
        ("vit_base", 32, "vit_base_patch32_224"),
    ],
)
def test_timm_has_names_for_the_usual_vision_transformers(arch, patch_size, name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        network = open_pretrained("", arch, patch_size=patch_size)
        target = timm.create_model(name, num_classes=0)
    renamed = to_timm(network)
    assert (renamed.model, renamed.options) == (name, {})
    shapes = {name: x.shape for name, x in renamed.weights.items()}
    assert shapes == {name: x.shape for name, x in target.state_dict().items()}


@pytest.mark.slow
@torch.no_grad()
def test_timm_takes_resnets_of_any_number_of_channels_and_its_own_xcit(tmp_path):
    timm = pytest.importorskip("timm")
    cases = {"resnet18": {"in_chans": 1}, "xcit_nano_12_p16": {}}
    for arch, options in cases.items():
        network = trunk(tmp_path, arch, **options)
        renamed = to_timm(network)
        assert renamed.options == options
        target = timm.create_model(renamed.model, num_classes=0, **renamed.options).eval()
        target.load_state_dict(renamed.weights)
        images = IMAGES[:, : network.in_chans]
        assert_same(target(images), network.model(images))


@torch.no_grad()
def test_timm_takes_its_own_networks_back(tmp_path):
    timm = pytest.importorskip("timm")
    network = trunk(tmp_path, "timm:resnet10t")
    renamed = to_timm(network)
    assert (renamed.model, renamed.options) == ("resnet10t", {})
    target = timm.create_model("resnet10t", num_classes=0).eval()
    target.load_state_dict(renamed.weights)
    assert_same(target(IMAGES), network.model(IMAGES))
    with pytest.raises(ValueError, match="--arch timm:resnet10t is of timm: use --format timm"):
        to_torchvision(network)


# ============ Detectron2 ============
def detectron2_model(kind):
    """Names and shapes of the backbone in a model of Detectron2; C4 has the last stage in its head."""
    prefixes = {"C4": "backbone.", "FPN": "backbone.bottom_up."}
    return {
        ("roi_heads." if kind == "C4" and name.startswith("res5.") else prefixes[kind]) + name: x
        for name, x in DETECTRON2_R50.items()
    }


@pytest.mark.parametrize("kind", ["C4", "FPN"])
def test_every_tensor_of_detectron2s_backbones_is_the_end_of_one_name_of_the_file(network50, kind):
    weights = to_detectron2(network50).weights
    found = {}
    for name, shape in detectron2_model(kind).items():
        names = [x for x in weights if name == x or name.endswith(f".{x}")]
        assert len(names) == 1, (name, names)
        assert tuple(weights[names[0]].shape) == shape, name
        found[names[0]] = name
    assert set(found) == set(weights)


def test_detectron2s_fpn_has_the_whole_names_where_they_are_asked_for(network50):
    weights = to_detectron2(network50, "backbone.bottom_up.").weights
    assert {name: tuple(x.shape) for name, x in weights.items()} == detectron2_model("FPN")


@torch.no_grad()
def test_a_resnet_by_detectron2s_names_computes_the_same_features(network50):
    weights = to_detectron2(network50).weights

    def layer(name, x, stride=1):
        kernel = weights[f"{name}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        scale, shift, mean, variance = (
            weights[f"{name}.norm.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) * scale / (variance + 1e-5).sqrt() + shift

    x = F.max_pool2d(F.relu(layer("stem.conv1", IMAGES, 2)), 3, 2, 1)
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        for i in range(blocks):
            block, stride = f"res{stage}.{i}", 2 if i == 0 and stage > 2 else 1
            shortcut = layer(f"{block}.shortcut", x, stride) if i == 0 else x
            x = F.relu(layer(f"{block}.conv1", x))
            x = F.relu(layer(f"{block}.conv2", x, stride))
            x = F.relu(layer(f"{block}.conv3", x) + shortcut)
    assert_same(x.mean((2, 3)), network50.model(IMAGES))


@pytest.mark.parametrize(
    "arch, options, depth, groups, width_per_group, stem, stage",
    [
        ("resnet18", {}, 18, 1, 64, 64, 64),
        ("resnet101", {}, 101, 1, 64, 64, 256),
        ("resnext50_32x4d", {}, 50, 32, 4, 64, 256),
        ("resnet50w2", {}, 50, 1, 128, 128, 512),
        ("resnet50", {"width": 0.5}, 50, 1, 32, 32, 128),
    ],
)
def test_detectron2s_configuration_is_said(
    arch, options, depth, groups, width_per_group, stem, stage
):
    with torch.device("meta"):
        network = open_pretrained("", arch, **options)
    settings = to_detectron2(network).settings
    assert settings == {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width_per_group,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": stem,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": stage,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }


# ============ DETR ============
@torch.no_grad()
def test_detrs_backbone_takes_a_resnet_and_has_its_features(network50):
    detr = TinyDETR().eval()
    report = detr.load_state_dict(to_detr(network50).weights, strict=False)
    assert report.missing_keys == ["class_embed.weight", "class_embed.bias"]
    assert not report.unexpected_keys
    assert_same(detr(IMAGES), network50.model(IMAGES))


# ============ what has no counterpart ============
@pytest.mark.parametrize(
    "rename, arch, options, words",
    [
        (to_torchvision, "resnet18", {"stem": "small"}, "--stem small is not the 7x7 convolution"),
        (to_torchvision, "resnet18", {"width": 1.5}, "--width 1.5 makes another network"),
        (to_timm, "resnext50_32x4d", {"width": 0.5}, "--width 0.5 makes another network"),
        (to_torchvision, "resnet18", {"in_chans": 1}, "--in_chans 1 are other images"),
        (to_torchvision, "resnet50w2", {}, "--arch resnet50w2 has no counterpart there"),
        (to_torchvision, "resnet10", {}, "--arch resnet10 has no counterpart there"),
        (to_torchvision, "vit_tiny", {}, "--arch vit_tiny has no counterpart there"),
        (to_torchvision, "vgg16", {"sobel": False}, "--arch vgg16 has no counterpart there"),
        (to_torchvision, "resnet18", {"sobel": True}, "the network sees Sobel filters"),
        (to_timm, "resnet18", {"stem": "small"}, "--format timm: --stem small"),
        (to_timm, "mobilenet_v3_small", {}, "--arch mobilenet_v3_small has no counterpart there"),
        (to_detectron2, "vit_tiny", {}, "--arch vit_tiny has no counterpart there"),
        (to_detectron2, "resnet18", {"width": 1.5}, "--arch resnet18 has one width there"),
        (to_detectron2, "resnet50", {"stem": "small"}, "--format detectron2: --stem small"),
        (to_detr, "resnet50", {"in_chans": 4}, "--format detr: --in_chans 4"),
    ],
)
def test_a_network_that_a_library_has_not_is_refused_with_what_it_differs_in(
    rename, arch, options, words
):
    with torch.device("meta"):
        network = open_pretrained("", arch, **options)
    with pytest.raises(ValueError, match=words) as refused:
        rename(network)
    assert "safetensors, torch_export or onnx" in str(refused.value)
