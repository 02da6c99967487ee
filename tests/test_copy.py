"""scripts/copy_method.py: a copy runs where the repository is not, and computes what the original does."""

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import copy_method
from tests import runs
from tests.faults import methods
from tests.gloo import Main
from tests.runs import ROOT, losses

SCRIPTS = sorted(path.name for path in ROOT.glob("main_*.py"))
FLAGS = "--epochs 1 --batch_size 64 --log_freq 1 --workers 0 --no-tensorboard".split()
# Runs a script as `python script.py` does, then writes which files its modules came from.
WATCHED = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    with open("files.json", "w") as file:
        json.dump(files, file)
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """192 images of digits: a few iterations."""
    return methods.digits_in_folders(tmp_path_factory.mktemp("digits"))


def copy(script, folder, *argv):
    assert copy_method.main([script, str(folder), *argv]) == 0
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(folder, script, *argv):
    """Start a copied script where nothing leads to the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-E", "-s", "-c", WATCHED, script, *argv]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check_same_run(tmp_path, script, name, argv):
    """Run a copy and the original at the same time; both logs must hold the same numbers."""
    flags = [*FLAGS, *argv]
    copied = start(tmp_path / "copy", f"main_{name}.py", "--dump_path", "run", *flags)
    original = Main(script.removesuffix(".py"), tmp_path / "original", flags)
    output = runs.finish(copied)
    assert original.wait(600) == 0, original.read()
    copied = losses(tmp_path / "copy" / "run")
    assert copied and copied == losses(tmp_path / "original")
    files = json.loads((tmp_path / "copy" / "files.json").read_text())
    outside = [ROOT / "src", ROOT / "tests", ROOT / script]
    for file in filter(None, files):
        assert not any(Path(file).is_relative_to(place) for place in outside), file
    return output


# ============ it runs ============
@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copy_trains_as_its_original_does_to_the_last_bit(tmp_path, script, digits):
    copy(script, tmp_path / "copy", "--name", "mine")
    small = shlex.split(methods.METHODS[script.removeprefix("main_").removesuffix(".py")])
    flags = ["--preset", "tiny", "--data_path", str(digits), *small, "--knn_freq", "0"]
    output = check_same_run(tmp_path, script, "mine", flags)
    assert output.count("src/pictures is not there") == 1 and "Traceback" not in output


@pytest.mark.slow
def test_a_copy_in_another_package_with_all_extras_evaluates_and_draws_too(tmp_path, digits):
    argv = "--with knn plots shards --package mylib --name mine".split()
    files = copy("main_rotnet.py", tmp_path / "copy", *argv)
    assert not [path for path in files if path.startswith("src")]
    for path, text in files.items():
        if path.endswith(".py"):
            assert not re.search(r"\b(from|import) src\b|\bsrc[./]\w|[\"']src[\"']", text), path
    flags = [
        "--preset",
        "tiny",
        "--data_path",
        str(digits),
        *shlex.split(methods.METHODS["rotnet"]),
    ]
    check_same_run(tmp_path, "main_rotnet.py", "mine", [*flags, "--knn_freq", "1"])
    logs = [tmp_path / "copy" / "run" / "log.jsonl", tmp_path / "original" / "log.jsonl"]
    knn = [
        [line["knn"] for line in map(json.loads, log.read_text().splitlines()) if "knn" in line]
        for log in logs
    ]
    assert knn[0] == knn[1] and len(knn[0]) == 1
    assert {path.name for path in (tmp_path / "copy" / "run" / "plots").iterdir()} >= {
        "crops.png",
        "curves.png",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, sentence",
    [
        (
            "--knn_freq 20",
            "error: --knn_freq 20 needs src/evaluate, which this copy lacks: copy it with --with knn, or "
            "give --knn_freq 0",
        ),
        (
            "--data_path images.tar",
            "error: --data_path images.tar needs src/data/shards.py, which this copy lacks: copy it with "
            "--with shards, or give a folder of images",
        ),
    ],
)
def test_what_was_not_copied_is_refused_before_anything_is_trained(tmp_path, argv, sentence):
    copy("main_simclr.py", tmp_path / "copy")
    (tmp_path / "copy" / "images.tar").touch()
    process = start(
        tmp_path / "copy", "main_simclr.py", *FLAGS, "--dump_path", "run", *argv.split()
    )
    output = process.communicate(timeout=300)[0]
    assert (process.returncode, output.strip()) == (2, sentence)
    assert not (tmp_path / "copy" / "run").exists()


# ============ what is in it ============
@pytest.mark.slow
def test_a_copy_has_what_is_needed_and_no_evaluation_and_pictures(tmp_path):
    files = copy("main_simclr.py", tmp_path / "new" / "copy")
    assert {"main_simclr.py", "README.md", "LICENSE", "src/nets/resnet.py"} <= set(files)
    assert {"src/dist/syncbn.py", "src/nets/weights.py"} <= set(files)  # torchrun, --init_from
    absent = ("src/evaluate", "src/pictures", "src/labels", "src/cluster", "src/nets/vision")
    assert not [path for path in files if path.startswith(absent)]
    assert len(files["README.md"].splitlines()) == 10
    for path, text in files.items():  # its presets do not ask for what is not there
        assert not re.search(r'"knn_freq": [1-9]', text), path


def test_files_of_src_are_copied_as_they_are(tmp_path):
    files = copy("main_simclr.py", tmp_path, "--with", "knn", "plots", "--name", "mine")
    sources = [path for path in files if path.startswith("src/")]
    assert {"src/evaluate/knn.py", "src/pictures/curves.py"} <= set(sources)
    for path in sources:
        assert files[path] == (ROOT / path).read_text(), path


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_of_a_copy_has_the_new_name_in_all_places(tmp_path, script):
    old = script.removeprefix("main_").removesuffix(".py")
    text = copy(script, tmp_path, "--name", "mymethod")["main_mymethod.py"]
    assert 'method="mymethod"' in text and f'method="{old}"' not in text
    assert "python main_mymethod.py" in text and f"main_{old}.py" not in text
    assert not re.search(rf"runs/{old}\b|runs/{old}_", text)
    assert "scripts/" not in text.split('"""')[1]  # launchers are not copied


def test_imports_are_followed_by_where_they_stand(tmp_path):
    texts = {
        "main_x.py": "from src import dist\nfrom src.run.run import Run\n",
        "src/__init__.py": "",
        "src/dist/__init__.py": "from .process import init\n",
        "src/dist/process.py": "import os\n",
        "src/run/__init__.py": "",
        "src/run/run.py": (
            "from typing import TYPE_CHECKING\n"
            "from .. import dist\n"
            "from . import log\n"
            "if TYPE_CHECKING:\n    from ..never import Type\n"
            "try:\n    from ..tried import x\nexcept ImportError:\n    x = None\n"
            "class Run:\n    def probe(self):\n        from ..later.knn import votes\n"
        ),
        "src/run/log.py": "import src.named\n",
        "src/later/__init__.py": "",
        "src/later/knn.py": "from ..behind import y\n",
        **{f"src/{name}.py": "" for name in ("never", "tried", "named", "behind", "unused")},
    }
    for path, text in texts.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    loaded = ["src", "src.dist", "src.dist.process", "src.named", "src.run", "src.run.log"]
    loaded += ["src.run.run", "src.tried"]
    assert copy_method.closure("main_x", tmp_path, lambda module: False) == loaded
    lazy = ["src.behind", "src.later", "src.later.knn"]
    assert copy_method.closure("main_x", tmp_path, lambda module: True) == sorted(loaded + lazy)


# ============ the page about it ============
@pytest.mark.slow
def test_the_page_names_files_and_functions_that_are_there():
    page = (ROOT / "docs" / "copy.md").read_text()
    places = re.findall(r"`([\w/]+\.py)(?::(\w+))?`", page)
    places = [place for place in places if place[0] != "main_mymethod.py"]
    assert len(places) > 40
    for path, name in places:
        path = path if "/" in path or path.startswith(("main_", "eval_")) else f"scripts/{path}"
        tree = ast.parse((ROOT / path).read_text())
        defined = {getattr(node, "name", None) for node in tree.body}
        assert not name or name in defined, (path, name)


def test_the_names_that_stay_are_there():
    page = (ROOT / "docs" / "copy.md").read_text()
    names = re.findall(r"`((?:src|main_\w+)(?:\.\w+)*\.(?!py)\w+)`", page)
    assert len(names) >= 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


# ============ refusals ============
@pytest.mark.parametrize(
    "argv, sentence",
    [
        ("main_swav.py full", "is not empty: name a folder that is empty or not there yet"),
        ("main_swav.py full/file", "is a file: name a folder that is empty or not there yet"),
        ("main_swav.py new --name my-method", "--name my-method is no name in Python"),
        ("main_swav.py new --name 2nd", "--name 2nd is no name in Python"),
        ("main_swav.py new --name class", "--name class is no name in Python"),
        ("main_swav.py new --package a.b", "--package a.b is no name in Python"),
        ("main_swav.py new --package ssl", "--package ssl would hide Python's own module ssl"),
        ("main_swav.py new --package torch", "--package torch hides the package torch"),
        ("main_swa.py new", "there is no main_swa.py to copy: take one of main_clusterfit.py, "),
        ("eval_knn.py new", "there is no eval_knn.py to copy"),
        ("../main_swav.py new", "there is no ../main_swav.py to copy"),
    ],
)
def test_what_cannot_be_copied_is_one_sentence_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, argv, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert copy_method.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and sentence in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]


def test_the_program_needs_the_standard_library_only(tmp_path):
    program = ROOT / "scripts" / "copy_method.py"
    command = [sys.executable, "-I", "-S", str(program), "main_rotnet.py", str(tmp_path / "copy")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy" / "main_rotnet.py").exists()


# ============ a copy inside the repository ============
@pytest.mark.slow
def test_a_copied_script_beside_the_others_passes_their_tests(tmp_path):
    for name in ("main_simclr.py", "main_mine.py"):
        shutil.copy(ROOT / "main_simclr.py", tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "golden").mkdir(parents=True)
    for name in ("__init__.py", "conftest.py", "test_scripts.py", "golden/official_flags.json"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-vv",
        "tests/test_scripts.py",
    ]
    done = subprocess.run(
        [*command, "-m", "slow or not slow", "-k", "mine or importing"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("main_mine") == 2 and "3 passed" in done.stdout
