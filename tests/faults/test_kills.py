"""Runs that are killed at any moment, and started again: no line is lost, and none is there twice."""

import sys

import pytest

from tests.faults import methods

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
every_method = pytest.mark.parametrize("method", methods.METHODS)
# With lines of an assignment; with the state of a teacher, or of a queue.
LASTING = {
    "swav": ["--epochs", 8],
    "deepclusterv2": ["--epochs", 6],
    "deepercluster": ["--epochs", 4],
    "dino": ["--epochs", 6],
}


def test_a_forked_run_equals_one_of_a_fresh_process(uninterrupted):
    fresh, _ = uninterrupted("swav", fresh=True)
    forked, _ = uninterrupted("swav")
    (fresh / "plots" / "curves.png").rename(fresh / "plots" / "all_curves.png")
    (fresh / "plots" / "curves.png").write_bytes((forked / "plots" / "curves.png").read_bytes())
    methods.check_equal(fresh, forked, "fresh and forked")


@every_method
def test_a_run_killed_at_any_moment_goes_on_to_the_last_bit(
    method, digits, uninterrupted, draws, rounds, figures, tmp_path
):
    expected, seconds = uninterrupted(method)
    words = methods.arguments(method, digits)
    for trial in range(1 + rounds // 10):
        folder, moments = tmp_path / str(trial), []
        with figures.fault("SIGKILL of a run", count=3):
            while len(moments) < 3:
                moment = draws.uniform(0.05, 0.7 * seconds)
                if not methods.kill_at(methods.begin(method, folder, words), moment):
                    break
                moments.append(round(moment, 3))
            methods.finish(method, folder, words)
            methods.check_equal(folder, expected, f"killed after {moments} s")


@pytest.mark.parametrize("method", ["swav", "dino", "deepercluster"])
def test_a_fresh_process_killed_at_any_moment_loses_nothing(
    method, digits, uninterrupted, draws, rounds, figures, tmp_path
):
    expected, _ = uninterrupted(method)
    words = methods.arguments(method, digits, "--workers", 2)
    for trial in range(1 + rounds // 20):
        folder = tmp_path / str(trial)
        moments = [round(draws.uniform(0.0, 10.0), 3) for _ in range(2)]
        with figures.fault("SIGKILL of a fresh process with loaders", count=2):
            for moment in moments:
                methods.kill_at(methods.begin(method, folder, words, fresh=True), moment)
            methods.finish(method, folder, words)
            (folder / "plots" / "curves.png").unlink()  # which may have all panels
            methods.finish(method, folder, words)
            methods.check_equal(folder, expected, f"killed after {moments} s")


@pytest.mark.parametrize("method", LASTING)
def test_a_run_killed_many_times_in_a_row_misses_no_line_and_has_none_twice(
    method, digits, uninterrupted, draws, rounds, figures, tmp_path
):
    expected, seconds = uninterrupted(method, *LASTING[method])
    words = methods.arguments(method, digits, *LASTING[method])
    folder, num_lines = tmp_path / "run", len(methods.log_of(expected))
    num_kills, kills, starts = max(5, rounds), 0, 0
    with figures.fault("SIGKILL, many in a row", count=num_kills):
        while kills < num_kills:
            starts += 1
            assert starts <= 3 * num_kills + 20, "the run is over before it could be killed"
            to_go = seconds * (1 - methods.num_lines_of(folder) / num_lines) / (num_kills - kills)
            moment = draws.uniform(0.05, 0.4 + 1.5 * to_go)  # a run that is over is started too
            kills += methods.kill_at(methods.begin(method, folder, words), moment)
        methods.finish(method, tmp_path / "run", words)
        methods.check_equal(tmp_path / "run", expected, f"{kills} kills in {starts} starts")


@every_method
def test_one_rank_of_two_killed_is_made_up_for_to_the_last_bit(
    method, digits, uninterrupted, draws, rounds, figures, tmp_path
):
    expected, seconds = uninterrupted(method, ranks=2)
    words = methods.arguments(method, digits, ranks=2)
    for trial in range(1 + rounds // 20):
        folder, victim = tmp_path / str(trial), draws.randrange(2)
        moment = draws.uniform(0.3, 0.8) * seconds
        with figures.fault("SIGKILL of one rank of two"):
            ranks = methods.begin(method, folder, words, ranks=2)
            if methods.kill_at(ranks, moment, victim=victim):
                ending = ranks[1 - victim].ending(within=30)
                assert "Traceback" not in ending.screen, ending.screen
                was_over = methods.num_lines_of(folder) == methods.num_lines_of(expected)
                assert ending.status == 1 or (ending.status == 0 and was_over), ending.screen
            else:
                assert ranks[1 - victim].ending(within=30).status == 0
            methods.finish(method, folder, words, ranks=2)
            methods.check_equal(folder, expected, f"rank {victim} killed after {moment:.3f} s")
