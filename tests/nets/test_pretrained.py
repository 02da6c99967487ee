"""src.nets.pretrained: networks of runs, checkpoints and files, and what is known of them."""

import json

import pytest
import torch

from src.data.datasets import SWAV_RED_STD, ImageDataset, usual_std
from src.errors import CheckpointError
from src.nets import downloads, pretrained
from src.nets.backbones import build_backbone
from src.nets.convnets import build_convnet
from src.nets.dino_head import DINOHead, MultiCropWrapper
from src.nets.export_names import to_torchvision
from src.nets.pretrained import IMAGENET_RED, SWAV_RED, describe, open_pretrained
from src.nets.resnet import build_model
from src.nets.weights import fingerprint, load_weights
from src.run import checkpoint

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SWAV = {"arch": "resnet10", "stem": "small", "width": 0.125, "in_chans": 3}
SWAV |= {"hidden_mlp": 16, "feat_dim": 8, "head_dims": None, "head_bn": True, "nmb_prototypes": [6]}
SWAV |= {"size_crops": [16, 8], "mean": None, "std": None, "seed": 3, "data_path": "digits"}
CLUSTERS = {"arch": "resnet10", "stem": "small", "width": 0.125, "in_chans": 3, "seed": 2}
CLUSTERS |= {"sobel": True, "sobel_padding": 2, "size_crops": [32], "std": [0.2] * 3}
DINO = {"arch": "vit_tiny", "patch_size": 8, "width": 0.125, "depth": 2, "num_registers": 1}
DINO |= {"in_chans": 3, "stem": "imagenet", "img_size": None, "global_crops_size": 32}


def swav_network(seed=5):
    torch.manual_seed(seed)
    options = {name: SWAV[name] for name in ("stem", "width", "hidden_mlp")}
    return build_model("resnet10", normalize=True, output_dim=8, nmb_prototypes=6, **options).eval()


def clusters_network():
    torch.manual_seed(5)
    network = build_convnet("resnet10", 7, stem="small", width=0.125, sobel=True, sobel_padding=2)
    return network.eval()


def dino_networks():
    networks = {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        names = ("arch", "patch_size", "width", "depth", "num_registers")
        backbone = build_backbone(**{flag: DINO[flag] for flag in names}, img_size=32)
        head = DINOHead(backbone.num_features, 8, nlayers=1, bottleneck_dim=8)
        networks[name] = MultiCropWrapper(backbone, head).eval()
    return networks


def make_run(folder, arguments, networks, method="swav"):
    """A run's folder as the scripts leave it, and a copy of its checkpoint without args.json beside it."""
    state = {name: network.state_dict() for name, network in networks.items()}
    state |= {"epoch": 1, "method": method, "args": arguments}
    checkpoint.save_checkpoint(folder, state, keep_as="ckp-1")
    (folder / "args.json").write_text(json.dumps(arguments))
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "copy.pth").write_bytes((folder / "checkpoint.pth").read_bytes())


PLACES = ["", "checkpoint.pth", "checkpoints/ckp-1.pth", "elsewhere/copy.pth"]


@torch.no_grad()
def assert_same(model, expected, images=IMAGES):
    assert not model.training
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


# ============ runs ============
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_a_run_of_swav_is_all_that_is_needed_wherever_its_checkpoint_lies(tmp_path, place):
    network = swav_network()
    make_run(tmp_path, SWAV, {"model": network})
    found = open_pretrained(tmp_path / place)
    assert_same(found.model, network.forward_backbone(IMAGES))
    assert (found.arch, found.image_size, found.seed, found.in_chans) == ("resnet10", 16, 3, 3)
    assert (found.mean, found.std, found.imagenet_red) == (None, None, SWAV_RED)
    assert found.run_args == SWAV
    embedding, scores = network(IMAGES)
    embedded = open_pretrained(str(tmp_path / place), feature="embedding")
    assert_same(embedded.model, embedding)
    torch.testing.assert_close(embedded.head.prototypes(embedded.model(IMAGES)), scores)


def test_whose_weights_they_are_is_said_for_people(tmp_path):
    make_run(tmp_path, SWAV, {"model": swav_network()})
    found = open_pretrained(tmp_path)
    assert found.origin == f"resnet10 of {tmp_path} after 1 epoch"
    assert found.untrained().origin == "an untrained resnet10"
    torch.save(swav_network().state_dict(), tmp_path / "elsewhere" / "w.pth")
    other = open_pretrained(tmp_path / "elsewhere" / "w.pth", "resnet10", width=0.125, stem="small")
    assert other.origin == f"resnet10 of {tmp_path}/elsewhere/w.pth"


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_a_run_of_dino_gives_its_teacher_unless_the_student_is_asked_for(tmp_path, place):
    networks = dino_networks()
    make_run(tmp_path, DINO, networks, "dino")
    for name, key in (("teacher", None), ("student", "student"), ("teacher", "teacher")):
        found = open_pretrained(tmp_path / place, checkpoint_key=key)
        assert_same(found.model, networks[name].backbone(IMAGES))
    assert (found.arch, found.image_size, found.options["img_size"]) == ("vit_tiny", 32, 32)
    assert found.imagenet_red == IMAGENET_RED
    with pytest.raises(ValueError, match="--feature embedding .* use --feature backbone"):
        open_pretrained(tmp_path / place, feature="embedding")


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_a_run_of_a_classifier_of_clusters_gives_what_comes_before_its_top_layer(tmp_path, place):
    network = clusters_network()
    make_run(tmp_path, CLUSTERS, {"model": network}, "deepcluster")
    found = open_pretrained(tmp_path / place)
    assert_same(found.model, network.forward_backbone(IMAGES))
    assert (found.image_size, found.std, found.imagenet_red) == (32, [0.2] * 3, IMAGENET_RED)
    assert found.model.sobel.padding == 2


@torch.no_grad()
def test_a_vgg16_of_deepercluster_without_sobel_filters_is_padded_as_published(tmp_path):
    torch.manual_seed(0)
    options = {"sobel": False, "width": 1 / 16}
    padded = build_convnet("vgg16", 5, image_padding=1, **options).eval()
    body = {
        name.replace("top_layer", "pred_layer") if "top_layer" in name else f"body.{name}": x
        for name, x in padded.state_dict().items()
    }
    torch.save({"state_dict": body}, tmp_path / "deepercluster.pth")
    assert_same(
        open_pretrained(tmp_path / "deepercluster.pth").model, padded.forward_backbone(IMAGES)
    )
    # not so DeepCluster's, nor a run that began before there was the flag
    plain = build_convnet("vgg16", 5, **options).eval()
    plain.load_state_dict(padded.state_dict())
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "deepcluster.pth")
    assert_same(open_pretrained(tmp_path / "deepcluster.pth").model, plain.forward_backbone(IMAGES))
    for network, said in ((plain, {}), (padded, {"image_padding": 1})):
        arguments = {"arch": "vgg16", "sobel_padding": 2, **options, **said}
        folder = tmp_path / f"run{len(said)}"
        folder.mkdir()
        make_run(folder, arguments, {"model": network}, "deepercluster")
        assert_same(open_pretrained(folder).model, network.forward_backbone(IMAGES))


def test_the_caller_wins_over_the_run_and_the_run_over_the_file(tmp_path):
    make_run(tmp_path, {**SWAV, "mean": [0.1] * 3}, {"model": swav_network()})
    found = open_pretrained(tmp_path, image_size=20, std=[0.3] * 3, seed=9)
    assert (found.image_size, found.seed) == (20, 9)
    assert (found.mean, found.std) == ([0.1] * 3, [0.3] * 3)
    with pytest.raises(OSError, match="lacks"):  # not the width of the run, nor that of the tensors
        open_pretrained(tmp_path, width=0.25)
    (tmp_path / "args.json").write_text(json.dumps({**SWAV, "width": 0.25}))
    with pytest.raises(OSError, match="lacks"):
        open_pretrained(tmp_path)
    open_pretrained(tmp_path, width=0.125)


@torch.no_grad()
def test_a_run_untrained_is_what_its_seed_makes_and_the_random_state_stays(tmp_path):
    make_run(tmp_path, SWAV, {"model": swav_network()})
    before = torch.get_rng_state()
    found = open_pretrained(tmp_path)
    fresh = found.untrained()
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(fresh.model, swav_network(seed=3).forward_backbone(IMAGES))
    assert fingerprint(fresh.model, fresh.head) == fingerprint(swav_network(seed=3))
    assert fingerprint(found.model, found.head) == fingerprint(swav_network())


def test_images_are_normalised_as_the_run_says_or_else_as_the_data():
    swav, other = open_pretrained("", "resnet10", width=0.125), open_pretrained("", "vit_micro")
    images = ImageDataset([], "", 3, "")
    assert SWAV_RED_STD == SWAV_RED
    assert swav.normalisation(images) == (images.mean, images.std)
    assert other.normalisation(images) == (images.mean, usual_std(images.std))
    assert swav.normalisation(images, IMAGENET_RED) == other.normalisation(images)
    assert other.normalisation(images, SWAV_RED) == swav.normalisation(images)
    told = open_pretrained("", "resnet10", width=0.125, mean=(0.1,) * 3, std=(0.2,) * 3)
    assert told.normalisation(images) == ([0.1] * 3, [0.2] * 3)


# ============ files ============
RESNETS = [
    ("resnet10", "", {}),
    ("resnet18", "module.", {"stem": "small", "width": 0.25}),
    ("resnet34", "backbone.", {"width": 0.34}),
    ("resnet50", "trunk.", {"width": 0.125, "in_chans": 1}),
    ("resnet50w2", "module.", {}),
    ("resnext50_32x4d", "encoder_q.", {}),
    ("resnet101", "", {"width": 0.5}),
]


@pytest.mark.parametrize(("arch", "start", "options"), RESNETS)
def test_a_file_of_a_resnet_says_which_one_it_is(tmp_path, arch, start, options):
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in build_model(arch, **options).state_dict().items()}
    torch.save(
        {f"{start}{n}": torch.zeros(()).expand(s) for n, s in shapes.items()}, tmp_path / "a"
    )
    run_args, said = describe(tmp_path / "a")
    expected = {"stem": "imagenet", "width": 1.0, "in_chans": 3, **options}
    expected["width"] = round(64 * expected["width"]) / 64  # of the channels that there are
    assert run_args == {} and said == {"arch": arch, **expected}
    assert describe(tmp_path / "a", arch)[1] == said
    assert describe(tmp_path / "a", "vgg16")[1] == describe(tmp_path / "a", "vit_tiny")[1] == {}


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "regnet_y_400mf"])
@torch.no_grad()
def test_files_of_torchvision_fit_its_trunks_and_ours(tmp_path, arch):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = models.get_model(arch).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    name = None if arch == "resnet18" else arch
    found = open_pretrained(tmp_path / "theirs.pth", name)
    assert found.arch == arch and found.image_size == 224
    outputs = []
    pooling = theirs.avgpool if hasattr(theirs, "avgpool") else torch.nn.AdaptiveAvgPool2d(1)
    if hasattr(theirs, "avgpool"):
        pooling.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        theirs(images)
    else:
        outputs.append(pooling(theirs.features(images)))
    assert_same(found.model, outputs[0].flatten(1), images)


@pytest.mark.slow
def test_the_weights_of_torchvision_are_fetched_by_name_and_only_then(tmp_path, monkeypatch):
    models = pytest.importorskip("torchvision.models")
    fetched, theirs = [], models.get_model("resnet18").state_dict()

    def fetch(url):
        fetched.append(url)
        torch.save(theirs, tmp_path / "theirs.pth")
        return tmp_path / "theirs.pth"

    monkeypatch.setattr(downloads, "fetch", fetch)
    found = open_pretrained("torchvision:resnet18")
    assert fetched == [models.ResNet18_Weights.DEFAULT.url]
    assert (found.arch, found.imagenet_red, found.run_args) == ("resnet18", IMAGENET_RED, {})
    assert torch.equal(found.model.conv1.weight, theirs["conv1.weight"])
    normalisation = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert {"mean": found.mean, "std": found.std} == normalisation
    assert describe("torchvision:resnet18") == ({}, {"arch": "resnet18", **normalisation})
    with pytest.raises(FileNotFoundError, match="no weights file resnet18"):
        open_pretrained("resnet18")
    with pytest.raises(ValueError, match="torchvision:resnet9000 .* name one"):
        open_pretrained("torchvision:resnet9000")
    assert len(fetched) == 1
    with pytest.raises(CheckpointError, match="torchvision:resnet18.* fits this network"):
        open_pretrained("torchvision:resnet18", "vgg16")
    model = build_model("resnet18", hidden_mlp=8, output_dim=8)
    report = load_weights(model, "torchvision:resnet18", allow_missing=("projection_head",))
    assert len(report.matched) == 120 and report.left_over == ["fc.bias", "fc.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@torch.no_grad()
def test_networks_of_torchvision_see_images_as_its_weights_of_them_do(tmp_path, monkeypatch, name):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    # as torchvision builds it for its weights, which have the auxiliary classifiers
    theirs = models.get_model(
        name, transform_input=True, aux_logits=True, init_weights=False
    ).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    monkeypatch.setattr(downloads, "fetch", lambda url: tmp_path / "theirs.pth")
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    found = open_pretrained(f"torchvision:{name}")
    assert_same(found.model, theirs(images), images)
    assert found.options["transform_input"] is True
    assert to_torchvision(found).options == {"aux_logits": False, "transform_input": True}
    # what is fine-tuned from there goes on so, by the arguments that eval_finetune.py leaves
    (tmp_path / "args.json").write_text(json.dumps({"arch": name, "transform_input": True}))
    assert_same(open_pretrained(tmp_path / "theirs.pth").model, theirs(images), images)
    # a file is of anybody
    (tmp_path / "args.json").unlink()
    theirs.transform_input = False
    assert_same(open_pretrained(tmp_path / "theirs.pth", name).model, theirs(images), images)


@pytest.mark.slow  # loads torchvision
def test_the_weights_of_torchvision_say_how_their_images_are_normalised():
    said = describe("torchvision:efficientnet_v2_l")[1]
    assert said == {"arch": "efficientnet_v2_l", "mean": [0.5] * 3, "std": [0.5] * 3}
    said = describe("torchvision:googlenet")[1]
    assert (said["transform_input"], said["mean"]) == (True, [0.485, 0.456, 0.406])


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ({"scale_mlp_norm": True}, "blocks.0.mlp.norm."),
        ({"qk_norm": True}, "blocks.0.attn.q_norm."),
    ],
)
def test_vision_transformers_of_timm_with_layers_that_ours_lack_are_refused(
    tmp_path, options, layer
):
    timm = pytest.importorskip("timm")
    size = {"depth": 1, "img_size": 32, "embed_dim": 96, "num_heads": 2}
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", **size).eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    assert open_pretrained(tmp_path / "plain.pth", "vit_micro").options["depth"] == 1
    other = timm.create_model("vit_tiny_patch16_224", **size, **options)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(OSError, match=f"layers that this network lacks .*{layer}"):
        open_pretrained(tmp_path / "other.pth", "vit_micro")


def test_arguments_in_a_file_of_others_are_not_taken_for_those_of_a_run(tmp_path):
    state = build_model("resnet10", width=0.125).state_dict()
    torch.save({"model": state, "args": {"arch": "vgg16", "data_path": "theirs"}}, tmp_path / "a")
    run_args, said = describe(tmp_path / "a")
    assert run_args == {} and said["arch"] == "resnet10" and "data_path" not in said


@pytest.mark.parametrize("arch", ["vit_micro", "resnet10"])
@torch.no_grad()
def test_options_of_the_network_that_no_flag_has_go_to_it(tmp_path, arch):
    torch.save(build_backbone(arch).state_dict(), tmp_path / "a")
    found = open_pretrained(tmp_path / "a", drop_path_rate=0.5)
    assert found.arch == arch
    if arch == "vit_micro":
        assert found.model.blocks[-1].drop_path_rate == 0.5


def test_what_is_wrong_is_named(tmp_path):
    torch.save(build_model("resnet10", width=0.125).state_dict(), tmp_path / "a.pth")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("{")
    torch.save({"a": torch.zeros(2)}, tmp_path / "run" / "checkpoint.pth")
    for error, sentence, path, options in (
        (FileNotFoundError, "no weights file .*nowhere", tmp_path / "nowhere", {}),
        (ValueError, "args.json cannot be read", tmp_path / "run", {}),
        (OSError, "none of its .* check --arch", tmp_path / "a.pth", {"arch": "vgg16"}),
        (OSError, "a.pth lacks .* projection_head", tmp_path / "a.pth", {"feature": "embedding"}),
        (ValueError, "--feature scores must be", tmp_path / "a.pth", {"feature": "scores"}),
        (ValueError, "--depth is for vision", tmp_path / "a.pth", {"depth": 3}),
        (ValueError, "--sobel_padding 2 needs --sobel", tmp_path / "a.pth", {"sobel_padding": 2}),
        (ValueError, "--arch resnet9 is not known", "", {"arch": "resnet9"}),
    ):
        with pytest.raises(error, match=sentence):
            open_pretrained(path, **options)


def test_a_file_is_read_once(tmp_path, monkeypatch):
    torch.save(build_model("resnet10", width=0.125).state_dict(), tmp_path / "a.pth")
    reads, read = [], pretrained.read_file
    monkeypatch.setattr(pretrained, "read_file", lambda path: reads.append(path) or read(path))
    open_pretrained(tmp_path / "a.pth")
    assert reads == [tmp_path / "a.pth"]
