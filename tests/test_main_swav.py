"""main_swav.py as its users run it: bare, resumed, killed, signalled, misused, on several processes."""

import json
import os
import random
import re
import shlex
import signal

import pytest
import torch

import main_swav
from src.run.log import read_log
from tests import runs
from tests.gloo import Main, kill_mains, run_mains, start_mains
from tests.runs import (
    children_of,
    images,
    losses,
    one_panel,
    signal_handlers,
    wait_for_lines,
)

pytestmark = pytest.mark.usefixtures(signal_handlers.__name__, one_panel.__name__)

SMALL = shlex.split(
    "--arch resnet10 --width 0.125 --stem small --hidden_mlp 32 --feat_dim 16 --nmb_crops 2 1 "
    "--size_crops 16 8 --nmb_prototypes 10 --batch_size 128 --epochs 2 --warmup_epochs 0 "
    "--freeze_prototypes_niters 3 --base_lr 0.5 --workers 0 --log_freq 1 --knn_freq 0 --no-tensorboard"
)


def train(folder, *argv):
    """Run main in this process: its status and the log by iteration."""
    status = main_swav.main([*SMALL, "--dump_path", str(folder), *map(str, argv)])
    return status, losses(folder)


def start(folder, *argv, **options):
    """Run the script as a user does, in a process group of its own."""
    return runs.start("main_swav.py", folder, *SMALL, *argv, **options)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """A second for each epoch; the run of `whole`, which is started before this, draws them."""
    monkeypatch.setattr(main_swav.Run, "plot", lambda *_: None)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Flags for three iterations an epoch, on images of noise."""
    folder = images(tmp_path_factory.mktemp("few") / "images", 96)
    return ["--data_path", folder, "--preset", "tiny", "--batch_size", 32]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: folder and losses."""
    folder = tmp_path_factory.mktemp("whole")
    status, values = train(folder, "--knn_freq", "2", "--checkpoint_freq", "1")
    assert status == 0
    return folder, values


@pytest.mark.slow  # for TensorBoard
def test_the_screen_is_100_columns_wide_and_shows_tensorboard_the_way(tmp_path, few, capsys):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    assert train(folder, *few, "--epochs", 1, "--tensorboard")[0] == 0
    said = capsys.readouterr().out.splitlines()
    assert f"watch       tensorboard --logdir {folder}" in said
    told = [line for line in said if str(tmp_path.parent) not in line]
    told = [line for line in told if not line.startswith(("WARNING", "command: "))]
    assert len(told) > 10 and max(map(len, told)) <= 100
    assert any(line.startswith("epoch 1/1 it 3 loss ") for line in told)
    assert any(line.startswith("  codes H ") for line in told)
    kept = (folder / "train.log").read_text().splitlines()
    assert any("it 3 loss" in line and "codes H" in line for line in kept)


def test_a_run_leaves_what_the_readme_promises(whole):
    folder, values = whole
    assert sorted(values) == list(range(20))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *(
            "checkpoint.pth",
            "checkpoint.prev.pth",
            "checkpoints/ckp-1.pth",
            "checkpoints/ckp-2.pth",
        ),
        *("log.jsonl", "train.log", "args.json", "plots/curves.png", "plots/crops.png"),
    }
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    wanted = {
        *("loss", "lr", "gradient_norm", "images_per_second", "data_share", "eta_seconds"),
        *("peak_memory_mb", "code_entropy", "prototypes_used", "embedding_std", "rankme"),
        "unique",
    }
    assert all(wanted <= line.keys() for line in lines if "knn" not in line)
    assert 20 < lines[-1]["knn"] <= 100
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert state["epoch"] == 2 and state["args"]["epsilon"] == 0.02
    text = (folder / "train.log").read_text()
    assert "ln(K) = 2.303" in text and "loss" in text


@pytest.mark.slow
def test_the_prototypes_stay_frozen_for_as_long_as_asked(whole, few, tmp_path):
    train(tmp_path / "a", *few, "--epochs", 1, "--freeze_prototypes_niters", 100)
    train(
        tmp_path / "b", *few, "--epochs", 1, "--fixed_prototypes", "--freeze_prototypes_niters", 0
    )
    weights = {}
    for name in "ab":
        state = torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        weights[name] = state["model"]["prototypes.weight"]
    torch.manual_seed(31)
    network = main_swav.build_model(
        "resnet10", stem="small", width=0.125, hidden_mlp=32, output_dim=16, nmb_prototypes=10
    )
    fresh = torch.nn.functional.normalize(network.prototypes.weight.detach(), dim=1)
    torch.testing.assert_close(weights["a"], fresh)
    torch.testing.assert_close(weights["b"], fresh)
    state = torch.load(whole[0] / "checkpoint.pth", weights_only=True)
    assert (state["model"]["prototypes.weight"] - fresh).abs().max() > 1e-3


def test_one_epoch_and_one_more_equal_two(whole, tmp_path, monkeypatch):
    iterations = iter(range(20))
    with monkeypatch.context() as patch:
        must_stop = main_swav.Run.must_stop

        def send_a_signal_in_the_tenth(self, done):
            if next(iterations) == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return must_stop(self, done)

        patch.setattr(main_swav.Run, "must_stop", send_a_signal_in_the_tenth)
        assert train(tmp_path)[0] == 128 + signal.SIGTERM
    status, values = train(tmp_path)
    assert status == 0 and values == whole[1]


@pytest.mark.slow
def test_a_stopped_run_with_reduced_decoding_goes_on_to_the_last_bit(tmp_path, monkeypatch):
    folder = images(tmp_path / "images", 64, size=120)
    argv = ("--data_path", folder, "--preset", "tiny", "--batch_size", 16, "--epochs", 1)
    assert train(tmp_path / "plain", *argv)[0] == 0
    argv = (*argv, "--reduced_decoding")
    status, expected = train(tmp_path / "whole", *argv)
    assert status == 0 and expected != losses(tmp_path / "plain") and len(expected) == 4
    with monkeypatch.context() as patch:
        must_stop = main_swav.Run.must_stop

        def send_a_signal_in_the_second(self, done):
            if done == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return must_stop(self, done)

        patch.setattr(main_swav.Run, "must_stop", send_a_signal_in_the_second)
        assert train(tmp_path / "stopped", *argv)[0] == 128 + signal.SIGTERM
    assert len(losses(tmp_path / "stopped")) == 2
    assert train(tmp_path / "stopped", *argv) == (0, expected)


def test_a_finished_run_is_left_as_it_is(whole, capsys):
    before = (whole[0] / "checkpoint.pth").stat().st_mtime_ns
    assert train(whole[0])[0] == 0
    assert (whole[0] / "checkpoint.pth").stat().st_mtime_ns == before
    assert "all epochs are done" in capsys.readouterr().out


QUEUE = "--queue_length 32 --epoch_queue_starts 0 --checkpoint_iters 3 --epochs 3".split()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_last_bit(tmp_path, few, processes):
    argv = (*few, *QUEUE, "--batch_size", 8 // processes, "--workers", processes - 1)
    if processes == 1:
        train(tmp_path / "whole", *argv)
        killed = Main("main_swav", tmp_path / "killed", [*SMALL, *argv])
    else:
        run_mains("main_swav", tmp_path / "whole", [*SMALL, *argv], processes)
        killed = start(tmp_path / "killed", *argv, processes=processes)
    wait_for_lines(tmp_path / "killed", killed, random.randint(4, 14))
    for pid in [*children_of(killed), killed.pid]:  # torchrun's workers have sessions of their own
        os.kill(pid, signal.SIGKILL)
    killed.wait()
    if processes == 1:
        train(tmp_path / "killed", *argv)
    else:
        run_mains("main_swav", tmp_path / "killed", [*SMALL, *argv], processes)
    assert "continues from epoch" in (tmp_path / "killed" / "train.log").read_text()
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert found == expected
    # lines that were written before the kill and again after it are equal too
    lines = [json.loads(x) for x in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert all(line["loss"] == expected[line["iteration"]] for line in lines)


def check_stopped(folder, name, output):
    assert f"stopped by {name}" in output, output
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    last = max(line["iteration"] for line in read_log(folder))
    assert saved["epoch"] * 10 + saved["samples_done"] // 128 == last + 1


@pytest.mark.slow
def test_a_signal_to_one_process_of_two_stops_both_at_the_same_iteration(tmp_path):
    folder, argv = tmp_path / "run", [*SMALL, "--batch_size", 64, "--epochs", 400]
    processes = start_mains("main_swav", folder, argv, 2)
    wait_for_lines(folder, processes[0], 3)
    processes[1].send_signal(signal.SIGUSR1)
    assert [process.wait() for process in processes] == [128 + signal.SIGUSR1] * 2
    check_stopped(folder, "SIGUSR1", processes[0].read())


@pytest.mark.slow
@pytest.mark.parametrize("name, processes", [("SIGTERM", 1), ("SIGUSR1", 2)])
def test_a_signal_finishes_the_iteration_saves_and_leaves(tmp_path, name, processes):
    process = start(
        tmp_path, "--batch_size", 128 // processes, "--epochs", 400, processes=processes
    )
    wait_for_lines(tmp_path, process, 3)
    if processes == 1:
        process.send_signal(getattr(signal, name))
    else:  # torchrun does not pass SIGUSR1 on; Slurm sends it to every process of the step
        os.kill(children_of(process)[0], getattr(signal, name))
    output = process.communicate(timeout=120)[0]
    check_stopped(tmp_path, name, output)
    if processes == 1:
        assert process.returncode == 128 + getattr(signal, name)


@pytest.mark.slow
def test_another_number_of_processes_takes_the_run_over(tmp_path):
    argv = ("--queue_length", "256", "--epoch_queue_starts", "0")
    run_mains("main_swav", tmp_path, [*SMALL, *argv, "--batch_size", 64, "--epochs", 1], 2)
    assert train(tmp_path, *argv, "--batch_size", 128, "--epochs", 2)[0] == 0
    assert sorted(line["iteration"] for line in read_log(tmp_path)) == list(range(20))


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        "--queue_length 64 --epoch_queue_starts 1 --epochs 2",
        "--nmb_prototypes 10 20",
        "--head_dims 32 32 16",
        "--no-head_bn",
        "--hidden_mlp 0",
        "--optimizer lars",
        "--optimizer sgd --base_lr 0.05",
        "--optimizer adamw --base_lr 0.001",
        "--sinkhorn_float64 --epsilon 0.01 --sinkhorn_iterations 5",
        "--hard_assignment_iters 2",
        "--crops_for_assign 0 1 2",
        "--in_chans 1 --no_flip --color_jitter 0 --grayscale 0 --blur 0",
        "--precision bf16",
        "--lr_scaling linear --lr_reference_batch 128",
        "--arch mobilenet_v3_small --width 1 --stem imagenet --size_crops 32 16",
        "--workers 2",
        "--interpolation bicubic --solarize 0.2",
        "--zero_init_residual",
        "--nmb_crops 2 --size_crops 16",
    ],
)
def test_every_option_trains(tmp_path, few, argv):
    status, values = train(tmp_path, *few, "--epochs", "1", *argv.split())
    assert status == 0 and sorted(values) == list(range(6 if "--epochs" in argv else 3))
    assert all(0 < loss < 20 for loss in values.values())


def test_training_goes_on_from_given_weights(whole, few, tmp_path):
    given = whole[0] / "checkpoint.pth"
    train(tmp_path, *few, "--epochs", 1, "--base_lr", "1e-9", "--final_lr", 0, "--init_from", given)
    assert re.search(r"matched (\d+) of \1 tensors", (tmp_path / "train.log").read_text())
    old = torch.load(given, weights_only=True)["model"]["conv1.weight"]
    new = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]["conv1.weight"]
    torch.testing.assert_close(new, old, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "count, processes", [(300, 1), pytest.param(2_000, 2, marks=pytest.mark.slow)]
)
def test_a_folder_with_one_percent_of_broken_files_trains_through(
    tmp_path, count, processes, capfd
):
    folder = images(tmp_path / "images", count, broken_every=100)
    argv = ("--data_path", folder, "--epochs", 1, "--batch_size", 50, "--workers", 1)
    argv += ("--preset", "tiny", "--knn_freq", 1, "--log_freq", 10)
    if processes == 1:
        assert train(tmp_path / "run", *argv)[0] == 0
        output = capfd.readouterr().out
    else:
        output = run_mains("main_swav", tmp_path / "run", [*SMALL, *argv], 2)
    assert f"{count:,} images" in output and "has no labels" in output
    named = set(re.findall(r"cannot read \S*/(\d{5}).jpg", output))
    assert named == {f"{i:05}" for i in range(0, count, 100)}


# ============ what can go wrong ============
@pytest.mark.parametrize(
    "argv, words",
    [
        ("--data_path /nowhere", "--data_path /nowhere"),
        ("--data_path {empty}", "no image in it"),
        ("--nmb_crops 2 6 --size_crops 24", "--size_crops has 1 values"),
        ("--nmb_prototypes 0", "--nmb_prototypes"),
        ("--epsilon 0", "--epsilon"),
        ("--epsilon -0.05", "--epsilon"),
        ("--temperature 0", "--temperature"),
        ("--sinkhorn_iterations 0", "--sinkhorn_iterations"),
        ("--queue_length 100", "--queue_length 100 has no room"),
        ("--arch resnet51", "--arch resnet51"),
        ("--batch_size 5000", "--batch_size 5000"),
        ("--crops_for_assign 0 7", "--crops_for_assign"),
        ("--nmb_crops 1 --size_crops 16", "--nmb_crops 1"),
        ("--warmup_epochs 99", "--warmup_epochs 99"),
        ("--dump_path {file}", "--dump_path"),
        ("--init_from /nowhere.pth", "/nowhere.pth"),
        ("--device cuda:99", "--device cuda:99"),
        ("--precision fp8", "--precision"),
        ("--unknown 3", "--unknown"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, capsys, argv, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    argv = argv.format(empty=tmp_path / "empty", file=tmp_path / "file").split()
    with pytest.raises(SystemExit) as stop:
        main_swav.flags.run(
            lambda: main_swav.main([*SMALL, "--dump_path", str(tmp_path / "run"), *argv])
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.strip().count("\n") == 0, error


def test_a_checkpoint_of_another_network_stops_the_run_and_stays(whole, tmp_path):
    before = (whole[0] / "checkpoint.pth").read_bytes()
    with pytest.raises(OSError, match="--nmb_prototypes"):
        train(whole[0], "--nmb_prototypes", "12", "--epochs", "3")
    with pytest.raises(OSError, match="--arch"):
        train(whole[0], "--arch", "resnet34", "--epochs", "3")
    assert (whole[0] / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--optimizer", "lars"], "--optimizer sgd, not lars"),
        (["--fixed_prototypes"], "--fixed_prototypes False, not True"),
        (["--data_path", "{images}"], "--data_path digits with 1,297 images, not 200"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_as_it_is(whole, tmp_path, argv, words):
    folder = images(tmp_path / "images", 200)
    before = {path: path.read_bytes() for path in whole[0].glob("*.[jp]*") if path.is_file()}
    argv = [word.format(images=folder) for word in argv]
    with pytest.raises(OSError, match=words):
        train(whole[0], "--epochs", "3", "--preset", "tiny", *argv)
    assert before == {path: path.read_bytes() for path in before}


def test_the_weight_decay_of_a_resumed_run_is_that_of_the_command_line(tmp_path, few):
    train(tmp_path, *few, "--epochs", 1, "--wd", 0.01)
    train(tmp_path, *few, "--epochs", 2, "--wd", 0.5)
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.5]


@pytest.mark.slow
def test_a_trunk_that_draws_random_numbers_goes_on_to_the_last_bit(tmp_path, few):
    argv = shlex.split("--arch efficientnet_b0 --width 1 --stem imagenet --checkpoint_iters 4")
    argv = [*few, *argv, "--epochs", 1, "--batch_size", 9]
    _, values = train(tmp_path / "whole", *argv)  # stochastic depth
    process = Main("main_swav", tmp_path / "killed", [*SMALL, *argv])
    wait_for_lines(tmp_path / "killed", process, 6)
    kill_mains([process])
    assert train(tmp_path / "killed", *argv)[1] == values


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_one_kills(tmp_path):
    process = Main("main_swav", tmp_path / "run", [*SMALL, "--epochs", 400])
    wait_for_lines(tmp_path / "run", process, 3)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and "stopped by SIGINT" in process.read()
    assert (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.mark.slow
def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path, few, capsys):
    _, values = train(tmp_path, *few)
    newest = tmp_path / "checkpoint.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    (tmp_path / "log.jsonl").unlink()
    status, again = train(tmp_path, *few)
    assert status == 0 and again == {i: values[i] for i in range(3, 6)}
    assert "the checkpoint before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_without_touching_the_last_good_checkpoint(tmp_path, few):
    train(tmp_path, *few, "--epochs", "1")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    for log_freq in (50, 1):
        with pytest.raises(main_swav.flags.RunError, match="--base_lr"):
            train(
                tmp_path,
                *few,
                "--epochs",
                3,
                "--optimizer",
                "sgd",
                "--base_lr",
                "1e30",
                "--log_freq",
                log_freq,
            )
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.slow
def test_a_collapse_is_named_while_it_happens(tmp_path, capsys):
    train(tmp_path, "--epsilon", "100", "--log_freq", "1")
    assert "WARNING: the codes are uniform" in capsys.readouterr().out
    with pytest.raises(main_swav.flags.RunError, match="--epsilon"):
        train(tmp_path / "again", "--epsilon", "100", "--abort_on_collapse")


def test_help_shows_the_published_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        main_swav.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for words in (
        "epsilon",
        "(default: 0.05)",
        "Eq. 3",
        "arXiv:2006.09882",
        "(default: [3000])",
        "tau",
    ):
        assert words in text
