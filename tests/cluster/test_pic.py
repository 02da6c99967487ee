"""src.cluster.pic: golden graphs and clusters, a dense reference, many nodes, processes, extremes."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src.cluster import pic
from src.cluster.pic import knn_graph
from src.cluster.pic import power_iteration_clustering as clusters
from tests.gloo import run_ranks
from tests.reference import assert_nearest


def unit_rows(n, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, size, generator=generator), dim=1)


def closeness(rows):
    """(n, n): minus the squared distances between all rows, in float64."""
    return -(rows[:, None].double() - rows[None].double()).square().sum(2).numpy()


def same_clusters(found, expected):
    """Whether both are the same partition, whatever the numbers of the clusters."""
    found, expected = np.asarray(found).tolist(), np.asarray(expected).tolist()
    return len(set(zip(found, expected, strict=True))) == len(set(found)) == len(set(expected))


def reference(ids, distances, sigma, alpha, iterations=200):
    """Peaks (N,) and clusters (N,) with a dense matrix and loops, in float64."""
    ids, n = np.asarray(ids), len(ids)
    weights = np.zeros((n, n))
    for i in range(n):
        weights[i, ids[i, 1:]] = np.exp(-np.asarray(distances, dtype=float)[i, 1:] / sigma**2)
    weights = weights + weights.T
    v = np.full(n, 1 / n)
    for _ in range(iterations):
        v = alpha * weights.T @ v + (1 - alpha) / n
        v /= v.sum()
    peaks = np.zeros(n, dtype=int)
    for i in range(n):
        node = i
        while True:
            gains = weights[node] * (v - v[node])
            if gains.max() <= 0:
                break
            node = gains.argmax()
        peaks[i] = node
    alone = np.bincount(peaks, minlength=n)[peaks] == 1
    joined = peaks.copy()
    for i in np.flatnonzero(alone):
        company = [j for j in ids[i, 1:] if not alone[j]]
        joined[i] = peaks[company[0]] if company else i
    return peaks, np.unique(joined, return_inverse=True)[1]


def raw_peaks(ids, distances, sigma, alpha, iterations=200):
    edges = pic._edges(ids, distances, sigma)
    return pic._peaks(*edges, pic._power_iteration(*edges, len(ids), alpha, iterations))


# ============ clusters ============


def test_the_golden_graph_is_found(golden):
    arrays = golden("deepcluster")
    rows = torch.from_numpy(arrays["pic_x"])
    ids, distances = knn_graph(rows, int(arrays["pic_nnn"]))
    for found in (ids, arrays["pic_I"]):  # two neighbours of one row tie but for 1e-7
        assert_nearest(found, closeness(rows), 1e-6)
    np.testing.assert_allclose(distances, arrays["pic_D"], atol=1e-6)


def test_clusters_equal_the_golden_ones(golden):
    arrays = golden("deepcluster")
    graph = torch.from_numpy(arrays["pic_I"]), torch.from_numpy(arrays["pic_D"])
    for name in ("pic", "pic2"):
        peaks = raw_peaks(*graph, float(arrays[f"{name}_sigma"]), float(arrays[f"{name}_alpha"]))
        assert same_clusters(peaks, arrays[f"{name}_raw_assign"])
    labels = clusters(*graph)
    assert same_clusters(labels, arrays["pic_final_assign"])
    assert labels.dtype == torch.int64 and labels.unique().tolist() == list(range(14))


@pytest.mark.parametrize("sigma, alpha", [(0.2, 0.001), (0.5, 0.001), (1.0, 0.5), (0.1, 0.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_clusters_equal_a_dense_reference(sigma, alpha, seed):
    ids, distances = knn_graph(unit_rows(150, 5, seed), 4)
    peaks, labels = reference(ids, distances, sigma, alpha)
    assert np.array_equal(raw_peaks(ids, distances, sigma, alpha), peaks)
    found = clusters(ids, distances, sigma, alpha)
    assert np.array_equal(found, labels)


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_as_many_iterations_as_asked_for_are_made(iterations):
    ids, distances = knn_graph(unit_rows(60, 4), 3)
    expected = reference(ids, distances, 0.5, 0.3, iterations)
    found = clusters(ids, distances, 0.5, 0.3, iterations)
    assert np.array_equal(found, expected[1])
    assert iterations or found.tolist() == list(range(60))


@pytest.mark.parametrize("alpha", [0.01, 0.9, 0.999])
def test_the_power_iteration_ends_early_only_where_it_stands(alpha):
    ids, distances = knn_graph(unit_rows(100, 5), 4)
    edges = pic._edges(ids, distances, 0.5)
    weights = torch.zeros(100, 100).double().index_put(edges[:2], edges[2])
    v = torch.full((100,), 0.01).double()
    for _ in range(200):
        v = alpha * weights @ v + (1 - alpha) / 100
        v /= v.sum()
    found = pic._power_iteration(*edges, 100, alpha, 200)
    torch.testing.assert_close(found, v, rtol=1e-12, atol=0)


def test_rows_of_blobs_far_apart_do_not_mix():
    centres = torch.eye(6).repeat_interleave(20, 0)
    rows = F.normalize(centres + 0.1 * unit_rows(120, 6), dim=1)
    labels = clusters(*knn_graph(rows, 5))
    blobs = torch.arange(6).repeat_interleave(20)
    assert all(len(set(blobs[labels == c].tolist())) == 1 for c in range(int(labels.max()) + 1))


def test_a_node_that_is_alone_joins_its_nearest_neighbour_that_is_not():
    neighbours = torch.tensor([[1, 2], [0, 2], [0, 1], [4, 1], [3, 5], [4, 3], [5, 0]])
    peaks = torch.tensor([0, 0, 0, 3, 4, 5, 6])
    ids = torch.cat([torch.arange(7)[:, None], neighbours], dim=1)
    joined = pic._without_singletons(peaks, ids)
    # 3 finds 4 alone and takes 1; 4 and 5 see none in company, as 3 was alone; 6 passes 5 over
    assert joined.tolist() == [0, 0, 0, 0, 4, 5, 0]


def test_pointers_go_to_the_lowest_of_equal_neighbours_and_nowhere_from_equal_ones():
    ids = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 0, 1]])
    equal = torch.zeros(3, 3)
    assert raw_peaks(ids, equal, 0.2, 0.1).tolist() == [0, 1, 2]
    edges = pic._edges(ids, equal, 0.2)
    assert pic._peaks(*edges, torch.tensor([3.0, 3.0, 1.0]).double()).tolist() == [0, 1, 0]


def test_a_long_way_up_is_followed_to_its_end():
    n = 1000
    sources, targets = torch.arange(n - 1), torch.arange(1, n)
    v = torch.arange(n, dtype=torch.float64)
    assert (pic._peaks(sources, targets, torch.ones(n - 1).double(), v) == n - 1).all()


def test_a_hundred_thousand_nodes_take_seconds():
    n, generator = 100_000, torch.Generator().manual_seed(0)
    neighbours = torch.randint(n, (n, 5), generator=generator)
    ids = torch.cat([torch.arange(n)[:, None], neighbours], dim=1)
    distances = torch.rand(n, 6, generator=generator).mul(0.1).sort(dim=1).values
    start = time.process_time()
    labels = clusters(ids, distances)
    assert time.process_time() - start < 3
    assert labels.unique().tolist() == list(range(int(labels.max()) + 1))


# ============ graphs ============


@pytest.mark.parametrize("size, k", [(4, 1), (30, 7), (200, 5), (3, 60)])
def test_neighbours_are_the_nearest_rows_of_any_length(size, k):
    rows = unit_rows(300, size) * torch.linspace(0.5, 2, 300)[:, None]
    ids, distances = knn_graph(rows, k)
    scores = closeness(rows)
    assert ids.shape == distances.shape == (300, k + 1) and ids.dtype == torch.int64
    assert_nearest(ids, scores, 1e-5)
    np.testing.assert_allclose(distances, -np.take_along_axis(scores, ids.numpy(), 1), atol=5e-6)
    assert distances.dtype == torch.float32 and not distances[:, 0].any()


def test_a_row_comes_first_among_its_copies_and_equals_by_their_number():
    rows = torch.ones(8, 3)
    ids, distances = knn_graph(rows, 2)
    assert ids.tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1]] + [[i, 0, 1] for i in range(3, 8)]
    assert not distances.any()
    assert clusters(ids, distances).max() < 7


def test_no_distance_is_below_zero():
    rows = unit_rows(50, 40).repeat(3, 1) * 1.3
    _, distances = knn_graph(rows, 4)
    assert distances.min() == 0 and distances[:, :3].max() < 1e-5


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_rows_are_all_neighbours(n):
    ids, distances = knn_graph(unit_rows(n, 3), 5)
    assert ids.shape == distances.shape == (n, n)
    assert ids.sort(dim=1).values.tolist() == [list(range(n))] * n
    assert len(clusters(ids, distances)) == n


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e18, 1e30])
def test_neighbours_do_not_depend_on_the_scale_of_the_features(scale):
    rows = unit_rows(100, 6)
    scale = 2.0 ** round(np.log2(scale))
    ids, distances = knn_graph(rows, 4)
    found = knn_graph(rows * scale, 4)
    assert torch.equal(found[0], ids)
    torch.testing.assert_close(found[1].double(), (distances.double() * scale**2).float().double())
    assert not found[1].isnan().any()
    clusters(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_equal_their_float32_values(dtype):
    rows = unit_rows(100, 6).to(dtype)
    found, expected = knn_graph(rows, 4, "cpu"), knn_graph(rows.float(), 4)
    assert all(map(torch.equal, found, expected))


def test_the_extremes_of_sigma_and_of_distances_give_clusters():
    ids, distances = knn_graph(unit_rows(50, 4), 3)
    for sigma in (1e-200, 1e-3, 1e3, 1e200):
        labels = clusters(ids, distances, sigma)
        assert labels.unique().tolist() == list(range(int(labels.max()) + 1))
        assert sigma > 1 or len(labels.unique()) == 50  # no weight is above 0: nobody moves
    far = distances * torch.inf
    far[:, 0] = 0
    assert clusters(ids, far).tolist() == list(range(50))


def test_bad_arguments_are_named():
    rows = unit_rows(9, 3)
    ids, distances = knn_graph(rows, 2)
    broken = rows.clone()
    broken[4, 1] = torch.nan
    for message, call in [
        ("0 neighbours", lambda: knn_graph(rows, 0)),
        (r"features \(9,\)", lambda: knn_graph(rows[:, 0])),
        ("finite features", lambda: knn_graph(broken)),
        ("finite features", lambda: knn_graph(rows / 0)),
        ("finite features", lambda: knn_graph(rows.double() * 1e300)),
        ("no training feature", lambda: knn_graph(rows[:0])),
        (r"\(9, 3\) and distances \(9, 2\)", lambda: clusters(ids, distances[:, 1:])),
        (r"ids \(0, 3\)", lambda: clusters(ids[:0], distances[:0])),
        ("sigma 0 ", lambda: clusters(ids, distances, 0)),
        ("alpha 1.0 ", lambda: clusters(ids, distances, 0.2, 1.0)),
        ("alpha -0.1 ", lambda: clusters(ids, distances, 0.2, -0.1)),
        ("iterations -1 ", lambda: clusters(ids, distances, 0.2, 0.1, -1)),
        ("0 .. 9 - 1", lambda: clusters(ids + 1, distances)),
        ("itself first", lambda: clusters(ids.flip(1), distances)),
        ("at least 0", lambda: clusters(ids, distances - 1)),
        ("at least 0", lambda: clusters(ids, distances * torch.nan)),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ============ processes ============

SPLITS = {2: [(90, 60), (0, 150)], 4: [(70, 1, 0, 79), (40, 40, 40, 30)]}


def _rows():
    return unit_rows(150, 6) * torch.logspace(-2, 2, 150)[:, None]


def _graph_and_clusters(rows):
    ids, distances = knn_graph(rows, 4)
    return ids.numpy(), distances.numpy(), clusters(ids, distances, 0.5).numpy()


def _rank_facts(rank, world_size):
    rows = _rows()
    found = [_graph_and_clusters(rows.split(sizes)[rank]) for sizes in SPLITS[world_size]]
    rows[100, 0] = torch.nan
    with pytest.raises(ValueError, match="finite features"):
        knn_graph(rows.tensor_split(world_size)[rank])
    return found


@pytest.mark.parametrize("world_size", SPLITS)
def test_every_process_has_the_graph_and_the_clusters_of_all_rows(world_size):
    expected = _graph_and_clusters(_rows())
    for found in run_ranks(_rank_facts, world_size):
        for ids, distances, labels in found:
            assert np.array_equal(ids, expected[0])
            np.testing.assert_allclose(distances, expected[1], atol=1e-2, rtol=1e-6)
            assert np.array_equal(labels, expected[2])
