"""extract.py: which features it writes, of which images, how it goes on, and what it clusters."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_knn
import extract
from src.data.datasets import open_dataset
from src.errors import CheckpointError
from src.labels import row_file
from tests.data.test_datasets import write_image
from tests.gloo import start_mains

ROOT = Path(__file__).parent.parent
QUICK = ["--workers", "0", "--device", "cpu", "--size", "8"]
NETWORK = ["--arch", "resnet18", "--stem", "small", "--width", "0.125"]


def call(folder, *argv):
    """features.npy, the rows of files.csv and extract.json of a call in this process."""
    assert extract.main([*QUICK, "--dump_path", str(folder), *map(str, argv)]) == 0
    with open(folder / "files.csv", newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    return np.load(folder / "features.npy"), rows, json.loads((folder / "extract.json").read_text())


@pytest.fixture
def photos(tmp_path):
    """Six images without labels, of different brightness."""
    for number in range(6):
        write_image(tmp_path / "photos" / f"{number}.png", 40 * number, size=(12 + number, 11))
    return tmp_path / "photos"


# ============ features ============
def test_features_are_those_of_eval_knn_to_the_last_bit(tmp_path):
    argv = [*NETWORK, "--seed", "3"]
    features, rows, stored = call(tmp_path / "out", *argv)
    dump = ["--dump_features", str(tmp_path / "dump"), "--dump_path", str(tmp_path / "knn")]
    assert eval_knn.main([*QUICK, *argv, *dump, "--nb_knn", "1"]) == 0
    np.testing.assert_array_equal(features, np.load(tmp_path / "dump" / "train_features.npy"))
    labels = [int(row["label"]) for row in rows]
    np.testing.assert_array_equal(labels, np.load(tmp_path / "dump" / "train_labels.npy"))
    assert [int(row["row"]) for row in rows] == list(range(len(features)))
    assert stored["settings"]["shape"] == [features.shape[1]]


def test_images_without_labels_have_features(tmp_path, photos):
    features, rows, _ = call(tmp_path / "out", *NETWORK, "--data_path", photos)
    assert features.shape == (6, 64) and len(np.unique(features, axis=0)) == 6
    assert list(rows[0]) == ["row", "path"]
    assert [row["path"] for row in rows] == [str(photos / f"{number}.png") for number in range(6)]


def test_metadata_of_a_list_stand_beside_the_features(tmp_path, photos):
    table = tmp_path / "list.csv"
    table.write_text("path,row,place\nphotos/4.png,7,Rome\nphotos/1.png,9,Oslo\n")
    _, rows, _ = call(tmp_path / "out", *NETWORK, "--data_path", table)
    assert [(row["row"], row["meta_row"], row["place"]) for row in rows] == [
        ("0", "7", "Rome"),
        ("1", "9", "Oslo"),
    ]


@pytest.mark.parametrize("arch", ["resnet18", "vit"])
def test_pooled_features_are_those_of_all_positions(tmp_path, photos, arch):
    network = NETWORK if arch == "resnet18" else ["--arch", "vit_micro", "--patch_size", "4"]
    argv = [*network, "--data_path", photos, "--size", "16"]
    found = {
        feature: call(tmp_path / feature, *argv, "--feature", feature)[0]
        for feature in ("backbone", "mean", "gem", "patches")
    }
    patches = found["patches"].astype(np.float64)
    assert patches.ndim == 3 and patches.shape[1] == (4 if arch == "resnet18" else 16)
    np.testing.assert_allclose(found["mean"], patches.mean(1), atol=1e-6)
    gem = (np.maximum(patches, 1e-6) ** 3).mean(1) ** (1 / 3)
    np.testing.assert_allclose(found["gem"], gem, atol=1e-5)
    if arch == "resnet18":
        np.testing.assert_allclose(found["mean"], found["backbone"], atol=1e-6)
    else:
        cls = call(tmp_path / "cls", *argv, "--feature", "cls")[0]
        np.testing.assert_array_equal(cls, found["backbone"])


@pytest.mark.slow  # loads timm
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_networks_of_timm_have_positions(tmp_path, photos, name):
    pytest.importorskip("timm")
    argv = ["--arch", f"timm:{name}", "--data_path", photos, "--size", "64"]
    patches, _, _ = call(tmp_path / "patches", *argv, "--feature", "patches")
    mean, _, _ = call(tmp_path / "mean", *argv, "--feature", "mean")
    assert patches.shape[:2] == (6, 4 if name == "resnet10t" else 16)
    np.testing.assert_allclose(mean, patches.mean(1), atol=1e-5)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ([*NETWORK, "--feature", "cls"], "--feature cls is the class token"),
        pytest.param(
            ["--arch", "shufflenet_v2_x0_5", "--feature", "gem"],
            "shufflenet_v2_x0_5 has not",
            marks=pytest.mark.slow,  # loads torchvision
        ),
        ([*NETWORK, "--clusters", "9", "--feature", "patches"], "--clusters needs a vector"),
        ([*NETWORK, "--clusters", "7"], "--clusters 7 is more than the 6 images"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(tmp_path, photos, argv, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(tmp_path / "out", "--data_path", photos, *argv)


def test_an_image_that_cannot_be_read_has_nan_in_its_row_and_no_cluster(tmp_path, photos):
    (photos / "3.png").write_bytes(b"no image")
    features, rows, stored = call(
        tmp_path / "out", *NETWORK, "--data_path", photos, "--clusters", 2, "--num_images", 1
    )
    assert np.isnan(features[3]).all() and np.isfinite(np.delete(features, 3, axis=0)).all()
    assert stored["unreadable"] == [3] and rows[3]["cluster"] == "-1"
    assert {row["cluster"] for row in rows} == {"-1", "0", "1"}


def test_features_that_are_not_finite_are_refused(tmp_path, photos):
    weights = tmp_path / "bad.pth"
    model = extract.eval_flags.open_network(extract.parse_args([*NETWORK])).model
    torch.save({name: x * torch.inf for name, x in model.state_dict().items()}, weights)
    with pytest.raises(ValueError, match="features that are not finite"):
        call(tmp_path / "out", *NETWORK, "--data_path", photos, "--pretrained", weights)


def test_a_parquet_file_holds_features_and_table(tmp_path, photos):
    parquet = pytest.importorskip("pyarrow.parquet")
    os.rename(photos / "0.png", os.path.join(os.fsencode(photos), b"0\xe9.png"))
    features, _, _ = call(tmp_path / "out", *NETWORK, "--data_path", photos, "--parquet")
    table = parquet.read_table(tmp_path / "out" / "files.parquet").to_pydict()
    np.testing.assert_array_equal(np.array(table["features"], np.float32), features)
    assert table["path"][0].endswith("0\\xe9.png")


# ============ going on ============
def test_it_goes_on_where_it_was_stopped(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(row_file, "CHUNK", 2)
    argv = [*NETWORK, "--data_path", photos, "--batch_size", "2"]
    whole, _, _ = call(tmp_path / "whole", *argv)
    loaded, asked = [], []
    original = extract.extract_features

    def stopped(*args, indices, write, **options):
        def write_then_stop(first, rows):
            os.kill(os.getpid(), signal.SIGTERM)
            write(first, rows)

        asked.append(indices.tolist())
        return original(*args, indices=indices, write=write_then_stop, **options)

    monkeypatch.setattr(extract, "extract_features", stopped)
    assert extract.main([*QUICK, "--dump_path", str(tmp_path / "out"), *map(str, argv)]) == 143
    monkeypatch.setattr(
        extract,
        "extract_features",
        lambda *args, **options: loaded.append(options["indices"]) or original(*args, **options),
    )
    features, _, _ = call(tmp_path / "out", *argv)
    assert asked == [[0, 1, 2, 3, 4, 5]] and [x.tolist() for x in loaded] == [[2, 3, 4, 5]]
    np.testing.assert_array_equal(features, whole)
    call(tmp_path / "out", *argv)  # nothing is left to do
    assert len(loaded) == 1
    assert not list((tmp_path / "out").glob("*.done"))


def test_a_file_of_features_that_was_deleted_is_made_again(tmp_path, photos):
    argv = [*NETWORK, "--data_path", photos]
    features, _, _ = call(tmp_path / "out", *argv)
    (tmp_path / "out" / "features.npy").unlink()
    again, _, _ = call(tmp_path / "out", *argv)
    np.testing.assert_array_equal(again, features)


@pytest.mark.parametrize(
    "change, words",
    [
        (["--seed", "5"], "of other weights"),
        (["--feature", "mean"], "with feature backbone, not mean"),
        ("image", "of other images"),
    ],
)
def test_a_folder_with_other_features_is_refused(tmp_path, photos, change, words):
    argv = [*NETWORK, "--data_path", photos]
    call(tmp_path / "out", *argv)
    if change == "image":
        write_image(photos / "new.png")
        change = []
    with pytest.raises(CheckpointError, match=words):
        call(tmp_path / "out", *argv, *change)


def test_features_of_another_precision_are_refused_and_those_of_an_earlier_version_are_not(
    tmp_path, photos
):
    argv, out = [*NETWORK, "--data_path", photos], tmp_path / "out"
    _, _, stored = call(out, *argv)
    assert stored["settings"]["precision"] == "fp32"  # that of auto on a CPU
    call(out, *argv, "--precision", "fp32")
    with pytest.raises(CheckpointError, match="with precision fp32, not bf16: name another"):
        call(out, *argv, "--precision", "bf16")
    del stored["settings"]["precision"]
    (out / "extract.json").write_text(json.dumps(stored))
    call(out, *argv, "--precision", "bf16")


# ============ clusters ============
def test_clusters_are_the_nearest_centroids(tmp_path):
    features, rows, _ = call(tmp_path / "out", *NETWORK, "--clusters", 12, "--num_shown", 3)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    centroids = np.load(tmp_path / "out" / "centroids.npy")
    cosines = unit @ centroids.T
    assert centroids.shape == (12, 64)
    best = cosines[range(len(rows)), [int(row["cluster"]) for row in rows]]
    np.testing.assert_allclose(best, cosines.max(1), atol=1e-5)
    np.testing.assert_allclose([float(row["cosine"]) for row in rows], best, atol=1e-5)
    summary = json.loads((tmp_path / "out" / "clusters.json").read_text())
    assert sum(summary["sizes"]) == len(rows) and 0 < summary["nmi"] < 1
    assert (tmp_path / "out" / "clusters.png").stat().st_size > 1000
    assert not (tmp_path / "out" / "unit_rows.npy").exists()


def test_what_it_wrote_below_the_images_is_no_image(tmp_path, photos):
    call(photos / "features", *NETWORK, "--data_path", photos, "--clusters", 2, "--num_images", 1)
    assert len(open_dataset(str(photos))) == 6
    call(photos / "elsewhere", *NETWORK, "--data_path", photos, "--clusters", 2)
    assert len(open_dataset(str(photos))) == 6


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_processes_write_the_same(tmp_path, world_size):
    argv = [*QUICK, *NETWORK, "--clusters", "12"]
    one, rows, _ = call(tmp_path / "one", *NETWORK, "--clusters", 12)
    mains = start_mains("extract", tmp_path / "some", argv, world_size)
    assert [main.wait() for main in mains] == [0] * world_size
    some = np.load(tmp_path / "some" / "features.npy")
    np.testing.assert_allclose(some, one, atol=1e-5)
    with open(tmp_path / "some" / "files.csv", newline="") as file:
        clusters = [row["cluster"] for row in csv.DictReader(file)]
    same = np.mean([a == row["cluster"] for a, row in zip(clusters, rows, strict=True)])
    assert same > 0.99


@pytest.mark.slow
def test_a_signal_between_chunks_keeps_them(tmp_path):
    command = [sys.executable, str(ROOT / "extract.py"), *QUICK, *NETWORK, "--batch_size", "2"]
    command += ["--dump_path", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "features.npy").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command continues" in said
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    assert np.isfinite(np.load(tmp_path / "out" / "features.npy")).all()
