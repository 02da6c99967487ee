"""main_deepclusterv2: the loss against float64, the assignment phase against the published numbers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import main_deepclusterv2
from main_deepclusterv2 import IGNORED, MemoryBank, PseudoLabels, assign_clusters, deepcluster_loss
from tests.gloo import run_ranks
from tests.reference import assert_best

TEMPERATURE = 0.1


def reference(scores, labels, temperature):
    """Eq. 8, 9 written out: mean over heads, crops and labelled images; float64."""
    total, heads = 0.0, len(scores)
    for s, label in zip(scores, labels, strict=True):
        logits = s.double().view(-1, len(label), s.shape[1]) / temperature  # (V, B, K)
        terms = [
            torch.logsumexp(logits[v, b], 0) - logits[v, b, label[b]]
            for v in range(len(logits))
            for b in range(len(label))
            if label[b] != IGNORED
        ]
        total = total + torch.stack(terms).mean() / heads
    return total


def problem(num_crops=3, batch_size=8, sizes=(5, 7)):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(num_crops * batch_size, k, generator=generator) * 2 - 1 for k in sizes]
    labels = torch.stack([torch.randint(k, (batch_size,), generator=generator) for k in sizes])
    labels[:, [1, 6]] = IGNORED
    return [s.requires_grad_() for s in scores], labels


def check_loss(function):
    """Value and gradient against the equations in float64."""
    scores, labels = problem()
    loss = function(scores, labels, TEMPERATURE)
    gradients = torch.autograd.grad(loss, scores)
    expected = reference(scores, labels, TEMPERATURE)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for gradient, right in zip(gradients, torch.autograd.grad(expected, scores), strict=True):
        torch.testing.assert_close(gradient, right, atol=1e-6, rtol=1e-5)


def test_loss_and_gradient_equal_the_equations_in_float64():
    check_loss(deepcluster_loss)


def test_a_batch_without_any_label_has_no_loss_and_no_gradient():
    scores, labels = problem()
    loss = deepcluster_loss(scores, torch.full_like(labels, IGNORED), TEMPERATURE)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, scores))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_loss_is_finite_at_any_temperature_and_type(dtype):
    scores, labels = problem()
    for temperature in (1e-4, 1e4):
        typed = [s.detach().to(dtype).requires_grad_() for s in scores]
        loss = deepcluster_loss(typed, labels, temperature)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        assert all(torch.isfinite(s.grad).all() for s in typed)
    assert loss.item() == pytest.approx((np.log(5) + np.log(7)) / 2, abs=1e-3)


class Heads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, k) for k in (5, 7))

    def forward(self, x):
        return [layer(x) for layer in self.layers]


def _step(rank, world_size):
    """Loss, averaged over processes, and gradients of two heads on this process's images."""
    _, labels = problem()
    images = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1))  # (V, B, D)
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    heads = Heads()
    network = DistributedDataParallel(heads) if world_size > 1 else heads
    scores = network(images[:, mine].flatten(0, 1))
    loss = deepcluster_loss(scores, labels[:, mine], TEMPERATURE)
    loss.backward()
    mean = main_deepclusterv2.dist.all_reduce_sum(loss.detach()) / world_size
    return mean.item(), [p.grad.numpy() for p in heads.parameters()]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_with_unequal_numbers_of_labels_equal_one(world_size):
    expected, gradients = _step(0, 1)
    for loss, found in run_ranks(_step, world_size):
        assert loss == pytest.approx(expected, abs=1e-6)
        for a, b in zip(found, gradients, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("case", ["plain", "empty", "duplicate"])
def test_the_assignment_phase_equals_the_published_one(case, golden, monkeypatch):
    data = golden("deepclusterv2_kmeans")
    banks, indices = torch.from_numpy(data[f"{case}_bank"]), data[f"{case}_index"]
    bank = MemoryBank(len(banks), len(indices), 8, banks.shape[2], torch.device("cpu"))
    bank.push(torch.from_numpy(indices), banks)
    sizes = data[f"{case}_nmb_prototypes"].tolist()
    starts = iter([torch.from_numpy(data[f"{case}_init_centroids{h}"]) for h in range(len(sizes))])
    monkeypatch.setattr(main_deepclusterv2, "initial_centroids", lambda *_, **__: next(starts))
    prototypes = [torch.zeros(k, banks.shape[2]) for k in sizes]
    found = assign_clusters(
        bank,
        prototypes,
        iterations=int(data["n_iters"]),
        start="random",
        empty="keep",
        backend="torch",
        seed=31,
        epoch=0,
    )
    labels = PseudoLabels(len(sizes), int(data[f"{case}_size_dataset"]))
    labels.replace(bank.indices, found, 0)
    expected = data[f"{case}_assignments"]
    assert ((labels.labels.numpy() == IGNORED) == (expected == IGNORED)).all()
    for head, weight in enumerate(prototypes):
        right = data[f"{case}_centroids{head}"]
        np.testing.assert_allclose(weight.numpy(), right, atol=1e-5)
        rows = data[f"{case}_bank"][int(data[f"{case}_bank_used{head}"])]
        for assignments in (labels.labels.numpy()[head], expected[head]):
            assert_best(assignments[indices], rows.astype(float) @ right.T, 1e-5)


def _assigned(rank, world_size, start):
    bank = MemoryBank(2, 60, 24 // world_size, 6, torch.device("cpu"))
    rows = F.normalize(torch.randn(2, 48, 6, generator=torch.Generator().manual_seed(2)), dim=2)
    for batch in range(2):
        first = batch * 24 + rank * bank.batch_size
        mine = slice(first, first + bank.batch_size)
        bank.push(torch.arange(48)[mine], rows[:, mine])
    prototypes = [torch.zeros(5, 6), torch.zeros(4, 6)]
    found = assign_clusters(
        bank,
        prototypes,
        iterations=4,
        start=start,
        empty="keep",
        backend="torch",
        seed=31,
        epoch=7,
    )
    labels = PseudoLabels(2, 48)
    labels.replace(bank.indices, found, 0)
    return [p.numpy() for p in prototypes], labels.labels.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_clusters_are_the_same_on_any_number_of_processes(world_size):
    for start in ("random", "k-means++"):
        prototypes, labels = _assigned(0, 1, start)
        assert len(np.unique(labels[0])) > 1 and (prototypes[0][:4] != prototypes[1]).any()
        for others, found in run_ranks(_assigned, world_size, start):
            assert (found == labels).all()
            for a, b in zip(others, prototypes, strict=True):
                assert (a == b).all()
