"""src.labels.agreement: equal to scikit-learn and scipy on random groupings and at the extremes."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn import metrics

from src.labels import agreement
from src.labels.agreement import Overlaps, optimal_matching


def random_groups(seed, num_samples, num_groups):
    """Groups of unequal sizes, some of them empty."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        rng.choice(num_groups, num_samples, p=rng.dirichlet([0.5] * num_groups))
    )


def noisy(groups, seed, share=0.4):
    """The same groups, some of whose samples are in others."""
    rng = np.random.default_rng(seed)
    moved = torch.from_numpy(rng.random(len(groups)) < share)
    others = groups[torch.from_numpy(rng.permutation(len(groups)))]
    return torch.where(moved, others, groups)


CASES = {
    "random": (random_groups(0, 400, 7), random_groups(1, 400, 5)),
    "more clusters than classes": (random_groups(2, 300, 40), random_groups(3, 300, 6)),
    "more classes than clusters": (random_groups(4, 300, 4), random_groups(5, 300, 50)),
    "alike": (random_groups(6, 500, 12), noisy(random_groups(6, 500, 12), 7)),
    "equal": (random_groups(8, 100, 9), 20 - random_groups(8, 100, 9)),
    "one cluster": (torch.zeros(50).long(), random_groups(9, 50, 5)),
    "one class": (random_groups(10, 50, 5), torch.full((50,), 3)),
    "one of each": (torch.zeros(20).long(), torch.full((20,), 8)),
    "every image its own cluster": (torch.arange(60), random_groups(11, 60, 5)),
    "every image its own of both": (torch.arange(30), torch.arange(30).flip(0)),
    "one huge group": (
        torch.tensor([0] * 95 + [1, 2, 3, 4, 5]),
        torch.tensor([2] * 97 + [1, 0, 0]),
    ),
    "one sample": (torch.tensor([4]), torch.tensor([0])),
}


@pytest.mark.parametrize("name", CASES)
def test_measures_equal_those_of_scikit_learn(name):
    a, b = CASES[name]
    found, (x, y) = Overlaps(a, b), (a.numpy(), b.numpy())
    nmi = metrics.normalized_mutual_info_score(y, x, average_method="geometric")
    assert found.nmi() == pytest.approx(nmi, abs=1e-12)
    assert found.ari() == pytest.approx(metrics.adjusted_rand_score(y, x), abs=1e-12)
    assert found.ami() == pytest.approx(metrics.adjusted_mutual_info_score(y, x), abs=1e-11)
    table = metrics.cluster.contingency_matrix(x, y)
    assert found.purity() == pytest.approx(table.max(1).sum() / len(a))
    rows, columns = linear_sum_assignment(table, maximize=True)
    assert found.accuracy() == pytest.approx(table[rows, columns].sum() / len(a))
    assert found.accuracy() <= found.purity() + 1e-12


def test_the_expected_information_is_the_same_in_parts(monkeypatch):
    a, b = CASES["more clusters than classes"]
    found = Overlaps(a, b)
    whole = found.ami()
    monkeypatch.setattr(agreement, "TERMS_AT_ONCE", 64)
    assert found.ami() == pytest.approx(whole, abs=1e-12)


def test_random_clusters_have_an_nmi_but_no_adjusted_information():
    found = Overlaps(random_groups(20, 1000, 200), random_groups(21, 1000, 10))
    assert found.nmi() > 0.1 and abs(found.ami()) < 0.05 and abs(found.ari()) < 0.05


def test_nmi_equals_the_published_numbers(golden):
    data = golden("deepcluster")
    a, b = (torch.from_numpy(data[name]) for name in ("nmi_a", "nmi_b"))
    assert Overlaps(a, b).nmi() == pytest.approx(float(data["nmi_geometric"]), abs=1e-9)
    assert Overlaps(b, a).nmi() == pytest.approx(Overlaps(a, b).nmi(), abs=1e-12)


def test_measures_know_partitions_not_their_numbers():
    a = torch.tensor([0, 0, 1, 1, 2, 2])
    assert set(Overlaps(a, 7 * (a + 1) % 5).summary().values()) == {1.0}
    assert Overlaps(a, torch.tensor([0, 1] * 3)).nmi() < 1e-9


def test_samples_without_a_group_are_left_out():
    a, b = torch.tensor([0, 0, 1, 1, -1, 1]), torch.tensor([5, 5, 3, 3, 3, -100])
    assert Overlaps(a, b).summary() == pytest.approx(dict.fromkeys(Overlaps(a, b).summary(), 1.0))
    assert Overlaps(a, b).total == 4
    nothing = Overlaps(a, torch.full((6,), -1))
    assert nothing.nmi() == 0 and math.isnan(nothing.accuracy()) and math.isnan(nothing.purity())


def test_clusters_that_are_left_over_count_as_wrong_and_still_as_pure():
    found = Overlaps(torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 0, 0, 0, 1]))
    assert found.accuracy() == pytest.approx(4 / 6) and found.purity() == 1


# ============ matching ============
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["floats", "counts", "mostly nothing"])
def test_the_matching_is_as_good_as_scipys(seed, kind):
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 30, 2)
    profit = rng.normal(size=shape) if kind == "floats" else rng.integers(0, 9, shape)
    if kind == "mostly nothing":
        profit = profit * (rng.random(shape) < 0.1)
    rows, columns = optimal_matching(profit)
    best = linear_sum_assignment(profit, maximize=True)
    assert profit[rows, columns].sum() == pytest.approx(profit[best].sum(), abs=1e-9)
    assert len(rows) == min(shape) == len(set(rows.tolist())) == len(set(columns.tolist()))
    if kind == "floats":  # which has one best answer
        assert rows.tolist() == best[0].tolist() and columns.tolist() == best[1].tolist()


def test_a_greedy_matching_would_be_worse():
    rows, columns = optimal_matching(np.array([[10.0, 9.0], [9.0, 0.0]]))
    assert rows.tolist() == [0, 1] and columns.tolist() == [1, 0]


def test_a_table_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        optimal_matching(np.array([[1.0, math.nan]]))
