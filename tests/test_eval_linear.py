"""eval_linear.py: the classifiers, what they see, whole evaluations, resumed, signalled, misused."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_linear
from src import dist
from src.data.datasets import open_dataset
from src.evaluate.linear_classifiers import (
    LinearClassifiers,
    ManySGD,
    accuracies,
    epoch_lr,
    inverse_sqrt_lr,
    losses,
)
from src.evaluate.linear_features import FrozenFeatures, ImageBatches, linear_input
from src.evaluate.linear_flags import chosen_folds
from src.evaluate.linear_results import summary
from src.evaluate.splits import split_folds
from src.labels.features import extract_features
from src.nets.dino_head import DINOHead, MultiCropWrapper
from src.nets.pretrained import open_pretrained
from src.nets.resnet import build_model
from src.nets.vision_transformer import VisionTransformer
from src.nets.weights import fingerprint
from src.run import checkpoint, flags
from src.run.log import Stopwatch
from tests.gloo import run_ranks
from tests.runs import write_noise
from tests.voc_images import write_voc

ROOT = Path(__file__).parent.parent
NETWORK = shlex.split("--arch resnet10 --stem small --width 0.125 --size 8")
QUICK = shlex.split("--workers 0 --device cpu --epochs 3 --log_freq 2")
SMALL_VIT = dict(patch_size=4, img_size=16, embed_dim=24, num_heads=3, depth=3)


@pytest.fixture(autouse=True)
def signal_handlers():
    """An evaluation that ends in an error leaves its handlers to the process, about to end."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, before, strict=True):
        signal.signal(name, handler)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """train/ with 60 and val/ with 15 images of two classes: blue and red noise."""
    folder = tmp_path_factory.mktemp("images")
    return write_noise(folder, {"train": (30, 30), "val": (8, 7)}, stem="{i:02}")


def evaluate(folder, *argv, name="eval_linear.json"):
    """Results of main() in this process."""
    assert eval_linear.main([*QUICK, "--dump_path", str(folder), *map(str, argv)]) == 0
    return json.loads((folder / name).read_text())


def trained(folder):
    """The classifiers that an evaluation has saved."""
    return torch.load(folder / "linear" / "checkpoint.pth", weights_only=True)["state_dict"]


# ============ classifiers ============


def data(rows=40, dim=12, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, dim, generator=generator)
    return features, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("channels", [0, 4])
def test_every_classifier_is_what_pytorch_trains_with_its_learning_rate_alone(nesterov, channels):
    features, labels = data()
    lrs, decay = [0.03, 0.3, 2.0], 0.01
    together = LinearClassifiers(3, 12, 3, channels, seed=5)
    optimizer = ManySGD(together, decay, nesterov)
    for rows in features.split(10), features.split(8):
        for x, y in zip(rows, labels.split(len(rows[0])), strict=True):
            (losses(together(x), y) / len(x)).sum().backward()
            optimizer.step(torch.tensor(lrs))
    for i, lr in enumerate(lrs):
        linear = torch.nn.Linear(12, 3)
        with torch.no_grad():
            linear.weight.copy_(LinearClassifiers(1, 12, 3, seed=5).linear.weight[0])
            linear.bias.zero_()
        layers = [torch.nn.Unflatten(1, (4, 3)), torch.nn.BatchNorm1d(4), torch.nn.Flatten()]
        alone = torch.nn.Sequential(*(layers if channels else []), linear)
        sgd = torch.optim.SGD(alone.parameters(), lr, 0.9, weight_decay=decay, nesterov=nesterov)
        for rows in features.split(10), features.split(8):
            for x, y in zip(rows, labels.split(len(rows[0])), strict=True):
                sgd.zero_grad()
                F.cross_entropy(alone(x), y).backward()
                sgd.step()
        torch.testing.assert_close(together.linear.weight[i], linear.weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.linear.bias[i], linear.bias, atol=1e-5, rtol=1e-4)
        together.eval()
        scores = together(features)[i]
        # of about 100 at the largest rate, which makes much of what float32 rounds
        torch.testing.assert_close(scores, alone.eval()(features), atol=1e-4, rtol=1e-3)
        together.train()


def test_the_first_weights_are_small_and_the_same_for_all():
    weight = LinearClassifiers(2, 500, 20, seed=1).linear.weight
    assert torch.equal(weight[0], weight[1]) and abs(weight.std() - 0.01) < 2e-4
    assert not LinearClassifiers(2, 500, 20).linear.bias.any()


def test_the_learning_rate_of_an_epoch_is_that_of_pytorch_schedulers():
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 10, eta_min=0.02)
    for epoch in range(10):
        assert epoch_lr(0.3, epoch, 10, 0.02) == pytest.approx(sgd.param_groups[0]["lr"])
        sgd.step()
        cosine.step()
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    steps = torch.optim.lr_scheduler.MultiStepLR(sgd, [4, 6], 0.1)
    for epoch in range(10):
        found = epoch_lr(0.3, epoch, 10, decay=(0.1, [6, 4]))
        assert found == pytest.approx(sgd.param_groups[0]["lr"])
        sgd.step()
        steps.step()


def test_accuracies_count_ranks_and_a_score_that_is_no_number_is_wrong():
    classifiers = LinearClassifiers(2, 7, 7)
    with torch.no_grad():
        classifiers.linear.weight[0] = torch.eye(7)  # scores are the features
        classifiers.linear.weight[1] = torch.nan
    features = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]]).repeat(4, 1)
    found = accuracies(classifiers, features, torch.tensor([0, 1, 4, 5]), "cpu")
    assert found["top1"] == [25.0, 0.0] and found["top5"] == [75.0, 0.0]
    expected = F.cross_entropy(features, torch.tensor([0, 1, 4, 5])).item()
    assert found["loss"] == [pytest.approx(expected), None]


def test_fewer_than_five_classes_make_a_top_5_of_100():
    classifiers = LinearClassifiers(2, 12, 3)
    torch.nn.init.constant_(classifiers.linear.weight[1], torch.nan)
    found = accuracies(classifiers, *data(), "cpu")
    assert found["top5"] == [100.0, 0.0] and 0 < found["top1"][0] < 100


def _on_my_rows(rank, world_size, shares, channels):
    """Training and accuracies with this rank's rows of every batch, as numpy."""
    features, labels = data(50)
    classifiers = LinearClassifiers(2, 12, 3, channels)
    optimizer = ManySGD(classifiers, 1e-3)
    for batch in torch.arange(50).split(10):
        first, last = (round(10 * x) for x in shares[rank])
        mine = batch[first:last]
        (losses(classifiers(features[mine]), labels[mine]) / len(batch)).sum().backward()
        optimizer.step(torch.tensor([0.1, 1.0]))
    first, last = (round(49 * x) for x in shares[rank])  # 49 rows do not split evenly
    found = accuracies(classifiers, features[first:last], labels[first:last], "cpu")
    state = {name: x.detach().numpy() for name, x in classifiers.state_dict().items()}
    return found, state


@pytest.mark.slow
@pytest.mark.parametrize("channels", [0, 4])
@pytest.mark.parametrize("half", [0.3, 0.0])
def test_two_processes_with_uneven_rows_or_none_equal_one(channels, half):
    expected, weights = _on_my_rows(0, 1, [(0, 1)], channels)
    for found, state in run_ranks(_on_my_rows, 2, [(0, half), (half, 1)], channels):
        for name in ("top1", "top5"):
            assert found[name] == pytest.approx(expected[name])
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
        for name, value in weights.items():
            np.testing.assert_allclose(state[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_best_epoch_is_reported_for_each_learning_rate():
    history = [
        {"epoch": 1, "top1": [50.0, 10.0], "top5": [80.0, 20.0], "loss": [1.0, 2.0]},
        {"epoch": 2, "top1": [60.0, 70.0], "top5": [90.0, 80.0], "loss": [0.9, 1.0]},
        {"epoch": 3, "top1": [60.0, 65.0], "top5": [95.0, 85.0], "loss": [0.8, 1.1]},
    ]
    rows, best = summary([0.1, 1.0], history)
    assert best == 1 and rows[1] == {
        **{"lr": 1.0, "top1": 65.0, "top5": 85.0, "loss": 1.1},
        **{"best_top1": 70.0, "best_top5": 80.0, "best_epoch": 2},
    }
    assert (rows[0]["top1"], rows[0]["best_epoch"]) == (60.0, 2)  # the first of equals


# ============ what they see ============


def small_vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL_VIT, **options}).eval()


@torch.no_grad()
def test_a_vision_transformer_gives_class_tokens_and_the_mean_of_its_patches():
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for registers in (0, 3):
        model = small_vit(num_registers=registers)
        blocks = model.get_intermediate_layers(x, 3)  # each (2, 1 + registers + 16, 24)
        assert blocks[0].shape == (2, 17 + registers, 24)
        mean = torch.stack([blocks[2][:, -i] for i in range(1, 17)]).mean(0)
        last = linear_input(model, 1)(x)
        torch.testing.assert_close(last, model(x))
        two = torch.cat([blocks[1][:, 0], blocks[2][:, 0]], 1)
        torch.testing.assert_close(linear_input(model, 2)(x), two)
        torch.testing.assert_close(linear_input(model, 2, True)(x), torch.cat([two, mean], 1))
        both = linear_input(model, 1, True)(x)  # in turns, as published linear weights have it
        torch.testing.assert_close(both[:, 0::2], blocks[2][:, 0])
        torch.testing.assert_close(both[:, 1::2], mean)


@torch.no_grad()
def test_a_resnet_gives_pooled_features_or_windows_of_its_last_map():
    torch.manual_seed(0)
    model = build_model("resnet18", width=0.125).eval()  # as open_pretrained makes it
    x = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(linear_input(model)(x), model.forward_backbone(x))
    windows = linear_input(model, global_pooling=False)
    maps = model.forward_backbone(x)  # (2, 64, 7, 7)
    assert maps.shape == (2, 64, 7, 7)
    expected = torch.stack(
        [maps[:, :, i : i + 6, j : j + 6].mean((2, 3)) for i in (0, 1) for j in (0, 1)], 2
    )
    torch.testing.assert_close(windows(x), expected.flatten(1))
    with pytest.raises(ValueError, match="--global_pooling false .* 3 x 3.*--size"):
        windows(x[:, :, :96, :96])
    with pytest.raises(ValueError, match="--global_pooling false"):
        linear_input(small_vit(), global_pooling=False)
    with pytest.raises(ValueError, match="--n_last_blocks 4 .* 3"):
        linear_input(small_vit(), 4)


def test_training_features_are_of_cropped_images_and_carry_no_gradient(images):
    dataset = open_dataset(str(images), "train")
    process, model = dist.init("cpu"), small_vit()

    def batches_of(flip):
        return ImageBatches(
            linear_input(model, 1),
            dataset,
            16,
            normalisation=(dataset.mean, dataset.std),
            batch_size=20,
            process=process,
            precision="fp32",
            seed=31,
            workers=0,
            flip=flip,
        )

    batches = {flip: batches_of(flip) for flip in (True, False)}
    found = {flip: list(batches[flip](0, 0, Stopwatch())) for flip in batches}
    assert len(found[True]) == 3 and not found[True][0][0].requires_grad
    assert not torch.equal(found[True][0][0], found[False][0][0])  # some are flipped
    labels = [labels.tolist() for _, labels in found[True]]
    assert labels == [labels.tolist() for _, labels in found[False]] and sum(map(sum, labels)) == 30
    (features, again), *_ = batches[True](0, 2, Stopwatch())  # from the middle of the epoch
    torch.testing.assert_close(features, found[True][2][0])
    assert again.tolist() == labels[2]
    (other, _), *_ = batches[True](1, 0, Stopwatch())  # other crops in another epoch
    assert not torch.isclose(other[:, :1], found[True][0][0][:, 0]).any()


# ============ whole evaluations ============


def test_separable_images_are_separated_and_everything_is_written(images, tmp_path, capsys):
    found = evaluate(tmp_path, *NETWORK, "--data_path", images, "--lr", "1", "--epochs", "6")
    assert found["best_top1"] == 100.0 and found["top5"] == 100.0  # of two classes
    assert found["settings"]["images"] == [60, 15, 2] and found["settings"]["batch"] == 60
    assert found["settings"]["lrs"] == [1.0] and found["settings"]["interpolation"] == "bilinear"
    assert found["results"][0]["best_epoch"] == found["best_epoch"] <= 6
    said = capsys.readouterr().out
    assert "UNTRAINED" in said and "img/s" in said and "eta" in said and "top-5" in said
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    logs = {"checkpoint.pth", "checkpoint.prev.pth", "log.jsonl", "train.log", "args.json"}
    assert names == {"eval_linear.json", *(f"linear/{name}" for name in logs)}
    lines = [json.loads(x) for x in (tmp_path / "linear" / "log.jsonl").read_text().splitlines()]
    assert sum("top1" in line for line in lines) == 6
    assert {"losses", "images_per_second", "data_share", "eta_seconds"} <= lines[0].keys()
    assert lines[0]["losses"][0] > lines[-2]["losses"][0]


def test_the_bare_command_evaluates_an_untrained_network_on_digits(tmp_path):
    found = evaluate(tmp_path, "--width", "0.125", "--epochs", "10", "--lr", "1")
    settings = found["settings"]
    assert (settings["data_path"], settings["arch"], settings["size"]) == ("digits", "resnet10", 16)
    assert settings["cache_features"] and settings["no_flip"] and settings["batch"] == 256
    assert 30 < found["top1"] < found["top5"] <= 100


def test_several_learning_rates_give_what_each_gives_alone(images, tmp_path):
    argv = [*NETWORK, "--data_path", images, "--val_freq", "2", "--batch_size", "16"]
    many = evaluate(tmp_path / "many", *argv, "--lrs", "0.01", "1")
    assert [row["lr"] for row in many["results"]] == [0.01, 1.0]
    for i, row in enumerate(many["results"]):
        alone = evaluate(tmp_path / str(i), *argv, "--lr", row["lr"])
        weights = [trained(tmp_path / name)["linear.weight"] for name in ("many", str(i))]
        torch.testing.assert_close(weights[0][i], weights[1][0], atol=1e-5, rtol=1e-4)
        assert alone["top1"] == row["top1"] and alone["best_epoch"] == row["best_epoch"]
    best = max(many["results"], key=lambda row: row["best_top1"])
    assert many["lr"] == best["lr"] and many["best_top1"] == best["best_top1"]
    history = torch.load(tmp_path / "many/linear/checkpoint.pth", weights_only=True)["history"]
    assert [line["epoch"] for line in history] == [2, 3]  # every second epoch, and the last


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--final_lr 0.1", [0.5, 0.1 + 0.4 * 0.75, 0.1 + 0.4 * 0.25]),
        ("--scheduler_type step --decay_epochs 1 2 --gamma 0.5", [0.5, 0.25, 0.125]),
    ],
)
def test_the_learning_rate_changes_by_epoch(images, tmp_path, options, expected):
    argv = [*NETWORK, "--data_path", images, "--lr", "0.5", "--log_freq", "100"]
    evaluate(tmp_path, *argv, *shlex.split(options))
    lines = [json.loads(x) for x in (tmp_path / "linear" / "log.jsonl").read_text().splitlines()]
    assert [line["lrs"] for line in lines if "lrs" in line] == [
        [pytest.approx(x)] for x in expected
    ]


@pytest.mark.slow
def test_one_that_diverges_leaves_the_others_alone_and_all_stop_the_run(images, tmp_path):
    argv = [*NETWORK, "--data_path", images, "--wd", "1"]
    found = evaluate(tmp_path / "a", *argv, "--epochs", "30", "--lrs", "0.1", "1e20")
    assert found["lr"] == 0.1 and found["results"][1]["loss"] is None
    assert found["results"][1]["top1"] == 0 and found["top1"] > 0
    with pytest.raises(flags.RunError, match="not finite.*lower --lr"):
        evaluate(tmp_path / "b", *argv, "--epochs", "30", "--lr", "1e20")


@pytest.mark.parametrize("options", [[], ["--cache_features"], ["--use_bn", "true"]])
def test_a_stopped_evaluation_goes_on_to_the_last_bit(images, tmp_path, monkeypatch, options):
    argv = [*NETWORK, "--data_path", images, "--batch_size", "16", *options]
    expected = evaluate(tmp_path / "whole", *argv)
    taken, step = iter(range(9)), ManySGD.step

    def step_and_signal(self, lrs):
        step(self, lrs)
        if next(taken) == 4:  # the second of three iterations of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)

    argv += ["--dump_path", str(tmp_path / "parts")]
    with monkeypatch.context() as patch:
        patch.setattr(ManySGD, "step", step_and_signal)
        assert eval_linear.main([*QUICK, *map(str, argv)]) == 128 + signal.SIGTERM
    state = torch.load(tmp_path / "parts" / "linear" / "checkpoint.pth", weights_only=True)
    assert (state["epoch"], state["samples_done"]) == (1, 32)
    found = evaluate(tmp_path / "parts", *argv)
    assert found == expected
    for name, value in trained(tmp_path / "whole").items():
        assert torch.equal(value, trained(tmp_path / "parts")[name]), name
    assert evaluate(tmp_path / "parts", *argv) == expected  # all epochs are done: nothing changes


def test_what_belongs_to_another_evaluation_is_refused_and_left_as_it_is(images, tmp_path):
    argv = [*NETWORK, "--data_path", images]
    evaluate(tmp_path, *argv)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.suffix != ".lock"}
    others = {
        "lrs": ["--lr", "0.2"],
        "epochs": ["--epochs", "4"],
        "weights": ["--seed", "32"],
        "use_bn": ["--use_bn", "true"],
        "batch": ["--batch_size", "8"],
    }
    for name, other in others.items():
        with pytest.raises(OSError, match=f"linear holds an evaluation with {name} .*--dump_path"):
            evaluate(tmp_path, *argv, *other)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.suffix != ".lock"}
    assert after == before  # the lock goes with the process


def test_what_an_earlier_version_saved_goes_on(images, tmp_path):
    argv = [*NETWORK, "--data_path", images]
    expected = evaluate(tmp_path, *argv)
    path = tmp_path / "linear" / "checkpoint.pth"
    state = torch.load(path, weights_only=True)
    for name in ("momentum", "conv", "tencrops", "split", "fold"):
        del state["settings"][name]
    torch.save(state, path)
    assert evaluate(tmp_path, *argv) == expected
    state["settings"]["conv_pooling"] = "max"  # a default that was another, and of no use here
    torch.save(state, path)
    assert evaluate(tmp_path, *argv) == expected
    with pytest.raises(OSError, match="with momentum 0.9, not 0.5"):
        evaluate(tmp_path, *argv, "--momentum", "0.5")


def _whole_evaluation(rank, world_size, folder, argv):
    """Results and weights of main() in this process of a group."""
    places = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
    if world_size > 1:
        os.environ.update({name: str(place) for name, place in places.items()})
        dist.shutdown = lambda: None  # the group is run_ranks'
    command = [*QUICK, "--dump_path", str(folder), *argv]
    assert eval_linear.main(command) == 0
    if rank > 0:
        return None
    found = json.loads((Path(folder) / "eval_linear.json").read_text())
    return found, {name: x.numpy() for name, x in trained(Path(folder)).items()}


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--cache_features", "--use_bn", "true"]])
def test_two_processes_equal_one(images, tmp_path, options):
    argv = [*NETWORK, "--data_path", str(images), *options]
    one, weights = _whole_evaluation(0, 1, tmp_path / "one", [*argv, "--batch_size", "16"])
    ranks = run_ranks(_whole_evaluation, 2, tmp_path / "two", [*argv, "--batch_size", "8"])
    two, state = ranks[0]
    for row, expected in zip(two["results"], one["results"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert two["settings"] == one["settings"]  # the same batch of all processes
    for name, value in weights.items():
        np.testing.assert_allclose(state[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    # and two go on from what one saved
    again = run_ranks(_whole_evaluation, 2, tmp_path / "one", [*argv, "--batch_size", "8"])
    assert again[0][0] == one


def test_flags_that_the_scheduler_does_not_read_are_named_in_the_plan(images, tmp_path, capsys):
    argv = ["--data_path", images, *NETWORK, "--batch_size", 8, "--epochs", 1]
    unread_by_words = {
        "--gamma 0.5 --decay_epochs 2": ["cosine does not read --decay_epochs, --gamma"],
        "--scheduler_type step --final_lr 0.1": ["step does not read --final_lr"],
        "--scheduler_type step --gamma 0.5": [],
        "--final_lr 0.1": [],
    }
    for number, (words, expected) in enumerate(unread_by_words.items()):
        evaluate(tmp_path / str(number), *argv, *words.split())
        notes = [x for x in capsys.readouterr().out.splitlines() if "does not read" in x]
        assert [note.partition("note: --scheduler_type ")[2] for note in notes] == expected


def test_images_that_nothing_splits_are_held_out(images, tmp_path, capsys):
    found = evaluate(tmp_path, *NETWORK, "--data_path", images / "train", "--epochs", "1")
    assert found["settings"]["images"] == [54, 6, 2] and "held out" in capsys.readouterr().out


# ============ runs, files, protocols ============


def swav_run(folder):
    arguments = {"arch": "resnet10", "stem": "small", "width": 0.125, "in_chans": 3, "seed": 3}
    head = {"hidden_mlp": 0, "feat_dim": 8, "head_dims": None, "head_bn": True}
    torch.manual_seed(5)
    options = {name: arguments[name] for name in ("stem", "width")}
    model = build_model("resnet10", normalize=True, output_dim=8, nmb_prototypes=6, **options)
    checkpoint.save_checkpoint(folder, {"model": model.state_dict(), "epoch": 1})
    more = {"size_crops": [8, 6], "nmb_prototypes": [6], "data_path": "digits"}
    (folder / "args.json").write_text(json.dumps({**arguments, **head, **more}))
    (folder / "log.jsonl").write_text("{}\n")
    return model


def dino_run(folder, **arguments):
    arguments = {
        **dict(
            arch="vit_tiny", patch_size=4, num_registers=2, depth=3, stem="imagenet", width=0.125
        ),
        **dict(global_crops_size=16, local_crops_size=8, in_chans=3, seed=3, data_path="digits"),
        **dict(mean=None, std=[0.4, 0.4, 0.4], interpolation="bicubic", img_size=None),
        **arguments,
    }
    options = ("patch_size", "num_registers", "depth", "width")
    state, networks = {"epoch": 1}, {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        model = VisionTransformer(**{**SMALL_VIT, "num_registers": arguments["num_registers"]})
        networks[name] = model.eval()
        state[name] = MultiCropWrapper(model, DINOHead(24, 16, hidden_dim=8)).state_dict()
    assert all(option in arguments for option in options)
    checkpoint.save_checkpoint(folder, state)
    (folder / "args.json").write_text(json.dumps(arguments))
    return networks


def test_a_run_keeps_its_checkpoint_and_log_and_needs_no_other_flag(tmp_path):
    model = swav_run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    argv = [*QUICK[:4], "--epochs", "2", "--pretrained", str(tmp_path)]
    assert eval_linear.main(argv) == 0
    assert {path: path.read_bytes() for path in before} == before
    found = json.loads((tmp_path / "eval_linear.json").read_text())
    settings = found["settings"]
    assert (settings["arch"], settings["size"], settings["seed"]) == ("resnet10", 8, 3)
    assert settings["protocol"] == "swav" and settings["cache_features"]
    opened = open_pretrained(tmp_path)
    # Its head and prototypes count, as they did when networks were evaluated with them.
    assert fingerprint(opened.model, opened.head) == fingerprint(model) == settings["weights"]


@pytest.mark.slow
def test_a_run_of_dino_is_evaluated_by_its_protocol_with_its_teacher(tmp_path):
    networks = dino_run(tmp_path)
    for key, options in (("teacher", []), ("student", ["--checkpoint_key", "student"])):
        out = ["--dump_path", str(tmp_path / key)]
        argv = [*QUICK[:4], "--epochs", "1", "--pretrained", str(tmp_path), *out, *options]
        assert eval_linear.main(argv) == 0
        settings = json.loads((tmp_path / key / "eval_linear.json").read_text())["settings"]
        assert settings["weights"] == fingerprint(networks[key]), key
        wanted = {"protocol": "dino", "wd": 0.0, "interpolation": "bicubic", "n_last_blocks": 3}
        wanted |= {"size": 16, "img_size": 16, "num_registers": 2, "std": [0.4, 0.4, 0.4]}
        assert {name: settings[name] for name in wanted} == wanted


def arguments(argv):
    return eval_linear.parse_args(shlex.split(argv))


def test_the_protocol_is_that_of_the_network_and_a_flag_wins():
    swav = arguments("--data_path x --arch resnet50")
    assert (swav.protocol, swav.lr, swav.wd, swav.interpolation) == ("swav", 0.3, 1e-6, "bilinear")
    assert swav.global_pooling and not (swav.use_bn or swav.cache_features or swav.no_flip)
    small = arguments("--data_path x --arch vit_small")
    assert (small.protocol, small.lr, small.wd, small.interpolation) == (
        "dino",
        0.001,
        0,
        "bicubic",
    )
    assert (small.n_last_blocks, small.avgpool_patchtokens) == (4, False)
    base = arguments("--data_path x --arch vit_base")
    assert (base.n_last_blocks, base.avgpool_patchtokens) == (1, True)
    assert arguments("--data_path x --arch xcit_small_12_p16").protocol == "dino"
    assert arguments("--data_path x --arch resnet50 --checkpoint_key teacher").protocol == "dino"
    chosen = arguments("--data_path x --arch vit_base --protocol swav --wd 0 --n_last_blocks 4")
    assert (chosen.lr, chosen.wd, chosen.n_last_blocks) == (0.3, 0, 4)
    assert not chosen.avgpool_patchtokens
    assert arguments("--data_path cifar10").cache_features
    assert not arguments("--data_path cifar10 --no-cache_features").cache_features


def batch(argv, world_size, num_images=10**6):
    args = arguments(argv)
    eval_linear.fill_in_batch(args, world_size, num_images)
    return args.batch_size


def test_the_batch_is_the_published_one_and_never_more_than_there_is():
    assert [batch("--data_path x --arch resnet50", size) for size in (1, 8)] == [256, 32]
    assert [batch("--data_path x --arch vit_small", size) for size in (1, 8)] == [128, 128]
    assert batch("--arch vit_small", 2) == 128  # digits: 256 over all
    assert batch("--data_path x --arch vit_small", 2, num_images=61) == 30
    with pytest.raises(ValueError, match="--batch_size 32 times 2 .* at most 30"):
        batch("--data_path x --batch_size 32", 2, num_images=61)


def test_the_learning_rate_of_dino_is_scaled_by_the_batch(tmp_path, images):
    argv = ["--protocol", "dino", *NETWORK, "--data_path", images, "--batch_size", "32"]
    found = evaluate(tmp_path, *argv, "--lrs", "0.1", "0.8", "--epochs", "1")
    assert found["settings"]["lrs"] == [0.0125, 0.1]  # 32 / 256
    assert found["settings"]["std"][0] == 0.229  # without SwAV's red


SWAV = (
    "--dump_path out --seed 31 --data_path /imagenet --workers 10 --arch resnet50 --pretrained w.pth "
    "--global_pooling True --use_bn False --epochs 100 --batch_size 32 --lr 0.3 --wd 1e-6 --nesterov "
    "False --scheduler_type cosine --decay_epochs 60 80 --gamma 0.1 --final_lr 0 --dist_url env:// "
    "--world_size 8 --rank 0 --local_rank 0"
)
DINO = (
    "--n_last_blocks 1 --avgpool_patchtokens true --arch vit_base --patch_size 8 --pretrained_weights "
    "w.pth --checkpoint_key teacher --epochs 100 --lr 0.001 --batch_size_per_gpu 128 --dist_url x "
    "--local-rank 0 --data_path /imagenet --num_workers 10 --val_freq 1 --output_dir out "
    "--num_labels 1000 --evaluate"
)


def test_published_command_lines_are_taken():
    args = eval_linear.get_parser().parse_args(shlex.split(SWAV))
    assert (args.wd, args.batch_size, args.pretrained, args.gamma) == (1e-6, 32, "w.pth", 0.1)
    args = eval_linear.get_parser().parse_args(shlex.split(DINO))
    assert (args.batch_size, args.dump_path, args.num_labels, args.evaluate) == (
        128,
        "out",
        1000,
        True,
    )


DEEPCLUSTER = (
    "--data /imagenet --model checkpoint.pth.tar --conv 3 --tencrops --exp out --workers 12 --epochs 90 "
    "--batch_size 256 --lr 0.01 --momentum 0.9 --weight_decay -7 --seed 31 --verbose"
)
DEEPERCLUSTER = (
    "--dump_path out --epoch 0 --start_iter 0 --pretrained vgg16.pth --conv 13 --data_path /imagenet "
    "--workers 8 --sobel true --lr 0.02 --wd 1e-5 --nepochs 100 --batch_size 64 --split train --kfold 5 "
    "--cross_valid 2 --rank 0 --local_rank 0 --world-size 4 --dist-url env:// --debug_slurm false"
)


def test_published_command_lines_of_convolutions_are_taken():
    args = eval_linear.get_parser().parse_args(shlex.split(DEEPCLUSTER))
    assert (args.data_path, args.pretrained, args.dump_path, args.tencrops) == (
        *("/imagenet", "checkpoint.pth.tar"),
        *("out", True),
    )
    assert args.wd == pytest.approx(1e-7) and args.verbose
    args = eval_linear.get_parser().parse_args(shlex.split(DEEPERCLUSTER))
    assert (args.epochs, args.wd, args.sobel, args.conv) == (100, 1e-5, True, 13)
    assert chosen_folds(args.cross_valid, args.kfold) == (5, [2])


# ============ convolutions ============

VGG = shlex.split("--arch vgg16 --width 0.0625 --size 32")


def test_the_protocol_of_a_convolution_is_that_of_its_network():
    alexnet = arguments("--data_path x --arch alexnet --conv 5")
    assert (alexnet.protocol, alexnet.lr, alexnet.wd, alexnet.epochs) == (
        *("deepcluster", 0.01),
        *(1e-4, 90),
    )
    assert alexnet.scheduler_type == "inverse_sqrt" and alexnet.sobel is False
    assert alexnet.conv_pooling == "average"
    lrs = [arguments(f"--data_path x --arch vgg16 --conv {i}").lr for i in range(1, 14)]
    assert lrs == [0.005, 0.01, *[0.03] * 4, 0.02, *[0.03] * 3, *[0.02] * 3]
    vgg = arguments("--data_path x --arch vgg16 --conv 9 --sobel --lr 0.1 --wd -3 --verbose")
    assert (vgg.protocol, vgg.lr, vgg.epochs, vgg.sobel) == ("deepercluster", 0.1, 100, True)
    assert (vgg.wd, vgg.interpolation, vgg.log_freq) == (pytest.approx(1e-3), "bilinear", 10)
    swav = arguments("--data_path x --arch resnet50")
    assert (swav.epochs, swav.scheduler_type, swav.momentum) == (100, "cosine", 0.9)
    assert batch("--data_path x --arch vgg16 --conv 9", 4) == 64  # 256 over all


def test_the_learning_rate_falls_as_deepclusters(golden):
    found = golden("deepcluster")
    lr0, wd = found["lr_decay_lr0"].item(), found["lr_decay_wd"].item()
    for t, expected in zip(found["lr_decay_t"].tolist(), found["lr_decay_out"], strict=True):
        assert inverse_sqrt_lr(lr0, wd, t) == pytest.approx(expected, rel=1e-12)


def test_a_convolution_is_evaluated_and_its_rate_falls_by_iteration(images, tmp_path):
    argv = [*VGG, "--data_path", images, "--conv", "2", "--batch_size", "20", "--lr", "0.5"]
    found = evaluate(tmp_path, *argv, "--wd", "0.1", "--log_freq", "1", "--momentum", "0.5")
    settings = found["settings"]
    assert settings["protocol"] == "deepercluster" and settings["conv"] == 2
    assert settings["momentum"] == 0.5 and settings["std"][0] == 0.229
    assert trained(tmp_path)["linear.weight"].shape == (1, 2, 4 * 12 * 12)  # 12 cells a side
    lines = [json.loads(x) for x in (tmp_path / "linear" / "log.jsonl").read_text().splitlines()]
    lrs = [line["lrs"][0] for line in lines if "lrs" in line]
    assert lrs == pytest.approx([0.5 / (1 + 0.05 * t) ** 0.5 for t in range(9)])
    with pytest.raises(OSError, match="holds an evaluation with conv 2, not 3"):
        evaluate(tmp_path, *argv, "--conv", "3")


def test_what_a_convolution_sees_is_separated(images, tmp_path):
    argv = [*VGG, "--data_path", images, "--conv", "4", "--cache_features", "--epochs", "20"]
    for kind in ("max", "average"):
        found = evaluate(tmp_path / kind, *argv, "--conv_pooling", kind)
        assert found["best_top1"] == 100.0 and found["settings"]["conv_pooling"] == kind


def test_unscaled_windows_are_of_the_centres(images):
    dataset = open_dataset(str(images), "train")
    options = {
        "normalisation": ([0.0] * 3, [1.0] * 3),
        "batch_size": 20,
        "process": dist.init("cpu"),
        "precision": "fp32",
        "seed": 31,
        "workers": 0,
        "flip": False,
    }
    windows = ImageBatches(lambda x: x, dataset, 8, **options, unscaled=True)
    resized = ImageBatches(lambda x: x, dataset, 8, **options)
    (found, _), *_ = windows(0, 0, Stopwatch())
    (scaled, _), *_ = resized(0, 0, Stopwatch())
    assert found.shape == (20, 3 * 8 * 8) and not torch.equal(found, scaled)
    patches = []
    for i in range(len(dataset)):  # all windows of the centres of 9 px
        square = F.interpolate(dataset.load(i)[None], [9, 10], mode="bilinear", antialias=True)[0]
        patches.append(square[:, :, :9].unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4))
    patches = torch.stack(patches).flatten(0, 2).flatten(1).float() / 255
    assert (
        torch.cdist(found, patches).amin(1).max() < 0.2 < torch.cdist(scaled, patches).amin(1).max()
    )


def test_of_the_protocols_deepcluster_alone_does_not_scale_its_crops(images, tmp_path, monkeypatch):
    batches, unscaled = FrozenFeatures.batches, []

    def recorded(self, *arguments, **options):
        unscaled.append(options["unscaled"])
        return batches(self, *arguments, **options)

    monkeypatch.setattr(FrozenFeatures, "batches", recorded)
    for protocol in ("deepcluster", "deepercluster", "swav"):
        argv = [*VGG, "--data_path", images, "--conv", "1", "--epochs", "1", "--protocol", protocol]
        evaluate(tmp_path / protocol, *argv)
    assert unscaled == [True, False, False]


@pytest.mark.slow
def test_two_processes_equal_one_with_ten_crops_of_a_convolution(images, tmp_path):
    argv = [*VGG, "--data_path", str(images), "--conv", "5", "--tencrops", "--cache_features"]
    one, weights = _whole_evaluation(0, 1, tmp_path / "one", [*argv, "--batch_size", "16"])
    ranks = run_ranks(_whole_evaluation, 2, tmp_path / "two", [*argv, "--batch_size", "8"])
    two, state = ranks[0]
    assert two["results"][0] == pytest.approx(one["results"][0], rel=1e-4)
    np.testing.assert_allclose(state["linear.weight"], weights["linear.weight"], atol=1e-5)


# ============ ten crops, folds, splits ============


@pytest.mark.parametrize("views", [1, 10])
def test_the_softmax_is_averaged_over_views(views):
    classifiers = LinearClassifiers(2, 12, 7, seed=3)
    with torch.no_grad():
        classifiers.linear.weight.mul_(100)
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(33, views * 12, generator=draws)
    labels = torch.randint(7, (33,), generator=draws)
    found = accuracies(classifiers, features, labels, "cpu", views)
    for i in range(2):
        weight = classifiers.linear.weight[i].double()
        scores = features.double().unflatten(1, (views, 12)) @ weight.t()  # (33, views, 7)
        mean = scores.softmax(2).mean(1)
        top1 = 100 * (mean.argmax(1) == labels).double().mean().item()
        top5 = 100 * (mean.topk(5).indices == labels[:, None]).any(1).double().mean().item()
        assert (found["top1"][i], found["top5"][i]) == pytest.approx((top1, top5), abs=1e-4)
        assert found["loss"][i] == pytest.approx(F.nll_loss(mean.log(), labels).item(), rel=1e-4)


def test_ten_crops_are_evaluated_alone_and_after_training(images, tmp_path):
    argv = [*NETWORK, "--data_path", images, "--size", "8"]
    crops = evaluate(tmp_path, *argv, "--tencrops")
    assert crops["settings"]["tencrops"]
    alone = evaluate(tmp_path, *argv, "--tencrops", "--evaluate", name="eval_linear_evaluate.json")
    assert alone["results"][0]["loss"] == pytest.approx(crops["results"][0]["loss"])
    one = evaluate(tmp_path, *argv, "--evaluate", name="eval_linear_evaluate.json")
    assert one["results"][0]["loss"] != pytest.approx(crops["results"][0]["loss"], rel=1e-6)


def test_folds_share_every_class_and_hold_each_image_once(images):
    dataset = open_dataset(str(images), "train")
    dataset.labels = (
        torch.arange(60) % 4 == 1
    ).long()  # a fold of every fourth image has one class
    split = split_folds(dataset, 4)
    held_out = []
    for fold in range(4):
        train, val = split(fold)
        assert sorted(train.indices + val.indices) == list(range(60)) and len(val) == 15
        counts = val.labels.bincount(minlength=2)
        assert (counts - dataset.labels.bincount() / 4).abs().max() < 1
        assert torch.equal(val.labels, dataset.labels[val.indices])
        held_out += val.indices
    assert sorted(held_out) == list(range(60))
    with pytest.raises(ValueError, match="--cross_valid 61 .* 60"):
        split_folds(dataset, 61)


def test_the_larger_of_two_numbers_is_that_of_the_folds():
    assert chosen_folds(None, None) == (None, [None])
    assert chosen_folds(3, None) == (3, [0, 1, 2])
    assert chosen_folds(5, 0) == chosen_folds(0, 5) == (5, [0])  # theirs: --kfold 5 --cross_valid 0
    for wrong in ((None, 2), (1, None), (3, 3), (1, 0), (0, None)):
        with pytest.raises(ValueError, match="--cross_valid|--kfold"):
            chosen_folds(*wrong)


@pytest.mark.slow
def test_all_folds_are_evaluated_one_after_the_other(images, tmp_path, capsys):
    argv = [*NETWORK, "--data_path", images, "--lrs", "0.01", "0.1", "--cache_features"]
    single = evaluate(
        tmp_path / "one", *argv, "--cross_valid", "3", "--kfold", "1", name="eval_linear_fold1.json"
    )
    assert single["settings"]["fold"] == [1, 3] and single["settings"]["images"] == [40, 20, 2]
    assert not (tmp_path / "one" / "eval_linear.json").exists()
    found = evaluate(tmp_path / "all", *argv, "--cross_valid", "3")
    assert found["folds"][1] == single  # the same as alone
    for i, row in enumerate(found["results"]):
        tops = [fold["results"][i]["best_top1"] for fold in found["folds"]]
        assert row["best_top1"] == pytest.approx(np.mean(tops))
        assert row["best_top1_std"] == pytest.approx(np.std(tops, ddof=1))
    best = max(found["results"], key=lambda row: row["best_top1"])
    assert found["best_top1"] == best["best_top1"] and found["lr"] == best["lr"]
    assert "3 folds" in capsys.readouterr().out
    assert evaluate(tmp_path / "all", *argv, "--cross_valid", "3") == found  # nothing is left to do


def test_a_stop_between_folds_goes_on_with_the_next(images, tmp_path, monkeypatch):
    argv = [*NETWORK, "--data_path", images, "--cache_features", "--cross_valid", "2"]
    expected = evaluate(tmp_path / "whole", *argv)
    taken, save = iter(range(99)), eval_linear.Probe.save

    def save_and_signal(self, *place):
        save(self, *place)
        if next(taken) == 2:  # after the last epoch of the first fold
            os.kill(os.getpid(), signal.SIGTERM)

    argv += ["--dump_path", str(tmp_path / "parts")]
    with monkeypatch.context() as patch:
        patch.setattr(eval_linear.Probe, "save", save_and_signal)
        assert eval_linear.main([*QUICK, *map(str, argv)]) == 128 + signal.SIGTERM
    assert (tmp_path / "parts" / "eval_linear_fold0.json").exists()
    assert not (tmp_path / "parts" / "linear" / "fold1").exists()
    assert evaluate(tmp_path / "parts", *argv) == expected


def test_trainval_joins_two_splits_and_is_validated_on_the_third(images, tmp_path):
    for split, source in (("train", "train"), ("val", "val"), ("test", "val")):
        (tmp_path / "data" / split).parent.mkdir(exist_ok=True)
        os.symlink(images / source, tmp_path / "data" / split)
    (tmp_path / "data" / "test").unlink()
    argv = [*NETWORK, "--data_path", tmp_path / "data", "--split", "trainval", "--epochs", "1"]
    with pytest.raises(ValueError, match="--split trainval needs .*train, val and test"):
        evaluate(tmp_path / "out", *argv)
    for label in ("blue", "red"):
        (tmp_path / "data" / "test" / label).mkdir(parents=True)
        image = next((images / "val" / label).iterdir())
        os.symlink(image, tmp_path / "data" / "test" / label / "0.png")
    found = evaluate(tmp_path / "out", *argv)
    assert found["settings"]["images"] == [75, 2, 2] and found["settings"]["split"] == "trainval"


@pytest.mark.slow
def test_a_folder_of_voc_is_classified_by_20_binary_classifiers(tmp_path, capsys):
    folder = write_voc(tmp_path / "VOC2007", difficult=(3, 23))
    argv = [*NETWORK, "--data_path", folder, "--lrs", "0.001", "1", "--epochs", "30"]
    found = evaluate(tmp_path / "out", *argv, "--split", "trainval")
    assert found["settings"]["images"] == [40, 20, 20]  # images to train, to test, classes
    assert found["best_map"] > 95 and found["best_map_11points"] > 90 and found["lr"] in (0.001, 1)
    assert [row["lr"] for row in found["results"]] == [0.001, 1.0]
    assert "mAP" in capsys.readouterr().out
    few = evaluate(tmp_path / "train", *argv, "--tencrops", "--epochs", "1")
    assert few["settings"]["images"] == [20, 20, 20] and 0 <= few["map"] <= 100


def test_a_run_without_a_checkpoint_begins_where_it_is_told(images, tmp_path):
    argv = [*NETWORK, "--data_path", images, "--batch_size", "20", "--log_freq", "1"]
    evaluate(tmp_path, *argv, "--epoch", "1", "--start_iter", "2")
    lines = [json.loads(x) for x in (tmp_path / "linear" / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "losses" in line] == [5, 6, 7, 8]
    found = evaluate(tmp_path, *argv, "--epoch", "1", "--start_iter", "2")  # it has one now
    assert found["best_epoch"] in (2, 3)


# ============ --evaluate ============


def test_evaluating_alone_repeats_the_last_epoch_and_writes_beside_it(images, tmp_path):
    argv = [*NETWORK, "--data_path", images, "--lrs", "0.1", "1"]
    expected = evaluate(tmp_path, *argv, "--use_bn", "true")
    state = trained(tmp_path)
    found = evaluate(tmp_path, *argv, "--evaluate", name="eval_linear_evaluate.json")
    assert [row["top1"] for row in found["results"]] == [r["top1"] for r in expected["results"]]
    assert [row["loss"] for row in found["results"]] == [r["loss"] for r in expected["results"]]
    assert [row["lr"] for row in found["results"]] == [0.1, 1.0]
    assert all(torch.equal(value, trained(tmp_path)[name]) for name, value in state.items())
    only_val = ["--evaluate", "--val_path", images / "val", *argv[:-5]]
    assert evaluate(tmp_path, *only_val, name="eval_linear_evaluate.json") == {
        **found,
        "settings": {**found["settings"], "data_path": "digits", "val_path": str(images / "val")},
    }
    with pytest.raises(OSError, match="holds an evaluation with weights"):
        evaluate(tmp_path, *argv, "--evaluate", "--seed", "5")


@torch.no_grad()
def test_published_linear_weights_of_a_vision_transformer_fit(images, tmp_path):
    model = small_vit()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    generator = torch.Generator().manual_seed(2)
    linear = {"weight": torch.randn(2, 48, generator=generator), "bias": torch.tensor([0.1, -0.1])}
    published = {f"module.linear.{name}": value for name, value in linear.items()}
    torch.save({"epoch": 100, "state_dict": published, "best_acc": 1.0}, tmp_path / "linear.pth")
    argv = ["--arch", "vit_tiny", "--width", "0.125", "--size", "16", "--data_path", images]
    argv += ["--pretrained", tmp_path / "vit.pth", "--evaluate", "--n_last_blocks", "1"]
    argv += ["--avgpool_patchtokens", "true", "--linear_weights", tmp_path / "linear.pth"]
    found = evaluate(tmp_path, *argv, name="eval_linear_evaluate.json")
    assert not (tmp_path / "linear").exists()

    val = open_dataset(str(images), "val")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tokens, _ = extract_features(
        linear_input(model, 1, True), val, 16, mean=mean, std=std, device="cpu"
    )
    scores = tokens @ linear["weight"].t() + linear["bias"]
    expected = 100 * (scores.argmax(1) == val.labels).double().mean().item()
    assert found["top1"] == pytest.approx(expected) and found["lr"] is None
    assert found["results"][0]["loss"] == pytest.approx(F.cross_entropy(scores, val.labels).item())
    with pytest.raises(ValueError, match="48 features to 2 classes, and here are 24"):
        evaluate(tmp_path, *argv, "--avgpool_patchtokens", "false")


def test_published_linear_weights_with_a_batch_norm_fit(images, tmp_path):
    features, labels = data(dim=64, classes=2)
    layers = torch.nn.Module()  # the names of the SwAV file
    layers.bn, layers.linear = torch.nn.BatchNorm2d(64), torch.nn.Linear(64, 2)
    layers.bn(features[:, :, None, None])
    torch.save({"state_dict": layers.state_dict()}, tmp_path / "linear.pth")
    from src.evaluate.linear_files import saved_classifiers

    found, _, _ = saved_classifiers(str(tmp_path / "linear.pth"), tmp_path, {}, 64, 2)
    with torch.no_grad():
        x = layers.eval().bn(features[:, :, None, None])
        expected = layers.linear(x.flatten(1))
        torch.testing.assert_close(found.eval()(features)[0], expected, atol=1e-5, rtol=1e-5)


# ============ misuse ============


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ("--pretrained nowhere.pth", "nowhere.pth"),
        ("--pretrained nowhere.pth --arch vit_small", "nowhere.pth"),
        ("--data_path /nowhere", "--data_path /nowhere"),
        ("--num_labels 9", "--num_labels 9, and the data has 10"),
        ("--lr 1 --lrs 1 2", "--lr and --lrs"),
        ("--lrs 0", "--lrs"),
        ("--linear_weights x.pth", "--linear_weights is for --evaluate"),
        ("--evaluate", "--evaluate: "),
        ("--evaluate --linear_weights nowhere.pth", "nowhere.pth"),
        ("--evaluate --linear_weights TRUNK", "has no linear.weight"),
        ("--global_pooling false", "--size"),
        ("--conv 3", "--conv 3 is for AlexNet and VGG16"),
        ("--conv 14 --arch vgg16 --width 0.02 --size 32", "--conv 14 must be between 1 and 13"),
        ("--conv 0", "--conv"),
        ("--conv 5 --arch alexnet --width 0.02 --size 16", "--size 16 is too small"),
        ("--conv 3 --global_pooling false --arch vgg16", "leave it out with --conv"),
        ("--cross_valid 1", "--cross_valid 1 must be at least 2"),
        ("--kfold 3", "--kfold 3 needs --cross_valid"),
        ("--cross_valid 5 --evaluate", "--evaluate and --cross_valid"),
        ("--split trainval", "--split trainval"),
        ("--epoch 1", "--epoch 1 must be below --epochs 1"),
        ("--wd nan", "--wd"),
        ("--global_pooling maybe", "--global_pooling"),
        ("--arch vit_tiny --size 16 --n_last_blocks 13", "--n_last_blocks 13"),
        ("--arch resnet18 --num_registers 4", "--num_registers"),
        ("--arch resnet18 --depth 4", "--depth"),
        ("--mean 0.5", "--mean has 1"),
        ("--batch_size 1298", "--batch_size 1298"),
        ("--dump_path /proc/nowhere", "--dump_path /proc/nowhere"),
        ("--device cuda:99", "--device cuda:99"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_status_2(argv, sentence, tmp_path, capfd):
    torch.save(build_model("resnet10").state_dict(), tmp_path / "trunk.pth")
    argv = shlex.split(argv.replace("TRUNK", str(tmp_path / "trunk.pth")))
    argv = ["--workers", "0", "--epochs", "1", "--dump_path", str(tmp_path / "out"), *argv]
    with pytest.raises(SystemExit) as exit:
        flags.run(lambda: eval_linear.main(argv))
    assert exit.value.code == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and sentence in said[0]


@pytest.mark.slow
def test_the_script_runs_by_itself_and_under_torchrun_with_workers(images, tmp_path):
    results = []
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    for name, launcher, size in (("one", [], 16), ("two", torchrun, 8)):
        argv = [*NETWORK, "--epochs", "2", "--lr", "0.1", "--device", "cpu", "--workers", "2"]
        argv += ["--data_path", images, "--batch_size", size, "--dump_path", tmp_path / name]
        command = [sys.executable, *launcher, "eval_linear.py", *map(str, argv)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written to") == 1
        results.append(json.loads((tmp_path / name / "eval_linear.json").read_text())["results"][0])
    assert results[0] == pytest.approx(results[1], rel=1e-3)
