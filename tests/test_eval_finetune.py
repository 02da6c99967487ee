"""eval_finetune.py: recipes, whole evaluations, multi-crop, resumed, on two processes, misused."""

import json
import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_finetune
from src import dist
from src.evaluate import finetuning
from src.nets.convnets import build_convnet
from src.nets.pretrained import open_pretrained
from src.nets.resnet import build_model
from src.run import flags
from tests.gloo import run_ranks
from tests.runs import changed_images, signal_handlers, write_noise  # noqa: F401, used by name

NETWORK = shlex.split("--arch resnet10 --stem small --width 0.125 --size 8")
QUICK = shlex.split("--workers 0 --device cpu --epochs 2 --log_freq 2 --lr 0.05 --batch_size 8")
VIT = "--arch vit_micro --width 0.25 --depth 2 --patch_size 4 --size 8 --protocol deit".split()
# Everything that draws, and the average of the weights.
ALL = (
    "--ema_decay 0.8 --layer_decay 0.7 --drop_path_rate 0.2 --clip_grad 1 --repeated_aug 2".split()
)


@pytest.fixture(autouse=True)
def handlers(signal_handlers):  # noqa: F811
    """Those of before, after every test."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """train/ with 12 + 12 and val/ with 5 + 4 images: blue and red noise."""
    folder = tmp_path_factory.mktemp("images")
    return write_noise(folder, {"train": (12, 12), "val": (5, 4)})


def run(folder, images, *argv, network=NETWORK, name="eval_finetune"):
    """Results of main() in this process."""
    words = [*QUICK, *network, "--data_path", str(images), "--dump_path", str(folder)]
    assert eval_finetune.main([*words, *map(str, argv)]) == 0
    return json.loads((Path(folder) / f"{name}.json").read_text())


def saved(folder, name="finetune"):
    return torch.load(Path(folder) / name / "checkpoint.pth", weights_only=True)


def of(argv):
    return eval_finetune.parse_args(shlex.split(f"--data_path /imagenet {argv}"))


# ============ the recipes ============
def test_a_vision_transformer_has_the_recipe_of_deit():
    args = of("--arch vit_small")
    published = {
        "protocol": "deit",
        **{"epochs": 300, "batch": 1024, "optimizer": "adamw", "lr": 5e-4, "wd": 0.05},
        **{"lr_reference_batch": 512, "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5},
        **{"smoothing": 0.1, "drop_path_rate": 0.1, "randaugment": 2, "magnitude": 27},
        **{"mixup": 0.8, "cutmix": 1.0, "reprob": 0.25, "repeated_aug": 3},
        **{"scheduler": "cosine", "ema_decay": None, "layer_decay": 1.0, "nmb_crops": [1]},
        **{"interpolation": "bicubic", "min_scale_crops": [0.08], "max_scale_crops": [1.0]},
        **{"color_jitter": [0.0], "grayscale": 0.0, "blur": [0.0], "size_crops": [224]},
    }
    assert {name: getattr(args, name) for name in published} == published
    assert of("--arch vit_small --mixup 0 --epochs 100").mixup == 0
    plan = eval_finetune.make_plan(args, 10, 1024, 1e-3)
    factors = [plan.lr_factor(t) for t in range(3000)]
    assert factors[0] == pytest.approx(1e-3) and max(factors) == factors[50] == 1.0
    assert factors[-1] == pytest.approx(0.01, abs=1e-4) and plan.label_smoothing == 0.1


def test_vgg_has_the_recipe_of_deepercluster_and_others_that_of_resnets():
    args = of("--arch vgg16")
    assert (args.protocol, args.epochs, args.batch_size, args.lr, args.wd) == (
        *("deepercluster", 100),
        *(128, 0.05, 1e-5),
    )
    plan = eval_finetune.make_plan(args, 10, 128, 0.05)
    factors = [plan.lr_factor(t) for t in (0, 299, 300, 600, 999)]
    assert factors == pytest.approx([1, 1, 0.1, 0.01, 0.001]) and args.lr_reference_batch == 0
    args = of("--arch resnet50")
    assert (args.protocol, args.epochs, args.batch, args.lr, args.wd) == (
        *("resnet", 200),
        *(256, 0.1, 1e-4),
    )
    assert (args.mixup, args.randaugment, args.repeated_aug, args.optimizer) == (0, 0, 1, "sgd")


def test_several_crops_are_those_of_the_training_scripts():
    args = of("--arch resnet50 --from_scratch --nmb_crops 2 6")
    assert (args.size_crops, args.color_jitter) == ([224, 96], [0.8, 0.8, 0.8, 0.2])
    assert (args.min_scale_crops, args.max_scale_crops) == ([0.08, 0.05], [1.0, 0.14])
    assert of("--nmb_crops 2 --min_scale_crops 0.14 --size_crops 160").min_scale_crops == [0.14]


def test_stochastic_depth_is_of_networks_that_can_have_it():
    for arch in ("vit_small", "timm:vit_small_patch16_224"):
        assert of(f"--arch {arch}").drop_path_rate == 0.1
        assert of(f"--arch {arch} --drop_path_rate 0.3").drop_path_rate == 0.3
        eval_finetune.check_args(of(f"--arch {arch} --drop_path_rate 0.3 --device cpu"))
    args = of("--arch vit_b_16")  # torchvision's
    assert (args.protocol, args.drop_path_rate) == ("deit", 0.0)


@pytest.mark.slow  # loads timm
@pytest.mark.parametrize("words", ["", "--from_scratch"])
def test_networks_of_timm_are_fine_tuned_with_stochastic_depth(words):
    pytest.importorskip("timm")

    def opened(argv):
        args = of(f"--protocol deit --size 64 {argv} {words}")
        network = eval_finetune.open_network(args)
        layers = [x for x in network.model.modules() if type(x).__name__ == "DropPath"]
        return args.drop_path_rate, max((layer.drop_prob for layer in layers), default=None)

    assert opened("--arch timm:test_vit") == pytest.approx((0.1, 0.1))
    assert opened("--arch timm:test_vit --drop_path_rate 0.3") == pytest.approx((0.3, 0.3))
    assert opened("--arch timm:dla46_c") == (0.0, None)  # which timm has without
    with pytest.raises(ValueError, match="which --arch timm:dla46_c has not: leave it out"):
        opened("--arch timm:dla46_c --drop_path_rate 0.3")


# ============ whole evaluations ============
def test_results_of_other_images_or_labels_are_not_taken_over(images, tmp_path):
    run(tmp_path / "out", images, "--epochs", 1)
    for other in changed_images(images, tmp_path):
        with pytest.raises(OSError, match="holds an evaluation with content"):
            run(tmp_path / "out", other, "--epochs", 1)


@pytest.mark.slow
def test_red_and_blue_are_told_apart_and_everything_is_written(images, tmp_path, capsys):
    found = run(tmp_path, images, "--epochs", 12, "--checkpoint_freq", 6)
    assert found["best_top1"] == 100.0 and found["epoch"] == 12 and len(found["history"]) == 12
    assert found["settings"]["images"] == [24, 9, 2] and found["settings"]["protocol"] == "resnet"
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    files = {"checkpoint.pth", "checkpoint.prev.pth", "log.jsonl", "train.log", "args.json"}
    files |= {"checkpoints/ckp-6.pth", "checkpoints/ckp-12.pth"}
    assert names == {"eval_finetune.json", *(f"finetune/{name}" for name in files)}
    lines = [json.loads(x) for x in (tmp_path / "finetune/log.jsonl").read_text().splitlines()]
    assert [x["top1"] for x in lines if "top1" in x] == [x["top1"] for x in found["history"]]
    said = capsys.readouterr().out
    assert "| network | data | top-1 |" in said and "eta" in said
    again = run(tmp_path, images, "--epochs", 12, "--evaluate", name="eval_finetune_evaluate")
    assert again["top1"] == found["top1"] and again["loss"] == pytest.approx(found["loss"])


def test_from_scratch_starts_where_the_pre_training_of_a_run_began(images, tmp_path):
    model = build_model("resnet10", stem="small", width=0.125)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    words = ["--pretrained", tmp_path / "weights.pth", "--epochs", 1, "--lr", 1e-9]
    run(tmp_path, images, *words)
    run(tmp_path, images, *words, "--from_scratch", name="eval_finetune_from_scratch")
    run(tmp_path / "none", images, "--epochs", 1, "--lr", 1e-9, "--pretrained", "none")
    trained, scratch, none = (
        state["model"]["backbone.conv1.weight"]
        for state in (saved(tmp_path), saved(tmp_path, "from_scratch"), saved(tmp_path / "none"))
    )
    torch.testing.assert_close(trained, model.conv1.weight.detach(), atol=1e-6, rtol=1e-5)
    assert torch.equal(scratch, none) and not torch.allclose(scratch, trained)


@pytest.mark.slow
def test_the_supervised_baseline_with_multi_crop_can_be_evaluated_as_the_methods_are(
    images, tmp_path
):
    crops = "--from_scratch --nmb_crops 1 2 --size_crops 8 4 --min_scale_crops 0.3 0.1"
    crops += " --max_scale_crops 1 0.4 --epochs 12"
    found = run(tmp_path, images, *crops.split(), name="eval_finetune_from_scratch")
    assert found["best_top1"] > 80 and found["settings"]["nmb_crops"] == [1, 2]
    network = open_pretrained(tmp_path / "from_scratch")
    assert (network.arch, network.image_size) == ("resnet10", 8)
    weight = saved(tmp_path, "from_scratch")["model"]["backbone.conv1.weight"]
    assert torch.equal(network.model.conv1.weight, weight)


@pytest.mark.slow
def test_the_average_of_the_weights_is_what_is_evaluated(images, tmp_path):
    still = run(tmp_path / "still", images, *ALL, "--ema_decay", 1, network=VIT)
    first = still["history"][0]
    assert all(line["loss"] == first["loss"] for line in still["history"])  # it never moves
    moving = run(tmp_path / "moving", images, *ALL, "--ema_decay", 0, network=VIT)
    plain = [x for x in ALL if x not in ("--ema_decay", "0.8")]
    assert moving["history"] == run(tmp_path / "none", images, *plain, network=VIT)["history"]
    assert saved(tmp_path / "moving")["average"] and not saved(tmp_path / "none")["average"]


@torch.no_grad()
def test_the_network_of_the_folder_is_the_one_whose_accuracy_is_reported(images, tmp_path):
    with torch.enable_grad():
        run(tmp_path / "averaged", images, "--ema_decay", 0.5, "--epochs", 1)
        run(tmp_path / "plain", images, "--epochs", 1)
    name = "backbone.conv1.weight"
    state, folder = saved(tmp_path / "averaged"), tmp_path / "averaged" / "finetune"
    assert not torch.equal(state["average"][name], state["model"][name])
    assert torch.equal(open_pretrained(folder).model.conv1.weight, state["average"][name])
    told = open_pretrained(folder, checkpoint_key="model")
    assert torch.equal(told.model.conv1.weight, state["model"][name])
    plain = open_pretrained(tmp_path / "plain" / "finetune").model  # has no average
    assert torch.equal(plain.conv1.weight, saved(tmp_path / "plain")["model"][name])


def test_sobel_filters_are_folded_into_the_first_convolution(images, tmp_path):
    model = build_convnet("vgg16", sobel=True, sobel_padding=2, width=1 / 32)
    weights = {"arch": "vgg16", "state_dict": model.state_dict()}
    torch.save(weights, tmp_path / "vgg.pth")
    words = "--arch vgg16 --sobel true --sobel_padding 2 --sobel2RGB true --size 32 --width 0.03125"
    words = [*words.split(), "--pretrained", str(tmp_path / "vgg.pth")]
    run(tmp_path, images, "--epochs", 1, network=words)
    names = saved(tmp_path)["model"]
    assert names["backbone.features.0.weight"].shape == (2, 3, 5, 5)
    assert not any(name.startswith("backbone.sobel") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vgg16", "resnet10"])
@torch.no_grad()
def test_a_network_with_folded_sobel_filters_is_opened_with_the_same_features(
    arch, images, tmp_path, monkeypatch
):
    tuned, extract = [], finetuning.extract_features
    monkeypatch.setattr(
        finetuning,
        "extract_features",
        lambda module, *others, **options: (
            tuned.append(module) or extract(module, *others, **options)
        ),
    )
    words = f"--arch {arch} --sobel true --sobel_padding 2 --sobel2RGB true --size 32 --width 0.125"
    with torch.enable_grad():
        run(tmp_path, images, "--epochs", 1, "--lr", 0.01, network=words.split())
    crops = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    crops = crops.contiguous(memory_format=torch.channels_last)
    expected = tuned[-1].eval().backbone.forward_backbone(crops)
    found = open_pretrained(tmp_path / "finetune")
    assert found.model.sobel is None and (found.arch, found.options["sobel"]) == (arch, True)
    assert torch.equal(found.model(crops), expected) and expected.std() > 0
    # moved away from its arguments, and fine-tuned once more
    copy = tmp_path / "copy.pth"
    copy.write_bytes((tmp_path / "finetune" / "checkpoint.pth").read_bytes())
    moved = open_pretrained(copy, arch, sobel=True, sobel_padding=2, width=0.125)
    assert torch.equal(moved.model(crops), expected)
    with torch.enable_grad():
        words = ["--pretrained", tmp_path / "finetune", "--size", 32, "--epochs", 1, "--lr", 1e-9]
        run(tmp_path / "again", images, *words, network=[])
    again = open_pretrained(tmp_path / "again" / "finetune")
    torch.testing.assert_close(
        again.model.state_dict()[first_layer(again.model)],
        found.model.state_dict()[first_layer(found.model)],
    )


def first_layer(model):
    return next(name for name in model.state_dict() if name.endswith("weight"))


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_last_bit(images, tmp_path, monkeypatch):
    expected = run(tmp_path / "whole", images, *ALL, network=VIT)
    taken, norm = iter(range(99)), finetuning.nn.utils.clip_grad_norm_

    def norm_and_signal(*parameters):
        if next(taken) == 4:  # of the second epoch of 3 iterations
            os.kill(os.getpid(), signal.SIGTERM)
        return norm(*parameters)

    words = [*QUICK, *VIT, "--data_path", images, "--dump_path", tmp_path / "parts", *ALL]
    with monkeypatch.context() as patch:
        patch.setattr(finetuning.nn.utils, "clip_grad_norm_", norm_and_signal)
        assert eval_finetune.main(list(map(str, words))) == 128 + signal.SIGTERM
    state = saved(tmp_path / "parts")
    assert (state["epoch"], state["samples_done"]) == (1, 16)
    assert run(tmp_path / "parts", images, *ALL, network=VIT) == expected
    parts, whole = saved(tmp_path / "parts"), saved(tmp_path / "whole")
    for section in ("model", "average"):
        assert all(torch.equal(parts[section][name], x) for name, x in whole[section].items())
    with pytest.raises(OSError, match="holds an evaluation with mixup 0.8, not 0.0.*--dump_path"):
        run(tmp_path / "parts", images, *ALL, "--mixup", "0", network=VIT)


def _whole_run(rank, world_size, folder, argv):
    """Results and weights of main() in this process of a group."""
    places = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
    if world_size > 1:
        os.environ.update({name: str(place) for name, place in places.items()})
        dist.shutdown = lambda: None  # the group is run_ranks'
    assert eval_finetune.main([*QUICK, "--dump_path", str(folder), *argv]) == 0
    if rank > 0:
        return None
    found = json.loads((Path(folder) / "eval_finetune.json").read_text())
    state = saved(folder)
    tensors = {**state["model"], **{f"average {name}": x for name, x in state["average"].items()}}
    return found, {name: x.numpy() for name, x in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet", "vit"])
def test_two_processes_equal_one(images, tmp_path, network):
    """At a rate that does not make much of what float32 rounds, and without stochastic depth."""
    argv = ["--data_path", str(images), "--lr", "0.0005", "--ema_decay", "0.8"]
    if network == "vit":
        argv += [*VIT, "--drop_path_rate", "0", "--layer_decay", "0.7"]
    else:
        argv += [*NETWORK, *"--nmb_crops 1 2 --size_crops 8 4 --cutmix 1 --reprob 0.3".split()]
    one, weights = _whole_run(0, 1, tmp_path / "one", [*argv, "--batch_size", "8"])
    (two, state), _ = run_ranks(_whole_run, 2, tmp_path / "two", [*argv, "--batch_size", "4"])
    assert two["settings"] == one["settings"]
    for line, expected in zip(two["history"], one["history"], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert line["top1"] == pytest.approx(expected["top1"])
    for name, value in weights.items():
        np.testing.assert_allclose(state[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


# ============ arguments ============
def test_published_command_lines_are_taken():
    words = "--pretrained vgg.pth --sobel2RGB true --lr 0.05 --wd 0.00001 --nepochs 100 --batch_size 128"
    args = eval_finetune.get_parser().parse_args(
        [*words.split(), "--data_path", "x", "--sobel", "1"]
    )
    assert (args.sobel2RGB, args.epochs, args.sobel, args.wd) == (True, 100, True, 1e-5)


def test_validation_images_are_trained_on_by_debug(images, tmp_path):
    assert run(tmp_path, images, "--debug", "true")["settings"]["images"] == [9, 9, 2]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ("--data_path /nowhere", "--data_path /nowhere"),
        ("--batch_size 25", "use at most 24"),
        ("--pretrained nowhere.pth", "nowhere.pth"),
        ("--evaluate", "--evaluate"),
        ("--sobel2RGB true", "--sobel2RGB"),
        ("--drop_path_rate 0.1", "--drop_path_rate 0.1 is for vision transformers and networks of"),
        ("--layer_decay 0.5", "--layer_decay 0.5"),
        ("--layer_decay 1.5", "--layer_decay 1.5"),
        ("--magnitude 31", "--magnitude 31"),
        ("--in_chans 2 --randaugment 2", "--randaugment 2"),
        ("--nmb_crops 1 2 --size_crops 8", "--size_crops"),
        ("--min_scale_crops 0", "0 < min"),
        ("--warmup_epochs 101", "--warmup_epochs 101"),
        ("--gamma 0.5", "--gamma is not for --scheduler cosine"),
        ("--scheduler step --min_lr 0.1", "--min_lr is not for --scheduler step"),
        ("--epoch 100", "--epoch 100"),
        ("--device cuda:99", "--device cuda:99"),
        ("--dump_path /proc/nowhere", "--dump_path /proc/nowhere"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_status_2(argv, sentence, images, tmp_path, capfd):
    words = ["--workers", "0", "--dump_path", str(tmp_path / "out"), "--data_path", str(images)]
    words += [*NETWORK, "--epochs", "100", *shlex.split(argv)]
    with pytest.raises(SystemExit) as exit:
        flags.run(lambda: eval_finetune.main(words))
    assert exit.value.code == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and sentence in said[0]


@torch.no_grad()
def test_what_only_the_file_says_of_its_network_is_known_of_a_run_that_fine_tuned_it(
    images, tmp_path
):
    """solo-learn's stem for small images pads by 2, which no flag and no tensor of the run says."""
    theirs = open_pretrained("", "resnet10", stem="small", width=0.125, stem_padding=2).model
    weights = {f"backbone.{name}": x for name, x in theirs.state_dict().items()}
    beside = {"classifier.weight": torch.zeros(2, 64), "projector.0.weight": torch.zeros(2, 64)}
    torch.save({"state_dict": weights | beside}, tmp_path / "solo.pth")
    network = ["--pretrained", tmp_path / "solo.pth", "--arch", "resnet10", "--size", 8]
    with torch.enable_grad():
        run(tmp_path, images, "--epochs", 1, network=map(str, network))
    assert open_pretrained(tmp_path / "finetune").options["stem_padding"] == 2
