"""Arrays to the device and numbers back from it."""

import numpy as np
import torch


def to_device(arrays, names, device):
    """The named golden arrays as tensors on the device."""
    return [torch.from_numpy(arrays[name]).to(device) for name in names]


def to_host(tensor) -> np.ndarray:
    """A tensor's numbers; numpy has no bfloat16, so those of half precision become float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


def relative_error(actual, expected) -> float:
    """The largest difference over the largest magnitude that is expected."""
    expected = np.asarray(expected, np.float64)
    return np.abs(to_host(actual) - expected).max() / max(np.abs(expected).max(), 1e-300)
