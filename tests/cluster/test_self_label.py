"""src.cluster.self_label: golden values, a plain reference, extremes of the input, processes."""

import logging
import logging.handlers
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.measure import peak_megabytes
from src.cluster import self_label
from src.cluster.self_label import reassignment_epochs, reassignment_times, self_labels
from tests.gloo import run_ranks
from tests.reference import assert_best, log_softmax, logsumexp


def data(num_rows, num_prototypes, dim=16, seed=0, dtype=torch.float32):
    """Rows of norm 1 around seven directions of unequal weight, and prototypes."""
    draws = np.random.default_rng(seed)
    centres = draws.normal(size=(7, dim))[draws.choice(7, num_rows, p=np.arange(1, 8) / 28)]
    rows = torch.from_numpy(centres + 0.5 * draws.normal(size=(num_rows, dim)))
    prototypes = torch.from_numpy(draws.normal(size=(num_prototypes, dim)))
    return tuple(F.normalize(x, dim=1).to(dtype) for x in (rows, prototypes))


def on_scores(scores, *args, **options):
    """self_labels of given scores (n, K)."""
    return self_labels(scores, torch.eye(scores.shape[1], dtype=scores.dtype), *args, **options)


def log_powers(scores, temperature, epsilon):
    """log P (N, K), in float64."""
    return log_softmax(np.asarray(scores, np.float64) / temperature) * temperature / epsilon


def plan_of(scores, found, temperature=0.1, epsilon=0.05):
    """diag(c) P diag(r), (N, K), in float64."""
    log_p = log_powers(scores, temperature, epsilon)
    return np.exp(log_softmax(log_p + found.log_scales.numpy())) / len(log_p)


def published(scores, temperature=0.1, epsilon=0.05, tolerance=0.1, max_iterations=10001):
    """The iterations as SeLa's section 3.1 writes them, on logarithms.

    Returns log (P diag(r)), whose largest entry of a row is its label, iterations, log r.
    """
    log_p = log_powers(scores, temperature, epsilon)
    num_rows, num_prototypes = log_p.shape
    log_c = np.full((num_rows, 1), -math.log(num_rows))
    for iteration in range(max_iterations):
        log_r = -math.log(num_prototypes) - logsumexp(log_p + log_c, 0)  # (1, K)
        before, log_c = log_c, -math.log(num_rows) - logsumexp(log_p + log_r, 1)  # (N, 1)
        if iteration % 10 == 0 and np.abs(np.expm1(before - log_c)).sum() <= tolerance:
            break
    return log_p + log_r, iteration + 1, log_r[0]


# ============ golden values ============
@pytest.mark.parametrize("case", ["lamb25", "lamb5"])
@pytest.mark.parametrize("head", [0, 1])
def test_labels_iterations_and_plan_equal_the_golden_ones(golden, case, head):
    arrays = golden("self_label")
    logits, power = arrays[f"{case}_logits"][head], float(arrays[f"{case}_lambda"])
    found = on_scores(torch.from_numpy(logits), 1.0, 1 / power)
    np.testing.assert_array_equal(found.labels, arrays[f"{case}_labels"][head])
    assert found.labels.dtype == torch.int64 and found.log_scales.dtype == torch.float64
    assert found.iterations == arrays[f"{case}_iterations"][head]
    np.testing.assert_allclose(found.error, arrays[f"{case}_final_error"][head], rtol=1e-9)
    plan = plan_of(logits, found, 1.0, 1 / power)
    # atol: the golden plan is float32, whose smallest numbers have no six digits
    np.testing.assert_allclose(plan, arrays[f"{case}_plan"][head], rtol=1e-5, atol=1e-37)


def test_the_times_of_assignments_equal_the_golden_ones(golden):
    arrays = golden("self_label")
    times = reassignment_times(int(arrays["opt_epochs"]), int(arrays["opt_nopts"]))
    np.testing.assert_allclose(np.array(times) * arrays["opt_N"], arrays["opt_times"], rtol=1e-12)


def test_assignments_wait_for_the_start_of_the_next_epoch():
    assert reassignment_epochs(20, 8) == [0, 1, 2, 4, 7, 11, 16]  # 21.01 (i / 7)^2, rounded up
    assert reassignment_epochs(5, 0) == [0, 1, 2, 3, 4]
    assert reassignment_epochs(5, 1) == [0]
    assert reassignment_epochs(1, 100) == [0]
    assert reassignment_epochs(6, 500) == [0, 1, 2, 3, 4, 5]


# ============ the same as the plain form ============
@pytest.mark.parametrize("shape", [(200, 12), (11, 40), (1, 5), (50, 1), (1, 1)])
@pytest.mark.parametrize("numbers", [(0.1, 0.05), (0.1, 0.02), (0.2, 0.3)])
def test_equals_the_plain_form_also_with_more_prototypes_than_rows(shape, numbers):
    embeddings, prototypes = data(*shape, dtype=torch.float64)
    found = self_labels(embeddings, prototypes, *numbers)
    log_plan, iterations, log_r = published(embeddings @ prototypes.T, *numbers)
    assert found.iterations == iterations
    assert_best(found.labels, log_plan, 1e-8)  # all prototypes tie where they share one row
    np.testing.assert_allclose(found.log_scales, log_r, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-8), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_a_small_tolerance_gives_every_prototype_its_share(dtype, rtol, epsilon):
    embeddings, prototypes = data(300, 20, dtype=dtype)
    found = self_labels(embeddings, prototypes, epsilon=epsilon, tolerance=1e-9)
    plan = plan_of(embeddings.double() @ prototypes.double().T, found, epsilon=epsilon)
    np.testing.assert_allclose(plan.sum(0), 1 / 20, rtol=rtol)
    # the vectors are float64 on a float32 kernel too, else the error would stay at 300 * 1e-7
    assert found.error <= 1e-9 and found.iterations % 10 == 1


def count_steps(monkeypatch):
    """Record which of the two ways each iteration takes."""
    steps = []
    for name in ("_scaling_step", "_logarithmic_step"):
        step = getattr(self_label.Plan, name)

        def counted(self, scales, name=name, step=step):
            steps.append(name)
            return step(self, scales)

        monkeypatch.setattr(self_label.Plan, name, counted)
    return steps


@pytest.mark.parametrize("near, far", [(20, 250), (2, 250), (20, 0.01)])
@pytest.mark.parametrize("max_bytes", [0, 2**30])
def test_a_kernel_made_once_or_often_and_logarithms_give_the_same(
    monkeypatch, near, far, max_bytes
):
    embeddings, prototypes = data(200, 12, dtype=torch.float64)
    log_plan, iterations, log_r = published(embeddings @ prototypes.T, 0.1, 0.01)
    monkeypatch.setattr(self_label, "NEAR", near)
    monkeypatch.setattr(self_label, "FAR", far)
    steps = count_steps(monkeypatch)
    found = self_labels(embeddings, prototypes, 0.1, 0.01, max_bytes=max_bytes)
    logarithmic = steps.count("_logarithmic_step")
    if near == 2:
        assert 1 < logarithmic < len(steps) / 2
    else:
        assert logarithmic == (1 if far == 250 else len(steps))
    assert found.iterations == iterations == len(steps)
    assert_best(found.labels, log_plan, 1e-8)
    np.testing.assert_allclose(found.log_scales, log_r, rtol=1e-8, atol=1e-8)


def test_the_error_of_every_iteration_is_the_same_by_kernels_and_logarithms(monkeypatch):
    embeddings, prototypes = data(100, 12, dtype=torch.float64)
    errors = []
    for near, far in [(20, 250), (2, 250), (20, 0.01)]:
        monkeypatch.setattr(self_label, "NEAR", near)
        monkeypatch.setattr(self_label, "FAR", far)
        found = [self_labels(embeddings, prototypes, 0.1, 0.01, 1e-9, n) for n in range(1, 26)]
        errors.append([each.error for each in found])
    np.testing.assert_allclose(errors[:2], [errors[2]] * 2, rtol=1e-9)


def test_a_float32_kernel_needs_no_more_iterations_than_float64():
    embeddings, prototypes = data(3000, 40)
    for epsilon in (0.05, 0.01):
        found = self_labels(embeddings, prototypes, epsilon=epsilon)
        expected = self_labels(embeddings.double(), prototypes.double(), epsilon=epsilon)
        assert found.iterations == expected.iterations > 30
        assert (found.labels == expected.labels).float().mean() > 0.999
        np.testing.assert_allclose(found.log_scales, expected.log_scales, rtol=0, atol=1e-4)


@pytest.mark.parametrize("block", [1, 100, 2**18])
def test_neither_blocks_nor_keeping_the_scores_change_the_result(monkeypatch, block):
    embeddings, prototypes = data(333, 20)
    log_plan, iterations, log_r = published(embeddings.double() @ prototypes.double().T)
    monkeypatch.setattr(self_label, "BLOCK", block)
    kept = self_labels(embeddings, prototypes)
    computed_anew = self_labels(embeddings, prototypes, max_bytes=0)
    assert torch.equal(kept.log_scales, computed_anew.log_scales)
    for found in (kept, computed_anew):
        assert_best(found.labels, log_plan, 1e-4)
        assert found.iterations == iterations
        np.testing.assert_allclose(found.log_scales, log_r, rtol=0, atol=1e-4)


def test_half_precision_is_multiplied_in_float32_and_float64_in_float64():
    embeddings, prototypes = data(200, 12)
    for dtype in (torch.float16, torch.bfloat16):
        half = self_labels(embeddings.to(dtype), prototypes)
        assert torch.equal(
            half.labels, self_labels(embeddings.to(dtype).float(), prototypes).labels
        )
    # 1e-9 is lost in float32, and makes each row prefer another prototype here
    scores = 1.0 + 1e-9 * torch.eye(6, dtype=torch.float64)
    assert on_scores(scores).labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_neither_autocast_nor_faster_products_around_the_call_change_anything(monkeypatch):
    embeddings, prototypes = data(200, 12)
    expected, mm, precisions = self_labels(embeddings, prototypes), torch.mm, set()

    def recorded(*args, **options):
        precisions.add(torch.get_float32_matmul_precision())
        return mm(*args, **options)

    monkeypatch.setattr(torch, "mm", recorded)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = self_labels(embeddings, prototypes)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precisions == {"highest"}
    assert torch.equal(found.log_scales, expected.log_scales)


def test_the_input_is_left_as_it_was_and_the_result_carries_no_gradient():
    embeddings, prototypes = data(60, 5)
    before = embeddings.clone(), prototypes.clone()
    found = self_labels(embeddings, prototypes.requires_grad_())
    assert not found.log_scales.requires_grad
    assert torch.equal(embeddings, before[0]) and torch.equal(prototypes, before[1])


def test_memory_does_not_grow_with_rows_times_prototypes(monkeypatch):
    monkeypatch.setattr(self_label, "BLOCK", 2**14)
    options = {"max_iterations": 3, "tolerance": 1e-300, "max_bytes": 0}
    peaks = []
    for num_rows in (1000, 4000):
        embeddings, prototypes = data(num_rows, 300, 8)
        peaks.append(
            peak_megabytes(lambda e=embeddings, p=prototypes: self_labels(e, p, **options))
        )
    assert (peaks[1] - peaks[0]) * 1e6 < 3000 * 32  # 28 bytes a row, not 300 * 4
    assert peaks[1] * 1e6 < 4000 * 32 + 2**14 * 32


# ============ extremes ============
def finite(found, num_prototypes):
    labels = found.labels
    assert 0 <= labels.min() and labels.max() < num_prototypes
    return math.isfinite(found.error) and found.log_scales.isfinite().all()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 10.0])
def test_finite_at_the_extremes_of_every_input_type(dtype, epsilon):
    largest = torch.finfo(dtype).max
    scores = torch.zeros(8, 5, dtype=dtype)
    scores[0] = largest
    scores[1] = -largest
    scores[2, 3] = largest
    scores[3, 1] = -largest
    scores[4] = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0])
    scores[5] = torch.tensor([largest, -largest, largest, -largest, 0.0], dtype=dtype)
    for temperature in (0.01, 0.1, 10.0):
        assert finite(on_scores(scores, temperature, epsilon, max_iterations=31), 5)


def test_scores_of_1e30_are_assigned_like_others():
    scores = data(40, 6)[0] @ data(40, 6)[1].T
    assert finite(on_scores(1e30 * scores, max_iterations=51), 6)
    # huge scores are no matter where the differences are moderate ones
    embeddings, prototypes = data(40, 6, dtype=torch.float64)
    shift = torch.zeros(40, 1, dtype=torch.float64)
    shift[::3] = 2.0**40
    tick = 2.0**-12  # such scores are exact with the shift
    scores = (embeddings @ prototypes.T).div(tick).round().mul(tick)
    found, expected = on_scores(scores + shift), on_scores(scores)
    assert torch.equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.log_scales, expected.log_scales, rtol=1e-12)


def test_a_row_of_huge_equal_scores_counts_as_one_of_zeros():
    scores = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    scores[7] = 0
    expected = on_scores(scores)
    scores[7] = 1e30
    found = on_scores(scores)
    assert torch.equal(found.labels, expected.labels)
    assert found.iterations == expected.iterations
    np.testing.assert_allclose(found.log_scales, expected.log_scales, rtol=1e-12)


@pytest.mark.parametrize("distance", [1.0, 1e4])
@pytest.mark.parametrize("epsilon", [0.05, 1e-3])
def test_a_prototype_far_from_all_rows_still_gets_its_share(distance, epsilon):
    scores = torch.rand(60, 4, generator=torch.Generator().manual_seed(1))
    scores[:, 2] = -distance
    found = on_scores(scores, 0.1, epsilon, 0.01)
    assert finite(found, 4)
    np.testing.assert_allclose(plan_of(scores, found, 0.1, epsilon).sum(0), 0.25, rtol=1e-3)
    assert torch.bincount(found.labels, minlength=4).tolist() == pytest.approx([15] * 4, abs=2)
    scores[:, 2] = -1e30
    assert finite(on_scores(scores, 0.1, epsilon), 4)


def test_equal_scores_give_equal_scales():
    found = on_scores(torch.full((9, 4), 0.3))
    assert found.iterations == 1 and found.error < 1e-12
    np.testing.assert_allclose(plan_of(np.full((9, 4), 0.3), found), 1 / 36, rtol=1e-12)
    pairs = data(50, 6)[0] @ data(50, 6)[1].T
    found = on_scores(torch.cat([pairs, pairs], 1))  # prototypes k and k + 6 are the same
    np.testing.assert_allclose(found.log_scales[:6], found.log_scales[6:], rtol=0, atol=1e-6)


def test_labels_that_tie_go_to_the_lowest_prototype():
    scores = torch.tensor([[0.0, 1.0, 0.5, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.5, 1.0, 1.0]])
    plan = self_label.Plan(scores, torch.eye(4), epsilon=0.5, max_bytes=0)
    assert plan.labels(torch.zeros(4, dtype=torch.float64)).tolist() == [1, 0, 2]
    assert plan.labels(torch.tensor([0, 0, 1, 0]).double()).tolist() == [1, 2, 2]


def test_scores_that_float32_cannot_hold_are_computed_in_float64():
    embeddings, prototypes = data(40, 6)
    expected = self_labels(1e3 * embeddings.double(), prototypes.double(), 100.0, 50.0)
    found = self_labels(1e23 * embeddings, 1e20 * prototypes, 1e42, 5e41)
    assert torch.equal(found.labels, expected.labels)
    assert found.iterations == expected.iterations


def test_an_empty_column_beyond_logarithms_stays_finite_and_is_no_end(caplog):
    scores = torch.zeros(4, 3, dtype=torch.float64)
    scores[:, 2] = -1e308  # divided by epsilon this is infinite
    found = on_scores(scores, tolerance=100.0, max_iterations=25)
    assert found.iterations == 25 and finite(found, 3) and found.error < 100
    assert "did not converge" in caplog.text


def test_the_error_stays_finite_where_rounding_moves_a_logarithm_by_thousands():
    scores = torch.zeros(8, 5, dtype=torch.float64)
    scores[:, 2] = -1e17  # / epsilon, its neighbours in float64 are 16384 apart, 13863 are added
    assert finite(on_scores(scores, 10.0, 1e-3, max_iterations=1), 5)


# ============ limits and errors ============
def test_the_limit_of_iterations_ends_with_a_warning_that_names_the_flags(caplog):
    embeddings, prototypes = data(300, 12)
    found = self_labels(embeddings, prototypes, 0.1, 0.01, max_iterations=4)
    scores = embeddings.double() @ prototypes.double().T
    log_plan, *_ = published(scores, 0.1, 0.01, tolerance=0.0, max_iterations=4)
    assert found.iterations == 4 and found.error > 0.1
    assert_best(found.labels, log_plan, 1e-4)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "--epsilon 0.01" in caplog.text and "--sinkhorn_tolerance 0.1" in caplog.text


def test_no_warning_where_the_tolerance_was_reached(caplog):
    self_labels(*data(300, 12), max_iterations=1, tolerance=1e9)
    self_labels(*data(300, 12))
    assert not caplog.records


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"epsilon": 0.0}, "--epsilon 0.0"),
        ({"epsilon": math.nan}, "--epsilon nan"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"tolerance": 0.0}, "--sinkhorn_tolerance 0.0"),
        ({"max_iterations": 0}, "max_iterations 0"),
        ({"embeddings": torch.ones(3, 2)}, r"not \(3, 2\) and \(2, 4\)"),
        ({"embeddings": torch.ones(4)}, r"not \(4,\)"),
        ({"prototypes": torch.ones(0, 4)}, r"\(0, 4\)"),
        ({"embeddings": torch.ones(0, 4)}, "memory bank is empty"),
        ({"embeddings": torch.tensor([[1.0, 2.0, math.nan, 0.0]])}, "finite"),
        ({"embeddings": torch.tensor([[1.0, 2.0, -math.inf, 0.0]])}, "finite"),
        ({"prototypes": torch.tensor([[1.0, 2.0, math.nan, 0.0]])}, "finite"),
        ({"embeddings": torch.full((3, 4), 1e308, dtype=torch.float64)}, "too large"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        self_labels(**{"embeddings": torch.ones(3, 4), "prototypes": torch.ones(2, 4), **arguments})


# ============ across processes ============
CASES = {
    "float32": {},
    "recomputed": {"max_bytes": 0},
    "far": {"max_iterations": 31},
    "kernels": {"epsilon": 0.01},
    "overflow on one": {"max_iterations": 11},
    "limit": {"epsilon": 0.01, "max_iterations": 3},
    "nan on one": {},
    "empty": {},
}


def case(name):
    embeddings, prototypes = data(120, 10, 8, seed=3)
    if name == "far":
        prototypes[4] *= 100
        prototypes[5] *= -100
    if name == "overflow on one":
        prototypes, embeddings[0] = 1e20 * prototypes, 1e20
    if name == "nan on one":
        embeddings[119] = math.nan
    return embeddings[: 0 if name == "empty" else None], prototypes


def label_my_rows(rank, world_size, splits):
    """What this rank gets from each of CASES in each split of the rows, and how often it warned.

    That is labels, iterations, error and log r, or the message.
    """
    results = {}
    said = logging.handlers.BufferingHandler(1000)
    self_label.logger.addHandler(said)
    for sizes in splits:
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for name, options in CASES.items():
            embeddings, prototypes = case(name)
            self_label.NEAR = 2.0 if name == "kernels" else 20.0
            try:
                found = self_labels(embeddings[rows], prototypes, **options)
                results[sizes, name] = found.labels.numpy(), *found[1:3], found.log_scales.numpy()
            except ValueError as error:
                results[sizes, name] = str(error)
    self_label.logger.removeHandler(said)
    return results, len(said.buffer)


@pytest.mark.slow
@pytest.mark.parametrize("splits", [[(60, 60), (120, 0)], [(30, 0, 77, 13)]], ids=str)
def test_processes_with_their_rows_equal_one_process_with_all(monkeypatch, splits):
    monkeypatch.setattr(self_label, "NEAR", self_label.NEAR)  # to be restored
    size = len(splits[0])
    shares = run_ranks(label_my_rows, size, splits)
    ((expected, warnings),) = run_ranks(label_my_rows, 1, [(120,)])
    assert warnings > 0
    assert [count for _, count in shares] == [warnings * len(splits)] + [0] * (size - 1)
    for (sizes, name), first in shares[0][0].items():
        parts, one = [results[sizes, name] for results, _ in shares], expected[(120,), name]
        if isinstance(one, str):
            assert parts == [one] * size
            continue
        embeddings, prototypes = case(name)
        scores = embeddings.double() @ prototypes.double().T
        log_plan = log_powers(scores, 0.1, CASES[name].get("epsilon", 0.05)) + one[3]
        # what float32 rounds, and float64 at 1e41, which "overflow on one" reaches
        tolerance = 1e-4 + 1e-12 * np.abs(log_plan).max(1)
        assert_best(one[0], log_plan, tolerance)
        assert_best(np.concatenate([part[0] for part in parts]), log_plan, tolerance)
        for part in parts:
            assert part[1] == one[1]
            np.testing.assert_allclose(part[2], one[2], rtol=1e-3)
            np.testing.assert_array_equal(part[3], first[3])
            np.testing.assert_allclose(part[3], one[3], rtol=1e-4, atol=1e-4)
