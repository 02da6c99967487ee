"""DINO's head and multi-crop wrapper: published names and outputs, extremes, loading, precision."""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.nets.dino_head import DINOHead, MultiCropWrapper, WeightNormLinear, unit_rows
from src.nets.resnet import resnet10
from src.nets.vision_transformer import VisionTransformer, vit_tiny
from src.nets.weights import CheckpointError, load_weights
from tests.golden_weights import fill

KEYS = json.loads((Path(__file__).parents[1] / "golden" / "dino_head_keys.json").read_text())
SIZES = {"in_dim": 32, "out_dim": 50, "hidden_dim": 64, "bottleneck_dim": 16}
VARIANTS = {
    "normlast": {},
    "freelast": {"norm_last_layer": False},
    "bn": {"use_bn": True},
    "nlayers1": {"nlayers": 1},
}


def golden_head(variant):
    return DINOHead(**SIZES, **VARIANTS[variant])


def golden_wrapper():
    return MultiCropWrapper(vit_tiny(16, [64]), DINOHead(**{**SIZES, "in_dim": 192}))


def tiny_wrapper(seed=0, **head):
    torch.manual_seed(seed)
    backbone = VisionTransformer(patch_size=4, img_size=16, embed_dim=24, num_heads=2, depth=2)
    return MultiCropWrapper(backbone, DINOHead(24, 7, hidden_dim=16, bottleneck_dim=8, **head))


def names_and_shapes(module):
    return [[name, list(tensor.shape)] for name, tensor in sorted(module.state_dict().items())]


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("dino_head")


@pytest.fixture(scope="module")
def wrapper():
    """The wrapper of the golden file with `hash` weights; tests leave it as they found it."""
    return fill(golden_wrapper(), "hash").eval()


def close(actual, expected):
    np.testing.assert_allclose(actual.detach(), expected, rtol=0, atol=5e-5)


# ============ parity with the published head and wrapper ============


@pytest.mark.parametrize("name", KEYS)
def test_keys_shapes_and_what_is_trained_are_as_published(name):
    with torch.device("meta"):
        if name == "multicropwrapper":
            module = golden_wrapper()
        elif name == "released_vits_384_65536":
            module = DINOHead(384, 65536)
        else:
            module = golden_head(name)
    assert names_and_shapes(module) == KEYS[name]["state_dict"]
    trained = {name: p.requires_grad for name, p in module.named_parameters()}
    assert trained == KEYS[name]["requires_grad"]


def test_the_sizes_are_those_of_the_golden_file(arrays):
    assert {name: int(arrays[name]) for name in SIZES} == SIZES and int(arrays["nlayers"]) == 3


@pytest.mark.parametrize("initialiser", ["hash", "cos"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal_the_golden_ones(variant, initialiser, arrays):
    if (variant, initialiser) == ("nlayers1", "cos"):
        assert "nlayers1_cos_out" not in arrays
        return
    head = fill(golden_head(variant), initialiser).eval()
    close(head(torch.from_numpy(arrays["x"])), arrays[f"{variant}_{initialiser}_out"])


@torch.no_grad()
def test_multi_crop_outputs_equal_the_golden_ones(wrapper, arrays):
    first, second = torch.from_numpy(arrays["mc_global"])
    local = list(torch.from_numpy(arrays["mc_local"]))
    close(wrapper([first, second, *local]), arrays["mc_out"])
    features = [wrapper.forward_backbone(crop) for crop in (first, second, *local)]
    close(torch.cat(features), arrays["mc_backbone"])
    close(wrapper([first, local[0], second, local[1]]), arrays["mc_interleaved_out"])
    close(wrapper(first), arrays["mc_single_out"])
    close(wrapper([first]), arrays["mc_single_out"])


# ============ the weight-normalised layer ============


def test_rows_have_the_length_g_and_the_direction_of_v():
    torch.manual_seed(0)
    layer = WeightNormLinear(6, 4)
    assert [name for name, _ in layer.named_parameters()] == ["weight_g", "weight_v"]
    assert (layer.weight_g == 1).all() and layer.weight_v.abs().max() <= 6**-0.5
    with torch.no_grad():
        layer.weight_g.copy_(torch.tensor([[1.0], [2.0], [0.5], [-1.0]]))
    weight = layer(torch.eye(6)).T
    expected = layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weight, expected)


def test_its_gradient_is_that_of_the_formula():
    torch.manual_seed(0)
    layer = WeightNormLinear(5, 3).double()
    x = torch.randn(4, 5, dtype=torch.float64)

    def scores(g, v):
        return torch.func.functional_call(layer, {"weight_g": g, "weight_v": v}, x)

    inputs = [p.detach().clone().requires_grad_() for p in (layer.weight_g, layer.weight_v)]
    torch.autograd.gradcheck(scores, inputs)


@pytest.mark.parametrize("scale", [1e-17, 1e-8, 1.0, 1e8, 1e17])
def test_rows_of_any_length_give_the_same_output_and_finite_gradients(scale):
    torch.manual_seed(0)
    layer = WeightNormLinear(256, 9)
    x, target = F.normalize(torch.randn(4, 256)), torch.randn(4, 9)
    results = []
    for factor in (1.0, scale):
        changed = copy.deepcopy(layer)
        with torch.no_grad():
            changed.weight_v.mul_(factor)
        scores = changed(x)
        (scores * target).sum().backward()
        # the gradient is that of a function of the direction: it grows as the row shrinks
        results.append([scores.detach(), changed.weight_g.grad, changed.weight_v.grad * factor])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert results[1][2].abs().max() > 1e-3


def test_the_last_layer_keeps_rows_of_length_one_while_it_is_trained():
    torch.manual_seed(0)
    for norm_last_layer in (True, False):
        head = DINOHead(**SIZES, norm_last_layer=norm_last_layer)
        optimizer = torch.optim.SGD((p for p in head.parameters() if p.requires_grad), lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            head(torch.randn(8, 32)).square().mean().backward()
            optimizer.step()
        lengths = head.last_layer(torch.eye(16)).T.norm(dim=1)
        assert torch.allclose(lengths, torch.ones(50), atol=1e-5) == norm_last_layer


# ============ the normalised bottleneck ============


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_at_the_ends_of_the_range_of_a_type_become_unit_rows(dtype):
    info = torch.finfo(dtype)
    largest = torch.full((256,), info.max, dtype=dtype)
    alternating = largest * torch.tensor([1, -1], dtype=dtype).repeat(128)
    small = torch.full((256,), max(float(info.tiny), 1e-11), dtype=dtype)
    x = torch.stack([largest, alternating, small, torch.randn(256).to(dtype)])
    out = unit_rows(x)
    assert out.dtype == dtype and torch.isfinite(out).all()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(out.double().norm(dim=1), 1, rtol=0, atol=tolerance)
    zero = torch.zeros(1, 256, dtype=dtype, requires_grad=True)
    unit_rows(zero).sum().backward()
    assert (unit_rows(zero) == 0).all()


def test_rows_shorter_than_eps_are_divided_by_eps():
    x = torch.tensor([[3e-13, 0.0], [3.0, 4.0], [3e-12, 4e-12], [8e-13, 8e-13], [0.0, 0.0]])
    torch.testing.assert_close(unit_rows(x), F.normalize(x, eps=1e-12))


@pytest.mark.parametrize("scale", [1e-13, 1e-6, 1.0, 1e6])
def test_the_gradient_of_unit_rows_is_that_of_the_formula(scale):
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64) * scale
    weights = torch.randn(3, 5, dtype=torch.float64)
    gradients = []
    for function in (unit_rows, lambda x: F.normalize(x, eps=1e-12)):
        leaf = x.clone().requires_grad_()
        (function(leaf) * weights).sum().backward()
        gradients.append(leaf.grad * scale)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_with_one_large_entry_has_the_gradient_of_the_formula(dtype):
    """Its length, counted in that entry, is 1 exactly, where a clamp at 1 has no gradient."""
    x = torch.tensor([[5.0, 0, 0], [0, -7, 1e-8], [1, 0, 0], [1e20, 0, 0], [2e-12, 0, 0]]).to(dtype)
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=dtype)
    leaf = x.clone().requires_grad_()
    (unit_rows(leaf) * weights).sum().backward()
    length = x.double().norm(dim=1, keepdim=True)
    unit, weights = x.double() / length, weights.double()
    expected = weights - unit * (unit @ weights)[:, None]  # (I - u u^T) w, by the length
    torch.testing.assert_close(leaf.grad.double() * length, expected, rtol=1e-6, atol=1e-6)


def test_scores_do_not_depend_on_the_length_of_the_bottleneck():
    torch.manual_seed(0)
    head = DINOHead(**SIZES)
    x = torch.randn(4, 32)
    before = head(x)
    with torch.no_grad():
        head.mlp[-1].weight.mul_(1e25)  # squares would overflow
    torch.testing.assert_close(head(x), before, rtol=1e-4, atol=1e-5)
    assert before.abs().max() <= 1  # a cosine


# ============ variants ============


def layers(head):
    kinds = [type(m).__name__ for m in head.mlp] if isinstance(head.mlp, nn.Sequential) else []
    return kinds or [type(head.mlp).__name__]


def test_the_number_of_layers_and_batch_norm():
    assert layers(DINOHead(**SIZES, nlayers=1)) == ["Linear"]
    assert layers(DINOHead(**SIZES, nlayers=2)) == ["Linear", "GELU", "Linear"]
    assert layers(DINOHead(**SIZES, nlayers=4)) == ["Linear", "GELU"] * 3 + ["Linear"]
    assert layers(DINOHead(**SIZES, nlayers=2, use_bn=True)) == [
        *("Linear", "BatchNorm1d", "GELU", "Linear")
    ]


@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_without_the_bottleneck_there_are_as_many_linear_layers_as_asked_for(nlayers):
    torch.manual_seed(0)
    head = DINOHead(**SIZES, nlayers=nlayers, l2_bottleneck=False)
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == nlayers
    assert head.last_layer.weight.shape == (50, 64 if nlayers > 1 else 32)
    assert head.last_layer.bias.shape == (50,)
    assert all(p.requires_grad for p in head.parameters())
    x = torch.randn(4, 32)
    expected = x
    for i, layer in enumerate(linear_in_order(head)):
        expected = F.linear(F.gelu(expected) if i else expected, layer.weight, layer.bias)
    torch.testing.assert_close(head(x), expected)
    if nlayers > 1:
        with_bn = DINOHead(**SIZES, nlayers=nlayers, l2_bottleneck=False, use_bn=True)
        assert layers(with_bn) == ["Linear", "BatchNorm1d", "GELU"] * (nlayers - 1)


def linear_in_order(head):
    return [m for m in head.mlp.modules() if isinstance(m, nn.Linear)] + [head.last_layer]


@pytest.mark.parametrize("l2_bottleneck", [True, False])
def test_linear_layers_start_as_published(l2_bottleneck):
    torch.manual_seed(0)
    head = DINOHead(64, 512, hidden_dim=256, bottleneck_dim=64, l2_bottleneck=l2_bottleneck)
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 3
    for layer in linear:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (layer.bias == 0).all()
    if l2_bottleneck:
        assert (head.last_layer.weight_g == 1).all()
        assert 0.99 / 8 < head.last_layer.weight_v.abs().max() <= 1 / 8  # torch's own, of a Linear


@pytest.mark.parametrize("name", ["in_dim", "out_dim", "hidden_dim", "bottleneck_dim", "nlayers"])
def test_impossible_sizes_are_refused(name):
    with pytest.raises(ValueError, match="--out_dim .* must be positive"):
        DINOHead(**{**SIZES, name: 0})


# ============ multi-crop ============


def test_crops_of_one_size_share_a_pass_and_the_head_sees_all_rows_at_once():
    seen = {"backbone": [], "head": []}
    wrapper = tiny_wrapper()
    for name in seen:
        getattr(wrapper, name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0])
        )
    crops = [torch.zeros(2, 3, s, s) for s in (16, 16, 8, 16, 8, 8)]
    assert wrapper(crops).shape == (12, 7)
    [batches] = seen["backbone"]  # a transformer takes all sizes in one pass
    assert [(len(x), x.shape[3]) for x in batches] == [(4, 16), (2, 8), (2, 16), (4, 8)]
    assert [x.shape for x in seen["head"]] == [(12, 24)]
    with pytest.raises(ValueError, match="crops is empty"):
        wrapper([])


def test_classifiers_of_the_backbone_are_taken_out():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 9), nn.Linear(9, 9)

        def forward(self, x):
            return self.head(self.fc(self.body(x.mean((2, 3)))))

    wrapper = MultiCropWrapper(Backbone(), nn.Identity())
    assert wrapper(torch.zeros(2, 3, 5, 5)).shape == (2, 4)
    assert [name for name, _ in wrapper.named_parameters()] == [
        *("backbone.body.weight", "backbone.body.bias")
    ]


def test_a_resnet_under_the_head_trains():
    torch.manual_seed(0)
    wrapper = MultiCropWrapper(resnet10(stem="small", width=0.25), DINOHead(128, 7, hidden_dim=16))
    assert not [name for name in wrapper.state_dict() if ".fc." in name]
    scores = wrapper([torch.randn(2, 3, 16, 16)] * 2 + [torch.randn(2, 3, 8, 8)])
    assert scores.shape == (6, 7)
    scores.square().sum().backward()
    assert all(p.grad is not None for p in wrapper.parameters() if p.requires_grad)


# ============ loading ============


def dino_checkpoint(path, wrapper):
    """What DINO's training script writes: DistributedDataParallel around the student alone."""
    torch.manual_seed(1)
    student = {f"module.{k}": torch.randn_like(v) for k, v in wrapper.state_dict().items()}
    args = argparse.Namespace(arch="vit_tiny", patch_size=4)
    teacher = {f"module.{k}": v for k, v in wrapper.state_dict().items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 3, "args": args}, path)


def equal(module, state):
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)


def test_a_released_checkpoint_loads_teacher_first_and_student_on_request(tmp_path):
    source, target = tiny_wrapper(), tiny_wrapper(seed=1)
    dino_checkpoint(tmp_path / "dino.pth", source)
    report = load_weights(target, tmp_path / "dino.pth")
    assert not report.missing and not report.left_over and equal(target, source.state_dict())
    load_weights(target, tmp_path / "dino.pth", checkpoint_key="student")
    assert not equal(target, source.state_dict())


def test_the_backbone_of_a_released_checkpoint_loads_without_its_head(tmp_path):
    source, target = tiny_wrapper(), tiny_wrapper(seed=1)
    dino_checkpoint(tmp_path / "dino.pth", source)
    report = load_weights(target.backbone, tmp_path / "dino.pth")
    assert all("head." in name for name in report.left_over) and len(report.left_over) == 8
    assert equal(target.backbone, source.backbone.state_dict())


def test_a_released_backbone_goes_into_the_wrapper_and_beside_registers(tmp_path):
    source = tiny_wrapper().backbone
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    target = tiny_wrapper(seed=1)
    load_weights(target, tmp_path / "vit.pth", allow_missing=("head.",))
    assert equal(target.backbone, source.state_dict())

    with_registers = VisionTransformer(4, 16, embed_dim=24, num_heads=2, depth=2, num_registers=3)
    with pytest.raises(CheckpointError, match="register_tokens"):
        load_weights(with_registers, tmp_path / "vit.pth")
    report = load_weights(with_registers, tmp_path / "vit.pth", allow_missing=("register_tokens",))
    assert report.missing == ["register_tokens"]
    assert torch.equal(with_registers.pos_embed, source.pos_embed)


# ============ copies, precision, compilation ============


def test_a_deep_copy_stands_alone():
    student = tiny_wrapper()
    teacher = copy.deepcopy(student)
    crops = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)]
    before = teacher(crops)
    assert torch.equal(before, student(crops))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    assert torch.equal(teacher(crops), before) and not torch.allclose(student(crops), before)
    assert not teacher.head.last_layer.weight_g.requires_grad


def test_under_autocast_the_scores_are_near_those_of_float32():
    torch.manual_seed(0)
    head = DINOHead(**SIZES)
    x = torch.randn(64, 32)
    expected = head(x)
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(x)
    assert scores.dtype == torch.bfloat16 and expected.std() > 0.1
    assert (scores - expected).abs().max() < 0.03
    scores.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.requires_grad)
    assert head.last_layer.weight_v.grad.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_wrapper_cast_to_another_type_runs(dtype):
    wrapper = tiny_wrapper().to(dtype).eval()
    scores = wrapper(torch.randn(2, 3, 16, 16).to(dtype))
    assert scores.dtype == dtype and torch.isfinite(scores).all()


@pytest.mark.slow
def test_forward_compiles_to_one_graph():
    wrapper = tiny_wrapper()
    crops = [torch.randn(2, 3, 16, 16)] * 2 + [torch.randn(2, 3, 8, 8)] * 3
    torch._dynamo.reset()
    compiled = torch.compile(wrapper, backend="aot_eager", fullgraph=True)
    results = []
    for network in (wrapper, compiled):
        wrapper.zero_grad()
        scores = network(crops)
        scores.square().sum().backward()
        grads = [p.grad.clone() for p in wrapper.parameters() if p.requires_grad]
        results.append([scores.detach(), *grads])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
