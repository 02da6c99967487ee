"""src.optim: norms and clipping."""

from pathlib import Path

import numpy as np
import pytest
import torch

from src.optim import clip_gradients, grad_norm

GOLDEN = Path(__file__).parent / "golden"


def test_grad_norm_is_that_of_all_gradients_in_float32():
    arrays = [torch.randn(5, 3), torch.randn(7), torch.randn(2), torch.randn(4)]
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    params = [torch.nn.Parameter(a.to(d)) for a, d in zip(arrays, dtypes, strict=True)]
    for p in params[:3]:
        p.grad = 300 * torch.ones_like(p)  # squared in float16 this overflows
    norm = grad_norm(p for p in params)
    assert norm.shape == () and norm.dtype == torch.float32
    assert norm.item() == pytest.approx(300 * (15 + 7 + 2) ** 0.5, rel=1e-6)
    assert grad_norm(params[0]).item() == pytest.approx(300 * 15**0.5)
    assert grad_norm(params[3:]).item() == 0
    params[3].grad = torch.full((4,), float("nan"), dtype=torch.float64)
    norm = grad_norm(params)
    assert torch.isnan(norm) and norm.dtype == torch.float32


def test_clipping_equals_the_published_one():
    golden = np.load(GOLDEN / "dino_lars.npz")
    params = [torch.nn.Parameter(torch.zeros(golden[f"clip_grad{i}"].shape)) for i in range(3)]
    params.insert(1, torch.nn.Parameter(torch.zeros(3)))  # without a gradient
    for i, p in enumerate([params[0], params[2], params[3]]):
        p.grad = torch.from_numpy(golden[f"clip_grad{i}"])
    norms = clip_gradients(params, float(golden["clip_value"]))
    np.testing.assert_allclose(norms, golden["clip_norms"], rtol=1e-5)
    for i, p in enumerate([params[0], params[2], params[3]]):
        np.testing.assert_allclose(p.grad, golden[f"clipped_grad{i}"], rtol=1e-5)


def test_clipping_by_zero_only_measures_and_extremes_stay_finite():
    params = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(3)]
    for p, value in zip(params, (0.0, 1e-30, 1e18), strict=True):
        p.grad = torch.full((4, 4), value)
    clip_gradients(params, 0.0)
    assert [p.grad[0, 0].item() for p in params] == pytest.approx([0.0, 1e-30, 1e18])
    clip_gradients(params, 3.0)
    assert params[0].grad.abs().max() == 0 and params[1].grad[0, 0].item() == pytest.approx(1e-30)
    assert grad_norm(params[2]).item() == pytest.approx(3.0, rel=1e-5)
    assert len(clip_gradients([torch.nn.Parameter(torch.zeros(2))], 1.0)) == 0
