"""src.cluster.sinkhorn: golden values, extremes of the input types, several processes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src.cluster.sinkhorn import sinkhorn, sinkhorn_of_each
from tests import reference
from tests.gloo import run_ranks


@pytest.mark.parametrize("case", ["wide", "tall", "overflow", "underflow"])
@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_golden_assignments(golden, case, iterations, dtype):
    arrays = golden("swav_sinkhorn")
    q = sinkhorn(torch.from_numpy(arrays[f"{case}_scores"]), 0.05, iterations, dtype)
    assert q.dtype == dtype
    expected = arrays[f"{case}_expected_it{iterations}"]
    np.testing.assert_allclose(q.numpy(), expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(q.sum(1).numpy(), 1, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.05, 0.03, 0.011, 0.01, 0.005, 0.003])
def test_clustered_cosines_at_every_epsilon_equal_the_float64_reference(epsilon):
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(7, 16, generator=generator), dim=1)
    noise = 0.05 * torch.randn(300, 16, generator=generator)
    features = F.normalize(centres[torch.arange(300) % 7] + noise, dim=1)
    prototypes = F.normalize(torch.randn(40, 16, generator=generator), dim=1)
    scores = features @ prototypes.T
    expected = reference.sinkhorn(scores.numpy(), epsilon, 3)
    for bound in (None, 1.0):
        q = sinkhorn(scores, epsilon, 3, max_score=bound)
        np.testing.assert_allclose(q.numpy(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("epsilon", [1e-4, 0.01, 0.05, 1.0])
def test_finite_at_the_extremes_of_every_input_type(dtype, epsilon):
    largest = torch.finfo(dtype).max
    scores = torch.zeros(6, 5, dtype=dtype)
    scores[0] = largest
    scores[1] = -largest
    scores[2, 3] = largest
    scores[3, 1] = -largest
    scores[4] = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0])
    q = sinkhorn(scores, epsilon)
    assert torch.isfinite(q).all() and (q >= 0).all()
    torch.testing.assert_close(q.sum(1), torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_at_small_epsilon_equal_float32_arithmetic(dtype):
    scores = (torch.rand(32, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(dtype)
    expected = reference.sinkhorn(scores.float().numpy(), 0.01, 3)
    np.testing.assert_allclose(sinkhorn(scores, 0.01).numpy(), expected, atol=2e-5)


def test_a_prototype_that_no_sample_reaches_still_gets_its_share():
    scores = torch.zeros(8, 4)
    scores[:, 2] = -1.0  # exp(-1 / 0.005) is 0 in float32
    q = sinkhorn(scores, 0.005)
    torch.testing.assert_close(q.sum(0), torch.full((4,), 2.0))


def test_many_iterations_reach_the_equal_partition_of_eq_4():
    scores = torch.rand(64, 8, generator=torch.Generator().manual_seed(2))
    q = sinkhorn(scores, 0.05, 200)
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0), atol=1e-4, rtol=0)


def test_one_sample_and_one_prototype():
    assert sinkhorn(torch.tensor([[3.0]])).item() == 1.0
    torch.testing.assert_close(sinkhorn(torch.tensor([[3.0, -2.0]])), torch.full((1, 2), 0.5))


def test_the_scores_are_left_as_they_were_and_carry_no_gradient():
    scores = torch.rand(8, 4, requires_grad=True)
    before = scores.detach().clone()
    q = sinkhorn(scores)
    assert not q.requires_grad and torch.equal(scores.detach(), before)


@pytest.mark.parametrize(
    "arguments", [{"epsilon": 0.0}, {"epsilon": -1.0}, {"iterations": 0}, {"scores": torch.ones(3)}]
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match="sinkhorn needs"):
        sinkhorn(**{"scores": torch.ones(3, 2), **arguments})


def _sinkhorn_of_my_rows(rank, world_size, scores, sizes, epsilon, bound):
    start = sum(sizes[:rank])
    mine = torch.from_numpy(scores)[start : start + sizes[rank]]
    return sinkhorn(mine, epsilon, 3, max_score=bound).numpy()


@pytest.mark.parametrize("sizes", [(8, 8), (13, 3), (16, 0), (4, 4, 4, 4), (9, 1, 0, 6)])
@pytest.mark.parametrize(
    "scale, epsilon, bound", [(1, 0.05, 1.0), (1, 0.01, None), (50, 0.01, None)]
)
def test_processes_with_their_rows_equal_one_process_with_all(sizes, scale, epsilon, bound):
    scores = np.random.default_rng(0).uniform(-scale, scale, (16, 11)).astype(np.float32)
    shares = run_ranks(_sinkhorn_of_my_rows, len(sizes), scores, sizes, epsilon, bound)
    expected = sinkhorn(torch.from_numpy(scores), epsilon, 3).numpy()
    np.testing.assert_allclose(np.concatenate(shares), expected, atol=2e-6)


@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("epsilon", [0.0249, 2 / 701.3])
def test_processes_with_unequal_rows_take_the_same_branch_at_its_edge(epsilon, bound):
    """With 4 rows a process float32 (or float64) would do, with 40 it would not."""
    scores = np.random.default_rng(0).uniform(-1, 1, (44, 30)).astype(np.float32)
    scores[0, :2], scores[42, :2] = (-1, 1), (1, -1)
    shares = run_ranks(_sinkhorn_of_my_rows, 2, scores, (40, 4), epsilon, bound)
    np.testing.assert_allclose(
        np.concatenate(shares), reference.sinkhorn(scores, epsilon, 3), atol=2e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "epsilon", [0.05, 0.02, 0.001]
)  # the last one needs float64, or logarithms
def test_several_problems_have_the_bits_of_each(dtype, epsilon):
    generator = torch.Generator().manual_seed(0)
    problems = [torch.rand(50, 30, generator=generator) * 2 - 1 for _ in range(3)]
    codes = sinkhorn_of_each(problems, 1.0, 50, epsilon, 3, dtype)
    for problem, q in zip(problems, codes, strict=True):
        assert torch.equal(q, sinkhorn(problem, epsilon, 3, dtype, max_score=1.0, total_rows=50))
    with pytest.raises(ValueError, match="sinkhorn needs epsilon > 0"):
        sinkhorn_of_each(problems, 1.0, 50, 0.0)


def _several(rank, world_size, scores):
    """Codes of two problems, of my rows, and how many collectives they needed."""
    calls, all_reduce = [], torch.distributed.all_reduce

    def count(*args, **kwargs):
        calls.append(1)
        return all_reduce(*args, **kwargs)

    torch.distributed.all_reduce = count
    mine = [torch.from_numpy(x).chunk(world_size)[rank] for x in scores]
    codes = sinkhorn_of_each(mine, 1.0, len(scores[0]), 0.05, 3)
    return [q.numpy() for q in codes], len(calls)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_solve_several_problems_in_the_collectives_of_one(world_size):
    scores = np.random.default_rng(0).uniform(-1, 1, (2, 40, 16)).astype(np.float32)
    results = run_ranks(_several, world_size, scores)
    assert [calls for _, calls in results] == [3] * world_size
    for n, problem in enumerate(scores):
        together = np.concatenate([codes[n] for codes, _ in results])
        expected = sinkhorn(torch.from_numpy(problem), 0.05, 3).numpy()
        np.testing.assert_allclose(together, expected, atol=1e-6)
