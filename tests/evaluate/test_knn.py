"""src.evaluate.knn and src.cluster.neighbours: golden votes, ties, extremes, blocks, processes, faiss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src.cluster import neighbours
from src.cluster.neighbours import nearest_neighbours
from src.evaluate.knn import few_label_accuracy, knn_accuracy, knn_votes
from tests.gloo import has_faiss, run_ranks
from tests.reference import assert_nearest, margins

needs_faiss = pytest.mark.skipif(not has_faiss(), reason="needs faiss")
BACKENDS = ["torch", pytest.param("faiss", marks=needs_faiss)]


def features_of(num, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num, dim, generator=generator), dim=1)


def reference_neighbours(train, queries, k):
    """Stable sort of the float64 product: (M, k) similarities and indices."""
    product = np.asarray(queries, np.float64) @ np.asarray(train, np.float64).T
    indices = np.argsort(-product, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(product, indices, 1), indices


def reference_votes(train, labels, queries, k, temperature, num_classes):
    similarities, indices = reference_neighbours(train, queries, k)
    votes = np.zeros((len(queries), num_classes))
    for row in range(len(queries)):
        for similarity, index in zip(similarities[row], indices[row], strict=True):
            votes[row, labels[index]] += np.exp(similarity / temperature)
    return votes


# ============ golden ============


@pytest.fixture
def knn_golden(golden):
    arrays = golden("dino_knn")
    names = ("train_features", "train_labels", "test_features")
    return arrays, [torch.from_numpy(arrays[name]) for name in names]


@pytest.mark.parametrize("backend", BACKENDS)
def test_votes_and_accuracy_equal_the_golden_ones(knn_golden, backend):
    arrays, inputs = knn_golden
    ks = arrays["ks"].tolist()
    temperature, num_classes = float(arrays["T"]), int(arrays["num_classes"])
    labels = torch.from_numpy(arrays["test_labels"])
    for k, votes in zip(ks, knn_votes(*inputs, ks, temperature, backend=backend), strict=True):
        assert votes.shape == (120, num_classes)
        np.testing.assert_allclose(votes.numpy(), arrays[f"k{k}_votes"], rtol=1e-5)
        np.testing.assert_array_equal(votes.argmax(1).numpy(), arrays[f"k{k}_pred"])
        golden_accuracy = [float(arrays[f"k{k}_top1"]), float(arrays[f"k{k}_top5"])]
        found = knn_accuracy(*inputs, labels, ks=[k], temperature=temperature, backend=backend)
        assert found[k] == pytest.approx(golden_accuracy, abs=1e-12)
        _, indices = nearest_neighbours(inputs[0], inputs[2], k, backend)
        expected = np.sort(arrays[f"k{k}_neighbors"], axis=1)
        np.testing.assert_array_equal(indices.sort(1).values.numpy(), expected)


def test_a_list_of_k_gives_the_votes_of_each_k_alone(knn_golden):
    _, inputs = knn_golden
    together = knn_votes(*inputs, k=[20, 3, 20, 1])
    for k, votes in zip([20, 3, 20, 1], together, strict=True):
        assert torch.equal(votes, knn_votes(*inputs, k=k))


# ============ search ============


@pytest.mark.parametrize("num_train", [1, 7, 64, 1003, 4099])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_neighbours_equal_a_float64_sort_for_every_block(num_train, k):
    train, queries = features_of(num_train), features_of(33, seed=1)
    product = queries.double() @ train.double().T
    for block in [(512, 2**16), (1, 2**16), (5, 1000), (100, 33)]:
        similarities, indices = nearest_neighbours(train, queries, k, block=block)
        assert_nearest(indices, product, 1e-6)
        np.testing.assert_allclose(similarities, product.gather(1, indices), atol=1e-6)


# Sums of quarters are exact in float32, so that equal similarities are equal however computed.
def tied_features(num, dim=6, seed=0):
    return torch.randint(-2, 3, (num, dim), generator=torch.Generator().manual_seed(seed)) / 4


@pytest.mark.parametrize("k", [1, 10, 60])
@pytest.mark.parametrize("block", [(512, 2**16), (7, 2**16), (64, 700), (64, 61)])
def test_ties_go_to_the_lowest_training_index(k, block):
    train, queries = tied_features(3001), tied_features(40, seed=1)
    _, expected = reference_neighbours(train, queries, k)
    found = nearest_neighbours(train, queries, k, block=block)[1]
    np.testing.assert_array_equal(found.numpy(), expected)


def test_features_of_a_collapsed_network_all_tie():
    train = torch.full((5000, 4), 0.5)
    similarities, indices = nearest_neighbours(train, train[:3], 10)
    assert torch.equal(indices, torch.arange(10).expand(3, -1))
    assert torch.equal(similarities, torch.ones(3, 10))


def test_negative_zero_ties_with_zero():
    train = torch.tensor([[-0.0], [0.0], [-1.0], [1.0]])
    _, indices = nearest_neighbours(train, torch.ones(1, 1), 4)
    assert indices.tolist() == [[3, 0, 1, 2]]
    keys = neighbours._keys(torch.tensor([-0.0, 0.0]), torch.tensor([1, 1]))
    assert keys[0] == keys[1]


def test_the_order_of_similarities_survives_the_keys_at_the_ends_of_float32():
    values = torch.tensor([3e38, 1.0, 1e-38, 0.0, -1e-38, -1.0, -3e38])
    keys = neighbours._keys(values, torch.arange(7))
    assert torch.equal(keys.sort(descending=True).values, keys)
    for index in (0, 1, 2**32 - 1):
        similarities, indices = neighbours._unpack(neighbours._keys(values, torch.tensor(index)))
        assert torch.equal(similarities, values) and (indices == index).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_type_are_compared_in_float32(dtype):
    train, queries = features_of(500).to(dtype), features_of(20, seed=1).to(dtype)
    similarities, indices = nearest_neighbours(train, queries, 5)
    expected = nearest_neighbours(train.float(), queries.float(), 5)
    assert torch.equal(similarities, expected[0]) and torch.equal(indices, expected[1])


def test_autocast_around_the_search_changes_nothing():
    train, queries = features_of(500), features_of(20, seed=1)
    expected = nearest_neighbours(train, queries, 5)[0]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = nearest_neighbours(train, queries, 5)[0]
        assert torch.get_float32_matmul_precision() == "medium"
        with neighbours.full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, expected)


def test_a_precision_set_by_backend_does_not_stop_the_search():
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this PyTorch has one way only")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        _, indices = nearest_neighbours(features_of(9), features_of(9), 1)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert torch.equal(indices[:, 0], torch.arange(9))


def test_no_more_than_a_block_of_the_product_is_held():
    from bench.measure import peak_megabytes

    train, queries = features_of(20000), features_of(2000, seed=1)  # the product: 160 MB
    peak = peak_megabytes(lambda: nearest_neighbours(train, queries, 20, block=(50, 20000)))
    assert 4 <= peak < 8  # a block is 4 MB


# ============ votes ============


@pytest.mark.parametrize("temperature", [0.07, 0.5, 10.0, float("inf")])
def test_votes_equal_their_definition_in_float64(temperature):
    train, queries = features_of(300), features_of(50, seed=1)
    labels = torch.randint(7, (300,), generator=torch.Generator().manual_seed(2))
    votes = knn_votes(train, labels, queries, 20, temperature, 9)
    expected = reference_votes(train, labels, queries, 20, temperature, 9)
    np.testing.assert_allclose(votes.numpy(), expected, rtol=1e-5)
    assert (votes[:, 7:] == 0).all()


@pytest.mark.parametrize("temperature", [0.0126, 0.01, 1e-3, 1e-10, 1e-37, 1e-45, 1e-300])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_tiny_temperature_still_predicts_the_nearest(temperature, sign):
    train, queries = features_of(300, dim=3), sign * features_of(50, dim=3, seed=1)
    labels = torch.arange(300) % 7
    votes = knn_votes(train, labels, queries, 20, temperature)
    assert votes.isfinite().all()
    expected = reference_votes(train, labels, queries, 20, max(temperature, 2e-3), 7).argmax(1)
    if temperature < 2e-3:  # only the nearest still counts
        expected = labels[reference_neighbours(train, queries, 1)[1][:, 0]].numpy()
    np.testing.assert_array_equal(votes.argmax(1).numpy(), expected)


def test_votes_of_a_query_opposite_to_every_training_row_do_not_vanish():
    train = torch.tensor([[-1.0, 0.0], [-0.999, 0.0]])
    votes = knn_votes(train, torch.tensor([0, 1]), torch.tensor([[1.0, 0.0]]), 2, temperature=1e-3)
    assert votes.isfinite().all() and votes.argmax(1).tolist() == [1]


def test_k_beyond_the_training_set_lets_all_rows_vote_and_says_so(caplog):
    train, queries, labels = features_of(6), features_of(4, seed=1), torch.arange(6) % 3
    with caplog.at_level("INFO"):
        votes = list(knn_votes(train, labels, queries, k=[2, 200]))
    np.testing.assert_allclose(votes[1], reference_votes(train, labels, queries, 6, 0.07, 3), 1e-5)
    np.testing.assert_allclose(votes[0], reference_votes(train, labels, queries, 2, 0.07, 3), 1e-5)
    assert "k = 200" in caplog.text and "6 training images" in caplog.text


def test_one_training_row_classifies_everything():
    votes = knn_votes(features_of(1), torch.tensor([2]), features_of(3, seed=1), 20)
    assert votes.shape == (3, 3) and votes.argmax(1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    train, queries = features_of(50), features_of(4, seed=1)
    labels = torch.arange(50) % 5
    assert torch.equal(
        knn_votes(train, labels.to(dtype), queries), knn_votes(train, labels, queries)
    )


def test_no_query_gives_no_vote():
    assert knn_votes(features_of(5), torch.arange(5), features_of(0)).shape == (0, 5)


NAN = torch.full((3, 16), float("nan"))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"k": 0}, "--nb_knn 0"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"num_classes": 3}, "0 .. 3 - 1"),
        ({"train_labels": torch.arange(5) - 1}, "labels -1 to 3"),
        ({"train_features": features_of(0), "train_labels": torch.arange(0)}, "training split"),
        ({"features": NAN}, "NaN"),
        ({"features": features_of(3, dim=8)}, "16 and 8"),
        ({"backend": "annoy"}, "torch or faiss"),
    ],
)
def test_what_is_wrong_is_named(changes, sentence):
    arguments = {
        "train_features": features_of(5),
        "train_labels": torch.arange(5),
        "features": features_of(3, seed=1),
    }
    with pytest.raises(ValueError, match=sentence):
        knn_votes(**{**arguments, **changes})


# ============ accuracy ============


def accuracy_of(votes, labels, monkeypatch, **options):
    """What knn_accuracy says where these are the votes, by one training row a class."""
    train = F.normalize(torch.ones(votes.shape[1], 2), dim=1)
    monkeypatch.setattr("src.evaluate.knn.knn_votes", lambda *rows, **_: iter([votes]))
    classes = torch.arange(votes.shape[1])
    return knn_accuracy(train, classes, train[:0], labels, ks=[1], **options)[1]


def test_accuracy_ranks_equal_votes_by_class(monkeypatch):
    votes = torch.tensor([[1.0, 3, 3, 0], [0, 0, 0, 0], [5, 1, 1, 1], [0, 0, 0, 2]])
    labels = torch.tensor([2, 1, 3, 3])  # ranks 1, 1, 3, 0
    found = accuracy_of(votes, labels, monkeypatch, top=(1, 2, 3, 4))
    assert found == [25.0, 75.0, 75.0, 100.0]
    order = votes.argsort(dim=1, descending=True, stable=True)
    expected = [100 * (order[:, :t] == labels[:, None]).any(1).double().mean() for t in (1, 2, 3)]
    assert accuracy_of(votes, labels, monkeypatch, top=(1, 2, 3)) == expected


def test_top_5_of_fewer_classes_and_of_labels_never_seen(monkeypatch):
    votes = torch.tensor([[1.0, 2], [2, 1], [0, 0]])
    with monkeypatch.context() as patch:
        assert accuracy_of(votes, torch.tensor([0, 0, 1]), patch)[1] == 100.0
        found = accuracy_of(votes, torch.tensor([7, 0, -1]), patch)
        assert found == pytest.approx([100 / 3, 100 / 3])
    accuracy = knn_accuracy(
        features_of(4), torch.tensor([0, 1, 0, 1]), features_of(4), torch.tensor([0, 1, 0, 5])
    )
    assert accuracy[10] == [pytest.approx(a) for a in (75.0, 75.0)]


def clusters(num, seed, num_classes=4):
    labels = torch.arange(num) % num_classes
    noise = torch.randn(num, 16, generator=torch.Generator().manual_seed(seed))
    return F.normalize(2 * torch.eye(16)[labels] + noise, dim=1), labels


def test_few_labels_take_that_many_of_each_class_and_repeat_by_seed():
    train, labels = clusters(200, 0)
    queries, targets = clusters(400, 1)
    results = few_label_accuracy(train, labels, queries, targets, 5, draws=6, seed=3)
    assert list(results) == [1, 5, 10] and all(len(r) == 2 for r in results.values())
    assert results == few_label_accuracy(train, labels, queries, targets, 5, draws=6, seed=3)
    assert results != few_label_accuracy(train, labels, queries, targets, 5, draws=6, seed=4)
    every = knn_accuracy(train, labels, queries, targets, [5])[5][0]
    mean, deviation = results[5]
    assert 25 < mean < every and 0 < deviation < 15  # chance is 25 %


def test_few_labels_with_all_the_labels_are_the_whole_training_set():
    train, labels = clusters(42, 0)  # 11, 11, 10, 10 of a class
    queries, targets = clusters(100, 1)
    results = few_label_accuracy(train, labels, queries, targets, 1000, draws=3)
    whole = knn_accuracy(train, labels, queries, targets, [1, 10, 20, 42])
    assert results == {k: (pytest.approx(whole[k][0]), 0.0) for k in (1, 10, 20, 42)}


def test_few_labels_draw_exactly_n_of_each_class(monkeypatch):
    seen = []

    def record(train, labels, *rest, **options):
        seen.append(labels.bincount().tolist())
        return knn_accuracy(train, labels, *rest, **options)

    monkeypatch.setattr("src.evaluate.knn.knn_accuracy", record)
    train, labels = clusters(42, 0)
    labels = torch.where(torch.arange(42) < 40, labels, 5)  # class 4 is absent, class 5 has 2 rows
    few_label_accuracy(train, labels, *clusters(10, 1), 3, draws=4)
    assert seen == [[3, 3, 3, 3, 0, 2]] * 4


@pytest.mark.parametrize("per_class, draws", [(0, 20), (5, 0)])
def test_few_labels_need_a_label_and_a_draw(per_class, draws):
    with pytest.raises(ValueError, match="at least 1"):
        few_label_accuracy(*clusters(20, 0), *clusters(20, 1), per_class, draws)


# ============ processes ============


def _of_my_share(rank, world_size, shares, data, backend):
    """Everything of this file from this rank's rows of training features and queries."""
    train_rows, query_rows = (range(sum(s[:rank]), sum(s[: rank + 1])) for s in shares)
    tied_train, train, labels = (torch.from_numpy(x)[list(train_rows)] for x in data[:3])
    tied_queries, queries, targets = (torch.from_numpy(x)[list(query_rows)] for x in data[3:])
    block = (8, 11)  # several blocks on every rank
    found = nearest_neighbours(tied_train, tied_queries, 12, backend, block)
    votes = knn_votes(tied_train, labels, tied_queries, [3, 12], backend=backend)
    accuracy = knn_accuracy(train, labels, queries, targets, [3, 12, 500], backend=backend)
    few = few_label_accuracy(train, labels, queries, targets, 2, draws=3, backend=backend)
    return [x.numpy() for x in (*found, *votes)], accuracy, few


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "train_shares, query_shares",
    [
        ((50, 50), (20, 20)),
        ((97, 3), (1, 39)),
        ((100, 0), (0, 40)),
        ((25, 25, 25, 25), (10, 10, 10, 10)),
        ((0, 5, 94, 1), (13, 0, 0, 27)),
    ],
)
def test_processes_with_their_rows_equal_one_process_with_all(train_shares, query_shares, backend):
    # Similarities that are exact in float32, and so do not depend on the shape of the product;
    # faiss may choose otherwise among ties, and gets features without any. Nor may the votes of
    # classes tie where an accuracy is compared.
    train, queries = features_of(100), features_of(40, seed=1)
    tied_train, tied_queries = tied_features(100), tied_features(40, seed=1)
    if backend == "faiss":
        tied_train, tied_queries = train, queries
    labels, targets = torch.arange(100) % 5, torch.arange(40) % 5
    for k in (3, 12, 100):
        votes = reference_votes(train, labels, queries, k, temperature=0.07, num_classes=5)
        assert (margins(votes) > 1e-4 * votes.max(1)).all()
    data = [x.numpy() for x in (tied_train, train, labels, tied_queries, queries, targets)]
    shares = (train_shares, query_shares)
    results = run_ranks(_of_my_share, len(train_shares), shares, data, backend)
    expected, accuracy, few = _of_my_share(0, 1, ((100,), (40,)), data, backend)
    for i, whole in enumerate(expected):
        found = np.concatenate([arrays[i] for arrays, _, _ in results])
        np.testing.assert_allclose(found, whole, rtol=1e-6, atol=1e-6)
    for _, rank_accuracy, rank_few in results:
        assert rank_accuracy == accuracy and rank_few == few


def _nan_on_one_rank(rank, world_size):
    features = features_of(6)
    if rank == 1:
        features[0, 0] = float("nan")
    try:
        nearest_neighbours(features_of(6), features, 2)
    except ValueError as error:
        return str(error)


def test_bad_features_on_one_rank_stop_all_ranks():
    assert all("NaN" in message for message in run_ranks(_nan_on_one_rank, 2))
