"""export.py: files that their libraries load, what export.json and the log say of them, refusals."""

import json
import pickle

import numpy as np
import pytest
import torch
from torchvision import models

import export
from src.data.small_sets import STATISTICS
from src.nets.backbones import build_backbone
from src.nets.dino_head import DINOHead, MultiCropWrapper
from src.nets.pretrained import open_pretrained
from src.nets.resnet import build_model
from src.run import checkpoint
from tests.exports import IMAGES, SWAV_RUN, assert_same, lively

DINO_RUN = {"arch": "vit_tiny", "patch_size": 16, "width": 0.5, "depth": 1, "num_registers": 0}
DINO_RUN |= {"in_chans": 3, "stem": "imagenet", "img_size": None, "global_crops_size": 64}
DINO_RUN |= {"data_path": "cifar10", "mean": None, "std": None}


def make_run(folder, run_args, networks, method):
    state = {name: network.state_dict() for name, network in networks.items()}
    checkpoint.save_checkpoint(folder, {**state, "epoch": 1, "method": method, "args": run_args})
    (folder / "args.json").write_text(json.dumps(run_args))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return lively(
        build_model("resnet18", normalize=True, hidden_mlp=16, output_dim=8, nmb_prototypes=6)
    )


@pytest.fixture
def run(tmp_path, network):
    make_run(tmp_path / "run", {**SWAV_RUN, "arch": "resnet18"}, {"model": network}, "swav")
    return tmp_path / "run"


@pytest.fixture
def dino_run(tmp_path):
    names = ("arch", "patch_size", "width", "depth")
    torch.manual_seed(0)
    backbone = build_backbone(**{name: DINO_RUN[name] for name in names}, img_size=64)
    head = DINOHead(backbone.num_features, 8, nlayers=1, bottleneck_dim=8)
    teacher = lively(MultiCropWrapper(backbone, head))
    make_run(tmp_path / "dino", DINO_RUN, {"student": teacher, "teacher": teacher}, "dino")
    return tmp_path / "dino"


def records(folder):
    return json.loads((folder / "export.json").read_text())


# ============ files ============
@pytest.mark.slow
@torch.no_grad()
def test_a_run_is_exported_beside_itself_in_several_formats_at_once(run, network, capsys):
    expected = network.forward_backbone(IMAGES)
    assert export.main(f"--pretrained {run} --format torchvision detectron2 detr".split()) == 0
    screen = capsys.readouterr().out
    folder = run / "export"
    files = ["resnet18_torchvision.pth", "resnet18_detectron2.pkl", "resnet18_detr.pth"]
    assert {path.name for path in folder.iterdir()} == {*files, "export.json"}

    target = models.resnet18(weights=None).eval()
    state = torch.load(folder / files[0], weights_only=True)
    assert target.load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    target.fc = torch.nn.Identity()
    assert_same(target(IMAGES), expected)

    pickled = pickle.loads((folder / files[1]).read_bytes())  # noqa: S301
    assert set(pickled) == {"model", "__author__", "matching_heuristics"}
    assert pickled["matching_heuristics"] is True
    assert all(type(x) is np.ndarray for x in pickled["model"].values())
    assert np.array_equal(pickled["model"]["stem.conv1.weight"], state["conv1.weight"].numpy())

    detr = torch.load(folder / files[2], weights_only=True)["model"]
    assert torch.equal(detr["backbone.0.body.bn1.running_var"], state["bn1.running_var"])

    said = records(folder)
    assert list(said) == files
    for name in files:
        assert said[name]["arch"] == "resnet18" and said[name]["num_features"] == 512
        assert (said[name]["image_size"], said[name]["mean"]) == (64, [0.485, 0.456, 0.406])
        assert said[name]["std"] == [0.228, 0.224, 0.225]
    assert said[files[0]]["missing"] == ["fc.weight", "fc.bias"]
    settings = said[files[1]]["settings"]
    assert settings["MODEL.PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert settings["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    assert "torchvision: without fc.weight, fc.bias" in screen
    assert "mean [0.485, 0.456, 0.406], std [0.228, 0.224, 0.225]" in screen
    assert "features_of_model" not in said[files[0]]


@torch.no_grad()
def test_a_narrow_run_says_which_features_of_torchvisions_network_are_its_own(tmp_path, capsys):
    torch.manual_seed(0)
    network = lively(build_model("resnet18", width=0.25))
    flags = {**SWAV_RUN, "arch": "resnet18", "width": 0.25}
    make_run(tmp_path / "run", flags, {"model": network}, "swav")
    argv = f"--pretrained {tmp_path / 'run'} --format torchvision --zero_classifier"
    assert export.main(argv.split()) == 0
    folder = tmp_path / "run" / "export"
    target = models.resnet18(weights=None).eval()
    target.load_state_dict(torch.load(folder / "resnet18_torchvision.pth", weights_only=True))
    target.fc = torch.nn.Identity()
    assert_same(target(IMAGES)[:, :128], network.forward_backbone(IMAGES))
    said = records(folder)["resnet18_torchvision.pth"]
    assert (said["num_features"], said["features_of_model"]) == (128, 512)
    assert (
        "512 features: first the 128 of the network, which is narrower" in capsys.readouterr().out
    )


@torch.no_grad()
def test_a_run_of_dino_goes_to_timm_by_the_name_in_the_log(dino_run, capsys):
    timm = pytest.importorskip("timm")
    assert export.main(f"--pretrained {dino_run} --format timm".split()) == 0
    screen = capsys.readouterr().out
    said = records(dino_run / "export")["vit_tiny_timm.pth"]
    assert f"timm: for {said['model']}, img_size=64" in screen
    target = timm.create_model(said["model"], num_classes=0, **said["model_options"]).eval()
    target.load_state_dict(torch.load(dino_run / "export" / "vit_tiny_timm.pth", weights_only=True))
    assert_same(target(IMAGES), open_pretrained(dino_run).model(IMAGES))
    mean, std = STATISTICS["cifar10"]  # of the data that the run was trained on
    assert (said["mean"], said["std"]) == (list(mean), list(std))


@pytest.mark.slow
@torch.no_grad()
def test_safetensors_say_what_images_are_like_and_are_read_by_the_evaluations(run, network):
    safetensors = pytest.importorskip("safetensors")
    path = run / "trunk.safetensors"
    assert export.main(f"--pretrained {run} --format safetensors --output {path}".split()) == 0
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["arch"], metadata["image_size"]) == ("resnet18", "64")
    assert json.loads(metadata["std"]) == [0.228, 0.224, 0.225]
    copied = run.parent / "elsewhere.safetensors"
    copied.write_bytes(path.read_bytes())
    assert_same(open_pretrained(copied).model(IMAGES), network.forward_backbone(IMAGES))


@pytest.mark.slow
@torch.no_grad()
def test_programs_are_checked_and_give_the_features_of_the_network(dino_run, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert export.main(f"--pretrained {dino_run} --format torch_export onnx".split()) == 0
    screen = capsys.readouterr().out
    folder = dino_run / "export"
    expected = open_pretrained(dino_run).model(IMAGES)
    program = torch.export.load(str(folder / "vit_tiny.pt2")).module()
    assert_same(program(IMAGES), expected)
    session = pytest.importorskip("onnxruntime").InferenceSession(folder / "vit_tiny.onnx")
    assert_same(torch.tensor(session.run(None, {"images": IMAGES.numpy()})[0]), expected)
    for kind, name in (("torch_export", "vit_tiny.pt2"), ("onnx", "vit_tiny.onnx")):
        assert records(folder)[name]["images"] == ["batch", 3, "height", "width"]
        assert records(folder)[name]["difference"] <= 1e-5
        assert f"{kind}: checked at 1 and 3 images of 64 x 64 and 96 x 128 px" in screen


@pytest.mark.slow
def test_a_network_of_one_size_says_so(tmp_path, capsys):
    torch.save(models.vit_b_32(weights=None).state_dict(), tmp_path / "vit.pth")
    argv = f"--pretrained {tmp_path / 'vit.pth'} --arch vit_b_32 --format torch_export"
    assert export.main(f"{argv} --output {tmp_path / 'vit.pt2'}".split()) == 0
    screen = capsys.readouterr().out
    assert "takes any number of images of 224 px only" in screen
    assert records(tmp_path)["vit.pt2"]["images"] == ["batch", 3, 224, 224]


@pytest.mark.slow
def test_an_onnx_file_that_is_wrong_at_other_sizes_is_written_for_one(tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    # torch 2.14 writes the pooling to 6 x 6 cells of AlexNet for one size only, without a word.
    network = lively(build_backbone("alexnet", sobel=True, width=0.0625))
    torch.save(network.state_dict(), tmp_path / "alexnet.pth")
    argv = f"--pretrained {tmp_path / 'alexnet.pth'} --size 96 --format onnx"
    assert export.main(f"{argv} --output {tmp_path / 'alexnet.onnx'}".split()) == 0
    screen = capsys.readouterr().out
    said = records(tmp_path)["alexnet.onnx"]
    assert said["difference"] <= 1e-5
    if said["images"][2] == 96:
        assert "onnx: not for images of any size: the exported network and the one here" in screen
        assert "onnx: takes any number of images of 96 px only" in screen


# ============ where files lie ============
@pytest.mark.slow
def test_a_file_is_exported_to_the_folder_export_here_or_to_output(tmp_path, network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(network.state_dict(), "file.pth")
    argv = "--pretrained file.pth --format detr"
    assert export.main(argv.split()) == 0
    assert (tmp_path / "export" / "resnet18_detr.pth").exists()
    assert export.main(f"{argv} --output out/mine.pth".split()) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mine.pth", "export.json"}


@pytest.mark.slow
def test_what_export_json_says_of_other_files_stays_while_they_are_there(run):
    for kind in ("torchvision", "detr"):
        assert export.main(f"--pretrained {run} --format {kind}".split()) == 0
    folder = run / "export"
    assert list(records(folder)) == ["resnet18_torchvision.pth", "resnet18_detr.pth"]
    (folder / "resnet18_torchvision.pth").unlink()
    assert export.main(f"--pretrained {run} --format timm".split()) == 0
    assert list(records(folder)) == ["resnet18_detr.pth", "resnet18_timm.pth"]


def test_normalisation_on_the_command_line_wins(run):
    argv = f"--pretrained {run} --format detr --mean 0.1 0.2 0.3 --std 1 1 1 --size 96"
    assert export.main(argv.split()) == 0
    said = records(run / "export")["resnet18_detr.pth"]
    assert (said["mean"], said["std"], said["image_size"]) == ([0.1, 0.2, 0.3], [1, 1, 1], 96)


# ============ refusals ============
@pytest.mark.parametrize(
    "argv, words",
    [
        ("--format torchvision", "--pretrained is needed: an untrained network"),
        ("--pretrained RUN", "--format is needed: one or several of torchvision, timm"),
        ("--pretrained RUN --format timm detr --output x.pth", "--output x.pth is one file"),
        ("--pretrained RUN --format detr --output export.json", "must be the name of a file"),
        ("--pretrained RUN --format timm --zero_classifier", "is for --format torchvision"),
        ("--pretrained RUN --format timm --mean 0.5", "--mean has 1 values and --in_chans is 3"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_the_flag(run, argv, words):
    with pytest.raises(ValueError, match=words):
        export.main(argv.replace("RUN", str(run)).split())


def test_nothing_is_written_where_one_of_the_formats_is_not_for_the_network(dino_run):
    with pytest.raises(ValueError, match="--format detr .* --arch vit_tiny has no counterpart"):
        export.main(f"--pretrained {dino_run} --format timm detr".split())
    assert not (dino_run / "export").exists()


def test_packages_that_are_not_there_are_named(run, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    for kind, packages in (("onnx", "onnx and onnxscript"), ("safetensors", "safetensors")):
        with pytest.raises(ValueError, match=f"--format {kind} needs the packages? {packages}"):
            export.main(f"--pretrained {run} --format {kind}".split())
