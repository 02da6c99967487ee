"""Copy one method and just what it needs of src/ into an empty folder, where it runs on its own.

    python scripts/copy_method.py main_swav.py ../mine --name mymethod
                                  [--with knn plots shards] [--package mylib]

The copy holds main_mymethod.py, the files of src/ that it imports, followed from file to file in the
source text, a README and the LICENSE. What src/ imports only where it is used is copied too, but for
what --with adds:
  knn      src/evaluate, for --knn_freq; without it the presets of the copy say --knn_freq 0
  plots    src/pictures, for plots/curves.png and plots/crops.png
  shards   src/data/shards.py, for tar shards

Changed in the copy: the name of the script, of its method and of its run folders, the usage lines of
its docstring, and with --package the name of src/. Needs the standard library only. Exit status 2 and
one sentence where the script, the name or the folder will not do.
"""

import argparse
import ast
import functools
import keyword
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What --with adds: modules that are imported where they are used only.
EXTRAS = {"knn": "src.evaluate", "plots": "src.pictures", "shards": "src.data.shards"}
# Packages whose name is not that of their module.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


# ============ what a file imports ============
def file_of(module: str, root: Path) -> Path | None:
    """The file of a module by its dotted name, a package's being its __init__.py; None if there is none."""
    path = root.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def is_inside(module: str, package: str) -> bool:
    """Whether a module, by its dotted name, is a package or part of it."""
    return f"{module}.".startswith(f"{package}.")


def import_statements(tree: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """The imports of a file: (statement, whether it waits until a function is called)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, lazy
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not isinstance(node, ast.expr):  # which holds no statements
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from import_statements(node, lazy or is_function)


@functools.cache
def imports_in(text: str) -> list[tuple[ast.stmt, bool]]:
    """The same of the text of a file, which is read once however many modules need it."""
    return list(import_statements(ast.parse(text)))


def imported_modules(statement: ast.stmt, module: str, root: Path) -> list[str]:
    """The modules that an import statement of `module` names; what it takes out of one counts as that one."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    base = statement.module or ""
    if statement.level:
        is_package = file_of(module, root).name == "__init__.py"
        parts = module.split(".")
        parts = parts[: len(parts) - statement.level + is_package]
        base = ".".join([*parts, base] if base else parts)
    names = [f"{base}.{alias.name}" for alias in statement.names]
    return [name if file_of(name, root) else base for name in names]


def imports_of(module: str, root: Path) -> tuple[list[str], list[str]]:
    """What a module of `root` imports: (when it is loaded, when a function of it is called)."""
    loaded, lazy = [], []
    for statement, waits in imports_in(file_of(module, root).read_text(encoding="utf-8")):
        (lazy if waits else loaded).extend(imported_modules(statement, module, root))
    return loaded, lazy


def closure(module: str, root: Path, follow_lazy: Callable[[str], bool]) -> list[str]:
    """All modules of src/ that `module` needs, by name, the packages that hold them included.

    follow_lazy: whether a module is taken that is imported only where it is used.
    """
    needed, waiting = set(), [module]
    while waiting:
        loaded, lazy = imports_of(waiting.pop(), root)
        for name in [*loaded, *filter(follow_lazy, lazy)]:
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                part = ".".join(parts[:end])
                if is_inside(part, "src") and part not in needed and file_of(part, root):
                    needed.add(part)
                    waiting.append(part)
    return sorted(needed)


# ============ what changes in a copy ============
def rename_method(text: str, old: str, new: str) -> str:
    """A script under another name: file, method, run folders; launchers, which are not copied, go."""
    end = ast.parse(text).body[0].end_lineno  # of the docstring
    lines = text.splitlines(keepends=True)
    doc = [line for line in lines[:end] if not re.search(r"\bscripts/\S+\.sh\b", line)]
    text = "".join(doc + lines[end:])
    text = re.sub(rf"\bmain_{old}\b", f"main_{new}", text)
    text = re.sub(rf"\bruns/{old}(?![a-zA-Z0-9])", f"runs/{new}", text)
    return text.replace(f'method="{old}"', f'method="{new}"')


def rename_package(text: str, package: str) -> str:
    """A file in which src is another package: its imports, and the files that it mentions."""
    text = re.sub(r"\b(from|import) src\b", rf"\1 {package}", text)
    text = re.sub(r"\bsrc(?=[./]\w)", package, text)
    return text.replace('"src"', f'"{package}"')


def packages_of(texts: list[str]) -> list[str]:
    """What has to be installed for files to be loaded: their imports from outside."""
    names = set()
    for text in texts:
        for statement, lazy in import_statements(ast.parse(text)):
            if lazy or getattr(statement, "level", 0):
                continue
            modules = [alias.name for alias in statement.names]
            if isinstance(statement, ast.ImportFrom):
                modules = [statement.module]
            names |= {module.partition(".")[0] for module in modules}
    return sorted(PACKAGES.get(name, name) for name in names - sys.stdlib_module_names - {"src"})


def commit_of(root: Path) -> str:
    """The commit that is copied, for the README; empty where git does not know."""
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return f", commit {done.stdout.strip()}" if done.returncode == 0 else ""


def readme(name: str, script: str, package: str, packages: list[str], left_out: list[str]) -> str:
    """Ten lines: what this is, how it is started, what to change, what was left out."""
    title = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    extras = f"Left out: {', '.join(left_out)}; copy again with `--with {' '.join(left_out)}` to have it."
    return f"""# {name}

Copied from `{script}` of "{title}"{commit_of(ROOT)}; licence: [LICENSE](LICENSE).

    python main_{name}.py    # scikit-learn's scanned digits, to see it run; --help says the rest
    torchrun --nproc_per_node 8 main_{name}.py --data_path /images/train

Install {", ".join(packages)}; scikit-learn reads the digits, tensorboard and matplotlib are optional.
Change the loss, its flags in `get_parser`, `PRESETS` and the log line; `{package}/` is yours to change too.
{extras if left_out else "Nothing was left out: k-NN, pictures and tar shards are there."}
"""


def make_copy(script: str, name: str, chosen: list[str], package: str) -> dict[str, str]:
    """The files of a copy, by path: text. chosen: keys of EXTRAS."""
    left_out = set()

    def follow_lazy(module):
        for extra, folder_of_extra in EXTRAS.items():
            if is_inside(module, folder_of_extra) and extra not in chosen:
                left_out.add(extra)
                return False
        return True

    method = script.removeprefix("main_")
    modules = closure(script, ROOT, follow_lazy)
    paths = [file_of(module, ROOT) for module in modules]
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    files[f"main_{name}.py"] = rename_method(
        (ROOT / f"{script}.py").read_text(encoding="utf-8"), method, name
    )
    if "knn" in left_out:  # else the bare command would ask for what is not there
        files = {
            path: re.sub(r'"knn_freq": \d+', '"knn_freq": 0', text) for path, text in files.items()
        }
    packages = packages_of(list(files.values()))
    if package != "src":
        if package in packages:
            raise ValueError(
                f"--package {package} hides the package {package} that the copy imports"
            )
        files = {
            re.sub(r"^src/", f"{package}/", path): rename_package(text, package)
            for path, text in files.items()
        }
    left_out = [extra for extra in EXTRAS if extra in left_out]
    files["README.md"] = readme(name, f"{script}.py", package, packages, left_out)
    files["LICENSE"] = (ROOT / "LICENSE").read_text(encoding="utf-8")
    return files


# ============ main ============
def check_name(flag: str, name: str) -> None:
    """ValueError for what cannot be the name of a Python module."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(
            f"{flag} {name} is no name in Python: use letters, digits and _, such as mymethod"
        )


def check_args(args: argparse.Namespace) -> None:
    """ValueError on arguments with which no copy can be made."""
    scripts = sorted(path.name for path in ROOT.glob("main_*.py"))
    if args.script not in scripts:
        raise ValueError(f"there is no {args.script} to copy: take one of {', '.join(scripts)}")
    if args.name is not None:
        check_name("--name", args.name)
    check_name("--package", args.package)
    if args.package in sys.stdlib_module_names:
        raise ValueError(
            f"--package {args.package} would hide Python's own module {args.package}: use another name"
        )
    if args.folder.exists() and not args.folder.is_dir():
        raise ValueError(f"{args.folder} is a file: name a folder that is empty or not there yet")
    if args.folder.exists() and any(args.folder.iterdir()):
        raise ValueError(
            f"{args.folder} is not empty: name a folder that is empty or not there yet"
        )


def main(argv: list[str] | None = None) -> int:
    """Make the copy; returns the exit status."""
    args = get_parser().parse_args(argv)
    try:
        check_args(args)
        script = args.script.removesuffix(".py")
        name = args.name or script.removeprefix("main_")
        files = make_copy(script, name, args.extras, args.package)
        for path, text in files.items():
            target = args.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sources = [text for path, text in files.items() if path.startswith(f"{args.package}/") and text]
    num_lines = sum(text.count("\n") for text in sources)
    print(
        f"{args.folder}: main_{name}.py, {len(sources)} files of {args.package}/ with {num_lines:,} lines"
    )
    print(files["README.md"].splitlines()[-1])
    return 0


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("script", help="such as main_swav.py")
    parser.add_argument("folder", type=Path, help="where to: empty, or not there yet")
    parser.add_argument(
        "--name", default=None, help="of your method; unless given, that of the script"
    )
    parser.add_argument(
        "--with",
        dest="extras",
        nargs="+",
        default=[],
        choices=list(EXTRAS),
        help="what else to copy",
    )
    parser.add_argument("--package", default="src", help="name of the folder src/ in the copy")
    return parser


if __name__ == "__main__":
    sys.exit(main())
