"""src.metrics: each health signal at its extremes, and the diagnosis of a run."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from src import metrics
from tests.gloo import run_ranks


def test_entropy_is_zero_for_one_hot_codes_and_ln_k_for_uniform_ones():
    assert metrics.code_entropy(torch.eye(7)).item() == 0
    assert metrics.code_entropy(torch.full((4, 7), 1 / 7)).item() == pytest.approx(math.log(7))


def test_usage_counts_the_prototypes_that_samples_choose():
    assert metrics.prototype_usage(torch.eye(8)).item() == pytest.approx(8)
    assert metrics.prototype_usage(torch.eye(8)[[3] * 20]).item() == pytest.approx(1)
    half = torch.eye(8)[[0, 1, 2, 3] * 5]
    assert metrics.prototype_usage(half).item() == pytest.approx(4)


def _usage_of_my_rows(rank, world_size):
    return metrics.prototype_usage(torch.eye(8)[rank::world_size]).item()


@pytest.mark.parametrize("world_size", [2, 4])
def test_usage_is_that_of_all_processes(world_size):
    assert run_ranks(_usage_of_my_rows, world_size) == pytest.approx([8] * world_size)


def test_std_is_one_on_the_sphere_and_zero_when_collapsed():
    torch.manual_seed(0)
    assert metrics.embedding_std(F.normalize(torch.randn(20000, 32), dim=1)) == pytest.approx(
        1, abs=0.01
    )
    assert metrics.embedding_std(torch.ones(10, 32) / math.sqrt(32)).item() < 1e-6


def test_rankme_is_the_number_of_directions_in_use():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16))[0]
    assert metrics.rankme(basis).item() == pytest.approx(16, rel=1e-3)
    assert metrics.rankme(basis[:5].repeat(8, 1)).item() == pytest.approx(5, rel=1e-2)
    assert metrics.rankme(torch.ones(10, 4)).item() == pytest.approx(1, rel=1e-2)
    assert math.isfinite(metrics.rankme(torch.zeros(10, 4)).item())


HEALTHY = {
    "loss": 3.0,
    "code_entropy": 1.0,
    "prototypes_used": 40,
    "embedding_std": 0.9,
    "batch": 256,
}


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"embedding_std": 0.01}, "same embedding"),
        ({"loss": math.log(60) + 1e-4}, "stays at ln\\(K\\)"),
        ({"code_entropy": math.log(60)}, "codes are uniform"),
        ({"prototypes_used": 1.5}, "only 1.5 of 60"),
    ],
)
def test_each_collapse_is_named_with_the_flags_that_help(change, words):
    found = metrics.diagnose([{**HEALTHY, **change}] * 10, 60)
    if words is None:
        assert found is None
    else:
        assert re.search(words, found) and "--" in found


def test_a_run_that_recovers_or_has_just_begun_is_not_diagnosed():
    bad = {**HEALTHY, "embedding_std": 0.01}
    assert metrics.diagnose([bad] * 9, 60) is None
    assert metrics.diagnose([bad] * 9 + [HEALTHY], 60) is None
