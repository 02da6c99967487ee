"""The pages for people: what they name exists, their tables render, the README is short."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / f"{x}.md" for x in ("README", "RESULTS"))])
PAGES.append(ROOT / "CONTRIBUTING.md")
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
OF_A_COPY = {"main_mymethod.py", "main_mine.py"}  # made by a command of docs/copy.md
MOST_WORDS = 1200  # of the README, tables and code included
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)

each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", text)


def commands(text: str) -> list[list[str]]:
    """The words of each `python X.py ...` and `bash X.sh ...` of a page, in blocks and in prose."""
    lines = []
    for language, block in FENCE.findall(text):
        if language == "bash":
            lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", prose(text))
    found = []
    for line in lines:
        if not re.search(r"\.(py|sh)\b", line):
            continue
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            launched = {"python", "bash", "sbatch", "torchrun"} & set(words[:i])
            begins = i == 0 and len(words) > 1
            if (launched or begins) and re.fullmatch(r"[\w/.]+\.(py|sh)", word):
                rest = words[i + 1 :]
                end = next((k for k, x in enumerate(rest) if x in ("&&", "|")), len(rest))
                found.append([word, *rest[:end]])
                words[: i + 1] = [""] * (i + 1)  # what is behind && is launched anew
    return found


def text_with_flags_of(script: str) -> str:
    """The text in which the flags of a script are declared: its own, and that of what it may import."""
    path = ROOT / script
    text = path.read_text()
    if path.suffix == ".sh":
        text += "".join(p.read_text() for p in [path.with_suffix(".py")] if p.exists())
    elif path.parent == ROOT:
        text += "".join(source.read_text() for source in sorted((ROOT / "src").rglob("*.py")))
    if script == "run_with_submitit.py":  # and of the scripts that it launches
        text += "".join(main.read_text() for main in sorted(ROOT.glob("main_*.py")))
    return text


def cells(row: str) -> list[str]:
    """The cells of a row of a table; a bar in code or behind a backslash is a bar all the same."""
    assert row.startswith("|") and row.endswith("|"), row
    return re.split(r"(?<!\\)\|", row)[1:-1]


def tables(text: str) -> list[list[str]]:
    """The rows of each table: lines with a bar at their start, one below the other."""
    blocks = re.split(r"^(?!\|).*\n?", prose(text) + "\n", flags=re.M)
    return [block.strip().splitlines() for block in blocks if block.strip()]


def test_the_readme_has_at_most_1200_words():
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


@each_page
def test_every_link_and_picture_of_a_page_exists(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"https?://", target):
            continue
        file, _, heading = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in titles]
            assert heading in anchors, f"{page.name} links to {target}"


def test_every_picture_of_docs_is_shown_on_a_page():
    shown = "".join(page.read_text() for page in PAGES)
    for picture in (ROOT / "docs").glob("*.png"):
        assert re.search(rf"\]\((docs/)?{picture.name}\)", shown), picture.name


@each_page
def test_every_table_of_a_page_renders(page):
    lines = page.read_text().splitlines()
    for rows in tables(page.read_text()):
        assert len(rows) >= 3, f"{page.name}: no table, or one torn by a blank line: {rows}"
        assert all(re.fullmatch(r" *:?-+:? *", cell) for cell in cells(rows[1])), rows[1]
        for row in rows:
            assert len(cells(row)) == len(cells(rows[0])), row
        before = lines.index(rows[0]) - 1
        assert lines[before] == "", f"{page.name}: no blank line above {rows[0]}"


@each_page
def test_every_command_of_a_page_names_a_script_and_its_flags(page):
    for script, *words in commands(page.read_text()):
        if script in OF_A_COPY:
            continue
        assert (ROOT / script).exists(), f"{page.name}: {script}"
        declared = text_with_flags_of(script)
        for word in words:
            if word.startswith("--"):
                flag = re.sub(r"^--no-", "--", word.partition("=")[0])
                assert re.search(rf"{flag}\b(?!-)", declared), f"{page.name}: {script} {word}"


@each_page
def test_every_path_module_and_function_that_a_page_names_exists(page):
    for code in re.findall(r"`([^`\n]+)`", prose(page.read_text())):
        for path in re.findall(
            r"(?<![\w/.-])(?:src|tests|bench|scripts|docs)/[\w/.*]*[\w/*]", code
        ):
            assert list(ROOT.glob(path)), f"{page.name}: {path}"
        for script in re.findall(r"(?<![\w/.-])(?:main|eval)_\w+\.py", code):
            assert (ROOT / script).exists() or script in OF_A_COPY, f"{page.name}: {script}"
        for file, name in re.findall(r"^([\w/]+\.py):(\w+)$", code):
            assert defines(ROOT / file, name), f"{page.name}: {code}"
        for module in re.findall(r"(?<![\w/.-])(?:src|bench)(?:\.\w+)+", code):
            file = ROOT.joinpath(*module.split("."))
            exists = file.is_dir() or file.with_suffix(".py").exists()
            of_module = file.parent.with_suffix(".py")  # or a function of a module
            of_module = of_module.exists() and defines(of_module, file.name)
            assert exists or of_module, f"{page.name}: {module}"


def defines(file: Path, name: str) -> bool:
    """Whether a file of Python defines a function, a class or a constant of this name."""
    return bool(re.search(rf"^(def |class |){name}\b", file.read_text(), re.M))


def test_the_rooms_of_the_layout_page_have_the_files_that_it_names():
    rows = [row for rows in tables((ROOT / "docs" / "layout.md").read_text()) for row in rows]
    rooms = [cells(row) for row in rows if row.startswith("| `src/") and len(cells(row)) == 3]
    named = {re.search(r"`(src/\w+)/?", room)[1]: files.strip() for room, _, files in rooms}
    packages = {f"src/{path.parent.name}" for path in ROOT.glob("src/*/__init__.py")}
    assert packages == {room for room, files in named.items() if files}
    for room, files in named.items():
        for name in filter(None, files.split(", ")):
            assert (ROOT / room / f"{name}.py").exists(), f"{room}/{name}.py"
