"""src.evaluate.logistic: scikit-learn's logistic regression, processes, resuming."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from src.evaluate import logistic
from src.evaluate.label_subsets import draw
from src.evaluate.logistic import Problem, held_out, minimise, scores_of
from tests.gloo import run_ranks


def made(n=200, dim=12, classes=4):
    """Unit features (n, dim) that say something of the labels (n,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=generator)
    features = torch.randn(n, dim, generator=generator) + 1.5 * F.one_hot(labels, dim)
    return F.normalize(features, dim=1), labels


def fit(features, labels, penalty, intercept, classes=4, **options):
    problem = Problem(features, labels, classes, penalty, intercept)
    return problem, minimise(problem, torch.zeros(problem.shape, dtype=torch.float64), **options)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("penalty", [10.0, 0.1, 0.001])
def test_loss_scores_and_predictions_are_those_of_scikit_learn(penalty, intercept):
    features, labels = made()
    problem, weights = fit(features, labels, penalty, intercept)
    theirs = LogisticRegression(C=1 / penalty, fit_intercept=intercept, tol=1e-10, max_iter=10**5)
    theirs.fit(features.double().numpy(), labels.numpy())
    reference = torch.from_numpy(theirs.coef_)
    if intercept:
        reference = torch.cat([reference, torch.from_numpy(theirs.intercept_)[:, None]], 1)
    loss, _ = problem.loss_and_gradient(weights)
    assert loss == pytest.approx(problem.loss_and_gradient(reference)[0], rel=2e-6)
    probabilities = scores_of(features, weights, intercept).softmax(1)
    expected = torch.from_numpy(theirs.predict_proba(features.double().numpy()))
    torch.testing.assert_close(
        probabilities, expected, atol=1e-3 if penalty < 0.01 else 1e-4, rtol=0
    )
    assert (probabilities.argmax(1).numpy() == theirs.predict(features.double().numpy())).all()


def test_the_gradient_is_that_of_autograd_and_blocks_do_not_matter(monkeypatch):
    features, labels = made(n=50)
    weights = torch.randn(4, 13, dtype=torch.float64).requires_grad_()
    scores = features.double() @ weights[:, :-1].t() + weights[:, -1]
    loss = F.cross_entropy(scores, labels) + 0.3 / 100 * weights[:, :-1].square().sum()
    loss.backward()
    for block in (logistic.BLOCK, 4 * 7):
        monkeypatch.setattr(logistic, "BLOCK", block)
        problem = Problem(features, labels, 4, 0.3, intercept=True)
        found, gradient = problem.loss_and_gradient(weights.detach())
        assert found == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(gradient, weights.grad, rtol=1e-9, atol=1e-12)


def test_what_it_says_is_above_the_minimum_is_so(monkeypatch):
    monkeypatch.setattr(logistic, "STEPS", 3)
    features, labels = made()
    states = []
    problem, weights = fit(features, labels, 0.1, False, on_steps=lambda s: states.append(dict(s)))
    best, _ = problem.loss_and_gradient(weights)
    assert len(states) > 2 and [state["steps"] for state in states[:2]] == [0, logistic.STEPS]
    for state in states:
        assert state["loss"] - best <= state["excess"] * (1 + 1e-9)


def test_a_fit_that_ends_before_its_minimum_says_so(monkeypatch, caplog):
    fit(*made(), 0.1, False)
    assert "was ended" not in caplog.text
    monkeypatch.setattr(logistic, "STEPS", 1)
    monkeypatch.setattr(logistic, "MOST_STEPS", 2)
    fit(*made(), 0.1, False)
    assert "the logistic regression was ended after 2 steps, up to" in caplog.text


def _on_own_rows(rank, world_size, shares):
    features, labels = made()
    own = slice(*(round(200 * x) for x in shares[rank]))
    return fit(features[own], labels[own], 0.1, True)[1].numpy()


@pytest.mark.parametrize("half", [0.3, 0.0])
def test_two_processes_with_uneven_rows_or_none_find_what_one_finds(half):
    one = _on_own_rows(0, 1, [(0, 1)])
    first, second = run_ranks(_on_own_rows, 2, [(0, half), (half, 1)])
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, one, atol=2e-3 * np.abs(one).max())
    features, labels = made()
    problem = Problem(features, labels, 4, 0.1, True)
    losses = [problem.loss_and_gradient(torch.from_numpy(w))[0] for w in (first, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_fit_that_was_stopped_and_saved_goes_on_to_the_last_bit(monkeypatch):
    monkeypatch.setattr(logistic, "STEPS", 2)
    features, labels = made()
    _, whole = fit(features, labels, 0.01, False)
    file = io.BytesIO()

    def stop_at_four(state):
        if state["steps"] == 4:
            torch.save(state, file)
        return state["steps"] == 4

    problem, nothing = fit(features, labels, 0.01, False, on_steps=stop_at_four)
    assert nothing is None
    file.seek(0)
    state = torch.load(file, weights_only=True)
    start = torch.zeros(problem.shape, dtype=torch.float64)
    assert torch.equal(minimise(problem, start, solver_state=state), whole)


def test_of_each_class_a_share_is_held_out_and_never_the_only_image():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 4 + [3])
    mask = held_out(labels, 0.2, seed=0)
    assert labels[mask].bincount(minlength=4).tolist() == [2, 1, 0, 0]
    assert torch.equal(mask, held_out(labels, 0.2, seed=0))
    assert not torch.equal(mask, held_out(labels, 0.2, seed=1))
    assert len(draw(labels, per_class=1)) == 4


def test_features_that_vary_along_few_directions_take_few_steps():
    """Without L the smallest penalty takes 1,700 steps here."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(600, 24, generator=generator)
    features = logistic.unit_rows(directions * torch.logspace(0, -2, 24) + 1, "cpu")
    noise = 4 * torch.randn(600, 4, generator=generator)
    labels = (directions @ torch.randn(24, 4, generator=generator) + noise).argmax(1)
    steps = []
    for penalty in (1.0, 1e-2, 1e-4):
        fit(features, labels, penalty, False, on_steps=lambda state: steps.append(state["steps"]))
    assert max(steps) <= 40


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("penalty", [1e-6, 1e-14, 1e-20])
def test_features_that_repeat_each_other_or_are_more_than_the_rows_have_a_minimum(
    penalty, intercept
):
    generator = torch.Generator().manual_seed(0)
    column = torch.randn(60, 1, generator=generator)
    labels = torch.arange(60) % 4
    for features in (column.expand(60, 6), torch.ones(60, 6), torch.randn(60, 80)):
        steps = []
        problem, weights = fit(
            logistic.unit_rows(features, "cpu"),
            labels,
            penalty,
            intercept,
            on_steps=lambda state, steps=steps: steps.append(state["steps"]),
        )
        assert weights.isfinite().all() and max(steps, default=0) <= 400
        assert problem.loss_and_gradient(weights)[0] <= math.log(4)
