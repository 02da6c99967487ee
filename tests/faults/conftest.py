"""What the tests of faults share: the counting, random draws that can be drawn again, uninterrupted runs."""

import random

import pytest

from tests.faults import methods
from tests.faults.figures import Figures


@pytest.fixture
def figures(record_property):
    """Counts what was tried, survived and lost."""
    return Figures(record_property)


@pytest.fixture
def rounds(pytestconfig):
    """Faults of the long form; 0 in the short one."""
    return pytestconfig.getoption("--fault_rounds")


@pytest.fixture
def draws(request):
    """Random numbers of a test; their seed is said where it fails."""
    seed = f"{request.config.getoption('--fault_seed')} {request.node.name}"
    print(f"the moments and places are drawn from random.Random({seed!r})")  # noqa: T201
    return random.Random(seed)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder of digits as PNG files, and where uninterrupted runs on them lie."""
    return methods.digits_in_folders(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def uninterrupted(digits, tmp_path_factory):
    """uninterrupted("swav", "--epochs", 3): a folder and how long it took; made once a session."""
    made = {}

    def make(method, *argv, ranks=1, fresh=False):
        key = (method, *argv, ranks, fresh)
        if key not in made:
            folder = tmp_path_factory.mktemp("uninterrupted") / method
            words = methods.arguments(method, digits, *argv, ranks=ranks)
            made[key] = folder, methods.finish(method, folder, words, ranks=ranks, fresh=fresh)
        return made[key]

    return make
