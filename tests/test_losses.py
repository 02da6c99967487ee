"""src.losses: value and gradient of the swapped prediction against float64 and autograd."""

import pytest
import torch

from bench.measure import peak_megabytes
from src import losses
from src.losses import swapped_cross_entropy


def plain(scores, assignments, views, temperature):
    loss = 0
    for i, q in zip(views, assignments, strict=True):
        for v in range(len(scores)):
            if v != i:
                log_p = torch.log_softmax(scores[v] / temperature, -1)
                loss = loss - (q * log_p).sum(-1).mean()
    return loss


SHAPES = [(2, 3, 5), (8, 16, 30), (4, 2, 40000), (10, 700, 97), (3, 5, 66000), (2, 2, 200000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("views", [[0, 1], [1], [0], [1, 0]])
def test_value_and_gradient_equal_autograd_in_float64(shape, views):
    torch.manual_seed(0)
    scores = torch.randn(shape, requires_grad=True)
    # not normalised on purpose: the mass of a row of assignments is part of the gradient
    assignments = [torch.rand(shape[1:]) / shape[2] for _ in views]
    exact = scores.detach().double().requires_grad_()
    expected = plain(exact, [q.double() for q in assignments], views, 0.1)
    expected.backward()
    loss = swapped_cross_entropy(scores, assignments, views, 0.1)
    (3 * loss).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.grad.double() / 3, exact.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_at_the_extremes_of_the_scores(dtype):
    scores = torch.zeros(3, 2, 4, dtype=dtype)
    scores[0, 0, 0], scores[1, 0, 1], scores[2, 1, 2] = 6e4, -6e4, 6e4
    scores.requires_grad_()
    loss = swapped_cross_entropy(scores, [torch.full((2, 4), 0.25)], [0], 0.1)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(scores.grad).all()
    assert loss.dtype == torch.float32 and scores.grad.dtype == dtype


def test_without_gradient_only_the_value_is_computed():
    scores, q = torch.randn(3, 4, 5), torch.full((4, 5), 0.2)
    with torch.no_grad():
        loss = swapped_cross_entropy(scores, [q], [0], 0.1)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(scores, [q], [0], 0.1))


def test_a_second_backward_is_refused():
    scores = torch.randn(2, 3, 4, requires_grad=True)
    loss = swapped_cross_entropy(scores, [torch.full((3, 4), 0.25)], [0], 0.1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


@pytest.mark.parametrize("block", [1, 90, 97, 200, 1000, 2**24])
def test_value_and_gradient_do_not_depend_on_the_block(monkeypatch, block):
    torch.manual_seed(0)
    scores = torch.randn(6, 4, 90)
    q = list(torch.softmax(torch.randn(2, 4, 90), -1))

    def run():
        leaf = scores.clone().requires_grad_()
        loss = swapped_cross_entropy(leaf, q, [4, 1], 0.1)
        loss.backward()
        return loss.detach(), leaf.grad

    expected = run()
    monkeypatch.setattr(losses, "CPU_BLOCK", block)
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_computed_in_float32_and_rounded_once(dtype):
    torch.manual_seed(0)
    scores = torch.randn(4, 6, 3000).to(dtype).requires_grad_()
    q = list(torch.softmax(5 * torch.randn(2, 6, 3000), -1))
    exact = scores.detach().double().requires_grad_()
    expected = plain(exact, [x.double() for x in q], [0, 1], 0.1)
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):  # as a loss inside the autocast of a step
        loss = swapped_cross_entropy(scores, q, [0, 1], 0.1)
    loss.backward()
    assert loss.dtype == torch.float32 and scores.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    half_unit = torch.finfo(dtype).eps / 2  # of the last place: one rounding
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (scores.grad.double() - exact.grad).abs()
    # 1e-7: float32's own error where mass * softmax and the assignments cancel
    assert (error <= (1.01 * half_unit) * exact.grad.abs() + smallest + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_in_any_layout_are_left_as_they_are(dtype):
    torch.manual_seed(0)
    scores = torch.randn(7, 4, 3).to(dtype).permute(2, 1, 0).requires_grad_()  # (3, 4, 7)
    before, q = scores.detach().clone(), [torch.full((4, 7), 1 / 7)] * 2
    swapped_cross_entropy(scores, q, [0, 1], 0.1).backward()
    assert torch.equal(scores, before) and torch.equal(q[0], torch.full((4, 7), 1 / 7))
    contiguous = before.clone(memory_format=torch.contiguous_format).requires_grad_()
    swapped_cross_entropy(contiguous, q, [0, 1], 0.1).backward()
    torch.testing.assert_close(scores.grad, contiguous.grad)


def test_beyond_the_scores_only_the_gradient_and_a_block_are_held():
    scores = torch.randn(6, 8, 65536, requires_grad=True)
    q = list(torch.softmax(torch.randn(2, 8, 65536), -1))

    def step():
        swapped_cross_entropy(scores, q, [0, 1], 0.1).backward()
        scores.grad = None

    gradient = 4e-6 * scores.numel()
    assert gradient < peak_megabytes(step) < gradient + 4e-6 * losses.CPU_BLOCK + 0.1
