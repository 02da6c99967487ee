"""src.losses: value and gradient of the swapped prediction against float64 and autograd."""

import pytest
import torch

from src.losses import swapped_cross_entropy


def plain(scores, assignments, views, temperature):
    loss = 0
    for i, q in zip(views, assignments, strict=True):
        for v in range(len(scores)):
            if v != i:
                log_p = torch.log_softmax(scores[v] / temperature, -1)
                loss = loss - (q * log_p).sum(-1).mean()
    return loss


@pytest.mark.parametrize("shape", [(2, 3, 5), (8, 16, 30), (4, 2, 40000), (10, 700, 97)])
@pytest.mark.parametrize("views", [[0, 1], [1], [0]])
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
