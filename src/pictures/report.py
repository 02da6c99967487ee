"""One static page on several runs, side by side: HTML and CSS in a single file, without a script or a link.

Everything in it is in the file, pictures as data: URIs, so that it opens from a disk, an attachment or
an archive; a Content-Security-Policy forbids it to ask for anything else.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import printable
from .report_curves import MOST_POINTS, draw_panel, points_of
from .report_images import Embedded, embed_images
from .report_runs import Row, RunFolder, cluster_rows, evaluation_rows, plan_rows, setting_rows
from .report_style import css_of
from .run_curves import choose_panels

MOST_BYTES = 5_000_000  # of the page
SENTENCE = 600  # bytes that what stands in the place of a picture takes at most
MOST_ROWS = 400  # of a table

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{css}
</style>
</head>
<body>
<div class="page">
<header>
<h1>{title}</h1>
<ul class="runs" aria-label="Runs">{names}</ul>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{sections}
</main>
<footer>Drawn by <code>visualize.py report</code> on {date}. This file holds all that it shows.</footer>
</div>
</body>
</html>
"""


@dataclass
class Picture:
    """What a report shows of one run in one place: a file, or why there is none; notes go below it."""

    path: Path | None = None
    missing: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class SheetKind:
    """A kind of sheet: its heading, a sentence on it, what one shows, and where a run's folder has it.

    optional: left out of the page where no run has one.
    """

    name: str
    heading: str
    sentence: str
    shows: str
    files: Sequence[str]
    optional: bool = True


SHEETS = (
    SheetKind(
        name="crops",
        heading="Crops",
        sentence="What the networks were trained on: images and the crops of them, as they see them.",
        shows="a row for each image, the image and its crops",
        files=("plots/multicrop.png", "plots/crops.png"),
        optional=False,
    ),
    SheetKind(
        name="neighbours",
        heading="Nearest neighbours",
        sentence="Images, and those nearest to them by the cosine of their features.",
        shows="a row for each query, the query and its neighbours, the nearest first",
        files=("plots/neighbours/neighbours.png", "plots/neighbours.png"),
        optional=False,
    ),
    SheetKind(
        name="clusters",
        heading="Clusters",
        sentence="Clusters by the prototypes of the run, or by k-means: their nearest images, and others "
        "at random.",
        shows="a row for each of some clusters, the images nearest to its centroid and others at random",
        files=("plots/clusters/clusters.png",),
        optional=False,
    ),
    SheetKind(
        name="attention",
        heading="Attention",
        sentence="Self-attention of the class token in the last block.",
        shows="a row for each image, the image and its maps of attention",
        files=("plots/attention/sheet.png",),
    ),
    SheetKind(
        name="patches",
        heading="Patches",
        sentence="Patches in the colours of their features, by three principal components.",
        shows="images beside their patches in colours",
        files=("plots/patches/sheet.png",),
    ),
    SheetKind(
        name="classes",
        heading="Classes",
        sentence="Each class at the mean of the features of its images.",
        shows="a map of classes with an image of each",
        files=("plots/classes/classes.png",),
    ),
    SheetKind(
        name="filters",
        heading="Filters",
        sentence="The weights of the first layer.",
        shows="the filters of the first layer",
        files=("plots/filters/filters.png",),
    ),
    SheetKind(
        name="sobel",
        heading="Sobel filters",
        sentence="What the first layer is shown of an image.",
        shows="a row for each image, the image and its derivatives",
        files=("plots/sobel/sobel.png",),
    ),
)


def find_sheet(run: RunFolder, kind: SheetKind) -> Path | None:
    """The first of the files of a kind that a run's folder has."""
    paths = (run.folder / name for name in kind.files)
    return next((path for path in paths if path.is_file()), None)


# ============ the page ============
def write_page(
    runs: Sequence[RunFolder],
    sheets: dict[str, Sequence[Picture]],
    date: str,
    most_bytes: int = MOST_BYTES,
) -> str:
    """The page on some runs, of at most `most_bytes` in UTF-8.

    sheets: by the name of a SheetKind, a picture for each run. Raises ValueError where the text alone
    is too large.
    """
    paths = {
        (name, i): picture.path
        for name, pictures in sheets.items()
        for i, picture in enumerate(pictures)
        if picture.path is not None
    }
    bare = _page(runs, sheets, {place: Embedded() for place in paths}, date)
    room = most_bytes - len(bare.encode()) - SENTENCE * len(paths)
    if room < 0:
        raise ValueError(
            f"the page of {len(runs)} runs is larger than {most_bytes / 1e6:g} MB without any picture: "
            "give fewer runs"
        )
    embedded = dict(zip(paths, embed_images(list(paths.values()), room), strict=True))
    return _page(runs, sheets, embedded, date)


def _page(runs, sheets, embedded, date):
    """The page with its pictures by the name of their kind and the number of their run."""
    sections = {
        "Plan": _plan(runs),
        "Curves": _curves(runs),
        **{
            kind.heading: _sheets(runs, kind, sheets[kind.name], embedded)
            for kind in SHEETS
            if kind.name in sheets
        },
        "Evaluations": _evaluations(runs),
    }
    names = [_name(i, run) for i, run in enumerate(runs)]
    links = [f'<li><a href="#{_anchor(x)}">{x}</a></li>' for x in sections]
    return PAGE.format(
        policy=POLICY,
        title=f"Report on {len(runs)} run{'s' * (len(runs) != 1)}",
        css=css_of(len(runs)),
        names="".join(f"<li>{name}</li>" for name in names),
        links="".join(links),
        sections="\n".join(
            f'<section aria-labelledby="{_anchor(x)}">\n<h2 id="{_anchor(x)}">{x}</h2>\n{body}\n</section>'
            for x, body in sections.items()
        ),
        date=date,
    )


def escape(text: object) -> str:
    """A text of a file or a path, so that it is only text in HTML, in an attribute too."""
    return html.escape(printable(str(text)), quote=True)


def _anchor(heading):
    return heading.lower().replace(" ", "-")


def _name(i, run):
    """The name of a run beside a dot in the colour of its curves."""
    return f'<span class="dot run-{i}" aria-hidden="true"></span>{escape(run.name)}'


# ============ sections ============
def _plan(runs):
    """Plans, the settings that differ, and all of them behind a summary."""
    rows, parts = setting_rows(runs), []
    parts.append(_table(runs, plan_rows(runs), "Plans of the runs", "plan"))
    if len(runs) > 1:
        different = [replace(row, differs=False) for row in rows if row.differs]
        parts.append("<h3>Settings that differ</h3>")
        if different:
            parts.append(_table(runs, different, "Settings that differ", "setting", code=True))
        else:
            parts.append("<p>What the runs have in common is set alike in all of them.</p>")
    if rows:
        sentence = "<p>Those that differ are marked and begin with ≠.</p>" if len(runs) > 1 else ""
        table = _table(runs, rows, "All settings", "setting", code=True)
        parts.append(
            f"<details><summary>All {len(rows)} settings</summary>{sentence}{table}</details>"
        )
    else:
        parts.append(_missing("No run has an args.json, which would say its settings."))
    return "\n".join(parts)


def _curves(runs):
    """A panel for each figure that two runs have logged; of a single run for each."""
    logs = {run.name: run.lines for run in runs}
    panels = choose_panels(logs, None)
    silent = [run.name for run in runs if not run.lines]
    parts = [_missing(f"{name} has no log.jsonl with a line: it has no curves.") for name in silent]
    figures = []
    for key, title in panels:
        series = [points_of(run.lines, key) for run in runs]
        if not any(series):
            continue
        ends = [
            f"{run.name} {points[-1][1]:.4g} after epoch {points[-1][0]:.4g}"
            for run, points in zip(runs, series, strict=True)
            if points
        ]
        drawing = draw_panel(series, escape(f"{title} by epoch: {'; '.join(ends)}"))
        figures.append(f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>")
    if not figures:
        return "\n".join([*parts, _missing("No two of these runs have logged the same figure.")])
    names = "".join(f"<li>{_name(i, run)}</li>" for i, run in enumerate(runs))
    which = "all that two runs or more have logged" if len(runs) > 1 else "all that was logged"
    longest = max(len(run.lines) for run in runs)
    thinned = f"; of a curve at most {MOST_POINTS} points" if longest > MOST_POINTS else ""
    parts.append(f'<p class="pale">By epochs of training; {which}{thinned}.</p>')
    parts.append(f'<ul class="runs" aria-label="Colours of the runs">{names}</ul><p></p>')
    parts.append(f'<div class="panels">{"".join(figures)}</div>')
    return "\n".join(parts)


def _sheets(runs, kind, pictures, embedded):
    """The sheets of one kind side by side, and of clusters a table."""
    figures = []
    for i, (run, picture) in enumerate(zip(runs, pictures, strict=True)):
        image = embedded.get((kind.name, i), Embedded(missing=picture.missing))
        shown = _missing(image.missing)
        if image.uri or not image.missing:
            alt, mark = escape(f"{kind.heading} of {run.name}: {kind.shows}"), f"{kind.name}-{i}"
            shown = (
                f'<input type="checkbox" id="{mark}" aria-label="Show in its own size: {alt}">'
                f'<label for="{mark}"><span class="scroll"><img src="{image.uri}" alt="{alt}" '
                f'width="{image.width}" height="{image.height}"></span></label>'
            )
        notes = "".join(f'<p class="pale">{escape(note)}</p>' for note in picture.notes)
        figures.append(
            f'<figure class="sheet"><figcaption>{_name(i, run)}</figcaption>{shown}{notes}</figure>'
        )
    parts = [f'<p class="pale">{escape(kind.sentence)} A click shows a sheet in its own size.</p>']
    parts.append(f'<div class="side">{"".join(figures)}</div>')
    rows = cluster_rows(runs) if kind.name == "clusters" else []
    if rows:
        parts.append("<h3>What the clusters know</h3>")
        parts.append(_table(runs, rows, "Clusters", "measure", numbers=True))
        parts.append(
            '<p class="pale">Purity and NMI grow with the number of clusters by themselves: compare them '
            "at equal numbers only.</p>"
        )
    return "\n".join(parts)


def _evaluations(runs):
    """One table of all figures that evaluations have left."""
    rows = evaluation_rows(runs)
    if not rows:
        return _missing("No evaluation has left a file in these runs.")
    parts = [_table(runs, rows, "Evaluations", "evaluation", numbers=True)]
    if any("†" in value for row in rows for value in row.values):
        parts.append('<p class="pale">† its file is older than the last checkpoint of the run.</p>')
    return "\n".join(parts)


def _table(runs, rows, title, first, *, code=False, numbers=False):
    """A table with a column for each run, in a box of its own that scrolls.

    first: what the first column is, for those who hear it. code: values are in the letters of code.
    """
    heads = "".join(f'<th scope="col">{_name(i, run)}</th>' for i, run in enumerate(runs))
    kind = ' class="code"' if code else ' class="number"' if numbers else ""
    lines = []
    for row in rows[:MOST_ROWS]:
        differs = row.differs and len(runs) > 1
        sign, mark = ("≠ ", ' class="differs"') if differs else ("", "")
        cells = "".join(f"<td{kind}>{_cell(row, i)}</td>" for i in range(len(runs)))
        name = f'<th scope="row">{sign}{escape(row.name)}</th>'
        lines.append(f"<tr{mark}>{name}{cells}</tr>")
    more = len(rows) - MOST_ROWS
    note = f'<p class="pale">{more:,} rows more are left out.</p>' if more > 0 else ""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(title)}" tabindex="0"><table>'
        f'<thead><tr><th scope="col"><span class="pale">{escape(first)}</span></th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{note}"
    )


def _cell(row: Row, i: int) -> str:
    text = escape(row.values[i]) if row.values[i] else '<span class="pale">–</span>'
    return f'<strong>{text}</strong><span class="best">best</span>' if i in row.best else text


def _missing(sentence):
    return f'<p class="missing">{escape(sentence)}</p>'
