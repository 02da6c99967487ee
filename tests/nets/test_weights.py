"""Weights of every published kind of file, matched by name and shape, and nothing run from them."""

import argparse
import importlib.util
import logging
import os

import numpy as np
import pytest
import torch
import torch.nn as nn

from src.nets.convnets import build_convnet
from src.nets.resnet import build_model
from src.nets.weights import CheckpointError, load_weights, read_weights
from src.run.checkpoint import save_checkpoint

HEAD = ("projection_head", "prototypes")


def network(num_prototypes=5, width=4):
    return nn.ModuleDict(
        {
            "conv1": nn.Conv2d(3, width, 3, bias=False),
            "bn1": nn.BatchNorm2d(width),
            "projection_head": nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 4)),
            "prototypes": nn.Linear(4, num_prototypes, bias=False),
        }
    )


def trunk(width=4):
    whole = network(width=width)
    return nn.ModuleDict({name: whole[name] for name in ("conv1", "bn1")})


def prefixed(prefix, module):
    return {prefix + name: value for name, value in module.state_dict().items()}


def equal(state, module, prefix=""):
    own = module.state_dict()
    return all(torch.equal(own[name.removeprefix(prefix)], value) for name, value in state.items())


# ============ files ============


def test_released_swav_files_with_and_without_module(tmp_path):
    source, target = network(), network()
    torch.save(prefixed("module.", source), tmp_path / "swav.pth.tar")
    # the released files are older than PyTorch's zip format
    torch.save(
        {"state_dict": prefixed("module.", source), "epoch": 400, "arch": "resnet50"},
        tmp_path / "old.pth.tar",
        _use_new_zipfile_serialization=False,
    )
    for name in ("swav.pth.tar", "old.pth.tar"):
        assert equal(read_weights(tmp_path / name), source)
        report = load_weights(target, tmp_path / name)
        assert (report.missing, report.left_over, report.wrong_shape) == ([], [], [])
        assert len(report.matched) == len(target.state_dict()) and equal(
            target.state_dict(), source
        )


def test_checkpoints_of_this_repository_by_file_and_by_folder(tmp_path):
    source, target = network(), network()
    save_checkpoint(tmp_path, {"model": source.state_dict(), "epoch": 1}, keep_as="ckp-1")
    for path in (tmp_path, tmp_path / "checkpoint.pth", tmp_path / "checkpoints" / "ckp-1.pth"):
        assert equal(read_weights(path), source)
    assert load_weights(target, tmp_path).missing == []


def dino_file(path, **options):
    """The layout of DINO's training checkpoints: sections, a Namespace, numpy learning rates."""
    teacher, student = trunk(), trunk()
    head = {"mlp.0.weight": torch.ones(3, 3), "last_layer.weight_g": torch.ones(3, 1)}
    state = {
        "student": prefixed("module.backbone.", student)
        | {f"module.head.{name}": value for name, value in head.items()},
        "teacher": prefixed("backbone.", teacher) | {f"head.{n}": v for n, v in head.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(5e-4), "betas": (0.9, 0.9)}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit", lr=np.float32(1), seed=np.int64(3), x=np.True_),
        "dino_loss": {"center": torch.zeros(1, 3)},
    }  # fmt: skip
    torch.save(state, path, **options)
    return teacher, student


def test_dino_training_checkpoints(tmp_path):
    teacher, student = dino_file(tmp_path / "dino.pth")
    target = trunk()
    report = load_weights(target, tmp_path / "dino.pth")  # the teacher, unless told otherwise
    assert report.left_over == ["head.last_layer.weight_g", "head.mlp.0.weight"]
    assert equal(target.state_dict(), teacher)
    load_weights(target, tmp_path / "dino.pth", checkpoint_key="student")
    assert equal(target.state_dict(), student)
    both = nn.ModuleDict({"backbone": trunk()})  # a network that keeps its trunk under a name
    assert load_weights(both, tmp_path / "dino.pth").missing == []
    with pytest.raises(ValueError, match="--checkpoint_key encoder is not in .*: student, teacher"):
        read_weights(tmp_path / "dino.pth", "encoder")


def test_files_that_an_older_numpy_wrote(tmp_path):
    path = tmp_path / "dino.pth"
    dino_file(path, _use_new_zipfile_serialization=False)
    contents = path.read_bytes()
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        path.write_bytes(
            contents.replace(b"numpy._core.multiarray", name).replace(
                b"numpy.core.multiarray", name
            )
        )
        assert name + b"\nscalar" in path.read_bytes()
        assert "bn1.weight" in load_weights(trunk(), path).matched


def test_torchvision_and_moco_files(tmp_path):
    source, target = trunk(), network()
    flat = source.state_dict() | {"fc.weight": torch.ones(10, 4), "fc.bias": torch.ones(10)}
    torch.save(flat, tmp_path / "resnet.pth")
    report = load_weights(target, tmp_path / "resnet.pth", allow_missing=HEAD)
    assert report.left_over == ["fc.bias", "fc.weight"]
    assert all(name.startswith(HEAD) for name in report.missing) and len(report.missing) == 5
    assert equal(source.state_dict(), target)
    torch.save({"model": flat, "args": {"lr": 1}}, tmp_path / "references.pth")
    assert "fc.bias" in read_weights(tmp_path / "references.pth")
    moco = prefixed("module.encoder_q.", source) | prefixed("module.encoder_k.", trunk())
    torch.save({"state_dict": moco}, tmp_path / "moco.pth")
    target = trunk()
    assert len(load_weights(target, tmp_path / "moco.pth").left_over) == len(source.state_dict())
    assert equal(target.state_dict(), source)


def released_classifier(kind, arch):
    """A narrow network and its file as released; what follows its trunk is called differently."""
    torch.manual_seed(0)
    padding = 1 if kind == "deepcluster" else 2
    source = build_convnet(arch, 5, sobel=True, sobel_padding=padding, width=1 / 16)
    state, start = {}, "" if kind == "deepcluster" else "module."
    for name, value in source.state_dict().items():
        if kind == "deepcluster":  # the convolutions alone were in DataParallel
            name = name.replace("features.", "features.module.")
        elif not name.startswith("sobel."):
            name = name.replace("top_layer.", "pred_layer.")
            name = name if name.startswith("pred_layer.") else f"body.{name}"
        state[start + name] = value
    optimizer = {"state": {}, "param_groups": [{"lr": 0.05}]}
    return source, {"epoch": 3, "arch": arch, "state_dict": state, "optimizer": optimizer}


@pytest.mark.parametrize("arch", ["alexnet", "vgg16"])
@pytest.mark.parametrize("kind", ["deepcluster", "deepercluster"])
@pytest.mark.parametrize("zip_format", [True, False])
def test_released_classifiers_of_clusters(kind, arch, zip_format, tmp_path):
    source, released = released_classifier(kind, arch)
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(released, path, _use_new_zipfile_serialization=zip_format)
    target = build_convnet(arch, sobel=True, width=1 / 16)
    target.sobel.requires_grad_(False)[0].weight.zero_()  # the filters are loaded as well
    report = load_weights(target, path)
    top = "top_layer" if kind == "deepcluster" else "pred_layer"
    assert report.left_over == [f"{top}.bias", f"{top}.weight"]
    assert (report.missing, report.wrong_shape) == ([], [])
    assert equal(target.state_dict(), source)
    if kind == "deepercluster":
        target = nn.ModuleDict({"backbone": build_convnet(arch, sobel=True, width=1 / 16)})
        assert load_weights(target, path).missing == []
        return
    target = build_convnet(arch, 5, sobel=True, width=1 / 16)
    assert load_weights(target, path).left_over == []
    target = build_convnet(arch, 7, sobel=True, width=1 / 16)  # other clusters than the file's
    report = load_weights(target, path, allow_missing=("top_layer",))
    assert report.wrong_shape == ["top_layer.weight", "top_layer.bias"]
    with pytest.raises(CheckpointError, match="lacks 2 of the .*top_layer.weight"):
        load_weights(target, path)


def test_resnets_go_from_classifiers_of_clusters_to_other_methods_and_back(tmp_path):
    options = {"stem": "small", "width": 1 / 16}
    source = build_convnet("resnet10", 5, **options)
    save_checkpoint(tmp_path, {"model": source.state_dict(), "epoch": 1})
    head = {"normalize": True, "output_dim": 8, "hidden_mlp": 8, "nmb_prototypes": 3}
    swav = build_model("resnet10", **options, **head)
    report = load_weights(swav, tmp_path, allow_missing=HEAD)
    assert report.left_over == ["top_layer.bias", "top_layer.weight"]
    assert equal(source.trunk.state_dict(), swav)

    path, other = tmp_path / "swav.pth", build_convnet("resnet10", 7, **options)
    torch.save(prefixed("module.", build_model("resnet10", **options, **head)), path)
    report = load_weights(other, path, allow_missing=("top_layer",))
    assert report.missing == ["top_layer.weight", "top_layer.bias"]
    assert equal(other.trunk.state_dict(), source.trunk) is False
    assert len(report.matched) == len(source.trunk.state_dict())
    # a run under Sobel filters, into the same network of another method with other classes
    source = build_convnet("resnet10", 5, sobel=True, **options)
    save_checkpoint(tmp_path, {"model": source.state_dict(), "epoch": 1})
    other = build_convnet("resnet10", 7, sobel=True, **options)
    load_weights(other, tmp_path, allow_missing=("top_layer",))
    assert equal(source.trunk.state_dict(), other.trunk)
    state = {n.replace("trunk.", "body."): x for n, x in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "body.pth")
    other = build_convnet("resnet10", sobel=True, **options)
    assert load_weights(other, tmp_path / "body.pth").missing == []
    assert equal(source.trunk.state_dict(), other.trunk)
    with pytest.raises(CheckpointError, match=r"conv1.weight"):  # of two channels, not three
        load_weights(swav, tmp_path, allow_missing=HEAD)


def test_a_bare_trunk_goes_into_a_network_that_keeps_it_under_a_name(tmp_path):
    source, target = trunk(), nn.ModuleDict({"backbone": trunk(), "head": nn.Linear(2, 2)})
    torch.save(source.state_dict(), tmp_path / "a.pth")
    report = load_weights(target, tmp_path / "a.pth", allow_missing=("head",))
    assert report.missing == ["head.weight", "head.bias"] and report.left_over == []
    assert equal(source.state_dict(), target["backbone"])


def test_files_without_counters_of_batches(tmp_path):
    source = trunk().state_dict()
    del source["bn1.num_batches_tracked"]  # files older than PyTorch 0.4.1
    torch.save(source, tmp_path / "old.pth")
    assert load_weights(trunk(), tmp_path / "old.pth").missing == []


def test_weights_go_into_a_wrapped_network(tmp_path):
    source, target = network(), network()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    load_weights(nn.DataParallel(target), tmp_path / "a.pth")
    assert equal(target.state_dict(), source)


def test_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    if importlib.util.find_spec("safetensors") is None:
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="pip install safetensors"):
            read_weights(path)
        return
    from safetensors.torch import save_file

    source = trunk()
    save_file(source.state_dict(), path)
    assert equal(read_weights(path), source)


@pytest.mark.parametrize("start", ["", "backbone.", "model.backbone."])
@pytest.mark.parametrize("first_stage", [4, 2])  # torchvision's networks have a ReLU and a pooling
def test_resnets_without_names_as_lightly_keeps_them(tmp_path, start, first_stage):
    source, target = resnet(), resnet()
    numbers = {"conv1": 0, "bn1": 1} | {f"layer{i + 1}": first_stage + i for i in range(4)}
    state = {"projection_head.layers.0.weight": torch.ones(3, 3)}
    for name, value in source.state_dict().items():
        part, rest = name.split(".", 1)
        state[f"{start}{numbers[part]}.{rest}"] = value
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "lightly.ckpt")
    report = load_weights(target, tmp_path / "lightly.ckpt")
    assert report.missing == [] and report.left_over == ["projection_head.layers.0.weight"]
    assert equal(source.state_dict(), target)


def test_a_file_with_sections_of_other_names_is_told_which_to_ask_for(tmp_path):
    source, target = trunk(), trunk()
    sections = {"encoder": source.state_dict(), "target_encoder": trunk().state_dict()}
    torch.save({"opt": {"lr": 1.0}, **sections, "epoch": 3}, tmp_path / "jepa.pth")
    words = "sections encoder, target_encoder: .*--checkpoint_key encoder$"
    with pytest.raises(ValueError, match=words) as error:
        load_weights(target, tmp_path / "jepa.pth")
    assert type(error.value) is ValueError and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=words):  # a section without tensors is of no use
        load_weights(target, tmp_path / "jepa.pth", "opt")
    load_weights(target, tmp_path / "jepa.pth", "encoder")
    assert equal(source.state_dict(), target)


# ============ layers that the network lacks ============
def resnet(**options):
    return build_model("resnet18", stem="small", width=1 / 16, **options)


@pytest.mark.parametrize(
    "extra",
    [
        "layer1.0.se.fc1.weight",  # squeeze and excitation in a block
        "layer4.2.conv1.weight",  # a further block
        "layer5.0.conv1.weight",  # a further stage
        "conv1.bias",
        "norm_pre.weight",
        "reg_token",
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.backbone.", "trunk."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_layers_that_the_network_lacks_are_refused_by_name(
    extra, prefix, wrapped, tmp_path
):
    source, target = resnet(), nn.ModuleDict({"trunk": resnet()}) if wrapped else resnet()
    torch.save(prefixed(prefix, source) | {prefix + extra: torch.ones(3)}, tmp_path / "a.pth")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"layers that this network lacks .*{extra}.*--arch"):
        load_weights(target, tmp_path / "a.pth")
    assert equal(before, target)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_what_comes_after_the_features_or_stands_beside_them_may_be_left_over(prefix, tmp_path):
    source, target = resnet(), resnet()
    beside = ["mask_token", "decoder_blocks.0.norm1.weight", "decoder_pos_embed", "fc.weight"]
    beside += ["head.mlp.0.weight", "projector.layers.0.weight", "predictor.0.weight", "queue"]
    beside += ["projection_head.2.weight", "prototypes.weight", "top_layer.weight", "fc_norm.bias"]
    beside += ["classifier.2.weight", "heads.head.weight", "layer1.0.total_ops", "head_dist.bias"]
    extra = {prefix + name: torch.ones(3) for name in beside}
    extra |= {"momentum_encoder.layer1.0.se.fc1.weight": torch.ones(3)}
    torch.save(prefixed(prefix, source) | extra, tmp_path / "a.pth")
    report = load_weights(target, tmp_path / "a.pth")
    assert report.left_over == sorted(extra) and equal(source.state_dict(), target)


def test_a_head_that_may_be_missing_may_also_have_more_layers_in_the_file(tmp_path):
    source = network()
    source["projection_head"].append(nn.Linear(4, 4))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    report = load_weights(network(), tmp_path / "a.pth", allow_missing=HEAD)
    assert report.left_over == ["projection_head.3.bias", "projection_head.3.weight"]
    with pytest.raises(CheckpointError, match="projection_head.3.bias"):
        load_weights(network(), tmp_path / "a.pth", allow_missing=("prototypes",))


# ============ what must not pass ============


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.where,)


def test_no_file_runs_code(tmp_path):
    evil = Evil()
    evil.where = str(tmp_path / "owned")
    torch.save({"state_dict": trunk().state_dict(), "x": evil}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_what_is_not_a_file_of_weights_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no weights file .*nowhere.pth"):
        read_weights(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="checkpoint.pth"):
        read_weights(tmp_path)  # a folder that is no run
    (tmp_path / "text.pth").write_text("<html>404 Not Found</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save(trunk().state_dict(), tmp_path / "half.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "half.pth").read_bytes()[:500])
    torch.save({"a": torch.ones(10000)}, tmp_path / "flipped.pth")
    contents = bytearray((tmp_path / "flipped.pth").read_bytes())
    contents[len(contents) // 2] ^= 1  # one bit of a tensor
    (tmp_path / "flipped.pth").write_bytes(contents)
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    for name in ("text", "empty", "half", "flipped", "numbers", "tensor"):
        with pytest.raises(CheckpointError, match=f"{name}.pth") as error:
            read_weights(tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "target", "allowed", "words"),
    [
        (nn.Linear(3, 3), network(), HEAD, "none of its 2 tensors (weight, bias) fits"),
        (trunk(), network(), (), "lacks 5 of the 11 tensors"),
        (trunk(), network(), ("prototypes",), "projection_head.0.weight"),
        (network(), network(num_prototypes=7), ("projection_head",), "prototypes.weight"),
        (trunk(width=6), network(), HEAD, "none of its 6"),  # but the counter
    ],
)
def test_weights_that_do_not_fit_stop_and_change_nothing(source, target, allowed, words, tmp_path):
    torch.save(source.state_dict(), tmp_path / "a.pth")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=".") as error:
        load_weights(target, tmp_path / "a.pth", allow_missing=allowed)
    assert words in str(error.value) and "--arch" in str(error.value)
    assert equal(before, target)


def test_what_matched_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save(network().state_dict() | {"fc.bias": torch.ones(2)}, tmp_path / "a.pth")
    report = load_weights(network(num_prototypes=7), tmp_path / "a.pth", allow_missing=HEAD)
    assert report.wrong_shape == ["prototypes.weight"]
    assert "matched 10 of 11 tensors; missing: none; left over: fc.bias; " in caplog.text
    assert "wrong shape: prototypes.weight (5, 4) for (7, 4)" in caplog.text
