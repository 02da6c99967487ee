"""The device of the tests in this folder, and float32 that is float32."""

import pytest
import torch

from src import dist


@pytest.fixture(scope="session")
def device(pytestconfig):
    """The device that --device names; without a GPU the tests of "cuda" are skipped."""
    name = pytestconfig.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device: run `bash scripts/on_gpu.sh` on a machine with one")
    return dist.resolve_device(name)


@pytest.fixture(params=["fp32", "bf16"])
def precision(request):
    """As --precision: of the network's forward and backward pass."""
    return request.param


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """No TensorFloat-32, and no other algorithm from one call to the next."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
