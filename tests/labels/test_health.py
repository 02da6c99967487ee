"""src.labels.health: sizes of clusters, predictions, and the diagnosis of a run of pseudo-labels."""

import math
import re

import pytest
import torch

from src.labels import health
from src.labels.agreement import Overlaps


def test_cluster_health_is_that_of_all_heads():
    assignments = torch.tensor([[0, 0, 0, 1, -100], [0, 1, 2, 0, -100]])
    labels = torch.tensor([3, 3, 3, 4, 4])
    values = health.cluster_health(assignments, None, labels, [3, 3])
    assert "nmi_previous" not in values
    sizes = {"cluster_min": 0, "cluster_median": 1, "cluster_max": 3, "clusters_empty": 0.5}
    assert {name: values[name] for name in sizes} == sizes
    second = Overlaps(assignments[1], labels).nmi()
    assert values["nmi_labels"] == pytest.approx((1 + second) / 2)
    previous = assignments.flip(0)
    values = health.cluster_health(assignments, previous, None, [3, 3])
    between = Overlaps(*assignments).nmi()
    assert values["nmi_previous"] == pytest.approx(between) and "nmi_labels" not in values


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
    assert health.diagnose_clusters(lines[:9], 100) is None
    found = health.diagnose_clusters(lines, 100)
    assert (found is None) if words is None else re.search(words, found.sentence)
    assert health.diagnose_clusters([CLUSTERS, *lines[1:]], 100) is None


def test_prediction_health_counts_the_images_that_have_a_label():
    logits = 30.0 * torch.eye(4)[[0, 1, 2, 0, 0, 0]]  # 2 crops of 3 images
    values = health.prediction_health(logits, torch.tensor([0, 1, -100]), -100)
    assert values["accuracy"] == 75  # crops of images 0, 1: right, right, right, wrong
    assert values["prediction_entropy"].item() < 1e-6
    uniform = health.prediction_health(torch.zeros(6, 4), torch.tensor([-100] * 3), -100)
    assert uniform["prediction_entropy"] == pytest.approx(math.log(4))
    assert math.isnan(uniform["accuracy"].item())
