"""Files in the layouts of other projects load by open_pretrained and give the features of their source.

Vision transformers are timm's, narrow, with all parameters drawn at random; the layouts that timm does
not write are written out here from the sources that are named.
"""

import functools
import math
import re

import pytest
import torch
from torch import nn

from src.nets import foreign_names
from src.nets.backbones import build_backbone
from src.nets.pretrained import open_pretrained
from src.nets.resnet import TRANSFORMERS, build_model
from src.nets.vision_transformer import ARCHITECTURES
from src.nets.weights import load_weights

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NARROW = {"embed_dim": 96, "num_heads": 3, "depth": 2, "img_size": 32, "patch_size": 8}
CNN = {"width": 0.125}


def timm_vit(name="vit_tiny_patch16_224", **options):
    """A vision transformer of timm with the dimensions of vit_micro."""
    timm = pytest.importorskip("timm")
    return at_random(timm.create_model(name, num_classes=0, **{**NARROW, **options}))


def our_resnet(**options):
    return at_random(build_model("resnet10", **{**CNN, **options}))


def at_random(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(0.5, 1.5, generator=generator)
            elif x.is_floating_point():
                x.normal_(std=0.2, generator=generator)
    return model.eval()


def renamed(state, *rules):
    """A state dict with regular expressions replaced in its names."""
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, name): x for name, x in state.items()}
    return state


def prefixed(prefix, state):
    return {prefix + name: x for name, x in state.items()}


def other_weights(state):
    """The same names with other values, as of a momentum network."""
    return {name: x + 1 for name, x in state.items()}


@torch.no_grad()
def check_features(path, contents, source, images=IMAGES, **options):
    """Whether a file gives the features of `source`; returns what was opened."""
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(
            {name: x.contiguous() for name, x in contents.items()}, path
        )
    else:
        torch.save(contents, path)
    found = open_pretrained(path, **options)
    expected = source(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(found.model(images), expected, rtol=1e-5, atol=1e-5)
    return found


# ============ VISSL ============
@pytest.mark.parametrize("converted", [False, True])
def test_vissl_nests_a_resnet_in_its_trunk(tmp_path, converted):
    # vissl/models/trunks/resnext.py, extra_scripts/convert_vissl_to_torchvision.py
    source = our_resnet()
    trunk = prefixed("_feature_blocks.", source.state_dict())
    model = {"trunk": trunk, "heads": {"0.clf.0.weight": torch.ones(4, 64)}}
    state = {"classy_state_dict": {"base_model": {"model": model, "meters": {}}, "train": True}}
    contents = source.state_dict() if converted else {"phase_idx": 9, "loss": {}, **state}
    assert check_features(tmp_path / "vissl.torch", contents, source).arch == "resnet10"


def test_vissl_has_other_names_for_tokens_and_positions_of_a_vit(tmp_path):
    # vissl/models/trunks/vision_transformer.py, whose LayerNorms have torch's own epsilon of 1e-5
    norm = functools.partial(nn.LayerNorm, eps=1e-5)
    source = timm_vit(norm_layer=norm)
    trunk = renamed(
        source.state_dict(), ("cls_token", "class_token"), ("pos_embed", "pos_embedding")
    )
    model = {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": {}}}}}
    found = check_features(tmp_path / "vissl.torch", model, source)
    assert (found.arch, found.options["patch_size"]) == ("vit_micro", 8)


# ============ lightly, solo-learn, MoCo ============
@pytest.mark.parametrize("key", [None, "teacher_backbone", "student_backbone"])
def test_lightly_keeps_two_networks_of_dino_side_by_side(tmp_path, key):
    # lightly's example dino.py, whose backbone is nn.Sequential(*list(resnet.children())[:-1])
    source = our_resnet()
    numbers = [("conv1", "0"), ("bn1", "1")]
    numbers += [(f"layer{i}", f"{3 + i}") for i in (1, 2, 3, 4)]
    state = renamed(
        source.state_dict(), *((rf"^{name}\.", f"{number}.") for name, number in numbers)
    )
    first, second = ("student", "teacher") if key != "student_backbone" else ("teacher", "student")
    contents = {
        **prefixed(f"{first}_backbone.", other_weights(state)),
        **prefixed(f"{second}_backbone.", state),
        "student_head.layers.0.weight": torch.ones(3, 64),
        "teacher_head.layers.0.weight": torch.ones(3, 64),
    }
    check_features(tmp_path / "a.ckpt", {"state_dict": contents}, source, checkpoint_key=key)


@pytest.mark.parametrize(
    "start", ["backbone.vit.", "teacher_backbone.vit.", "student_backbone.vit."]
)
def test_lightly_wraps_the_vits_of_timm(tmp_path, start):
    # lightly/models/modules/masked_vision_transformer_timm.py
    source = timm_vit()
    contents = prefixed(start, source.state_dict()) | {"decoder.mask_token": torch.ones(1, 1, 8)}
    check_features(tmp_path / "a.ckpt", {"state_dict": contents}, source)


@pytest.mark.parametrize("key", [None, "momentum_backbone"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_solo_learn_pads_images_of_its_small_stem_by_two(tmp_path, stem, key):
    # solo/methods/base.py: Conv2d(3, 64, kernel_size=3, stride=1, padding=2), and no max-pooling
    source = our_resnet(stem=stem)
    if stem == "small":
        source.conv1.padding = (2, 2)
    starts = ["backbone.", "momentum_backbone."][:: -1 if key else 1]
    contents = {
        **prefixed(starts[0], source.state_dict()),
        **prefixed(starts[1], other_weights(source.state_dict())),
        **{"classifier.weight": torch.ones(10, 64), "classifier.bias": torch.ones(10)},
        "projector.0.weight": torch.ones(8, 64),
    }
    if stem == "small" and key:  # alone it is a ResNet as any other
        contents = {name: x for name, x in contents.items() if not name.startswith("classifier")}
        source.conv1.padding = (1, 1)
    contents = {"state_dict": contents, "epoch": 3, "hyper_parameters": {"method": "byol"}}
    found = check_features(tmp_path / "byol.ckpt", contents, source, checkpoint_key=key)
    assert found.options["stem"] == stem


def test_solo_learn_has_the_vits_of_timm(tmp_path):
    # solo/backbones/vit/vit.py
    source = timm_vit()
    contents = prefixed("backbone.", source.state_dict())
    contents |= {"classifier.weight": torch.ones(10, 96), "head.mlp.0.weight": torch.ones(8, 96)}
    check_features(tmp_path / "dino.ckpt", {"state_dict": contents}, source)


@pytest.mark.parametrize("head", ["fc.", "fc.0."])  # of MoCo v1 and v2
@pytest.mark.parametrize("key", [None, "encoder_k"])
def test_moco_has_a_query_and_a_key_encoder(tmp_path, head, key):
    # moco/builder.py of facebookresearch/moco, in DistributedDataParallel
    source = our_resnet()
    state = source.state_dict() | {f"{head}weight": torch.ones(8, 64), f"{head}bias": torch.ones(8)}
    starts = ["module.encoder_q.", "module.encoder_k."][:: -1 if key else 1]
    contents = {
        **prefixed(starts[0], state),
        **prefixed(starts[1], other_weights(state)),
        **{"module.queue": torch.ones(8, 5), "module.queue_ptr": torch.zeros(1)},
    }
    contents = {"epoch": 200, "arch": "resnet50", "state_dict": contents, "optimizer": {}}
    check_features(tmp_path / "moco.pth.tar", contents, source, checkpoint_key=key)


def sines_and_cosines(side, dim):
    """The fixed table of MoCo v3, vits.py: columns in the first half, which is the slower one."""
    omega = [1 / 10000 ** (4 * k / dim) for k in range(dim // 4)]
    rows = [[0.0] * dim]
    for x in range(side):
        for y in range(side):
            row = [math.sin(x * w) for w in omega] + [math.cos(x * w) for w in omega]
            rows.append(row + [math.sin(y * w) for w in omega] + [math.cos(y * w) for w in omega])
    return torch.tensor([rows])


@pytest.mark.parametrize("layout", ["moco", "deit", "solo"])
def test_vits_of_moco_v3_have_twelve_heads(tmp_path, layout):
    # vits.py and convert_to_deit.py of facebookresearch/moco-v3; solo/backbones/vit/vit_mocov3.py
    source = timm_vit(num_heads=12)
    source.pos_embed.data = sines_and_cosines(4, 96)
    state = source.state_dict()
    contents = {
        "moco": {
            **prefixed("module.base_encoder.", state | {"head.0.weight": torch.ones(8, 96)}),
            **prefixed("module.momentum_encoder.", other_weights(state)),
            "module.predictor.0.weight": torch.ones(8, 8),
        },
        "deit": state,
        "solo": prefixed("backbone.", state) | {"projector.0.weight": torch.ones(8, 96)},
    }[layout]
    section = "model" if layout == "deit" else "state_dict"
    path = tmp_path / "vit.pth.tar"
    found = check_features(path, {section: contents, "arch": "vit_small"}, source)
    assert found.options["num_heads"] == 12
    options = {"patch_size": 8, "img_size": 32, "depth": 2}
    with pytest.raises(OSError, match="with 12 heads, and this network has 3: give --num_heads 12"):
        load_weights(build_backbone("vit_micro", **options), path)
    load_weights(build_backbone("vit_micro", num_heads=12, **options), path)


def test_the_fixed_table_of_mae_has_rows_first_and_says_nothing_of_heads():
    moco = sines_and_cosines(4, 96)
    mae = torch.cat([moco[..., 48:], moco[..., :48]], dim=2)
    state = {"blocks.0.attn.qkv.weight": torch.ones(288, 96)}
    assert foreign_names.heads_of({**state, "pos_embed": moco}) == 12
    assert foreign_names.heads_of({**state, "pos_embed": mae}) is None


# ============ DINOv2, timm ============
DINOV2 = {"patch_size": 14, "img_size": 28}
SMALL_IMAGES = IMAGES[:, :, :28, :28]


@pytest.mark.parametrize("layout", ["released", "chunked"])
def test_dinov2_scales_its_layers_and_keeps_blocks_in_chunks(tmp_path, layout):
    # dinov2/models/vision_transformer.py of facebookresearch/dinov2
    source = timm_vit("vit_small_patch14_dinov2", depth=4, **DINOV2)
    state = source.state_dict() | {"mask_token": torch.ones(1, 96)}
    contents = state
    if layout == "chunked":  # two blocks in a chunk; the second number counts through all of them
        rules = [(rf"^blocks\.{i}\.", f"blocks.{i // 2}#{i}.") for i in range(4)]
        state = renamed(state, *rules, ("#", "."))
        teacher = prefixed("backbone.", state) | {"dino_head.mlp.0.weight": torch.ones(8, 96)}
        contents = {"teacher": teacher}
    found = check_features(tmp_path / "dinov2.pth", contents, source, SMALL_IMAGES)
    assert (found.arch, found.options["depth"], found.options["patch_size"]) == ("vit_micro", 4, 14)


@pytest.mark.parametrize("layout", ["dinov2", "timm.safetensors"])
def test_dinov2_with_registers_has_them_behind_the_class_token(tmp_path, layout):
    source = timm_vit("vit_small_patch14_reg4_dinov2", **DINOV2)
    state = source.state_dict()
    if layout == "dinov2":  # the table has a position for the class token, which timm adds to it
        state["register_tokens"] = state.pop("reg_token")
        state["mask_token"] = torch.ones(1, 96)
        position = torch.full((1, 1, 96), 0.3)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    found = check_features(tmp_path / layout, state, source, SMALL_IMAGES)
    assert found.options["num_registers"] == 4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit3_small_patch16_224", {}),  # LayerScale, and no position of the class token
        ("vit_tiny_patch16_224", {"reg_tokens": 2}),  # registers that have positions
        ("vit_tiny_patch16_224", {"init_values": 0.1}),
    ],
)
def test_vits_of_timm(tmp_path, name, options):
    source = timm_vit(name, **options)
    state = source.state_dict() | {"head.weight": torch.ones(5, 96), "head.bias": torch.ones(5)}
    found = check_features(tmp_path / "model.safetensors", state, source)
    assert ("layer_scale" in found.options) == any("ls1" in x for x in state)


def test_resnets_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    whole = timm.create_model("resnet18")
    source = at_random(timm.create_model("resnet18", num_classes=0))
    state = source.state_dict()
    state |= {n: x for n, x in whole.state_dict().items() if n.startswith("fc.")}
    with torch.no_grad():
        for x in state.values():
            if x.ndim == 4:
                x.mul_(0.1)
    assert check_features(tmp_path / "model.safetensors", state, source).arch == "resnet18"


# ============ transformers ============
def as_transformers_vit(state, dinov2=False):
    """The names of ViTModel, and of Dinov2Model, modeling_vit.py and modeling_dinov2.py."""
    layer = r"encoder.layer.\1."
    state = renamed(
        state,
        (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
        ("^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.(\d+)\.attn\.proj\.", layer + "attention.output.dense."),
        (r"^blocks\.(\d+)\.ls(\d)\.gamma", layer + r"layer_scale\2.lambda1"),
        (r"^blocks\.(\d+)\.attn\.qkv\.", layer + "attention.attention.qkv."),
    )
    if dinov2:
        state = renamed(state, (r"^blocks\.(\d+)\.", layer))
    else:
        rules = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
        rules |= {r"mlp\.fc1": "intermediate.dense", r"mlp\.fc2": "output.dense"}
        state = renamed(
            state, *((rf"^blocks\.(\d+)\.{ours}\.", f"{layer}{rules[ours]}.") for ours in rules)
        )
    split = {}
    for name, x in state.items():
        if "qkv" in name:
            for part, values in zip(("query", "key", "value"), x.chunk(3), strict=True):
                split[name.replace("qkv", part)] = values
        else:
            split[name] = x
    return split


@pytest.mark.parametrize("start", ["", "vit."])
def test_vits_of_transformers_split_queries_keys_and_values(tmp_path, start):
    source = timm_vit()
    state = prefixed(start, as_transformers_vit(source.state_dict()))
    extra = {
        f"{start}pooler.dense.weight": torch.ones(96, 96),
        "classifier.weight": torch.ones(5, 96),
    }
    assert f"{start}encoder.layer.0.attention.attention.query.weight" in state
    check_features(tmp_path / "model.safetensors", state | extra, source)


def test_vit_mae_of_transformers_has_a_decoder_besides(tmp_path):
    source = timm_vit()
    state = prefixed("vit.", as_transformers_vit(source.state_dict()))
    decoder = {"decoder.mask_token": torch.ones(1, 1, 8)}
    decoder["decoder.decoder_layers.0.attention.attention.query.weight"] = torch.ones(8, 8)
    check_features(tmp_path / "pytorch_model.bin", state | decoder, source)


@pytest.mark.parametrize("start", ["", "dinov2_with_registers."])
def test_dinov2_of_transformers(tmp_path, start):
    source = timm_vit("vit_small_patch14_reg4_dinov2", **DINOV2)
    state = source.state_dict()
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.ones(1, 96)
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 96), state["pos_embed"]], dim=1)
    state = as_transformers_vit(state, dinov2=True)
    assert (
        "encoder.layer.1.layer_scale1.lambda1" in state and "encoder.layer.1.mlp.fc1.bias" in state
    )
    check_features(tmp_path / "model.safetensors", prefixed(start, state), source, SMALL_IMAGES)


@pytest.mark.parametrize("start", ["", "resnet."])
@pytest.mark.parametrize("arch", ["resnet10", "resnet50"])
def test_resnets_of_transformers_number_their_convolutions_from_zero(tmp_path, arch, start):
    # modeling_resnet.py
    source = at_random(build_model(arch, **CNN))
    block = r"^layer(\d)\.(\d+)\."

    def stage(match, part):
        return f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.{part}"

    state = {}
    for name, x in source.state_dict().items():
        name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
        name = re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
        for ours, theirs in (("conv", "convolution"), ("bn", "normalization")):
            pattern = rf"{block}{ours}(\d)\."
            name = re.sub(
                pattern,
                lambda m, kind=theirs: stage(m, f"layer.{int(m[3]) - 1}.{kind}."),
                name,
            )
        for number, theirs in (("0", "convolution"), ("1", "normalization")):
            pattern = rf"{block}downsample\.{number}\."
            name = re.sub(pattern, lambda m, kind=theirs: stage(m, f"shortcut.{kind}."), name)
        state[start + name] = x
    assert f"{start}encoder.stages.0.layers.0.layer.1.convolution.weight" in state
    state["classifier.1.weight"] = torch.ones(5, source.num_features)
    assert check_features(tmp_path / "model.safetensors", state, source).arch == arch


# ============ what no network here has ============
def swiglu_of_dinov2(state):
    return renamed(state, (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"))


@pytest.mark.parametrize(
    ("name", "options", "change", "words"),
    [
        ("vit_giant_patch14_dinov2", {"mlp_ratio": 4}, dict, "SwiGLU"),
        ("vit_giant_patch14_dinov2", {"mlp_ratio": 4}, swiglu_of_dinov2, "SwiGLU"),
        ("vit_small_patch16_dinov3", {}, dict, "rotary positions"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, dict, "mean of all patches"),
        ("deit_tiny_distilled_patch16_224", {}, dict, "distillation token"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, dict, "blocks.0.attn.k_norm"),
        ("vit_tiny_patch16_224", {"pre_norm": True}, dict, "patch_embed.proj.bias"),
    ],
)
@pytest.mark.parametrize("arch", [None, "vit_micro"])
def test_layers_that_no_network_here_has_are_refused_by_name(
    tmp_path, name, options, change, words, arch
):
    torch.save(change(timm_vit(name, **options).state_dict()), tmp_path / "a.pth")
    with pytest.raises(OSError, match=words) as error:
        open_pretrained(tmp_path / "a.pth", arch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["embeddings.distillation_token", "encoder.layer.0.lambda_1"])
def test_layers_of_transformers_that_are_not_known_are_not_left_out(tmp_path, name):
    state = as_transformers_vit(timm_vit().state_dict())
    torch.save(prefixed("vit.", state | {name: torch.ones(1, 1, 96)}), tmp_path / "a.bin")
    with pytest.raises(OSError, match=r"distillation|blocks\.0\.lambda_1"):
        open_pretrained(tmp_path / "a.bin")


def test_names_of_our_own_files_stay_as_they_are():
    for model in (our_resnet(), build_backbone("vit_micro", img_size=32, num_registers=2)):
        state = model.state_dict()
        converted = foreign_names.with_our_names(state)
        assert list(converted) == list(state)
        assert all(converted[name] is state[name] for name in state)


def test_which_names_are_transformers_is_told_without_loading_them():
    assert all(TRANSFORMERS.fullmatch(name) for name in [*ARCHITECTURES, "xcit_small_12_p16"])
    assert not any(
        map(TRANSFORMERS.fullmatch, ["vit_b_16", "resnet50", "timm:vit_tiny_patch16_224"])
    )
