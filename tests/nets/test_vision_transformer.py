"""Vision transformers: names and outputs of the published ones, positions, registers, depth."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.nets.heads import forward_crops
from src.nets.vision_transformer import (
    ARCHITECTURES,
    VisionTransformer,
    bicubic_matrix,
    deit_small,
    deit_tiny,
    vit_base,
    vit_small,
    vit_tiny,
)
from tests.gloo import run_ranks
from tests.golden_weights import fill

KEYS = json.loads((Path(__file__).parents[1] / "golden" / "vit_small16_keys.json").read_text())
SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 3}  # 16 dimensions a head
# network, arguments, every how many channels were kept of tables and of tokens
GOLDEN = {"small16": (vit_small, 16, 64, 8, 16), "tiny8": (vit_tiny, 8, 32, 4, 8)}
INPUTS = ("native", "larger", "nonsquare")


def names_and_shapes(model):
    return [[name, list(tensor.shape)] for name, tensor in sorted(model.state_dict().items())]


def small(seed=0, **options):
    torch.manual_seed(seed)
    return VisionTransformer(**{"patch_size": 4, "img_size": 16, **SMALL, **options})


def spread(model, std=0.5):
    """The same network with weights large enough for its outputs to differ between inputs."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (std / (p.shape[-1] ** 0.5 if p.ndim == 2 else 4)))
    return model


# ============ parity with the published networks ============


@pytest.mark.parametrize(
    "name, build",
    [
        ("vit_small16_img64", lambda: vit_small(16, [64])),
        ("vit_tiny8_img32", lambda: vit_tiny(8, [32])),
        ("vit_tiny16_img224", lambda: vit_tiny()),
        ("vit_tiny8_img224", lambda: vit_tiny(patch_size=8)),
        ("vit_small16_img224", lambda: vit_small()),
        ("vit_small8_img224", lambda: vit_small(patch_size=8)),
        ("vit_base16_img224", lambda: vit_base()),
        ("vit_base8_img224", lambda: vit_base(patch_size=8)),
    ],
)
def test_keys_and_shapes_are_those_of_the_published_network(name, build):
    with torch.device("meta"):
        assert names_and_shapes(build()) == KEYS[name]


def test_every_golden_list_of_names_is_compared():
    (mark,) = test_keys_and_shapes_are_those_of_the_published_network.pytestmark
    assert {name for name, _ in mark.args[1]} == set(KEYS)


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("vit_small16")


@pytest.fixture(scope="module", params=["hash", "cos"])
def filled(request):
    """(initialiser, {name: network}) of the golden file; tests leave the networks as they are."""
    networks = {}
    for name, (build, patch_size, img_size, *_) in GOLDEN.items():
        networks[name] = fill(build(patch_size, [img_size]), request.param).eval()
    return request.param, networks


@torch.no_grad()
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("kind", INPUTS)
def test_outputs_equal_the_golden_ones(name, kind, filled, arrays):
    initialiser, networks = filled
    model, start = networks[name], f"{name}_{initialiser}"
    every_position, every_token = GOLDEN[name][3:]
    x = torch.from_numpy(arrays[f"{name}_x_{kind}"])
    found = {f"cls_{kind}": model(x)}
    if initialiser == "hash":
        found[f"posembed_{kind}"] = model.position_table(*x.shape[2:])[..., ::every_position]
    if kind != "larger":
        found[f"lastattn_{kind}"] = model.get_last_selfattention(x)
    if kind == "nonsquare":
        layers = torch.stack(model.get_intermediate_layers(x, n=4))
        found[f"intermediate4_{kind}"] = layers[..., ::every_token]
    stored = [key for key in arrays if key.startswith(start) and key.endswith(f"_{kind}")]
    assert sorted(f"{start}_{key}" for key in found) == sorted(stored)
    for key, actual in found.items():
        atol = 1e-4 if key.startswith(("cls", "inter")) else 1e-5
        np.testing.assert_allclose(actual, arrays[f"{start}_{key}"], rtol=0, atol=atol)


@torch.no_grad()
def test_the_position_table_equals_the_golden_one_for_every_size(golden):
    stored = golden("vit_posembed")
    model = fill(vit_tiny(16, 224), "hash")
    for i in range(7):
        height, width = stored[f"size_{i}"].tolist()
        table = model.position_table(height, width)[..., ::24]
        np.testing.assert_allclose(table, stored[f"pos_{i}"], rtol=0, atol=1e-5)


def test_the_names_of_deit_are_second_names():
    assert (deit_tiny, deit_small) == (vit_tiny, vit_small)
    assert {"vit_tiny", "vit_small", "vit_base", "deit_tiny", "deit_small"} <= set(ARCHITECTURES)
    with torch.device("meta"):
        sizes = {name: build() for name, build in ARCHITECTURES.items()}
    assert [sizes[f"vit_{s}"].num_features for s in ("tiny", "small", "base")] == [192, 384, 768]
    assert [sizes[f"vit_{s}"].num_heads for s in ("tiny", "small", "base")] == [3, 6, 12]
    micro = sizes["vit_micro"]  # ours, for small images
    assert (micro.num_features, micro.num_heads, micro.depth) == (96, 3, 4)


# ============ tokens and outputs ============


@torch.no_grad()
@pytest.mark.parametrize("num_registers", [0, 3])
@pytest.mark.parametrize("channels, patch_size", [(1, 16), (3, 8), (4, 5)])
def test_any_channels_patch_size_and_registers(channels, patch_size, num_registers):
    model = small(
        patch_size=patch_size, img_size=48, in_chans=channels, num_registers=num_registers
    ).eval()
    for height, width in ((48, 48), (32, 32), (37, 53)):
        x = torch.randn(2, channels, height, width)
        tokens = 1 + num_registers + (height // patch_size) * (width // patch_size)
        assert model(x).shape == (2, 48) == (2, model.num_features)
        attention = model.get_last_selfattention(x)
        assert attention.shape == (2, 3, tokens, tokens) and (attention >= 0).all()
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, tokens))
        layers = model.get_intermediate_layers(x, n=2)
        assert [layer.shape for layer in layers] == [(2, tokens, 48)] * 2


@torch.no_grad()
@pytest.mark.parametrize("num_registers", [0, 2])
def test_the_class_token_is_that_of_the_last_layer(num_registers):
    model = spread(small(num_registers=num_registers)).eval()
    x = torch.randn(3, 3, 16, 20)
    expected = model.get_intermediate_layers(x)[0][:, 0]
    assert expected.std(0).mean() > 0.01  # inputs matter
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.forward_backbone(x), model(x))


def test_gradients_are_those_of_all_tokens_of_the_last_block():
    model = spread(small(num_registers=1)).double()
    x = torch.randn(2, 3, 16, 20, dtype=torch.float64)
    gradients = []
    for output in (model(x), model.get_intermediate_layers(x)[0][:, 0]):
        model.zero_grad()
        output.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_intermediate_layers_come_oldest_first_and_are_normalised():
    model = spread(small()).eval()
    x = torch.randn(2, 3, 16, 16)
    layers = model.get_intermediate_layers(x, n=3)
    tokens = model.tokens(x)
    for block, layer in zip(model.blocks, layers, strict=True):
        tokens = block(tokens)
        torch.testing.assert_close(layer, model.norm(tokens))
    last = model.get_intermediate_layers(x, n=2)
    torch.testing.assert_close(last, layers[1:])
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"--n_last_blocks {n} must be from 1 to the 3 blocks"):
            model.get_intermediate_layers(x, n=n)


@torch.no_grad()
def test_the_attention_shown_is_the_attention_computed():
    model = spread(small(num_registers=2), std=1.0).eval()
    x = torch.randn(2, 3, 16, 20)
    last = model.blocks[-1]
    shares = model.draw_branches(len(x), x.device)
    tokens = last.norm1(model.before_last_block(x, shares))  # (B, T, D)
    values = last.attn.split(last.attn.qkv(tokens))[2]
    weights = model.get_last_selfattention(x)
    assert weights.max() > 2 / weights.shape[-1]  # far from uniform
    expected = last.attn.proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(last.attn(tokens), expected, rtol=1e-5, atol=1e-5)
    only_first = last.attn(tokens, class_only=True)
    torch.testing.assert_close(only_first, expected[:, :1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_attention_equals_the_formula_head_by_head():
    torch.manual_seed(0)
    attention = vit_tiny(16, 32, depth=1).blocks[0].attn
    attention.qkv.weight.mul_(10)
    x = torch.randn(1, 7, 192)
    q, k, v = (attention.qkv(x)[0].double().numpy()[:, i * 192 : (i + 1) * 192] for i in range(3))
    heads = []
    for h in range(3):
        part = slice(64 * h, 64 * (h + 1))
        logits = q[:, part] @ k[:, part].T / 8
        weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(attention.weights(x)[0, h], weights, atol=1e-5)
        heads.append(weights @ v[:, part])
    expected = attention.proj(torch.from_numpy(np.concatenate(heads, axis=1)).float())
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_patches_are_read_by_rows():
    model = small(patch_size=4, img_size=(8, 12)).eval()
    x = torch.zeros(1, 3, 8, 12)
    x[:, :, 4:8, 8:12] = 1  # row 1, column 2
    changed = (model.tokens(x) - model.tokens(torch.zeros_like(x))).abs().amax((0, 2)) > 0
    assert changed.nonzero().flatten().tolist() == [1 + 1 * 3 + 2]


# ============ registers ============


@torch.no_grad()
def test_registers_come_second_without_a_position_and_are_used():
    model = spread(small(num_registers=2)).eval()
    assert dict(model.named_parameters())["register_tokens"].shape == (1, 2, 48)
    x = torch.randn(2, 3, 16, 16)
    tokens = model.tokens(x)
    assert torch.equal(tokens[:, 1:3], model.register_tokens.expand(2, -1, -1))
    torch.testing.assert_close(
        tokens[:, 3:], model.patch_embed(x) + model.pos_embed[:, 1:], rtol=0, atol=0
    )
    before = model(x)
    model.register_tokens.add_(torch.randn(1, 2, 48))
    assert (model(x) - before).abs().max() > 1e-3


def test_registers_are_trained_and_differ_from_each_other():
    model = small(num_registers=2)
    assert (model.register_tokens[0, 0] - model.register_tokens[0, 1]).abs().max() > 1e-3
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert model.register_tokens.grad.abs().sum() > 0


def test_without_registers_there_is_no_such_parameter():
    assert [name for name in small().state_dict() if "register" in name] == []


# ============ positions ============


@pytest.mark.parametrize("size, new_size", [(14, 6), (6, 14), (14, 30), (2, 4), (1, 3), (3, 1)])
def test_the_interpolation_is_that_of_torch(size, new_size):
    x = torch.randn(1, 5, size, size, dtype=torch.float64)
    factor = (new_size + 0.1) / size
    expected = F.interpolate(x, scale_factor=(factor, factor), mode="bicubic")
    matrix = bicubic_matrix(size, new_size, x)
    assert matrix.shape == (new_size, size)
    torch.testing.assert_close(matrix @ x @ matrix.T, expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 6), (6, 3), (1, 5)])
def test_tables_that_are_not_square_follow_the_same_rule(grid):
    model = small(img_size=(4 * grid[0], 4 * grid[1] + 1))
    assert model.pos_embed.shape == (1, 1 + grid[0] * grid[1], 48) and model.grid == grid
    assert model.position_table(4 * grid[0] + 3, 4 * grid[1]) is model.pos_embed
    table = model.pos_embed[0, 1:].T.view(1, 48, *grid)
    factors = 5.1 / grid[0], 7.1 / grid[1]
    expected = F.interpolate(table, scale_factor=factors, mode="bicubic")[0].flatten(1).T
    actual = model.position_table(20, 28)
    torch.testing.assert_close(actual[0, 1:], expected, rtol=0, atol=1e-5)
    assert torch.equal(actual[:, 0], model.pos_embed[:, 0])
    assert model(torch.zeros(1, 3, 20, 28)).shape == (1, 48)


def test_a_square_table_is_used_as_it_is_for_square_images_alone():
    model = small()
    assert model.position_table(16, 16) is model.pos_embed
    assert model.position_table(19, 19) is model.pos_embed
    assert model.position_table(32, 8).shape == model.pos_embed.shape
    assert not torch.equal(model.position_table(32, 8), model.pos_embed)
    assert not torch.equal(model.position_table(16, 19), model.pos_embed)


def test_the_gradient_reaches_the_table_through_the_interpolation():
    torch.manual_seed(0)
    table = small(embed_dim=3, img_size=(8, 12)).double()
    weights = torch.randn(1, 1 + 3 * 5, 3, dtype=torch.float64)

    def weighted(values):
        return (
            torch.func.functional_call(Positions(table), {"model.pos_embed": values}, ()) * weights
        ).sum()

    torch.autograd.gradcheck(weighted, table.pos_embed.detach().clone().requires_grad_())
    model = small()
    model(torch.randn(2, 3, 24, 8)).square().sum().backward()
    assert (model.pos_embed.grad.abs().sum(-1) > 0).all()


class Positions(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return self.model.position_table(12, 20)


@torch.no_grad()
def test_the_interpolation_is_in_float32_under_autocast_and_in_bfloat16_networks():
    model = spread(small())
    expected = model.position_table(24, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.position_table(24, 40), expected)
    model = model.bfloat16()
    wide = copy.deepcopy(model).float().position_table(24, 40)
    assert torch.equal(model.position_table(24, 40), wide.bfloat16())


@pytest.mark.parametrize("size", [(3, 16), (16, 3)])
def test_an_image_smaller_than_a_patch_is_refused(size):
    with pytest.raises(ValueError, match="--patch_size 4 exceeds images of "):
        small()(torch.zeros(1, 3, *size))


# ============ initialisation, sizes, refusals ============


def test_weights_start_as_published():
    torch.manual_seed(0)
    model = vit_tiny(16, 64, depth=2, num_registers=40)
    for name, p in model.named_parameters():
        if name.startswith("patch_embed"):
            bound = 1 / (3 * 16 * 16) ** 0.5  # torch's default for a convolution
            assert 0.9 * bound < p.abs().max() <= bound
        elif "norm" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name
            assert p.mean().abs() < 0.006, name
    assert model.norm.eps == model.blocks[0].norm1.eps == model.blocks[1].norm2.eps == 1e-6


def test_width_and_depth():
    model = vit_tiny(16, 32, width=0.5, depth=4)
    assert (model.embed_dim, model.num_features, len(model.blocks), model.depth) == (96, 96, 4, 4)
    assert vit_tiny(16, 32, width=0.33, depth=1).embed_dim == 63  # 63.36, in 3 heads of 21
    assert vit_tiny(16, 32, width=0.34, depth=1).embed_dim == 66  # 65.28, in 3 heads of 22
    assert vit_tiny(16, 32, width=1e-3, depth=1).embed_dim == 3
    assert vit_tiny(16, 32, depth=1)(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"patch_size": 0}, "--patch_size 0 must be from 1"),
        ({"patch_size": 32, "img_size": (64, 16)}, r"--patch_size 32 .* --img_size \(64, 16\)"),
        ({"drop_path_rate": 1.0}, "--drop_path_rate 1.0"),
        ({"drop_path_rate": -0.1}, "--drop_path_rate -0.1"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


# ============ images of several sizes in one pass ============


@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.5, "num_registers": 2}])
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_sizes_that_share_a_pass_have_the_features_and_gradients_of_passes_of_their_own(
    options, drop_path_rate
):
    torch.manual_seed(0)
    model = small(drop_path_rate=drop_path_rate, depth=3, **options).double().train()
    batches = [torch.randn(b, 3, side, side).double() for b, side in ((2, 32), (5, 16), (1, 24))]

    def features_and_gradients(forward):
        torch.manual_seed(1)
        model.zero_grad()
        features = forward()
        (features * torch.arange(features.numel()).view_as(features).sin()).sum().backward()
        return [features.detach()] + [parameter.grad for parameter in model.parameters()]

    together = features_and_gradients(lambda: model(batches))
    apart = features_and_gradients(lambda: torch.cat([model(images) for images in batches]))
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_crops_of_a_transformer_share_a_pass_in_the_order_of_the_crops():
    model = small(depth=2).eval()
    crops = [torch.randn(2, 3, side, side) for side in (32, 16, 16, 32)]
    with torch.no_grad():
        expected = torch.cat([model(crop) for crop in crops])
        torch.testing.assert_close(forward_crops(model, crops), expected, rtol=1e-5, atol=1e-6)


# ============ stochastic depth ============


def test_the_rate_of_stochastic_depth_grows_linearly():
    rates = [block.drop_path_rate for block in vit_tiny(16, 32, drop_path_rate=0.3).blocks]
    np.testing.assert_allclose(rates, torch.linspace(0, 0.3, 12), atol=1e-7)
    assert [block.drop_path_rate for block in small(drop_path_rate=0.3, depth=1).blocks] == [0]


def test_stochastic_depth_drops_branches_of_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    model = small(drop_path_rate=0.3, depth=4).train()
    x, branch = torch.randn(4000, 5, 8), torch.ones(4000, 5, 8)
    shares = model.draw_branches(len(x), x.device)
    for share, rate in zip(shares, (0, 0.1, 0.2, 0.3), strict=True):
        added = model.blocks[0].add(x, branch, share[1]) - x
        each = added[:, :1, :1]
        torch.testing.assert_close(added, each.expand_as(added), atol=1e-5, rtol=0)
        kept = each.flatten() > 0.5
        expected = torch.where(kept, 1 / (1 - rate), 0.0)
        torch.testing.assert_close(each.flatten(), expected, rtol=1e-5, atol=1e-5)
        assert abs(kept.float().mean() - 1 + rate) < 0.03
        assert abs(each.mean() - 1) < 0.05
    assert small(drop_path_rate=0.3).eval().draw_branches(2, x.device)[-1] is None


def test_the_two_branches_of_a_block_are_dropped_independently():
    torch.manual_seed(0)
    model = small(drop_path_rate=0.5, depth=2).train()
    block, shares = model.blocks[-1], model.draw_branches(2000, torch.device("cpu"))[-1]
    width = block.norm1.weight.numel()
    with torch.no_grad():
        for linear, value in ((block.attn.proj, 1.0), (block.mlp.fc2, 10.0)):
            linear.weight.zero_()
            linear.bias.fill_(value)
        added = block(torch.zeros(2000, 3, width), shares=shares)
    added = (added[:, 0, 0] / 2).round()
    assert added.unique().tolist() == [0, 1, 10, 11]
    assert all(abs((added == value).float().mean() - 0.25) < 0.05 for value in (0, 1, 10, 11))


def test_a_training_pass_leaves_out_what_was_drawn_and_its_gradient_is_of_the_rest():
    torch.manual_seed(0)
    x, branch = torch.randn(6, 5, 8, requires_grad=True), torch.randn(6, 5, 8, requires_grad=True)
    share = torch.tensor([0, 2.0, 0, 2, 2, 0]).view(-1, 1, 1)
    weights = torch.randn(6, 5, 8)
    add = small().blocks[0].add
    found = torch.autograd.grad((add(x, branch, share) * weights).sum(), [x, branch])
    expected = torch.autograd.grad(((x + branch * share) * weights).sum(), [x, branch])
    torch.testing.assert_close(found, expected)
    half = branch.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        added = add(x, half, share)
    assert added.dtype == torch.float32
    assert torch.equal(added, x + half.float() * share)
    (of_half,) = torch.autograd.grad((added * weights).sum(), [half])
    assert torch.equal(of_half, (weights * share).bfloat16())


@torch.no_grad()
def test_stochastic_depth_is_off_in_evaluation_and_on_in_training():
    model = spread(small(drop_path_rate=0.9))
    plain = small()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(model.eval()(x), plain(x))
    assert not torch.equal(model.train()(x), plain(x))
    assert torch.equal(small(drop_path_rate=0.0).train()(x), small().eval()(x))


# ============ precision, compilation, copies, processes ============


def test_under_autocast_it_is_finite_and_near_float32():
    model = spread(small(num_registers=1, drop_path_rate=0.1), std=0.2).eval()
    x = torch.randn(2, 3, 24, 16)
    expected = model(x)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        model.eval()
        actual = model(x)
        attention = model.get_last_selfattention(x)
    assert torch.isfinite(actual).all() and expected.std() > 0.1
    assert (actual - expected).abs().max() < 0.1
    torch.testing.assert_close(attention.sum(-1).float(), torch.ones(2, 3, 26), rtol=0, atol=1e-2)


@torch.no_grad()
def test_a_network_cast_to_bfloat16_runs_in_training_too():
    model = small(drop_path_rate=0.5, num_registers=1).bfloat16()
    assert model(torch.randn(2, 3, 24, 16).bfloat16()).dtype == torch.bfloat16


def test_it_builds_and_runs_on_the_meta_device():
    with torch.device("meta"):
        model = small(drop_path_rate=0.1, num_registers=2)
        assert model(torch.empty(2, 3, 24, 16)).shape == (2, 48)
        assert model.get_intermediate_layers(torch.empty(2, 3, 24, 16))[0].shape == (2, 27, 48)


@torch.no_grad()
def test_channels_last_gives_the_same_numbers():
    model = spread(small()).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    actual = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_forward_compiles_to_one_graph_for_every_size():
    model = spread(small(drop_path_rate=0.0, num_registers=1))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for height, width in ((16, 16), (8, 8), (24, 12)):
        x = torch.randn(2, 3, height, width)
        results = []
        for network in (model, compiled):
            model.zero_grad()
            output = network(x)
            output.square().sum().backward()
            results.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_default_compiler_gives_the_same_numbers():
    model = spread(small(num_registers=1, depth=1)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model)
    x = torch.randn(2, 3, 24, 12)  # as many graphs as sizes: see above
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_copy_stands_alone_and_the_table_is_not_remembered():
    model = small()
    x = torch.randn(1, 3, 24, 24)
    before = model(x)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        model.pos_embed.add_(torch.randn_like(model.pos_embed))
    assert torch.equal(teacher(x), before)
    assert (model(x) - before).abs().max() > 1e-3


def gradients_of_rank(rank, world_size):
    model = spread(small(num_registers=1))
    x = torch.randn(4, 3, 24, 16).chunk(world_size)[rank]
    wrapped = model if world_size == 1 else nn.parallel.DistributedDataParallel(model)
    wrapped(x).square().mean().backward()
    return [p.grad.flatten()[:: max(1, p.numel() // 8)].numpy() for p in model.parameters()]


@pytest.mark.slow
def test_gradients_of_two_processes_equal_those_of_one():
    (single,) = run_ranks(gradients_of_rank, 1)
    for gradients in run_ranks(gradients_of_rank, 2):
        for a, b in zip(gradients, single, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max() + 1e-8)


def test_layer_scale_multiplies_what_each_branch_adds():
    torch.manual_seed(0)
    options = {"embed_dim": 24, "num_heads": 3, "depth": 2, "patch_size": 4, "img_size": 8}
    model = VisionTransformer(layer_scale=1e-5, **options).eval()
    gammas = {name: x for name, x in model.named_parameters() if name.endswith("gamma")}
    assert sorted(gammas) == [f"blocks.{i}.ls{k}.gamma" for i in (0, 1) for k in (1, 2)]
    assert all(torch.equal(x, torch.full((24,), 1e-5)) for x in gammas.values())
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        for block in model.blocks:
            for layer, scale in ((block.attn.proj, block.ls1), (block.mlp.fc2, block.ls2)):
                scale.gamma.uniform_(0.5, 2)
                layer.bias.normal_()
        scaled = model(images)
        for block in model.blocks:  # the factors as part of the layer before them
            for layer, scale in ((block.attn.proj, block.ls1), (block.mlp.fc2, block.ls2)):
                layer.weight.mul_(scale.gamma[:, None])
                layer.bias.mul_(scale.gamma)
                scale.gamma.fill_(1)
        torch.testing.assert_close(model(images), scaled, rtol=1e-5, atol=1e-5)
        attention = model.get_last_selfattention(images)
        assert attention.shape == (2, 3, 5, 5)
    assert not any(".ls" in name for name in VisionTransformer(**options).state_dict())


def test_a_network_in_training_is_differentiated_twice_and_by_torch_func():
    torch.manual_seed(0)
    model, x = (
        small(drop_path_rate=0.3, depth=2).double().train(),
        torch.randn(2, 3, 16, 16).double(),
    )
    x.requires_grad_()

    def gradient(create_graph):
        torch.manual_seed(1)
        return torch.autograd.grad(model(x).square().sum(), x, create_graph=create_graph)[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (second,) = torch.autograd.grad(gradient(True).square().sum(), x)
        assert second.isfinite().all() and second.abs().sum() > 0
        plain = gradient(False)
        torch.testing.assert_close(gradient(True), plain)
        torch.manual_seed(1)
        by_func = torch.func.grad(lambda images: model(images).square().sum())(x.detach())
    torch.testing.assert_close(by_func, plain)
