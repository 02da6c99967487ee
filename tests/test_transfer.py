"""scripts/transfer.py and the protocols of Places205 and iNaturalist: one table of several data sets."""

import importlib
import importlib.util
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval_linear
from tests.voc_images import write_voc

ROOT = Path(__file__).parent.parent
NETWORK = shlex.split(
    "--arch resnet10 --stem small --width 0.125 --size 12 --workers 0 --device cpu"
)
NAMES = {4: "Fungi rufi", 7: "Insecta una", 9: "Aves rara"}


def load_script():
    spec = importlib.util.spec_from_file_location("transfer", ROOT / "scripts" / "transfer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_image(path, kind, number):
    """Noise that is the brighter, the larger the number of its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 10, (16, 18, 3), dtype=np.uint8)
    Image.fromarray(pixels + np.uint8(80 * kind)).save(path, quality=95)


def write_inat18(folder):
    """Annotations as iNaturalist 2018 distributes them, of 12 and 6 images of three classes."""
    for split, count in (("train", 12), ("val", 6)):
        images, annotations = [], []
        for number in range(count):
            category = sorted(NAMES)[number % 3]
            file_name = f"train_val2018/Kind/{category}/{split}{number}.jpg"
            write_image(folder / file_name, number % 3, number)
            image = {"id": 1000 - number, "file_name": file_name, "width": 18, "height": 16}
            images.append({**image, "license": 3, "rights_holder": "x"})
            annotations.append({"id": number, "image_id": 1000 - number, "category_id": category})
        categories = [{"id": i, "name": name, "supercategory": "Kind"} for i, name in NAMES.items()]
        contents = {"info": {"year": 2018}, "images": images, "annotations": annotations[::-1]}
        (folder / f"{split}2018.json").write_text(
            json.dumps({**contents, "categories": categories})
        )
    return folder


def write_places205(folder, place="trainvalsplit_places205"):
    """Lists as Places205 distributes them, of 12 and 6 images of three classes."""
    images = folder / "data" / "vision" / "torralba" / "deeplearning" / "images256"
    (folder / place).mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 12), ("val", 6)):
        lines = []
        for number in range(count):
            name = f"{('a/abbey', 'a/airport', 'y/yard')[number % 3]}/gsun_{split}{number}.jpg"
            write_image(images / name, number % 3, number)
            lines.append(f"{name},{number % 3}")
        (folder / place / f"{split}_places205.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    "protocol, epochs, steps", [("places205", 28, [8, 16, 24]), ("inat18", 84, [24, 48, 72])]
)
def test_the_protocols_are_those_of_swavs_appendix(protocol, epochs, steps):
    args = eval_linear.parse_args(["--protocol", protocol, "--data_path", "/data/x"])
    assert (args.lr, args.wd, args.momentum, args.nesterov) == (0.01, 1e-4, 0.9, False)
    assert (args.epochs, args.scheduler_type, args.gamma) == (epochs, "step", 0.1)
    assert args.decay_epochs == steps and args.interpolation == "bilinear"
    schedule = eval_linear.learning_rates([args.lr], 10, args)
    rates = [round(schedule(10 * epoch)[0], 9) for epoch in range(epochs)]
    assert [rates.count(rate) for rate in (1e-2, 1e-3, 1e-4, 1e-5)] == [
        *[steps[0]] * 3,
        epochs - steps[2],
    ]
    given = eval_linear.parse_args(["--protocol", protocol, "--epochs", "3", "--lr", "1"])
    assert (given.epochs, given.lr) == (3, 1.0)


@pytest.mark.slow
def test_the_distributed_files_are_classified_and_one_table_has_all_sets(
    tmp_path, monkeypatch, capsys
):
    transfer = load_script()
    write_inat18(tmp_path / "inat")
    write_places205(tmp_path / "places")
    voc = write_voc(tmp_path / "VOC2007")
    called = []

    def main_in_this_process(words):
        called.append(Path(words[1]).stem)
        return importlib.import_module(called[-1]).main(words[2:])

    monkeypatch.setattr(transfer, "run", main_in_this_process)
    sets = [f"places205={tmp_path}/places", f"inat18={tmp_path}/inat", f"voc07={voc}"]
    words = [
        "--sets",
        *sets,
        f"own={tmp_path}/inat",
        "--dump_path",
        str(tmp_path / "out"),
        *NETWORK,
    ]
    for name, flag in (("places205", "--epochs"), ("inat18", "--epochs"), ("voc07", "--costs")):
        monkeypatch.setitem(transfer.BY_NAME, name, [*transfer.BY_NAME[name], flag, "2"])
    monkeypatch.setitem(transfer.BY_NAME, "own", ["eval_linear.py", "--epochs", "2"])
    assert transfer.main([*words, "--batch_size", "6"]) == 0
    assert called == ["eval_linear", "eval_linear", "eval_voc07", "eval_linear"]
    table = (tmp_path / "out" / "transfer.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:]] == [
        ["| places205", "places205"],
        ["| inat18", "inat18"],
        ["| voc07", "svm"],
        ["| own", "swav"],
    ]
    lines = [json.loads(x) for x in (tmp_path / "out" / "transfer.jsonl").read_text().splitlines()]
    values = {line["data"]: line["value"] for line in lines}
    for name in ("places205", "inat18"):
        found = json.loads((tmp_path / "out" / name / "eval_linear.json").read_text())
        assert found["best_top1"] == values[name] and found["settings"]["protocol"] == name
        assert found["settings"]["images"] == [12, 6, 3]


def test_the_first_evaluation_that_ends_early_ends_all_with_its_status(
    tmp_path, monkeypatch, capsys
):
    transfer = load_script()
    monkeypatch.setattr(transfer, "run", lambda words: 128 + signal.SIGTERM)
    words = ["--sets", "a=digits", "b=digits", "--dump_path", str(tmp_path)]
    assert transfer.main(words) == 128 + signal.SIGTERM
    assert "a ended with status 143" in capsys.readouterr().err


def test_an_evaluation_gets_the_signals_and_torchrun_where_there_are_several_processes(tmp_path):
    transfer = load_script()
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    assert transfer.run([sys.executable, "-c", code]) == 128 + signal.SIGTERM
    args = transfer.get_parser().parse_args(["--sets", "a=b", "--nproc_per_node", "4"])
    words = transfer.command(args, "voc07", "b", tmp_path, ["--workers", "1"])
    text = " ".join(words[1:])
    assert text.startswith("-m torch.distributed.run --standalone --nproc_per_node 4 ")
    assert "eval_voc07.py --protocol svm --data_path b" in text and text.endswith(" --workers 1")


def test_the_sets_are_not_read_by_the_flags_of_the_runs_own_data(tmp_path):
    run_args = {"data_path": "photos.csv", "data_root": "/photos", "label_column": "kind"}
    (tmp_path / "args.json").write_text(json.dumps({"arch": "resnet10", **run_args}))
    transfer = load_script()
    words = ["--sets", "pets=/data/pets", "--pretrained", str(tmp_path)]
    args, _ = transfer.get_parser().parse_known_args(words)
    words = transfer.command(args, "pets", "/data/pets", tmp_path / "pets", [])
    evaluated = eval_linear.parse_args(words[2:])
    assert (evaluated.arch, evaluated.data_path) == ("resnet10", "/data/pets")
    assert (evaluated.data_root, evaluated.label_column) == (None, None)


def test_what_is_wrong_is_said_at_once():
    for argv, sentence in (
        (["--sets", "a"], "must be name=path"),
        (["--sets", "a=b", "a=c"], "have one name"),
        ([], "--sets"),
    ):
        command = [sys.executable, str(ROOT / "scripts" / "transfer.py"), *argv]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and sentence in done.stderr
