"""scripts/dino_*.sh: what each would run, and that its values are those of the published run."""

import re
import subprocess
from pathlib import Path

import pytest

import main_dino
from src.nets.backbones import build_backbone
from src.run import flags
from tests.test_launch import run_recipe, sbatch_lines

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("dino_*.sh"))

DEFAULTS = {  # of the published main_dino.py
    "arch": "vit_small", "patch_size": 16, "drop_path_rate": 0.1, "out_dim": 65536,
    "norm_last_layer": True, "use_bn_in_head": False, "momentum_teacher": 0.996,
    "warmup_teacher_temp": 0.04, "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0,
    "use_fp16": True, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip_grad": 3.0,
    "batch_size": 64, "epochs": 100, "freeze_last_layer": 1, "lr": 0.0005, "warmup_epochs": 10,
    "min_lr": 1e-6, "optimizer": "adamw", "global_crops_scale": [0.4, 1.0],
    "local_crops_number": 8, "local_crops_scale": [0.05, 0.4], "seed": 0,
    # not flags of the published script, but constants in it
    "student_temp": 0.1, "center_momentum": 0.9, "momentum_teacher_end": 1.0,
    "global_crops_size": 224, "local_crops_size": 96, "interpolation": "bicubic",
    "lr_scaling": "linear", "lr_reference_batch": 256, "sync_bn": "pytorch",
    "syncbn_process_group_size": 0, "teacher_output": "centering", "workers": 10,
    "color_jitter": [0.4, 0.4, 0.2, 0.1], "blur": [1.0, 0.1, 0.5], "solarize": [0.0, 0.2, 0.0],
}  # fmt: skip
LONG = {"teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30, "norm_last_layer": False}
SCALES = {
    "global_crops_scale": [0.25, 1.0], "local_crops_scale": [0.05, 0.25], "local_crops_number": 10,
}  # fmt: skip
BASE = {
    **SCALES, "arch": "vit_base", "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 50,
    "freeze_last_layer": 3, "min_lr": 2e-6, "use_fp16": False,
}  # fmt: skip
RUNS = {  # GPUs, what differs from the defaults, k-NN and linear top-1 on ImageNet
    "dino_vits16_100ep": (8, {}, (69.3, 74.0)),
    "dino_vits16_300ep": (16, {**LONG, "epochs": 300}, (73.3, 76.0)),
    "dino_vits16_800ep": (
        16,
        {**LONG, **SCALES, "epochs": 800, "clip_grad": 0.0, "min_lr": 1e-5, "use_fp16": False},
        (74.5, 77.0),
    ),
    "dino_vits8_800ep": (
        64,
        {**LONG, "patch_size": 8, "epochs": 800, "batch_size": 16, "local_crops_number": 10,
         "use_fp16": False},
        (78.3, 79.7),
    ),
    "dino_vitb16_400ep": (
        32,
        {**BASE, "epochs": 400, "batch_size": 32, "lr": 0.00075, "clip_grad": 0.3},
        (76.1, 78.2),
    ),
    "dino_vitb8_300ep": (
        176,
        {**BASE, "patch_size": 8, "epochs": 300, "batch_size": 6, "warmup_teacher_temp": 0.03},
        (77.4, 80.1),
    ),
    "dino_resnet50_800ep": (
        80,
        {"arch": "resnet50", "epochs": 800, "batch_size": 51, "optimizer": "lars", "lr": 0.3,
         "min_lr": 0.0048, "weight_decay": 1e-6, "weight_decay_end": 1e-6, "out_dim": 60000,
         "use_bn_in_head": True, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 50,
         "clip_grad": 0.0, "use_fp16": False, "global_crops_scale": [0.14, 1.0],
         "local_crops_scale": [0.05, 0.14], "local_crops_number": 6},
        (67.5, 75.3),
    ),
}  # fmt: skip


def parsed(path, folder):
    """The arguments that main_dino.py sees; what the test appends to the command is left out."""
    argv = run_recipe(path, folder)[0]
    assert argv[:6] == [
        *("--label", "--kill-on-bad-exit=1", "--cpus-per-task=8"),
        *("python", "-u", "main_dino.py"),
    ]
    assert argv[-2:] == ["--seed", "7"]  # appended: further flags are passed on, and win
    return flags.parse_args(main_dino.get_parser(), main_dino.PRESETS, argv[6:-2])


def test_there_is_a_script_for_every_published_run():
    assert [path.stem for path in SCRIPTS] == sorted(RUNS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_the_values_of_the_published_run(path, tmp_path):
    gpus, changes, _ = RUNS[path.stem]
    args = parsed(path, tmp_path)
    assert (args.data_path, args.dump_path) == ("/data/image net", "runs/a run")
    assert args.preset == "imagenet"
    for name, value in {**DEFAULTS, **changes}.items():
        found = getattr(args, name)
        assert (list(found) if isinstance(found, tuple) else found) == value, name
    assert args.precision == ("auto" if args.use_fp16 else "fp32")
    crops = main_dino.crop_options(args)
    assert crops["num_crops"] == [2, args.local_crops_number]
    assert crops["size_crops"] == [224, 96]
    assert f"gpus={gpus}" in sbatch_lines(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_network_loss_and_optimizer_of_a_script_can_be_built(path, tmp_path):
    args = parsed(path, tmp_path)
    build_backbone(
        args.arch,
        drop_path_rate=args.drop_path_rate,
        **flags.backbone_options(args),
        **flags.vit_options(args, args.global_crops_size),
    )
    main_dino.DINOLoss(
        out_dim=args.out_dim,
        nmb_crops=2 + args.local_crops_number,
        warmup_teacher_temp=args.warmup_teacher_temp,
        teacher_temp=args.teacher_temp,
        warmup_teacher_temp_epochs=args.warmup_teacher_temp_epochs,
        epochs=args.epochs,
    )
    assert args.optimizer in ("adamw", "lars")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_header_says_what_the_script_does(path):
    gpus, _, (knn, linear) = RUNS[path.stem]
    text, lines = path.read_text(), sbatch_lines(path)
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    assert path.stat().st_mode & 0o111
    epochs, batch = (
        int(re.search(r"_(\d+)ep", path.stem)[1]),
        int(re.search(r"--batch_size (\d+)", text)[1]),
    )
    header = text.split("#SBATCH")[0]
    first = header.splitlines()[1]
    assert f", {epochs} epochs, 2x224 + " in first and f"batches of {gpus * batch} images" in first
    assert f"sbatch scripts/{path.name}" in header and f"EXPERIMENT_PATH=runs/{path.stem}" in header
    fields = dict(re.findall(r"^# (\w+): +(.+)$", header, re.M))
    assert fields["hardware"].startswith(f"{gpus // 8} node") and f"{gpus} " in fields["hardware"]
    assert fields["time"] == "not published" or re.match(r"(about )?\d+ h \(", fields["time"])
    assert f"{knn} % k-NN, {linear} % linear" in fields["expected"]
    assert re.search(r"\(thesis, Table 5.2\)|\(authors' README\)$", fields["expected"])
    assert "The values are" in header or "args.txt" in header  # where they come from
    assert {f"nodes={gpus // 8}", "ntasks-per-node=8", f"job-name={path.stem}"} <= set(lines)
    assert {"signal=USR1@120", "requeue", "open-mode=append"} <= set(lines)


@pytest.mark.parametrize("name", ["DATASET_PATH", "EXPERIMENT_PATH"])
def test_a_missing_path_is_asked_for(name, tmp_path):
    run = run_recipe(SCRIPTS[0], tmp_path, **{name: None})
    assert run.returncode != 0 and f"{name}: set it to" in run.stderr
    assert not (tmp_path / "argv").exists()
