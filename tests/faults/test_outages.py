"""A storage that is away for a second, in a run and in an evaluation: the same numbers as without it."""

import json
import sys
import time

import pytest

from tests.faults import methods

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


def take_away(folder, seconds):
    away = folder.with_name("away")
    folder.rename(away)
    time.sleep(seconds)
    away.rename(folder)


@pytest.fixture
def images(tmp_path):
    """Images of this test alone; their folder's name is in the log."""
    return methods.digits_in_folders(tmp_path / "images")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("method", ["swav", "deepclusterv2", "deepercluster"])
def test_images_that_are_away_for_a_second_change_no_number_of_a_run(
    method, workers, images, draws, rounds, figures, tmp_path
):
    words = methods.arguments(method, images, "--workers", workers)
    methods.finish(method, tmp_path / "expected", words)
    for trial in range(1 + rounds // 20):
        folder, line = tmp_path / str(trial), draws.randrange(1, 9)
        with figures.fault("images away for a second in a run"):
            [run] = methods.begin(method, folder, words)
            run.wait_until(lambda: methods.num_lines_of(folder) >= line)  # noqa: B023
            take_away(images.parent, 1.0)
            ending = run.ending(within=methods.RUN_SECONDS)
            assert ending.status == 0, ending.screen
            methods.check_equal(folder, tmp_path / "expected", f"away after line {line}")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_away_for_a_second_change_no_result_of_an_evaluation(
    workers, images, rounds, figures, tmp_path
):
    methods.finish("rotnet", tmp_path / "run", methods.arguments("rotnet", images))
    words = ["--data_path", images.parent, "--pretrained", tmp_path / "run", "--device", "cpu"]
    words += ["--nb_knn", 3, 5, "--batch_size", 2, "--workers", workers]
    results = []
    for trial in range(2 + rounds // 20):
        folder = tmp_path / f"evaluation{trial}"
        run = methods.start_fork("eval_knn", folder, words)
        if trial > 0:
            run.wait_until(run.says("images/s"))
            with figures.fault("images away for a second in an evaluation"):
                take_away(images.parent, 1.0)
                results.append(result_of(run, folder))
                assert results[-1] == results[0]
        else:
            results.append(result_of(run, folder))


def result_of(run, folder):
    ending = run.ending(within=methods.RUN_SECONDS)
    assert ending.status == 0, ending.screen
    [path] = folder.glob("eval_knn*.json")
    found = json.loads(path.read_text())
    return {name: value for name, value in found.items() if "seconds" not in name}
