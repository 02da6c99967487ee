"""hubconf.py: what torch.hub lists and loads, also beside a `src` and a `utils` of the caller."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

from src.data.small_sets import STATISTICS
from src.nets.backbones import build_backbone
from src.nets.convnets import build_convnet
from src.nets.dino_head import DINOHead, MultiCropWrapper
from src.nets.resnet import build_model, resnet50
from src.nets.vision_transformer import vit_small
from src.run import checkpoint

ROOT = Path(__file__).parent.parent
DINO = [f"dino_vit{size}{patch}" for size in "sb" for patch in (16, 8)]
XCIT = [f"dino_xcit_{size}_p{patch}" for size in ("small_12", "medium_24") for patch in (16, 8)]
SWAV = [f"resnet50{width}" for width in ("", "w2", "w4", "w5")]
CLUSTERS = ["deepcluster_alexnet", "deepcluster_vgg16", "deepercluster_vgg16"]
ENTRIES = [*DINO, *XCIT, "dino_resnet50", *SWAV, *(f"swav_{name}" for name in SWAV), *CLUSTERS]
ENTRIES += ["trunk"]
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def load(entry, *args, **options):
    return torch.hub.load(str(ROOT), entry, *args, source="local", **options)


def features(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(1)
    return vit_small(patch_size=16)


@pytest.fixture(scope="module")
def released_vit(vit, tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "vits16.pth"
    torch.save(vit.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def swav():
    torch.manual_seed(2)
    return resnet50(normalize=True, hidden_mlp=16, output_dim=8, nmb_prototypes=6)


@pytest.fixture(scope="module")
def released_swav(swav, tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "swav.pth.tar"  # as published: "module.", with a head
    torch.save({f"module.{name}": x for name, x in swav.state_dict().items()}, path)
    return str(path)


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """The name of this repository for torch.hub, as if it had been downloaded from GitHub."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    there = tmp_path / "someone_this-repository_main"
    shutil.copytree(ROOT / "src", there / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "hubconf.py", there)
    return "someone/this-repository:main"


# ============ beside the caller's own modules ============
CALLER = """
import sys, torch
for name in ("sklearn", "matplotlib", "timm", "faiss", "submitit", "tensorboard", "av"):
    sys.modules[name] = None  # torch, torchvision and what they need are enough
import src, src.resnet, utils
mine = {name: sys.modules[name] for name in ("src", "src.resnet", "utils")}
path = list(sys.path)
repository, vit, swav = sys.argv[1:]
torch.manual_seed(0)
images = torch.rand(2, 3, 32, 32)
models = {}
for entry, weights in (("dino_vits16", vit), ("resnet50", swav), ("trunk", vit)):
    models[entry] = torch.hub.load(repository, entry, source="local", pretrained=weights).eval()
with torch.no_grad():
    torch.save({entry: model(images) for entry, model in models.items()}, "features.pth")
import src.resnet, utils
assert src.resnet.MINE == 1 and utils.MINE == 2
assert all(sys.modules[name] is module for name, module in mine.items())
assert not {name for name in sys.modules if name.startswith("src.")} - {"src.resnet"}
assert sys.path == path
lazy = sys.modules[type(models["resnet50"]).__module__].build_model("squeezenet1_0")
torch.save(models["resnet50"], "whole.pth")
whole = torch.load("whole.pth", weights_only=False)
with torch.no_grad():
    assert torch.equal(whole(images), models["resnet50"](images))
"""


@pytest.mark.slow
def test_a_caller_with_its_own_src_and_utils_keeps_them(
    tmp_path, vit, swav, released_vit, released_swav
):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").write_text("")
    (tmp_path / "src" / "resnet.py").write_text("MINE = 1\n")
    (tmp_path / "utils.py").write_text("MINE = 2\n")
    (tmp_path / "caller.py").write_text(CALLER)
    command = [sys.executable, "caller.py", str(ROOT), released_vit, released_swav]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    torch.manual_seed(0)
    images, found = torch.rand(2, 3, 32, 32), torch.load(tmp_path / "features.pth")
    with torch.no_grad():
        expected = {"dino_vits16": vit.eval()(images)}
        expected["resnet50"] = swav.eval().forward_backbone(images)
        expected["trunk"] = expected["dino_vits16"]
    for entry, values in expected.items():
        torch.testing.assert_close(found[entry], values, rtol=1e-4, atol=1e-5)


# ============ entries ============
def test_every_published_name_is_listed_with_help_and_nothing_else(downloaded):
    assert sorted(torch.hub.list(downloaded, trust_repo=True)) == sorted(ENTRIES)
    for entry in ENTRIES:
        assert "(B, 3, H, W) -> (B, " in torch.hub.help(downloaded, entry, trust_repo=True)
    with torch.device("meta"):
        assert torch.hub.load(downloaded, "dino_vits8", False, trust_repo=True).patch_size == 8


@pytest.mark.slow
def test_what_the_entries_build_is_what_their_help_says(downloaded):
    with torch.device("meta"):  # shapes alone: the widest network has half a billion weights
        for entry in (*DINO, "dino_resnet50", *SWAV):
            model = load(entry, pretrained=False).eval()
            said = torch.hub.help(downloaded, entry, trust_repo=True)
            assert f"(B, {model(IMAGES.to('meta')).shape[1]})" in said, entry
            if entry in DINO:
                assert model.patch_size == int(entry.removeprefix("dino_vit")[1:])
        for entry in CLUSTERS:
            model = load(entry, pretrained=False)
            assert model.classifier[-1].weight.shape == (4096, 4096)
            assert type(model).__name__.lower() in entry and model.top_layer is None
            assert model.sobel.padding == (2 if "deeper" in entry else 1)


@pytest.mark.parametrize(
    ("entry", "address"),
    [
        ("dino_vits16", "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
        ("dino_vits8", "dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"),
        ("dino_vitb16", "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
        ("dino_vitb8", "dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"),
        ("dino_resnet50", "dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth"),
        ("resnet50", "deepcluster/swav_800ep_pretrain.pth.tar"),
        ("resnet50w2", "deepcluster/swav_RN50w2_400ep_pretrain.pth.tar"),
        ("swav_resnet50w4", "deepcluster/swav_RN50w4_400ep_pretrain.pth.tar"),
        ("swav_resnet50w5", "deepcluster/swav_RN50w5_400ep_pretrain.pth.tar"),
    ],
)
def test_the_released_weights_are_asked_for_where_they_were_published(
    monkeypatch, tmp_path, entry, address
):
    asked = []

    def download(url, **options):
        asked.append(url)
        raise OSError("no network here")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", download)
    with torch.device("meta"), pytest.raises(OSError, match="no network here"):
        load(entry)
    assert asked == [f"https://dl.fbaipublicfiles.com/{address}"]


@pytest.mark.slow
def test_a_released_vit_is_loaded_and_takes_the_options_of_the_network(vit, released_vit):
    torch.testing.assert_close(
        features(load("dino_vits16", pretrained=released_vit)), features(vit)
    )
    dropping = load("dino_vits16", pretrained=released_vit, drop_path_rate=0.5)
    assert [block.drop_path_rate for block in dropping.blocks][-1] == 0.5
    fresh = load("dino_vits16", pretrained=False, img_size=32, num_registers=3)
    assert fresh.pos_embed.shape == (1, 1 + 4, 384) and fresh.register_tokens.shape == (1, 3, 384)


@pytest.mark.slow
def test_the_teacher_of_a_run_is_loaded_whatever_its_crops_and_registers(tmp_path):
    networks = {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        backbone = build_backbone("vit_small", 16, img_size=48, num_registers=2)
        networks[name] = MultiCropWrapper(backbone, DINOHead(384, 8, nlayers=1, bottleneck_dim=8))
    state = {name: network.state_dict() for name, network in networks.items()}
    checkpoint.save_checkpoint(tmp_path / "run", {**state, "epoch": 1})
    (tmp_path / "run" / "args.json").write_text(json.dumps({"arch": "vit_small"}))
    for name, options in (("teacher", {}), ("student", {"checkpoint_key": "student"})):
        model = load("dino_vits16", pretrained=tmp_path / "run", **options)
        assert model.num_registers == 2
        torch.testing.assert_close(features(model), features(networks[name].backbone))


@pytest.mark.slow
def test_swav_is_a_trunk_without_a_random_classifier(swav, released_swav):
    for entry in ("resnet50", "swav_resnet50", "dino_resnet50"):
        found = features(load(entry, pretrained=released_swav))
        with torch.no_grad():
            torch.testing.assert_close(found, swav.eval().forward_backbone(IMAGES))
    assert found.shape == (2, 2048)


@pytest.mark.parametrize("entry", CLUSTERS)
def test_classifiers_of_clusters_come_from_a_file_and_take_rgb_images(tmp_path, entry):
    arch, padding = entry.split("_")[1], 2 if "deeper" in entry else 1
    torch.manual_seed(4)
    theirs = build_convnet(arch, 5, sobel=True, sobel_padding=padding, width=1 / 16).eval()
    state = theirs.state_dict()
    if padding == 1:
        state = {n.replace("features.", "features.module."): x for n, x in state.items()}
    else:
        state = {n if n.startswith("sobel") else f"body.{n}": x for n, x in state.items()}
    torch.save({"epoch": 1, "arch": arch, "state_dict": state}, tmp_path / "released.pth.tar")
    found = load(entry, pretrained=str(tmp_path / "released.pth.tar")).eval()
    images = torch.rand(2, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.forward_backbone(images)
        torch.testing.assert_close(found(images), expected)
        rgb = load(entry, pretrained=tmp_path / "released.pth.tar", rgb=True).eval()
        assert rgb.sobel is None and rgb.features[0].in_channels == 3
        if padding == 2:  # the border too
            torch.testing.assert_close(rgb(images), expected, rtol=1e-4, atol=1e-5)
            return
        conv = {"alexnet": 1, "vgg16": 2}[arch]
        maps = [model.forward_conv(images, conv)[..., 4:-4, 4:-4] for model in (rgb, theirs)]
        torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-5)
    for missing in (True, None, ""):
        with pytest.raises(ValueError, match="must be the path or address of a file, or False"):
            load(entry, pretrained=missing)


@pytest.mark.slow
@pytest.mark.parametrize("published", [True, False], ids=["published names", "names of timm"])
def test_xcit_takes_the_published_names_and_those_of_a_run(tmp_path, published):
    torch.manual_seed(3)
    theirs = build_backbone("xcit_small_12_p16", 16)
    state = {}
    for name, value in theirs.state_dict().items():
        if published and ".attn.q." in name and name.startswith("cls_attn"):
            parts = [theirs.state_dict()[name.replace(".q.", f".{part}.")] for part in "qkv"]
            state[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif published and name.startswith("cls_attn") and (".k." in name or ".v." in name):
            continue
        else:
            state[name.replace("pos_embed.", "pos_embeder.") if published else name] = value
    if not published:
        state = {"teacher": {f"backbone.{name}": x for name, x in state.items()}}
        state["teacher"]["head.mlp.0.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "xcit.pth")
    model = load("dino_xcit_small_12_p16", pretrained=str(tmp_path / "xcit.pth"))
    torch.testing.assert_close(features(model), features(theirs))


# ============ whatever a run or a file holds ============
ANY_RUN = {"arch": "resnet18", "stem": "small", "width": 0.125, "in_chans": 3, "seed": 1}
ANY_RUN |= {"data_path": "digits", "mean": None, "std": None, "size_crops": [16, 8]}


@pytest.fixture
def run_of_swav(tmp_path):
    network = build_model(
        "resnet18",
        stem="small",
        width=0.125,
        normalize=True,
        hidden_mlp=16,
        output_dim=8,
        nmb_prototypes=[6],
    )
    checkpoint.save_checkpoint(tmp_path / "run", {"model": network.state_dict(), "epoch": 1})
    arguments = {**ANY_RUN, "hidden_mlp": 16, "feat_dim": 8, "nmb_prototypes": [6]}
    (tmp_path / "run" / "args.json").write_text(json.dumps(arguments))
    return tmp_path / "run", network.eval()


@torch.no_grad()
def test_the_trunk_of_a_run_needs_nothing_but_its_folder(run_of_swav):
    folder, network = run_of_swav
    before = torch.get_rng_state()
    model = load("trunk", pretrained=str(folder))
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    torch.testing.assert_close(
        model(IMAGES), network.forward_backbone(IMAGES), rtol=1e-4, atol=1e-5
    )
    mean, std = STATISTICS["digits"]
    assert (model.mean, model.std, model.image_size) == (list(mean), list(std), 16)
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 (made in the line above)
    assert torch.equal(again(IMAGES), model(IMAGES)) and again.image_size == 16


@pytest.mark.parametrize("method", ["dino", "deepcluster"])
@torch.no_grad()
def test_the_trunk_of_a_run_of_any_method_is_loaded(tmp_path, method):
    torch.manual_seed(0)
    arguments = {**ANY_RUN, "data_path": "my_images"}
    if method == "dino":
        arguments |= {"arch": "vit_tiny", "patch_size": 8, "depth": 1, "global_crops_size": 32}
        backbone = build_backbone("vit_tiny", 8, img_size=32, width=0.125, depth=1)
        network = MultiCropWrapper(backbone, DINOHead(24, 8, nlayers=1, bottleneck_dim=8))
        state, expected = {"teacher": network.state_dict()}, backbone.eval()(IMAGES)
    else:
        arguments |= {"sobel": True, "sobel_padding": 1}
        network = build_convnet("resnet18", 5, stem="small", width=0.125, sobel=True).eval()
        state, expected = {"model": network.state_dict()}, network.forward_backbone(IMAGES)
    checkpoint.save_checkpoint(tmp_path, {**state, "epoch": 1})
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    model = load("trunk", pretrained=tmp_path)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert (model.mean, model.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.slow
@torch.no_grad()
def test_the_trunk_of_a_released_file_is_known_by_its_tensors(
    vit, swav, released_vit, released_swav
):
    found = load("trunk", pretrained=released_vit)
    torch.testing.assert_close(found(IMAGES), vit.eval()(IMAGES), rtol=1e-4, atol=1e-5)
    assert found.std == [0.229, 0.224, 0.225] and found.image_size == 224
    found = load("trunk", pretrained=released_swav)
    expected = swav.eval().forward_backbone(IMAGES)
    torch.testing.assert_close(found(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert found.std == [0.228, 0.224, 0.225]  # SwAV's red


def test_the_trunk_must_come_from_somewhere(tmp_path):
    for nothing in (True, False, None, ""):
        with pytest.raises(ValueError, match="must be a run's folder, or the path or address"):
            load("trunk", pretrained=nothing)
    with pytest.raises(FileNotFoundError, match="there is no weights file nowhere.pth"):
        load("trunk", pretrained="nowhere.pth")


def test_a_loaded_network_can_be_copied_and_pickled():
    model = load("dino_vits16", pretrained=False, depth=1)
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 (made in the line above)
    torch.testing.assert_close(features(again), features(model))
    torch.testing.assert_close(features(copy.deepcopy(model)), features(model))


@pytest.mark.slow
def test_a_loaded_network_can_be_compiled():
    model = load("dino_vits16", pretrained=False, depth=2).eval()
    expected = features(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(features(compiled), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_weights_that_do_not_fit_stop_the_loading(released_vit, released_swav, tmp_path):
    for entry in ("dino_vits8", "dino_resnet50"):
        with pytest.raises(OSError, match="vits16.pth"):
            load(entry, pretrained=released_vit)
    with pytest.raises(OSError, match="none of its"):
        load("dino_vits16", pretrained=released_swav)
    with pytest.raises(FileNotFoundError, match="there is no weights file nowhere.pth"):
        load("resnet50", pretrained="nowhere.pth")
    with pytest.raises(ValueError, match="pretrained=None must be True, False, or the path"):
        load("resnet50", pretrained=None)
    load("dino_vits16", pretrained=released_vit, checkpoint_key="teacher")  # it has no sections
