"""eval_copy_detection.py: Copydays' blocks, scores by definition, whitening, whole runs, resumed, misused."""

import json
import os
import shlex
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score

import eval_copy_detection
from src.evaluate import whole_images
from src.evaluate.copydays import open_copydays
from src.evaluate.ranking import Relevance
from tests.gloo import start_mains
from tests.runs import signal_handlers  # noqa: F401, used by name

QUICK = shlex.split("--workers 0 --device cpu --imsize 16 --batch_size 4")
VIT = shlex.split("--arch vit_micro --patch_size 4 --img_size 16")
RESNET = shlex.split("--arch resnet10 --stem small --width 0.125")


@pytest.fixture(autouse=True)
def handlers(signal_handlers):  # noqa: F811
    """Those of before, after every test."""


def picture(draws):
    """A photograph of 4 x 5 coloured squares, (32, 40, 3)."""
    return np.kron(draws.integers(0, 256, (4, 5, 3)), np.ones((8, 8, 1))).astype(np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def write_photos(folder, count, seed):
    draws = np.random.default_rng(seed)
    for number in range(count):
        save(folder / f"{number}.jpg", picture(draws))
    return folder


def write_copydays(folder):
    """6 originals; of each 1 or 2 strong copies: darker, and with noise; and crops of 10 %."""
    draws = np.random.default_rng(0)
    for block in range(6):
        pixels = picture(draws)
        save(folder / "original" / f"{200000 + 100 * block}.jpg", pixels)
        for copy in range(1 + block % 2):
            noise = draws.normal(0, 12, pixels.shape)
            copied = (pixels * (0.7 - 0.2 * copy) + noise).clip(0, 255).astype(np.uint8)
            save(folder / "strong" / f"{200001 + 100 * block + 56 * copy}.jpg", copied)
        save(folder / "crops" / "10" / f"{200000 + 100 * block}.jpg", pixels[1:-1, 1:-1])
    return folder


@pytest.fixture(scope="module")
def copydays(tmp_path_factory):
    return write_copydays(tmp_path_factory.mktemp("copydays"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Images for the whitening, and distractors."""
    folder = tmp_path_factory.mktemp("others")
    return write_photos(folder / "whitening", 30, 1), write_photos(folder / "distractors", 9, 2)


def call(folder, *argv):
    """The status of main() in this process."""
    return eval_copy_detection.main([*QUICK, "--dump_path", str(folder), *map(str, argv)])


def run(folder, *argv):
    """The results of a call that ends well."""
    assert call(folder, *argv) == 0
    return json.loads((folder / "eval_copy_detection.json").read_text())


def rows_of(folder, name):
    (path,) = (folder / "copies").glob(f"{name}_*.npy")
    return np.load(path)


# ============ Copydays ============
def test_a_copy_is_of_the_original_with_the_same_hundreds(copydays):
    originals, copies = open_copydays(str(copydays))
    assert list(copies) == ["strong", "crops/10"] and len(originals) == 6
    strong = copies["strong"]
    assert [x.positives.tolist() for x in strong.relevance] == [
        *([0], [1], [1], [2], [3], [3], [4], [5], [5])
    ]
    assert strong.images.file_name(2).endswith("strong/200157.jpg")
    assert [x.positives.tolist() for x in copies["crops/10"].relevance] == [[i] for i in range(6)]


def test_other_folders_and_names_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no original/ with strong/"):
        open_copydays(str(tmp_path))
    folder = write_copydays(tmp_path / "copydays")
    pixels = np.zeros((8, 8, 3), np.uint8)
    for name, words in (
        ("strong/209901.jpg", "strong/209901.jpg is a copy of none of original/.*209900.jpg"),
        ("strong/cat.jpg", "strong/cat.jpg should have a number"),
        ("original/200001.jpg", "200000.jpg and 200001.jpg, which are both of the block 2000"),
    ):
        save(folder / name, pixels)
        with pytest.raises(ValueError, match=words):
            open_copydays(str(folder))
        (folder / name).unlink()


# ============ scores ============
def test_scores_are_those_of_cosines_of_whitened_features(tmp_path, copydays, others):
    whitening, distractors = others
    flags = ["--whitening_path", whitening, "--distractors_path", distractors]
    found = run(tmp_path, *VIT, "--data_path", copydays, *flags)["results"]["strong"]
    names = ("whitening", "original", "distractors", "strong")
    learnt_on, original, distracting, strong = (
        rows_of(tmp_path, name).astype(np.float64) for name in names
    )
    assert strong.shape == (9, 192)  # the class token and GeM
    values, directions = np.linalg.eigh(learnt_on.T @ learnt_on / len(learnt_on))
    directions = directions / np.sqrt(np.maximum(values, 1e-5 * values.max()))
    database, queries = (
        (rows - learnt_on.mean(0)) @ directions
        for rows in (np.concatenate([original, distracting]), strong)
    )
    database /= np.linalg.norm(database, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    cosines = queries @ database.T
    right = np.zeros_like(cosines)
    right[range(9), [0, 1, 1, 2, 3, 3, 4, 5, 5]] = 1
    ranks = [int((row > row[hit == 1]).sum()) for row, hit in zip(cosines, right, strict=True)]
    aps = [1 if rank == 0 else 1 / (rank + 1) / 2 for rank in ranks]
    assert found["map"] == pytest.approx(100 * np.mean(aps))
    micro = average_precision_score(right.ravel(), cosines.ravel())
    assert found["micro_ap"] == pytest.approx(100 * micro, abs=1e-3)
    assert found["queries"] == 9


def test_only_the_first_twenty_images_count_in_the_published_mean():
    order = np.array([np.arange(40), np.arange(40)])
    relevance = [Relevance(np.array([19])), Relevance(np.array([20]))]
    mean = eval_copy_detection.mean_of_first(order, relevance)
    assert mean == pytest.approx((1 / 20 / 2 + 0) / 2)


def test_a_network_without_a_class_token_has_the_generalised_mean(tmp_path, copydays):
    found = run(tmp_path, *RESNET, "--data_path", copydays)
    assert found["settings"]["feature"] == "gem"
    assert rows_of(tmp_path, "strong").shape == (9, 64)
    assert found["results"]["crops/10"]["queries"] == 6


def test_copies_of_an_untrained_network_are_found_and_distractors_cost_something(
    tmp_path, copydays, others
):
    flags = [*VIT, "--data_path", copydays]
    alone = run(tmp_path / "alone", *flags)["results"]
    assert alone["crops/10"]["map"] > 95
    # Distractors that are the copies themselves come before the originals.
    among = run(tmp_path / "among", *flags, "--distractors_path", copydays / "strong")["results"]
    assert among["strong"]["map"] < 60 and among["strong"]["micro_ap"] < 50


def test_features_do_not_depend_on_the_batch_that_a_work_begins_with(tmp_path, copydays):
    run(tmp_path, *VIT, "--data_path", copydays)
    dataset = open_copydays(str(copydays))[1]["strong"].images
    network = eval_copy_detection.eval_flags.open_network(
        eval_copy_detection.parse_args([*QUICK, *VIT])
    )
    mean, std = network.normalisation(dataset)
    image = whole_images.to_square(dataset.load(3), 3, 16) / 255
    image = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        tokens = network.model.get_intermediate_layers(image[None])[0].double()
    gem = tokens[:, 1:].clamp(min=1e-6).pow(4).mean(1).pow(1 / 4)
    expected = torch.cat([tokens[:, 0], gem], 1)[0]
    np.testing.assert_allclose(rows_of(tmp_path, "strong")[3], expected, atol=1e-4)


def test_images_that_cannot_be_read_are_left_out_or_must_be_mended(tmp_path, others):
    folder = write_copydays(tmp_path / "copydays")
    distractors = write_photos(tmp_path / "distractors", 4, 3)
    flags = [*VIT, "--data_path", folder, "--distractors_path", distractors]
    flags += ["--whitening_path", distractors]
    (distractors / "1.jpg").write_bytes(b"no image")
    found = run(tmp_path / "out", *flags)["results"]["strong"]
    assert np.isfinite([found["map"], found["micro_ap"]]).all()
    (folder / "strong" / "200157.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="strong/200157.jpg cannot be read"):
        call(tmp_path / "other", *flags)


# ============ going on ============
@pytest.mark.slow
def test_stopped_and_started_again_the_features_are_the_same_to_the_last_bit(
    tmp_path, copydays, others, monkeypatch
):
    monkeypatch.setattr(whole_images, "CHUNK", 4)
    flags = [*VIT, "--data_path", copydays, "--whitening_path", others[0]]
    whole = run(tmp_path / "whole", *flags)
    read, count = whole_images._Resized.__getitem__, [0]

    def read_until(dataset, index):
        count[0] += 1
        if count[0] % 11 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(dataset, index)

    monkeypatch.setattr(whole_images._Resized, "__getitem__", read_until)
    stops = 0
    while call(tmp_path / "out", *flags) == 128 + signal.SIGTERM:
        stops += 1
        assert stops < 12
    assert stops > 2
    for name in ("original", "strong", "whitening"):
        one, other = (rows_of(tmp_path / x, name) for x in ("whole", "out"))
        np.testing.assert_array_equal(one, other)
    found = json.loads((tmp_path / "out" / "eval_copy_detection.json").read_text())
    assert found["results"] == whole["results"]


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path, copydays, others):
    whitening, distractors = map(str, others)
    flags = [*VIT, "--data_path", str(copydays)]
    flags += ["--whitening_path", whitening, "--distractors_path", distractors]
    whole = run(tmp_path / "one", *flags)
    mains = start_mains("eval_copy_detection", tmp_path / "two", [*QUICK, *flags], 2)
    assert [main.wait() for main in mains] == [0, 0], mains[0].read()
    for name in ("original", "strong", "whitening"):
        one, other = (rows_of(tmp_path / x, name) for x in ("one", "two"))
        np.testing.assert_array_equal(one, other)
    found = json.loads((tmp_path / "two" / "eval_copy_detection.json").read_text())
    assert found["results"] == whole["results"]


# ============ misuse ============
@pytest.mark.parametrize(
    "argv, sentence",
    [
        ([], "--data_path must be given"),
        (["--data_path", "gone"], "--data_path gone has no original/"),
        (["--whitening_path", "gone"], "--whitening_path gone does not exist"),
        (["--distractors_path", "gone"], "--distractors_path gone does not exist"),
        (["--feature", "cls_gem"], "--feature cls_gem is the class token.*use --feature gem"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, copydays, argv, sentence):
    given = ["--data_path", copydays] if argv and "--data_path" not in argv else []
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        call(tmp_path / "out", *RESNET, *given, *argv)
    assert not (tmp_path / "out").exists()


def test_rows_of_length_one_are_what_is_compared():
    database = torch.tensor([[10.0, 0.0], [0.0, 1.0]])
    queries = {"strong": torch.tensor([[0.1, 5.0]])}

    class Kind:
        relevance = [Relevance(np.array([1]))]

    found = eval_copy_detection.evaluate(database, queries, {"strong": Kind}, None)["strong"]
    assert found["map"] == 100 and F.normalize(database, dim=1)[0, 0] == 1
