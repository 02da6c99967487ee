"""What a reader of a script has to walk through: files, lines, plumbing of the loop, riddles, seconds.

    python -m bench.house [--root CHECKOUT] [--scripts main_swav ...]

One row a script of the checkout, whose src/ may be flat or in rooms, and one for all its Python files.
  files, lines    of src/ that loading the script loads, empty files left out
  loop            lines of train_one_epoch, without its docstring, comments and blank lines
  plumbing        those of them that stand identically in the loops of at least four scripts
  star calls      calls with a literal `*(a, b)` or `*[a, b]`, in the script and what it loads
  splats          tuples and dicts whose only use is to be splatted in the next statement; likewise
  helpers         functions of src/ of at most 8 lines with one caller in the checkout; likewise
  wide            lines of more than 110 characters; likewise
  help            seconds of processor time of `--help` beyond those of `import torch`
The counts of what the code looks like are also what tests/test_house.py keeps down.
"""

import ast
import collections
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.measure import get_parser, parse_args, print_table

WIDTH = 110  # characters of a line
SHORT_HELPER = 8  # lines
LOOPS_ALIKE = 4  # scripts in whose loops a line stands that is called plumbing


# ============ what the code looks like ============
def star_calls(tree: ast.AST) -> list[int]:
    """Lines with a call that has a literal tuple or list behind a star."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and any(
            isinstance(arg, ast.Starred) and isinstance(arg.value, ast.Tuple | ast.List)
            for arg in node.args
        )
    ]


def _splatted_names(statement: ast.stmt) -> set[str]:
    """Names behind a star or two in the calls of a statement."""
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Call):
            behind_stars = [arg.value for arg in node.args if isinstance(arg, ast.Starred)]
            behind_stars += [keyword.value for keyword in node.keywords if keyword.arg is None]
            names |= {value.id for value in behind_stars if isinstance(value, ast.Name)}
    return names


def _reads(scope: ast.AST, name: str, assignment: ast.Assign) -> int:
    """How often a name is read between an assignment of it and the next one."""
    nodes = [node for node in ast.walk(scope) if isinstance(node, ast.Name) and node.id == name]
    line = assignment.end_lineno
    stores = [
        node.lineno for node in nodes if isinstance(node.ctx, ast.Store) and node.lineno > line
    ]
    end = min(stores, default=sys.maxsize)
    return sum(isinstance(node.ctx, ast.Load) and line < node.lineno <= end for node in nodes)


def splatted_literals(tree: ast.AST) -> list[int]:
    """Lines that bind a literal tuple or dict to a name whose only use is a splat in the next statement."""
    found = []
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if not isinstance(block, list):
                continue
            found += [
                statement
                for statement, following in zip(block, block[1:], strict=False)
                if isinstance(statement, ast.Assign)
                and isinstance(statement.value, ast.Tuple | ast.Dict)
                and isinstance(statement.targets[0], ast.Name)
                and statement.targets[0].id in _splatted_names(following)
            ]
    if not found:
        return []
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    scopes = [tree, *(node for node in ast.walk(tree) if isinstance(node, functions))]
    lines = {
        statement.lineno
        for statement in found
        for scope in scopes
        if any(node is statement for node in ast.walk(scope))
        and _reads(scope, statement.targets[0].id, statement) == 1
    }
    return sorted(lines)


def wide_lines(text: str) -> list[int]:
    """Numbers of the lines of more than 110 characters."""
    return [i for i, line in enumerate(text.split("\n"), 1) if len(line) > WIDTH]


def functions_of(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """All functions of a file by name, such as Run.step, those inside functions included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
            yield from functions_of(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from functions_of(node, f"{prefix}{node.name}.")
        else:
            yield from functions_of(node, prefix)


def num_lines(node: ast.AST) -> int:
    """Lines of a function or class, its docstring included, decorators left out."""
    return node.end_lineno - node.lineno + 1


# ============ what a checkout holds ============
def python_files(root: Path) -> list[Path]:
    """The files that the rules are for: scripts, src, bench, tests."""
    files = [*root.glob("*.py")]
    for folder in ("src", "scripts", "bench", "tests"):
        files += (root / folder).rglob("*.py")
    return sorted(files)


def loaded_files(root: Path, scripts: list[str]) -> dict[str, list[str]]:
    """The files of src/ that loading each script loads, by script, relative to root; empty ones left out."""
    code = """
import importlib, json, os, sys
loaded = {}
for script in sys.argv[1:]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]
    importlib.import_module(script)
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "src"]
    files = [os.path.relpath(module.__file__) for module in modules if module.__file__]
    loaded[script] = sorted(file for file in files if os.path.getsize(file))
print(json.dumps(loaded))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *scripts], cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def loop_lines(tree: ast.AST, text: str) -> list[str]:
    """The lines of code of train_one_epoch, stripped; none where a script has no such function."""
    loops = [node for name, node in functions_of(tree) if name == "train_one_epoch"]
    if not loops:
        return []
    loop = loops[0]
    first = loop.body[1] if ast.get_docstring(loop) else loop.body[0]
    lines = [line.strip() for line in text.split("\n")[first.lineno - 1 : loop.end_lineno]]
    return [line for line in lines if line and not line.startswith("#")]


def short_helpers(trees: dict[Path, ast.AST], root: Path) -> dict[Path, int]:
    """Functions of src/ of at most 8 lines that src/ and the scripts name once, by file."""
    callers = {
        path: tree for path, tree in trees.items() if path.parent == root or is_source(path, root)
    }
    names = collections.Counter()
    for tree in callers.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute):
                names[node.id if isinstance(node, ast.Name) else node.attr] += 1
    return {
        path: sum(
            isinstance(node, ast.FunctionDef)
            and num_lines(node) <= SHORT_HELPER
            and names[node.name] == 1
            for node in tree.body
        )
        for path, tree in trees.items()
        if is_source(path, root)
    }


def is_source(path: Path, root: Path) -> bool:
    return path.is_relative_to(root / "src")


# ============ the table ============
def processor_seconds(root: Path, argv: list[str]) -> float:
    """Seconds of processor time of a Python process, which others on the machine hardly change."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *argv], cwd=root, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)} ends with status {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def help_seconds(root: Path, scripts: list[str], repeats: int) -> list[float]:
    """Seconds of each script's --help beyond those of `import torch`: medians of interleaved runs."""
    starts = [["-c", "import torch"], *([f"{script}.py", "--help"] for script in scripts)]
    seconds = [[] for _ in starts]
    for _ in range(repeats):
        for argv, record in zip(starts, seconds, strict=True):
            record.append(processor_seconds(root, argv))
    torch_seconds, *medians = map(statistics.median, seconds)
    return [value - torch_seconds for value in medians]


def main(argv=None):
    parser = get_parser(__doc__, repeats=5)
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).parent.parent, help="the checkout"
    )
    parser.add_argument(
        "--scripts", nargs="+", default=None, help="such as main_swav; default: all"
    )
    args = parse_args(parser, {"scripts": ["main_simclr"]}, argv)
    root = args.root.resolve()
    methods = sorted(path.stem for path in root.glob("main_*.py"))
    evaluations = sorted(path.stem for path in root.glob("eval_*.py"))
    scripts = args.scripts or [*methods, *evaluations, "visualize"]

    texts = {path: path.read_text(encoding="utf-8") for path in python_files(root)}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    helpers = short_helpers(trees, root)
    loops = {
        name: loop_lines(trees[root / f"{name}.py"], texts[root / f"{name}.py"]) for name in methods
    }
    in_loops = collections.Counter(line for lines in loops.values() for line in set(lines))

    def looks(paths):
        return [
            sum(len(star_calls(trees[path])) for path in paths),
            sum(len(splatted_literals(trees[path])) for path in paths),
            sum(helpers.get(path, 0) for path in paths),
            sum(len(wide_lines(texts[path])) for path in paths),
        ]

    rows = []
    loaded = loaded_files(root, scripts)
    for script, seconds in zip(scripts, help_seconds(root, scripts, args.repeats), strict=True):
        paths = [root / file for file in loaded[script]]
        loop = loops.get(script) or []
        plumbing = sum(in_loops[line] >= LOOPS_ALIKE for line in loop)
        size = sum(texts[path].count("\n") for path in paths)
        in_loop = [len(loop), plumbing] if loop else ["-", "-"]
        looks_like = looks([root / f"{script}.py", *paths])
        rows.append([script, len(paths), size, *in_loop, *looks_like, f"{seconds:.2f}"])
    sources = [path for path in trees if is_source(path, root) and texts[path]]
    size = sum(texts[path].count("\n") for path in sources)
    rows.append(["all of src/", len(sources), size, "-", "-", *looks(sources), "-"])
    rows.append(["all Python files", len(texts), "-", "-", "-", *looks(trees), "-"])
    header = ["script", "files", "lines", "loop", "plumbing", "star calls", "splats"]
    header += ["helpers", "wide", "help"]
    print_table(f"what a script drags along, in {args.root}", header, rows, args.json)


if __name__ == "__main__":
    main()
