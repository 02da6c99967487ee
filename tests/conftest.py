"""Shared by all tests: one thread unless OMP_NUM_THREADS says otherwise, the golden arrays."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from src import dist

GOLDEN = Path(__file__).parent / "golden"
# Also of the processes that tests start. A value that OpenMP cannot read would be a line on stderr.
if not os.environ.get("OMP_NUM_THREADS", "").isdecimal():
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
dist.settle_vector_functions()


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="of the tests in tests/gpu: cuda or cpu")
    text = (
        "of each fault that tests/faults tries, beside those of a quick look; 100 for the long form"
    )
    parser.addoption("--fault_rounds", type=int, default=0, help=text)
    parser.addoption(
        "--fault_seed", type=int, default=0, help="of the moments and places of faults"
    )


def pytest_terminal_summary(terminalreporter):
    reports = [report for group in terminalreporter.stats.values() for report in group]
    if any(getattr(report, "user_properties", []) for report in reports):
        from tests.faults import figures  # which a copy of some tests may lack

        for line in figures.table(reports):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def golden():
    """golden("larc") -> the arrays of tests/golden/larc.npz, see tests/golden/README.md."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}

    return load


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def drawn(monkeypatch):
    """The sheets that a test draws, by the name of their file: where their images are."""
    from src.pictures.sheets import Sheet

    sheets, save = {}, Sheet.save

    def keep(sheet, path):
        sheets[Path(path).name] = sheet
        return save(sheet, path)

    monkeypatch.setattr(Sheet, "save", keep)
    return sheets
