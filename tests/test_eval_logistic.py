"""eval_linear.py --solver lbfgs: scikit-learn's results, labelled subsets, processes, resumed, misused."""

import json
import shlex
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

import eval_knn
import eval_linear
from src import dist
from src.data.datasets import open_dataset
from src.evaluate import linear_flags, logistic, logistic_search, stored_features
from src.labels import row_file
from src.run import flags
from tests.gloo import run_ranks
from tests.runs import signal_handlers  # noqa: F401, used by name
from tests.voc_images import write_voc

NETWORK = shlex.split(
    "--arch resnet10 --stem small --width 0.125 --size 8 --workers 0 --device cpu"
)
QUICK = [*NETWORK, *shlex.split("--solver lbfgs --penalties 1 0.1 0.01")]


@pytest.fixture(autouse=True)
def handlers(signal_handlers):  # noqa: F811
    """Those of before, after every test."""


def evaluate(folder, *argv):
    """The rows of results of main() in this process."""
    assert eval_linear.main([*QUICK, "--dump_path", str(folder), *map(str, argv)]) == 0
    return json.loads((folder / "eval_logistic.json").read_text())["results"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the results of 10 % and all labels of the digits."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(folder, "--label_fractions", 0.1, 1)
    return folder


@pytest.mark.slow
def test_features_are_those_of_k_nn_and_results_those_of_scikit_learn(whole, tmp_path):
    words = [*NETWORK, "--dump_features", str(tmp_path / "dump"), "--dump_path", str(tmp_path)]
    assert eval_knn.main(words) == 0
    found = {name: np.load(tmp_path / "dump" / f"{name}.npy") for name in DUMPED}
    for split in ("train", "val"):
        stored = np.load(whole / "logistic" / f"{split}.npy")
        np.testing.assert_array_equal(stored, found[f"{split}_features"])
    train, val = (
        F.normalize(torch.tensor(found[f"{split}_features"]), dim=1).double().numpy()
        for split in ("train", "val")
    )
    tenth, row = json.loads((whole / "eval_logistic.json").read_text())["results"]
    assert (tenth["images"], row["images"]) == (130, 1297) and tenth["labels"] == "10 %"
    theirs = LogisticRegression(C=1 / row["penalty"], fit_intercept=False, tol=1e-6, max_iter=10**4)
    theirs.fit(train, found["train_labels"])
    assert row["top1"] == pytest.approx(100 * theirs.score(val, found["val_labels"]), abs=0.2)
    logarithms = theirs.predict_log_proba(val)
    loss = -logarithms[np.arange(len(val)), found["val_labels"]].mean()
    assert row["loss"] == pytest.approx(loss, rel=1e-3)


DUMPED = ("train_features", "train_labels", "val_features", "val_labels")


def test_the_penalty_is_the_best_of_a_held_out_fifth(whole):
    for row in json.loads((whole / "eval_logistic.json").read_text())["results"]:
        fits = row["held_out"]
        assert [fit["penalty"] for fit in fits] == [1.0, 0.1, 0.01]
        best = max(fits, key=lambda fit: (fit["top1"], -fit["loss"]))
        assert row["penalty"] == best["penalty"]


@pytest.mark.slow
def test_one_penalty_is_not_searched_and_an_intercept_may_be_added(whole, tmp_path):
    labels = open_dataset("digits", "train").labels
    features = np.load(whole / "logistic" / "train.npy")
    rows = F.normalize(torch.tensor(features), dim=1).double().numpy()
    (row,) = evaluate(tmp_path, "--penalties", 0.1, "--intercept")
    assert row["penalty"] == 0.1 and row["held_out"] == []
    theirs = LogisticRegression(C=10, tol=1e-6, max_iter=10**4).fit(rows, labels)
    saved = torch.load(next((tmp_path / "logistic").glob("fits_*.pth")), weights_only=True)
    scores = logistic.scores_of(torch.tensor(rows), saved["weights"], intercept=True)
    assert (scores.argmax(1).numpy() == theirs.predict(rows)).mean() > 0.999


@pytest.mark.slow
def test_other_penalties_and_other_labels_are_fitted_anew_from_the_same_features(
    whole, tmp_path, monkeypatch
):
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(stored_features, "extract_features", None)  # would be called
    (row,) = evaluate(tmp_path / "out", "--penalties", 0.1)
    assert row["penalty"] == 0.1
    again, opened = json.loads((whole / "eval_logistic.json").read_text())["results"][1], []
    original = eval_linear.open_splits

    def with_other_labels(*arguments, **options):
        parts = original(*arguments, **options)
        opened.extend(parts)
        for part in parts:
            part.labels = 9 - part.labels
        return parts

    monkeypatch.setattr(eval_linear, "open_splits", with_other_labels)
    (other,) = evaluate(tmp_path / "out")
    assert opened and abs(other["top1"] - again["top1"]) < 2  # 0 % by the fits that are there


@pytest.mark.slow
def test_subsets_use_the_features_of_all_or_have_a_file_of_their_own(whole, tmp_path, monkeypatch):
    (alone,) = evaluate(tmp_path, "--label_fractions", 0.1)
    (file,) = (tmp_path / "logistic").glob("train_*.npy")
    assert np.load(file).shape[0] == 130
    first = json.loads((whole / "eval_logistic.json").read_text())["results"][0]
    assert alone["top1"] == first["top1"] and alone["penalty"] == first["penalty"]

    def refuse(*arguments, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr(stored_features, "extract_features", refuse)
    shutil.copytree(whole / "logistic", tmp_path / "again" / "logistic")
    assert evaluate(tmp_path / "again", "--label_fractions", 0.05)[0]["images"] == 60


@pytest.mark.slow
def test_a_published_list_names_the_labelled_images(tmp_path):
    lines = [f"image {i}" for i in range(0, 1297, 4)]
    (tmp_path / "quarter.txt").write_text("\n".join(lines))
    (row,) = evaluate(tmp_path / "out", "--label_lists", tmp_path / "quarter.txt")
    assert row["labels"] == "quarter.txt" and row["images"] == len(lines)
    assert row["top1"] > 50


def test_lists_of_one_name_in_two_folders_are_two_sets(tmp_path):
    train, lists = open_dataset("digits", "train"), []
    for folder, names in (("one", "image 1\n"), ("ten", "image 2\nimage 3\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "labelled.txt").write_text(names)
        lists.append(str(tmp_path / folder / "labelled.txt"))
    (tmp_path / "other.txt").write_text("image 4\n")
    lists.append(str(tmp_path / "other.txt"))
    args = eval_linear.parse_args([*QUICK, "--label_lists", *lists])
    sets = linear_flags.labelled_sets(args, train)
    assert {name: len(images) for name, images in sets.items()} == {
        lists[0]: 1,
        lists[1]: 2,
        "other.txt": 1,
    }


@pytest.mark.slow
def test_a_search_stopped_anywhere_goes_on_to_the_last_bit(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(logistic, "STEPS", 4)
    monkeypatch.setattr(row_file, "CHUNK", 256)
    expected = evaluate(tmp_path / "whole", "--label_fractions", 0.05, 0.1)
    calls, agreed = [], eval_linear.StopSignal.agreed

    def sometimes(stop):
        calls.append(1)
        if len(calls) in (1, 5, 17, 30):
            stop.name = "SIGTERM"
        return agreed(stop)

    monkeypatch.setattr(eval_linear.StopSignal, "agreed", sometimes)
    words = [*QUICK, "--dump_path", str(tmp_path / "stopped"), "--label_fractions", "0.05", "0.1"]
    statuses = [128 + signal.SIGTERM]
    while statuses[-1] != 0 and len(statuses) < 8:
        statuses.append(eval_linear.main(words))
    assert statuses[-1] == 0 and len(statuses) == 6
    assert set(statuses[:-1]) == {128 + signal.SIGTERM}
    found = json.loads((tmp_path / "stopped" / "eval_logistic.json").read_text())["results"]
    assert found == expected
    for file in (tmp_path / "whole" / "logistic").glob("fits_*.pth"):
        two = [
            torch.load(tmp_path / name / "logistic" / file.name, weights_only=True)["weights"]
            for name in ("whole", "stopped")
        ]
        assert torch.equal(*two)


def _in_a_group(rank, world_size, folder, argv):
    """Results of main() in a process of a group that is there."""
    process = dist.Process(rank, world_size, rank, "torchrun", torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init", lambda *given: process)
        patch.setattr(dist, "shutdown", lambda: None)
        assert eval_linear.main([*argv, "--dump_path", folder]) == 0


@pytest.mark.slow
def test_two_processes_find_what_one_finds(whole, tmp_path):
    run_ranks(_in_a_group, 2, str(tmp_path), [*QUICK, "--label_fractions", "0.1", "1"])
    one, two = (
        json.loads((folder / "eval_logistic.json").read_text())["results"]
        for folder in (whole, tmp_path)
    )
    for expected, found in zip(one, two, strict=True):
        assert found["penalty"] == expected["penalty"]
        assert found["top1"] == expected["top1"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_ranks_of_equal_scores_and_an_empty_share_are_counted_as_elsewhere():
    weights = torch.eye(7, dtype=torch.float64)
    features = torch.tensor([[9.0, 8, 7, 6, 5, 4, 4]]).repeat(4, 1)
    found = logistic_search.accuracy(features, torch.tensor([0, 1, 4, 6]), weights, intercept=False)
    assert found["top1"] == 25.0 and found["top5"] == 75.0
    expected = F.cross_entropy(features, torch.tensor([0, 1, 4, 6])).item()
    assert found["loss"] == pytest.approx(expected)
    equal = torch.zeros(7, 7, dtype=torch.float64)
    found = logistic_search.accuracy(features, torch.tensor([0, 1, 4, 6]), equal, intercept=False)
    assert found["top1"] == 25.0  # class 0 comes first


def test_what_is_wrong_is_one_sentence_and_status_2(tmp_path, capfd, whole):
    voc = write_voc(tmp_path / "VOC2007")
    few = tmp_path / "few.txt"
    few.write_text("image 1\nimage 2\n")
    for argv, sentence in (
        (["--lr", "1"], "--lr is for --solver sgd: leave it out"),
        (["--label_fractions", "2"], "2 is not a share"),
        (["--label_lists", str(few)], "no class of few.txt has 5"),
        (["--data_path", str(voc), "--size", "12"], "eval_voc07.py --protocol svm"),
        (["--dump_path", str(whole), "--size", "10"], "holds features with size"),
        (
            ["--dump_path", str(whole), "--precision", "bf16"],
            "features with precision fp32, not bf16",
        ),
    ):
        words = [*QUICK, "--dump_path", str(tmp_path / "out"), *argv]
        with pytest.raises(SystemExit) as leaving:
            flags.run(lambda words=words: eval_linear.main(words))
        said = capfd.readouterr().err
        assert leaving.value.code == 2 and sentence in " ".join(said.split()), said
    with pytest.raises(ValueError, match="--intercept is for --solver lbfgs"):
        eval_linear.main([*NETWORK, "--intercept", "--dump_path", str(tmp_path)])
