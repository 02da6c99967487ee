"""src.cluster.pca: golden values, exact covariances, memory-mapped features, processes, extremes."""

import numpy as np
import pytest
import torch

from src.cluster import pca
from src.cluster.kmeans import euclidean_kmeans, initial_centroids
from src.cluster.pca import Whitening, fit_whitening, whiten
from tests.gloo import run_ranks

FIELDS = ("mean", "components", "eigenvalues")


def correlated(n, size, seed=0):
    """Rows (n, size) whose standard deviations fall from 1 to 0.01, mixed, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    rows = torch.randn(n, size, generator=generator) * torch.logspace(0, -2, size)
    return rows @ mix + torch.randn(size, generator=generator)


def reference(rows, dim, floor=1e-5):
    """Mean, components and eigenvalues from the equations, in float64."""
    rows = np.asarray(rows, dtype=np.float64)
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, floor * values.max())[::-1][:dim]
    return mean, vectors.T[::-1][:dim] / np.sqrt(values)[:, None], values


def whitened(rows, dim, floor=1e-5):
    mean, components, _ = reference(rows, dim, floor)
    rows = (np.asarray(rows, dtype=np.float64) - mean) @ components.T
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def gram(rows):
    return np.asarray(rows) @ np.asarray(rows).T


@pytest.mark.parametrize("case, atol", [("deepcluster", 2e-6), ("deepercluster", 2e-6)])
def test_whitened_rows_equal_the_golden_ones(golden, case, atol):
    arrays = golden(case)
    rows = torch.from_numpy(arrays["pca_x"])
    whitening = fit_whitening(rows, int(arrays["pca_dim"]))
    found = whiten(rows, whitening)
    assert found.shape == (len(rows), int(arrays["pca_dim"])) and found.dtype == torch.float32
    np.testing.assert_allclose(gram(found)[:64], arrays["pca_gram_first64"], atol=atol)
    if case == "deepcluster":
        np.testing.assert_allclose(whitening.eigenvalues, arrays["pca_eigenvalues"], rtol=1e-6)
        np.testing.assert_allclose(found.abs(), arrays["pca_abs"], atol=atol)


@pytest.mark.parametrize("dim", [1, 7, 24, 30])
def test_components_are_the_eigenvectors_over_deviations_with_a_fixed_sign(dim):
    rows = correlated(500, 24)
    found = fit_whitening(rows, dim)
    mean, components, eigenvalues = reference(rows, dim)
    assert found.components.shape == (min(dim, 24), 24)
    assert {getattr(found, name).dtype for name in FIELDS} == {torch.float64}
    np.testing.assert_allclose(found.mean, mean, atol=1e-7)
    np.testing.assert_allclose(found.eigenvalues, eigenvalues, rtol=1e-5)
    signs = np.sign(np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1))
    np.testing.assert_allclose(found.components, components * signs, atol=1e-3)
    assert (found.components.amax(1) == found.components.abs().amax(1)).all()
    # the direction of the least deviation, 0.01, is known to 2^-20 of the ranges of the features
    np.testing.assert_allclose(whiten(rows, found), whitened(rows, dim) * signs.T, atol=3e-5)


def test_whitened_entries_have_variance_1_and_no_correlation():
    rows = correlated(400, 12)
    found = fit_whitening(rows, 12)
    entries = (rows.double() - found.mean) @ found.components.T
    np.testing.assert_allclose(entries.mean(0), torch.zeros(12), atol=1e-5)
    np.testing.assert_allclose(entries.T @ entries / 400, torch.eye(12), atol=1e-5)


def test_small_eigenvalues_are_raised_to_the_floor():
    rows = correlated(500, 20)
    found = fit_whitening(rows, 20, floor=0.1)
    expected = reference(rows, 20, floor=0.1)[2]
    assert (np.diff(expected) == 0).sum() > 5
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-6)
    np.testing.assert_allclose(gram(whiten(rows, found)), gram(whitened(rows, 20, 0.1)), atol=1e-5)


# ============ blocks ============


def facts(whitening):
    return [getattr(whitening, name).numpy() for name in FIELDS]


@pytest.mark.parametrize("shape", [(300, 9), (5000, 4), (130, 600)])
def test_neither_blocks_nor_the_order_of_rows_change_a_bit(monkeypatch, shape):
    rows = correlated(*shape)
    expected = fit_whitening(rows, 5)
    found = whiten(rows, expected)
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    assert all(map(np.array_equal, facts(fit_whitening(rows[shuffled], 5)), facts(expected)))
    assert torch.equal(whiten(rows[shuffled], expected), found[shuffled])
    assert torch.equal(whiten(rows[50:77], expected), found[50:77])
    monkeypatch.setattr(pca, "block_rows", lambda *_: 64)
    monkeypatch.setattr(pca, "COLUMNS", 100)
    assert all(map(np.array_equal, facts(fit_whitening(rows, 5)), facts(expected)))


@pytest.mark.parametrize("total, bits", [(1000, 20), (2**22 - 1, 20), (2**22, 19), (10**8, 17)])
def test_sums_keep_as_many_bits_of_a_feature_as_the_number_of_rows_allows(total, bits):
    rows = correlated(1000, 6)
    low, high = rows.double().amin(0), rows.double().amax(0)
    middle, half_range = (low + high) / 2, (high - low) / 2
    mean, covariance = pca._moments(rows, middle, half_range, total)
    step = 2.0 ** (half_range.log2().ceil() - bits)
    centred = ((rows.double() - middle) / step).round()
    assert centred.abs().max() <= 2**bits and total * 4**bits < 2**62
    shift = centred.sum(0) / total
    np.testing.assert_allclose(mean, middle + shift * step, rtol=1e-12)
    expected = (centred.T @ centred / total - torch.outer(shift, shift)) * step * step[:, None]
    np.testing.assert_allclose(covariance.tril(), expected.tril(), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_memory_mapped_features_are_whitened_into_a_memory_mapped_file(tmp_path, dtype):
    rows = correlated(5000, 16).numpy().astype(dtype)
    files = [np.memmap(tmp_path / "in", dtype, "w+", shape=rows.shape)]
    files.append(np.memmap(tmp_path / "out", np.float32, "w+", shape=(5000, 6)))
    files[0][:] = rows
    files[0].flush()
    read = torch.from_numpy(np.memmap(tmp_path / "in", dtype, "r+", shape=rows.shape))
    out = torch.from_numpy(files[1])
    whitening = fit_whitening(read, 6)
    assert whiten(read, whitening, out=out) is out
    files[1].flush()
    kept = np.memmap(tmp_path / "out", np.float32, "r", shape=(5000, 6))
    assert np.array_equal(kept, whiten(torch.from_numpy(rows).float(), whitening))
    np.testing.assert_allclose(gram(kept[:500]), gram(whitened(rows, 6)[:500]), atol=1e-5)
    half = torch.empty(5000, 6, dtype=torch.float16)
    assert torch.equal(whiten(read, whitening, half, "cpu"), torch.from_numpy(kept.copy()).half())


# ============ extremes ============


@pytest.mark.parametrize("scale", [1e-33, 1e-30, 1e-10, 1e10, 1e30, 3e37])
def test_whitened_rows_do_not_depend_on_the_scale_of_the_features(scale):
    rows = correlated(200, 10)
    scale = 2.0 ** round(np.log2(scale))
    expected, found = fit_whitening(rows, 10), fit_whitening(rows * scale, 10)
    assert torch.equal(whiten(rows * scale, found), whiten(rows, expected))
    np.testing.assert_allclose(found.eigenvalues / scale / scale, expected.eigenvalues, rtol=1e-12)


def test_denormal_features_give_unit_rows():
    rows = correlated(200, 10) * 1e-42
    lengths = whiten(rows, fit_whitening(rows, 10)).norm(dim=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_a_mean_far_from_zero_costs_no_digit():
    rows = correlated(300, 8) + torch.logspace(2, 6, 8)  # in steps of up to 0.06
    found = whiten(rows, fit_whitening(rows, 5))
    np.testing.assert_allclose(gram(found), gram(whitened(rows, 5)), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_equal_their_float32_values(dtype):
    rows = correlated(200, 10).to(dtype)
    found, expected = fit_whitening(rows, 4), fit_whitening(rows.float(), 4)
    assert all(map(np.array_equal, facts(found), facts(expected)))
    assert torch.equal(whiten(rows, found), whiten(rows.float(), found))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_and_smallest_numbers_of_a_type_give_finite_unit_rows(dtype):
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    rows = [[largest, -largest, tiny], [-largest, largest, 0], [0, tiny, tiny], [1, 1, -tiny]]
    rows = torch.tensor(rows, dtype=dtype)
    for some in (rows, rows[2:], rows[:, 2:], rows[:1]):
        whitening = fit_whitening(some, 3)
        assert all(np.isfinite(x).all() for x in facts(whitening))
        lengths = whiten(rows[:, -some.shape[1] :], whitening).norm(dim=1)
        assert ((lengths - 1).abs().lt(1e-5) | (lengths == 0)).all(), lengths
        assert whiten(some, whitening).isfinite().all()


def test_features_without_variance_stay_out_and_rows_without_any_are_zero():
    rows = correlated(300, 8)
    held = torch.cat([rows, torch.full((300, 3), 7.3)], dim=1)
    held[:, 9] = 0
    found = fit_whitening(held, 8)
    assert not found.components[:, 8:].abs().gt(1e-9).any()
    np.testing.assert_allclose(gram(whiten(held, found)), gram(whitened(rows, 8)), atol=1e-5)
    for value in (0.0, 0.1, 3e38, 1e-44):
        equal = torch.full((50, 6), value)
        found = fit_whitening(equal, 4)
        assert not whiten(equal, found).any() and not found.eigenvalues.any()
        assert not whiten(equal[:1], fit_whitening(equal[:1], 4)).any()
        assert whiten(torch.eye(6) * 2, found).isfinite().all()


def test_fewer_rows_than_features_leave_the_rest_at_the_floor():
    rows = correlated(6, 40)
    found = fit_whitening(rows, 20)
    np.testing.assert_allclose(found.eigenvalues[5:], found.eigenvalues[0] * 1e-5, rtol=1e-9)
    np.testing.assert_allclose(gram(whiten(rows, found)), gram(whitened(rows, 5)), atol=1e-5)


def test_an_outlier_leaves_the_other_directions_as_they_are():
    rows = correlated(2000, 6)
    rows[0, 0] = 3e3  # 2^-20 of which is 0.003
    found = fit_whitening(rows, 6, floor=1e-12)
    _, components, eigenvalues = reference(rows, 6, 1e-12)
    np.testing.assert_allclose(found.eigenvalues, eigenvalues, rtol=2e-3)
    np.testing.assert_allclose(gram(whiten(rows, found)), gram(whitened(rows, 6, 0)), atol=2e-3)


def test_inputs_are_left_as_they_were_and_autocast_changes_nothing():
    rows = correlated(100, 8).requires_grad_()
    copy = rows.detach().clone()
    expected = whiten(rows, fit_whitening(rows, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = whiten(rows, fit_whitening(rows, 3))
    assert torch.equal(found, expected) and torch.equal(rows, copy) and not found.requires_grad
    assert whiten(rows[:0], fit_whitening(rows, 3)).shape == (0, 3)


def test_bad_arguments_are_named():
    rows = correlated(9, 4)
    broken = rows.clone()
    broken[3, 2] = torch.nan
    for message, call in [
        ("0 dimensions", lambda: fit_whitening(rows, 0)),
        ("floor of 0 ", lambda: fit_whitening(rows, 2, 0)),
        ("floor of 1.5", lambda: fit_whitening(rows, 2, 1.5)),
        (r"features \(9,\)", lambda: fit_whitening(rows[:, 0], 2)),
        (r"features \(9, 0\)", lambda: fit_whitening(rows[:, :0], 2)),
        ("some of the 9 rows", lambda: fit_whitening(broken, 2)),
        ("some of the 9 rows", lambda: fit_whitening(rows - torch.eye(9, 4) * torch.inf, 2)),
        ("some of the 9 rows", lambda: fit_whitening(rows.double() * -1e300, 2)),
        ("the 0 rows", lambda: fit_whitening(rows[:0], 2)),
        (r"\(n, 4\), not \(9, 3\)", lambda: whiten(rows[:, 1:], fit_whitening(rows, 2))),
        (r"\(9, 3\) must be \(9, 2\)", lambda: whiten(rows, fit_whitening(rows, 2), rows[:, :3])),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ============ processes ============

SPLITS = {2: [(90, 110), (0, 200)], 4: [(70, 1, 0, 129), (50, 50, 50, 50)]}


def _clusters(rows):
    """The whitening of all rows, and a k-means of this process's whitened ones."""
    whitening = fit_whitening(rows, 6)
    mine = whiten(rows, whitening)
    start = initial_centroids(mine, 8, 0)
    centroids, assignments = euclidean_kmeans(mine, start, 5)
    return [*facts(whitening), centroids.numpy()], [mine.numpy(), assignments.numpy()]


def _rank_facts(rank, world_size):
    rows = correlated(200, 20)
    found = [_clusters(rows.split(sizes)[rank]) for sizes in SPLITS[world_size]]
    rows[150, 3] = torch.inf
    with pytest.raises(ValueError) as error:
        fit_whitening(rows.tensor_split(world_size)[rank], 4)
    with pytest.raises(ValueError) as empty:
        fit_whitening(rows[:0], 4)
    return found, [str(error.value), str(empty.value)]


@pytest.mark.parametrize("world_size", SPLITS)
def test_any_number_of_processes_gives_the_same_bits_and_then_the_same_clusters(world_size):
    ranks = run_ranks(_rank_facts, world_size)
    shared, mine = _clusters(correlated(200, 20))
    for i, sizes in enumerate(SPLITS[world_size]):
        first = 0
        for (found, messages), size in zip(ranks, sizes, strict=True):
            assert all(map(np.array_equal, found[i][0], shared))
            parts = [whole[first : first + size] for whole in mine]
            assert all(map(np.array_equal, found[i][1], parts))
            first += size
            assert "200 rows" in messages[0] and "0 rows" in messages[1]


def test_a_whitening_can_be_put_together_from_what_was_saved():
    rows = correlated(50, 6)
    found = fit_whitening(rows, 3)
    again = Whitening(**{name: torch.from_numpy(getattr(found, name).numpy()) for name in FIELDS})
    assert torch.equal(whiten(rows, again), whiten(rows, found))


# ============ the second moment about 0 ============
def test_whitening_by_the_second_moment_gives_the_published_similarities(golden):
    arrays = golden("retrieval")
    features = torch.from_numpy(arrays["whiten_train"])
    whitening = fit_whitening(features, features.shape[1], centred=False)
    rows = [
        whiten(torch.from_numpy(arrays[name]), whitening) for name in ("whiten_query", "whiten_db")
    ]
    expected = torch.from_numpy(arrays["whiten_similarity"])
    torch.testing.assert_close(rows[0] @ rows[1].T, expected, atol=1e-3, rtol=0)
    of_covariance = fit_whitening(features, features.shape[1])
    torch.testing.assert_close(of_covariance.mean, whitening.mean)
    centred = [whiten(torch.from_numpy(arrays[n]), of_covariance) for n in ("whiten_query",) * 2]
    assert (centred[0] @ rows[1].T - expected).abs().max() > 0.01  # it is another one
