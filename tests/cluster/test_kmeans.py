"""src.cluster.kmeans: golden values, exact sums, empty clusters, several processes, extremes of the input."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src.cluster import exact_sums, kmeans
from src.cluster.kmeans import assign, euclidean_kmeans, initial_centroids, spherical_kmeans
from tests.gloo import has_faiss, run_ranks
from tests.reference import assert_best

BOTH = pytest.mark.parametrize("cluster", [spherical_kmeans, euclidean_kmeans])


def unit_rows(n, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, size, generator=generator), dim=1)


def blobs(num_blobs, per_blob, size, noise=0.02, seed=0):
    """Unit rows (num_blobs * per_blob, size) in shuffled order, and the blob of each."""
    generator = torch.Generator().manual_seed(seed)
    centres = unit_rows(num_blobs, size, seed + 1)
    labels = torch.arange(num_blobs).repeat(per_blob)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    rows = centres[labels] + noise * torch.randn(len(labels), size, generator=generator)
    return F.normalize(rows, dim=1), labels


def closeness(features, centroids, spherical):
    """(n, K) in float64: x.c if spherical, else -|x - c|^2 / 2; the largest of a row is its label."""
    features, centroids = np.asarray(features, np.float64), np.asarray(centroids, np.float64)
    if spherical:
        return features @ centroids.T
    return -((features[:, None] - centroids[None]) ** 2).sum(2) / 2


def reference(features, centroids, iterations, spherical):
    """float64 k-means from the equations, with a loop over clusters: centroids, closeness."""
    features, centroids = features.astype(np.float64), centroids.astype(np.float64)
    for step in range(iterations + 1):
        scores = closeness(features, centroids, spherical)
        if step == iterations:
            return centroids, scores
        labels = scores.argmax(1)
        for k in set(labels):
            centroids[k] = features[labels == k].mean(0)
        if spherical:
            norms = np.linalg.norm(centroids, axis=1, keepdims=True)
            centroids = centroids / np.maximum(norms, 1e-12)


@pytest.mark.parametrize("case", ["plain", "empty", "duplicate"])
@pytest.mark.parametrize("head", [0, 1, 2])
def test_spherical_equals_the_golden_clusters(golden, case, head):
    arrays = golden("deepclusterv2_kmeans")
    bank = torch.from_numpy(arrays[f"{case}_bank"][int(arrays[f"{case}_bank_used{head}"])])
    start = torch.from_numpy(arrays[f"{case}_init_centroids{head}"])
    centroids, assignments = spherical_kmeans(bank, start, int(arrays["n_iters"]))
    # where two centroids differ in the last bit only, either label is right
    scores = closeness(bank, arrays[f"{case}_centroids{head}"], spherical=True)
    assert_best(assignments, scores, 1e-5)
    assert_best(arrays[f"{case}_assignments"][head][arrays[f"{case}_index"]], scores, 1e-5)
    np.testing.assert_allclose(centroids.numpy(), arrays[f"{case}_centroids{head}"], atol=1e-5)
    assert torch.equal(assign(bank, centroids, spherical=True), assignments)


@pytest.mark.parametrize("case, iterations", [("plain", 5), ("onestep", 1)])
def test_euclidean_equals_the_golden_clusters(golden, case, iterations):
    arrays = golden("deepercluster")
    rows, start = (torch.from_numpy(arrays[f"km_plain_{name}"]) for name in ("x", "init"))
    centroids, assignments = euclidean_kmeans(rows, start, iterations)
    scores = closeness(rows, arrays[f"km_{case}_centroids"], spherical=False)
    assert_best(assignments, scores, 1e-4)
    assert_best(arrays[f"km_{case}_labels"], scores, 1e-4)
    np.testing.assert_allclose(centroids.numpy(), arrays[f"km_{case}_centroids"], atol=1e-5)
    assert torch.equal(assign(rows, centroids, spherical=False), assignments)


def test_assignments_with_an_empty_cluster_equal_the_golden_ones(golden):
    arrays = golden("deepercluster")
    rows, start = (torch.from_numpy(arrays[f"km_empty_{name}"]) for name in ("x", "init"))
    labels = assign(rows, start, spherical=False)
    scores = closeness(rows, start, spherical=False)
    assert_best(labels, scores, 1e-4)
    assert_best(arrays["km_empty_niter0_labels_before_split"], scores, 1e-4)
    assert (labels.bincount(minlength=len(start)) == 0).sum() == 1
    _, assignments = euclidean_kmeans(rows, start, 5, empty="reseed")
    assert (assignments.bincount(minlength=len(start)) > 0).all()


@pytest.mark.parametrize("num_clusters", [3, 1023, 1024, 1100])
@pytest.mark.parametrize("spherical", [True, False])
def test_assignments_are_the_best_centroids_with_few_and_with_many(num_clusters, spherical):
    rows, centroids = unit_rows(900, 16), 1.5 * unit_rows(num_clusters, 16, seed=1)
    centroids[2] *= 0.9  # so that norms matter
    scores = closeness(rows, centroids, spherical)
    assert_best(assign(rows, centroids, spherical), scores, 1e-5)


@pytest.mark.parametrize("num_clusters", [5, 1200])
def test_ties_go_to_the_lowest_index(num_clusters):
    rows = unit_rows(50, 8)
    start = rows[:1].expand(num_clusters, -1).clone()
    assert not assign(rows, start, spherical=True).any()
    assert not assign(rows, start, spherical=False).any()
    start[: num_clusters // 2] *= -1  # in another group of columns
    expected = torch.where(rows @ rows[0] > 0, num_clusters // 2, 0)
    assert torch.equal(assign(rows, start, spherical=True), expected)


@pytest.mark.parametrize("iterations", [0, 1, 4])
@BOTH
def test_every_iteration_is_an_e_step_and_an_m_step_and_an_e_step_ends(cluster, iterations):
    rows, _ = blobs(6, 30, 12, noise=0.3)
    start = rows[:9] if cluster is spherical_kmeans else rows[:9] * 1.3
    expected = reference(rows.numpy(), start.numpy(), iterations, cluster is spherical_kmeans)
    centroids, assignments = cluster(rows, start, iterations)
    assert centroids.dtype == torch.float32 and assignments.dtype == torch.int64
    np.testing.assert_allclose(centroids.numpy(), expected[0], atol=1e-6)
    assert_best(assignments, expected[1], 1e-5)


def test_inputs_are_left_as_they_were_and_autocast_changes_nothing():
    rows, start = unit_rows(200, 8), unit_rows(5, 8, seed=1)
    rows.requires_grad_()
    copies = rows.detach().clone(), start.clone()
    expected = spherical_kmeans(rows, start)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = spherical_kmeans(rows, start)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(rows.detach(), copies[0]) and torch.equal(start, copies[1])
    assert not found[0].requires_grad
    columns = rows.detach().T.contiguous().T
    found = spherical_kmeans(columns, start)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ============ sums ============


@pytest.mark.parametrize("num_clusters", [1, 7, 1500])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 3e25])
def test_sums_are_exact_and_the_same_in_any_order(num_clusters, scale):
    rows = unit_rows(2000, 16) * scale
    rows[3, 2], rows[7] = scale, 0.0
    generator = torch.Generator().manual_seed(num_clusters)
    labels = torch.randint(num_clusters, (2000,), generator=generator)
    largest, smallest = kmeans.extent(rows)
    (exact,) = exact_sums.exact_rows(rows, largest, smallest).blocks()
    units = exact.double() * 2.0 ** (21 - largest)
    assert torch.equal(units, units.round()) and units.abs().max() <= 2**21
    assert (exact - rows).abs().max() <= 2.0 ** (largest - 22)
    expected = torch.zeros(num_clusters, 16, dtype=torch.int64).index_add_(0, labels, units.long())
    for order in (torch.arange(2000), torch.randperm(2000, generator=generator)):
        exact = exact_sums.exact_rows(rows[order], largest, smallest)
        sums, counts = exact_sums.member_sums(rows[order], exact, labels[order], num_clusters)
        assert torch.equal(sums, expected.double() * 2.0 ** (largest - 21))
        assert torch.equal(counts, labels.bincount(minlength=num_clusters))


def test_the_largest_entries_fill_a_bag_to_the_last_bit():
    rows = torch.full((80, 2), 1 - 2.0**-21)  # the largest multiple of the unit that is below 1
    exact = exact_sums.exact_rows(rows, *kmeans.extent(rows))
    sums, _ = exact_sums.member_sums(rows, exact, torch.zeros(80, dtype=torch.int64), 1)
    assert torch.equal(exact.kept[0], rows) and torch.equal(sums[0], rows.double().sum(0))


def test_sums_of_a_million_points_are_exact():
    rows = unit_rows(500, 4).repeat(2000, 1)  # float32 sums of these are wrong by 1e-3 and more
    exact = exact_sums.exact_rows(rows, *kmeans.extent(rows))
    zeros = torch.zeros(len(rows), dtype=torch.int64)
    sums, counts = exact_sums.member_sums(rows, exact, zeros, 1)
    expected = exact.kept[0][:500].double().sum(0) * 2000
    assert counts.item() == len(rows) and torch.equal(sums[0], expected)
    np.testing.assert_allclose(sums[0] / counts, rows[:500].double().mean(0), atol=1e-7)


def test_rows_of_very_different_lengths_are_not_rounded():
    rows = torch.tensor([[1e18, 1e18], [1e18, 1e18], [1.0, 2.0], [3.0, 4.0], [1e-8, 0.0]])
    start = torch.tensor([[1e18, 1e18], [1.0, 1.0]])
    centroids, assignments = euclidean_kmeans(rows, start, 1)
    assert assignments.tolist() == [0, 0, 1, 1, 1]
    torch.testing.assert_close(centroids[1], torch.tensor([4 / 3, 2.0]))
    for exponent, rounded in [(-1, True), (-5, True), (-6, False), (-90, False)]:
        rows = torch.tensor([[0.6, 0.0], [2.0**exponent / 1.3, 0.0], [0.0, 0.0]])
        assert (exact_sums.exact_rows(rows, *kmeans.extent(rows)) is not None) == rounded

    for value in (3e38, 1e-38):  # where units would be outside of float32
        rows = torch.full((9, 2), value)
        assert torch.equal(euclidean_kmeans(rows, rows[:1], 1)[0], rows[:1])


@pytest.mark.parametrize("factor", [1.0, 16.0, 1e5])
def test_means_are_as_fine_for_starts_far_away(factor):
    rows = unit_rows(1, 64)
    centroids, _ = euclidean_kmeans(rows, -rows * factor, 1)
    torch.testing.assert_close(centroids, rows, atol=2.0**-22, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18, 1e30])
def test_euclidean_clusters_do_not_depend_on_the_scale_of_the_features(scale):
    rows, start = unit_rows(300, 6), unit_rows(8, 6, seed=1)
    scale = 2.0 ** round(np.log2(scale))
    expected = euclidean_kmeans(rows, start, 5)
    centroids, assignments = euclidean_kmeans(rows * scale, start * scale, 5)
    assert torch.equal(assignments, expected[1])
    torch.testing.assert_close(centroids / scale, expected[0])


# ============ features that are too many to copy ============


@pytest.mark.parametrize("rows_at_once", [1, 7, 64, 5000])
@pytest.mark.parametrize("num_clusters", [5, 1100])
@BOTH
def test_sums_in_blocks_have_the_bits_of_the_whole_copy(
    monkeypatch, cluster, num_clusters, rows_at_once
):
    rows, start = unit_rows(1300, 12), unit_rows(num_clusters, 12, seed=1)
    expected = cluster(rows, start, 2, "reseed")
    monkeypatch.setattr(exact_sums, "WHOLE", 4 * rows_at_once * 12 * 4)
    exact = exact_sums.exact_rows(rows, *kmeans.extent(rows))
    assert (exact.kept is None) == (rows_at_once < 1300 / 4)
    lengths = [len(block) for block in exact.blocks()]
    assert sum(lengths) == 1300 and (exact.kept or max(lengths) == rows_at_once)
    assert all(map(torch.equal, cluster(rows, start, 2, "reseed"), expected))


@pytest.mark.parametrize("limit", [10_000, 2**30])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@BOTH
def test_memory_mapped_features_are_clustered_as_those_in_memory(
    tmp_path, monkeypatch, cluster, dtype, limit
):
    rows, start = unit_rows(900, 8).numpy().astype(dtype), unit_rows(20, 8, seed=1)
    file = np.memmap(tmp_path / "features", dtype, "w+", shape=rows.shape)
    file[:] = rows
    file.flush()
    read = torch.from_numpy(np.memmap(tmp_path / "features", dtype, "r+", shape=rows.shape))
    expected = cluster(torch.from_numpy(rows).float(), start, 3)
    monkeypatch.setattr(exact_sums, "WHOLE", limit)
    for device in (None, "cpu", torch.device("cpu")):
        found = cluster(read, start, 3, device=device)
        assert all(map(torch.equal, found, expected))
    spherical = cluster is spherical_kmeans
    assert torch.equal(assign(read, found[0], spherical, device="cpu"), expected[1])
    assert torch.equal(initial_centroids(read, 4, 0), initial_centroids(torch.tensor(rows), 4, 0))


# ============ a run that is stopped ============


def stopped_and_resumed(cluster, rows, start, iterations, empty, stop):
    """Clusters of a run that ends after the M-step `stop`, and goes on from what it saved."""
    saved = []

    def save(step, centroids):
        saved.append((step, centroids.clone()))
        if step == stop:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        cluster(rows, start, iterations, empty, on_step=save)
    assert [step for step, _ in saved] == list(range(stop + 1))
    return cluster(rows, saved[-1][1], iterations, empty, first_step=stop + 1)


@pytest.mark.parametrize("empty", ["keep", "reseed"])
@pytest.mark.parametrize("factor", [1.0, 1e5])
@BOTH
def test_a_stopped_run_goes_on_to_the_same_bits(cluster, empty, factor):
    rows, _ = blobs(10, 20, 8, noise=0.3)
    start = rows[:1].expand(12, -1) * factor
    expected = cluster(rows, start, 5, empty)
    for stop in range(5):
        found = stopped_and_resumed(cluster, rows, start, 5, empty, stop)
        assert all(map(torch.equal, found, expected)), stop


@BOTH
def test_each_m_step_hands_over_the_centroids_it_made(cluster):
    rows, start = unit_rows(100, 5), unit_rows(6, 5, seed=1)
    steps = []
    cluster(rows, start, 3, on_step=lambda step, centroids: steps.append((step, centroids)))
    assert [step for step, _ in steps] == [0, 1, 2]
    for step, centroids in steps:
        assert torch.equal(centroids, cluster(rows, start, step + 1)[0])
    cluster(rows, start, 0, on_step=lambda *_: steps.append(None))
    assert len(steps) == 3


# ============ empty clusters ============


@pytest.mark.parametrize("num_blobs", [2, 10, 40])
@pytest.mark.parametrize("offset", [0.0, 3.0])
@BOTH
def test_reseeding_fills_every_cluster_from_equal_starts(cluster, num_blobs, offset):
    if cluster is spherical_kmeans:
        rows, _ = blobs(num_blobs, 30, 16)
    else:
        rows = blobs(num_blobs, 30, 16)[0] + offset
    start = rows[:1].expand(num_blobs, -1)
    _, assignments = cluster(rows, start, 12, empty="reseed")
    assert (assignments.bincount(minlength=num_blobs) > 0).all()
    _, assignments = cluster(rows, start, 1)  # "keep": one more of the equal ones at a time
    assert assignments.max() <= 1


def test_the_largest_clusters_are_split_first_and_each_once():
    means = torch.eye(6, dtype=torch.float64)
    counts = torch.tensor([5.0, 0.0, 9.0, 0.0, 1.0, 0.0])
    after = kmeans._reseed(means, counts, True, 0, 0)
    assert torch.equal(after[[4, 5]], means[[4, 5]])  # the third empty one finds no donor
    for donor, taker in [(2, 1), (0, 3)]:
        torch.testing.assert_close((after[donor] + after[taker]) / 2, means[donor])
        assert 0.005 < (after[donor] - means[donor]).norm() < 0.02
        assert after[donor].norm().sub(after[taker].norm()).abs() < 1e-12
    assert not torch.equal(after, kmeans._reseed(means, counts, True, 1, 0))
    without = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    assert torch.equal(kmeans._reseed(means, without, True, 0, 0), means)


def test_a_cluster_around_the_origin_can_be_split():
    rows = torch.tensor([[-1.0], [1.0], [-1.5], [1.5]])
    centroids, assignments = euclidean_kmeans(rows, torch.zeros(2, 1), 3, empty="reseed")
    assert sorted(centroids.flatten().tolist()) == [-1.25, 1.25]
    assert assignments.bincount().tolist() == [2, 2]
    near, far = (
        euclidean_kmeans(rows, torch.tensor([[0.0], [start]]), 1, "reseed")[0] for start in (9, 1e5)
    )
    assert torch.equal(near, far) and near.any()  # a run that goes on does not know its start


# ============ starts ============


@pytest.mark.parametrize("method", ["random", "k-means++"])
@pytest.mark.parametrize("num_clusters", [1, 7, 50])
def test_starts_are_different_rows_and_the_seed_decides(method, num_clusters):
    rows = unit_rows(50, 5)
    start = initial_centroids(rows, num_clusters, 3, method)
    chosen = (start[:, None] == rows[None]).all(2).nonzero()[:, 1]
    assert start.shape == (num_clusters, 5) and len(set(chosen.tolist())) == num_clusters
    assert torch.equal(start, initial_centroids(rows, num_clusters, 3, method))
    assert not torch.equal(start, initial_centroids(rows, num_clusters, 4, method))


def test_random_starts_are_the_first_of_a_permutation():
    rows = unit_rows(20, 3)
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(5))[:4]
    assert torch.equal(initial_centroids(rows, 4, 5), rows[chosen])


def test_plus_plus_finds_all_blobs_of_which_random_misses_some():
    rows, labels = blobs(30, 10, 16, noise=1e-3)
    for seed in range(3):
        found = [
            assign(initial_centroids(rows, 30, seed, method), rows, False)
            for method in ("k-means++", "random")
        ]
        hit = [len(set(labels[rows_hit].tolist())) for rows_hit in found]
        assert hit[0] == 30 and hit[1] < 30


@pytest.mark.slow
def test_plus_plus_draws_by_squared_distance():
    rows = torch.tensor([[0.0], [1.0], [3.0]])
    drawn = torch.zeros(3, 3)
    for seed in range(600):
        first, second = initial_centroids(rows, 2, seed, "k-means++")[:, 0].tolist()
        drawn[[0.0, 1.0, 3.0].index(first), [0.0, 1.0, 3.0].index(second)] += 1
    expected = torch.tensor([[0, 1 / 10, 9 / 10], [1 / 5, 0, 4 / 5], [9 / 13, 4 / 13, 0]])
    np.testing.assert_allclose(drawn / drawn.sum(1, keepdim=True), expected, atol=0.1)
    assert drawn.sum(1).min() > 150


def test_draws_are_accepted_in_proportion_to_the_weights():
    weights = torch.tensor([0.0, 1.0, 4.0, 9.0, 0.0, 16.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    draw = kmeans._draw
    drawn = torch.cat([draw(weights, torch.arange(7), 7, generator) for _ in range(1500)])
    expected = 1500 * weights / weights.sum()
    deviations = (drawn.bincount(minlength=7) - expected).abs()
    assert (deviations <= 4 * expected.sqrt()).all(), deviations


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_plus_plus_takes_copies_only_when_nothing_else_is_left(scale):
    rows = torch.eye(3).repeat(4, 1) * scale
    start = initial_centroids(rows, 5, 0, "k-means++")
    assert len(start[:3].unique(dim=0)) == 3 and len(start) == 5
    rare = torch.zeros(200_000, 1)
    rare[123_456] = scale  # 32768 proposals miss it as a rule
    assert initial_centroids(rare, 2, 0, "k-means++").abs().max() == torch.tensor(scale)
    same = initial_centroids(torch.ones(6, 2), 6, 0, "k-means++", torch.arange(6))
    assert torch.equal(same, torch.ones(6, 2))


# ============ extremes ============


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@BOTH
def test_other_types_equal_their_float32_values(cluster, dtype):
    for lengths in (1.0, torch.logspace(-2, 2, 300)[:, None]):  # rounded for exact sums, or not
        rows = (unit_rows(300, 16).double() * lengths).to(dtype)
        start = initial_centroids(rows, 6, 0)
        assert start.dtype == torch.float32
        found, expected = cluster(rows, start.to(dtype)), cluster(rows.float(), start)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("empty", ["keep", "reseed"])
@BOTH
def test_finite_at_the_extremes_of_every_input_type(cluster, dtype, empty):
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    rows = torch.tensor(
        [[largest, largest], [-largest, largest], [0, 0], [tiny, 0], [1, 1], [0, -1]], dtype=dtype
    )
    for method in ("random", "k-means++"):
        start = initial_centroids(rows, 3, 0, method)
        centroids, assignments = cluster(rows, start, 4, empty)
        assert centroids.isfinite().all() and assignments.min() >= 0 and assignments.max() <= 2
    if cluster is euclidean_kmeans:
        assert len(set(assign(rows, rows[[0, 1, 4]], False)[[0, 1, 4]].tolist())) == 3


@pytest.mark.parametrize("empty", ["keep", "reseed"])
@BOTH
def test_equal_rows_zero_rows_one_cluster_and_as_many_clusters_as_rows(cluster, empty):
    equal = torch.full((9, 4), 0.5)
    centroids, assignments = cluster(equal, equal[:1].expand(3, -1), 3, empty)
    assert centroids.isfinite().all()
    # reseeding puts two centroids as far from them on either side: a tie
    assert empty == "reseed" or len(set(assignments.tolist())) == 1
    centroids, assignments = cluster(torch.zeros(5, 3), torch.zeros(2, 3), 3, empty)
    assert centroids.isfinite().all() and len(set(assignments.tolist())) == 1
    assert empty == "reseed" or not centroids.any()
    rows = unit_rows(12, 5)
    centroids, assignments = cluster(rows, rows[:1], 2, empty)
    mean = rows.double().mean(0)
    mean = F.normalize(mean, dim=0) if cluster is spherical_kmeans else mean
    torch.testing.assert_close(centroids[0], mean.float())
    centroids, assignments = cluster(rows, rows, 2, empty)
    assert torch.equal(assignments, torch.arange(12))
    torch.testing.assert_close(centroids, rows)
    line = torch.tensor([[1.0], [-1.0], [1.0]])
    assert cluster(line, line[:2], 2, empty)[1].tolist() == [0, 1, 0]


def test_bad_arguments_are_named():
    rows = unit_rows(5, 3)
    broken = rows.clone()
    broken[4, 1] = torch.inf
    for cluster in (spherical_kmeans, euclidean_kmeans):
        cases = [
            ("6 clusters of the 5 rows", (rows, rows[[0] * 6])),
            ("0 clusters of the 5 rows", (rows, rows[:0])),
            ("1 clusters of the 0 rows", (rows[:0], rows[:1])),
            ("'split'", (rows, rows[:2], 1, "split")),
            ("'numpy'", (rows, rows[:2], 1, "keep", "numpy")),
            ("iterations -1", (rows, rows[:2], -1)),
            ("first_step 4", (rows, rows[:2], 3, "keep", "torch", None, None, 4)),
            ("first_step -1", (rows, rows[:2], 3, "keep", "torch", None, None, -1)),
            (r"centroids \(2, 2\) must be \(K, 3\)", (rows, rows[:2, :2])),
            (r"shape \(n, D\), not \(3,\)", (rows[0], rows[:2])),
            ("finite features", (broken, rows[:2])),
            ("finite features", (broken * torch.nan, rows[:2])),
            ("finite features", (rows.double() * 1e300, rows[:2])),
            ("finite centroids", (rows, broken[4:])),
        ]
        for message, arguments in cases:
            with pytest.raises(ValueError, match=message):
                cluster(*arguments)
    for message, arguments in [
        ("6 clusters of the 5 rows", (rows, 6, 0)),
        ("'best'", (rows, 2, 0, "best")),
        ("finite features", (broken, 2, 0)),
        (r"number the 5 rows, not be \(4,\)", (rows, 2, 0, "random", torch.arange(4))),
        ("positions must ascend", (rows, 5, 0, "random", torch.arange(5) + 1)),
    ]:
        with pytest.raises(ValueError, match=message):
            initial_centroids(*arguments)


# ============ processes ============


SPLITS = {  # rows of each rank, and whether they take turns instead
    2: [((90, 110), False), ((100, 100), True), ((200, 0), False)],
    4: [((70, 1, 0, 129), False), ((50, 50, 50, 50), True)],
}


def _rows():
    return blobs(10, 20, 8, noise=0.2)[0]


def _clusters(rows, positions):
    """Everything by name: clusters from both starts, of this process's rows."""
    found = {}
    for method in ("random", "k-means++"):
        start = initial_centroids(rows, 12, 1, method, positions)
        found[f"{method} start"] = start.numpy()
        start[8:] = start[:4]  # four are empty at first
        for cluster in (spherical_kmeans, euclidean_kmeans):
            for empty in ("keep", "reseed"):
                name = f"{method} {cluster.__name__} {empty}"
                ways = {"": cluster(rows, start, 5, empty)}
                if method == "random":
                    ways[" in blocks"] = _in_blocks(cluster, rows, start, 5, empty)
                    ways[" resumed"] = stopped_and_resumed(cluster, rows, start, 5, empty, 1)
                for way, (centroids, assignments) in ways.items():
                    found[f"{name}{way} centroids"] = centroids.numpy()
                    found[f"{name}{way} mine"] = assignments.numpy()
    return found


def _in_blocks(cluster, *arguments):
    before, exact_sums.WHOLE = exact_sums.WHOLE, 1000  # bytes: 7 rows
    try:
        return cluster(*arguments)
    finally:
        exact_sums.WHOLE = before


def _faiss_clusters(rows, start):
    found = []
    for cluster in (spherical_kmeans, euclidean_kmeans):
        found += [x.numpy() for x in cluster(rows, start, 3, backend="faiss")]
    return found


def _errors(rank):
    rows = unit_rows(4, 3, seed=rank)
    broken = rows.clone()
    broken[0, 0] = torch.nan if rank else 1.0
    messages = []
    for call in (
        lambda: spherical_kmeans(broken, rows[:2], 1),
        lambda: initial_centroids(broken, 2, 0),
        lambda: euclidean_kmeans(rows, rows[[0] * 20], 1),
        lambda: initial_centroids(rows, 8, 0, "random", torch.arange(4)),
    ):
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    return messages


def _rank_facts(rank, world_size, with_faiss):
    """What the tests below compare, of one rank: processes are started once for all of it."""
    rows, clusters = _rows(), []
    for sizes, strided in SPLITS[world_size]:
        at = torch.arange(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        if strided:
            at = torch.arange(rank, len(rows), world_size)
        clusters.append((at.numpy(), _clusters(rows[at], at if strided else None)))
    uneven = rows * torch.logspace(0, 6, len(rows))[:, None]  # too much so to be rounded
    at = torch.arange(rank, len(rows), world_size)
    plain = euclidean_kmeans(uneven[at], uneven[::20], 5)
    facts = {"clusters": clusters, "plain": [x.numpy() for x in plain], "errors": _errors(rank)}
    if with_faiss:
        facts["faiss"] = _faiss_clusters(rows.tensor_split(world_size)[rank], rows[:5])
    return facts


@pytest.fixture(scope="module")
def ranks():
    """_rank_facts by the number of processes."""
    return {size: run_ranks(_rank_facts, size, has_faiss()) for size in SPLITS}


@pytest.mark.parametrize("world_size", SPLITS)
def test_any_number_of_processes_gives_the_same_bits(ranks, world_size):
    expected = _clusters(_rows(), None)
    for facts in ranks[world_size]:
        for at, found in facts["clusters"]:
            for name, value in found.items():
                plain = name.replace(" in blocks", "").replace(" resumed", "")
                whole = expected[plain][at] if name.endswith("mine") else expected[plain]
                assert np.array_equal(value, whole), name


@pytest.mark.parametrize("world_size", SPLITS)
def test_sums_that_are_not_exact_agree_between_processes_as_float32_does(ranks, world_size):
    uneven = _rows() * torch.logspace(0, 6, 200)[:, None]
    assert exact_sums.exact_rows(uneven, *kmeans.extent(uneven)) is None
    centroids, assignments = euclidean_kmeans(uneven, uneven[::20], 5)
    for rank, facts in enumerate(ranks[world_size]):
        np.testing.assert_allclose(facts["plain"][0], centroids, rtol=1e-6)
        assert np.array_equal(facts["plain"][1], assignments[rank::world_size])


def test_what_is_wrong_on_one_process_stops_all(ranks):
    messages = [facts["errors"] for facts in ranks[2]]
    assert messages[0] == messages[1]
    assert "finite" in messages[0][0] and "20 clusters of the 8 rows" in messages[0][2]


@pytest.mark.parametrize("world_size", [1, *SPLITS])
def test_faiss_agrees(ranks, world_size):
    pytest.importorskip("faiss")
    rows = _rows()
    shares = [_faiss_clusters(rows, rows[:5])]
    if world_size > 1:
        shares = [facts["faiss"] for facts in ranks[world_size]]
    for i, cluster in enumerate((spherical_kmeans, euclidean_kmeans)):
        centroids, expected = cluster(rows, rows[:5], 3)
        for share in shares:
            np.testing.assert_allclose(share[2 * i], centroids, atol=1e-6)
        assignments = np.concatenate([share[2 * i + 1] for share in shares])
        scores = closeness(rows, centroids, cluster is spherical_kmeans)
        assert_best(assignments, scores, 1e-5)
        assert_best(expected, scores, 1e-5)


def test_faiss_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    rows = unit_rows(5, 3)
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        spherical_kmeans(rows, rows[:2], backend="faiss")
