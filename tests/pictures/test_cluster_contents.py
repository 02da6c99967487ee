"""src.pictures.cluster_contents: metadata, colours and neighbours of clusters, counted by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics

from src.pictures import cluster_contents
from src.pictures.cluster_contents import Column, colour_spread, read_columns, same_class_edges

ASSIGNMENTS = torch.tensor([0, 0, 0, 2, 2, 2, 2, -1])
PLACES = ["rome", "rome", "", "oslo", "rome", "oslo", "bern", "oslo"]


# ============ metadata ============
def test_nmi_with_a_column_is_that_of_the_images_that_have_a_value():
    agreement = Column(PLACES).agreement(ASSIGNMENTS)
    x, y = [0, 0, 2, 2, 2, 2], ["rome", "rome", "oslo", "rome", "oslo", "bern"]
    expected = metrics.normalized_mutual_info_score(y, x, average_method="geometric")
    assert agreement["nmi"] == pytest.approx(expected)
    assert agreement["ami"] == pytest.approx(metrics.adjusted_mutual_info_score(y, x))
    assert (agreement["values"], agreement["images"]) == (3, 7)


def test_the_dominant_value_of_a_cluster_has_its_share_of_it_and_of_all():
    first, empty, last = Column(PLACES).dominant(ASSIGNMENTS, 3)
    assert empty is None
    assert first == {"value": "rome", "share": 2 / 3, "share_of_all": 3 / 7}
    assert last == {"value": "oslo", "share": 2 / 4, "share_of_all": 2 / 7}
    tied = Column(["b", "a", "a", "b"]).dominant(torch.zeros(4).long(), 1)
    assert tied[0]["value"] == "a"  # the first of equal ones
    assert Column(["", ""]).dominant(torch.zeros(2).long(), 1) == [None]
    assert Column(["", ""]).agreement(torch.zeros(2).long())["nmi"] == 0


def test_columns_are_all_or_those_that_are_asked_for():
    metadata = {"place": ["a", "b"], "tag": ["", "c"]}
    assert list(read_columns(metadata, None)) == ["place", "tag"]
    assert list(read_columns(metadata, ["tag"])) == ["tag"] and read_columns({}, None) == {}
    with pytest.raises(ValueError, match="--columns who is nothing .*: they have place, tag"):
        read_columns(metadata, ["place", "who"])
    with pytest.raises(ValueError, match="they have no metadata"):
        read_columns({}, ["who"])


# ============ colour ============
def test_the_spread_of_a_cluster_is_the_deviation_from_its_mean_colour():
    rng = np.random.default_rng(0)
    colours = rng.uniform(0, 255, (8, 3))
    each, within, of_all = colour_spread(torch.tensor(colours), ASSIGNMENTS, 3)
    assert each[0] == pytest.approx(np.sqrt(colours[:3].var(0).mean()))
    assert each[2] == pytest.approx(np.sqrt(colours[3:7].var(0).mean())) and each[1].isnan()
    assert of_all == pytest.approx(np.sqrt(colours[:7].var(0).mean()))
    assert within == pytest.approx(np.sqrt((3 * each[0] ** 2 + 4 * each[2] ** 2).item() / 7))


def test_clusters_of_one_colour_have_no_spread():
    colours = torch.tensor([[255.0, 0, 0]] * 4 + [[0, 0, 255.0]] * 4)
    each, within, of_all = colour_spread(colours, torch.tensor([1] * 4 + [0] * 4), 2)
    assert each.tolist() == [0, 0] and within == 0 and of_all > 100


# ============ neighbours ============
def plain_share(features, labels, k):
    cosines = F.normalize(features.double(), dim=1) @ F.normalize(features.double(), dim=1).t()
    cosines.fill_diagonal_(-math.inf)
    near = cosines.topk(min(k, len(features) - 1)).indices
    return (labels[near] == labels[:, None]).double().mean().item()


def test_edges_are_those_of_the_graph_without_the_images_themselves():
    torch.manual_seed(0)
    features, labels = torch.randn(60, 5), torch.randint(0, 4, (60,))
    features[labels == 0] += 2
    for k in (1, 7, 59, 100):
        expected = plain_share(features, labels, k)
        assert same_class_edges(features, labels, k, seed=0) == pytest.approx(expected)
    kept = torch.cat([labels[:50], torch.full((10,), -1)])
    expected = plain_share(features[:50], labels[:50], 7)
    assert same_class_edges(features, kept, 7, seed=0) == pytest.approx(expected)
    assert math.isnan(same_class_edges(features[:1], labels[:1], 7, seed=0))


def test_equal_images_are_edges_of_each_other():
    labels = torch.tensor([0] * 6 + [1] * 6)
    assert same_class_edges(torch.eye(2)[labels], labels, 3, seed=0) == 1


def test_of_many_images_some_are_looked_up(monkeypatch):
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (400,))
    features = torch.randn(400, 4) + labels[:, None]
    whole = same_class_edges(features, labels, 5, seed=0)
    monkeypatch.setattr(cluster_contents, "QUERIES", 100)
    some = same_class_edges(features, labels, 5, seed=0)
    assert some == same_class_edges(features, labels, 5, seed=0) != whole
    assert some == pytest.approx(whole, abs=0.1)
