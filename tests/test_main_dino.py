"""main_dino.py as its users run it: bare, resumed, killed, misused, collapsed, on several processes."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch

import eval_knn
import main_dino
import main_swav
from src.data.datasets import open_dataset
from src.evaluate import probe
from src.evaluate.splits import Part
from src.pictures.curves import series_of
from src.run.log import read_log
from tests.gloo import kill_mains, run_mains, start_mains
from tests.runs import ROOT, images, losses, one_panel, signal_handlers, wait_for_lines

pytestmark = pytest.mark.usefixtures(signal_handlers.__name__, one_panel.__name__)

SMALL = shlex.split(
    "--arch vit_micro --width 0.25 --patch_size 4 --out_dim 64 --hidden_dim 32 "
    "--bottleneck_dim 16 --global_crops_size 16 --local_crops_size 8 --local_crops_number 2 "
    "--batch_size 128 --epochs 2 --warmup_epochs 0 --lr 0.002 --min_lr 0.0001 --drop_path_rate 0.1 "
    "--weight_decay_end 0.4 "
    "--workers 0 --log_freq 1 --knn_freq 0 --no-tensorboard"
)


def train(folder, *argv):
    """Run main in this process: its status and the log by iteration."""
    status = main_dino.main([*SMALL, "--dump_path", str(folder), *map(str, argv)])
    return status, losses(folder)


def saved(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """A second for each epoch; the run of `whole`, which is started before this, draws them."""
    monkeypatch.setattr(main_dino.Run, "plot", lambda *_: None)


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
    lines = [line for line in read_log(folder) if "knn" not in line]
    health = {"teacher_entropy", "student_kl", "kl_to_uniform", "center_norm", "prototypes_used"}
    assert all(health | {"embedding_std", "rankme", "unique"} <= line.keys() for line in lines)
    assert 20 < read_log(folder)[-1]["knn"] <= 100
    state = saved(folder)
    assert state["epoch"] == 2 and state["method_state"]["dino_loss"]["center"].shape == (1, 64)
    student, teacher = state["student"], state["teacher"]
    assert student.keys() == teacher.keys()
    assert {"backbone.pos_embed", "head.mlp.0.weight", "head.last_layer.weight_v"} <= student.keys()
    moved = (student["head.mlp.0.weight"] - teacher["head.mlp.0.weight"]).abs().max()
    assert 1e-5 < moved < 1


@pytest.mark.slow
def test_the_last_layer_stays_frozen_for_as_long_as_asked_and_its_norms_stay_one(
    whole, few, tmp_path
):
    train(tmp_path, *few, "--epochs", 1, "--freeze_last_layer", 1)
    frozen, free = saved(tmp_path)["student"], saved(whole[0])["student"]
    torch.manual_seed(0)
    args = main_dino.get_parser().parse_args(SMALL)
    fresh = main_dino.build_network(args, 0.1).head.last_layer.weight_v
    assert torch.equal(frozen["head.last_layer.weight_v"], fresh)
    assert (free["head.last_layer.weight_v"] - fresh).abs().max() > 1e-4
    assert torch.equal(free["head.last_layer.weight_g"], torch.ones(64, 1))


def test_schedules_reach_the_optimizer_and_norms_have_no_weight_decay(whole):
    first, second = saved(whole[0])["optimizer"]["param_groups"]
    assert 0.3 < first["weight_decay"] < 0.4 and second["weight_decay"] == 0
    assert first["lr"] == second["lr"] < 0.0005


@pytest.mark.slow
def test_one_epoch_and_one_more_equal_two(whole, tmp_path, monkeypatch):
    iterations = iter(range(20))
    with monkeypatch.context() as patch:
        must_stop = main_dino.Run.must_stop

        def send_a_signal_in_the_tenth(self, done):
            if next(iterations) == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return must_stop(self, done)

        patch.setattr(main_dino.Run, "must_stop", send_a_signal_in_the_tenth)
        assert train(tmp_path)[0] == 128 + signal.SIGTERM
    status, values = train(tmp_path)
    assert status == 0 and values == whole[1]
    for section in ("student", "teacher"):
        ours, theirs = saved(tmp_path)[section], saved(whole[0])[section]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on_to_the_last_bit(tmp_path, few):
    """With workers; of one process see tests/faults."""
    argv = [*SMALL, *few, "--epochs", 3, "--checkpoint_iters", 3, "--batch_size", 4, "--workers", 1]
    run_mains("main_dino", tmp_path / "whole", argv, 2)
    killed = start_mains("main_dino", tmp_path / "killed", argv, 2)
    wait_for_lines(tmp_path / "killed", killed[0], random.randint(4, 14))
    kill_mains(killed)
    run_mains("main_dino", tmp_path / "killed", argv, 2)
    assert "continues from epoch" in (tmp_path / "killed" / "train.log").read_text()
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_another_number_of_processes_takes_the_run_over(tmp_path):
    run_mains("main_dino", tmp_path, [*SMALL, "--batch_size", 64, "--epochs", 1], 2)
    assert train(tmp_path, "--batch_size", 128, "--epochs", 2)[0] == 0
    assert sorted(line["iteration"] for line in read_log(tmp_path)) == list(range(20))


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        "--arch resnet18 --width 0.125 --stem small --use_bn_in_head true",
        "--arch mobilenet_v3_small --width 1 --stem imagenet --global_crops_size 32 --local_crops_size 16",
        "--arch deit_tiny --depth 2 --num_registers 2",
        "--teacher_output sinkhorn",
        "--teacher_output batch_softmax",
        "--no-l2_bottleneck --head_layers 2",
        "--head_layers 1 --norm_last_layer false --freeze_last_layer 0",
        "--optimizer sgd --lr 0.03 --weight_decay 1e-4 --weight_decay_end 1e-4",
        "--optimizer lars --lr 0.3 --clip_grad 0",
        "--local_crops_number 0",
        "--local_crops_number 3 --local_crops_size 10 --global_crops_size 18",
        "--teacher_temp 0.07 --warmup_teacher_temp_epochs 1 --center_momentum 0.99",
        "--in_chans 1 --blur 0 --solarize 0 --color_jitter 0 --grayscale 0 --no_flip",
        "--precision bf16",
        "--blur 1 0.1 0.5 --solarize 0 0.2 0 --workers 2",
        "--img_size 32",
    ],
)
def test_every_option_trains(tmp_path, few, argv):
    status, values = train(tmp_path, *few, "--epochs", "1", *argv.split())
    assert status == 0 and sorted(values) == [0, 1, 2]
    assert all(0 < loss < 20 for loss in values.values())


def test_the_published_command_line_is_understood_and_means_the_published_values():
    argv = shlex.split(
        "--arch deit_small --patch_size 16 --data_path /in1k/train --output_dir out --use_fp16 true "
        "--norm_last_layer false --warmup_teacher_temp 0.04 --teacher_temp 0.07 "
        "--warmup_teacher_temp_epochs 30 --weight_decay 0.04 --weight_decay_end 0.4 --clip_grad 0 "
        "--batch_size_per_gpu 64 --epochs 800 --freeze_last_layer 1 --lr 0.0005 --warmup_epochs 10 "
        "--min_lr 1e-05 --global_crops_scale 0.25 1.0 --local_crops_scale 0.05 0.25 "
        "--local_crops_number 10 --seed 0 --num_workers 10 --optimizer adamw "
        "--momentum_teacher 0.996 --use_bn_in_head false --drop_path_rate 0.1 --saveckp_freq 20 "
        "--dist_url env:// --local_rank 0"
    )
    args = main_dino.flags.parse_args(main_dino.get_parser(), main_dino.PRESETS, argv)
    assert main_dino.crop_options(args) == {
        "num_crops": [2, 10],
        "size_crops": [224, 96],
        "min_scale_crops": [0.25, 0.05],
        "max_scale_crops": [1.0, 0.25],
        "seed": 0,
        "interpolation": "bicubic",
        "reduced_decoding": False,
    }
    assert (args.color_jitter, args.interpolation) == ([0.4, 0.4, 0.2, 0.1], "bicubic")
    assert (args.blur, args.solarize) == ([1.0, 0.1, 0.5], [0.0, 0.2, 0.0])
    assert args.lr * main_dino.flags.lr_factor(args, 1024) == 0.002
    assert (args.norm_last_layer, args.precision, args.checkpoint_freq) == (False, "auto", 20)


@pytest.mark.slow
def test_training_goes_on_from_given_weights(whole, few, tmp_path):
    frozen = (*few, "--epochs", 1, "--lr", 1e-12, "--min_lr", 0, "--momentum_teacher", 1)
    train(tmp_path / "both", *frozen, "--init_from", whole[0])
    before, after = saved(whole[0]), saved(tmp_path / "both")
    for section in ("student", "teacher"):
        name = "backbone.blocks.0.attn.qkv.weight"
        torch.testing.assert_close(after[section][name], before[section][name], atol=1e-6, rtol=0)
    names = {k: v for k, v in before["teacher"].items() if k.startswith("backbone.")}
    torch.save(
        {k.removeprefix("backbone."): v for k, v in names.items()}, tmp_path / "released.pth"
    )
    train(tmp_path / "backbone", *frozen, "--init_from", tmp_path / "released.pth")
    after = saved(tmp_path / "backbone")
    for section in ("student", "teacher"):
        for name, value in names.items():
            torch.testing.assert_close(after[section][name], value, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_evaluation_takes_the_teacher_and_the_runs_own_arguments(whole, tmp_path, capsys):
    assert eval_knn.main(["--pretrained", str(whole[0]), "--dump_path", str(tmp_path)]) == 0
    found = capsys.readouterr().out
    logged = read_log(whole[0])[-1]["knn"]  # every tenth training image, 20 neighbours
    assert "UNTRAINED" not in found and logged > 20


def few_label_accuracy(main, folder, *argv):
    """k-NN on digits with 5 labels a class, in percent: of a run of main and of its untrained network.

    The run has a digits preset and what argv says, and draws no curves, which take a second an epoch.
    """
    flags = ["--data_path", "digits", "--dump_path", folder, "--knn_freq", 0, "--no-tensorboard"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_dino.Run, "plot", lambda *_: None)
        assert main([str(word) for word in [*flags, *argv]]) == 0
    argv = ["--pretrained", str(folder), "--dump_path", str(folder / "knn"), "--untrained"]
    assert eval_knn.main([*argv, "--labels_per_class", "5", "--nb_knn", "5"]) == 0
    rows = json.loads((folder / "knn" / "eval_knn.json").read_text())["results"]
    few = {row["features"]: row["top1"] for row in rows if row["labels"] == 5}
    return few.pop("backbone"), *few.values()


@pytest.mark.slow
def test_a_small_vision_transformer_learns_digits_without_labels(tmp_path):
    """A third of the bare command, at half the width."""
    trained, untrained = few_label_accuracy(
        main_dino.main, tmp_path, "--epochs", 12, "--width", 0.5
    )
    assert trained > untrained + 10, (trained, untrained)


# ============ what can go wrong ============
@pytest.mark.parametrize(
    "argv, words",
    [
        ("--data_path /nowhere", "--data_path /nowhere"),
        ("--arch vit_huge", "--arch vit_huge"),
        ("--arch resnet18 --num_registers 4", "--num_registers"),
        ("--out_dim 0", "--out_dim"),
        ("--teacher_temp 0", "--teacher_temp"),
        ("--momentum_teacher 1.2", "--momentum_teacher"),
        ("--warmup_teacher_temp_epochs 30", "--warmup_teacher_temp_epochs 30 exceeds --epochs 2"),
        ("--warmup_epochs 99", "--warmup_epochs 99"),
        ("--global_crops_scale 0.4", "--global_crops_scale"),
        ("--local_crops_scale 0.4 0.05", "--local_crops_scale"),
        ("--local_crops_size 3", "--patch_size"),
        ("--blur 1 0.1 0.5 0.5 0.5 0.5", "--blur has 6 values"),
        ("--batch_size 5000", "--batch_size 5000"),
        ("--init_from /nowhere.pth", "/nowhere.pth"),
        ("--device cuda:99", "--device cuda:99"),
        ("--dump_path {file}", "--dump_path"),
        ("--norm_last_layer maybe", "--norm_last_layer"),
        ("--unknown 3", "--unknown"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, capsys, argv, words):
    (tmp_path / "file").write_text("")
    argv = argv.format(file=tmp_path / "file").split()
    with pytest.raises(SystemExit) as stop:
        main_dino.flags.run(
            lambda: main_dino.main([*SMALL, "--dump_path", str(tmp_path / "run"), *argv])
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.strip().count("\n") == 0, error


@pytest.mark.slow
def test_a_folder_of_another_network_or_method_is_refused_and_left_as_it_is(whole, tmp_path):
    before = (whole[0] / "checkpoint.pth").read_bytes()
    with pytest.raises(OSError, match="--out_dim"):
        train(whole[0], "--out_dim", "65", "--epochs", "3")
    with pytest.raises(OSError, match="--patch_size"):
        train(whole[0], "--patch_size", "2", "--epochs", "3")
    with pytest.raises(OSError, match="--optimizer adamw, not sgd"):
        train(whole[0], "--optimizer", "sgd", "--epochs", "3")
    assert (whole[0] / "checkpoint.pth").read_bytes() == before
    state = saved(whole[0])
    state["model"] = state.pop("student")
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(OSError, match="another method"):
        train(tmp_path)


def test_a_folder_of_images_without_labels_trains(tmp_path):
    folder = images(tmp_path / "images", 60, broken_every=20, size=20)
    status, _ = train(
        tmp_path / "run", "--data_path", folder, "--epochs", 1, "--batch_size", 20, "--knn_freq", 1
    )
    assert status == 0
    text = (tmp_path / "run" / "train.log").read_text()
    assert "60 images" in text and "00020.jpg" in text and "00040.jpg" in text
    arguments = json.loads((tmp_path / "run" / "args.json").read_text())
    assert arguments["std"] == [0.229, 0.224, 0.225]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_without_touching_the_last_good_checkpoint(tmp_path, few):
    train(tmp_path, *few, "--epochs", "1")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(main_dino.flags.RunError, match="--lr"):
        train(tmp_path, *few, "--epochs", "3", "--lr", "1e30", "--log_freq", "50")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.slow
def test_help_reads_without_a_gpu_or_network_and_shows_the_published_defaults():
    text = subprocess.run(
        [sys.executable, "main_dino.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for words in ("arXiv:2104.14294", "(default: 65536)", "(default: 0.996)", "tau_t", "vit_small"):
        assert words in text


@pytest.mark.slow
def test_a_teacher_without_momentum_and_centre_is_seen_to_collapse(tmp_path):
    """Section 5.6.2: a teacher that copies the student fails; 5.6.3: without centring one output wins."""
    argv = ["--momentum_teacher", "0", "--momentum_teacher_end", "0", "--center_momentum", "1"]
    argv = [*SMALL, *argv, "--epochs", "6"]
    main_dino.main([*argv, "--dump_path", str(tmp_path / "said")])
    assert "WARNING: collapse" in (tmp_path / "said" / "train.log").read_text()
    with pytest.raises(main_dino.flags.RunError, match="--center_momentum"):
        main_dino.main([*argv, "--dump_path", str(tmp_path / "stopped"), "--abort_on_collapse"])


@pytest.mark.slow
def test_uniform_outputs_are_named_while_it_happens(tmp_path, capsys):
    train(tmp_path, "--teacher_temp", "100", "--warmup_teacher_temp", "100")
    assert "output is uniform" in capsys.readouterr().out


# ============ student and teacher ============
@pytest.fixture
def few_digits(monkeypatch):
    """--probe_data a=digits is of a few of them, so that its evaluation takes a moment."""
    digits = open_dataset("digits")
    parts = Part(digits, list(range(100))), Part(digits, list(range(100, 200)))
    monkeypatch.setattr(probe, "open_probe_set", lambda *_: parts)


@pytest.mark.slow
def test_student_and_teacher_are_evaluated_by_name_and_training_is_the_same(
    few, few_digits, tmp_path
):
    lines = {}
    for name, networks in {"both": ["student", "teacher"], "student": ["student"], "": []}.items():
        argv = [*few, "--epochs", 2, "--knn_freq", 1, "--probe_data", "a=digits"]
        argv += ["--probe_networks", *networks] if networks else []
        assert train(tmp_path / name, *argv, "--dump_path", tmp_path / name)[0] == 0
        lines[name] = [line for line in read_log(tmp_path / name) if "knn" in line]
        assert [line["epoch"] for line in lines[name]] == [0, 1]
    assert losses(tmp_path / "both") == losses(tmp_path / "") == losses(tmp_path / "student")
    both, student, usual = (lines[name][-1] for name in ("both", "student", ""))
    assert both["knn_a"] == both["teacher_knn_a"] == usual["knn_a"] != both["student_knn_a"]
    assert both["linear_a"] == both["teacher_linear_a"] == usual["linear_a"]
    assert student["knn_a"] == student["student_knn_a"] == both["student_knn_a"]
    assert not {"teacher_knn_a", "student_knn_a"} & usual.keys() and "teacher_knn_a" not in student
    text = " ".join((tmp_path / "both" / "train.log").read_text().split())
    assert re.search(r"teacher a: 20-NN [\d.]+ %, linear [\d.]+ %; student a: 20-NN", text)


def test_networks_share_a_panel_of_the_curves():
    lines = [{"knn": 2.0, "student_knn": 1.0, "teacher_knn": 2.0, "loss": 3.0}]
    assert series_of("knn", lines) == ["student_knn", "teacher_knn"]
    assert series_of("loss", lines) == ["loss"] and series_of("knn", [{"knn": 2.0}]) == ["knn"]
    assert series_of("knn", [{"knn": 1.0, "student_knn": 1.0}]) == ["student_knn"]


def test_probe_networks_are_refused_without_evaluations_and_where_there_is_no_teacher(
    few, tmp_path, capsys
):
    with pytest.raises(ValueError, match="--probe_networks needs --knn_freq"):
        train(tmp_path, *few, "--probe_networks", "student")
    with pytest.raises(SystemExit) as stopped:
        main_swav.main(["--probe_networks", "student", "teacher"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "unrecognized arguments: --probe_networks" in error and error.count("\n") == 1
