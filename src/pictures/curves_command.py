"""visualize.py curves: the curves of several runs in one picture."""

import argparse
import logging
from pathlib import Path

from . import flags as picture_flags
from .flags import Command
from .run_curves import choose_panels, draw_runs, read_runs

logger = logging.getLogger(__name__)


def curves(args: argparse.Namespace) -> None:
    """Draw the curves of several runs in one picture, and what their evaluations say."""
    runs = read_runs(args.runs)
    panels, path = choose_panels(runs, args.curves), Path(args.dump_path) / "runs.png"
    if not panels:
        raise ValueError("--runs: no two of these runs have logged the same: name --curves")
    try:
        draw_runs(runs, panels, path)
    except ImportError as error:
        raise ValueError("curves need the package matplotlib: pip install matplotlib") from error
    logger.info(f"{len(runs)} runs, drawn to {path}")


# ============ arguments ============
# fmt: off
def add_curves_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of visualize.py curves."""
    add = parser.add_argument_group("curves").add_argument
    add("--runs", nargs="+", default=None, help="folders of runs, a line each; must be given")
    add("--curves", nargs="+", default=None,
        help="what is drawn, by the names in log.jsonl, such as loss knn (default: all that two runs have)")
    add("--dump_path", "--output_dir", default="plots", help="folder of the picture, runs.png")
# fmt: on


def check_curves(args: argparse.Namespace) -> None:
    """Raise ValueError without a run."""
    if not args.runs:
        raise ValueError("--runs must be given: the folders of runs, such as runs/a runs/b")


CURVES = Command(curves, add_curves_flags, picture_flags.no_defaults, check_curves)
