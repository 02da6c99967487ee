"""eval_detection.py: whole runs, resumed, on two processes, misused; coloured shapes are found."""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch

import eval_detection
from src import dist
from src.evaluate import detection_networks
from src.evaluate.detection_networks import build_detector
from src.evaluate.detection_samples import set_draws
from src.evaluate.detection_sets import TrainingImages, open_detection
from src.evaluate.detection_training import detector_groups, learning_rate, training_batches
from src.evaluate.voc_training import Training
from src.nets.pretrained import open_pretrained
from src.run import checkpoint, flags
from tests.detection_images import VOC_NAMES, write_coco, write_voc
from tests.gloo import kill_mains, run_mains, run_ranks, start_mains
from tests.runs import signal_handlers, wait_for_lines  # noqa: F401, used by name

TINY = "--arch resnet10 --width 0.125 --workers 0 --device cpu --log_freq 2 --warmup_iters 2"
TINY = shlex.split(f"{TINY} --min_size 48 64 --test_size 64 --max_size 100 --lr 0.01 --steps 5")
FEW = shlex.split("--proposals 8 --batch_size 4 --nit 6 --checkpoint_iters 2")


@pytest.fixture(autouse=True)
def handlers(signal_handlers):  # noqa: F811
    """Those of before, after every test."""


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc") / "VOCdevkit"
    write_voc(folder, {"2007_trainval": 6, "2012_trainval": 5, "2007_test": 3})
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    pytest.importorskip("pycocotools")
    folder = tmp_path_factory.mktemp("coco") / "coco"
    write_coco(folder, {"train2017": 6, "val2017": 3})
    return folder


def words_of(folder, data, *argv):
    words = [*TINY, *FEW, "--data_path", str(data), "--dump_path", str(folder)]
    return [*words, *map(str, argv)]


def run(folder, data, *argv):
    """Results of main() in this process."""
    assert eval_detection.main(words_of(folder, data, *argv)) == 0
    return json.loads(next(Path(folder).glob("eval_detection_*.json")).read_text())


@pytest.fixture(scope="module")
def whole(voc, tmp_path_factory):
    """The folder and the results of a run of faster_rcnn_c4 without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, voc)


# ============ whole runs ============
def test_a_run_on_voc_writes_its_results_its_detections_and_its_log(whole):
    folder, result = whole
    assert set(result) >= {"ap", "ap50", "ap75", "ap50_11points", "by_class", "settings"}
    assert result["by_class"]["sofa"] is None
    assert 0 <= result["by_class"][VOC_NAMES[0]] <= 100
    settings = result["settings"]
    assert settings["detector"] == "faster_rcnn_c4" and settings["batch"] == 4
    assert settings["train_split"] == ["2007_trainval", "2012_trainval"]
    training = folder / "detection" / "faster_rcnn_c4"
    lines = [json.loads(x) for x in (training / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 3, 5]
    assert lines[0]["lr"] == pytest.approx(0.01 * (0.333 + 0.667 / 2))
    assert lines[1]["lr"] == 0.01 and lines[2]["lr"] == pytest.approx(0.001)
    for detection in json.loads((training / "detections.json").read_text()):
        assert detection["image_id"].startswith("2007_test_") and detection["score"] >= 0.05


@pytest.mark.slow
def test_a_run_on_coco_measures_boxes_and_masks_and_says_a_table(coco, tmp_path, capsys):
    result = run(tmp_path, coco, "--nit", 1)
    assert result["settings"]["detector"] == "mask_rcnn_fpn"
    assert {"ap", "ap50", "ap_small", "mask_ap", "mask_ap75"} <= result.keys()
    said = capsys.readouterr().out.splitlines()
    table = [line for line in said if line.startswith("| ")]
    assert len(table) == 3 and len({line.count("|") for line in table}) == 1
    assert "mask AP50" in table[0]
    (line,) = [line for line in said if line.startswith('{"evaluation"')]
    assert json.loads(line)["evaluation"] == "eval_detection_mask_rcnn_fpn"


@pytest.mark.slow
def test_a_run_stopped_by_a_signal_and_then_killed_ends_at_the_bits_of_a_whole_one(
    voc, whole, tmp_path, monkeypatch
):
    def interrupted(at, action):
        def rate(lr, iteration, **options):
            if iteration == at:
                action()
            return learning_rate(lr, iteration, **options)

        monkeypatch.setattr(eval_detection, "learning_rate", rate)

    def die():
        raise RuntimeError("killed")

    interrupted(0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert eval_detection.main(words_of(tmp_path, voc)) == 128 + signal.SIGTERM
    training = tmp_path / "detection" / "faster_rcnn_c4"
    assert checkpoint.load_checkpoint(training)["iteration"] == 1
    interrupted(5, die)
    with pytest.raises(RuntimeError, match="killed"):
        eval_detection.main(words_of(tmp_path, voc))
    assert checkpoint.load_checkpoint(training)["iteration"] == 4
    interrupted(-1, die)
    eval_detection.finish()  # the lock of the call that was killed
    assert run(tmp_path, voc) == whole[1]
    found, expected = (
        checkpoint.load_checkpoint(folder / "detection" / "faster_rcnn_c4")
        for folder in (tmp_path, whole[0])
    )
    for name in expected["module"]:
        assert torch.equal(found["module"][name], expected["module"][name]), name
    momentum = [x["optimizer"]["state"] for x in (found, expected)]
    for key, state in momentum[1].items():
        assert torch.equal(momentum[0][key]["momentum_buffer"], state["momentum_buffer"])


def test_a_run_of_other_settings_is_not_continued(voc, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "copy")
    with pytest.raises(OSError, match="holds an evaluation with lr 0.01, not 0.02.*--dump_path"):
        run(tmp_path / "copy", voc, "--lr", 0.02)
    assert whole[1]["settings"]["precision"] == "fp32"
    with pytest.raises(OSError, match="holds an evaluation with precision fp32, not bf16"):
        run(tmp_path / "copy", voc, "--precision", "bf16")


def test_fewer_iterations_than_a_network_was_trained_for_are_refused(voc, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "copy")
    with pytest.raises(ValueError, match="--nit 4: .* trained for 6 iterations.*give --nit 6"):
        run(tmp_path / "copy", voc, "--nit", 4)
    result = json.loads((tmp_path / "copy" / "eval_detection_faster_rcnn_c4.json").read_text())
    assert result == whole[1]


# ============ several processes ============
def _as_rank(rank, world_size):
    """A patch: the group of processes is the test's, and stays."""
    patch = pytest.MonkeyPatch()
    process = dist.Process(rank, world_size, rank, "torchrun", torch.device("cpu"))
    patch.setattr(dist, "init", lambda *given: process)
    patch.setattr(dist, "shutdown", lambda: None)
    patch.setattr(dist, "read_environment", lambda *given: process)
    return patch


def _evaluated(rank, world_size, folder, data):
    patch = _as_rank(rank, world_size)
    # Few detections have a score above 0.05 after six iterations.
    patch.setattr(detection_networks, "build_detector", _without_threshold)
    status = eval_detection.main([*words_of(folder, data, "--batch_size", 4 // world_size)])
    patch.undo()
    return status


def _without_threshold(*arguments, **options):
    detector = build_detector(*arguments, **options)
    detector.roi_heads.score_thresh = 0.0
    return detector


@pytest.mark.slow
def test_two_processes_detect_what_one_does(voc, whole, tmp_path):
    files = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        shutil.copytree(whole[0], folder)
        assert run_ranks(_evaluated, world_size, str(folder), str(voc)) == [0] * world_size
        files.append((folder / "detection" / "faster_rcnn_c4" / "detections.json").read_bytes())
    assert files[0] == files[1] and len(json.loads(files[0])) > 100


def _gradients(rank, world_size, data, folder):
    """Gradients of the losses of proposals for one batch of four images of one size, by name."""
    process = dist.Process(rank, world_size, rank, "torchrun", torch.device("cpu"))
    images = TrainingImages(open_detection(data, ["2007_trainval"]), [64], 100, seed=0)
    network = open_pretrained("", "resnet10", width=0.125)
    state = Training(
        build_detector(
            network, "faster_rcnn_fpn", 20, mean=[0.5] * 3, std=[0.3] * 3, seed=0, proposals=8
        ),
        1e-4,
        process=process,
        precision="fp32",
        folder=folder,
        settings={},
        sync_bn="pytorch",
        groups=detector_groups,
    )
    batches = training_batches(images, 4 // world_size, process, seed=0, workers=0)
    ((pictures, targets, keys),) = batches(0, 1)
    state.network.train()
    set_draws(state.module, keys)
    losses = state.network(pictures, targets)
    # Which proposals are best may change with the last bit, and with it what the head is trained on.
    weights = {name: float("rpn" in name or "objectness" in name) for name in losses}
    sum(weights[name] * losses[name] for name in losses).backward()
    return {
        name: p.grad.numpy()
        for name, p in state.module.named_parameters()
        if not name.startswith("roi_heads")
    }


@pytest.mark.slow
def test_the_gradients_of_two_processes_are_those_of_one(voc, tmp_path):
    (one,) = run_ranks(_gradients, 1, str(voc), str(tmp_path))
    for two in run_ranks(_gradients, 2, str(voc), str(tmp_path)):
        assert two.keys() == one.keys()
        for name in one:
            scale = max(abs(one[name]).max(), 1e-3)
            assert abs(one[name] - two[name]).max() < 2e-3 * scale, name


@pytest.mark.slow
def test_two_processes_killed_in_the_middle_end_at_the_bits_of_two_that_were_not(voc, tmp_path):
    argv = [*TINY, *FEW, "--data_path", voc, "--batch_size", 2, "--nit", 16, "--log_freq", 1]
    whole, killed = (tmp_path / name / "detection" / "faster_rcnn_c4" for name in "ab")
    run_mains("eval_detection", tmp_path / "a", argv, 2)
    ranks = start_mains("eval_detection", tmp_path / "b", argv, 2)
    wait_for_lines(killed, ranks[0], 5)
    kill_mains(ranks)
    assert 4 <= checkpoint.load_checkpoint(killed)["iteration"] < 16
    run_mains("eval_detection", tmp_path / "b", argv, 2)
    expected, found = (checkpoint.load_checkpoint(folder)["module"] for folder in (whole, killed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    results = [(folder / "detections.json").read_bytes() for folder in (whole, killed)]
    assert results[0] == results[1]


# ============ the schedule ============
def test_the_learning_rate_rises_from_a_share_and_falls_at_its_steps():
    options = {"steps": [18000, 22000], "gamma": 0.1, "warmup_iters": 1000, "warmup_factor": 0.333}
    rates = [learning_rate(0.1, it, **options) for it in (0, 500, 1000, 17999, 18000, 22000)]
    assert rates == pytest.approx([0.0333, 0.06665, 0.1, 0.1, 0.01, 0.001])
    assert learning_rate(0.1, 0, **{**options, "warmup_iters": 0}) == 0.1


def test_the_published_schedules_are_the_defaults(voc, coco):
    args, kind = eval_detection.parse_args(["--data_path", str(voc)])
    assert (kind, args.detector, args.nit, args.steps) == (
        "voc",
        "faster_rcnn_c4",
        24000,
        [18000, 22000],
    )
    assert (args.lr, args.warmup_iters, args.warmup_factor, args.wd) == (0.1, 1000, 0.333, 1e-4)
    assert (args.min_size[0], args.min_size[-1], args.test_size, args.max_size) == (
        480,
        800,
        800,
        1333,
    )
    args, kind = eval_detection.parse_args(["--data_path", str(coco), "--lr", "0.03"])
    assert (kind, args.detector, args.nit, args.steps) == (
        "coco",
        "mask_rcnn_fpn",
        90000,
        [60000, 80000],
    )
    assert (args.lr, args.min_size) == (0.03, [640, 672, 704, 736, 768, 800])
    args_of_fpn, _ = eval_detection.parse_args(
        ["--data_path", str(voc), "--detector", "faster_rcnn_fpn"]
    )
    assert (args_of_fpn.lr, args_of_fpn.nit) == (0.02, 24000)
    eval_detection.check_batch(args, 8, 10**5)
    assert args.batch_size == 2


def test_batch_norms_are_not_decayed_and_all_other_parameters_are():
    network = open_pretrained("", "resnet10", width=0.125)
    detector = build_detector(network, "faster_rcnn_fpn", 3, mean=[0.5] * 3, std=[0.3] * 3, seed=0)
    decayed, plain = detector_groups(detector)
    names = {id(p): name for name, p in detector.named_parameters()}
    assert plain["weight_decay"] == 0
    assert {names[id(p)] for p in decayed["params"]} >= {"rpn.head.cls_logits.bias"}
    assert all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


# ============ misuse ============
@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--detector", "mask_rcnn_fpn"], "mask_rcnn_fpn needs masks, which VOC.*faster_rcnn_fpn"),
        (["--test_split", "2012_test"], "--test_split 2012_test: there is no .*2007_test"),
        (["--batch_size", "40"], "--batch_size 40 x 1 processes is more than the 11 images"),
        (["--test_size", "200"], "--max_size 100 is below"),
        (["--arch", "vgg11", "--width", "1"], "faster_rcnn_c4 is for ResNets"),
        (["--mean", "0.5"], "--mean has 1 values and --in_chans is 3"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(voc, tmp_path, argv, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run(tmp_path / "run", voc, *argv)
    assert not (tmp_path / "run").exists()


def test_no_object_to_train_on_or_to_test_on_is_a_sentence_about_objects(tmp_path):
    folder = tmp_path / "VOCdevkit"
    counts = {"2007_trainval": 2, "2007_test": 2}
    difficult = [("2007_test", i, j) for i in range(2) for j in range(3)]
    write_voc(folder, counts, difficult=difficult)
    words = ["--train_split", "2007_trainval"]
    with pytest.raises(ValueError, match="--test_split 2007_test: it has no object that counts"):
        run(tmp_path / "run", folder, *words)
    for file in (folder / "VOC2007" / "Annotations").glob("2007_trainval_*.xml"):
        file.write_text("<annotation></annotation>")
    with pytest.raises(ValueError, match="--train_split 2007_trainval: no object is left to train"):
        run(tmp_path / "run", folder, *words)
    assert not (tmp_path / "run").exists()


def test_an_object_of_the_test_split_without_a_mask_is_refused_before_the_training(tmp_path):
    pytest.importorskip("pycocotools")
    contents = write_coco(tmp_path / "coco", {"train2017": 5, "val2017": 2})["val2017"]
    contents["annotations"][0]["segmentation"] = None
    file = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(contents))
    words = "--test_split val2017: .*instances_val2017.json: annotation 1 has no mask"
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "run", tmp_path / "coco")
    assert not (tmp_path / "run").exists()


def test_a_data_path_must_be_given_and_be_one_of_the_two_formats(tmp_path):
    with pytest.raises(ValueError, match="--data_path must be given: VOCdevkit"):
        eval_detection.main([])
    with pytest.raises(FileNotFoundError, match="is neither a VOCdevkit"):
        eval_detection.main(["--data_path", str(tmp_path)])


def test_a_loss_that_is_not_finite_stops_the_run(voc, tmp_path):
    with pytest.raises(flags.RunError, match="not finite.*lower --lr"):
        run(tmp_path, voc, "--lr", "1e30", "--detector", "faster_rcnn_fpn")


# ============ it learns ============
@pytest.mark.slow
def test_circles_squares_and_triangles_are_found(tmp_path):
    write_voc(tmp_path / "VOCdevkit", {"2007_trainval": 120, "2012_trainval": 120, "2007_test": 40})
    words = (
        "--arch resnet10 --width 0.25 --detector faster_rcnn_fpn --workers 0 --device cpu --nit 90"
    )
    words += " --steps 70 --warmup_iters 20 --lr 0.02 --batch_size 8 --proposals 32 --min_size 64"
    words += " --test_size 64 --max_size 96"
    argv = [*shlex.split(words), "--data_path", str(tmp_path / "VOCdevkit")]
    assert eval_detection.main([*argv, "--dump_path", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "eval_detection_faster_rcnn_fpn.json").read_text())
    assert result["ap50"] > 80 and result["ap50_11points"] > 80
    assert all(result["by_class"][name] > 70 for name in VOC_NAMES)
