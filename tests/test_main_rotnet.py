"""main_rotnet.py as its users run it: bare, resumed, killed, misused, on several processes."""

import json
import math
import os
import random
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch

import eval_knn
import main_rotnet
from src.nets.convnets import build_convnet
from src.run.log import read_log
from tests.gloo import kill_mains, run_mains, start_mains
from tests.runs import images, losses, one_panel, signal_handlers, wait_for_lines
from tests.test_launch import checked_arguments, sbatch_lines
from tests.test_main_dino import few_label_accuracy

pytestmark = pytest.mark.usefixtures(signal_handlers.__name__, one_panel.__name__)

ROOT = Path(__file__).parent.parent
SMALL = shlex.split(
    "--arch resnet10 --width 0.125 --size_crops 8 --batch_size 128 --epochs 2 --lr 0.05 "
    "--decay_epochs 1 --gamma 0.5 --workers 0 --log_freq 1 --knn_freq 0 --no-tensorboard"
)


def train(folder, *argv):
    """Run main in this process: its status and the log by iteration."""
    status = main_rotnet.main([*SMALL, "--dump_path", str(folder), *map(str, argv)])
    return status, losses(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: folder and losses."""
    folder = tmp_path_factory.mktemp("whole")
    status, values = train(folder, "--knn_freq", "2", "--checkpoint_freq", "1")
    assert status == 0
    return folder, values


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Flags of two iterations of 10 images, for tests that are about something else."""
    folder = images(tmp_path_factory.mktemp("few") / "images", 20)
    return ["--data_path", folder, "--preset", "tiny", "--batch_size", 10, "--epochs", 1]


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_promises(whole):
    folder, values = whole
    assert sorted(values) == list(range(20))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *("checkpoint.pth", "checkpoint.prev.pth"),
        *("checkpoints/ckp-1.pth", "checkpoints/ckp-2.pth"),
        *("log.jsonl", "train.log", "args.json", "plots/curves.png", "plots/crops.png"),
    }
    lines = [line for line in read_log(folder) if "knn" not in line]
    health = {"prediction_entropy", "accuracy", "prototypes_used", "embedding_std", "rankme"}
    assert all(health | {"gradient_norm", "data_share"} <= line.keys() for line in lines)
    assert all(0 <= line["prediction_entropy"] <= math.log(4) + 1e-6 for line in lines)
    assert 20 < read_log(folder)[-1]["knn"] <= 100
    assert [lines[i]["lr"] for i in (0, 9, 10, 19)] == [0.05, 0.05, 0.025, 0.025]
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert state["epoch"] == 2 and not state["method_state"] and state["method"] == "rotnet"
    assert state["model"]["top_layer.weight"].shape == (4, 64)
    text = (folder / "train.log").read_text()
    assert "ln(4) = 1.386" in text and "times 0.5 after epochs 1" in text


@pytest.mark.slow
def test_rotations_are_learned(whole):
    values = [whole[1][i] for i in range(20)]
    assert abs(values[0] - math.log(4)) < 0.1
    assert sum(values[-5:]) / 5 < math.log(4) - 0.15
    lines = [line for line in read_log(whole[0]) if "accuracy" in line]
    assert sum(line["accuracy"] for line in lines[-5:]) / 5 > 35  # a quarter by chance


@pytest.mark.slow
def test_a_run_goes_on_to_the_last_bit_from_the_middle_and_the_end_of_an_epoch(
    whole, tmp_path, monkeypatch
):
    iterations = iter(range(20))
    with monkeypatch.context() as patch:
        must_stop = main_rotnet.Run.must_stop

        def send_a_signal_now_and_then(self, done):
            if next(iterations) in (3, 9):
                os.kill(os.getpid(), signal.SIGTERM)
            return must_stop(self, done)

        patch.setattr(main_rotnet.Run, "must_stop", send_a_signal_now_and_then)
        for _ in range(2):
            assert train(tmp_path)[0] == 128 + signal.SIGTERM
    status, values = train(tmp_path)
    assert status == 0 and values == whole[1]
    text = (tmp_path / "train.log").read_text()
    assert re.findall(r"continues from epoch (\d), iteration (\d)", text) == [
        *(("1", "4"), ("2", "0"))
    ]
    states = [
        torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
        for folder in (tmp_path, whole[0])
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on_to_the_last_bit(tmp_path):
    """With dropout, whose draws depend on the iteration too."""
    argv = shlex.split(
        "--arch alexnet --width 0.05 --size_crops 64 --epochs 2 --checkpoint_iters 3"
    )
    argv = [*SMALL, *argv, "--batch_size", 64, "--workers", 1]
    run_mains("main_rotnet", tmp_path / "whole", argv, 2)
    killed = start_mains("main_rotnet", tmp_path / "killed", argv, 2)
    wait_for_lines(tmp_path / "killed", killed[0], random.randint(4, 14))
    kill_mains(killed)
    output = run_mains("main_rotnet", tmp_path / "killed", argv, 2)
    assert "continues from epoch" in output
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_equal_one_and_another_number_takes_the_run_over(tmp_path):
    """Small steps, as float32 alone moves a gradient; without photometry, which is drawn by rank."""
    argv = ["--lr", 0.005, "--epochs", 2, "--color_jitter", 0]
    _, expected = train(tmp_path / "one", *argv)
    half = [*SMALL, *argv, "--batch_size", 64]
    run_mains("main_rotnet", tmp_path / "two", half, 2)
    run_mains("main_rotnet", tmp_path / "mixed", [*half, "--epochs", 1], 2)
    assert train(tmp_path / "mixed", *argv)[0] == 0
    for name in ("two", "mixed"):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=2e-3)
    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert two["accuracy"] == pytest.approx(one["accuracy"], abs=2)
        assert two["prototypes_used"] == pytest.approx(one["prototypes_used"], abs=0.1)


@pytest.mark.parametrize(
    "argv",
    [
        "--sobel --sobel_padding 2 --precision bf16",
        "--arch alexnet --width 0.02 --size_crops 64 --sobel true",
        "--nmb_crops 1 2 --size_crops 12 8 --min_scale_crops 0.4 0.2 --max_scale_crops 1 0.5",
        "--in_chans 1 --decay_epochs --lr_scaling linear --blur 0.5",
    ],
)
def test_every_option_trains(few, tmp_path, argv):
    status, values = train(tmp_path, *few, *argv.split())
    assert status == 0 and len(values) == 2
    assert all(0 < loss < 5 for loss in values.values())


def test_vgg16_trains(few, tmp_path):
    argv = shlex.split("--arch vgg16 --width 0.05 --size_crops 32")
    assert train(tmp_path, *few, *argv)[0] == 0


@pytest.mark.slow
def test_training_goes_on_from_given_weights(whole, few, tmp_path):
    train(tmp_path, *few, "--lr", 1e-9, "--init_from", whole[0])
    states = [
        torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
        for folder in (tmp_path, whole[0])
    ]
    for name in ("trunk.conv1.weight", "top_layer.weight"):
        torch.testing.assert_close(states[0][name], states[1][name], atol=1e-6, rtol=0)


def test_released_weights_are_matched_by_name(few, tmp_path):
    """The names in DeeperCluster's files, with another classifier at their end; a narrower network,
    for the time it takes."""
    keys = json.loads((ROOT / "tests" / "golden" / "deepercluster_vgg16_keys.json").read_text())
    names = {key if isinstance(key, str) else key[0] for key in keys}
    width = ["--arch", "vgg16", "--width", "0.03", "--sobel", "true", "--sobel_padding", "2"]
    own = build_convnet("vgg16", 4, sobel=True, sobel_padding=2, width=0.03).state_dict()
    put = "body." if any(name.startswith("body.") for name in names) else ""
    released = {}
    for name, value in own.items():
        if not name.startswith("top_layer."):
            released[name if name.startswith("sobel.") else put + name] = value + 1
    counters = {name for name in released if name.endswith("num_batches_tracked")}
    assert set(released) - counters <= names
    released["pred_layer.weight"] = torch.zeros(7, 4)
    torch.save({"state_dict": {f"module.{k}": x for k, x in released.items()}}, tmp_path / "r.pth")
    argv = [*few, *width, "--size_crops", 32, "--lr", 1e-9, "--wd", 0]
    train(tmp_path / "run", *argv, "--init_from", tmp_path / "r.pth")
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["model"]
    for name in ("features.0.weight", "classifier.3.weight", "sobel.0.weight"):
        expected = own[name] + 1
        torch.testing.assert_close(state[name], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_evaluation_takes_the_runs_own_arguments(whole, tmp_path, capsys):
    assert eval_knn.main(["--pretrained", str(whole[0]), "--dump_path", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "missing: none; left over: top_layer.bias, top_layer.weight; wrong shape: none" in text


@pytest.mark.slow
def test_digits_are_learned_without_labels(tmp_path):
    """Two fifths of the bare command's epochs."""
    trained, untrained = few_label_accuracy(main_rotnet.main, tmp_path, "--epochs", 12)
    assert trained > untrained + 8, (trained, untrained)
    assert read_log(tmp_path)[-1]["accuracy"] > 70  # by chance 25


@pytest.mark.slow
def test_data_without_labels_and_broken_files_train_through(few, tmp_path):
    folder = images(tmp_path / "images", 30, broken_every=10)
    status, _ = train(tmp_path / "run", *few, "--data_path", folder, "--epochs", 2, "--knn_freq", 1)
    assert status == 0
    assert all("knn" not in line for line in read_log(tmp_path / "run"))


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--lr 0", "--lr"),
        ("--decay_epochs 0", "--decay_epochs"),
        ("--size_crops 12 8", "--size_crops"),
        ("--batch_size 5000", "--batch_size 5000"),
        ("--arch alexnet --size_crops 8", "too small"),
        ("--arch nothing", "--arch nothing"),
        ("--in_chans 1 --sobel", "--sobel"),
        ("--data_path /nowhere", "--data_path /nowhere"),
        ("--init_from /nowhere.pth", "/nowhere.pth"),
        ("--nmb_cluster 10", "--nmb_cluster"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        main_rotnet.flags.run(
            lambda: main_rotnet.main([*SMALL, "--dump_path", str(tmp_path / "run"), *argv.split()])
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.strip().count("\n") == 0, error
    assert not list(tmp_path.glob("run/*.pth"))


@pytest.mark.slow
def test_a_folder_of_another_method_is_refused_and_left_as_it_is(whole, tmp_path):
    state = torch.load(whole[0] / "checkpoint.pth", weights_only=True)
    torch.save({**state, "method": "deepcluster"}, tmp_path / "checkpoint.pth")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(OSError, match="another method"):
        train(tmp_path)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.slow
def test_broken_images_are_counted_and_other_names_are_a_word(few, tmp_path):
    folder = images(tmp_path / "images", 21, broken_every=10)
    (folder / "a.heic").touch()
    assert train(tmp_path / "run", *few, "--data_path", folder, "--workers", 1)[0] == 0
    assert read_log(tmp_path / "run")[-1]["broken_images"] == 3
    (folder / "00003.jpg").rename(folder / "3.jpg")
    assert train(tmp_path / "run", *few, "--data_path", folder, "--epochs", 2)[0] == 0
    text = (tmp_path / "run" / "train.log").read_text()
    assert "21 images (left out: 1 .heic)" in text and "3 broken images | " in text
    assert text.count("have other names than before") == 1


@pytest.mark.slow
@pytest.mark.parametrize("place", [".", "runs/a"])
def test_a_run_among_the_images_sees_none_of_its_own_pictures(
    few, tmp_path, place, monkeypatch, capsys
):
    for name in "ab":
        images(tmp_path / name, 24)
    monkeypatch.chdir(tmp_path)
    for epochs in (1, 2):
        status, _ = train(place, *few, "--data_path", ".", "--batch_size", 12, "--epochs", epochs)
        assert status == 0
    assert (tmp_path / place / "plots" / "crops.png").is_file()
    assert eval_knn.main(["--pretrained", place, "--device", "cpu", "--workers", "0"]) == 0
    assert "48 of 48 images" in capsys.readouterr().out
    assert (tmp_path / place / "train.log").read_text().count(": 48 images") == 2


@pytest.mark.slow
def test_a_run_that_learns_nothing_is_named_while_it_happens(few, tmp_path, capsys):
    weights = build_convnet("resnet10", 4, stem="small", width=0.125).state_dict()
    weights["top_layer.weight"].zero_()
    torch.save(weights, tmp_path / "flat.pth")
    argv = (*few, "--batch_size", 2, "--lr", 1e-12, "--init_from", tmp_path / "flat.pth")
    train(tmp_path / "said", *argv)
    assert "WARNING: the loss stays at ln(K) = 1.386" in capsys.readouterr().out
    with pytest.raises(main_rotnet.flags.RunError, match="--lr"):
        train(tmp_path / "stopped", *argv, "--abort_on_collapse")


# ============ the launcher ============
def test_the_launcher_runs_what_deepercluster_starts_from(tmp_path):
    path = ROOT / "scripts" / "rotnet_vgg16_pretrain.sh"
    args = checked_arguments(path, "main_rotnet.py", tmp_path)
    assert {"gpus=64", f"job-name={path.stem}"} <= set(sbatch_lines(path))
    assert (args.arch, args.sobel, args.sobel_padding) == ("vgg16", True, 2)
    assert (args.batch_size * 4, args.lr, args.decay_epochs, args.wd) == (48, 0.1, [], 1e-5)
    assert args.syncbn_process_group_size == 0 and args.precision == "fp32"
