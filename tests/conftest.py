"""Shared by all tests: one thread (two cores), no GPU noise, the golden arrays."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
# Of the processes that tests start; a value that OpenMP cannot read would be a line on stderr.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    """golden("larc") -> the arrays of tests/golden/larc.npz, see tests/golden/README.md."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}

    return load
