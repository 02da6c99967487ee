"""scripts/deepclusterv2_*.sh, selav2_*.sh, simclr_*.sh: what each would run, with which values."""

import importlib
from pathlib import Path

import pytest

from tests.test_launch import RECIPES, checked_arguments, run_recipe, sbatch_lines

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    path
    for method in ("deepclusterv2", "selav2", "simclr")
    for path in sorted((ROOT / "scripts").glob(f"{method}_*_pretrain.sh"))
]
PUBLISHED = [path for path in SCRIPTS if f"swav/scripts/{path.name}" in RECIPES]


def script_of(path):
    return f"main_{path.name.split('_')[0]}"


def arguments(path, argv):
    return vars(importlib.import_module(script_of(path)).get_parser().parse_args(argv))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_srun_with_flags_that_its_parser_takes(path, tmp_path):
    args = checked_arguments(path, f"{script_of(path)}.py", tmp_path)
    assert (args.batch_size, args.base_lr, args.final_lr) == (64, 4.8, 0.0048)
    assert f"job-name={path.stem}" in sbatch_lines(path)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_script_has_the_values_of_the_published_one(path, tmp_path):
    recipe = RECIPES[f"swav/scripts/{path.name}"]
    assert set(recipe["sbatch"]) <= set(sbatch_lines(path))
    published = []
    for flag, value in recipe["flags"].items():
        published += [f"--{flag}", *value.split()]
    expected = arguments(path, published)  # the published line is taken as it stands
    ours = arguments(path, run_recipe(path, tmp_path)[0][6:])
    different = {name for name in ours if ours[name] != expected[name]}
    assert different <= {"data_path", "dump_path", "dist_url", "seed", "sync_bn", "precision"}
    assert ours["sync_bn"] == "pytorch" and expected["sync_bn"] == "apex"
    assert ours["precision"] == "fp32"  # the published script has no --use_fp16


def test_there_is_a_script_for_every_published_run():
    names = {Path(name).name for name in RECIPES if "deepclusterv2" in name}
    assert len(names) == 3 and names == {path.name for path in PUBLISHED}
