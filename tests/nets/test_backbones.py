"""Networks by the name of --arch: what each takes, gives and refuses."""

import copy
import sys

import pytest
import torch

from src.nets.backbones import build_backbone, is_vit
from src.nets.resnet import ResNet
from src.nets.vision_transformer import ARCHITECTURES, VisionTransformer


@torch.no_grad()
@pytest.mark.parametrize(
    "arch, features, options, size",
    [
        ("vit_tiny", 192, {"num_registers": 4, "depth": 2, "patch_size": 8, "in_chans": 4}, 32),
        ("deit_small", 384, {"depth": 1, "img_size": 64, "stem": "small"}, 96),
        ("vit_base", 384, {"width": 0.5, "depth": 1, "drop_path_rate": 0.2}, 48),
        ("resnet18", 256, {"width": 0.5, "stem": "small", "zero_init_residual": True}, 32),
        ("resnet50", 2048, {"in_chans": 1, "patch_size": 8, "drop_path_rate": 0.1}, 32),
        ("mobilenet_v3_small", 576, {"patch_size": 8, "img_size": 64}, 32),
    ],
)
def test_every_network_maps_images_to_its_features(arch, features, options, size):
    model = build_backbone(arch, **options).eval()
    x = torch.randn(2, options.get("in_chans", 3), size, size)
    assert model.num_features == features
    assert model(x).shape == (2, features)
    assert torch.equal(model.forward_backbone(x), model(x))


def test_options_reach_a_vision_transformer():
    model = build_backbone(
        "vit_small",
        patch_size=5,
        img_size=40,
        in_chans=2,
        drop_path_rate=0.3,
        num_registers=3,
        depth=4,
        width=0.5,
    )
    assert isinstance(model, VisionTransformer)
    assert model.patch_embed.proj.weight.shape == (192, 2, 5, 5)
    assert (model.grid, model.num_registers, len(model.blocks)) == ((8, 8), 3, 4)
    assert model.blocks[-1].drop_path_rate == 0.3
    with torch.device("meta"):
        assert len(build_backbone("vit_small").blocks) == 12
        assert build_backbone("vit_small", width=0.4).embed_dim == 156  # 153.6, in 6 heads of 26


def test_options_reach_a_resnet():
    with torch.device("meta"):
        model = build_backbone("resnet18", in_chans=2, stem="small", width=0.5)
        assert isinstance(model, ResNet) and model.conv1.weight.shape == (32, 2, 3, 3)
        assert model.projection_head is None and model.prototypes is None
    model = build_backbone("resnet18", width=0.125, zero_init_residual=True)
    assert (model.layer1[0].bn2.weight == 0).all()


def test_which_names_are_vision_transformers_of_ours():
    assert all(is_vit(arch) for arch in ARCHITECTURES)
    assert not any(is_vit(arch) for arch in ("resnet50", "vit_b_32", "xcit_small_12_p16", "swin_t"))


@pytest.mark.parametrize(
    "arch, option",
    [
        ("resnet50", {"num_registers": 4}),
        ("resnet50", {"depth": 4}),
        ("vgg11", {"num_registers": 1}),
        ("vgg11", {"in_chans": 1}),
        ("vgg11", {"stem": "small"}),
        ("vit_small", {"zero_init_residual": True}),
        ("vit_small", {"patch_size": 0}),
        ("vit_small", {"drop_path_rate": 1.5}),
        ("xcit_nano_12_p16", {"num_registers": 1}),
        ("xcit_nano_12_p16", {"depth": 3}),
        ("xcit_nano_12_p16", {"zero_init_residual": True}),
        ("xcit_nano_12_p16", {"width": 2.0}),
    ],
)
def test_an_option_that_the_network_has_no_use_for_is_refused_by_name(arch, option):
    with pytest.raises(ValueError, match=f"^--{next(iter(option))} ") as error:
        build_backbone(arch, **option)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arch", ["vit_smal", "resnet51", "fasterrcnn_resnet50_fpn", ""])
def test_an_unknown_name_lists_what_there_is(arch):
    with pytest.raises(ValueError, match=f"^--arch {arch} is not known") as error:
        build_backbone(arch)
    words = ("vit_small", "deit_tiny", "xcit_", "resnet50w2", "torchvision")
    assert all(word in str(error.value) for word in words)


# ============ XCiT, by timm ============


@torch.no_grad()
@pytest.mark.parametrize("arch, patch_size", [("xcit_nano_12_p16", 16), ("xcit_nano_12_p8", 8)])
def test_xcit_takes_images_of_every_crop_size(arch, patch_size):
    pytest.importorskip("timm", reason="XCiT is timm's, which is optional")
    model = build_backbone(arch, patch_size=patch_size).eval()
    assert model.num_features == 128
    for size in (96, 32) if patch_size == 8 else (224, 96, 32):
        x = torch.randn(2, 3, size, size)
        assert model(x).shape == (2, 128)
        assert torch.equal(model.forward_backbone(x), model(x))


@pytest.mark.slow
def test_xcit_takes_the_options_of_its_network():
    pytest.importorskip("timm", reason="XCiT is timm's, which is optional")
    model = build_backbone("xcit_nano_12_p16", in_chans=2, drop_path_rate=0.25, stem="small")
    assert model.train()(torch.randn(2, 2, 32, 32)).shape == (2, 128)
    assert {m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"} == {0.25}
    assert not [name for name in model.state_dict() if name.startswith("head")]
    with torch.device("meta"):
        assert build_backbone("xcit_small_12_p16").num_features == 384
        names = ["xcit_small_12_p16_224", "xcit_small_12_p16_384_dist", "xcit_small_12_p16_dist"]
        assert {build_backbone(name).num_features for name in names} == {384}


def test_a_copy_of_xcit_uses_its_own_weights():
    pytest.importorskip("timm", reason="XCiT is timm's, which is optional")
    model = build_backbone("xcit_nano_12_p16").eval()
    teacher = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32)
    before = teacher.forward_backbone(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert torch.equal(teacher.forward_backbone(x), before)
    assert not torch.equal(model.forward_backbone(x), before)


@pytest.mark.parametrize(
    "arch, option, words",
    [
        ("xcit", {}, "--arch xcit is not known: .*xcit_small_12_p16"),
        ("xcit_giant_12_p16", {}, "--arch xcit_giant_12_p16 is not known"),
        ("xcit_nano_12_p16", {"drop_path_rate": 1.0}, "--drop_path_rate 1.0"),
    ],
)
def test_what_xcit_cannot_do_is_refused(arch, option, words):
    pytest.importorskip("timm", reason="XCiT is timm's, which is optional")
    with pytest.raises(ValueError, match=words):
        build_backbone(arch, **option)


def test_without_timm_xcit_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="--arch xcit_small_12_p16 needs the package timm"):
        build_backbone("xcit_small_12_p16")
    assert build_backbone("vit_tiny", depth=1).num_features == 192
