"""eval_knn.py: what it evaluates, from where, on how many processes, and what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_knn
from src.data.datasets import open_dataset, usual_std
from src.evaluate import flags as eval_flags
from src.labels.features import extract_features
from src.nets.backbones import build_backbone
from src.nets.convnets import build_convnet
from src.nets.dino_head import DINOHead, MultiCropWrapper
from src.nets.resnet import build_model
from src.nets.vision_transformer import ARCHITECTURES
from src.pictures import neighbours
from src.run import checkpoint, flags, image_flags
from tests.runs import write_noise

ROOT = Path(__file__).parent.parent
SMALL = {"arch": "resnet18", "stem": "small", "width": 0.125, "in_chans": 3}
HEAD = {"hidden_mlp": 16, "feat_dim": 8, "head_dims": None, "head_bn": True}
QUICK = ["--workers", "0", "--device", "cpu", "--nb_knn", "1", "20", "--size", "8"]
NETWORK = ["--arch", "resnet18", "--stem", "small", "--width", "0.125"]
FEW_LABELS = ["--labels_per_class", 5, "--draws", 3]


def evaluate(tmp_path, *argv):
    """Rows of the table and the settings, from main() in this process."""
    assert eval_knn.main([*QUICK, "--dump_path", str(tmp_path / "out"), *map(str, argv)]) == 0
    found = json.loads((tmp_path / "out" / "eval_knn.json").read_text())
    return found["results"], found["settings"]


def top1(rows, features="backbone", labels="all", k=20):
    (row,) = [r for r in rows if (r["features"], r["labels"], r["k"]) == (features, labels, k)]
    return row["top1"]


def nearly(rows):
    """Rows whose accuracies may be off by two of 500 images: some votes tie but for rounding."""
    return [pytest.approx(row, abs=0.41) for row in rows]


@pytest.fixture
def images(tmp_path):
    """A folder of two classes, red and blue noise, that nothing splits: 20 images each."""
    return write_noise(tmp_path, {"images": (20, 20)}, stem="{i:02}") / "images"


def make_run(folder, seed=5, **arguments):
    """The folder of a run whose network is the untrained one of another seed than its own."""
    arguments = {**SMALL, **HEAD, "seed": 3, "data_path": "digits", **arguments}
    arguments |= {"nmb_prototypes": [6], "size_crops": [8, 6], "zero_init_residual": False}
    torch.manual_seed(seed)
    options = {name: arguments[name] for name in ("stem", "width", "in_chans", "hidden_mlp")}
    model = build_model(
        arguments["arch"], normalize=True, output_dim=8, nmb_prototypes=[6], **options
    )
    checkpoint.save_checkpoint(folder, {"model": model.state_dict(), "epoch": 1}, keep_as="ckp-1")
    (folder / "args.json").write_text(json.dumps(arguments))
    return model


# ============ networks ============


def test_the_bare_command_evaluates_an_untrained_network_on_digits_and_says_so(tmp_path, capsys):
    rows, settings = evaluate(tmp_path, *NETWORK)
    assert settings["data_path"] == "digits" and settings["pretrained"] == ""
    assert [(r["features"], r["k"]) for r in rows] == [("untrained network", k) for k in (1, 20)]
    assert all(10 < r["top1"] < r["top5"] <= 100 for r in rows)  # chance is 10 %
    said = capsys.readouterr().out
    assert "UNTRAINED" in said and "top-1" in said and "images/s" in said


def test_small_images_get_a_small_network_unless_one_is_named():
    args, _ = eval_flags.parse_args(eval_knn.get_parser(), [], "knn")
    assert (args.arch, args.stem, args.size) == (
        "resnet10",
        "small",
        image_flags.CROPS["tiny"]["size"][0],
    )
    args, _ = eval_flags.parse_args(
        eval_knn.get_parser(), ["--data_path", "cifar10", "--size", "40"], "knn"
    )
    assert (args.arch, args.stem, args.size) == ("resnet18", "small", 40)
    args, _ = eval_flags.parse_args(eval_knn.get_parser(), ["--arch", "resnet34"], "knn")
    assert (args.arch, args.stem, args.size) == ("resnet34", "imagenet", 224)
    args, _ = eval_flags.parse_args(eval_knn.get_parser(), ["--data_path", "/imagenet"], "knn")
    assert (args.arch, args.stem, args.size) == ("resnet50", "imagenet", 224)


@pytest.mark.parametrize("which", ["", "checkpoint.pth", "checkpoints/ckp-1.pth"])
def test_a_run_needs_no_other_flag_than_where_it_is(tmp_path, which):
    make_run(tmp_path / "run")
    pretrained = ["--pretrained", str(tmp_path / "run" / which)]
    args, run_args = eval_flags.parse_args(eval_knn.get_parser(), pretrained, "knn")
    assert (args.arch, args.width, args.size, args.seed) == ("resnet18", 0.125, 8, 3)
    assert run_args["nmb_prototypes"] == [6] and args.nb_knn == [10, 20, 100, 200]
    args, _ = eval_flags.parse_args(
        eval_knn.get_parser(), [*pretrained, "--size", "12", "--seed", "4"], "knn"
    )
    assert (args.size, args.seed) == (12, 4)  # the command line wins
    rows, settings = evaluate(tmp_path, *pretrained)
    assert settings["feat_dim"] == 8 and {r["features"] for r in rows} == {"backbone"}


@pytest.mark.parametrize(
    "argv, is_taken",
    [
        ([], True),
        (["--data_path", "photos.csv"], True),  # the run's own
        (["--data_path", "digits"], False),
        (["--train_path", "train.csv", "--val_path", "val.csv"], False),
        (["--val_path", "val.csv"], True),  # its training images are the run's
    ],
)
def test_how_a_run_finds_its_images_is_taken_over_for_its_own_data_only(tmp_path, argv, is_taken):
    make_run(tmp_path, data_path="photos.csv", data_root="/photos", label_column="kind")
    words = ["--pretrained", str(tmp_path), *argv]
    args, _ = eval_flags.parse_args(eval_knn.get_parser(), words, "knn")
    found = (args.data_root, args.label_column)
    assert found == (("/photos", "kind") if is_taken else (None, None))
    told = eval_flags.parse_args(eval_knn.get_parser(), [*words, "--data_root", "/own"], "knn")[0]
    assert told.data_root == "/own"


@pytest.mark.slow
def test_the_weights_of_the_run_are_those_evaluated_and_untrained_is_its_own_start(tmp_path):
    make_run(tmp_path / "run", seed=5)
    run = ["--pretrained", tmp_path / "run"]
    rows, _ = evaluate(tmp_path, *run, "--untrained")
    make_run(tmp_path / "same", seed=3)  # saved at its start: seed 3 is that of its args.json
    same, _ = evaluate(tmp_path, "--pretrained", tmp_path / "same", "--untrained")
    start = [r["top1"] for r in same if r["features"] == "untrained network"]
    assert [r["top1"] for r in same if r["features"] == "backbone"] == start
    assert [r["top1"] for r in rows if r["features"] == "untrained network"] == start
    assert [r["top1"] for r in rows if r["features"] == "backbone"] != start


@pytest.mark.slow
def test_the_embedding_is_another_feature_than_the_backbone(tmp_path):
    make_run(tmp_path / "run")
    dumps = [tmp_path / "a", tmp_path / "b"]
    for feature, folder in zip(("backbone", "embedding"), dumps, strict=True):
        rows, settings = evaluate(
            tmp_path,
            "--pretrained",
            tmp_path / "run",
            "--feature",
            feature,
            "--dump_features",
            folder,
        )
        assert settings["feature"] == feature and {r["features"] for r in rows} == {feature}
    assert np.load(dumps[0] / "val_features.npy").shape == (500, 64)
    embedding = np.load(dumps[1] / "val_features.npy")
    assert embedding.shape == (500, 8)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_a_released_file_is_read_with_its_prefix_and_without_its_head(tmp_path, images):
    torch.manual_seed(0)
    model = build_model(
        "resnet18", normalize=True, hidden_mlp=2048, output_dim=128, nmb_prototypes=9
    )
    released = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(released, tmp_path / "released.pth.tar")
    files = ["--data_path", images, "--pretrained", tmp_path / "released.pth.tar"]
    argv = [*files, "--arch", "resnet18", "--size", "32", "--dump_features"]
    evaluate(tmp_path, *argv, tmp_path / "a")
    evaluate(tmp_path, *argv, tmp_path / "b", "--feature", "embedding")
    model.eval()
    from src.labels.features import centre_crop

    first = torch.from_numpy(np.array(Image.open(images / "blue" / "00.png"))).permute(2, 0, 1)
    crop = centre_crop(first, 32, 32).float() / 255  # image 0 is the first that is held out
    crop = (crop - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.228, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        expected = model.forward_backbone(crop[None])
        embedding, _ = model(crop[None])
    for folder, value in (("a", expected), ("b", embedding)):
        found = np.load(tmp_path / folder / "val_features.npy")[0]
        np.testing.assert_allclose(found, value[0].numpy(), rtol=1e-4, atol=1e-5)


def test_weights_of_a_trunk_alone_give_features_but_no_embedding(tmp_path, images):
    trunk = build_model("resnet18", stem="small", width=0.125).state_dict()
    torch.save(trunk, tmp_path / "trunk.pth")
    argv = ["--data_path", images, "--pretrained", tmp_path / "trunk.pth", *NETWORK]
    assert len(evaluate(tmp_path, *argv)[0]) == 2
    with pytest.raises(OSError, match="trunk.pth lacks .* projection_head"):
        evaluate(tmp_path, *argv, "--feature", "embedding")


@pytest.mark.slow
def test_torchvision_weights_fit_its_own_trunk_and_ours(tmp_path, images):
    models = pytest.importorskip("torchvision.models")
    for arch in ("squeezenet1_1", "resnet18"):
        torch.manual_seed(0)
        torch.save(models.get_model(arch).state_dict(), tmp_path / f"{arch}.pth")
        weights = ["--pretrained", tmp_path / f"{arch}.pth", "--arch", arch, "--size", "64"]
        rows, _ = evaluate(tmp_path, "--data_path", images, *weights)
        assert top1(rows, k=1) > 50


# ============ vision transformers and runs of DINO ============


def parse(*argv):
    return eval_flags.parse_args(eval_knn.get_parser(), list(map(str, argv)), "knn")[0]


def small_vit(seed):
    """A vit_tiny of an eighth of the width, for images of 16 px."""
    torch.manual_seed(seed)
    return ARCHITECTURES["vit_tiny"](patch_size=4, img_size=16, width=0.125, depth=3).eval()


def dino_checkpoint(student, teacher):
    """What DINO saves: the student's names with the prefixes of a wrapper, the teacher's without."""
    head = DINOHead(student.num_features, 16, hidden_dim=8)
    parts = [MultiCropWrapper(network, head).state_dict() for network in (student, teacher)]
    return {"student": {f"module.{k}": v for k, v in parts[0].items()}, "teacher": parts[1]}


@pytest.mark.parametrize("arch", ["vit_micro", "vit_tiny", "vit_small", "vit_base"])
def test_a_file_of_a_vision_transformer_says_which_one_it_is(tmp_path, arch):
    options = {"patch_size": 8, "img_size": 40, "depth": 2, "num_registers": 3}
    weights = {k: v.clone() for k, v in ARCHITECTURES[arch](**options).state_dict().items()}
    torch.save({"teacher": {f"backbone.{k}": v for k, v in weights.items()}}, tmp_path / "full.pth")
    torch.save(weights, tmp_path / "plain.pth")
    for name in ("full", "plain"):
        args = parse("--pretrained", tmp_path / f"{name}.pth")
        assert {flag: getattr(args, flag) for flag in options} == options and args.arch == arch
    args = parse("--pretrained", tmp_path / "plain.pth", "--arch", arch, "--img_size", 32)
    assert (args.img_size, args.patch_size) == (32, 8)  # the command line wins
    args = parse("--pretrained", tmp_path / "plain.pth", "--arch", "resnet18")
    assert (args.arch, args.img_size, args.patch_size) == ("resnet18", None, 16)


def test_a_file_of_an_xcit_is_not_taken_for_a_vision_transformer(tmp_path):
    xcit = {"blocks.0.attn.qkv.weight": torch.zeros(9, 3), "cls_token": torch.zeros(1, 1, 3)}
    torch.save(xcit, tmp_path / "xcit.pth")
    assert parse("--pretrained", tmp_path / "xcit.pth").patch_size == 16


def test_the_published_command_of_dino_takes_the_class_token_of_the_teacher(tmp_path, images):
    student, teacher = small_vit(1), small_vit(2)
    torch.save(dino_checkpoint(student, teacher), tmp_path / "dino.pth")
    argv = ["--pretrained_weights", tmp_path / "dino.pth", "--data_path", images, "--size", 16]
    argv += ["--arch", "vit_tiny", "--width", 0.125]
    dataset = open_dataset(str(images))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # without SwAV's red
    keys = {"student": student, "teacher": teacher}
    for key, options in ((None, []), ("student", ["--checkpoint_key", "student"])):
        folder = tmp_path / f"dump_{key}"
        evaluate(tmp_path, *argv, *options, "--dump_features", folder)
        network = keys[key or "teacher"]
        expected, _ = extract_features(network, dataset, 16, mean=mean, std=std, device="cpu")
        found = np.load(folder / "val_features.npy")
        np.testing.assert_allclose(found, expected[::10], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="--feature embedding .* use --feature backbone"):
        evaluate(tmp_path, *argv, "--feature", "embedding")
    with pytest.raises(ValueError, match="--checkpoint_key momentum .* student, teacher"):
        evaluate(tmp_path, *argv, "--checkpoint_key", "momentum")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit_tiny", "resnet10"])
def test_a_run_of_dino_needs_no_other_flag_than_where_it_is(tmp_path, arch):
    flags = {"arch": arch, "width": 0.125, "in_chans": 3, "stem": "imagenet"}
    flags |= {"patch_size": 4, "num_registers": 0, "depth": 3} if arch == "vit_tiny" else {}
    networks = []
    for seed in (7, 8):
        torch.manual_seed(seed)
        img_size = {"img_size": 16} if arch == "vit_tiny" else {}
        networks.append(build_backbone(**flags, **img_size))
    checkpoint.save_checkpoint(tmp_path / "run", {"epoch": 1, **dino_checkpoint(*networks)})
    more = {"global_crops_size": 16, "local_crops_size": 8, "mean": None, "std": [0.3, 0.3, 0.3]}
    more |= {"data_path": "digits", "seed": 8, "img_size": None, "interpolation": "bicubic"}
    (tmp_path / "run" / "args.json").write_text(json.dumps({**flags, **more}))
    argv = ["--pretrained", str(tmp_path / "run"), "--workers", "0", "--device", "cpu"]
    assert eval_knn.main([*argv, "--untrained", "--nb_knn", "20"]) == 0
    found = json.loads((tmp_path / "run" / "eval_knn.json").read_text())
    settings = found["settings"]
    assert (settings["arch"], settings["size"], settings["img_size"]) == (arch, 16, 16)
    assert settings["std"] == [0.3, 0.3, 0.3] and settings["interpolation"] == "bicubic"
    # the teacher was saved as the seed of the run makes it
    assert top1(found["results"]) == top1(found["results"], "untrained network")
    assert eval_knn.main([*argv, "--checkpoint_key", "student", "--nb_knn", "20"]) == 0
    student = json.loads((tmp_path / "run" / "eval_knn.json").read_text())["results"]
    assert top1(student) != top1(found["results"])


def test_an_untrained_vision_transformer_fits_the_images(tmp_path):
    argv = ["--arch", "vit_tiny", "--width", "0.125", "--depth", "2", "--patch_size", "4"]
    rows, settings = evaluate(tmp_path, *argv, "--num_registers", "2")
    assert top1(rows, "untrained network") > 10 and settings["num_registers"] == 2


# ============ classifiers of clusters ============


def released_classifier(path, arch, width=1 / 16, body="", **options):
    """A file as DeepCluster's, or with `body` as DeeperCluster's, and the network in it."""
    torch.manual_seed(0)
    model = build_convnet(arch, 5, width=width, **options).eval()
    state = {}
    for name, value in model.state_dict().items():
        top = name.startswith(("sobel.", "top_layer."))
        state[name if top else body + name.replace("features.", "features.module.")] = value
    torch.save({"epoch": 1, "arch": arch, "state_dict": state}, path)
    return model


SAID = ("arch", "width", "sobel", "sobel_padding")


@pytest.mark.parametrize("arch", ["alexnet", "vgg16"])
@pytest.mark.parametrize(
    ("options", "body"),
    [
        ({"sobel": True, "sobel_padding": 1}, ""),
        ({"sobel": True, "sobel_padding": 2}, "body."),
        ({"sobel": False, "sobel_padding": None}, ""),
    ],
)
def test_a_file_of_a_classifier_of_clusters_says_which_one_it_is(tmp_path, arch, options, body):
    path = tmp_path / "released.pth.tar"
    padding = {"sobel_padding": options["sobel_padding"] or 1}
    released_classifier(path, arch, body=body, **{**options, **padding})
    expected = {"arch": arch, "width": 1 / 16, **options}
    for argv in ([], ["--arch", arch]):
        args = parse("--pretrained", path, *argv)
        assert {name: getattr(args, name) for name in SAID} == expected
    assert parse("--pretrained", path, "--sobel", "false").sobel is False  # a flag wins
    args = parse("--pretrained", path, "--arch", "resnet18")
    assert (args.arch, args.width, args.sobel) == ("resnet18", 1.0, None)


def test_a_file_of_a_resnet_under_sobel_filters_says_that_it_has_them(tmp_path):
    path = tmp_path / "resnet.pth"
    released_classifier(path, "resnet10", sobel=True)
    for argv in ([], ["--arch", "resnet10"]):
        assert parse("--pretrained", path, *argv).sobel is True
    assert parse("--pretrained", path, "--arch", "vit_tiny").sobel is None


def test_files_of_torchvision_are_of_its_own_alexnet_and_vgg(tmp_path):
    models = pytest.importorskip("torchvision.models")
    for arch in ("alexnet", "vgg16", "vgg16_bn"):
        with torch.device("meta"):
            state = models.get_model(arch).state_dict()
        torch.save({n: torch.zeros(()).expand(x.shape) for n, x in state.items()}, tmp_path / "a")
        args = parse("--pretrained", tmp_path / "a", "--arch", arch)
        assert (args.arch, args.sobel, args.width) == (arch, None, 1.0)
        assert parse("--pretrained", tmp_path / "a").sobel is None


def test_files_of_the_published_sizes_are_known(tmp_path):
    for arch in ("alexnet", "vgg16"):
        with torch.device("meta"):
            state = build_convnet(arch, sobel=True).state_dict()
        state = {f"module.{n}": torch.zeros(()).expand(x.shape) for n, x in state.items()}
        torch.save({"state_dict": state}, tmp_path / "a")
        args = parse("--pretrained", tmp_path / "a")
        assert (args.arch, args.sobel, args.sobel_padding, args.width) == (arch, True, 1, 1.0)


@pytest.mark.parametrize("body", ["", "body."])
def test_features_of_a_released_classifier_are_its_own(tmp_path, images, body):
    path, folder = tmp_path / "released.pth.tar", tmp_path / "dump"
    padding = 2 if body else 1
    model = released_classifier(path, "alexnet", body=body, sobel=True, sobel_padding=padding)
    argv = ["--data_path", images, "--pretrained", path, "--size", 67]
    _, settings = evaluate(tmp_path, *argv, "--dump_features", folder)
    assert settings["sobel"] is True and settings["sobel_padding"] == padding
    dataset = open_dataset(str(images))
    expected, _ = extract_features(
        model.forward_backbone,
        dataset,
        67,
        mean=dataset.mean,
        std=usual_std(dataset.std),
        device="cpu",
    )
    found = np.load(folder / "val_features.npy")
    np.testing.assert_allclose(found, expected[::10], rtol=1e-3, atol=1e-5)
    assert found.min() < 0  # before the ReLU
    with pytest.raises(ValueError, match="--feature embedding .* classifiers of clusters"):
        evaluate(tmp_path, *argv, "--feature", "embedding")
    with pytest.raises(ValueError, match="images of 20 px are too small"):
        evaluate(tmp_path, *argv, "--size", 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "sobel"), [("resnet10", True), ("resnet10", False), ("vgg16", False)]
)
def test_a_run_of_a_classifier_of_clusters_needs_no_other_flag(tmp_path, arch, sobel):
    options = {"stem": "small", "width": 1 / 16, "in_chans": 3, "zero_init_residual": False}
    options |= {"sobel": sobel, "sobel_padding": 2}
    run = tmp_path / "run"
    for seed in (5, 3):  # first another network, then that of the run's seed, before its training
        torch.manual_seed(seed)
        model = build_convnet(arch, 7, **options)
        checkpoint.save_checkpoint(run, {"model": model.state_dict(), "epoch": 1})
        arguments = {"arch": arch, **options, "seed": 3, "data_path": "digits", "dropout": 0.1}
        size = 8 if arch == "resnet10" else 32
        arguments |= {"size_crops": [size], "num_clusters": 7}
        (run / "args.json").write_text(json.dumps(arguments))
        argv = ["--pretrained", str(run), "--workers", "0", "--device", "cpu", "--nb_knn", "20"]
        assert eval_knn.main([*argv, "--untrained"]) == 0
        found = json.loads((run / "eval_knn.json").read_text())
        settings = found["settings"]
        assert (settings["arch"], settings["size"]) == (arch, size)
        assert (settings["sobel"], settings["sobel_padding"]) == (sobel, 2)
        rows = found["results"]
        assert (top1(rows) == top1(rows, "untrained network")) == (seed == 3)


def test_untrained_networks_under_sobel_filters_and_flags_that_do_not_fit(tmp_path, images):
    small = ["--data_path", images, "--width", 1 / 16]
    network = ["--arch", "resnet10", "--stem", "small"]
    _, settings = evaluate(tmp_path, *small, *network, "--sobel")
    assert settings["sobel"] is True and settings["sobel_padding"] is None
    for argv, sentence in (
        ([*network, "--sobel_padding", 2], "--sobel_padding 2 needs --sobel true"),
        (["--arch", "vit_tiny", "--sobel"], "--sobel needs a ResNet"),
        ([*network, "--sobel", "--in_chans", 1], "--sobel true needs --in_chans 3, not 1"),
        ([*network, "--sobel", "--num_registers", 2], "--num_registers needs a ViT"),
        ([*network, "--sobel", "--depth", 2], "--depth needs a ViT"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluate(tmp_path, *small, *argv)


# ============ data ============


def test_images_that_nothing_splits_are_held_out_rather_than_found_again(tmp_path, images, capsys):
    folder = tmp_path / "dump"
    rows, _ = evaluate(
        tmp_path, "--data_path", images, *NETWORK, "--raw_pixels", "--dump_features", folder
    )
    assert "held out" in capsys.readouterr().out
    assert np.load(folder / "train_labels.npy").tolist() == [0] * 18 + [1] * 18
    assert np.load(folder / "val_labels.npy").tolist() == [0, 0, 1, 1]
    assert top1(rows, "raw pixels", k=1) == 100.0


def test_classes_of_two_folders_are_matched_by_name(tmp_path, images):
    (tmp_path / "val").mkdir()
    for name in (
        "red",
        "amber",
    ):  # red is class 1 here
        (tmp_path / "val" / name).mkdir()
        for i in range(3):
            source = images / "red" / f"{i:02}.png"
            (tmp_path / "val" / name / f"{i}.png").write_bytes(source.read_bytes())
    (images / "green").mkdir()  # and class 2 there
    (images / "green" / "00.png").write_bytes((images / "blue" / "00.png").read_bytes())
    paths = ["--train_path", images, "--val_path", tmp_path / "val"]
    rows, _ = evaluate(tmp_path, *paths, *NETWORK, "--raw_pixels")
    assert top1(rows, "raw pixels", k=1) == 50.0  # red is found, amber cannot be


def test_few_labels_report_k_up_to_their_number_for_each_kind_of_features(tmp_path):
    make_run(tmp_path / "run")
    rows, _ = evaluate(
        tmp_path, "--pretrained", tmp_path / "run", "--raw_pixels", *FEW_LABELS, "--nb_knn", 20, 100
    )
    few = [r for r in rows if r["labels"] == 5]
    assert [r["k"] for r in few] == [1, 5, 20] * 2 and all(r["std"] > 0 for r in few)
    assert 80 < top1(rows, "raw pixels", 5, 5) < 92 and top1(rows, "raw pixels") > 97


@pytest.mark.parametrize("split", [True, False])
def test_the_neighbour_sheet_shows_images_and_frames_them_by_label(tmp_path, images, split):
    data = "digits" if split else images
    evaluate(tmp_path, "--data_path", data, *NETWORK, "--neighbour_sheet")
    sheet = np.asarray(Image.open(tmp_path / "out" / "plots" / "neighbours.png").convert("RGB"))
    assert sheet.shape[0] > 60 * (12 if split else 4)  # a row for each query: 12, or all held out
    # red and blue noise: the query's own colour fills the tiles of neighbours framed in green
    green = (sheet == neighbours.RIGHT).all(2).sum()
    assert green > (sheet == neighbours.WRONG).all(2).sum()


@pytest.mark.slow
def test_faiss_gives_the_same_table(tmp_path):
    pytest.importorskip("faiss")
    expected, _ = evaluate(tmp_path, *NETWORK)
    assert evaluate(tmp_path, *NETWORK, "--knn_backend", "faiss")[0] == nearly(expected)


# ============ features on disk ============


def test_dumped_features_give_the_same_table_and_only_their_own(tmp_path):
    argv, folder = [*NETWORK, "--labels_per_class", 2, "--draws", 2], tmp_path / "dump"
    rows, settings = evaluate(tmp_path, *argv, "--dump_features", folder)
    load = ["--load_features", folder, "--labels_per_class", 2, "--draws", 2]
    assert evaluate(tmp_path, *load) == (rows, settings)
    with pytest.raises(ValueError, match="--load_features .* width 0.125, not 0.25"):
        evaluate(tmp_path, *load, "--width", "0.25")
    with pytest.raises(ValueError, match="--dump_features .* size 8, not 16"):
        evaluate(tmp_path, *NETWORK, "--dump_features", folder, "--size", 16)


# ============ command line ============

OFFICIAL = (
    "--batch_size_per_gpu 128 --nb_knn 10 20 --temperature 0.07 --pretrained_weights w.pth --use_cuda "
    "true --arch resnet50 --patch_size 16 --checkpoint_key teacher --dump_features d --load_features "
    "l --num_workers 10 --dist_url env:// --local_rank 0 --data_path /imagenet"
)


def test_the_published_command_line_is_taken_with_its_defaults():
    args = eval_knn.get_parser().parse_args(OFFICIAL.split())
    assert (args.batch_size, args.workers, args.pretrained) == (128, 10, "w.pth")
    defaults = eval_knn.get_parser().parse_args([])
    assert defaults.nb_knn == [10, 20, 100, 200] and defaults.temperature == 0.07
    assert (defaults.batch_size, defaults.workers, defaults.use_cuda) == (128, 10, True)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--pretrained", "nowhere.pth"], "nowhere.pth"),
        (["--data_path", "/nowhere"], "--data_path /nowhere"),
        (["--val_path", "/nowhere"], "--val_path /nowhere"),
        (["--arch", "vit_huge"], "--arch vit_huge"),
        (["--load_features", "/nowhere"], "--load_features /nowhere"),
        (["--load_features", "/nowhere", "--raw_pixels"], "leave out --raw_pixels"),
        (["--mean", "0.5"], "--mean has 1"),
        (["--dump_features", "/proc/nowhere"], "--dump_features /proc/nowhere"),
        (["--data_path", "UNLABELLED"], "no labels"),
        (["--knn_backend", "annoy"], "--knn_backend"),
        (["--temperature", "0"], "--temperature"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_status_2(tmp_path, argv, sentence, images, capfd):
    if argv[-1] == "UNLABELLED":
        argv = ["--data_path", str(images / "red")]
    argv = [*QUICK, "--dump_path", str(tmp_path / "out"), *argv]
    with pytest.raises(SystemExit) as exit:
        flags.run(lambda: eval_knn.main(argv))
    assert exit.value.code == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and sentence in said[0]


def script(tmp_path, name, launcher, *argv):
    """Rows from a run of the script by itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [*QUICK, *map(str, argv), "--dump_path", str(tmp_path / name)]
    command = [sys.executable, *launcher, "eval_knn.py", *argv]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / name / "eval_knn.json").read_text())["results"], done.stdout


@pytest.mark.slow
def test_two_processes_under_torchrun_give_the_table_of_one(tmp_path):
    make_run(tmp_path / "run")
    argv = ["--pretrained", tmp_path / "run", *FEW_LABELS, "--raw_pixels"]
    one, _ = script(tmp_path, "one", [], *argv, "--dump_features", tmp_path / "dump")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    two, said = script(tmp_path, "two", torchrun, *argv)
    assert two == nearly(one)
    assert said.count("top-1") == 1 and said.count("written to") == 1  # one process speaks
    # what one process dumped, two load
    loaded, _ = script(
        tmp_path, "three", torchrun, "--load_features", tmp_path / "dump", *FEW_LABELS, "--seed", 3
    )
    assert loaded == nearly([row for row in one if row["features"] == "backbone"])


@pytest.mark.slow
def test_help_needs_nothing_and_shows_the_defaults():
    done = subprocess.run(
        [sys.executable, "eval_knn.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and "(default: [10, 20, 100, 200])" in said
    assert "(default: resnet50)" in said and "(default: digits)" in said
