"""k-NN, k-means, PCA and self-labelling on the device: golden labels, whatever precision is around."""

import contextlib

import numpy as np
import pytest
import torch

from src.cluster.kmeans import assign, euclidean_kmeans, spherical_kmeans
from src.cluster.neighbours import nearest_neighbours
from src.cluster.pca import fit_whitening, whiten
from src.evaluate.knn import knn_accuracy, knn_votes
from tests.cluster import test_self_label
from tests.gpu.host import to_device, to_host

pytestmark = pytest.mark.gpu

VOTES = 1e-5  # relative; predictions and neighbours are exact
CENTROIDS = 1e-5  # absolute; assignments are exact
WHITENED = 1e-5  # absolute, of products of whitened rows
PLAN = 1e-5  # relative; labels and iterations are exact


@pytest.fixture(params=["plain", "faster"])
def around(request, device):
    """A context of its caller: nothing, or bfloat16 and TensorFloat-32 as a training script may set."""

    @contextlib.contextmanager
    def context():
        if request.param == "faster":
            torch.set_float32_matmul_precision("medium")  # full_float32 sets it back
        with torch.autocast(device.type, torch.bfloat16, enabled=request.param == "faster"):
            yield

    return context


def test_neighbours_votes_and_accuracy_equal_the_golden_ones(golden, device, around):
    arrays = golden("dino_knn")
    names = ["train_features", "train_labels", "test_features", "test_labels"]
    train, train_labels, queries, labels = to_device(arrays, names, device)
    ks, temperature = arrays["ks"].tolist(), float(arrays["T"])
    with around():
        votes_of_ks = list(knn_votes(train, train_labels, queries, ks, temperature))
        accuracies = knn_accuracy(
            train, train_labels, queries, labels, ks=ks, temperature=temperature
        )
    for k, votes in zip(ks, votes_of_ks, strict=True):
        np.testing.assert_allclose(to_host(votes), arrays[f"k{k}_votes"], rtol=VOTES)
        np.testing.assert_array_equal(to_host(votes.argmax(1)), arrays[f"k{k}_pred"])
        expected = [float(arrays[f"k{k}_top1"]), float(arrays[f"k{k}_top5"])]
        assert accuracies[k] == pytest.approx(expected, abs=1e-12)
        with around():
            _, indices = nearest_neighbours(train, queries, k)
        expected = np.sort(arrays[f"k{k}_neighbors"], axis=1)
        np.testing.assert_array_equal(np.sort(to_host(indices), axis=1), expected)


@pytest.mark.parametrize("home", ["on the device", "in host memory"])
@pytest.mark.parametrize("case", ["plain", "empty", "duplicate"])
def test_spherical_clusters_equal_the_golden_ones(golden, device, around, case, home):
    arrays = golden("deepclusterv2_kmeans")
    stored_on = device if home == "on the device" else torch.device("cpu")
    for head in range(3):
        bank = arrays[f"{case}_bank"][int(arrays[f"{case}_bank_used{head}"])]
        rows = torch.from_numpy(bank).to(stored_on)
        start = torch.from_numpy(arrays[f"{case}_init_centroids{head}"]).to(stored_on)
        iterations = int(arrays["n_iters"])
        with around():
            centroids, labels = spherical_kmeans(rows, start, iterations, device=device)
            again = assign(rows, centroids, spherical=True, device=device)
        assert centroids.device.type == labels.device.type == stored_on.type
        expected = arrays[f"{case}_assignments"][head][arrays[f"{case}_index"]]
        np.testing.assert_array_equal(to_host(labels), expected)
        np.testing.assert_array_equal(to_host(again), expected)
        expected = arrays[f"{case}_centroids{head}"]
        np.testing.assert_allclose(to_host(centroids), expected, atol=CENTROIDS)


@pytest.mark.parametrize("case, iterations", [("plain", 5), ("onestep", 1)])
def test_euclidean_clusters_equal_the_golden_ones(golden, device, around, case, iterations):
    arrays = golden("deepercluster")
    rows, start = to_device(arrays, ["km_plain_x", "km_plain_init"], device)
    with around():
        centroids, labels = euclidean_kmeans(rows, start, iterations)
    np.testing.assert_array_equal(to_host(labels), arrays[f"km_{case}_labels"])
    expected = arrays[f"km_{case}_centroids"]
    np.testing.assert_allclose(to_host(centroids), expected, atol=CENTROIDS)


@pytest.mark.parametrize("case", ["deepcluster", "deepercluster"])
def test_whitened_rows_equal_the_golden_ones(golden, device, around, case):
    arrays = golden(case)
    (rows,) = to_device(arrays, ["pca_x"], device)
    with around():
        found = to_host(whiten(rows, fit_whitening(rows, int(arrays["pca_dim"]))))
    expected = arrays["pca_gram_first64"]
    np.testing.assert_allclose((found @ found.T)[:64], expected, atol=WHITENED)


@pytest.mark.parametrize("case", ["lamb25", "lamb5"])
@pytest.mark.parametrize("head", [0, 1])
def test_self_labels_iterations_and_plan_equal_the_golden_ones(golden, device, around, case, head):
    arrays = golden("self_label")
    logits, power = arrays[f"{case}_logits"][head], float(arrays[f"{case}_lambda"])
    prototypes = torch.eye(logits.shape[1], dtype=torch.float64, device=device)
    with around():
        found = test_self_label.self_labels(
            torch.from_numpy(logits).to(device), prototypes, temperature=1.0, epsilon=1 / power
        )
    assert found.labels.device.type == device.type
    np.testing.assert_array_equal(to_host(found.labels), arrays[f"{case}_labels"][head])
    assert found.iterations == arrays[f"{case}_iterations"][head]
    np.testing.assert_allclose(found.error, arrays[f"{case}_final_error"][head], rtol=1e-6)
    found = found._replace(log_scales=found.log_scales.cpu())
    plan = test_self_label.plan_of(logits, found, temperature=1.0, epsilon=1 / power)
    np.testing.assert_allclose(plan, arrays[f"{case}_plan"][head], rtol=PLAN, atol=1e-37)
