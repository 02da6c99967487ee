"""src.run.flags: presets, crops, published spellings, errors in one sentence."""

import argparse
import importlib
import logging
from pathlib import Path

import pytest
import torch

from src.nets.backbones import build_backbone
from src.nets.weights import CheckpointError
from src.run import flags, image_flags
from src.run.log import setup_logging

PRESETS = {"imagenet": {}, "cifar": {"epochs": 7}, "tiny": {"epochs": 3, "nmb_crops": [2, 4]}}


def parser(warmup=None):
    parser = flags.Parser("A script.\n\nMore.")
    if warmup is not None:
        parser.add_argument("--warmup_epochs", type=int, default=warmup)
    parser.add_argument("--data_path", default="digits")
    parser.add_argument("--preset", default="auto", choices=["auto", *PRESETS])
    parser.add_argument("--epochs", type=flags.positive(int), default=100)
    parser.add_argument("--nmb_crops", type=flags.positive(int), nargs="+", default=[2])
    for name in ("size_crops", "min_scale_crops", "max_scale_crops"):
        parser.add_argument(f"--{name}", type=float, nargs="+", default=None)
    flags.add_runtime_args(parser)
    flags.add_training_args(parser)
    image_flags.add_augment_args(parser)
    return parser


def parse(*argv):
    args = flags.parse_args(parser(), PRESETS, list(argv))
    image_flags.fill_in_crops(args)
    return args


@pytest.mark.parametrize(
    "argv, preset, epochs",
    [
        ([], "tiny", 3),
        (["--epochs", "5"], "tiny", 5),
        (["--data_path", "cifar10"], "cifar", 7),
        (["--data_path", "/imagenet"], "imagenet", 100),
        (["--data_path", "/imagenet", "--preset", "tiny"], "tiny", 3),
    ],
)
def test_the_data_choose_the_preset_and_a_flag_wins(argv, preset, epochs):
    args = parse(*argv)
    assert (args.preset, args.epochs) == (preset, epochs)


@pytest.mark.parametrize(
    "argv, warmup",
    [
        ("--data_path /imagenet", 10),
        ("--data_path /imagenet --epochs 10", 10),
        ("--data_path /imagenet --epochs 9", 4),  # half of a run that is shorter
        ("--data_path /imagenet --epochs 1", 0),
        ("--epochs 5", 4),  # of the preset
        ("--epochs 3", 1),
        ("--epochs 3 --warmup_epochs 3", 3),
    ],
)
def test_a_usual_warm_up_fits_into_a_short_run_and_the_log_says_so(argv, warmup, caplog):
    presets = {**PRESETS, "tiny": {"warmup_epochs": 4}}
    args = flags.parse_args(parser(warmup=10), presets, argv.split())
    assert args.warmup_epochs == warmup
    args.batch_size = 8
    with caplog.at_level("INFO"):
        flags.check_batch(args, 8, 100)
    usual = {1: "usual 4 epochs", 4: "usual 10 epochs", 0: "usual 10 epochs"}.get(warmup)
    shortened = usual is not None and argv != "--epochs 5"
    assert len(caplog.messages) == shortened
    assert not shortened or f"the {usual} of warm-up are {warmup}" in caplog.text
    assert "note" not in args  # args.json has the flags alone


def test_a_warm_up_that_was_asked_for_and_exceeds_the_run_is_refused():
    presets = {**PRESETS, "tiny": {"warmup_epochs": 4}}
    for argv in (["--epochs", "3", "--warmup_epochs", "4"], ["--warmup_epochs", "101"]):
        args = flags.parse_args(parser(warmup=10), presets, argv)
        args.batch_size = 8
        with pytest.raises(ValueError, match=f"--warmup_epochs {argv[-1]} exceeds --epochs"):
            flags.check_batch(args, 8, 100)


METHODS = sorted(path.stem for path in Path(__file__).parents[2].glob("main_*.py"))


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("arch", ["regnet_y_400mf", "convnext_tiny", "timm:resnet26d"])
def test_what_a_preset_says_and_the_network_has_no_use_for_is_left_out(script, arch, caplog):
    module = importlib.import_module(script)

    def parse(*argv):
        return flags.parse_args(module.get_parser(), module.PRESETS, list(argv))

    args = parse("--arch", arch, "--epochs", "50")
    assert (args.stem, args.width) == ("imagenet", 1.0)
    sizes = [args.global_crops_size] if script == "main_dino" else args.size_crops
    assert min(sizes) == 32
    with caplog.at_level("INFO"):
        flags.check_batch(args, 8, 100)
    assert f"--arch {arch} is not: --stem imagenet" in caplog.text and "note" not in args
    ours = parse("--arch", "resnet18")
    assert ours.stem == "small" and "note" not in ours
    assert (
        parse("--arch", arch, "--stem", "small").stem == "small"
    )  # typed: refused where it is built
    assert parse("--arch", arch, "--width", "0.5").width == 0.5
    with pytest.raises(ValueError, match="--stem needs"):
        build_backbone("regnet_y_400mf", stem="small")


def test_a_preset_that_fits_the_network_says_nothing():
    from main_swav import PRESETS, get_parser

    args = flags.parse_args(get_parser(), PRESETS, ["--arch", "vgg11", "--data_path", "/imagenet"])
    assert "note" not in args and args.size_crops is None
    typed = ["--arch", "vgg11", "--size_crops", "48", "--nmb_crops", "2", "--width", "1", "--stem"]
    args = flags.parse_args(get_parser(), PRESETS, [*typed, "imagenet"])
    assert "note" not in args and args.size_crops == [48]


def test_two_resolutions_alone_imply_the_published_sizes_and_scales():
    args = parse("--data_path", "/imagenet", "--nmb_crops", "2", "6")
    assert args.size_crops == [224, 96]
    assert args.min_scale_crops == [0.14, 0.05] and args.max_scale_crops == [1.0, 0.14]
    assert parse("--data_path", "/imagenet").size_crops == [224]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--nmb_crops", "2", "6", "--size_crops", "224"], "--size_crops has 1 values"),
        (["--nmb_crops", "2", "2", "2"], "--size_crops has 2 values"),
        (
            ["--nmb_crops", "2", "--min_scale_crops", "0.5", "--max_scale_crops", "0.1"],
            "0 < min <= max",
        ),
        (["--nmb_crops", "2", "--min_scale_crops", "0"], "0 < min <= max"),
    ],
)
def test_crop_lists_that_do_not_fit_are_named(argv, words):
    with pytest.raises(ValueError, match=words):
        parse(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--epochs", "0"],
        ["--epochs", "x"],
        ["--use_fp16", "maybe"],
        ["--epo", "3"],
        ["--blur", "2"],
    ],
)
def test_a_bad_value_is_one_line_with_the_flag_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and argv[0] in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", [flags.positive, flags.at_least_zero])
def test_whole_numbers_may_be_written_as_floats(kind):
    read = kind(int)
    assert [read(text) for text in ("7", "1e8", "300.0", "1E3")] == [7, 10**8, 300, 1000]
    assert all(type(read(text)) is int for text in ("7", "1e8"))
    for text in ("1.5", "1e-3", "nan", "inf", "-1", "x", ""):
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            read(text)


def test_published_spellings_are_taken():
    args = parse(
        "--output_dir",
        "x",
        "--num_workers",
        "3",
        "--local-rank=1",
        "--world_size",
        "8",
        "--rank",
        "2",
        "--dist_url",
        "env://",
        "--use_fp16",
        "false",
    )
    assert (args.dump_path, args.workers, args.precision) == ("x", 3, "fp32")
    assert parse("--local_rank", "3", "--use_fp16", "true").precision == "auto"


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("--epochs 0\nis wrong"), 2),
        (FileNotFoundError("no such folder"), 2),
        (CheckpointError("full"), 2),
        (flags.RunError("nan"), 1),
    ],
)
def test_run_turns_an_error_into_one_sentence(error, status, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        flags.run(main)
    assert stop.value.code == status
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize("size, words", [(8, "Kernel size"), (40, "divisible by patch size")])
def test_images_that_a_network_does_not_take_are_one_sentence(size, words, capsys):
    if size == 40:
        pytest.importorskip("timm")
        model = build_backbone("timm:test_vit")
    else:
        model = torch.nn.Conv2d(3, 3, 12)  # as convnext_tiny's, of 2 px, behind four others

    def main():
        model(torch.zeros(1, 3, size, size))

    with pytest.raises(SystemExit) as stop:
        flags.run(main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert error.startswith("error: the network of --arch does not take images of this size: give")


def test_a_name_in_an_error_does_not_reach_the_terminal_as_it_is(capsys):
    def main():
        raise ValueError("caf\udce9\x1b[31m.jpg\nis broken")

    with pytest.raises(SystemExit):
        flags.run(main)
    assert capsys.readouterr().err == "error: caf\\xe9\\x1b[31m.jpg is broken\n"


def test_run_lets_a_fault_of_the_program_through():
    with pytest.raises(RuntimeError, match="shapes"):
        flags.run(lambda: (_ for _ in ()).throw(RuntimeError("shapes do not match")))


def test_every_traceback_is_in_the_log_and_a_foreseen_error_only_there(tmp_path, capsys):
    errors = {
        KeyError("prototypes"): (KeyError, ""),
        MemoryError(): (MemoryError, ""),
        ValueError("--epochs 0"): (SystemExit, "error: --epochs 0\n"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."): (SystemExit, "error: a l"),
        RuntimeError("[gloo/pair.cc:1] Connection closed by peer"): (SystemExit, "error: another"),
    }  # fmt: skip
    handlers = list(logging.getLogger().handlers)
    setup_logging(tmp_path, is_main=True)
    try:
        for error, (ends_in, screen) in errors.items():
            with pytest.raises(ends_in):
                flags.run(lambda error=error: (_ for _ in ()).throw(error))
            shown = capsys.readouterr()
            assert shown.err.startswith(screen) and "Traceback" not in shown.err + shown.out
            log = (tmp_path / "train.log").read_text()
            assert log.count("Traceback") == 1 and repr(error)[:8] in log
            (tmp_path / "train.log").write_text("")
    finally:
        logging.getLogger().handlers[:] = handlers


def test_ctrl_c_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        flags.run(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped by SIGINT\n"


@pytest.mark.parametrize("flag", ["--loader_timeout", "--dist_timeout"])
def test_a_time_limit_is_seconds_or_none(flag, capsys):
    assert vars(parse(flag, "0"))[flag[2:]] == 0 and vars(parse())[flag[2:]] == 1800
    for value in ("-1", "inf", "nan", "1e30"):
        with pytest.raises(SystemExit):
            parse(flag, value)
        assert f"{flag}: must be from 0 to 1e+07 seconds" in capsys.readouterr().err


def test_run_passes_the_status_on():
    for value, status in ((None, 0), (0, 0), (143, 143)):
        with pytest.raises(SystemExit) as stop:
            flags.run(lambda value=value: value)
        assert stop.value.code == status


@pytest.mark.parametrize(
    "device, size, words",
    [("cuda:99", 8, "--device cuda:99"), ("cpu", 8, "--syncbn_process_group_size 8")],
)
def test_what_cannot_run_is_found_before_anything_is_opened(device, size, words):
    args = argparse.Namespace(
        knn_freq=0,
        probe_data=[],
        guard_knn=None,
        device=device,
        sync_bn="pytorch",
        syncbn_process_group_size=size,
    )
    with pytest.raises(ValueError, match=words):
        flags.check_runtime(args, world_size=12)
    args = argparse.Namespace(
        knn_freq=0,
        probe_data=[],
        guard_knn=None,
        device="cpu",
        sync_bn="pytorch",
        syncbn_process_group_size=8,
    )
    for world_size in (1, 4, 8, 16):
        flags.check_runtime(args, world_size)


@pytest.mark.parametrize("rule, factor", [("none", 1), ("linear", 0.0625), ("sqrt", 0.25)])
def test_learning_rates_are_scaled_by_the_rule(rule, factor):
    args = argparse.Namespace(lr_scaling=rule, lr_reference_batch=4096)
    assert flags.lr_factor(args, 256) == pytest.approx(factor)


class Data:
    mean, std = [0.5], [0.2]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--color_jitter", "1", "1"], "--color_jitter takes 4"),
        (["--in_chans", "1", "--mean", "0.1", "0.2"], "--mean has 2 values"),
    ],
)
def test_bad_photometry_is_named(argv, words):
    with pytest.raises(ValueError, match=words):
        image_flags.augment_options(parse(*argv), Data, 4)


def test_photometry_can_be_switched_off():
    argv = "--no_flip --color_jitter 0 --grayscale 0 --blur 0".split()
    options = image_flags.augment_options(parse(*argv), Data, 4)
    assert options["flip_prob"] == options["grayscale_prob"] == 0
    assert options["blur_prob"] == options["solarize_prob"] == [0.0] * 4
    assert options["color_jitter"] == (0, 0, 0, 0) and options["mean"] == [0.5]


def test_blur_and_solarisation_of_each_crop_the_last_value_for_all_further_ones():
    args = parse(*"--blur 1 0.1 0.5 --solarize 0 0.2 0".split())
    options = image_flags.augment_options(args, Data, 5)
    assert options["blur_prob"] == [1, 0.1, 0.5, 0.5, 0.5]
    assert options["solarize_prob"] == [0, 0.2, 0, 0, 0]
    assert image_flags.augment_options(args, Data, 2)["blur_prob"] == [1, 0.1]  # no further crops
    with pytest.raises(ValueError, match="--blur has 3 values and there are 1 crops"):
        image_flags.augment_options(args, Data, 1)


def test_the_home_directory_may_stand_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = flags.Parser("")
    parser.add_argument("--pretrained")
    parser.add_argument("--probe_data", nargs="+")
    argv = ["--pretrained=~/run", "--probe_data", "pets=~/pets", "a~b", "~/c"]
    args = parser.parse_args(argv)
    assert args.pretrained == "/home/me/run"
    assert args.probe_data == ["pets=/home/me/pets", "a~b", "/home/me/c"]
    assert argv[0] == "--pretrained=~/run"
