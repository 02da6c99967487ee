"""src.evaluate.svm and svm_classes: scikit-learn's LinearSVC, folds, costs, groups, processes."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import LinearSVC

from src.errors import Stopped
from src.evaluate import svm, svm_classes
from src.evaluate.svm import Rows, objective, solve
from src.evaluate.svm_classes import fit_classes, fit_group, stratified_folds
from src.run.stop import StopSignal
from tests.gloo import run_ranks
from tests.runs import signal_handlers  # noqa: F401, used by name

COSTS = [0.01, 1.0, 1000.0]


def made(n=150, dim=20, classes=3, noise=1.0):
    """Unit features (n, dim) that say something of the classes, and labels (n, classes) bool."""
    draws = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, dim, generator=draws)
    wish = hidden[:, :classes] + noise * torch.randn(n, classes, generator=draws)
    return F.normalize(hidden.relu(), dim=1), wish > 0.8


def linear_svc(cost):
    return LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        intercept_scaling=1.0,
        tol=1e-10,
        max_iter=10**6,
        random_state=0,
    )


def problems(positive, costs):
    """Signs and C c_i (n, classes * costs) of every class at every cost."""
    signs = torch.where(positive, 1.0, -1.0).double()
    weights = torch.where(positive, 2.0, 1.0).double()
    return signs.repeat(1, len(costs)), torch.cat([cost * weights for cost in costs], 1)


# ============ the solver ============
@pytest.mark.parametrize("way", ["conjugate gradients", "factorised", "without kept products"])
def test_weights_scores_and_objective_are_those_of_linear_svc(way, monkeypatch):
    features, positive = made()
    if way == "without kept products":
        monkeypatch.setattr(svm, "MOST_PRODUCTS", 0)
    rows = Rows(features)
    rows.most_active = 0 if way == "conjugate gradients" else 10**6
    signs, costs = problems(positive, COSTS)
    weights = solve(rows, signs, costs)
    found = objective(rows.x, weights, signs, costs)
    for i in range(signs.shape[1]):
        fitted = linear_svc(COSTS[i // 3]).fit(features.double().numpy(), signs[:, i].numpy())
        theirs = torch.from_numpy(np.concatenate([fitted.coef_[0], fitted.intercept_]))
        reference = objective(rows.x, theirs[:, None], signs[:, i : i + 1], costs[:, i : i + 1])
        torch.testing.assert_close(weights[:, i], theirs, rtol=1e-4, atol=1e-4)
        scores = torch.from_numpy(fitted.decision_function(features.double().numpy()))
        torch.testing.assert_close(rows.x @ weights[:, i], scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[i : i + 1], reference, rtol=1e-8, atol=0)


def test_an_svm_does_not_depend_on_those_beside_it_nor_on_rows_that_it_leaves_out():
    features, positive = made()
    rows = Rows(features)
    signs, costs = problems(positive, COSTS)
    costs[100:] = 0
    together = solve(rows, signs, costs)
    alone = solve(rows, signs[:, 4:5], costs[:, 4:5])
    torch.testing.assert_close(together[:, 4:5], alone, rtol=1e-5, atol=1e-5)
    fewer = solve(Rows(features[:100]), signs[:100], costs[:100])
    torch.testing.assert_close(together, fewer, rtol=1e-5, atol=1e-5)


def test_features_of_more_dimensions_than_rows_and_from_another_start_end_at_the_same_minimum():
    features, positive = made(n=30, dim=80)
    rows = Rows(features)
    signs, costs = problems(positive, [10.0])
    cold = solve(rows, signs, costs)
    warm = solve(rows, signs, costs, start=solve(rows, signs, costs / 1000))
    torch.testing.assert_close(cold, warm, rtol=1e-5, atol=1e-5)
    slack = 1 - signs * (rows.x @ cold)
    gradient = cold - 2 * rows.x.t() @ (costs * signs * slack.clamp(min=0))
    assert gradient.norm(dim=0).max() < 1e-4


def test_a_problem_that_is_not_solved_is_an_error(monkeypatch):
    features, positive = made()
    monkeypatch.setattr(svm, "NEWTON_STEPS", 1)
    with pytest.raises(RuntimeError, match="3 SVMs are not solved after 1"):
        solve(Rows(features), *problems(positive, [1.0]))


# ============ classes ============
@pytest.mark.parametrize("seed", range(4))
def test_folds_are_those_of_scikit_learn(seed):
    draws = torch.Generator().manual_seed(seed)
    positive = torch.rand(47, generator=draws) < 0.3
    folds = stratified_folds(positive)
    for number, (_, test) in enumerate(StratifiedKFold(3).split(positive, positive)):
        assert (folds == number).nonzero()[:, 0].tolist() == test.tolist()


def test_costs_are_chosen_by_the_cross_validation_of_scikit_learn():
    features, positive = made(dim=6, noise=1.0)
    found = fit_group(Rows(features), positive, [1000.0, 0.01, 1.0])
    assert found["grid"].tolist() == sorted(COSTS)
    numbers = features.double().numpy()
    for i in range(3):
        labels = np.where(positive[:, i], 1, -1)
        for k, cost in enumerate(sorted(COSTS)):
            scores = cross_val_score(
                linear_svc(cost), numbers, labels, cv=3, scoring="average_precision"
            )
            assert found["ap"][i, k].item() == pytest.approx(100 * scores.mean(), abs=1e-6)
        cost = found["costs"][i].item()
        assert cost == sorted(COSTS)[found["ap"][i].argmax()]
        fitted = linear_svc(cost).fit(numbers, labels)
        torch.testing.assert_close(
            found["weights"][:-1, i], torch.from_numpy(fitted.coef_[0]), rtol=1e-4, atol=1e-4
        )
    assert len(set(found["costs"].tolist())) > 1  # or the choice is not seen


def test_classes_with_too_few_positive_images_for_the_folds_are_fitted_all_the_same():
    features, positive = made()
    positive[:, 0] = False
    positive[:, 1] = False
    positive[7, 1] = True
    found = fit_group(Rows(features), positive, COSTS)
    assert found["ap"][0].isnan().all() and found["costs"][0] == 0.01
    assert found["ap"][1].isfinite().all() and found["weights"].isfinite().all()


def fit(rank, world_size, folder, costs=COSTS):
    svm_classes.GROUP = 2
    features, positive = made(classes=7)
    found = fit_classes(features, positive, costs, folder, StopSignal())
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.slow
def test_two_processes_find_what_one_finds_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(svm_classes, "GROUP", 2)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = fit(0, 1, tmp_path / "one")
    for two in run_ranks(fit, 2, tmp_path / "two"):
        for name, value in one.items():
            np.testing.assert_array_equal(two[name], value, err_msg=name)


def test_a_stopped_fit_goes_on_with_the_groups_that_lack_and_ends_at_the_same_bits(
    tmp_path,
    monkeypatch,
    signal_handlers,  # noqa: F811
):
    monkeypatch.setattr(svm_classes, "GROUP", 2)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = fit(0, 1, tmp_path / "whole")
    features, positive = made(classes=7)
    stop, solved = StopSignal(), []

    def count(*arguments):
        if len(solved) == 2 * len(COSTS):
            stop.name = "SIGTERM"
        solved.append(1)
        return solve(*arguments)

    monkeypatch.setattr(svm_classes, "solve", count)
    assert fit_classes(features, positive, COSTS, tmp_path / "stopped", stop) is None
    assert len(list((tmp_path / "stopped").iterdir())) == 2
    solved.clear()
    again = fit_classes(features, positive, COSTS, tmp_path / "stopped", StopSignal())
    assert len(solved) == 2 * len(COSTS)  # the other two groups
    for name, value in whole.items():
        np.testing.assert_array_equal(again[name].numpy(), value, err_msg=name)


def test_groups_of_other_costs_are_fitted_anew(tmp_path):
    fit(0, 1, tmp_path)
    found = fit(0, 1, tmp_path, costs=[2.0])
    assert (found["costs"] == 2.0).all() and found["ap"].shape == (7, 1)


def test_progress_has_an_eta_and_a_signal_ends_a_step(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(svm_classes, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(svm_classes, "GROUP", 2)
    with caplog.at_level(logging.INFO):
        fit(0, 1, tmp_path)
    assert "SVMs: 1 of 4 groups of 2 classes, 3 costs and 3 folds each, ETA 0:00:0" in caplog.text

    def refuse():
        raise Stopped

    features, positive = made()
    with pytest.raises(Stopped):
        solve(Rows(features), *problems(positive, [1.0]), on_step=refuse)
