"""Rankings: the published numbers, the definition in float64, junk, ties, expansions."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from src.evaluate.ranking import (
    KAPPAS,
    Relevance,
    expand_database,
    expand_queries,
    micro_average_precision,
    rank,
    ranks_of_positives,
    retrieval_scores,
    trapezoid_ap,
)


def of_rows(positives, junk):
    """Relevance of padded rows of indices, -1 for nothing."""
    return [Relevance(p[p >= 0], j[j >= 0]) for p, j in zip(positives, junk, strict=True)]


@pytest.mark.parametrize("split", ["easy", "medium", "hard"])
def test_the_scores_of_the_revisited_protocol_are_the_published_ones(golden, split):
    arrays = golden("retrieval")
    easy, hard, junk = (arrays[name] for name in ("easy", "hard", "junk"))
    positives, ignored = {
        "easy": (easy, np.hstack([junk, hard])),
        "medium": (np.hstack([easy, hard]), junk),
        "hard": (hard, np.hstack([junk, easy])),
    }[split]
    database, queries = (torch.from_numpy(arrays[name]) for name in ("database", "query"))
    order = rank(queries @ database.T)
    np.testing.assert_array_equal(order, arrays["ranks"].T)
    found = retrieval_scores(order, of_rows(positives, ignored))
    assert arrays["kappas"].tolist() == list(KAPPAS)
    assert found["map"] == pytest.approx(arrays[f"{split}_map"], abs=1e-9)
    for name, golden_name in (
        ("aps", "aps"),
        ("precision", "mean_precision"),
        ("precisions", "precision"),
    ):
        np.testing.assert_allclose(found[name], arrays[f"{split}_{golden_name}"], atol=1e-9)


def test_average_precisions_of_copydays_are_the_published_ones(golden):
    arrays = golden("retrieval")
    for ranks, count, ap in zip(
        arrays["copy_ranks"], arrays["copy_nres"], arrays["copy_ap"], strict=True
    ):
        assert trapezoid_ap(ranks[ranks >= 0], count) == pytest.approx(ap, abs=1e-9)


def test_the_trapezoid_is_the_area_under_the_line_through_the_points_of_the_curve():
    """As the program of the Oxford buildings walks down a list: junk is passed over."""
    draws = np.random.default_rng(0)
    for _ in range(50):
        order = draws.permutation(30)
        labels = draws.integers(0, 3, 30)  # 0 wrong, 1 right, 2 junk
        positives = np.flatnonzero(labels == 1)
        extra = int(draws.integers(0, 3))  # right ones that the database lacks
        recall, precision, area, seen, found = 0.0, 1.0, 0.0, 0, 0
        for image in order:
            if labels[image] == 2:
                continue
            seen, found = seen + 1, found + (labels[image] == 1)
            new_recall, new_precision = found / (len(positives) + extra), found / seen
            area += (new_recall - recall) * (precision + new_precision) / 2
            recall, precision = new_recall, new_precision
        relevance = Relevance(positives, np.flatnonzero(labels == 2), len(positives) + extra)
        ranks = ranks_of_positives(order, relevance)
        assert trapezoid_ap(ranks, relevance.count()) == pytest.approx(area, abs=1e-12)


def test_equal_similarities_are_ranked_by_index():
    assert rank(torch.tensor([[0.5, 1.0, 0.5, 1.0, -torch.inf]])).tolist() == [[1, 3, 0, 2, 4]]


def test_the_micro_average_is_that_of_all_pairs_in_one_ranking():
    draws = torch.Generator().manual_seed(0)
    similarity = torch.randn(6, 20, generator=draws)
    relevance = [Relevance(np.array([row, row + 7])) for row in range(6)]
    positive = np.zeros((6, 20))
    for row in range(6):
        positive[row, [row, row + 7]] = 1
    expected = average_precision_score(positive.ravel(), similarity.double().numpy().ravel())
    assert micro_average_precision(similarity, relevance) == pytest.approx(expected, abs=1e-12)
    # A query whose similarities are all higher costs the micro-average, and not the mean.
    similarity[0] += 10
    order = rank(similarity)
    assert micro_average_precision(similarity, relevance) < expected
    assert (order[0] == rank(similarity - 10)[0]).all()


def test_queries_without_a_positive_are_left_out_and_a_ground_truth_of_them_is_refused():
    order = np.array([[0, 1, 2], [0, 1, 2]])
    found = retrieval_scores(order, [Relevance(np.array([0])), Relevance(np.empty(0, int))])
    assert found["map"] == 1 and np.isnan(found["aps"][1])
    with pytest.raises(ValueError, match="no query"):
        retrieval_scores(order, [Relevance(np.empty(0, int))] * 2)


def test_expansions_are_means_with_the_nearest_rows():
    draws = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(9, 5, generator=draws), dim=1)
    database, queries = unit[:6], unit[6:]
    for i, row in enumerate(expand_database(database, 3)):
        cosines = database.double() @ database[i].double()
        near = cosines.argsort(descending=True)[:4]
        expected = torch.tensor([1, 1, 2 / 3, 1 / 3]).double() @ database[near].double()
        torch.testing.assert_close(row.double(), expected / expected.norm(), atol=1e-6, rtol=0)
    for i, row in enumerate(expand_queries(queries, database, 2)):
        near = (database.double() @ queries[i].double()).argsort(descending=True)[:2]
        expected = (queries[i] + database[near].sum(0)).double() / 3
        torch.testing.assert_close(row.double(), expected / expected.norm(), atol=1e-6, rtol=0)
    assert expand_database(database, 50).shape == (6, 5)  # more than there are
