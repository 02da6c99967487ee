"""src.run.metrics: each health signal at its extremes, and the diagnosis of a run."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from src.run import diagnosis, metrics
from tests.gloo import run_ranks


def test_entropy_is_zero_for_one_hot_codes_and_ln_k_for_uniform_ones():
    assert metrics.code_entropy(torch.eye(7)).item() == 0
    assert metrics.code_entropy(torch.full((4, 7), 1 / 7)).item() == pytest.approx(math.log(7))


def test_usage_counts_the_prototypes_that_samples_choose():
    assert metrics.prototype_usage(torch.eye(8)).item() == pytest.approx(8)
    assert metrics.prototype_usage(torch.eye(8)[[3] * 20]).item() == pytest.approx(1)
    half = torch.eye(8)[[0, 1, 2, 3] * 5]
    assert metrics.prototype_usage(half).item() == pytest.approx(4)


def _usage_of_my_rows(rank, world_size):
    return metrics.prototype_usage(torch.eye(8)[rank::world_size]).item()


@pytest.mark.parametrize("world_size", [2, 4])
def test_usage_is_that_of_all_processes(world_size):
    assert run_ranks(_usage_of_my_rows, world_size) == pytest.approx([8] * world_size)


def test_std_is_one_on_the_sphere_and_zero_when_collapsed():
    torch.manual_seed(0)
    assert metrics.embedding_std(F.normalize(torch.randn(20000, 32), dim=1)) == pytest.approx(
        1, abs=0.01
    )
    assert metrics.embedding_std(torch.ones(10, 32) / math.sqrt(32)).item() < 1e-6


def test_rankme_is_the_number_of_directions_in_use():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16))[0]
    assert metrics.rankme(basis).item() == pytest.approx(16, rel=1e-3)
    assert metrics.rankme(basis[:5].repeat(8, 1)).item() == pytest.approx(5, rel=1e-2)
    assert metrics.rankme(torch.ones(10, 4)).item() == pytest.approx(1, rel=1e-2)
    assert math.isfinite(metrics.rankme(torch.zeros(10, 4)).item())


HEALTHY = {
    "loss": 3.0,
    "code_entropy": 1.0,
    "prototypes_used": 40,
    "embedding_std": 0.9,
    "batch": 256,
}


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"embedding_std": 0.01}, "same embedding"),
        ({"loss": math.log(60) + 1e-4}, "stays at ln\\(K\\)"),
        ({"code_entropy": math.log(60)}, "codes are uniform"),
        ({"prototypes_used": 1.5}, "only 1.5 of 60"),
    ],
)
def test_each_collapse_is_named_with_the_flags_that_help(change, words):
    found = diagnosis.diagnose([{**HEALTHY, **change}] * 10, 60)
    if words is None:
        assert found is None
    else:
        assert re.search(words, found) and "--" in found


def test_a_run_that_recovers_or_has_just_begun_is_not_diagnosed():
    bad = {**HEALTHY, "embedding_std": 0.01}
    assert diagnosis.diagnose([bad] * 9, 60) is None
    assert diagnosis.diagnose([bad] * 9 + [HEALTHY], 60) is None


def test_nmi_equals_the_published_numbers(golden):
    data = golden("deepcluster")
    a, b = (torch.from_numpy(data[name]) for name in ("nmi_a", "nmi_b"))
    nmi = metrics.normalized_mutual_information(a, b)
    assert nmi.item() == pytest.approx(float(data["nmi_geometric"]), abs=1e-9)
    assert metrics.normalized_mutual_information(b, a).item() == pytest.approx(
        nmi.item(), abs=1e-12
    )


def test_nmi_knows_partitions_not_their_numbers():
    a = torch.tensor([0, 0, 1, 1, 2, 2])
    assert metrics.normalized_mutual_information(a, 7 * (a + 1) % 5).item() == pytest.approx(1)
    assert metrics.normalized_mutual_information(a, torch.tensor([0, 1] * 3)) < 1e-9
    constant = torch.zeros(6, dtype=torch.int64)
    assert metrics.normalized_mutual_information(a, constant).item() == 0
    assert metrics.normalized_mutual_information(constant, constant + 3).item() == 1


def test_nmi_leaves_out_samples_without_an_assignment():
    a, b = torch.tensor([0, 0, 1, 1, -100, 0]), torch.tensor([5, 5, 3, 3, 3, -1])
    assert metrics.normalized_mutual_information(a, b).item() == pytest.approx(1)
    nothing = torch.full((6,), -100)
    assert metrics.normalized_mutual_information(a, nothing).item() == 0


def test_cluster_health_is_that_of_all_heads():
    assignments = torch.tensor([[0, 0, 0, 1, -100], [0, 1, 2, 0, -100]])
    labels = torch.tensor([3, 3, 3, 4, 4])
    health = metrics.cluster_health(assignments, None, labels, [3, 3])
    assert "nmi_previous" not in health
    sizes = {"cluster_min": 0, "cluster_median": 1, "cluster_max": 3, "clusters_empty": 0.5}
    assert {name: health[name] for name in sizes} == sizes
    second = metrics.normalized_mutual_information(assignments[1], labels).item()
    assert health["nmi_labels"] == pytest.approx((1 + second) / 2)
    previous = assignments.flip(0)
    health = metrics.cluster_health(assignments, previous, None, [3, 3])
    between = metrics.normalized_mutual_information(*assignments).item()
    assert health["nmi_previous"] == pytest.approx(between) and "nmi_labels" not in health


CLUSTERS = {"loss": 3.0, "prototypes_used": 40, "embedding_std": 0.9, "batch": 256}


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"embedding_std": 0.01}, "same embedding"),
        ({"loss": math.log(100)}, r"stays at ln\(K\)"),
        ({"prototypes_used": 2.0}, "only 2.0 of 100 possible clusters"),
    ],
)
def test_a_run_on_clusters_is_diagnosed_after_ten_bad_lines(change, words):
    lines = [{**CLUSTERS, **change}] * 10
    assert diagnosis.diagnose_clusters(lines[:9], 100) is None
    found = diagnosis.diagnose_clusters(lines, 100)
    assert (found is None) if words is None else re.search(words, found)
    assert diagnosis.diagnose_clusters([CLUSTERS, *lines[1:]], 100) is None


def test_prediction_health_counts_the_images_that_have_a_label():
    logits = 30.0 * torch.eye(4)[[0, 1, 2, 0, 0, 0]]  # 2 crops of 3 images
    health = metrics.prediction_health(logits, torch.tensor([0, 1, -100]), -100)
    assert health["accuracy"].item() == 75  # crops of images 0, 1: right, right, right, wrong
    assert health["prediction_entropy"].item() < 1e-6
    uniform = metrics.prediction_health(torch.zeros(6, 4), torch.tensor([-100] * 3), -100)
    assert uniform["prediction_entropy"].item() == pytest.approx(math.log(4))
    assert math.isnan(uniform["accuracy"].item())
