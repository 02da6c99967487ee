"""Networks of timm by the name of --arch, and its weights by the name of --pretrained."""

import os
import socket
import sys
import time

import pytest
import torch

import eval_knn
from src.evaluate import flags as eval_flags
from src.nets import pretrained, timm_trunks
from src.nets.backbones import build_backbone
from src.nets.convnets import build_convnet
from src.nets.pretrained import IMAGENET_RED, describe, open_pretrained
from src.nets.resnet import build_model
from src.nets.timm_trunks import timm_trunk

pytest.importorskip("timm", reason="timm is optional")
import huggingface_hub
import timm

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout"])
def test_a_network_of_timm_gives_its_features_from_its_own_file(tmp_path, name):
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=0, **sizes_of(name)).eval()
    torch.save(source.state_dict(), tmp_path / "theirs.pth")
    found = open_pretrained(tmp_path / "theirs.pth", f"timm:{name}")
    torch.testing.assert_close(found.model(IMAGES), source(IMAGES), rtol=1e-5, atol=1e-5)
    assert found.model.num_features == source(IMAGES).shape[1]
    assert (found.arch, found.imagenet_red) == (f"timm:{name}", IMAGENET_RED)


@torch.no_grad()
def test_a_file_of_timm_is_normalised_as_the_same_weights_by_name_and_a_run_as_it_was(tmp_path):
    from tests.nets.test_pretrained import SWAV, make_run

    torch.manual_seed(0)
    source = timm.create_model("test_vit", dynamic_img_size=True).eval()
    torch.save(source.state_dict(), tmp_path / "theirs.pth")
    found = open_pretrained(tmp_path / "theirs.pth", "timm:test_vit")
    said = timm.get_pretrained_cfg("test_vit")
    expected = {"size": said.input_size[-1], "mean": list(said.mean), "std": list(said.std)}
    assert expected["size"] != 224 and expected["mean"] == [0.5] * 3
    assert (found.image_size, found.mean, found.std) == tuple(expected.values())
    described = describe(tmp_path / "theirs.pth", "timm:test_vit")[1]
    assert {name: described[name] for name in expected} == expected
    told = open_pretrained(tmp_path / "theirs.pth", "timm:test_vit", image_size=32, std=[0.1] * 3)
    assert (told.image_size, told.mean, told.std) == (32, [0.5] * 3, [0.1] * 3)
    # of a network that timm has no weights of, and of a run, timm says nothing
    torch.save(timm.create_model("botnet50ts_256").state_dict(), tmp_path / "other.pth")
    other = open_pretrained(tmp_path / "other.pth", "timm:botnet50ts_256")
    assert (other.image_size, other.mean) == (224, None)
    model = build_model(
        "timm:test_vit", normalize=True, output_dim=8, hidden_mlp=16, nmb_prototypes=6
    ).eval()
    arguments = {**SWAV, "arch": "timm:test_vit", "stem": "imagenet", "width": 1.0}
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run", arguments, {"model": model})
    for path in (tmp_path / "run", tmp_path / "run" / "elsewhere" / "copy.pth"):
        run = open_pretrained(path, "timm:test_vit")
        assert (run.image_size, run.mean, run.std) == (16, None, None)


def test_a_file_for_images_of_one_channel_is_not_normalised_as_timms_of_three(tmp_path):
    source = timm.create_model("test_resnet", in_chans=1)
    torch.save(source.state_dict(), tmp_path / "grey.pth")
    found = open_pretrained(tmp_path / "grey.pth", "timm:test_resnet", in_chans=1)
    assert (found.in_chans, found.mean, found.std) == (1, None, None)
    words = ["--pretrained", str(tmp_path / "grey.pth"), "--arch", "timm:test_resnet"]
    args, _ = eval_flags.parse_args(eval_knn.get_parser(), [*words, "--in_chans", "1"], "knn")
    eval_flags.check_images(args)
    assert (args.mean, args.std) == (None, None)
    args, _ = eval_flags.parse_args(eval_knn.get_parser(), words, "knn")
    assert args.mean == list(timm.get_pretrained_cfg("test_resnet").mean)


def sizes_of(name):
    return {"dynamic_img_size": True} if "vit" in name else {}


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_images_of_every_size_and_number_of_channels_go_in(name):
    model = build_backbone(f"timm:{name}", in_chans=2, img_size=64, patch_size=8).eval()
    for size in (96, 32):
        images = torch.rand(2, 2, size, size)
        assert model(images).shape == (2, model.num_features)
        assert torch.equal(model.forward_backbone(images), model(images))


def test_stochastic_depth_reaches_networks_that_have_it():
    model, _ = timm_trunk("test_vit", drop_path_rate=0.3)
    rates = {module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"}
    assert max(rates) == pytest.approx(0.3)
    timm_trunk("test_resnet", drop_path_rate=0.3)


def test_a_network_of_timm_trains_with_multi_crop_and_the_swav_head_or_a_top_layer():
    model = build_model("timm:test_resnet", output_dim=8, hidden_mlp=16, nmb_prototypes=5)
    embedding, scores = model([torch.rand(4, 3, 64, 64), torch.rand(4, 3, 32, 32)])
    assert (embedding.shape, scores.shape) == ((8, 8), (8, 5))
    scores.sum().backward()
    assert all(p.grad is not None for p in model.trunk.parameters())
    features, scores = build_convnet("timm:test_resnet", 7)(torch.rand(2, 3, 32, 32))
    assert scores.shape == (2, 7)


@torch.no_grad()
def test_a_run_with_a_network_of_timm_is_opened_by_its_folder(tmp_path):
    from tests.nets.test_pretrained import SWAV, make_run

    model = build_model(
        "timm:test_resnet", normalize=True, output_dim=8, hidden_mlp=16, nmb_prototypes=6
    )
    arguments = {**SWAV, "arch": "timm:test_resnet", "stem": "imagenet", "width": 1.0}
    make_run(tmp_path, arguments, {"model": model.eval()})
    found = open_pretrained(tmp_path)
    torch.testing.assert_close(found.model(IMAGES), model.forward_backbone(IMAGES))


@pytest.mark.parametrize(
    ("arch", "options", "words"),
    [
        ("timm:resnet9000", {}, "timm:resnet9000 is not known to timm .* near to it are resnet"),
        ("timm:", {}, "timm: is not known"),
        ("timm:resnet18.nobody", {}, "timm:resnet18.nobody is not known .*tag"),
        ("timm:test_resnet", {"width": 0.5}, "--width needs a ResNet of ours"),
        ("timm:test_resnet", {"stem": "small"}, "--stem needs a ResNet of ours"),
        ("timm:test_vit", {"num_registers": 2}, "--num_registers needs a ViT"),
    ],
)
def test_a_name_or_an_option_that_timm_does_not_have_is_one_sentence(arch, options, words):
    with pytest.raises(ValueError, match=words) as error:
        build_backbone(arch, **options)
    assert "\n" not in str(error.value)


def test_without_timm_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for call in (
        lambda: build_model("timm:test_resnet"),
        lambda: open_pretrained("timm:test_resnet"),
        lambda: describe("timm:test_resnet"),
    ):
        with pytest.raises(ValueError, match="timm:test_resnet needs .* pip install timm"):
            call()


# ============ weights by name ============
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face hub, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_into(hub, name, state):
    """Weights of a network of timm as the hub keeps what it has downloaded."""
    from safetensors.torch import save_file

    repository = hub / f"models--{timm.get_pretrained_cfg(name).hf_hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    save_file(state, snapshot / "model.safetensors")
    return repository


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_weights_of_timm_are_taken_by_name_from_the_cache_of_the_hub(hub, name):
    torch.manual_seed(0)
    source = timm.create_model(name, **sizes_of(name)).eval()
    put_into(hub, name, source.state_dict())
    found = open_pretrained(f"timm:{name}")
    source.reset_classifier(0)
    torch.testing.assert_close(found.model(IMAGES), source(IMAGES))
    said = timm.get_pretrained_cfg(name)
    assert (found.arch, found.image_size) == (f"timm:{name}", said.input_size[-1])
    assert (found.mean, found.std) == (list(said.mean), list(said.std))
    told = open_pretrained(f"timm:{name}", image_size=32, mean=[0.1] * 3)
    assert (told.image_size, told.mean, told.std) == (32, [0.1] * 3, list(said.std))
    expected = {"arch": f"timm:{name}", "size": found.image_size, "mean": found.mean}
    assert describe(f"timm:{name}") == ({}, {**expected, "std": found.std})


@torch.no_grad()
def test_the_weights_of_timm_go_into_a_vision_transformer_of_ours(monkeypatch):
    options = {"embed_dim": 96, "num_heads": 3, "depth": 2, "img_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options).eval()
    create = timm.create_model
    monkeypatch.setattr(timm_trunks, "weights_of_timm", lambda name: ("", True))
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained, num_classes: source if pretrained else create
    )
    images = IMAGES[:, :, :32, :32]
    found = open_pretrained("timm:vit_tiny_patch16_224", "vit_micro")
    assert pretrained.is_transformer(found.arch)
    torch.testing.assert_close(found.model(images), source(images), rtol=1e-5, atol=1e-5)
    said = describe("timm:vit_tiny_patch16_224", "vit_micro")[1]
    assert (said["arch"], said["patch_size"], said["mean"]) == ("vit_micro", 8, [0.5] * 3)


@pytest.mark.parametrize("network", ["no name is known", "nobody answers"])
def test_without_a_network_there_is_one_attempt_of_some_seconds(hub, monkeypatch, network):
    attempts = []

    def look_up(host, port, *others, **options):
        attempts.append(host)
        if network == "no name is known":
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", port))]

    def connect(self, address):
        assert 0 < self.gettimeout() <= 5  # the seconds after which it is given up
        raise TimeoutError(110, "timed out")

    def sleep(seconds):
        raise AssertionError("waits for another attempt")

    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(OSError, match="weights of timm:test_resnet cannot be downloaded") as error:
        open_pretrained("timm:test_resnet")
    assert attempts == ["huggingface.co"]
    file = "https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
    assert str(error.value).endswith(
        f"fetch {file} elsewhere, and give it by --pretrained or --init_from, with --arch "
        "timm:test_resnet"
    )
    assert "\n" not in str(error.value)


def test_what_is_in_the_cache_is_used_where_nobody_answers(hub, monkeypatch):
    source = timm.create_model("test_resnet")
    put_into(hub, "test_resnet", source.state_dict())
    monkeypatch.setattr(
        timm_trunks, "refuse_unreachable", lambda _: pytest.fail("asks for what is there")
    )
    found = open_pretrained("timm:test_resnet")
    assert torch.equal(found.model.trunk.conv1[0].weight, source.conv1[0].weight)


def test_weights_that_cannot_be_had_are_one_sentence(hub):
    with pytest.raises(OSError, match="weights of timm:test_resnet cannot be downloaded") as error:
        open_pretrained("timm:test_resnet")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="timm has no weights of botnet50ts_256"):
        open_pretrained("timm:botnet50ts_256")
