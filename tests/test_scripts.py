"""Every script alike: the flags of the published scripts, the docstring, nothing done by an import."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = json.loads((ROOT / "tests" / "golden" / "official_flags.json").read_text())
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if re.match("main_|eval_", path.stem))
# Flags of launchers, which are accepted and ignored.
LAUNCHER_FLAGS = {"dist_url", "dist-url", "world_size", "world-size", "rank", "local_rank"}
LAUNCHER_FLAGS |= {"debug_slurm"}
# Published defaults that differ on purpose, with the reason.
OTHER_DEFAULTS = {
    ("main_swav", "data_path"): "digits, so that the bare command runs",
    ("main_swav", "use_fp16"): "--precision decides; true is what auto does on a GPU",
    ("main_dino", "data_path"): "digits, so that the bare command runs",
    ("main_dino", "use_fp16"): "--precision decides; true is what auto does on a GPU",
    ("main_deepclusterv2", "data_path"): "digits, so that the bare command runs",
    ("main_deepcluster", "data_path"): "digits, so that the bare command runs",
    ("main_deepercluster", "data_path"): "digits, so that the bare command runs",
    ("main_deepercluster", "dump_path"): "., as all scripts",
    ("main_deepercluster", "pretrained"): "another spelling of --init_from",
    ("main_deepercluster", "use_faiss"): "ours, which does the same on any number of processes",
    ("main_deepcluster", "exp"): "., as all scripts",
    ("main_deepcluster", "DIR"): "as --data_path",
    ("eval_knn", "data_path"): "digits, so that the bare command runs",
    ("eval_knn", "arch"): "found in the file; without one resnet50",
    ("eval_knn", "checkpoint_key"): "teacher, where the file has one",
    ("eval_linear", "data_path"): "digits, so that the bare command runs",
    ("eval_linear", "arch"): "found in the file; without one resnet50, as SwAV",
    ("eval_linear", "checkpoint_key"): "teacher, where the file has one",
    ("eval_linear", "n_last_blocks"): "by --arch: 4, of vit_base 1",
    ("eval_linear", "avgpool_patchtokens"): "by --arch: false, of vit_base true",
    ("eval_linear", "batch_size"): "by --protocol, 256 images over all processes for swav",
    ("eval_linear", "batch_size_per_gpu"): "by --protocol, 128 for dino",
    ("eval_linear", "lr"): "by --protocol",
    ("eval_linear", "wd"): "by --protocol",
    ("eval_linear", "num_labels"): "counted in the data",
    ("eval_linear", "data"): "digits, see data_path",
    ("eval_linear", "model"): "empty, see pretrained",
    ("eval_linear", "exp"): "the current folder, see dump_path",
    ("eval_linear", "conv"): "none: the pooled features",
    ("eval_linear", "workers"): "10, as SwAV and DINO",
    ("eval_linear", "epochs"): "100; by --protocol 90 for deepcluster",
    ("eval_linear", "weight_decay"): "by --protocol, see wd",
    ("eval_linear", "sobel"): "the file says it",
    ("eval_semisup", "data_path"): "digits, so that the bare command runs",
    ("eval_semisup", "arch"): "found in the file; without one resnet50",
    ("eval_semisup", "batch_size"): "256 images over all processes, as on 8 GPUs",
    ("eval_semisup", "lr"): "0.01 for 10 %, as published, and 0.02 for 1 %",
    ("eval_semisup", "lr_last_layer"): "0.2 for 10 %, as published, and 5 for 1 %",
    ("eval_image_retrieval", "data_path"): "must be given for the revisited sets",
    ("eval_image_retrieval", "dataset"): "roxford5k as DINO's; DeepCluster's must be given",
    ("eval_image_retrieval", "arch"): "found in the file; without one resnet50",
    ("eval_image_retrieval", "checkpoint_key"): "teacher, where the file has one",
    ("eval_image_retrieval", "model"): "empty, see pretrained",
    ("eval_image_retrieval", "stage"): "eval, all of them",
    ("eval_image_retrieval", "eval_binary"): "empty: average precisions are computed here",
    ("eval_video_segmentation", "data_path"): "must be given",
    ("eval_video_segmentation", "checkpoint_key"): "teacher, where the file has one",
    ("eval_copy_detection", "data_path"): "must be given",
    ("eval_copy_detection", "whitening_path"): "none",
    ("eval_copy_detection", "distractors_path"): "none",
    ("eval_copy_detection", "arch"): "found in the file; without one resnet50",
    ("eval_copy_detection", "patch_size"): "found in the file; without one 16",
    ("eval_copy_detection", "checkpoint_key"): "teacher, where the file has one",
    ("eval_finetune", "data_path"): "digits, so that the bare command runs",
    ("eval_finetune", "seed"): "31, as in the other scripts",
    ("eval_finetune", "workers"): "10, as SwAV and DINO",
    ("eval_finetune", "sobel"): "the file says it",
    ("eval_finetune", "lr"): "by --protocol, 0.05 for deepercluster",
    ("eval_finetune", "wd"): "by --protocol, 1e-5 for deepercluster",
    ("eval_finetune", "batch_size"): "by --protocol, 128 for deepercluster",
    ("eval_voc07", "vocdir"): "must be given, see data_path",
    ("eval_voc07", "model"): "empty, see pretrained",
    ("eval_voc07", "sobel"): "the file says it",
    ("eval_voc07", "nit"): "by --protocol",
    ("eval_voc07", "stepsize"): "by --protocol",
    ("eval_voc07", "min_scale"): "by --protocol",
    ("eval_voc07", "max_scale"): "by --protocol",
    ("eval_voc07", "seed"): "31 as DeepCluster's, 1993 was DeeperCluster's",
}
# The published scripts whose flags a script takes; one that is not here, such as a copy, has its own.
PUBLISHED = {
    "main_swav": ["swav/main_swav.py"],
    "main_dino": ["dino/main_dino.py"],
    "main_deepclusterv2": ["swav/main_deepclusterv2.py"],
    "main_selav2": [],  # the authors released weights, no code
    "main_simclr": [],  # no multi-crop version was released
    "main_deepcluster": ["deepcluster/main.py"],
    "main_deepercluster": ["DeeperCluster/main.py"],
    "main_rotnet": [],  # of the papers that this project follows none released a script
    "main_clusterfit": [],  # a configuration of VISSL
    "eval_voc07": ["deepcluster/eval_voc_classif.py", "DeeperCluster/eval_voc_classif.py"],
    "eval_finetune": ["DeeperCluster/eval_pretrain.py"],
    "eval_semisup": ["swav/eval_semisup.py"],
    "eval_knn": ["dino/eval_knn.py"],
    "eval_copy_detection": ["dino/eval_copy_detection.py"],
    "eval_image_retrieval": ["dino/eval_image_retrieval.py", "deepcluster/eval_retrieval.py"],
    "eval_video_segmentation": ["dino/eval_video_segmentation.py"],
    "eval_linear": [
        *(f"{repository}/eval_linear.py" for repository in ("swav", "dino")),
        *(f"{repository}/eval_linear.py" for repository in ("deepcluster", "DeeperCluster")),
    ],
}


def actions(script):
    parser = importlib.import_module(script).get_parser()
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    return flags | {a.metavar: a for a in parser._actions if not a.option_strings}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_published_flag_is_taken_with_its_type_and_default(script):
    mine = actions(script)
    for flag in [flag for file in PUBLISHED.get(script, []) for flag in FLAGS[file]]:
        name = flag["flags"][0]
        name = name if name.startswith("-") else ast.literal_eval(flag["metavar"])  # a folder
        assert name in mine, name
        action, name = mine[name], name.lstrip("-")
        if name in LAUNCHER_FLAGS or (script, name) in OTHER_DEFAULTS:
            continue
        switch = False if "action" in flag else None
        published = ast.literal_eval(flag["default"]) if "default" in flag else switch
        default = action.default
        if name == "nmb_prototypes" and isinstance(published, int):
            default = default[0]  # one set or several
        if default is None and isinstance(published, list):  # crops: filled in from the preset
            from src.run.presets import CROPS

            default = CROPS["imagenet"][name.replace("_crops", "")][:1]
        assert default == published, name
        if "nargs" in flag:
            assert action.nargs == "+", name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_docstring_says_what_the_paper_is_and_what_differs_on_one_screen(script):
    doc = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    assert "Deviations" in doc and "arXiv:" in doc and doc.count("\n") <= 30


@pytest.mark.slow
def test_importing_a_script_does_nothing():
    names = sorted(path.stem for path in ROOT.glob("*.py"))
    code = "import importlib, torch\nbefore = torch.random.get_rng_state()\n"
    code += f"for name in {names}:\n    importlib.import_module(name)\n"
    code += "    assert torch.equal(before, torch.random.get_rng_state()), name\n"
    code += "    assert not torch.cuda.is_initialized(), name\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
