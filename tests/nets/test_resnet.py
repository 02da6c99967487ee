"""Trunks and heads: names and outputs of the published models, heads, stems, crops, precision."""

import copy
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from src.nets.heads import MultiPrototypes, build_head, forward_crops
from src.nets.resnet import (
    ARCHITECTURES,
    BasicBlock,
    Bottleneck,
    ProjectionShortcut,
    build_model,
    resnet18,
    resnet50,
    resnet50w2,
    resnet50w5,
    train_safely,
)
from tests.gloo import run_ranks
from tests.golden_weights import fill, uniform

SWAV = {"normalize": True, "hidden_mlp": 2048, "output_dim": 128}
KEYS = json.loads((Path(__file__).parents[1] / "golden" / "resnet50_swav_keys.json").read_text())


def names_and_shapes(model):
    return [[name, list(tensor.shape)] for name, tensor in sorted(model.state_dict().items())]


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("resnet50_swav")


@pytest.fixture(scope="module")
def crops(arrays):
    return [
        torch.from_numpy(crop) for name in ("global", "local") for crop in arrays[f"crops_{name}"]
    ]


@pytest.fixture(scope="module")
def model():
    """The model of the golden file with `hash` weights; tests leave it as they found it."""
    return fill(resnet50(**SWAV, nmb_prototypes=30), "hash").eval()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return resnet18(
        normalize=True, hidden_mlp=64, output_dim=16, nmb_prototypes=12, stem="small"
    ).eval()


def relative(actual, expected):
    return np.abs(actual.detach().numpy() - expected).max() / np.abs(expected).max()


# ============ parity with the published models ============


@pytest.mark.parametrize(
    "name, build",
    [
        ("resnet50", lambda: resnet50(**SWAV, nmb_prototypes=30)),
        ("resnet50_released_3000", lambda: resnet50(**SWAV, nmb_prototypes=3000)),
        ("resnet50_linear_head", lambda: resnet50(output_dim=128, nmb_prototypes=3000)),
        ("resnet50_backbone_eval_mode", lambda: resnet50(eval_mode=True)),
        ("resnet50_multiproto", lambda: resnet50(**SWAV, nmb_prototypes=[30, 30, 30])),
        (
            "resnet50w2",
            lambda: resnet50w2(hidden_mlp=8192, output_dim=128, nmb_prototypes=3000),
        ),
    ],
)
def test_keys_and_shapes_are_those_of_the_published_model(name, build):
    with torch.device("meta"):
        assert names_and_shapes(build()) == KEYS[name]


def test_the_hash_initialiser_gives_the_values_of_its_description():
    np.testing.assert_allclose(
        uniform(0, 4), [-0.272839530, 0.663880846, -0.883117971, -0.625843391], atol=1e-9
    )
    np.testing.assert_allclose(
        uniform(3, 4), [-0.866885451, -0.689476729, 0.475440963, 0.370036354], atol=1e-9
    )


@torch.no_grad()
def check_outputs(model, initialiser, arrays, crops):
    first, second, local, _ = crops
    embedding, scores = model(crops)
    np.testing.assert_allclose(embedding, arrays[f"{initialiser}_embedding"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(scores, arrays[f"{initialiser}_scores"], rtol=0, atol=2e-5)
    interleaved, _ = model([first, local, second])
    expected = arrays[f"{initialiser}_interleaved_embedding"]
    np.testing.assert_allclose(interleaved, expected, rtol=0, atol=2e-5)
    features = model.forward_backbone(first)
    assert features.shape == (2, model.num_features)
    assert relative(features, arrays[f"{initialiser}_avgpool"]) < 1e-4
    features = model.forward_backbone(local)
    assert relative(features, arrays[f"{initialiser}_avgpool_local"]) < 1e-4


def test_outputs_equal_the_golden_ones_with_hash_weights(model, arrays, crops):
    check_outputs(model, "hash", arrays, crops)


def test_outputs_equal_the_golden_ones_with_cos_weights(arrays, crops):
    check_outputs(fill(resnet50(**SWAV, nmb_prototypes=30), "cos").eval(), "cos", arrays, crops)


@torch.no_grad()
def test_eval_mode_gives_the_golden_map(model, arrays, crops):
    trunk = resnet50(eval_mode=True).eval()
    report = trunk.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys
    assert {key.split(".")[0] for key in report.unexpected_keys} == {
        "projection_head",
        "prototypes",
    }
    featmap = trunk(crops[0])
    assert featmap.shape == (2, 2048, 2, 2)
    assert relative(featmap[:, ::32], arrays["hash_featmap_eval_mode_c64"]) < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_several_prototype_sets_give_the_golden_scores(arrays, crops):
    model = fill(resnet50(**SWAV, nmb_prototypes=[30, 30, 30]), "hash").eval()
    embedding, scores = model(crops)
    expected = arrays["multiproto_hash_embedding"]
    np.testing.assert_allclose(embedding, expected, rtol=0, atol=2e-5)
    assert len(scores) == 3
    for i, score in enumerate(scores):
        expected = arrays[f"multiproto_hash_scores{i}"]
        np.testing.assert_allclose(score, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "arch",
    ["resnet18", "resnet34", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d"],
)
def test_trunks_have_the_layout_of_torchvision(arch):
    from torchvision import models

    with torch.device("meta"):
        ours, theirs = build_model(arch), models.get_model(arch, weights=None)
    theirs.fc = nn.Identity()
    assert names_and_shapes(ours) == names_and_shapes(theirs)
    strides = [
        [m.stride for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (ours, theirs)
    ]
    assert sorted(strides[0]) == sorted(strides[1])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_trunks_compute_what_torchvision_computes(arch):
    from torchvision import models

    torch.manual_seed(0)
    ours, theirs = build_model(arch).eval(), models.get_model(arch, weights=None).eval()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch, features", [("resnet50w4", 8192), ("resnet50w5", 10240)])
def test_wide_trunks_widen_every_layer(arch, features):
    with torch.device("meta"):
        narrow, wide = resnet50(), build_model(arch)
    assert wide.num_features == features
    factor = features // 2048
    for (name, a), b in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        inputs = 1 if a.ndim == 1 or name == "conv1.weight" else factor
        assert b.numel() == factor * inputs * a.numel(), name


@pytest.mark.parametrize("arch", ["resnet10", "resnet50", "resnext50_32x4d"])
@pytest.mark.parametrize("width", [0.02, 0.125, 0.3])
def test_narrow_trunks_run_at_any_width(arch, width):
    with torch.device("meta"):
        model = build_model(arch, width=width)
        expansion = 1 if arch == "resnet10" else 4
        assert model.num_features == 8 * round(64 * width) * expansion
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, model.num_features)


@pytest.mark.parametrize("channels", [4, 8, 12, 16])
def test_narrow_shortcuts_have_the_gradients_of_their_definition(channels):
    """With fewer than 16 channels torch 2.14.1 writes outside of its tensors on some processors."""
    shortcut = ProjectionShortcut(channels, 16, 1, 2, bias=False).to(
        memory_format=torch.channels_last
    )
    images = torch.randn(32, channels, 56, 56).to(memory_format=torch.channels_last)
    images.requires_grad_()
    out = shortcut(images)
    gradient = torch.randn(out.shape)
    out.backward(gradient)
    weight = shortcut.weight.detach().double()[:, :, 0, 0]
    kept = images.detach().double()[:, :, ::2, ::2]
    expected = torch.zeros(images.shape, dtype=torch.float64)
    expected[:, :, ::2, ::2] = torch.einsum("dc,ndhw->nchw", weight, gradient.double())
    close = partial(torch.testing.assert_close, check_dtype=False, rtol=1e-4, atol=1e-4)
    close(out.detach(), torch.einsum("dc,nchw->ndhw", weight, kept))
    close(images.grad, expected)
    expected = torch.einsum("nchw,ndhw->dc", kept, gradient.double())
    close(shortcut.weight.grad[:, :, 0, 0], expected, atol=1e-3)


def test_strided_convolutions_of_other_networks_are_trained_as_safely():
    inner = nn.Sequential(
        nn.Conv2d(3, 48, 1, stride=2), nn.Conv2d(3, 48, 3, stride=2), nn.Conv2d(3, 48, 1)
    )
    names = list(inner.state_dict())
    trunk = train_safely(inner).to(memory_format=torch.channels_last)
    assert [type(m) is ProjectionShortcut for m in trunk] == [True, False, False]
    assert list(trunk.state_dict()) == names
    images = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
    out = trunk[0](images)
    out.sum().backward()  # without a gradient of the images
    kept = images[:, :, ::2, ::2].double()
    expected = torch.einsum("dc,nchw->ndhw", trunk[0].weight.double()[:, :, 0, 0], kept)
    expected = expected + trunk[0].bias.double()[:, None, None]
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    expected = kept.sum((0, 2, 3)).expand(48, 3)
    torch.testing.assert_close(
        trunk[0].weight.grad[:, :, 0, 0].double(), expected, rtol=1e-3, atol=1
    )


def test_a_network_of_timm_with_such_a_layer_is_trained():
    pytest.importorskip("timm")
    model = build_model("timm:repvgg_a0")
    assert [m.in_channels for m in model.modules() if isinstance(m, ProjectionShortcut)][0] == 3


def test_shortcuts_of_a_stride_are_convolutions_that_a_gpu_computes_as_one():
    with torch.device("meta"):
        model = resnet50(width=0.0625)
        strided = [m for m in model.modules() if isinstance(m, ProjectionShortcut)]
        assert [m.in_channels for m in strided] == [4, 16, 32, 64]
        assert strided[1](torch.empty(2, 16, 9, 9)).shape == (2, 32, 5, 5)


# ============ heads ============


def layers(head):
    return [type(layer).__name__ for layer in head]


def test_the_head_of_the_released_w5_has_no_batchnorm():
    with torch.device("meta"):
        model = resnet50w5(**SWAV, nmb_prototypes=3000, head_bn=False)
    names = [name for name, _ in model.projection_head.named_parameters()]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert layers(model.projection_head) == ["Linear", "ReLU", "Linear"]


def test_head_dims_give_a_free_mlp_and_override_the_other_sizes():
    head, prototypes = build_head(
        8, output_dim=4, hidden_mlp=16, nmb_prototypes=5, head_dims=[32, 24, 6]
    )
    assert layers(head) == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    sizes = [layer.out_features for layer in head if isinstance(layer, nn.Linear)]
    assert sizes == [32, 24, 6]
    assert prototypes.weight.shape == (5, 6) and prototypes.bias is None
    head, _ = build_head(8, head_dims=[32, 24, 6], head_bn=False)
    assert layers(head) == ["Linear", "ReLU"] * 2 + ["Linear"]
    head, _ = build_head(8, head_dims=[6])
    assert isinstance(head, nn.Linear)
    head, prototypes = build_head(8, nmb_prototypes=[5])  # no projection: of the features
    assert head is None and isinstance(prototypes, MultiPrototypes)
    assert prototypes.prototypes0.weight.shape == (5, 8)
    assert build_head(8, hidden_mlp=16) == (None, None)


@pytest.mark.parametrize(
    "arguments, flag",
    [
        ({"output_dim": -1}, "--feat_dim"),
        ({"hidden_mlp": -2}, "--hidden_mlp"),
        ({"head_dims": [16, 0]}, "--head_dims"),
        ({"nmb_prototypes": -3}, "--nmb_prototypes"),
        ({"nmb_prototypes": [3, 0]}, "--nmb_prototypes"),
        ({"nmb_prototypes": []}, "--nmb_prototypes"),
        ({"stem": "tiny"}, "--stem"),
        ({"in_chans": 0}, "--in_chans"),
        ({"width": 0.001}, "--width"),
        ({"eval_mode": True, "nmb_prototypes": 3}, "eval_mode"),
    ],
)
def test_a_wrong_size_is_named(arguments, flag):
    with torch.device("meta"), pytest.raises(ValueError, match=flag):
        resnet18(**arguments)


def test_what_forward_returns_depends_on_head_and_prototypes(small):
    x = torch.randn(2, 3, 32, 32)
    embedding, scores = small(x)
    assert embedding.shape == (2, 16) and scores.shape == (2, 12)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(scores, embedding @ small.prototypes.weight.T)
    with torch.device("meta"):
        assert resnet18()(torch.empty(2, 3, 32, 32)).shape == (2, 512)
        assert resnet18(output_dim=7)(torch.empty(2, 3, 32, 32)).shape == (2, 7)


# ============ initialisation, stems, channels ============


def test_convolutions_and_batchnorms_start_as_published():
    torch.manual_seed(0)
    model = resnet50(hidden_mlp=32, output_dim=8)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
    bound = 1 / 2048**0.5  # torch's default for a Linear
    assert 0.99 * bound < model.projection_head[0].weight.abs().max() <= bound


@pytest.mark.parametrize("arch, last", [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_residual_zeroes_the_last_batchnorm_of_every_branch(arch, last):
    model = build_model(arch, zero_init_residual=True)
    blocks = [m for m in model.modules() if isinstance(m, (BasicBlock, Bottleneck))]
    zeros = sum((m.weight == 0).all().item() for m in model.modules() if hasattr(m, "running_var"))
    assert zeros == len(blocks) > 0
    assert all((getattr(block, last).weight == 0).all() for block in blocks)


def test_the_small_stem_changes_the_shape_of_conv1_only():
    with torch.device("meta"):
        usual, small = resnet50(), resnet50(stem="small")
        assert small.layer1(small.maxpool(small.conv1(torch.empty(1, 3, 32, 32)))).shape[2:] == (
            32,
            32,
        )
        assert usual.layer1(usual.maxpool(usual.conv1(torch.empty(1, 3, 32, 32)))).shape[2:] == (
            8,
            8,
        )
    a, b = dict(names_and_shapes(usual)), dict(names_and_shapes(small))
    assert {name for name in a if a[name] != b.get(name)} == {"conv1.weight"} and len(a) == len(b)
    assert b["conv1.weight"] == [64, 3, 3, 3]


@pytest.mark.parametrize("channels", [1, 2, 13])
def test_images_may_have_any_number_of_channels(channels):
    with torch.device("meta"):
        model = resnet18(in_chans=channels)
        assert model.conv1.weight.shape == (64, channels, 7, 7)
        assert model(torch.empty(2, channels, 64, 64)).shape == (2, 512)


# ============ crops ============


def test_consecutive_crops_of_one_size_share_a_pass_and_rows_keep_their_order():
    seen = []

    def backbone(x):
        seen.append(tuple(x.shape))
        return x.flatten(1)[:, :1]

    values = iter(range(100))
    sizes = [(2, 8), (2, 8), (3, 4), (2, 8), (1, 4), (1, 4)]  # (B, S)
    crops = [torch.full((b, 3, s, s), float(next(values))) for b, s in sizes]
    out = forward_crops(backbone, crops)
    assert seen == [(4, 3, 8, 8), (3, 3, 4, 4), (2, 3, 8, 8), (2, 3, 4, 4)]
    assert out.flatten().tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 5]
    assert forward_crops(backbone, tuple(crops[:1])).shape == (2, 1)


def test_crops_of_one_width_and_different_heights_do_not_share_a_pass():
    crops = [torch.zeros(1, 3, 4, 8), torch.ones(1, 3, 8, 8)]
    assert forward_crops(lambda x: x.mean((1, 2, 3), keepdim=False)[:, None], crops).shape == (2, 1)


def test_an_empty_list_of_crops_is_refused(small):
    with pytest.raises(ValueError, match="crops is empty"):
        small([])


def test_batch_statistics_are_those_of_all_crops_of_a_size(small):
    model = copy.deepcopy(small).train()
    x, y = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16) + 1
    together, _ = model(torch.cat([x, y]))
    torch.testing.assert_close(model([x, y])[0], together)


# ============ layouts, precision, compilation, processes ============


@pytest.mark.slow
def test_channels_last_gives_the_same_numbers_and_gradients(small):
    model = copy.deepcopy(small).double().eval()
    crops = [torch.randn(2, 3, size, size, dtype=torch.float64) for size in (32, 16)]
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout).zero_grad()
        embedding, scores = model([crop.to(memory_format=layout) for crop in crops])
        scores.logsumexp(1).sum().backward()
        results.append([embedding.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@torch.no_grad()
def test_under_autocast_the_embedding_and_the_scores_are_float32(small):
    x = torch.randn(4, 3, 32, 32)
    expected, _ = small(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert small.forward_backbone(x).dtype == torch.bfloat16
        embedding, scores = small(x)
    assert embedding.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4), rtol=1e-6, atol=0)
    torch.testing.assert_close(scores, embedding @ small.prototypes.weight.T, rtol=1e-5, atol=1e-6)
    assert (embedding - expected).abs().max() < 0.02


@torch.no_grad()
def test_a_model_cast_to_bfloat16_runs():
    model = resnet18(normalize=True, output_dim=8, nmb_prototypes=4).bfloat16().eval()
    embedding, scores = model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16))
    assert scores.dtype == torch.bfloat16 and torch.isfinite(embedding).all()


@pytest.mark.slow
@torch.no_grad()
def test_forward_compiles_to_one_graph(small):
    crops = [torch.randn(2, 3, 32, 32)] * 2 + [torch.randn(2, 3, 16, 16)]
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    for actual, expected in zip(compiled(crops), small(crops), strict=True):
        torch.testing.assert_close(actual, expected)


def gradients_of_rank(rank, world_size):
    torch.manual_seed(0)
    model = resnet18(
        normalize=True, hidden_mlp=8, output_dim=4, nmb_prototypes=[3, 5], stem="small"
    )
    model.eval()  # BatchNorm by its running statistics, so that rows do not depend on each other
    crops = [torch.randn(4, 3, 16, 16), torch.randn(4, 3, 8, 8)]
    crops = [crop.chunk(world_size)[rank] for crop in crops]
    wrapped = model if world_size == 1 else nn.parallel.DistributedDataParallel(model)
    _, scores = wrapped(crops)
    sum(s.square().mean() for s in scores).backward()
    # A few numbers a tensor: what ranks send back has to fit into a pipe.
    return [p.grad.flatten()[:: max(1, p.numel() // 8)].numpy() for p in model.parameters()]


@pytest.mark.slow
def test_gradients_of_two_processes_equal_those_of_one():
    (single,) = run_ranks(gradients_of_rank, 1)
    for gradients in run_ranks(gradients_of_rank, 2):
        for a, b in zip(gradients, single, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * np.abs(b).max() + 1e-8)


# ============ build_model ============


def test_unknown_names_list_what_there_is():
    with pytest.raises(ValueError, match="--arch resnet51.*resnet50w2.*any torchvision") as error:
        build_model("resnet51")
    assert all(name in str(error.value) for name in ARCHITECTURES)
    with pytest.raises(ValueError, match="--arch"):
        build_model("fasterrcnn_resnet50_fpn")  # torchvision's, and no classification model


@pytest.mark.parametrize("arch", ["vit_tiny", "deit_small", "xcit_small_12_p16"])
def test_a_vision_transformer_is_told_which_script_has_it(arch):
    with pytest.raises(ValueError, match=f"--arch {arch} is a vision .* main_dino.py trains"):
        build_model(arch)


def test_our_own_names_win_over_those_of_torchvision():
    with torch.device("meta"):
        assert type(build_model("resnext50_32x4d")).__name__ == "ResNet"


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_chans": 1},
        {"stem": "small"},
        {"width": 0.5},
        {"eval_mode": True},
        {"zero_init_residual": True},
    ],
)
def test_torchvision_trunks_refuse_what_they_cannot_do(arguments):
    with pytest.raises(ValueError, match=f"--{next(iter(arguments))}.*vgg11"):
        build_model("vgg11", **arguments)


TRUNKS = {
    "alexnet": (256, 64),
    "vgg11": (512, 32),
    "vgg16": (512, 32),
    "squeezenet1_1": (512, 64),
    "densenet121": (1024, 32),
    "mobilenet_v2": (1280, 32),
    "mobilenet_v3_small": (576, 32),
    "mnasnet0_5": (1280, 32),
    "shufflenet_v2_x0_5": (1024, 32),
    "efficientnet_b0": (1280, 32),
    "regnet_y_400mf": (440, 32),
    "convnext_tiny": (768, 32),
    "swin_t": (768, 32),
    "vit_b_32": (768, 224),
    "googlenet": (1024, 32),
    "inception_v3": (2048, 75),
    "maxvit_t": (512, 224),
    "wide_resnet50_2": (2048, 32),
}
NOT_ON_META = {"regnet_y_400mf", "googlenet", "inception_v3", "swin_t"}
SLOW = {"convnext_tiny", "maxvit_t", "vit_b_32"}


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=[pytest.mark.slow] * (a in SLOW)) for a in TRUNKS]
)
def test_torchvision_trunks_lose_their_classifier_and_take_our_head(arch):
    features, size = TRUNKS[arch]
    with torch.device("cpu" if arch in SLOW | NOT_ON_META else "meta"), torch.no_grad():
        model = build_model(arch, normalize=True, hidden_mlp=16, output_dim=8, nmb_prototypes=4)
        assert model.num_features == features
        assert model.forward_backbone(torch.zeros(2, 3, size, size)).shape == (2, features)
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert not [name for name, p in model.trunk.named_parameters() if 1000 in p.shape]


def test_a_torchvision_trunk_trains_with_multi_crop_and_the_swav_head():
    torch.manual_seed(0)
    model = build_model("mobilenet_v3_small", normalize=True, output_dim=8, nmb_prototypes=4)
    embedding, scores = model([torch.randn(2, 3, 48, 48)] * 2 + [torch.randn(2, 3, 32, 32)])
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(6))
    scores.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_a_vision_transformer_says_which_size_it_takes():
    model = build_model("vit_b_32")
    with pytest.raises(ValueError, match="--arch vit_b_32 takes images of 224 px only"):
        model(torch.zeros(1, 3, 96, 96))


@pytest.mark.slow
def test_no_two_depths_share_a_size():
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in build_model(f"resnet{depth}").parameters())
            for depth in (18, 34, 50, 101, 152)
        ]
    assert all(a < b for a, b in pairwise(sizes))
