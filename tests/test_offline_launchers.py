"""scripts/deepcluster_*.sh, deepercluster_*.sh, rotnet_*.sh, clusterfit_*.sh: what each would run."""

import importlib
import shlex
from pathlib import Path

import pytest

from tests.test_launch import RECIPES, checked_arguments, run_recipe, sbatch_lines

ROOT = Path(__file__).parent.parent
METHODS = ("deepcluster", "deepercluster", "rotnet", "clusterfit")
SCRIPTS = [path for method in METHODS for path in sorted((ROOT / "scripts").glob(f"{method}_*.sh"))]


WEIGHTS = {"ROTNET": "runs/a rotnet", "TEACHER": "runs/a rotnet"}


def script_of(path):
    return f"main_{path.name.split('_')[0]}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_srun_with_flags_that_its_parser_takes(path, tmp_path):
    checked_arguments(path, f"{script_of(path)}.py", tmp_path, **WEIGHTS)
    assert f"job-name={path.stem}" in sbatch_lines(path)


def test_there_is_one_for_each_method():
    assert {path.name.split("_")[0] for path in SCRIPTS} == set(METHODS)


@pytest.mark.parametrize("network, per_process, processes", [("alexnet", 256, 1), ("vgg16", 32, 8)])
def test_deepcluster_has_the_published_batch_and_values(network, per_process, processes, tmp_path):
    path = ROOT / "scripts" / f"deepcluster_{network}_pretrain.sh"
    args = checked_arguments(path, "main_deepcluster.py", tmp_path)
    assert (args.batch_size, args.lr, args.wd, args.nmb_cluster) == (per_process, 0.05, -5, 10000)
    assert args.arch == network and args.sobel and args.verbose
    assert f"gpus={processes}" in sbatch_lines(path)
    assert {"lr", "exp"} <= RECIPES["deepcluster/main.sh"]["flags"].keys()


def test_deepercluster_has_the_values_of_the_published_script(tmp_path):
    published = []
    for flag, value in RECIPES["DeeperCluster/main.sh"]["flags"].items():
        published += [f"--{flag}", *shlex.split(value)]
    parser = importlib.import_module("main_deepercluster").get_parser()
    expected = vars(parser.parse_args(published))  # the published line is taken as it stands
    path = ROOT / "scripts" / "deepercluster_vgg16_pretrain.sh"
    ours = vars(parser.parse_args(run_recipe(path, tmp_path, **WEIGHTS)[0][6:]))
    different = {name for name in ours if ours[name] != expected[name]}
    paths = {"data_path", "dump_path", "init_from"}
    assert different == paths | {"seed", "workers", "use_faiss", "syncbn_process_group_size"}
    assert ours["init_from"] == "runs/a rotnet" and "gpus=64" in sbatch_lines(path)
    assert ours["syncbn_process_group_size"] == 0  # all GPUs, as published
