"""visualize.py report: several runs side by side on one page that opens without a network."""

import argparse
import datetime
import logging
import shlex
from pathlib import Path

from ..errors import RunError, cause
from ..evaluate import flags as eval_flags
from ..run import checkpoint, flags
from ..run.flags import at_least_zero
from ..run.log import write_whole
from . import flags as picture_flags
from .clusters_command import CLUSTERS
from .crops_command import CROPS
from .flags import Command
from .neighbours_command import NEIGHBOURS
from .report import SHEETS, Picture, SheetKind, find_sheet, write_page
from .report_runs import RunFolder, open_runs

logger = logging.getLogger(__name__)

DRAWN = {"crops": CROPS, "neighbours": NEIGHBOURS, "clusters": CLUSTERS}  # where they are missing


def report(args: argparse.Namespace) -> None:
    """Write a page on several runs: plans, curves, crops, neighbours, clusters, evaluations."""
    output = Path(args.output)
    if output.is_dir():
        raise ValueError(
            f"--output {output} is a folder: give the name of a file, such as report.html"
        )
    if output.is_file() and not _is_page(output):
        raise ValueError(
            f"--output {output} is a file that is no HTML page, and would be overwritten: give another "
            "name, such as report.html"
        )
    checkpoint.check_writable(output.parent)
    runs = open_runs(args.runs)
    sheets = {}
    for kind in SHEETS:
        pictures = [_picture(args, run, kind) for run in runs]
        if any(picture.path for picture in pictures) or not kind.optional:
            sheets[kind.name] = pictures
    for run, name, picture in (
        (run, name, picture)
        for name, pictures in sheets.items()
        for run, picture in zip(runs, pictures, strict=True)
    ):
        if picture.missing:
            logger.info(f"{run.name}: {name}: {picture.missing}")
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    page = write_page(runs, sheets, date)
    write_whole(output, page)
    logger.info(
        f"{len(runs)} run{'s' * (len(runs) != 1)}, {len(page.encode()) / 1e6:.2f} MB, written to {output}"
    )


def _is_page(path):
    """Whether a file is HTML, by what it begins with, or is empty."""
    with path.open("rb") as file:
        start = file.read(1000).removeprefix(b"\xef\xbb\xbf").strip().lower()
    return not start or start.startswith((b"<!doctype html", b"<html"))


def _picture(args, run, kind):
    """A run's sheet of one kind, drawn where it is missing; or a sentence why there is none."""
    path, missing = find_sheet(run, kind), ""
    if path is None and kind.name in DRAWN:
        missing = _draw(args, run, kind)
        path = find_sheet(run, kind)
    if path is None:
        return Picture(missing=missing or f"This run has no {kind.files[0]}.")
    of_weights = kind.name != "crops"
    notes = []
    if of_weights and run.is_older(path):
        notes.append("Drawn before the last checkpoint of the run.")
    return Picture(path, notes=notes)


def _draw(args, run: RunFolder, kind: SheetKind) -> str:
    """Draw a sheet as its own command would, to the run's plots/; returns why not, "" where it did."""
    by_hand = f"python visualize.py {kind.name} --pretrained {shlex.quote(str(run.folder))}"
    if not args.draw_images:
        return f"Not drawn, as --draw_images is 0. By hand: {by_hand}"
    command = DRAWN[kind.name]
    parser = flags.Parser(kind.heading)
    command.add_flags(parser)
    words = ["--pretrained", str(run.folder)]
    if kind.name != "crops":
        words += ["--device", args.device]
    try:
        options = command.parse(parser, kind.name, words)
        command.check(options)
        if kind.name != "crops":
            number = len(eval_flags.open_split(options))
            if number > args.draw_images:
                return (
                    f"Not drawn: {number:,} images are more than --draw_images {args.draw_images:,}. By "
                    f"hand: {by_hand}"
                )
        logger.info(f"{run.name}: drawing {kind.name}")
        command.draw(options)
    except (OSError, ValueError, RunError, ImportError) as error:
        return f"Not drawn: {cause(error)}."
    except Exception as error:  # a picture less is no reason to have no page
        logger.warning(f"{run.name}: {kind.name} cannot be drawn", exc_info=error)
        return f"Not drawn: {type(error).__name__}: {cause(error)}. By hand: {by_hand}"
    return ""


# ============ arguments ============
# fmt: off
def add_report_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py report."""
    add = parser.add_argument_group("report").add_argument
    add("runs", nargs="*", default=[], metavar="RUN", help="folders of runs, a column each")
    add("--output", default="report.html", help="the page, one file")
    add("--draw_images", type=at_least_zero(int), default=20_000,
        help="draw the crops, neighbours and clusters that a run has no sheet of, the latter two of at "
        "most so many images; 0: none")
    add("--device", default="auto", help="to draw with: auto, cpu, cuda, cuda:1, mps")
# fmt: on


def check_report(args: argparse.Namespace) -> None:
    """Raise ValueError without a run."""
    if not args.runs:
        raise ValueError("report needs the folders of runs, such as: report runs/a runs/b")


REPORT = Command(report, add_report_flags, picture_flags.no_defaults, check_report)
