"""scripts/compare_methods.py: its commands, its table, and that it goes on where it was stopped."""

import importlib
import json
import shlex

import pytest

from scripts import compare_methods
from tests.data.test_datasets import write_image


def arguments(tmp_path, *argv):
    argv = ["--data_path", "digits", "--out", tmp_path / "out", *argv]
    return compare_methods.parse_args(list(map(str, argv)))


def test_every_command_is_one_that_its_script_takes(tmp_path):
    comparison = compare_methods.Comparison(arguments(tmp_path))
    names = {*compare_methods.METHODS, compare_methods.UNTRAINED}
    assert {method for method, _ in comparison.chains} == names
    for method in names:
        for name, command, _ in comparison.steps_of(method, seed=1):
            script, *flags = shlex.split(command)
            parser = importlib.import_module(script.removesuffix(".py")).get_parser()
            args = parser.parse_args(flags)
            assert args.seed == 1, (method, name)
    assert comparison.num_steps == 3 * (5 * 8 + 7)


def test_the_table_has_mean_and_spread_and_says_how_many_are_missing(tmp_path):
    args = arguments(tmp_path, "--methods", "swav", "--evaluations", "knn", "linear", "--seeds", 3)
    done = {
        ("swav", seed, "knn"): {"value": value} for seed, value in enumerate((50.0, 52.0, 54.0))
    }
    done |= {("untrained", seed, "knn"): {"value": 30.0 + seed} for seed in range(2)}
    rows = compare_methods.table(done, args).splitlines()
    assert rows[0] == "| | k-NN | linear |"
    assert rows[2:] == [
        "| SwAV | 52.0 ± 2.0 | - |",
        "| untrained network | 30.5 ± 0.7 (n = 2) | - |",
    ]


def test_results_of_another_command_are_not_taken_over(tmp_path, capsys):
    argv = [
        "--data_path",
        "digits",
        "--out",
        str(tmp_path),
        "--methods",
        "swav",
        "--evaluations",
        "knn",
    ]
    args = compare_methods.parse_args(argv)
    comparison = compare_methods.Comparison(args)
    _, (name, command, _) = comparison.steps_of("swav", 0)
    result = {"method": "swav", "seed": 0, "step": name, "value": 50.0, "command": command}
    (tmp_path / "results.jsonl").write_text(json.dumps(result) + '\n{"method": "sw')
    again = compare_methods.Comparison(args)
    assert again.done["swav", 0, "knn"]["value"] == 50.0  # the line that was cut short is none
    assert compare_methods.main([*argv, "--data_path", "cifar10"]) == 2
    assert "holds knn of swav by another command" in capsys.readouterr().err


def test_full_is_other_defaults_and_flags_win_over_it(tmp_path):
    args = arguments(tmp_path, "--full", "--epochs", 7)
    assert (args.epochs, args.finetune_epochs, args.width) == (7, 50, 1.0)


def test_a_step_without_its_figure_is_a_failure_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    argv = ["--methods", "swav", "--seeds", 1, "--evaluations", "knn", "linear"]
    comparison = compare_methods.Comparison(arguments(tmp_path, *argv))

    def write_the_other_one(command, log):
        if "eval_linear" in command:
            (log.parent / "eval_linear.json").write_text('{"top1": 50.0}')
        return 1.0, 0

    monkeypatch.setattr(comparison, "run", write_the_other_one)
    comparison.run_chain("swav", 0)
    assert comparison.failed == 1 and "FAILED swav seed 0 knn" in capsys.readouterr().out
    assert comparison.done["swav", 0, "linear"]["value"] == 50.0


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_a_failure_is_said(tmp_path, capsys):
    for part, count in (("train", 48), ("val", 20)):
        for number in range(count):
            path = tmp_path / "images" / part / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, 3 * number, size=(24, 24))
    argv = ["--data_path", tmp_path / "images", "--out", tmp_path / "out", "--jobs", 1]
    argv += ["--methods", "rotnet", "--evaluations", "knn", "clusters", "--seeds", 1]
    argv = list(map(str, [*argv, "--epochs", 1, "--width", 0.125]))
    status = compare_methods.main(argv)
    screen = capsys.readouterr().out
    assert status == 1 and "FAILED rotnet seed 0 train" in screen  # 48 images are less than a batch
    for number in range(48, 160):
        write_image(
            tmp_path / "images" / "train" / "class1" / f"{number}.png", number, size=(24, 24)
        )
    assert compare_methods.main(argv) == 0
    results = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    steps = [(line["method"], line["step"]) for line in map(json.loads, results)]
    assert sorted(steps) == [
        ("rotnet", "clusters"),
        ("rotnet", "knn"),
        ("rotnet", "train"),
        ("untrained", "clusters"),
        ("untrained", "knn"),
    ]
    capsys.readouterr()
    assert compare_methods.main(argv) == 0
    assert (tmp_path / "out" / "results.jsonl").read_text().splitlines() == results
    assert "| RotNet |" in capsys.readouterr().out
