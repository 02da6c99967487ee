"""eval_semisup.py: labelled images, learning rates, whole evaluations, resumed, on two processes, misused."""

import json
import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_semisup
import main_swav
from src import dist
from src.evaluate import finetuning
from src.nets.pretrained import open_pretrained
from src.nets.resnet import build_model
from src.run import checkpoint, flags
from tests.gloo import run_ranks
from tests.runs import changed_images, signal_handlers, write_noise  # noqa: F401, used by name

NETWORK = shlex.split("--arch resnet10 --stem small --width 0.125 --size 8")
QUICK = shlex.split(
    "--workers 0 --device cpu --epochs 3 --log_freq 1 --lr 0.05 --lr_last_layer 0.1"
)


@pytest.fixture(autouse=True)
def handlers(signal_handlers):  # noqa: F811
    """Those of before, after every test."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """train/ with 20 + 20 and val/ with 5 + 4 images, called as ImageNet's: blue and red noise."""
    folder = tmp_path_factory.mktemp("images")
    counts = {"train": (20, 20), "val": (5, 4)}
    return write_noise(folder, counts, names=("n01", "n02"), suffix=".JPEG")


def run(folder, images, *argv):
    """Results of main() in this process."""
    words = [*QUICK, *NETWORK, "--data_path", str(images), "--dump_path", str(folder)]
    assert eval_semisup.main([*words, *map(str, argv)]) == 0
    return json.loads(next(Path(folder).glob("eval_semisup_*.json")).read_text())


def of(argv, num_labelled, num_classes=1000):
    args = eval_semisup.parse_args(shlex.split(f"--data_path /imagenet {argv}"))
    eval_semisup.fill_in_rates(args, num_labelled, num_classes)
    return args


# ============ the published values ============
def test_the_rates_are_those_of_one_and_of_ten_per_cent_and_a_flag_wins():
    for argv, labelled, rates in (
        ("", 128117, (0.01, 0.2)),
        ("--labels_per_class 128", 128000, (0.01, 0.2)),
        ("--labels_perc 1", 12811, (0.02, 5.0)),
        ("--labels_per_class 13", 13000, (0.02, 5.0)),
        ("--labels_perc 1 --lr 0.3", 12811, (0.3, 5.0)),
    ):
        args = of(argv, labelled)
        assert (args.lr, args.lr_last_layer) == rates, argv
    assert (args.epochs, args.decay_epochs, args.gamma, args.wd) == (20, [12, 16], 0.2, 0.0)
    assert args.labels_perc == 1.0 and args.min_scale == 0.08 and not args.no_flip


def test_both_rates_are_multiplied_by_a_fifth_after_epochs_12_and_16():
    plan = eval_semisup.make_plan(of("", 128117), 5, 256)
    factors = [plan.lr_factor(t) for t in (0, 59, 60, 79, 80, 99)]
    assert factors == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])


# ============ whole evaluations ============
def test_results_of_other_images_or_labels_are_not_taken_over(images, tmp_path):
    run(tmp_path / "out", images, "--epochs", 1, "--labels_per_class", 4)
    for other in changed_images(images, tmp_path):
        with pytest.raises(OSError, match="holds an evaluation with content"):
            run(tmp_path / "out", other, "--epochs", 1, "--labels_per_class", 4)


def test_a_published_list_names_the_images_that_are_trained_on(images, tmp_path, capsys):
    names = [f"n0{i % 2 + 1}_{i}.JPEG" for i in range(10)]
    (tmp_path / "1percent.txt").write_text("\n".join(names) + "\n")
    found = run(tmp_path / "out", images, "--label_list", tmp_path / "1percent.txt")
    assert found["settings"]["labels"] == "1percent"
    assert found["settings"]["images"] == [10, 9, 2] and found["settings"]["batch"] == 10
    assert found["epoch"] == 3 and [line["epoch"] for line in found["history"]] == [1, 2, 3]
    best = max(line["top1"] for line in found["history"])
    assert found["best_top1"] == best >= found["top1"] == found["history"][-1]["top1"]
    text = (tmp_path / "out" / "eval_semisup_1percent.json").read_text()
    assert text.count("\n") == 1  # a line, so that files can be joined to a table
    said = capsys.readouterr().out
    assert "| network | labels | top-1 |" in said and "img/s" in said and "eta" in said


def test_drawn_images_are_as_many_of_each_class_and_depend_on_the_seed_alone(images, tmp_path):
    first = run(tmp_path / "a", images, "--labels_per_class", 4)["settings"]
    same = run(tmp_path / "b", images, "--labels_per_class", 4, "--epochs", 1)["settings"]
    other = run(tmp_path / "c", images, "--labels_perc", 20, "--seed", 7)["settings"]
    assert first["images"] == other["images"] == [8, 9, 2]
    assert first["labelled"] == same["labelled"] != other["labelled"]
    assert (first["labels"], other["labels"]) == ("4perclass", "20percent")


@pytest.mark.slow
def test_the_weights_of_a_file_are_fine_tuned_and_none_starts_from_the_seed(images, tmp_path):
    torch.manual_seed(3)
    model = build_model("resnet10", stem="small", width=0.125)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    argv = ["--lr", 0, "--labels_per_class", 5]  # the network stays, the classifier is trained
    run(tmp_path / "out", images, *argv, "--pretrained", tmp_path / "weights.pth")
    folder = tmp_path / "out" / "semisup" / "5perclass"
    state = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    for name, value in model.named_parameters():
        assert torch.equal(state[f"backbone.{name}"], value), name
    assert not torch.equal(state["backbone.bn1.running_mean"], model.bn1.running_mean)
    none = run(tmp_path / "none", images, *argv, "--pretrained", "none")
    again = run(tmp_path / "again", images, *argv)
    assert none["settings"]["pretrained"] == "" and none == again


def test_a_fine_tuned_network_can_be_evaluated_by_its_folder(images, tmp_path):
    run(tmp_path, images, "--labels_per_class", 5)
    folder = tmp_path / "semisup" / "5perclass"
    network = open_pretrained(folder)
    assert (network.arch, network.image_size) == ("resnet10", 8)
    state = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    assert torch.equal(network.model.conv1.weight, state["backbone.conv1.weight"])


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_last_bit(images, tmp_path, monkeypatch):
    argv = ["--labels_per_class", "10", "--batch_size", "4"]
    expected = run(tmp_path / "whole", images, *argv)
    taken, norm = iter(range(99)), finetuning.nn.utils.clip_grad_norm_

    def norm_and_signal(*parameters):
        if next(taken) == 6:  # of the second epoch of 5 iterations
            os.kill(os.getpid(), signal.SIGTERM)
        return norm(*parameters)

    words = [*QUICK, *NETWORK, "--data_path", images, "--dump_path", tmp_path / "parts", *argv]
    with monkeypatch.context() as patch:
        patch.setattr(finetuning.nn.utils, "clip_grad_norm_", norm_and_signal)
        assert eval_semisup.main(list(map(str, words))) == 128 + signal.SIGTERM
    place = "semisup/10perclass/checkpoint.pth"
    state = torch.load(tmp_path / "parts" / place, weights_only=True)
    assert (state["epoch"], state["samples_done"]) == (1, 8)
    assert not list((tmp_path / "parts").glob("*.json"))
    assert run(tmp_path / "parts", images, *argv) == expected
    parts, whole = (
        torch.load(tmp_path / name / place, weights_only=True) for name in ("parts", "whole")
    )
    assert all(torch.equal(parts["model"][name], x) for name, x in whole["model"].items())
    assert (
        run(tmp_path / "parts", images, *argv) == expected
    )  # all epochs are done: nothing changes
    with pytest.raises(OSError, match="holds an evaluation with lr 0.05, not 0.1.*--dump_path"):
        run(tmp_path / "parts", images, *argv, "--lr", "0.1")


def _whole_run(rank, world_size, folder, argv):
    """Results and weights of main() in this process of a group."""
    places = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
    if world_size > 1:
        os.environ.update({name: str(place) for name, place in places.items()})
        dist.shutdown = lambda: None  # the group is run_ranks'
    assert eval_semisup.main([*QUICK, *NETWORK, "--dump_path", str(folder), *argv]) == 0
    if rank > 0:
        return None
    found = json.loads(next(Path(folder).glob("eval_semisup_*.json")).read_text())
    state = torch.load(next(Path(folder).glob("semisup/*/checkpoint.pth")), weights_only=True)
    return found, {name: x.numpy() for name, x in state["model"].items()}


@pytest.mark.slow
def test_two_processes_equal_one(images, tmp_path):
    """At a rate that does not make much of what float32 rounds."""
    argv = ["--data_path", str(images), "--labels_per_class", "9", "--lr", "0.001", "--epochs", "2"]
    one, weights = _whole_run(0, 1, tmp_path / "one", [*argv, "--batch_size", "6"])
    (two, state), _ = run_ranks(_whole_run, 2, tmp_path / "two", [*argv, "--batch_size", "3"])
    assert two["settings"] == one["settings"]
    for line, expected in zip(two["history"], one["history"], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert line["top1"] == pytest.approx(expected["top1"])
    for name, value in weights.items():
        np.testing.assert_allclose(state[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def _accuracies(rank, world_size, shares):
    draws = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(21, 7, generator=draws), torch.arange(21) % 7
    first, last = shares[rank]
    return finetuning.score_accuracies(scores[first:last], labels[first:last])


def test_accuracies_are_of_the_rows_of_all_processes():
    draws = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(21, 7, generator=draws), torch.arange(21) % 7
    one = _accuracies(0, 1, [(0, 21)])
    ranks = (scores.argsort(1, descending=True) == labels[:, None]).int().argmax(1)
    assert one["top1"] == pytest.approx(100 * (ranks == 0).double().mean().item())
    assert one["top5"] == pytest.approx(100 * (ranks < 5).double().mean().item())
    loss = torch.nn.functional.cross_entropy(scores, labels).item()
    assert one["loss"] == pytest.approx(loss, rel=1e-5)
    for found in run_ranks(_accuracies, 2, [(0, 21), (21, 21)]):  # one of them has none
        assert found == pytest.approx(one)


# ============ arguments ============
def test_published_command_lines_are_taken():
    words = "--data_path /imagenet --pretrained swav.pth.tar --labels_perc 10 --lr 0.01"
    words += " --lr_last_layer 0.2 --batch_size 32 --epochs 20 --decay_epochs 12 16 --gamma 0.2"
    args = eval_semisup.get_parser().parse_args(shlex.split(words))
    assert (args.labels_perc, args.batch_size) == (10.0, 32)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ("--data_path /nowhere", "--data_path /nowhere"),
        ("--data_path IMAGES --labels_perc 0", "--labels_perc"),
        ("--data_path IMAGES --labels_perc 101", "at most 100"),
        ("--data_path IMAGES --labels_per_class 3 --label_list x.txt", "exclude each other"),
        ("--data_path IMAGES --label_list /nowhere.txt", "--label_list /nowhere.txt"),
        ("--data_path IMAGES --label_list LIST", "of one class"),
        ("--data_path IMAGES --labels_per_class 3 --batch_size 7", "use at most 6"),
        ("--data_path IMAGES --labels_per_class 3 --batch_size 1", "--batch_size 1"),
        ("--data_path IMAGES --pretrained nowhere.pth", "nowhere.pth"),
        ("--data_path IMAGES --arch resnet18 --depth 3", "--depth"),
        ("--data_path IMAGES --min_scale 0", "--min_scale 0"),
        ("--data_path IMAGES --mean 1 1", "--mean has 2"),
        (
            "--data_path IMAGES --arch resnet10 --dump_path /proc/nowhere",
            "--dump_path /proc/nowhere",
        ),
        ("--data_path IMAGES --device cuda:99", "--device cuda:99"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_status_2(argv, sentence, images, tmp_path, capfd):
    (tmp_path / "list.txt").write_text("n01_1.JPEG\nn01_2.JPEG\n")
    argv = argv.replace("IMAGES", str(images)).replace("LIST", str(tmp_path / "list.txt"))
    argv = ["--workers", "0", "--dump_path", str(tmp_path / "out"), *shlex.split(argv)]
    with pytest.raises(SystemExit) as exit:
        flags.run(lambda: eval_semisup.main(argv))
    assert exit.value.code == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and sentence in said[0]


# ============ learning ============
@pytest.mark.slow
def test_pre_trained_is_above_scratch_at_5_labels_a_class_over_5_seeds(tmp_path):
    argv = "--epochs 18 --knn_freq 0 --width 0.125 --workers 0 --device cpu --no-tensorboard"
    words = [*shlex.split(argv), "--dump_path", str(tmp_path / "swav")]
    assert main_swav.main(words) in (None, 0)
    top1 = {}
    for name in (str(tmp_path / "swav"), "none"):
        for seed in range(5):
            argv = ["--pretrained", name, "--labels_per_class", "5", "--seed", str(seed)]
            argv += ["--width", "0.125", "--val_freq", "99", "--device", "cpu", "--workers", "0"]
            folder = tmp_path / f"{Path(name).name}{seed}"
            assert eval_semisup.main([*argv, "--dump_path", str(folder)]) == 0
            found = json.loads((folder / "eval_semisup_5perclass.json").read_text())
            top1.setdefault(name == "none", []).append(found["top1"])
    trained, scratch = np.array(top1[False]), np.array(top1[True])
    assert (trained > scratch).sum() >= 4, (trained, scratch)
    assert trained.mean() > scratch.mean() + 4, (trained, scratch)
    assert checkpoint.load_checkpoint(tmp_path / "swav")["epoch"] == 18
