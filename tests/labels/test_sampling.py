"""src.labels.sampling: the published draws, equal shares of unequal clusters, and the order of an epoch."""

import time

import numpy as np
import pytest

from src.labels.sampling import PlannedSampler, uniform_over_clusters


def published(labels, total, rng):
    """A draw for each cluster in increasing order, then a shuffle, in the words of the paper."""
    clusters = [np.flatnonzero(labels == label) for label in sorted(set(labels[labels >= 0]))]
    share = total // len(clusters) + 1
    drawn = [rng.choice(members, share, replace=len(members) <= share) for members in clusters]
    drawn = np.concatenate(drawn)
    rng.shuffle(drawn)
    return drawn[:total]


@pytest.mark.parametrize("world_size", [1, 2])
def test_draws_equal_the_published_ones(golden, world_size):
    arrays = golden("deepercluster")
    total, seed = int(arrays["sampler_total"]), int(arrays["sampler_seed"])
    drawn = uniform_over_clusters(arrays["sampler_labels"], total, np.random.RandomState(seed))
    for rank in range(world_size):
        assert np.array_equal(drawn[rank::world_size], arrays[f"sampler_w{world_size}_r{rank}"])


def test_each_cluster_has_the_same_share_and_each_image_its_own_of_it(golden):
    arrays = golden("deepcluster")
    labels, total = arrays["sampler_labels"], int(arrays["sampler_N"])
    rng, runs = np.random.default_rng(0), 2000
    drawn = np.stack([uniform_over_clusters(labels, total, rng) for _ in range(runs)])
    counts = np.bincount(labels[drawn].flatten(), minlength=6) / runs
    np.testing.assert_allclose(counts, arrays["sampler_expected_counts"], rtol=0.01)
    np.testing.assert_allclose(counts, arrays["sampler_mean_counts_400runs"], rtol=0.03)
    images = np.bincount(drawn.flatten(), minlength=len(labels)) / runs
    np.testing.assert_allclose(images, arrays["sampler_expected_per_image"], rtol=0.15)
    for row in drawn[:50]:
        for cluster in np.flatnonzero(~arrays["sampler_replace"]):
            members = row[labels[row] == cluster]
            assert len(set(members)) == len(members) and cluster in labels


@pytest.mark.parametrize("rng", [np.random.RandomState, np.random.default_rng])
@pytest.mark.parametrize("total", [0, 1, 5, 60, 61, 1000])
def test_draws_equal_a_loop_over_the_clusters(rng, total):
    labels = np.random.default_rng(1).integers(-2, 9, 60) * 3
    labels[labels == 6] = -1  # empty
    drawn = uniform_over_clusters(labels, total, rng(7))
    assert drawn.dtype == np.int64 and drawn.shape == (total,)
    assert np.array_equal(drawn, published(labels, total, rng(7)))
    assert (labels[drawn] >= 0).all()
    assert np.array_equal(drawn, uniform_over_clusters(labels.astype(np.int32), total, rng(7)))


def test_one_image_is_a_cluster_and_a_cluster_of_just_its_share_is_drawn_with_replacement():
    assert uniform_over_clusters([-1, 3, -1], 4, np.random.default_rng(0)).tolist() == [1] * 4
    repeated = [
        len(set(uniform_over_clusters([0] * 5, 4, np.random.default_rng(s)))) for s in range(20)
    ]
    assert min(repeated) < 4  # the share is 5: drawn with replacement
    for seed in range(20):
        assert len(set(uniform_over_clusters([0] * 6, 4, np.random.default_rng(seed)))) == 4


@pytest.mark.slow
def test_a_million_images_in_10000_clusters_take_less_than_a_second():
    labels = np.random.default_rng(0).integers(0, 10_000, 1_300_000)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        drawn = uniform_over_clusters(labels, len(labels), np.random.RandomState(31))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1
    counts = np.bincount(labels[drawn], minlength=10_000)
    assert counts.max() == 131 and counts.sum() == 1_300_000


@pytest.mark.parametrize(
    "labels, total", [([], 3), ([-1, -1], 3), ([0, 1], -1), ([[0, 1]], 1), (3, 1)]
)
def test_nothing_to_draw_is_one_sentence(labels, total):
    with pytest.raises(ValueError, match=f"^{total} images cannot be drawn"):
        uniform_over_clusters(np.array(labels, dtype=int), total, np.random.default_rng(0))


# ============ the order of an epoch ============


def planned(order, batch_size, rank, world_size, start=0):
    sampler = PlannedSampler(batch_size, rank, world_size)
    sampler.set_epoch(3, order, start)
    items = list(sampler)
    assert len(items) == len(sampler)
    return items


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_processes_together_see_the_places_of_one(world_size):
    order = np.random.default_rng(0).integers(0, 100, (6, 8))
    whole = planned(order, 8, 0, 1)
    assert whole == [(3, index, place) for place, index in enumerate(order.flatten().tolist())]
    assert all(type(value) is int for item in whole for value in item)
    shares = order.reshape(6, world_size, -1)
    size = 8 // world_size
    parts = [planned(shares[:, r], size, r, world_size) for r in range(world_size)]
    batches = [part[i * size : (i + 1) * size] for i in range(6) for part in parts]
    assert [item for batch in batches for item in batch] == whole


@pytest.mark.parametrize("start", [0, 2, 6, 9])
def test_a_stopped_epoch_goes_on_with_the_places_it_would_have_had(start):
    order = np.arange(12).reshape(6, 2)
    assert planned(order, 2, 1, 3, start) == planned(order, 2, 1, 3)[2 * start :]


def test_an_epoch_before_the_first_is_empty_and_another_shape_is_named():
    sampler = PlannedSampler(4, 0, 1)
    assert len(sampler) == 0 and list(sampler) == []
    for shape in ((6, 3), (24,), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"must be \(iterations, 4\)"):
            sampler.set_epoch(0, np.zeros(shape, dtype=int))
