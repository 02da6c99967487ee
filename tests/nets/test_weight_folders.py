"""src.nets.weight_folders: folders in the layout of the Hugging Face hub, in one file or in shards."""

import json
import shlex

import pytest
import torch

from src.evaluate import flags as eval_flags
from src.nets.backbones import build_backbone
from src.nets.pretrained import describe, open_pretrained
from src.nets.resnet import build_model
from src.nets.weights import load_weights
from src.run import flags
from tests.nets.test_foreign_names import IMAGES, as_transformers_vit, at_random

LAYOUTS = ["model.safetensors", "pytorch_model.bin"]


def write_folder(folder, state, name, config, shards=1):
    """A folder as save_pretrained of transformers writes it: config.json, the weights or their shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    state = {key: x.detach().contiguous() for key, x in state.items()}
    stem, suffix = name.split(".")
    parts = {f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}": i for i in range(shards)}
    weight_map = {}
    for part, first in ({name: 0} if shards == 1 else parts).items():
        some = dict(list(state.items())[first::shards])
        weight_map |= dict.fromkeys(some, part)
        if suffix == "safetensors":
            save_file = pytest.importorskip("safetensors.torch").save_file
            save_file(some, folder / part, metadata={"format": "pt"})
        else:
            torch.save(some, folder / part)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{name}.index.json").write_text(json.dumps(index))
    return folder


def resnet():
    return at_random(build_model("resnet10", width=0.125))


def vit(heads=3):
    return at_random(
        build_backbone("vit_micro", patch_size=8, img_size=32, depth=2, num_heads=heads)
    )


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_a_folder_of_the_hub_gives_the_features_of_its_network(tmp_path, name, shards):
    source = vit()
    config = {"model_type": "vit", "num_attention_heads": 3, "image_size": 32}
    state = as_transformers_vit(source.state_dict())
    folder = write_folder(tmp_path / "vit-micro", state, name, config, shards)
    found = open_pretrained(folder)
    torch.testing.assert_close(found.model(IMAGES), source(IMAGES), rtol=1e-5, atol=1e-5)
    assert (found.arch, found.run_args, found.path) == ("vit_micro", {}, str(folder))
    file = folder / (name if shards == 1 else f"{name}.index.json")
    torch.testing.assert_close(open_pretrained(file).model(IMAGES), found.model(IMAGES))
    assert describe(str(folder))[1]["patch_size"] == 8


@torch.no_grad()
def test_how_many_heads_there_are_is_said_by_config_json_beside_the_weights(tmp_path):
    source, config = vit(heads=6), {"model_type": "vit", "num_attention_heads": 6}
    state = as_transformers_vit(source.state_dict())
    folder = write_folder(tmp_path / "six", state, "pytorch_model.bin", config)
    shards = write_folder(tmp_path / "shards", state, "pytorch_model.bin", config, shards=2)
    index = shards / "pytorch_model.bin.index.json"
    for path in (folder, folder / "pytorch_model.bin", shards, index):
        found = open_pretrained(path)
        torch.testing.assert_close(found.model(IMAGES), source(IMAGES), rtol=1e-5, atol=1e-5)
        assert describe(path)[1]["num_heads"] == 6
    assert open_pretrained(folder, num_heads=3).model.num_heads == 3  # the caller wins
    (folder / "config.json").write_text("[1, 2]")
    assert open_pretrained(folder).model.num_heads == vit().num_heads
    resnet_folder = write_folder(
        tmp_path / "resnet", resnet().state_dict(), "pytorch_model.bin", config
    )
    assert "num_heads" not in describe(resnet_folder)[1]


def test_a_folder_of_the_hub_is_taken_by_init_from_and_pretrained(tmp_path):
    source, target = resnet(), build_model("resnet10", width=0.125)
    config = {"architecture": "resnet10", "num_classes": 0}  # as timm writes it
    folder = write_folder(tmp_path / "timm", source.state_dict(), "model.safetensors", config)
    assert load_weights(target, folder).missing == []
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    parser = flags.Parser("")
    eval_flags.add_network_args(parser)
    eval_flags.add_image_args(parser)
    flags.add_runtime_args(parser)
    args, run_args = eval_flags.parse_args(parser, ["--pretrained", str(folder)], "eval_knn")
    assert (args.arch, args.width, run_args) == ("resnet10", 0.125, {})
    assert args.dump_path == "runs/eval_knn_digits"  # nothing is written into it


def test_safetensors_win_over_the_older_file_and_a_run_over_both(tmp_path):
    torch.manual_seed(0)
    new, old, of_run = (build_model("resnet10", width=0.125) for _ in range(3))
    folder = write_folder(tmp_path / "both", new.state_dict(), "model.safetensors", {})
    torch.save(old.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(open_pretrained(folder).model.conv1.weight, new.conv1.weight)
    torch.save({"model": of_run.state_dict()}, folder / "checkpoint.pth")
    assert torch.equal(open_pretrained(folder).model.conv1.weight, of_run.conv1.weight)


def hurt_index(folder, **changes):
    file = folder / "pytorch_model.bin.index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, **changes}))


def test_a_folder_that_cannot_be_read_as_weights_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "tf_model.h5").write_text("")
    expected = (
        "empty holds no weights: a run has checkpoint.pth, a folder of the Hugging Face hub "
        "model.safetensors or pytorch_model.bin, or one of these with .index.json behind its name$"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        open_pretrained(tmp_path / "empty")
    folder = write_folder(
        tmp_path / "shards", resnet().state_dict(), "pytorch_model.bin", {}, shards=2
    )
    part = "pytorch_model-00002-of-00002.bin"
    whole = (folder / part).read_bytes()
    (folder / part).unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json names {part}, which is not beside it"):
        open_pretrained(folder)
    torch.save({"another": torch.ones(1)}, folder / part)
    with pytest.raises(OSError, match=rf"index.json names tensors that {part} lacks \(bn1.weight"):
        open_pretrained(folder)
    (folder / part).write_bytes(whole)
    open_pretrained(folder)
    for weight_map in (
        {},
        ["a"],
        {"conv1.weight": 3},
        {"conv1.weight": "../elsewhere.bin"},
        {"conv1.weight": ""},
    ):
        hurt_index(folder, weight_map=weight_map)
        with pytest.raises(OSError, match="index.json .*weight_map"):
            open_pretrained(folder)
    (folder / "pytorch_model.bin.index.json").write_text("{")
    with pytest.raises(OSError, match="index.json cannot be read"):
        open_pretrained(folder)


def test_the_command_says_so_and_leaves_with_status_2(tmp_path, capfd):
    import eval_knn

    (tmp_path / "empty").mkdir()
    words = shlex.split(f"--pretrained {tmp_path / 'empty'} --dump_path {tmp_path / 'out'}")
    with pytest.raises(SystemExit) as exit:
        flags.run(lambda: eval_knn.main(words))
    said = capfd.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(said) == 1 and "empty holds no weights" in said[0]
