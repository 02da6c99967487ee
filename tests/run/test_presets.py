import argparse
import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import main_deepclusterv2
import main_dino
import main_swav
from src.data.datasets import open_dataset
from src.data.loading import Loader, num_cores
from src.nets.resnet import build_model
from src.run import image_flags, presets
from src.run.flags import parse_args
from src.run.presets import Situation, default_folder, preset_for
from tests.data.test_datasets import write_image

METHODS = sorted(path.stem for path in Path(presets.__file__).parents[2].glob("main_*.py"))
SIX_HUNDRED = Situation(600, side=400, megapixels=0.2, on_gpu=False, cores=2)


def parsed(method, *argv, script=main_swav):
    return image_flags.parse_args(
        script.get_parser(), script.PRESETS, list(map(str, argv)), method=method, world_size=1
    )


@pytest.fixture
def photos(tmp_path):
    """Forty photographs without labels."""
    for number in range(40):
        write_image(tmp_path / "photos" / f"{number}.png", 6 * number, size=(70, 60))
    return tmp_path / "photos"


# ============ what is chosen ============
@pytest.mark.parametrize(
    "num_images, side, preset",
    [
        (600, 400, "photos"),
        (299_999, 400, "photos"),
        (300_000, 400, "imagenet"),
        (1_281_167, 400, "imagenet"),
        (50_000, 32, "cifar"),
    ],
)
def test_the_number_and_the_size_of_the_images_choose_the_preset(num_images, side, preset):
    assert preset_for(Situation(num_images, side, megapixels=0.2, on_gpu=False, cores=2)) == preset


@pytest.mark.parametrize("num_images, clusters", [(40, 10), (600, 60), (50_000, 3000)])
def test_there_is_a_cluster_for_ten_images_up_to_3000(num_images, clusters):
    assert (
        Situation(num_images, side=400, megapixels=0.2, on_gpu=True, cores=8).clusters() == clusters
    )


@pytest.mark.parametrize(
    "on_gpu, arch, sides", [(False, "resnet18", [64, 32]), (True, "resnet50", [128, 64])]
)
def test_photographs_get_a_network_and_crops_for_the_device(on_gpu, arch, sides):
    situation = Situation(5000, side=400, megapixels=0.2, on_gpu=on_gpu, cores=4)
    values = presets.photos(situation)
    assert (values["arch"], values["crop_sides"]) == (arch, sides)
    assert values["workers"] <= 4
    assert values["batch_size"] == (256 if on_gpu else 64)


def test_photographs_of_a_camera_are_shown_less_often_on_a_cpu_and_the_log_says_why():
    of_a_camera = Situation(600, side=3000, megapixels=12.0, on_gpu=False, cores=2)
    assert of_a_camera.decoding() == 12 / 12.8
    assert of_a_camera.epochs() == 6 and "94% of the time" in of_a_camera.hint()
    assert "12.0 megapixels" in of_a_camera.hint() and "11.1 times" in of_a_camera.hint()
    assert "--reduced_decoding shortens that for JPEGs" in of_a_camera.hint()
    assert replace(of_a_camera, side=512).hint() is None  # there is no smaller copy to be made
    assert SIX_HUNDRED.hint() is None
    given = replace(SIX_HUNDRED, has_network=True)  # ten times as slow, so that it sees a tenth
    assert (SIX_HUNDRED.epochs(), given.epochs()) == (80, 10)
    assert replace(of_a_camera, has_network=True).decoding() == 12 / 20
    on_gpu = Situation(600, side=3000, megapixels=12.0, on_gpu=True, cores=16)
    assert on_gpu.epochs() == 400 and on_gpu.hint() is None


def test_the_size_of_the_images_is_the_median_of_a_sample(photos):
    situation = presets.look(open_dataset(str(photos)), "cpu", world_size=1)
    assert (situation.num_images, situation.side, situation.megapixels) == (40, 60, 0.0042)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_processes_share_the_batch_of_one(world_size):
    situation = Situation(
        5000, side=400, megapixels=0.2, on_gpu=True, cores=4, world_size=world_size
    )
    assert presets.photos(situation)["batch_size"] * world_size == 256


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_preset_for_photographs(name):
    script = importlib.import_module(name)
    parser = script.get_parser()
    flags = {action.dest: action.default for action in parser._actions}
    for situation in (
        SIX_HUNDRED,
        Situation(50_000, side=400, megapixels=0.2, on_gpu=True, cores=16),
    ):
        values = presets.defaults_of("photos", script.PRESETS, situation, flags)
        assert set(values) - {"crop_sides"} <= set(flags)
        for key in ("nmb_cluster", "k"):
            assert values.get(key, situation.clusters()) == situation.clusters()


def test_what_shortens_decoding_is_not_said_to_who_does_it():
    def look(args):
        return Situation(600, side=3000, megapixels=12.0, on_gpu=False, cores=2)

    for given, is_said in (([], True), (["--reduced_decoding"], False)):
        argv = ["--preset", "photos", "--data_path", "a folder", *given]
        args = parse_args(main_swav.get_parser(), main_swav.PRESETS, argv, look=look)
        assert any("12.0 megapixels" in note for note in args.notes) == is_said


# ============ going on from trained weights ============
@pytest.fixture
def trained(tmp_path):
    """A file of a small ViT that was trained on images of 48 px."""
    from src.nets.backbones import build_backbone

    model = build_backbone("vit_tiny", patch_size=8, img_size=48, depth=2)
    torch.save(model.state_dict(), tmp_path / "trained.pth")
    return tmp_path / "trained.pth"


def test_continue_takes_the_network_of_the_weights_and_small_steps(photos, trained):
    args, _ = parsed(
        "dino",
        "--data_path",
        photos,
        "--preset",
        "continue",
        "--init_from",
        trained,
        script=main_dino,
    )
    fresh, _ = parsed("dino", "--data_path", photos, "--preset", "photos", script=main_dino)
    assert (args.arch, args.patch_size, args.img_size, args.depth) == ("vit_tiny", 8, 48, 2)
    assert args.lr == fresh.lr / 10 and args.momentum_teacher > fresh.momentum_teacher
    assert args.freeze_last_layer > fresh.freeze_last_layer and args.warmup_epochs >= 1
    assert args.global_crops_size == fresh.global_crops_size


def test_continue_freezes_prototypes_at_first(tmp_path, photos):
    torch.save(build_model("resnet18", width=0.25).state_dict(), tmp_path / "resnet.pth")
    weights = tmp_path / "resnet.pth"
    args, _ = parsed("swav", "--data_path", photos, "--preset", "continue", "--init_from", weights)
    assert (args.arch, args.width) == ("resnet18", 0.25)
    iterations = 40 // args.batch_size
    assert args.freeze_prototypes_niters == args.epochs // 5 * iterations


@pytest.mark.parametrize("epochs, warmup, frozen", [(50, 5, 10), (4, 1, 0), (1, 0, 0)])
def test_continue_freezes_a_fifth_of_the_epochs_that_are_asked_for(
    tmp_path, photos, epochs, warmup, frozen
):
    torch.save(build_model("resnet18", width=0.25).state_dict(), tmp_path / "resnet.pth")
    argv = ["--data_path", photos, "--preset", "continue", "--init_from", tmp_path / "resnet.pth"]
    args, _ = parsed("swav", *argv, "--epochs", epochs, "--batch_size", 4)
    assert (args.warmup_epochs, args.freeze_prototypes_niters) == (warmup, frozen * 10)
    typed, _ = parsed("swav", *argv, "--epochs", epochs, "--freeze_prototypes_niters", 7)
    assert typed.freeze_prototypes_niters == 7


def test_continue_leaves_prototypes_that_no_gradient_moves(tmp_path, photos):
    torch.save(build_model("resnet18", width=0.25).state_dict(), tmp_path / "resnet.pth")
    argv = ["--data_path", photos, "--preset", "continue", "--init_from", tmp_path / "resnet.pth"]
    args, _ = parsed("deepclusterv2", *argv, script=main_deepclusterv2)
    assert args.freeze_prototypes_niters == 10**10


def test_a_run_of_dino_on_photographs_goes_on_with_as_many_images(tmp_path, photos):
    argv = ["--data_path", photos, "--device", "cpu"]
    fresh, _ = parsed("dino", *argv, script=main_dino)
    network = {"arch": fresh.arch}
    assert fresh.arch == "vit_micro"
    assert SIX_HUNDRED.with_network(network, is_arch_said=False) == SIX_HUNDRED
    assert SIX_HUNDRED.with_network({"arch": "vit_tiny"}, is_arch_said=False).has_network


def test_a_queue_of_the_preset_that_holds_no_batch_is_left_out(photos):
    argv = ["--data_path", photos, "--device", "cpu", "--nmb_prototypes", 10]
    args, _ = parsed("swav", *argv, "--batch_size", 32)
    args.chosen["queue_length"] = args.queue_length = 16
    assert main_swav.check_args(args, global_batch=32) == 0
    args.chosen["queue_length"] = 0
    with pytest.raises(ValueError, match="--queue_length 16 has no room for one batch of 32"):
        main_swav.check_args(args, global_batch=32)


@pytest.mark.parametrize("preset", ["photos", "cifar", "tiny"])
def test_other_presets_take_the_network_of_the_weights_as_well(tmp_path, photos, preset):
    torch.save(build_model("resnet50", width=0.0625).state_dict(), tmp_path / "resnet.pth")
    argv = ["swav", "--data_path", photos, "--init_from", tmp_path / "resnet.pth"]
    argv += ["--preset", preset]
    args, _ = parsed(*argv)
    assert (args.arch, args.width) == ("resnet50", 0.0625)
    asked, _ = parsed(*argv, "--arch", "resnet34")
    assert asked.arch == "resnet34"  # whose weights these are not, as the run then says


def test_continue_without_weights_is_refused(photos):
    with pytest.raises(ValueError, match="--preset continue .* name them by --init_from"):
        parsed("swav", "--data_path", photos, "--preset", "continue")


@pytest.mark.slow
def test_dino_continues_from_the_weights_of_others(tmp_path, photos, trained):
    argv = ["--data_path", photos, "--preset", "continue", "--init_from", trained, "--epochs", 1]
    argv += ["--dump_path", tmp_path / "run", "--device", "cpu", "--workers", 0]
    assert main_dino.main(list(map(str, argv))) == 0
    assert "matched" in (tmp_path / "run" / "train.log").read_text()


# ============ how it is chosen ============
def test_a_folder_of_photographs_gets_values_made_for_it(tmp_path, photos):
    args, dataset = parsed("swav", "--data_path", photos)
    assert args.preset == "photos" and len(dataset) == 40
    assert args.nmb_prototypes == [10] and args.arch in ("resnet18", "resnet50")
    assert args.dump_path == "runs/swav_photos"
    assert "40 images of about 60 px" in args.chosen_for


def test_a_network_that_is_asked_for_is_whole(photos, trained):
    torch.save(build_model("resnet18", width=0.25).state_dict(), trained.parent / "narrow.pth")
    on_cpu = ["--data_path", photos, "--device", "cpu", "--preset", "photos"]
    shown = {}
    for name, flags, width in (
        ("bare", (), 0.25),
        ("arch", ("--arch", "resnet50"), 1.0),
        ("torchvision", ("--init_from", "torchvision:resnet50"), 1.0),
        ("narrow", ("--init_from", trained.parent / "narrow.pth"), 0.25),
        ("a trunk of torchvision", ("--arch", "vgg11"), 1.0),
    ):
        args, _ = parsed("swav", *on_cpu, *flags)
        assert args.width == width, name
        shown[name] = args.epochs
    assert shown["bare"] == shown["narrow"] == 400 and shown["arch"] == shown["torchvision"] == 150
    args, _ = parsed("dino", *on_cpu, script=main_dino)
    assert (args.arch, args.width) == ("vit_micro", 1.0)
    args, _ = parsed("dino", *on_cpu, "--init_from", trained, script=main_dino)
    assert (args.arch, args.width) == ("vit_tiny", 1.0)


def test_weights_without_a_width_are_those_of_a_whole_network(photos):
    args, _ = parsed(
        "swav", "--data_path", photos, "--preset", "tiny", "--init_from", "torchvision:resnet50"
    )
    assert (args.arch, args.width) == ("resnet50", 1.0)


def test_a_run_of_an_older_version_goes_on_without_what_is_chosen_now(tmp_path, photos):
    argv = ("--data_path", photos, "--dump_path", tmp_path / "run", "--device", "cpu")
    now, _ = parsed("swav", *argv)
    (tmp_path / "run").mkdir()
    older = {"arch": "resnet18", "epochs": 10, "crop_sides": [64, 32]}
    (tmp_path / "run" / "args.json").write_text(json.dumps({"preset": "photos", "chosen": older}))
    args, _ = parsed("swav", *argv)
    assert now.width == 0.25 and (args.width, args.epochs) == (1.0, 10)
    assert args.chosen == older and args.crop_sides == [64, 32]


def test_a_flag_wins_over_what_was_chosen(photos):
    args, _ = parsed("swav", "--data_path", photos, "--nmb_prototypes", 7, "--dump_path", ".")
    assert args.nmb_prototypes == [7] and args.dump_path == "."


def test_small_images_get_the_preset_of_small_images(tmp_path):
    for number in range(20):
        write_image(tmp_path / "small" / f"{number}.png", number, size=(32, 32))
    args, _ = parsed("dino", "--data_path", tmp_path / "small", script=main_dino)
    assert args.preset == "cifar" and args.global_crops_size == 32


def test_a_run_goes_on_with_what_was_chosen_for_it_when_images_have_come(tmp_path, photos):
    argv = ("--data_path", photos, "--dump_path", tmp_path / "run")
    before, _ = parsed("swav", *argv)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(json.dumps(vars(before)))
    for number in range(200):
        write_image(photos / f"new{number}.png", 1, size=(70, 60))
    after, dataset = parsed("swav", *argv)
    assert len(dataset) == 240
    assert after.nmb_prototypes == before.nmb_prototypes and after.epochs == before.epochs
    other, _ = parsed("swav", "--data_path", photos, "--dump_path", tmp_path / "other")
    assert other.nmb_prototypes == [24]


def test_a_run_of_published_values_on_few_images_goes_on_with_them(tmp_path, photos):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(json.dumps({"preset": "imagenet"}))
    args, _ = parsed("swav", "--data_path", photos, "--dump_path", tmp_path / "run")
    assert args.preset == "imagenet" and args.nmb_prototypes == [3000]


@pytest.mark.parametrize(
    "argv, shown",
    [
        ([], "passes over the data (default: 100)"),
        (None, "passes over the data (default: 100)"),
        (["--preset", "tiny"], "passes over the data (default: 60)"),
        (["--data_path", "digits"], "passes over the data (default: 60)"),
        (
            ["--preset", "photos"],
            "K; several values: several sets of prototypes, their losses averaged (default: [1000])",
        ),
    ],
)
def test_help_shows_the_defaults_of_the_preset(capsys, argv, shown):
    data = [] if argv is None or "--data_path" in argv else ["--data_path", "nowhere"]
    with pytest.raises(SystemExit):
        parsed("swav", *(argv or []), *data, "--help")
    assert shown in " ".join(capsys.readouterr().out.split())


# ============ folders, workers ============
@pytest.mark.parametrize(
    "data_path, folder",
    [
        ("/data/my images/", "runs/swav_my_images"),
        ("lists/photos.2024.csv", "runs/swav_photos"),
        ("cifar10", "runs/swav_cifar10"),
        ("shards/train-{000..009}.tar", "runs/swav_train_000"),
        ("/", "runs/swav_images"),
    ],
)
def test_a_run_has_a_folder_named_after_method_and_data(data_path, folder):
    assert default_folder("swav", data_path) == folder


def test_the_folder_of_images_here_is_named(tmp_path, monkeypatch):
    (tmp_path / "holiday").mkdir()
    monkeypatch.chdir(tmp_path / "holiday")
    assert default_folder("dino", ".") == "runs/dino_holiday"


def test_no_more_loader_processes_are_started_than_there_are_cores():
    loader = Loader(torch.arange(8), num_workers=1000, device_type="cpu", batch_size=2)
    assert loader.num_workers == num_cores()


# ============ the command line ============
def test_a_mistyped_flag_is_told_what_was_meant(capsys):
    with pytest.raises(SystemExit) as ended:
        parsed("swav", "--epoch", 3, "--bath_size=4")
    assert ended.value.code == 2
    assert "did you mean --epochs, --batch_size?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, no_flip",
    [
        ([], True),
        (["--flip"], False),
        (["--no_flip"], True),
        (["--no-flip"], True),
        (["--no_flip", "false"], False),
    ],
)
def test_a_preset_without_flips_can_be_undone(argv, no_flip):
    args = argparse.Namespace(**vars(parsed("swav", *argv)[0]))
    assert args.preset == "tiny" and args.no_flip is no_flip


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_photographs_by_its_bare_line(tmp_path, photos, name):
    script = importlib.import_module(name)
    argv = ["--data_path", str(photos), "--dump_path", str(tmp_path / "run"), "--epochs", "1"]
    assert script.main([*argv, "--device", "cpu", "--workers", "0"]) == 0
    assert (tmp_path / "run" / "checkpoint.pth").exists()
    log = (tmp_path / "run" / "train.log").read_text()
    assert "photos, made for 40 images of about 60 px, on a CPU" in log
    assert "started; the first iteration" in log


@pytest.mark.slow
def test_after_ten_iterations_a_run_says_how_long_it_will_take(tmp_path):
    argv = ["--epochs", "2", "--dump_path", str(tmp_path / "run"), "--device", "cpu"]
    assert main_swav.main([*argv, "--workers", "0"]) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    (line,) = [line for line in log.splitlines() if "pace  " in line]
    assert re.search(r"pace +[\d.]+ images/s, 0:0\d:\d\d to go", line)
