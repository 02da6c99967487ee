import numpy as np
import pytest
import torch

from src.evaluate.linear_probe import PENALTY, linear_accuracy
from tests.gloo import run_ranks


def made_data(seed=0, num=240, dim=10, num_classes=4):
    """Features of overlapping classes, far from zero and of different scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    centres = torch.randn(num_classes, dim, generator=generator)
    features = centres[labels] + torch.randn(num, dim, generator=generator)
    return features * torch.logspace(-2, 2, dim) + 5, labels


def test_it_classifies_as_scikit_learns_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = made_data()
    train, val = slice(0, 180), slice(180, None)
    x = features.double().numpy()
    x = (x - x[train].mean(0)) / x[train].std(0)
    model = linear_model.LogisticRegression(C=1 / (PENALTY * 180), max_iter=1000, tol=1e-8)
    expected = 100 * model.fit(x[train], labels[train]).score(x[val], labels[val])
    found = linear_accuracy(features[train], labels[train], features[val], labels[val])
    assert found == pytest.approx(expected, abs=100 / 60 + 1e-6)  # one of 60 images
    assert 50 < found < 100


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_features_changes_nothing(scale):
    features, labels = made_data()
    plain = linear_accuracy(features[:180], labels[:180], features[180:], labels[180:])
    features = features * scale
    assert linear_accuracy(features[:180], labels[:180], features[180:], labels[180:]) == plain


def test_a_constant_feature_and_a_class_that_training_lacks_do_no_harm():
    features, labels = made_data()
    features[:, 3] = 7.0
    few = labels[:180] < 3
    found = linear_accuracy(features[:180][few], labels[:180][few], features[180:], labels[180:])
    assert np.isfinite(found) and 0 < found < 100


def _on_some(rank, world_size):
    features, labels = made_data()
    train = torch.arange(180).chunk(world_size)[rank]
    val = 180 + torch.arange(60).chunk(world_size)[rank]
    return linear_accuracy(features[train], labels[train], features[val], labels[val])


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_processes_have_the_number_of_one(world_size):
    features, labels = made_data()
    one = linear_accuracy(features[:180], labels[:180], features[180:], labels[180:])
    assert run_ranks(_on_some, world_size) == [one] * world_size
