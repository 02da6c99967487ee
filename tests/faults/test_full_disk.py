"""A disk that is full at any write of a run: one sentence, nothing that was saved is lost, and it goes on."""

import functools
import sys

import pytest

from src.run.checkpoint import load_checkpoint
from tests.faults import disk, methods

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


# Flags of each method, whose clustering is over in the first epoch.
SHORT = {"swav": [], "deepercluster": ["--epochs", 1], "clusterfit": ["--epochs", 1]}


def prepare(folder, full_at, notes=None):
    methods.few_panels()
    disk.fill(folder, full_at, notes)


def check_ending(ending, folder, note):
    """One sentence that says what is full and where, or a good end."""
    screen = ending.screen
    for word in ("Traceback", "Logging error", "Exception ignored"):
        assert word not in screen, f"{note}: {screen}"
    if ending.status != 0:
        assert ending.status in (1, 2), f"{note}: {screen}"
        assert screen.count("error: ") == 1, f"{note}: {screen}"
        last = screen.splitlines()[-1]
        assert last.startswith("error: ") and disk.NO_SPACE in last, f"{note}: {last}"
        assert str(folder) in last, f"{note}: {last}"


def places_of(method, images, folder):
    """What each use of the disk is in a run that has room, by its number."""
    notes, counted = folder / f"{method}.notes", folder / method
    counting = functools.partial(prepare, str(counted), None, str(notes))
    words = methods.arguments(method, images, *SHORT[method])
    run = methods.start_fork(f"main_{method}", counted, words, prepare=counting)
    assert run.ending(60).status == 0
    return disk.places(notes)


@pytest.mark.parametrize("method", SHORT)
def test_a_full_disk_costs_nothing_that_was_saved(
    method, digits, uninterrupted, rounds, figures, tmp_path
):
    """Of the other methods what only they write; all that they write in the long form."""
    expected, _ = uninterrupted(method, *SHORT[method])
    words, script = methods.arguments(method, digits, *SHORT[method]), f"main_{method}"
    kinds = places_of(method, digits, tmp_path)
    if rounds:
        numbers = range(len(kinds))
    elif method == "swav":
        numbers = disk.first_of_each(kinds)
    else:
        shared = set(places_of("swav", digits, tmp_path))
        numbers = [number for number in disk.first_of_each(kinds) if kinds[number] not in shared]
        assert numbers
    wrong = []
    for number in numbers:
        folder, note = tmp_path / str(number), f"full at {number}, {kinds[number]}"
        filling = functools.partial(prepare, str(folder), number)
        try:
            with figures.fault("disk full from a write on"):
                run = methods.start_fork(script, folder, words, prepare=filling)
                check_ending(run.ending(within=60), folder, note)
                if (folder / "checkpoint.pth").exists():
                    assert load_checkpoint(folder)["epoch"] >= 0, note
                methods.finish(method, folder, words)
                methods.check_equal(folder, expected, note)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, f"{len(wrong)} of {len(numbers)}:\n" + "\n".join(wrong)
