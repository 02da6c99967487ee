"""LARC, LARS and gradient clipping on the device: golden trajectories."""

import numpy as np
import pytest
import torch

from src.optim import LARC, LARS, clip_gradients
from tests.gpu.host import relative_error, to_host

pytestmark = pytest.mark.gpu

RELATIVE = 1e-5  # of the largest entry of a tensor, as on a CPU


def parameters(arrays, names, device):
    tensors = [torch.from_numpy(np.asarray(arrays[name])).to(device) for name in names]
    return [torch.nn.Parameter(tensor.clone()) for tensor in tensors]


@pytest.mark.parametrize("kernel", ["usual", "foreach", "fused"])
@pytest.mark.parametrize("weight_decay", ["1e-6", "1e-2"])
@pytest.mark.parametrize("mode", ["noclip", "clip"])
def test_larc_follows_the_golden_trajectory(golden, device, mode, weight_decay, kernel):
    arrays = golden("larc")
    params = parameters(arrays, [f"param{i}_init" for i in range(5)], device)
    options = {} if kernel == "usual" else {kernel: True}
    momentum, decay = float(arrays["momentum"]), float(weight_decay)
    sgd = torch.optim.SGD(params, lr=1.0, momentum=momentum, weight_decay=decay, **options)
    trust, eps = float(arrays["trust_coefficient"]), float(arrays["eps"])
    optimizer = LARC(sgd, trust_coefficient=trust, clip=mode == "clip", eps=eps)
    for step, lr in enumerate(arrays["clip_lr" if mode == "clip" else "lr"]):
        optimizer.param_groups[0]["lr"] = float(lr)
        for i, p in enumerate(params):
            p.grad = torch.from_numpy(arrays[f"param{i}_grad"][step]).to(device)
        optimizer.step()
        for i, p in enumerate(params):
            expected = arrays[f"{mode}_wd{weight_decay}_param{i}"][step]
            assert relative_error(p, expected) <= RELATIVE, (step, i)


def test_lars_follows_the_golden_trajectory(golden, device):
    arrays = golden("dino_lars")
    params = parameters(arrays, [f"param{i}_init" for i in range(4)], device)
    constants = {name: float(arrays[name]) for name in ("weight_decay", "momentum", "eta")}
    optimizer = LARS(params, **constants)
    for step, lr in enumerate(arrays["lr"]):
        optimizer.param_groups[0]["lr"] = float(lr)
        for i, p in enumerate(params):
            p.grad = torch.from_numpy(arrays[f"param{i}_grad"][step]).to(device)
        optimizer.step()
        for i, p in enumerate(params):
            assert relative_error(p, arrays[f"param{i}_after"][step]) <= RELATIVE, (step, i)


def test_clipped_gradients_equal_the_golden_ones(golden, device):
    arrays = golden("dino_lars")
    params = parameters(arrays, [f"clip_grad{i}" for i in range(3)], device)
    for p in params:
        p.grad = p.detach().clone()
    norms = clip_gradients(params, float(arrays["clip_value"]))
    np.testing.assert_allclose(to_host(norms), arrays["clip_norms"], rtol=RELATIVE)
    for i, p in enumerate(params):
        np.testing.assert_allclose(to_host(p.grad), arrays[f"clipped_grad{i}"], rtol=RELATIVE)
