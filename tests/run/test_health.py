"""src.run.health: each health signal at its extremes, and alike on several processes."""

import math

import pytest
import torch
import torch.nn.functional as F

from src.run import health
from tests.gloo import run_ranks


def test_entropy_is_zero_for_one_hot_codes_and_ln_k_for_uniform_ones():
    assert health.code_entropy(torch.eye(7)).item() == 0
    assert health.code_entropy(torch.full((4, 7), 1 / 7)).item() == pytest.approx(math.log(7))


def test_usage_counts_the_prototypes_that_samples_choose():
    assert health.prototype_usage(torch.eye(8)).item() == pytest.approx(8)
    assert health.prototype_usage(torch.eye(8)[[3] * 20]).item() == pytest.approx(1)
    half = torch.eye(8)[[0, 1, 2, 3] * 5]
    assert health.prototype_usage(half).item() == pytest.approx(4)


def test_prototypes_within_the_distance_of_an_earlier_one_are_not_unique():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16))[0][:5]
    repeated = directions.repeat(40, 1) * torch.rand(200, 1) + 1e-5 * torch.randn(200, 16)
    assert health.count_unique(repeated) == 5  # of any length
    assert health.count_unique(directions) == 5 and health.count_unique(directions[:1]) == 1
    assert (
        health.count_unique(-directions.repeat_interleave(2, 0) * torch.tensor([[1], [-1]] * 5))
        == 10
    )
    angles = torch.linspace(0, 1, 11) * math.acos(1 - 0.025) * 10 * 0.999
    fan = torch.stack([angles.cos(), angles.sin()], 1)  # neighbours are within the distance
    assert health.count_unique(fan) == 6  # the first, the third, ...
    assert health.count_unique(fan, distance=0.02) == 11


@pytest.mark.parametrize("block", [1, 7, 512])
def test_unique_prototypes_are_those_of_a_plain_loop(block, monkeypatch):
    monkeypatch.setattr(health, "PROTOTYPES_AT_ONCE", block)
    torch.manual_seed(0)
    prototypes = torch.randn(90, 3)
    rows, unique = F.normalize(prototypes.double(), dim=1), []
    for row in rows:
        if all(row @ other < 1 - 0.025 for other in unique):
            unique.append(row)
    assert 10 < len(unique) < 90 and health.count_unique(prototypes) == len(unique)


def _usage_of_my_rows(rank, world_size):
    return health.prototype_usage(torch.eye(8)[rank::world_size]).item()


@pytest.mark.parametrize("world_size", [2, 4])
def test_usage_is_that_of_all_processes(world_size):
    assert run_ranks(_usage_of_my_rows, world_size) == pytest.approx([8] * world_size)


def test_std_is_one_on_the_sphere_and_zero_when_collapsed():
    torch.manual_seed(0)
    assert health.embedding_std(F.normalize(torch.randn(20000, 32), dim=1)) == pytest.approx(
        1, abs=0.01
    )
    assert health.embedding_std(torch.ones(10, 32) / math.sqrt(32)).item() < 1e-6


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(256, 128, 128), (64, 512, 64), (64, 512, 4)]
)
def test_rankme_is_that_of_the_singular_values(rows, columns, rank):
    torch.manual_seed(0)
    z = torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, columns).double()
    for x in (z, F.normalize(z, dim=1).float(), z[:1].repeat(rows, 1)):
        values = torch.linalg.svdvals(x.double())
        p = values / values.sum() + 1e-7
        expected = torch.special.entr(p).sum().exp().item()
        assert health.rankme(x).item() == pytest.approx(expected, rel=2e-6)


def test_rankme_is_the_number_of_directions_in_use():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16))[0]
    assert health.rankme(basis).item() == pytest.approx(16, rel=1e-3)
    assert health.rankme(basis[:5].repeat(8, 1)).item() == pytest.approx(5, rel=1e-2)
    assert health.rankme(torch.ones(10, 4)).item() == pytest.approx(1, rel=1e-2)
    assert math.isfinite(health.rankme(torch.zeros(10, 4)).item())
