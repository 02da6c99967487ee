"""--probe_data and --guard_knn: labelled sets beside the images that are trained on, and the way back."""

import json
from pathlib import Path

import pytest
import torch

import main_swav
from src.data.datasets import open_dataset
from src.errors import RunError
from src.pictures.curves import panels_of_probe_sets
from src.run.run import Run, best_of, guarded_key
from tests.gloo import run_mains
from tests.runs import images, write_noise

QUICK = (
    "--device cpu --workers 0 --preset tiny --arch resnet10 --width 0.125 --nmb_prototypes 8 "
    "--batch_size 20 --knn_freq 1 --no-tensorboard"
).split()


def train(folder, *argv):
    status = main_swav.main([*QUICK, "--dump_path", str(folder), *map(str, argv)])
    lines = [json.loads(text) for text in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return status, [line for line in lines if "knn" in line]


@pytest.fixture
def unlabelled(tmp_path):
    return images(tmp_path / "images", 40)


@pytest.fixture
def few(monkeypatch):
    """Digits, fewer of them, so that a k-NN takes a moment."""
    import src.evaluate.probe as probe
    from src.evaluate.splits import Part

    def open_few(name, path, in_chans):
        dataset = open_dataset(path, in_chans=in_chans)
        return Part(dataset, list(range(150))), Part(dataset, list(range(150, 250)))

    monkeypatch.setattr(probe, "open_probe_set", open_few)


@pytest.mark.slow
def test_labelled_sets_are_evaluated_beside_images_without_labels(tmp_path, unlabelled, few):
    argv = ["--data_path", unlabelled, "--epochs", 2]
    status, lines = train(tmp_path / "run", *argv, "--probe_data", "a=digits", "b=digits")
    assert status == 0 and [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert line["knn"] == line["knn_a"] == line["knn_b"] > 10
        assert line["linear_a"] == line["linear_b"] > 10
    panels = panels_of_probe_sets(lines)
    assert panels[:2] == [("knn_a", "k-NN top-1 (%), a"), ("linear_a", "linear top-1 (%), a")]
    text = (tmp_path / "run" / "train.log").read_text()
    assert "a: 20-NN" in text and "has no labels: no k-NN" not in text


@pytest.mark.slow
def test_a_fall_of_k_nn_stops_the_run_and_goes_back_to_the_best_state(
    tmp_path, unlabelled, few, monkeypatch
):
    accuracies = iter([40.0, 45.0, 44.5, 30.0])
    monkeypatch.setattr(
        Run, "evaluate", lambda run: ({"knn_a": next(accuracies)}, ["a: 20-NN as made up"])
    )
    argv = ["--data_path", unlabelled, "--epochs", 9, "--probe_data", "a=digits"]
    with pytest.raises(RunError, match="fell from 45.00 % after epoch 2 to 30.00 % after epoch 4"):
        train(tmp_path / "run", *argv, "--guard_knn", 1)
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    before = torch.load(tmp_path / "run" / "checkpoint.prev.pth", weights_only=True)
    assert (state["epoch"], before["epoch"]) == (2, 4)


@pytest.mark.slow
def test_a_fall_within_the_guard_is_borne_and_a_run_that_goes_on_knows_its_best(
    tmp_path, unlabelled, few, monkeypatch
):
    accuracies = iter([45.0, 40.5, 38.0])
    monkeypatch.setattr(Run, "evaluate", lambda run: ({"knn_a": next(accuracies)}, ["made up"]))
    argv = ["--data_path", unlabelled, "--probe_data", "a=digits", "--guard_knn", 5]
    assert train(tmp_path / "run", *argv, "--epochs", 2)[0] == 0
    with pytest.raises(RunError, match="fell from 45.00 % after epoch 1 to 38.00 % after epoch 3"):
        train(tmp_path / "run", *argv, "--epochs", 3)
    assert torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["epoch"] == 1


@pytest.mark.slow
def test_a_guarded_run_of_two_processes_goes_on_after_its_best_epoch(tmp_path):
    write_noise(tmp_path / "images", {"train": (40, 40), "val": (10, 10)})
    argv = [*QUICK, "--data_path", tmp_path / "images", "--guard_knn", 100]
    for epochs in (1, 2):  # with the log in rank 0 alone, rank 0 alone kept the best state again
        run_mains("main_swav", tmp_path / "run", [*argv, "--epochs", epochs], world_size=2)
    assert "continues from epoch 2" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.slow
def test_a_run_that_is_guarded_from_now_on_has_no_best_state_to_go_back_to(
    tmp_path, unlabelled, few, monkeypatch
):
    accuracies = iter([45.0, 40.0, 30.0, 20.0])
    monkeypatch.setattr(Run, "evaluate", lambda run: ({"knn_a": next(accuracies)}, ["made up"]))
    argv = ["--data_path", unlabelled, "--probe_data", "a=digits"]
    assert train(tmp_path / "run", *argv, "--epochs", 2)[0] == 0
    with pytest.raises(RunError, match="fell from 30.00 % after epoch 3 to 20.00 % after epoch 4"):
        train(tmp_path / "run", *argv, "--epochs", 4, "--guard_knn", 5)
    assert torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["epoch"] == 3


def test_classes_that_do_not_fit_are_said_before_anything_is_trained(tmp_path):
    write_noise(tmp_path / "images", {"train": (30, 30)}, names=("cat", "dog"))
    write_noise(tmp_path / "images", {"val": (10, 10)}, names=("bird", "fish"))
    with pytest.raises(ValueError, match="--knn_freq 0"):
        train(tmp_path / "run", "--data_path", tmp_path / "images", "--epochs", 9)
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--probe_data", "a=digits", "--knn_freq", "0"], "--probe_data needs --knn_freq"),
        (["--guard_knn", "1", "--knn_freq", "0"], "--guard_knn needs --knn_freq"),
        (["--probe_data", "a=digits", "a=digits"], "names two sets alike"),
        (
            ["--probe_data", "a=/nowhere", "--epochs", "1"],
            "--probe_data a=/nowhere: /nowhere does not",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, unlabelled, argv, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train(tmp_path / "run", "--data_path", unlabelled, *argv)
    assert not (tmp_path / "run" / "checkpoint.pth").exists()  # found before anything was computed


def test_a_path_without_a_name_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", "--probe_data", "/data/pets")
    assert "must be NAME=PATH, such as pets=/data/pets" in capsys.readouterr().err


def test_the_best_is_the_last_of_equal_ones():
    lines = [{"knn": 3.0, "epoch": 0}, {"loss": 1.0, "epoch": 1}, {"knn": 3.0, "epoch": 1}]
    assert best_of(lines, "knn") == (3.0, 1) and best_of(lines, "knn_a") is None
    assert guarded_key([("a", "x"), ("b", "y")]) == "knn_a" and guarded_key([]) == "knn"
