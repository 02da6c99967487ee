"""python -m bench.compare: what fell is named, other machines are not compared."""

import json

import pytest

from bench import compare, measure
from bench.measure import print_table


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(ratio, machine) -> a file of tables, in one of which "ours" is so many times faster."""

    def tables(ratio, machine="a processor, 1 threads"):
        monkeypatch.setattr("bench.measure.machine", lambda: machine)
        file = tmp_path / f"{ratio}.jsonl"
        header = ["form", "ms", "times faster"]
        rows = [["published", 3.0, 1.0], ["ours", 1.0, ratio], ["floor", 0.5, "-"]]
        print_table("a product: 3 x 4, cpu", header, rows, str(file))
        print_table("no ratio", ["form", "ms"], [["ours", 1.0]], str(file))
        return str(file)

    return tables


def test_what_fell_by_more_than_a_fifth_is_named(write, tmp_path, capsys):
    kept = ["--kept", str(tmp_path / "kept.json")]
    assert compare.main([write(3.0), *kept, "--keep"]) == 0
    assert compare.main([write(2.5), *kept]) == 0
    capsys.readouterr()
    assert compare.main([write(2.3), *kept]) == 1
    said = capsys.readouterr().out
    assert "       3       2.3  a product: 3 x 4, cpu | ours  FELL" in said
    assert said.splitlines()[-1] == "fell by more than 20 %: a product: 3 x 4, cpu | ours"
    assert compare.main([write(2.3), *kept, "--share", "0.5"]) == 0


def test_another_machine_is_not_compared_and_is_kept_beside_the_first(write, tmp_path, capsys):
    kept = tmp_path / "kept.json"
    assert compare.main([write(3.0), "--kept", str(kept), "--keep"]) == 0
    other = write(1.5, machine="a GPU")
    assert compare.main([other, "--kept", str(kept)]) == 0
    assert "(not kept yet)" in capsys.readouterr().out
    assert compare.main([other, "--kept", str(kept), "--keep"]) == 0
    name = "a product: 3 x 4, cpu | ours"
    found = json.loads(kept.read_text())
    assert found["a GPU"][name] == 1.5 and found["a processor, 1 threads"][name] == 3.0


EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: {model}
model name\t: AMD EPYC
stepping\t: 1
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (2 * EPYC.format(family=25, model=17), "AMD EPYC (family 25, model 17)"),
        (2 * EPYC.format(family=26, model=2), "AMD EPYC (family 26, model 2)"),
        (ARM, "aarch64"),
    ],
)
def test_generations_of_one_name_are_different_machines(monkeypatch, cpuinfo, name):
    monkeypatch.setattr(measure.Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr(measure.platform, "machine", lambda: "aarch64")
    assert measure.processor() == name


def test_the_best_of_several_runs_counts(write, tmp_path):
    lines = [line for ratio in (2.0, 3.0) for line in open(write(ratio))]
    (ratios,) = compare.ratios_of(lines).values()
    assert ratios["a product: 3 x 4, cpu | ours"] == 3.0


@pytest.mark.parametrize("text", [None, "no JSON", "{}"])
def test_a_file_without_tables_is_one_sentence(tmp_path, text, capsys):
    file = tmp_path / "tables.jsonl"
    if text is not None:
        file.write_text(text)
    assert compare.main([str(file)]) == 2
    assert f"{file} holds no tables of --json" in capsys.readouterr().err
