"""eval_voc07.py: labels, average precision, what is trained, whole runs, resumed, misused."""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC

import eval_voc07
import extract
from src import dist
from src.data.multicrop import generator
from src.evaluate.average_precision import average_precision, mean_average_precision
from src.evaluate.ten_crops import RandomTenCrops, TenCrops
from src.evaluate.voc import CLASSES, multilabel_loss, open_voc, voc_folder
from src.evaluate.voc_classifier import VOCClassifier
from src.evaluate.voc_training import Training, training_images
from src.nets.convnets import AlexNet
from src.nets.resnet import build_model
from src.run import checkpoint, flags
from tests.gloo import run_ranks
from tests.runs import signal_handlers  # noqa: F401, used by name
from tests.voc_images import ANNOTATION, COLOURS, OBJECT, write_voc

NETWORK = shlex.split("--arch resnet10 --stem small --width 0.125 --size 12 --mean 0.5 0.5 0.5")
QUICK = shlex.split("--workers 0 --device cpu --nit 12 --log_freq 3 --lr 0.05 --std 0.3 0.3 0.3")


@pytest.fixture(autouse=True)
def handlers(signal_handlers):  # noqa: F811
    """Those of before, after every test."""


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc") / "VOCdevkit" / "VOC2007", difficult=(3, 23))


def run(folder, voc, *argv):
    """Results of main() in this process."""
    words = [*QUICK, *NETWORK, "--data_path", str(voc), "--dump_path", str(folder)]
    assert eval_voc07.main([*words, *map(str, argv)]) == 0
    return json.loads(next(Path(folder).glob("eval_voc07_*.json")).read_text())


# ============ labels ============


def test_labels_are_those_of_the_objects_and_difficult_ones_do_not_count(voc):
    data = open_voc(str(voc), "train")
    assert len(data) == 20 and data.labels.shape == (20, 20) and data.classes == list(CLASSES)
    for number in range(20):
        for i, kind in enumerate(COLOURS):
            expected = (number >> i) & 1
            if kind == "aeroplane" and number == 3:
                expected = 255
            assert data.labels[number, CLASSES.index(kind)] == expected, (number, kind)
    assert data.labels.ne(0).sum() == 20  # nothing else
    assert data.load(4).shape == (3, 18, 20) and len(open_voc(str(voc), "trainval")) == 40
    assert data.load(1)[0].float().mean() > 120 > data.load(1)[2].float().mean()
    for path in (voc.parent, voc.parent.parent):  # VOCdevkit, or what holds it
        assert voc_folder(str(path)) == voc_folder(str(voc)) or path == voc.parent.parent
        assert len(open_voc(str(path), "test")) == 20


def test_annotations_alone_say_the_same(voc, tmp_path):
    other = write_voc(tmp_path / "VOC2007", difficult=(3, 23))
    (other / "ImageSets" / "Main" / "cow_val.txt").unlink()
    assert torch.equal(open_voc(str(other), "val").labels, open_voc(str(voc), "val").labels)
    both = [OBJECT.format("dog", flag) for flag in (1, 0, 1)]
    both = "".join([*both, OBJECT.format("cat", 1)])
    (other / "Annotations" / "000021.xml").write_text(ANNOTATION.format(both))
    row = open_voc(str(other), "val").labels[1]
    assert row[CLASSES.index("dog")] == 1 and row[CLASSES.index("cat")] == 255


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    folder = write_voc(tmp_path / "VOC2007")
    (folder / "JPEGImages" / "000024.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="000024.jpg.*split val"):
        open_voc(str(folder), "val")
    (folder / "ImageSets" / "Main" / "dog_test.txt").unlink()
    (folder / "Annotations" / "000047.xml").unlink()
    with pytest.raises(FileNotFoundError, match="000047.xml"):
        open_voc(str(folder), "test")
    (folder / "Annotations" / "000047.xml").write_text(ANNOTATION.format(OBJECT.format("gnu", 0)))
    with pytest.raises(ValueError, match="000047.xml.*gnu"):
        open_voc(str(folder), "test")
    (folder / "ImageSets" / "Main" / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match="neither.*test.txt"):
        open_voc(str(folder), "test")


# ============ loss and average precision ============


def test_the_loss_leaves_out_difficult_objects_and_sends_them_no_gradient():
    draws = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 20, generator=draws).requires_grad_()
    labels = torch.randint(3, (6, 20), generator=draws)
    labels[labels == 2] = 255
    found = multilabel_loss(scores, labels)  # (6,)
    found.mean().backward()
    expected, gradient = torch.zeros(6, dtype=torch.float64), torch.zeros(6, 20)
    for i in range(6):
        for c in range(20):
            p = torch.sigmoid(scores[i, c].double()).detach()
            if labels[i, c] != 255:
                expected[i] -= torch.log(p if labels[i, c] == 1 else 1 - p)
                gradient[i, c] = (p - labels[i, c]) / 6
    torch.testing.assert_close(found.detach().double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.grad, gradient, atol=1e-6, rtol=1e-5)
    large = multilabel_loss(torch.tensor([[1e4, -1e4, 1e4]]), torch.tensor([[1, 0, 255]]))
    assert large.item() == 0.0


def test_the_area_is_that_of_scikit_learn_ties_included():
    rng = np.random.default_rng(0)
    for trial in range(30):
        scores = rng.integers(0, 5 if trial % 2 else 1000, 40) / 7.0
        positive = rng.random(40) < 0.3
        positive[trial % 40] = True
        area, _ = average_precision(torch.tensor(scores), torch.tensor(positive))
        assert area == pytest.approx(average_precision_score(positive, scores), abs=1e-12)


def test_the_11_points_are_the_highest_precisions_at_a_recall_or_beyond():
    scores = torch.tensor([9.0, 8, 7, 6, 5])
    positive = torch.tensor([True, False, True, False, True])
    # recall 1/3 precision 1; 2/3, 2/3; 1, 3/5: of 0 .. 0.3, 0.4 .. 0.6, 0.7 .. 1
    area, points = average_precision(scores, positive)
    assert points == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11)
    assert area == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    scores = torch.arange(10.0).flip(0)
    assert average_precision(scores, torch.ones(10, dtype=torch.bool)) == (1.0, 1.0)
    # recall 1/5 precision 1; 2/5, 2/3; 3/5, 3/5; 4/5, 4/7; 1, 5/9: recalls 0.2, 0.4, ... are reached
    _, points = average_precision(scores, torch.tensor([True, False] * 5))
    assert points == pytest.approx((3 * 1 + 2 * 2 / 3 + 2 * 3 / 5 + 2 * 4 / 7 + 2 * 5 / 9) / 11)
    nan = average_precision(torch.tensor([torch.nan, 1.0]), torch.tensor([True, False]))
    assert nan == (0.5, 0.5)  # what is no number comes last


def _share_of_scores(rank, world_size, shares):
    draws = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 4, generator=draws)
    labels = torch.randint(2, (20, 4), generator=draws)
    labels[3, 0], labels[:, 2] = 255, 0
    first, last = shares[rank]
    return mean_average_precision(scores[first:last], labels[first:last])


@pytest.mark.slow
def test_precisions_are_of_the_rows_of_all_processes_without_difficult_ones():
    one = _share_of_scores(0, 1, [(0, 20)])
    draws = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 4, generator=draws)
    labels = torch.randint(2, (20, 4), generator=draws)
    rows = [i for i in range(20) if i != 3]
    first = 100 * average_precision_score(labels[rows, 0], scores[rows, 0])
    assert one["ap"][0] == pytest.approx(first) and one["ap"][2] is None
    there = [one["ap"][i] for i in (0, 1, 3)]
    assert one["map"] == pytest.approx(sum(there) / 3) and one["map_11points"] > 0
    for found in run_ranks(_share_of_scores, 2, [(0, 13), (13, 20)]):
        assert found == one
    assert run_ranks(_share_of_scores, 2, [(0, 20), (20, 20)])[1] == one
    with pytest.raises(ValueError, match="no"):
        mean_average_precision(scores, torch.zeros(20, 4))


# ============ what is trained ============


def alexnet(**options):
    torch.manual_seed(0)
    return AlexNet(width=1 / 32, **options)


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def classifier_of(network, only, batchnorm=False):
    return VOCClassifier(
        network, 20, only_classifier=only, train_batchnorm=batchnorm, generator=generator(1)
    )


def test_the_linear_layers_start_anew_and_alone_are_trained_by_fc6_8():
    before = {name: x.clone() for name, x in alexnet(sobel=True).state_dict().items()}
    model = classifier_of(alexnet(sobel=True), True)
    linear = {"backbone.classifier.1", "backbone.classifier.4", "top"}
    assert trained_names(model) == {f"{x}.{y}" for x in linear for y in ("weight", "bias")}
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] in linear:
            bias = name.endswith("bias")
            assert (value == 0.1).all() if bias else abs(value.std() - 0.01) < 1e-3, name
        else:
            assert torch.equal(value, before[name.removeprefix("backbone.")]), name
    everything = trained_names(classifier_of(alexnet(sobel=True), False))
    assert everything == {n for n in model.state_dict() if n.endswith((".weight", ".bias"))} - {
        f"backbone.sobel.{i}.{x}" for i in (0, 1) for x in ("weight", "bias")
    }
    norms = trained_names(classifier_of(alexnet(sobel=True), True, True)) - trained_names(model)
    assert len(norms) == 10 and all(name.startswith("backbone.features.") for name in norms)


def test_of_a_resnet_one_linear_layer_is_the_classifier():
    network = build_model("resnet10", width=0.125)
    model = classifier_of(network, True)
    assert trained_names(model) == {"top.weight", "top.bias"}
    assert len(trained_names(classifier_of(network, True, True))) == 2 + 2 * 12


def test_scores_are_of_the_relu_of_the_features_and_batch_norms_keep_their_statistics():
    torch.manual_seed(1)
    model = classifier_of(alexnet(dropout=0.5), True).train()
    images = torch.randn(4, 3, 64, 64)
    assert not model.trunk().training and model.backbone.classifier.training
    before = model.backbone.features[1].running_mean.clone()
    assert not torch.equal(model(images), model(images))  # dropout
    assert torch.equal(model.backbone.features[1].running_mean, before)
    model.eval()
    torch.nn.init.normal_(model.backbone.classifier[4].weight)  # or all features are positive
    features = model.backbone.forward_backbone(images)
    assert (features < 0).any()
    torch.testing.assert_close(model(images), model.top(features.relu()))


# ============ whole runs ============


@pytest.mark.slow
def test_red_and_blue_are_told_apart_and_everything_is_written(voc, tmp_path, capsys):
    found = run(tmp_path, voc, "--fc6_8", "false", "--nit", "60")
    assert found["map"] > 90 and found["map_11points"] > 90
    assert set(found["ap"]) == set(CLASSES) and found["ap"]["cow"] is None
    settings = found["settings"]
    assert (settings["batch"], settings["images"], settings["nit"]) == (16, 20, 60)
    assert not settings["fc6_8"] and settings["protocol"] == "deepcluster"
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    logs = {"checkpoint.pth", "log.jsonl", "train.log", "args.json"}
    assert names == {"eval_voc07_all.json", *(f"voc07/all/{name}" for name in logs)}
    lines = [
        json.loads(x) for x in (tmp_path / "voc07" / "all" / "log.jsonl").read_text().splitlines()
    ]
    assert [line["iteration"] for line in lines] == list(range(2, 60, 3))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"] and lines[0]["gradient_norm"] > 0
    said = capsys.readouterr().out
    assert "UNTRAINED" in said and "tvmonitor" in said and "img/s" in said and "mAP" in said


def test_trainval_is_tested_on_test_and_fixed_crops_do(voc, tmp_path):
    argv = ["--split", "trainval", "--nit", "6", "--stepsize", "2"]
    argv += ["--lr", "1e-7"]  # so that the scores stay the random ones
    found = run(tmp_path, voc, *argv)
    assert found["settings"]["images"] == 40 and found["settings"]["fc6_8"]
    lines = [
        json.loads(x) for x in (tmp_path / "voc07" / "fc6_8" / "log.jsonl").read_text().splitlines()
    ]
    assert [line["lr"] for line in lines] == [5e-8, 2.5e-8]  # iterations 2 and 5
    again = run(tmp_path, voc, *argv)  # all iterations are done: nothing changes
    assert again == found
    fixed = run(tmp_path, voc, *argv, "--eval_random_crops", "0")
    assert fixed["ap"] != found["ap"] and fixed["settings"]["eval_random_crops"] is False


def test_the_network_of_a_file_is_fine_tuned(voc, tmp_path):
    torch.manual_seed(3)
    weights = AlexNet(width=1 / 32, sobel=True, num_classes=7).state_dict()
    torch.save({"arch": "alexnet", "state_dict": weights}, tmp_path / "alexnet.pth")
    found = run(
        tmp_path / "out",
        voc,
        "--arch",
        "alexnet",
        "--width",
        1 / 32,
        "--sobel",
        "--size",
        63,
        "--model",
        tmp_path / "alexnet.pth",
        "--nit",
        "2",
        "--stem",
        "imagenet",
    )
    assert found["settings"]["sobel"] and found["settings"]["pretrained"].endswith("alexnet.pth")
    state = torch.load(tmp_path / "out/voc07/fc6_8/checkpoint.pth", weights_only=True)["module"]
    for name, value in weights.items():
        if name.startswith("features."):
            assert torch.equal(state[f"backbone.{name}"], value), name


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_last_bit(voc, tmp_path, monkeypatch):
    argv = ["--arch", "alexnet", "--width", "0.04", "--size", "63", "--batch_size", "4"]
    argv += ["--checkpoint_iters", "5", "--fc6_8", "false"]
    expected = run(tmp_path / "whole", voc, *argv)
    taken, loss = iter(range(99)), eval_voc07.multilabel_loss

    def loss_and_signal(scores, targets):
        if next(taken) == 6:  # of the second epoch of 5 iterations
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(scores, targets)

    words = [*QUICK, *NETWORK, "--data_path", voc, "--dump_path", tmp_path / "parts", *argv]
    with monkeypatch.context() as patch:
        patch.setattr(eval_voc07, "multilabel_loss", loss_and_signal)
        assert eval_voc07.main(list(map(str, words))) == 128 + signal.SIGTERM
    state = torch.load(tmp_path / "parts/voc07/all/checkpoint.pth", weights_only=True)
    assert state["iteration"] == 7 and not (tmp_path / "parts/eval_voc07_all.json").exists()
    assert run(tmp_path / "parts", voc, *argv) == expected
    parts, whole = (
        torch.load(tmp_path / name / "voc07/all/checkpoint.pth", weights_only=True)["module"]
        for name in ("parts", "whole")
    )
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    with pytest.raises(OSError, match="holds an evaluation with lr 0.05, not 0.1.*--dump_path"):
        run(tmp_path / "parts", voc, *argv, "--lr", "0.1")
    longer = run(tmp_path / "parts", voc, *argv, "--nit", "14")
    assert longer["settings"]["nit"] == 14


def _whole_run(rank, world_size, folder, argv):
    """Results and weights of main() in this process of a group."""
    places = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
    if world_size > 1:
        os.environ.update({name: str(place) for name, place in places.items()})
        dist.shutdown = lambda: None  # the group is run_ranks'
    assert eval_voc07.main([*QUICK, *NETWORK, "--dump_path", str(folder), *argv]) == 0
    if rank > 0:
        return None
    found = json.loads(next(Path(folder).glob("eval_voc07_*.json")).read_text())
    state = torch.load(next(Path(folder).glob("voc07/*/checkpoint.pth")), weights_only=True)[
        "module"
    ]
    return found, {name: x.numpy() for name, x in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("fc6_8", ["true", "false"])
def test_two_processes_equal_one(voc, tmp_path, fc6_8):
    """At a rate that does not diverge, which would make much of what float32 rounds."""
    argv = ["--data_path", str(voc), "--fc6_8", fc6_8, "--train_batchnorm", "1", "--nit", "5"]
    argv += ["--lr", "0.001"]
    one, weights = _whole_run(0, 1, tmp_path / "one", [*argv, "--batch_size", "10"])
    (two, state), _ = run_ranks(_whole_run, 2, tmp_path / "two", [*argv, "--batch_size", "5"])
    assert two["settings"] == one["settings"]
    assert two["map"] == pytest.approx(one["map"], abs=1e-6)
    for name, value in weights.items():
        np.testing.assert_allclose(state[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_batches_go_on_in_the_middle_of_an_epoch_and_depend_on_no_process(voc):
    data = open_voc(str(voc), "train")

    def images_of(process, batch_size):
        return training_images(
            data,
            12,
            scale=(0.1, 0.5),
            ratio=(1.0, 1.0),
            normalisation=([0.5] * 3, [0.3] * 3),
            batch_size=batch_size,
            process=process,
            seed=31,
            workers=0,
        )

    alone = images_of(dist.init("cpu"), 8)
    batches = list(alone(0, 7))
    assert len(batches) == 7 and all(images.shape == (8, 3, 12, 12) for images, _ in batches)
    seen = torch.cat([indices for _, indices in batches[:2]])
    assert len(seen.unique()) == 16 and not torch.equal(batches[0][1], batches[2][1])
    for (images, indices), (again, same) in zip(batches[3:], alone(3, 7), strict=True):
        assert torch.equal(images, again) and torch.equal(indices, same)
    for rank in range(2):
        process = dist.Process(rank, 2, rank, "test", torch.device("cpu"))
        share = images_of(process, 4)
        for (images, indices), (own, mine) in zip(batches, share(0, 7), strict=True):
            rows = slice(4 * rank, 4 * rank + 4)
            assert torch.equal(images[rows], own) and torch.equal(indices[rows], mine)


# ============ arguments ============

DEEPCLUSTER = (
    "--vocdir VOC --split trainval --model alexnet.pth.tar --nit 80000 --fc6_8 1 --train_batchnorm 0 "
    "--eval_random_crops 1 --stepsize 5000 --lr 0.003 --wd 1e-06 --min_scale 0.1 --max_scale 0.5 "
    "--seed 31"
)
DEEPERCLUSTER = (
    "--pretrained vgg.pth --data_path VOC --split train --sobel true --fc6_8 False --nit 150000 "
    "--eval_random_crops true --stepsize 10000 --lr 0.003 --wd 1e-6 --seed 1993"
)


def test_published_command_lines_are_taken():
    args = eval_voc07.get_parser().parse_args(shlex.split(DEEPCLUSTER))
    assert (args.data_path, args.pretrained, args.fc6_8, args.train_batchnorm) == (
        *("VOC", "alexnet.pth.tar"),
        *(True, False),
    )
    args = eval_voc07.get_parser().parse_args(shlex.split(DEEPERCLUSTER))
    assert (args.sobel, args.fc6_8, args.nit, args.seed) == (True, False, 150000, 1993)


def test_the_protocol_is_that_of_the_network_and_a_flag_wins():
    def of(argv):
        args = eval_voc07.parse_args(["--data_path", "x", *argv.split()])
        eval_voc07.check_batch(args, 1, 1000)
        return args

    args = of("--arch alexnet")
    assert (args.protocol, args.nit, args.stepsize, args.min_scale, args.max_scale) == (
        *("deepcluster", 80000, 5000),
        *(0.1, 0.5),
    )
    assert (args.lr, args.wd, args.batch_size, args.sobel) == (0.003, 1e-6, 16, False)
    args = of("--arch vgg16 --max_scale 0.9")
    assert (args.protocol, args.nit, args.stepsize, args.min_scale, args.max_scale) == (
        *("deepercluster", 150000, 10000),
        *(0.08, 0.9),
    )
    assert of("--arch vgg16 --protocol deepcluster").nit == 80000
    assert of("--arch resnet50").protocol == "deepcluster"


def test_the_data_of_the_run_before_is_not_taken_for_voc(tmp_path):
    model = build_model("resnet10", stem="small", width=0.125)
    checkpoint.save_checkpoint(tmp_path, {"model": model.state_dict(), "epoch": 1})
    (tmp_path / "args.json").write_text(json.dumps({"arch": "resnet10", "data_path": "digits"}))
    args = eval_voc07.parse_args(["--pretrained", str(tmp_path)])
    assert args.data_path == "" and args.arch == "resnet10" and args.dump_path == str(tmp_path)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ("", "--data_path (or --vocdir) must be given: the folder VOCdevkit/VOC2007"),
        ("--data_path /nowhere", "--data_path /nowhere"),
        ("--data_path EMPTY", "has no JPEGImages"),
        ("--data_path VOC --min_scale 0.6 --max_scale 0.5", "--min_scale 0.6"),
        ("--data_path VOC --max_scale 1.5", "--max_scale 1.5"),
        ("--data_path VOC --batch_size 21", "--batch_size 21"),
        ("--data_path VOC --fc6_8 perhaps", "--fc6_8"),
        ("--data_path VOC --pretrained nowhere.pth", "nowhere.pth"),
        ("--data_path VOC --arch resnet18 --depth 3", "--depth"),
        ("--data_path VOC --arch alexnet --width 0.04 --size 32", "32 px"),
        ("--data_path VOC --mean 1 1", "--mean has 2"),
        ("--data_path VOC --arch resnet10 --dump_path /proc/nowhere", "--dump_path /proc/nowhere"),
        ("--data_path VOC --device cuda:99", "--device cuda:99"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_status_2(argv, sentence, voc, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    argv = argv.replace("VOC", str(voc)).replace("EMPTY", str(tmp_path / "empty"))
    argv = ["--workers", "0", "--dump_path", str(tmp_path / "out"), *shlex.split(argv)]
    with pytest.raises(SystemExit) as exit:
        flags.run(lambda: eval_voc07.main(argv))
    assert exit.value.code == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and sentence in said[0]


@pytest.mark.parametrize("kind, crops", [("1", RandomTenCrops), ("0", TenCrops)])
@torch.no_grad()
def test_the_scores_of_ten_crops_are_averaged(voc, monkeypatch, kind, crops):
    torch.manual_seed(0)
    model = classifier_of(build_model("resnet10", stem="small", width=0.125), True).eval()
    args = eval_voc07.parse_args([*QUICK, *NETWORK, "--eval_random_crops", kind])
    training = Training(model, 0.0, dist.init("cpu"), "fp32", "nowhere", {})
    monkeypatch.setattr(eval_voc07, "mean_average_precision", lambda *rows: rows)
    data = open_voc(str(voc), "val")
    scores, labels = eval_voc07.evaluate(training, data, args)
    assert scores.shape == (20, 20) and torch.equal(labels, data.labels)
    options = () if crops is TenCrops else ((0.1, 0.5), (1.0, 1.0), 31)
    views = crops(data, 12, *options).load(7).unflatten(0, (10, 3)).float() / 255
    expected = model((views - 0.5) / 0.3).mean(0)
    torch.testing.assert_close(scores[7], expected, atol=1e-5, rtol=1e-4)


def test_the_gradient_is_clipped_as_a_whole(voc, tmp_path, monkeypatch):
    loss, steps = eval_voc07.multilabel_loss, []
    monkeypatch.setattr(eval_voc07, "multilabel_loss", lambda *rows: 1e4 * loss(*rows))
    step = torch.optim.SGD.step

    def norm_and_step(self, *rest):
        parameters = self.param_groups[0]["params"]
        steps.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", norm_and_step)
    run(tmp_path, voc, "--nit", "2", "--lr", "1e-6", "--fc6_8", "0")
    assert steps == pytest.approx([10.0, 10.0], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(voc, tmp_path):
    with pytest.raises(flags.RunError, match="not finite.*lower --lr"):
        run(tmp_path, voc, "--lr", "1e30", "--fc6_8", "0")


# ============ linear SVMs of frozen features ============
def run_svm(folder, voc, *argv):
    """Results of --protocol svm in this process, and the words of the command."""
    words = shlex.split("--protocol svm --workers 0 --device cpu --costs 0.1 10 --batch_size 7")
    words += [*NETWORK, "--std", *["0.3"] * 3, "--data_path", str(voc), "--dump_path", str(folder)]
    assert eval_voc07.main([*words, *map(str, argv)]) == 0
    return json.loads((Path(folder) / "eval_voc07_svm.json").read_text())


@pytest.fixture(scope="module")
def svm_folder(voc, tmp_path_factory):
    folder = tmp_path_factory.mktemp("svm")
    run_svm(folder, voc)
    return folder


def test_svms_are_those_of_scikit_learn_and_difficult_objects_are_not_tested(svm_folder, voc):
    result = json.loads((svm_folder / "eval_voc07_svm.json").read_text())
    trainval = open_voc(str(voc), "trainval")
    test = open_voc(str(voc), "test")
    folder = svm_folder / "voc07" / "svm"  # of the features of extract.py, as another test says
    features = [torch.tensor(np.load(folder / f"{name}.npy")) for name in ("trainval", "test")]
    train, val = (x.double() / (x.double().norm(dim=1, keepdim=True) + 1e-5) for x in features)
    for kind in COLOURS:
        column = CLASSES.index(kind)
        svm = LinearSVC(
            C=result["costs"][kind], class_weight={1: 2, -1: 1}, tol=1e-9, max_iter=10**6
        )
        # A difficult object trains as a negative.
        svm.fit(train.numpy(), np.where(trainval.labels[:, column] == 1, 1, -1))
        scores = svm.decision_function(val.numpy())
        counted = (test.labels[:, column] != 255).numpy()
        positive = (test.labels[:, column] == 1).numpy()
        area = average_precision_score(positive[counted], scores[counted])
        assert result["ap"][kind] == pytest.approx(100 * area, abs=1e-6), kind
        points = average_precision(torch.tensor(scores[counted]), torch.tensor(positive[counted]))
        assert result["ap_11points"][kind] == pytest.approx(100 * points[1], abs=1e-6)
    assert result["settings"]["split"] == "trainval" and result["ap"]["cow"] is None
    assert result["map"] == pytest.approx(np.mean([result["ap"][kind] for kind in COLOURS]))
    assert result["map_interpolated"] >= result["map"]


def test_the_features_are_those_that_extract_writes_to_the_last_bit(svm_folder, voc, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40, 60):  # of test
        shutil.copy(voc / "JPEGImages" / f"{number:06}.jpg", images)
    words = shlex.split("--workers 0 --device cpu --batch_size 7 --interpolation bilinear")
    words += [*NETWORK, "--std", *["0.3"] * 3, "--data_path", str(images)]
    assert extract.main([*words, "--dump_path", str(tmp_path / "features")]) == 0
    theirs = np.load(tmp_path / "features" / "features.npy")
    np.testing.assert_array_equal(np.load(svm_folder / "voc07" / "svm" / "test.npy"), theirs)


def test_a_second_call_computes_nothing_and_other_costs_only_svms(svm_folder, voc, monkeypatch):
    before = json.loads((svm_folder / "eval_voc07_svm.json").read_text())

    def refuse(*arguments, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr("src.evaluate.stored_features.extract_features", refuse)
    other = run_svm(svm_folder, voc, "--costs", 1)
    assert set(other["costs"].values()) == {1.0}
    assert run_svm(svm_folder, voc)["ap"] == before["ap"]
    monkeypatch.setattr("src.evaluate.svm_classes.fit_group", refuse)
    assert run_svm(svm_folder, voc) == before
    with pytest.raises(OSError, match=r"voc07.svm holds features with size 12, not 10.*dump_path"):
        run_svm(svm_folder, voc, "--size", 10)


def test_svms_take_no_features_of_another_precision_but_those_of_an_earlier_version(
    svm_folder, voc, tmp_path
):
    shutil.copytree(svm_folder, tmp_path, dirs_exist_ok=True)
    assert run_svm(tmp_path, voc, "--precision", "fp32")["settings"]["precision"] == "fp32"
    with pytest.raises(OSError, match="features with precision fp32, not bf16: name another"):
        run_svm(tmp_path, voc, "--precision", "bf16")
    for path in (tmp_path / "voc07" / "svm").glob("*.json"):
        stored = json.loads(path.read_text())
        del stored["settings"]["precision"]
        path.write_text(json.dumps(stored))
    run_svm(tmp_path, voc, "--precision", "bf16")


@pytest.mark.slow
def test_svms_of_two_processes_stopped_in_the_middle_end_at_the_bits_of_one(
    svm_folder, voc, tmp_path
):
    whole = json.loads((svm_folder / "eval_voc07_svm.json").read_text())
    outcomes = run_ranks(_stopped_then_whole, 2, str(tmp_path), str(voc))
    assert [outcome[0] for outcome in outcomes] == [128 + signal.SIGTERM] * 2
    result = json.loads((tmp_path / "eval_voc07_svm.json").read_text())
    assert result == whole


def _stopped_then_whole(rank, world_size, folder, voc):
    """Exit status of a call that a signal stops in the features, then of one that ends."""
    from src.evaluate import stored_features
    from src.labels import row_file

    row_file.CHUNK = 8
    extract_features = stored_features.extract_features

    def signalled(*arguments, write, **options):
        def write_and_signal(first, batch):
            os.kill(os.getpid(), signal.SIGTERM)
            write(first, batch)

        return extract_features(*arguments, write=write_and_signal, **options)

    words = shlex.split("--protocol svm --workers 0 --device cpu --costs 0.1 10 --batch_size 7")
    words += [*NETWORK, "--std", *["0.3"] * 3, "--data_path", voc, "--dump_path", folder]
    with pytest.MonkeyPatch.context() as patch:
        # The group of processes is the test's, and stays.
        patch.setattr(
            dist,
            "init",
            lambda *given: dist.Process(rank, world_size, rank, "torchrun", torch.device("cpu")),
        )
        patch.setattr(dist, "shutdown", lambda: None)
        patch.setattr(stored_features, "extract_features", signalled)
        first = eval_voc07.main(words)
        patch.setattr(stored_features, "extract_features", extract_features)
        return first, eval_voc07.main(words)


def test_flags_of_the_other_protocol_are_refused_in_one_sentence(voc, tmp_path):
    with pytest.raises(ValueError, match="--lr is for fine-tuning, not for --protocol svm"):
        run_svm(tmp_path, voc, "--lr", 1)
    with pytest.raises(ValueError, match="--costs is for nothing but --protocol svm"):
        run(tmp_path, voc, "--costs", 1)
