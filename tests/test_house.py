"""The rules of the house: which rooms may import which, what a script drags along, how code is written.

What does not keep a rule yet stands in that rule's dict of exceptions, with how far off it is. A test
fails when more is added, and also when less is left than its dict says: then take the exception out, or
lower it. `python -m tests.test_house` prints the dicts as they would be now.
"""

import ast
import functools
import importlib
import pprint
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.house import (
    functions_of,
    loaded_files,
    num_lines,
    python_files,
    splatted_literals,
    star_calls,
    wide_lines,
)
from scripts.copy_method import closure, file_of, imports_of
from tests.test_scripts import LAUNCHER_FLAGS

ROOT = Path(__file__).parent.parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in python_files(ROOT)}
TEXTS = {name: path.read_text() for name, path in FILES.items()}
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
METHODS = [name for name in SCRIPTS if name.startswith("main_")]
# Modules of src/ by dotted name.
MODULES = {
    name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name
    for name in FILES
    if name.startswith("src/")
}

# The order of the rooms: a file imports its own room, and rooms of rows above its own.
ORDER = [
    {"errors"},
    {"dist"},
    {"data", "nets", "cluster", "losses", "optim"},
    {"run"},
    {"labels"},
    {"evaluate"},
    {"pictures"},
]
# What loading a script may load of src/: files and lines. The figures may fall, and rise only with the
# reason in the commit. A script that is not here, such as a copy, may have those of the largest.
BUDGETS = {
    "main_swav": (27, 6910),
    "main_simclr": (26, 6760),
    "main_selav2": (31, 7640),
    "main_deepclusterv2": (32, 7850),
    "main_rotnet": (32, 7490),
    "main_dino": (31, 7670),
    "main_deepcluster": (39, 8760),
    "main_deepercluster": (42, 9640),
    "main_clusterfit": (37, 8450),
}
FUNCTION_LINES = 90
# Files whose functions take the whole command line: of flags, and what visualize.py chooses from.
FLAG_FILES = re.compile(r"src/(run|evaluate|pictures)/\w*flags\.py|src/pictures/\w+_command\.py")

# ============ exceptions, one dict a rule; see above ============
UPWARD_IMPORTS = {}
CIRCLES = {}
OVER_BUDGET = {}
STAR_CALLS = {}
SPLATTED_LITERALS = {}
LONG_FUNCTIONS = {}
WIDE_LINES = {}
UNTYPED = {}
TAKERS_OF_ARGS = {
    "src/run/run.py:Run.__init__": 1,  # keeps all of it, for the checkpoint
}
UNREAD_FLAGS = {}


# ============ what does not keep a rule ============
@functools.cache
def trees():
    """The parsed files by name: a second or two, which only these tests are to wait for."""
    return {name: ast.parse(text) for name, text in TEXTS.items()}


def room_of(module):
    """The room of a module of src/, by dotted name: src.nets.resnet -> nets; a single file is one too."""
    return module.split(".")[1] if "." in module else ""


def floor_of(room):
    """Place of a room in the order."""
    return next(
        i for i, rooms in enumerate(ORDER) if ("optim" if room == "gradients" else room) in rooms
    )


def module_imports(module):
    """The modules of src/ that a module imports when it is loaded."""
    loaded, _ = imports_of(module, ROOT)
    return sorted({name for name in loaded if name in MODULES and name not in ("src", module)})


def upward_imports():
    """Imports that the order of the rooms forbids: (file, imported module): 1."""
    found = {}
    for module, file in MODULES.items():
        for imported in module_imports(module):
            own, other = room_of(module), room_of(imported)
            is_optim = {own, other} == {"optim", "gradients"}
            if own != other and not is_optim and floor_of(other) >= floor_of(own):
                found[f"{file} <- {imported}"] = 1
    return found


def circles():
    """Circles of imports at module level, each by its first module and its round: 1."""
    imports = {module: module_imports(module) for module in MODULES}
    found, done = {}, set()

    def visit(module, path):
        if module in path:
            circle = path[path.index(module) :]
            first = circle.index(min(circle))
            found[" <- ".join(circle[first:] + circle[:first])] = 1
        elif module not in done:
            for imported in imports[module]:
                visit(imported, [*path, module])
            done.add(module)

    for module in imports:
        visit(module, [])
    return found


def imported_names(tree):
    """Modules that a file names in its imports, wherever they stand; relative ones with their dots."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return names


@functools.cache
def loaded_by_methods():
    """The files of src/ that loading each method's script loads; see bench/house.py."""
    return loaded_files(ROOT, METHODS)


def over_budget():
    """Scripts that load more than they may: script: (files, lines)."""
    largest = max(BUDGETS.values())
    found = {}
    for script, files in loaded_by_methods().items():
        size = sum(TEXTS[file].count("\n") for file in files)
        max_files, max_lines = BUDGETS.get(script, largest)
        if len(files) > max_files or size > max_lines:
            found[script] = (len(files), size)
    return found


def counts(rule):
    """How often each file breaks a rule on trees, where it does."""
    found = {name: len(rule(tree)) for name, tree in trees().items()}
    return {name: count for name, count in found.items() if count}


def long_functions():
    """Functions of more than 90 lines: file:function: lines."""
    return {
        f"{name}:{function}": num_lines(node)
        for name, tree in trees().items()
        for function, node in functions_of(tree)
        if num_lines(node) > FUNCTION_LINES
    }


def takers_of_args():
    """Functions of src/ that take a whole command line, outside the files of flags: 1."""
    return {
        f"{name}:{function}": 1
        for name, tree in trees().items()
        if name.startswith("src/") and not FLAG_FILES.fullmatch(name)
        for function, node in functions_of(tree)
        for parameter in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if parameter.arg == "args"
    }


def untyped_functions():
    """Public functions of src/ with a parameter or a result that names no type: 1."""
    found = {}
    for name, tree in trees().items():
        if not name.startswith("src/"):
            continue
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        public = [node for node in classes if not node.name.startswith("_")]
        for node in [*tree.body, *(part for parent in public for part in parent.body)]:
            if not isinstance(node, ast.FunctionDef) or re.match("_(?!_init__)", node.name):
                continue
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [p.arg for p in named if p.annotation is None and p.arg not in ("self", "cls")]
            if bare or (node.returns is None and node.name != "__init__"):
                found[f"{name}:{node.name}"] = 1
    return found


def wide_files():
    """Files with lines of more than 110 characters: how many."""
    found = {name: len(wide_lines(text)) for name, text in TEXTS.items()}
    return {name: count for name, count in found.items() if count}


def names_read(tree):
    """What a file may read of a command line: args.name, args["name"], and names in strings."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            last = getattr(node.value, "attr", None) or getattr(node.value, "id", "")
            if last.endswith(("args", "arguments", "known")):
                names.add(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            names.add(node.slice.value)
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            names |= {part.value for part in node.elts if isinstance(part, ast.Constant)}
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant):
            names.add(node.left.value)
        elif isinstance(node, ast.Call):
            names |= {part.value for part in node.args if isinstance(part, ast.Constant)}
    return names


def unread_flags():
    """Flags that neither their script nor what it needs of src/ reads: script --flag: 1."""
    read_by = {name: names_read(tree) for name, tree in trees().items()}
    found = {}
    for script in SCRIPTS:
        if not re.match("main_|eval_|visualize|export", script):
            continue
        needed = [MODULES[module] for module in closure(script, ROOT, lambda module: True)]
        read = set().union(*(read_by[name] for name in [f"{script}.py", *needed]))
        for action in importlib.import_module(script).get_parser()._actions:
            if action.dest not in read | LAUNCHER_FLAGS | {"help"}:
                found[f"{script} --{action.dest}"] = 1
    return found


# Rules with exceptions: what breaks them now.
RULES = {
    "UPWARD_IMPORTS": upward_imports,
    "CIRCLES": circles,
    "OVER_BUDGET": over_budget,
    "STAR_CALLS": lambda: counts(star_calls),
    "SPLATTED_LITERALS": lambda: counts(splatted_literals),
    "LONG_FUNCTIONS": long_functions,
    "WIDE_LINES": wide_files,
    "UNTYPED": untyped_functions,
    "TAKERS_OF_ARGS": takers_of_args,
    "UNREAD_FLAGS": unread_flags,
}


def check(rule):
    """Fail where more breaks a rule than its exceptions say, or less."""
    found, excepted = RULES[rule](), globals()[rule]
    new = {name: value for name, value in found.items() if excepted.get(name) != value}
    gone = {name: value for name, value in excepted.items() if name not in found}
    assert not new, f"breaks the rule, or less than {rule} says, which then is to be lowered: {new}"
    assert not gone, f"keeps the rule now: take it out of {rule}: {gone}"


# ============ the rooms ============
def test_rooms_import_rooms_to_their_left_only():
    check("UPWARD_IMPORTS")


def test_no_modules_import_each_other_in_a_circle():
    check("CIRCLES")


def test_every_room_has_its_place_in_the_order():
    rooms = {room_of(module) for module in MODULES} - {"", "gradients"}
    assert rooms <= set().union(*ORDER)


def test_nothing_imports_a_script():
    scripts = {name for name in SCRIPTS if re.match("main_|eval_|visualize|extract|export", name)}
    for name in FILES:
        if name.startswith("src/") or "/" not in name:
            assert not scripts & set(imported_names(trees()[name])), name


def test_imports_inside_src_are_relative_and_nowhere_else():
    for name, tree in trees().items():
        for imported in imported_names(tree):
            if name.startswith("src/"):
                assert imported.partition(".")[0] != "src", (name, imported)
            else:
                assert not imported.startswith("."), (name, imported)


def test_only_the_package_of_the_collectives_has_an_init_file_that_is_not_empty():
    doors = {name for name in FILES if name.startswith("src/") and name.endswith("__init__.py")}
    assert {name for name in doors if TEXTS[name].strip()} == {"src/dist/__init__.py"}


def test_every_folder_of_src_is_a_package():
    for name in FILES:
        if name.startswith("src/"):
            assert (FILES[name].parent / "__init__.py").exists(), name


def test_every_import_of_src_names_something_that_is_there():
    for module in MODULES:
        for imported in [name for names in imports_of(module, ROOT) for name in names]:
            if imported.partition(".")[0] == "src":
                assert file_of(imported, ROOT), (module, imported)


# ============ what a script drags along ============
def test_a_script_loads_no_more_of_src_than_its_budget():
    check("OVER_BUDGET")


def test_what_the_source_text_says_is_loaded_is_what_is_loaded():
    for script, files in loaded_by_methods().items():
        modules = closure(script, ROOT, follow_lazy=lambda module: False)
        assert sorted(MODULES[module] for module in modules if TEXTS[MODULES[module]]) == files


def test_help_loads_nothing_that_only_a_run_needs():
    scripts = [name for name in SCRIPTS if re.match("main_|eval_|visualize|export", name)]
    code = """
import importlib, sys
for script in sys.argv[1:]:
    importlib.import_module(script).get_parser().format_help()
heavy = ("torchvision", "sklearn", "scipy", "matplotlib", "tensorboard", "timm", "submitit")
print(*(name for name in heavy if name in sys.modules))
"""
    command = [sys.executable, "-c", code, *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_flag_is_read_in_its_script_or_in_what_the_script_needs():
    check("UNREAD_FLAGS")


# ============ how code is written ============
def test_no_call_has_a_literal_tuple_behind_a_star():
    check("STAR_CALLS")


def test_no_tuple_or_dict_is_made_only_to_be_splatted_in_the_next_statement():
    check("SPLATTED_LITERALS")


def test_functions_have_at_most_ninety_lines():
    check("LONG_FUNCTIONS")


def test_lines_have_at_most_110_characters():
    check("WIDE_LINES")


def test_public_functions_name_the_types_of_their_parameters_and_of_what_they_return():
    check("UNTYPED")


def test_only_files_of_flags_take_the_whole_command_line():
    check("TAKERS_OF_ARGS")


def test_only_the_files_of_processes_name_the_gpu_or_the_environment():
    devices = {f"src/dist/{name}.py" for name in ("process", "collectives", "launch", "syncbn")}
    for name in set(MODULES.values()) - devices:
        for word in ("os.environ", '"cuda"', ".cuda("):
            assert word not in TEXTS[name], (name, word)


# ============ the rules see what they are for ============
@pytest.mark.parametrize(
    "rule, code, lines",
    [
        (star_calls, "f(*(a, b), c)", [1]),
        (star_calls, "f(*[a, b])", [1]),
        (star_calls, "f(*names, *(g(x) for x in y))", []),
        (splatted_literals, "pair = (a, b)\nf(*pair)", [1]),
        (splatted_literals, "def f():\n    options = {'a': 1}\n    return g(**options)", [2]),
        (splatted_literals, "pair = (a, b)\nf(*pair)\ng(pair)", []),  # used again
        (splatted_literals, "pair = (a, b)\nf(pair)", []),
        (splatted_literals, "pair = g()\nf(*pair)", []),
        (splatted_literals, "pair = (a, b)\nh()\nf(*pair)", []),
        (splatted_literals, "x = (1, 2)\nf(*x)\nx = (3, 4)\nf(*x)", [1, 3]),  # each is used once
        (splatted_literals, "if y:\n    x = (1, 2)\n    f(*x)", [2]),
    ],
)
def test_a_riddle_is_seen(rule, code, lines):
    assert rule(ast.parse(code)) == lines


def test_what_is_read_of_a_command_line_is_seen():
    code = "args.a; other.b; run.arguments['c']; names = ('d',); 'e' in args; getattr(args, 'f')\n"
    code += "add('--g', dest='h', default='i'); presets = {'j': 1}; self.run_args.k"
    assert names_read(ast.parse(code)) - {"--g"} == set("acdefk")


def test_a_line_of_110_characters_is_not_wide():
    assert wide_lines("x" * 110 + "\n" + "y" * 111 + "\n") == [2]


def test_methods_and_inner_functions_are_functions():
    tree = ast.parse(
        "class A:\n    def f(self):\n        def g():\n            pass\n        return g\n"
    )
    assert [(name, num_lines(node)) for name, node in functions_of(tree)] == [
        ("A.f", 4),
        ("A.f.g", 2),
    ]


if __name__ == "__main__":
    for rule_name, rule in RULES.items():
        sys.stdout.write(f"{rule_name} = {pprint.pformat(rule(), width=100)}\n")
