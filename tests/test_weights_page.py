"""docs/weights.md: its snippets run as they stand, on a run, and give the features of its network."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import export
from src.nets.resnet import build_model
from src.run import checkpoint
from tests.exports import IMAGES, SWAV_RUN, TinyDETR, assert_same, lively

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "weights.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
# What cannot be executed here, with the reason.
NOT_EXECUTED = {
    "Released weights": "downloads them",
    "Detectron2": "is not installed",
}


def sections():
    """The blocks of code below each heading: {heading: [(language, code), ...]}."""
    parts = re.split(r"^##+ (.*)\n", PAGE, flags=re.M)[1:]
    return {title: BLOCK.findall(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}


def snippets(title):
    """The snippets of Python below a heading."""
    found = [code for language, code in sections()[title] if language == "python"]
    assert found, title
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs/mine, a ResNet-50, and what the page exports of it but for programs."""
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    network = lively(
        build_model("resnet50", normalize=True, hidden_mlp=16, output_dim=8, nmb_prototypes=6)
    )
    arguments = {**SWAV_RUN, "arch": "resnet50"}
    state = {"model": network.state_dict(), "epoch": 1, "method": "swav", "args": arguments}
    checkpoint.save_checkpoint(folder / "runs" / "mine", state)
    (folder / "runs" / "mine" / "args.json").write_text(json.dumps(arguments))
    with torch.no_grad():
        features = network.forward_backbone(IMAGES)
    return folder, features


@pytest.fixture
def execute(folder, monkeypatch):
    """A function that executes the snippets of some headings, one after the other; returns their names."""
    monkeypatch.chdir(folder[0])

    def run(*titles, **names):
        names = {"images": IMAGES, **names}
        with torch.no_grad():
            for title in titles:
                for code in snippets(title):
                    exec(code.replace("/path/to/this/repository", str(ROOT)), names)
        return names

    return run


def export_as_the_page_says(*formats):
    """The command of the page that writes these formats."""
    block = next(code for language, code in sections()["In other libraries"] if language == "bash")
    line = next(line for line in block.splitlines() if line.endswith(" ".join(formats)))
    assert export.main(shlex.split(line)[2:]) == 0


def test_every_snippet_is_executed_or_excused():
    tested = set(re.findall(r'"([^"\n]+)"', Path(__file__).read_text()))
    for title, blocks in sections().items():
        has_snippets = "python" in [language for language, _ in blocks]
        assert not has_snippets or title in tested, title
    for title in NOT_EXECUTED:
        for code in snippets(title):
            compile(code, title, "exec")


@pytest.mark.slow
def test_a_run_is_loaded_by_torch_hub_and_by_torch_load(execute, folder):
    names = execute("A trained network by its folder")
    assert_same(names["features"], folder[1])
    weights = execute("A checkpoint with `torch.load`", torch=torch)["weights"]
    assert torch.equal(weights["conv1.weight"], names["trunk"].conv1.weight)


@pytest.mark.slow
def test_torchvision_timm_safetensors_and_detr_take_what_is_exported(execute, folder):
    for package in ("timm", "safetensors"):
        pytest.importorskip(package)
    execute()  # into the folder
    export_as_the_page_says("torchvision", "timm", "safetensors", "detectron2", "detr")
    names = execute("torchvision", "torchvision's Faster R-CNN")
    assert_same(names["features"], folder[1])
    assert_same(names["backbone"].body(IMAGES)["3"].mean((2, 3)), folder[1])
    boxes = names["detector"].eval()([IMAGES[0]])
    assert set(boxes[0]) == {"boxes", "labels", "scores"}
    names = execute("timm", json=json, torch=torch)
    assert_same(names["features"], folder[1])
    names = execute("safetensors", json=json)
    assert names["image_size"] == 64 and "layer4.2.conv3.weight" in names["tensors"]
    detr = TinyDETR().eval()
    execute("DETR", torch=torch, detr=detr)
    assert_same(detr(IMAGES), folder[1])


@pytest.mark.slow
def test_programs_are_loaded_as_the_page_says(execute, folder):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    execute()  # into the folder
    export_as_the_page_says("torch_export", "onnx")
    first, second = snippets("torch.export and ONNX")
    for code in (first, second):
        names = {"images": IMAGES, "torch": torch}
        exec(code, names)
        assert_same(torch.as_tensor(names["features"]), folder[1])
