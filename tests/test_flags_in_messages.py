"""The flags that messages name are those of the script, as far as names of functions tell what it reaches."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAG = re.compile(r"--[A-Za-z]\w*")
# Flags in messages that these scripts reach by the names of functions and not in fact, with the reason.
UNREACHED = {
    "--batch_size": "EpochSampler is of training; who computes features has no global batch",
    "--conv": "R-MAC takes the last convolution of a network",
    "--drop_path_rate": "0 where no flag says another rate",
    "--dropout": "that of the network's definition",
    "--init_from": "defaults_of is of training",
    "--n_last_blocks": "1 is taken, and every network has it",
    "--nmb_prototypes": "what the run was made with",
    "--preset": "defaults_of is of training",
    "--sobel2RGB": "filters are folded where there are some",
    "--with": "of scripts/copy_method.py, and said so",
}


def imported(path):
    """The files of src that a file imports when it is loaded."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        base = ROOT if not node.level else path.parents[node.level - 1]
        module = base / (node.module or "").replace(".", "/")
        if ROOT / "src" not in (module, *module.parents):
            continue
        names = [module / alias.name for alias in node.names]
        for place in (module, module / "__init__", *names):
            if place.with_suffix(".py").is_file():
                yield place.with_suffix(".py")


def loaded(script):
    """The files of src that a script loads, with itself."""
    files, queue = [], [ROOT / f"{script}.py"]
    while queue:
        path = queue.pop()
        if path not in files:
            files.append(path)
            queue += imported(path)
    return files


def functions(tree, owner=None):
    """(name of the class or None, node) of all functions of a module, methods included."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield owner, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, node.name)


def names_in(node):
    """All names that are used in a node, also those behind a dot."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr


def reached(script):
    """Functions whose names are used by the script, or by functions that it reaches so: [(file, node)]."""
    trees = {path: ast.parse(path.read_text()) for path in loaded(script)}
    used = set(names_in(trees.pop(ROOT / f"{script}.py")))
    for tree in trees.values():  # what is done when a module is loaded
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                used |= set(names_in(node))
    waiting = [(path, *pair) for path, tree in trees.items() for pair in functions(tree)]
    found = []
    while True:
        taken = [
            (path, node)
            for path, owner, node in waiting
            if node.name in used or (owner in used and node.name.startswith("__"))
        ]
        if not taken:
            return found
        found += taken
        waiting = [row for row in waiting if (row[0], row[2]) not in taken]
        for _, node in taken:
            used |= set(names_in(node))


def flags_said(node):
    """Flags in what a function raises, and those that it hands on to be named."""
    said = set()
    for part in ast.walk(node):
        texts = [x.value for x in ast.walk(part) if isinstance(x, ast.Constant)]
        texts = [text for text in texts if isinstance(text, str)]
        if isinstance(part, ast.Raise):
            said |= {flag for text in texts for flag in FLAG.findall(text)}
        elif isinstance(part, ast.Call | ast.arguments):
            said |= {text for text in texts if FLAG.fullmatch(text)}
    return said


@pytest.mark.slow
@pytest.mark.parametrize("script", ["eval_copy_detection", "eval_image_retrieval"])
def test_the_flags_in_the_messages_of_retrieval_are_flags_of_the_script(script):
    parser = importlib.import_module(script).get_parser()
    wrong = {}
    for path, node in reached(script):
        others = flags_said(node) - set(parser._option_string_actions) - set(UNREACHED)
        if others:
            wrong[f"{path.relative_to(ROOT)}:{node.name}"] = sorted(others)
    assert wrong == {}
