"""eval_image_retrieval.py: both protocols by definition, stages, whole runs, resumed, misused."""

import json
import os
import shlex
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_image_retrieval
from src.evaluate import rmac, whole_images
from src.evaluate.ranking import rank, retrieval_scores
from src.evaluate.retrieval_sets import open_buildings, open_revisited
from src.evaluate.whole_images import fit_inside, longer_side
from src.nets.pooling import forward_of_map
from src.nets.pretrained import IMAGENET_RED, open_pretrained
from tests.building_images import write_buildings, write_images, write_revisited
from tests.gloo import start_mains
from tests.runs import signal_handlers  # noqa: F401, used by name

QUICK = shlex.split("--workers 0 --device cpu")
VIT = shlex.split("--arch vit_micro --patch_size 4 --img_size 16 --imsize 20")
RESNET = shlex.split("--arch resnet10 --stem small --width 0.125 --imsize 20")
VGG = shlex.split("--arch vgg16 --sobel true --width 0.0625 --S 64 --L 2 --n_pca 6")
SEED = 31


@pytest.fixture(autouse=True)
def handlers(signal_handlers):  # noqa: F811
    """Those of before, after every test."""


@pytest.fixture(scope="module")
def revisited(tmp_path_factory):
    return write_revisited(tmp_path_factory.mktemp("revisited"))


@pytest.fixture(scope="module")
def oxford(tmp_path_factory):
    return write_buildings(tmp_path_factory.mktemp("first") / "oxford")


@pytest.fixture(scope="module")
def paris(tmp_path_factory):
    return write_buildings(tmp_path_factory.mktemp("first") / "paris", prefix="", seed=7)


def call(folder, *argv):
    """The status of main() in this process."""
    words = [*QUICK, "--dump_path", str(folder), *map(str, argv)]
    return eval_image_retrieval.main(words)


def run(folder, *argv):
    """The results of a call that ends well."""
    assert call(folder, *argv) == 0
    return json.loads(next(folder.glob("eval_image_retrieval_*.json")).read_text())


def rows_of(folder, name):
    (path,) = folder.glob(f"{name}_*.npy")
    return np.load(path)


def normalised(image, red):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([red, 0.224, 0.225])
    return ((image / 255 - mean[:, None, None]) / std[:, None, None])[None]


# ============ dino ============
@pytest.mark.parametrize("several_scales", [False, True])
def test_results_are_those_of_cosines_of_whole_images(tmp_path, revisited, several_scales):
    flags = ["--data_path", revisited, "--multiscale", several_scales]
    found = run(tmp_path, *VIT, *flags)["results"]
    network = open_pretrained("", "vit_micro", patch_size=4, img_size=16, seed=SEED)
    targets = open_revisited(str(revisited), "roxford5k")
    features = []
    for paths in (targets.images, targets.queries):
        dataset = targets.open_images(paths, "images", 3)
        vectors = []
        for i in range(len(dataset)):
            image = normalised(fit_inside(dataset.load(i), i, 20), IMAGENET_RED)
            scales = [1, 1 / 2**0.5, 1 / 2] if several_scales else [1]
            with torch.no_grad():
                total = sum(
                    network.model(F.interpolate(image, scale_factor=s, mode="bilinear"))
                    for s in scales
                )
            vectors.append(F.normalize(total, dim=1))
        features.append(torch.cat(vectors))
    order = rank(features[1] @ features[0].T)
    for name in ("Medium", "Hard"):
        expected = retrieval_scores(order, targets.relevance[name])
        assert found[name]["map"] == pytest.approx(100 * expected["map"])
        np.testing.assert_allclose(found[name]["aps"], 100 * expected["aps"])
        precisions = [found[name][f"mp@{k}"] for k in (1, 5, 10)]
        np.testing.assert_allclose(precisions, 100 * expected["precision"])
    stored = F.normalize(torch.from_numpy(rows_of(tmp_path / "retrieval", "database")), dim=1)
    torch.testing.assert_close(stored, features[0], atol=1e-5, rtol=0)


def test_a_network_that_sees_colours_finds_the_buildings(tmp_path, revisited):
    """Those of an untrained transformer do, as each building has a colour of its own."""
    results = run(tmp_path, *VIT, "--data_path", revisited)["results"]
    assert results["Medium"]["map"] > 90 and results["Hard"]["map"] > 90


def test_expansions_take_over_the_features_and_change_the_ranking(tmp_path, revisited, monkeypatch):
    flags = [*RESNET, "--data_path", revisited]
    plain = run(tmp_path, *flags)["results"]
    monkeypatch.setattr(whole_images, "log_progress", None)  # nothing is computed
    expanded = run(tmp_path, *flags, "--aqe", 2, "--dbe", 1)
    assert expanded["settings"]["aqe"] == 2
    assert expanded["results"]["Medium"]["aps"] != plain["Medium"]["aps"]


def test_features_of_other_settings_lie_beside_each_other(tmp_path, revisited):
    flags = [*VIT, "--data_path", revisited]
    run(tmp_path, *flags)
    run(tmp_path, *flags, "--feature", "gem")
    assert len(list((tmp_path / "retrieval").glob("database_*.npy"))) == 2


def test_an_image_of_the_database_that_cannot_be_read_comes_last_and_a_query_must_be_mended(
    tmp_path, capsys
):
    data = write_revisited(tmp_path / "data")
    images = data / "roxford5k" / "jpg"
    (images / "place_000000.jpg").write_bytes(b"no image")
    found = run(tmp_path / "out", *VIT, "--data_path", data)["results"]
    assert "1 images cannot be read: they come last" in capsys.readouterr().out
    # Of three positives two come first, and the third behind all eleven that are no junk but it.
    assert found["Medium"]["aps"][0] == pytest.approx(100 * (1 + 1 + (2 / 10 + 3 / 11) / 2) / 3)
    (images / "query_1.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="query .*query_1.jpg cannot be read"):
        run(tmp_path / "other", *VIT, "--data_path", data)


# ============ deepcluster ============
def test_descriptors_are_r_mac_whitened_on_the_other_set(tmp_path, oxford, paris):
    flags = [*VGG, "--dataset", oxford, "--whitening_path", paris / "jpg"]
    found = run(tmp_path, *flags)["results"]["all"]
    network = open_pretrained("", "vgg16", sobel=True, width=0.0625, seed=SEED)
    last_map = forward_of_map(network)
    targets, other = open_buildings(str(oxford), "Oxford"), open_buildings(str(paris), "Paris")

    @torch.no_grad()
    def maps(targets, paths, boxes=None):
        dataset = targets.open_images(paths, "images", 3)
        for i in range(len(dataset)):
            image = longer_side(dataset.load(i), i, 64, boxes)
            yield last_map(normalised(image, IMAGENET_RED))

    maxima = torch.cat([rmac.padded_maxima(x, 2) for x in maps(other, other.images)])
    whitening = rmac.learn_whitening(maxima, 6, torch.device("cpu"))
    database, queries = (
        torch.cat([rmac.descriptors(x, 2, whitening) for x in found_maps])
        for found_maps in (
            maps(targets, targets.images),
            maps(targets, targets.queries, targets.boxes),
        )
    )
    for name, expected in (("database", database), ("queries", queries)):
        stored = rows_of(tmp_path / "retrieval", name)
        np.testing.assert_allclose(stored, expected, atol=1e-4)
    stored = {
        name: torch.from_numpy(rows_of(tmp_path / "retrieval", name))
        for name in ("database", "queries")
    }
    order = rank(stored["queries"] @ stored["database"].T)
    expected = retrieval_scores(order, targets.relevance["all"])
    assert found["map"] == pytest.approx(100 * expected["map"])
    assert not list((tmp_path / "retrieval").glob("regions_*"))


@pytest.mark.slow
def test_stages_one_by_one_with_a_folder_in_common_are_one_command(tmp_path, oxford, paris):
    whole = run(tmp_path / "whole", *VGG, "--dataset", oxford, "--whitening_path", paris / "jpg")
    shared = [*VGG, "--temp_dir", tmp_path / "shared"]
    of_oxford = ["--dataset", oxford, "--dataset_name", "Oxford"]
    with pytest.raises(FileNotFoundError, match="no PCA of Paris .*--stage train_pca"):
        call(tmp_path / "out", *shared, *of_oxford)
    of_paris = ["--dataset", paris, "--dataset_name", "Paris"]
    for stage in ("extract_train", "train_pca"):
        assert call(tmp_path / "out", *shared, *of_paris, "--stage", stage) == 0
        learnt = len(list((tmp_path / "shared").glob("pca_*.pth")))
        assert learnt == (stage == "train_pca")
    for stage in ("db_features", "q_features"):
        assert call(tmp_path / "out", *shared, *of_oxford, "--stage", stage) == 0
        described = len(list((tmp_path / "shared").glob("queries_*.npy")))
        assert described == (stage == "q_features")
    assert not list((tmp_path / "out").glob("*.json"))
    assert run(tmp_path / "out", *shared, *of_oxford)["results"] == whole["results"]


@pytest.mark.slow
def test_several_resolutions_are_added_up(tmp_path, oxford, paris, monkeypatch):
    monkeypatch.setattr(eval_image_retrieval, "RESOLUTIONS", (48, 64))
    flags = [*VGG, "--dataset", oxford, "--whitening_path", paris / "jpg"]
    run(tmp_path, *flags, "--multires")
    files = sorted((tmp_path / "retrieval").glob("database_*.npy"))
    assert len(files) == 2
    run(tmp_path / "plain", *flags)  # of 64 px
    (plain,) = (tmp_path / "plain" / "retrieval").glob("database_*.npy")
    assert any(np.array_equal(np.load(file), np.load(plain)) for file in files)


COMPUTE_AP = """#!{python}
import sys
start, file = sys.argv[1:]
read = lambda kind: set(open(f"{{start}}_{{kind}}.txt").read().split())
positive, junk = read("good") | read("ok"), read("junk")
recall, precision, area, seen, found = 0.0, 1.0, 0.0, 0, 0
for name in open(file).read().split():
    if name not in junk:
        seen, found = seen + 1, found + (name in positive)
        area += (found / len(positive) - recall) * (precision + found / seen) / 2
        recall, precision = found / len(positive), found / seen
print(area)
"""


def test_the_program_of_the_authors_of_the_first_sets_says_the_same(tmp_path, oxford):
    program = tmp_path / "compute_ap"
    program.write_text(COMPUTE_AP.format(python=sys.executable))
    program.chmod(0o755)
    flags = [*VIT, "--protocol", "dino", "--dataset", oxford]
    found = run(tmp_path, *flags, "--eval_binary", program)["results"]["all"]
    assert found["map_eval_binary"] == pytest.approx(found["map"])
    program.write_text("#!/bin/sh\necho no such query >&2\n")
    with pytest.raises(ValueError, match="says no average precision.*no such query"):
        run(tmp_path, *flags, "--eval_binary", program)


# ============ going on ============
@pytest.mark.slow
def test_stopped_and_started_again_the_features_are_the_same_to_the_last_bit(
    tmp_path, oxford, paris, monkeypatch
):
    monkeypatch.setattr(whole_images, "CHUNK", 2)
    flags = [*VGG, "--dataset", oxford, "--whitening_path", paris / "jpg"]
    whole = run(tmp_path / "whole", *flags)
    read, count = whole_images._Resized.__getitem__, [0]

    def read_until(dataset, index):
        count[0] += 1
        if count[0] % 7 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(dataset, index)

    monkeypatch.setattr(whole_images._Resized, "__getitem__", read_until)
    stops = 0
    while call(tmp_path / "out", *flags) == 128 + signal.SIGTERM:
        stops += 1
        assert stops < 12
    assert stops > 2
    for name in ("database", "queries"):
        one, other = (rows_of(tmp_path / x / "retrieval", name) for x in ("whole", "out"))
        np.testing.assert_array_equal(one, other)
    results = json.loads((tmp_path / "out" / "eval_image_retrieval_Oxford.json").read_text())
    assert results["results"] == whole["results"]


@pytest.mark.slow
def test_two_processes_write_the_bits_of_one(tmp_path, oxford, paris):
    flags = [*VGG, "--dataset", str(oxford), "--whitening_path", str(paris / "jpg")]
    whole = run(tmp_path / "one", *flags)
    mains = start_mains("eval_image_retrieval", tmp_path / "two", [*QUICK, *flags], 2)
    assert [main.wait() for main in mains] == [0, 0], mains[0].read()
    for name in ("database", "queries"):
        one, other = (rows_of(tmp_path / x / "retrieval", name) for x in ("one", "two"))
        np.testing.assert_array_equal(one, other)
    results = json.loads((tmp_path / "two" / "eval_image_retrieval_Oxford.json").read_text())
    assert results["results"] == whole["results"]


# ============ misuse ============
@pytest.mark.parametrize(
    "argv, sentence",
    [
        (VIT, "--data_path must be given: .*roxford5k/"),
        ([*VIT, "--data_path", ".", "--L", "2"], "--L is not of --protocol dino"),
        ([*VGG, "--dataset", ".", "--imsize", "20"], "--imsize is not of --protocol deepcluster"),
        ([*VIT, "--data_path", ".", "--eval_binary", "x"], "--eval_binary is for the first"),
        ([*VIT, "--data_path", ".", "--stage", "train_pca"], "--stage train_pca is for"),
        ([*VGG, "--dataset", ".", "--S", "-2"], "--S -2 must be a number of pixels, or -1"),
        ([*VGG, "--dataset", ".", "--eval_binary", "gone"], "--eval_binary gone does not exist"),
        ([*VGG, "--dataset", "gone"], "--dataset gone has no text files of queries"),
        ([*VIT, "--data_path", ".", "--mean", "1"], "--mean has 1 values"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, argv, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        call(tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


SQUEEZENET = ["--arch", "squeezenet1_1"]


@pytest.mark.parametrize(
    "network, words, sentence",
    [
        (SQUEEZENET, "--imsize 12", "^--imsize 12 is too small for --arch squeezenet1_1$"),
        (
            SQUEEZENET,
            "--imsize 24 --multiscale true",
            "^--imsize 24 is too small for --multiscale true, .* 12 px of it .--imsize 12 is too small",
        ),
        (
            [],
            "--arch vit_micro --imsize 24 --multiscale true",
            "--imsize 24 .* 12 px .*--patch_size",
        ),
        (
            SQUEEZENET,
            "--protocol deepcluster --S 12",
            "^--S 12 is too small for --arch squeezenet1_1$",
        ),
    ],
)
def test_images_that_are_too_small_for_the_network_are_found_out_before_any_is_read(
    tmp_path, revisited, oxford, monkeypatch, network, words, sentence
):
    monkeypatch.setattr(eval_image_retrieval.dist, "init", lambda *_: pytest.fail("has started"))
    where = ["--data_path", revisited]
    if "deepcluster" in words:
        where = ["--dataset", oxford]
    with pytest.raises(ValueError, match=sentence):
        call(tmp_path / "out", *network, *words.split(), *where)
    assert not (tmp_path / "out").exists()


def test_images_of_the_database_lie_beside_the_ground_truth(tmp_path, revisited):
    write_images(tmp_path / "roxford5k" / "jpg", ["place_000000"])
    truth = revisited / "roxford5k" / "gnd_roxford5k.pkl"
    (tmp_path / "roxford5k" / truth.name).write_bytes(truth.read_bytes())
    missing = "^--data_path: there is no .*place_000001.jpg, which roxford5k names"
    with pytest.raises(FileNotFoundError, match=missing):
        call(tmp_path / "out", *VIT, "--data_path", tmp_path)


def test_what_is_wrong_with_a_first_set_names_the_flag_that_it_is_given_by(oxford):
    targets = open_buildings(str(oxford), "Oxford")
    with pytest.raises(FileNotFoundError, match="^--dataset: there is no .*gone.jpg"):
        targets.open_images(["gone.jpg"], "database", 3)
