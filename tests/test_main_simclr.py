"""main_simclr.py as its users run it: bare, resumed, killed, misused, on several processes."""

import os
import shlex
import signal

import pytest
import torch

import eval_knn
import main_simclr
from src.run.log import read_log
from tests.gloo import run_mains
from tests.runs import losses, one_panel, signal_handlers
from tests.test_main_dino import few_label_accuracy

pytestmark = pytest.mark.usefixtures(signal_handlers.__name__, one_panel.__name__)

SMALL = shlex.split(
    "--arch resnet10 --width 0.125 --stem small --hidden_mlp 32 --feat_dim 16 --nmb_crops 2 1 "
    "--size_crops 16 8 --temperature 0.1 --batch_size 128 --epochs 2 --warmup_epochs 0 --base_lr 0.1 "
    "--workers 0 --log_freq 1 --knn_freq 0 --no-tensorboard"
)
FEW = ["--epochs", 1, "--batch_size", 400]  # three iterations


def train(folder, *argv):
    """Run main in this process: its status and the log by iteration."""
    status = main_simclr.main([*SMALL, "--dump_path", str(folder), *map(str, argv)])
    return status, losses(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: folder and losses."""
    folder = tmp_path_factory.mktemp("whole")
    status, values = train(folder, "--knn_freq", "2", "--checkpoint_freq", "1")
    assert status == 0
    return folder, values


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
    health = {"positive_cosine", "negative_cosine", "embedding_std", "rankme"}
    assert all(health | {"gradient_norm", "data_share"} <= line.keys() for line in lines)
    assert all(-1 <= line["negative_cosine"] < line["positive_cosine"] <= 1 for line in lines)
    assert 20 < read_log(folder)[-1]["knn"] <= 100
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert state["epoch"] == 2 and not state["method_state"]
    assert not any(name.startswith("prototypes") for name in state["model"])
    text = (folder / "train.log").read_text()  # 3 crops of 127 other images
    assert "2 positives and 381 negatives" in text and "ln(1 + 381) = 5.945" in text


@pytest.mark.slow
def test_the_loss_falls(whole):
    values = [whole[1][i] for i in range(20)]
    assert sum(values[-5:]) / 5 < sum(values[:5]) / 5 - 0.1


@pytest.mark.slow
def test_one_epoch_and_one_more_equal_two(whole, tmp_path, monkeypatch):
    iterations = iter(range(20))
    with monkeypatch.context() as patch:
        must_stop = main_simclr.Run.must_stop

        def send_a_signal_in_the_tenth(self, done):
            if next(iterations) == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return must_stop(self, done)

        patch.setattr(main_simclr.Run, "must_stop", send_a_signal_in_the_tenth)
        assert train(tmp_path)[0] == 128 + signal.SIGTERM
    status, values = train(tmp_path)
    assert status == 0 and values == whole[1]
    states = [
        torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
        for folder in (tmp_path, whole[0])
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.slow
def test_two_processes_equal_one_on_the_same_batches(tmp_path):
    """Few and small steps: float32 alone moves a gradient on digits by 2 % (in float64 both agree to
    3e-13), and photometry is drawn by rank, so that there is none."""
    argv = shlex.split("--optimizer sgd --base_lr 0.01 --no_flip --color_jitter 0 --grayscale 0")
    argv += ["--blur", 0, "--epochs", 1, "--temperature", 0.5]
    run_mains("main_simclr", tmp_path / "two", [*SMALL, *argv, "--batch_size", 200], 2)
    train(tmp_path / "one", *argv, "--batch_size", 400)
    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for key in ("loss", "positive_cosine", "negative_cosine"):
            assert two[key] == pytest.approx(one[key], abs=1e-3)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=0.1)


@pytest.mark.slow
def test_another_number_of_processes_takes_the_run_over(tmp_path):
    run_mains("main_simclr", tmp_path, [*SMALL, "--batch_size", 64, "--epochs", 1], 2)
    assert train(tmp_path, "--batch_size", 128, "--epochs", 2)[0] == 0
    assert sorted(line["iteration"] for line in read_log(tmp_path)) == list(range(20))


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        "--temperature 0.005",
        "--nmb_crops 2 --size_crops 16 --head_dims 32 32 16 --no-head_bn",
        "--optimizer larc --base_lr 0.3 --precision bf16",
        "--optimizer adamw --base_lr 0.001 --in_chans 1 --color_jitter 0 --grayscale 0 --blur 0",
    ],
)
def test_options_train(tmp_path, argv):
    status, values = train(tmp_path, *FEW, *argv.split())
    assert status == 0 and len(values) == 3
    assert all(0 < loss < 400 for loss in values.values())


@pytest.mark.slow
def test_training_goes_on_from_given_weights(whole, tmp_path):
    train(tmp_path, *FEW, "--base_lr", 1e-9, "--final_lr", 0, "--init_from", whole[0])
    states = [
        torch.load(folder / "checkpoint.pth", weights_only=True)["model"]["conv1.weight"]
        for folder in (tmp_path, whole[0])
    ]
    torch.testing.assert_close(*states, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_evaluation_takes_the_runs_own_arguments(whole, tmp_path, capsys):
    argv = ["--pretrained", str(whole[0]), "--dump_path", str(tmp_path), "--feature", "embedding"]
    assert eval_knn.main(argv) == 0
    assert "missing: none; left over: none; wrong shape: none" in capsys.readouterr().out


@pytest.mark.slow
def test_digits_are_learned_without_labels(tmp_path):
    """An eighth of the bare command's epochs, of large crops alone and with twice the steps."""
    argv = shlex.split("--epochs 8 --nmb_crops 2 --size_crops 16 --batch_size 64")
    trained, untrained = few_label_accuracy(main_simclr.main, tmp_path, *argv)
    assert trained > untrained + 10, (trained, untrained)


# ============ what can go wrong ============
@pytest.mark.parametrize(
    "argv, words",
    [
        ("--temperature 0", "--temperature"),
        ("--temperature nan", "--temperature"),
        ("--nmb_crops 1 --size_crops 16", "--nmb_crops 1"),
        ("--batch_size 1", "--batch_size 1"),
        ("--batch_size 5000", "--batch_size 5000"),
        ("--nmb_crops 2 6 --size_crops 24", "--size_crops has 1 values"),
        ("--warmup_epochs 99", "--warmup_epochs 99"),
        ("--data_path /nowhere", "--data_path /nowhere"),
        ("--init_from /nowhere.pth", "/nowhere.pth"),
        ("--nmb_prototypes 10", "--nmb_prototypes"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        main_simclr.flags.run(
            lambda: main_simclr.main([*SMALL, "--dump_path", str(tmp_path / "run"), *argv.split()])
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.strip().count("\n") == 0, error
    assert not list(tmp_path.glob("run/*.pth"))


@pytest.mark.slow
def test_a_folder_of_another_method_is_refused_and_left_as_it_is(whole, tmp_path):
    state = torch.load(whole[0] / "checkpoint.pth", weights_only=True)
    torch.save({**state, "method": "swav"}, tmp_path / "checkpoint.pth")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(OSError, match="another method"):
        train(tmp_path)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.slow
def test_a_collapse_is_named_while_it_happens(tmp_path, capsys):
    argv = ("--temperature", 100, "--epochs", 1)
    train(tmp_path / "said", *argv)
    assert "WARNING: the loss stays at ln(1 + 381)" in capsys.readouterr().out
    with pytest.raises(main_simclr.flags.RunError, match="--temperature"):
        train(tmp_path / "stopped", *argv, "--abort_on_collapse")
