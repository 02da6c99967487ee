"""Weights by formula, so that golden outputs need no stored weights (tests/golden/README.md)."""

import math

import numpy as np
import torch


def fill(module, initialiser):
    """Overwrite every parameter and buffer of `module` by "hash" or "cos" values; the module."""
    state = module.state_dict()
    rule = {"hash": hash_values, "cos": cos_values}[initialiser]
    for i, name in enumerate(sorted(state)):
        tensor = state[name]
        values = rule(name, i, tensor) if tensor.is_floating_point() else np.zeros(tensor.numel())
        state[name] = torch.from_numpy(values).to(tensor.dtype).view(tensor.shape)
    module.load_state_dict(state)
    return module


def cos_values(name, i, tensor):
    c = np.cos(0.7 * np.arange(tensor.numel()) + i)
    if name.endswith("running_mean"):
        return 0.01 * c
    if name.endswith("running_var"):
        return 1 + 0.1 * c**2
    if tensor.ndim >= 2:
        return 0.02 * c
    return 1 + 0.02 * c if name.endswith(".weight") else 0.02 * c


def uniform(i, n):
    """n numbers in (-1, 1) from an integer hash modulo 2^32, for the i-th tensor."""
    low = np.uint64(2**32 - 1)
    x = np.arange(1, n + 1, dtype=np.uint64) + np.uint64(1000003 * i)
    x = (x & low) * np.uint64(2654435761) & low
    x ^= x >> np.uint64(15)
    x = x * np.uint64(2246822519) & low
    x ^= x >> np.uint64(13)
    return 2 * (x.astype(np.float64) + 0.5) / 2.0**32 - 1


def hash_values(name, i, tensor):
    u = uniform(i, tensor.numel())
    if name.endswith("running_mean"):
        return 0.1 * u
    if name.endswith("running_var"):
        return 1 + 0.5 * u
    if name.endswith("weight_g"):
        return 1 + 0.1 * u
    if name.endswith(("cls_token", "pos_embed")):
        return 0.5 * u
    if tensor.ndim >= 2:
        return u * math.sqrt(6 / (tensor.numel() / tensor.shape[0]))
    return 1 + 0.1 * u if name.endswith(".weight") else 0.1 * u
