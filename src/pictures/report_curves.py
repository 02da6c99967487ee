"""Curves of several runs as SVG inside a page: a panel for each figure of the logs, a line for each run.

Which panels there are is that of src/pictures/run_curves.py. Lines have the classes run-0, run-1, ...,
whose colours are the page's, light or dark.
"""

import math
from collections.abc import Sequence

from .report_runs import is_number

# Units of a panel, which is about as many pixels wide.
WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
MOST_POINTS = 240  # of a line that are drawn, evenly spaced
MARKED = 12  # points of a line that are drawn as points, at most
LARGEST, SMALLEST = 1e300, 1e-300  # where curves end, and ranges that are drawn as flat
ROOM = 4  # between the lowest or highest point and the end of the panel
TICKS = 4

Points = list[tuple[float, float]]


def points_of(lines: Sequence[dict], key: str) -> Points:
    """(epoch, figure) of the lines of a log that have it, at most MOST_POINTS of them."""
    points = [(line["epoch_float"], line[key]) for line in lines if is_number(line.get(key))]
    if len(points) <= MOST_POINTS:
        return points
    steps = (round(i * (len(points) - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS))
    return [points[i] for i in steps]


def draw_panel(series: Sequence[Points], description: str) -> str:
    """An SVG of some lines, one for each run, [] for a run without one.

    description: the text for those who do not see it, already escaped. Raises ValueError without points.
    """
    points = [point for line in series for point in line]
    if not points:
        raise ValueError("a panel needs a point")
    across = _Axis([0.0, *(x for x, _ in points)], LEFT, WIDTH - RIGHT)
    up = _Axis([y for _, y in points], HEIGHT - BOTTOM - ROOM, TOP + ROOM)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{description}">']
    for tick in up.ticks:
        y = f"{up(tick):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy=".32em" class="end">{label(tick)}</text>')
    for tick in across.ticks:
        x, y = f"{across(tick):.1f}", HEIGHT - BOTTOM + 15
        parts.append(f'<text x="{x}" y="{y}" class="middle">{label(tick)}</text>')
    for i, line in enumerate(series):
        places = [f"{across(x):.1f} {up(y):.1f}" for x, y in line]
        if len(places) > 1:
            parts.append(f'<path class="line run-{i}" d="M{"L".join(places)}"/>')
        if len(places) <= MARKED:
            for place in places:
                x, y = place.split()
                parts.append(f'<circle class="run-{i}" cx="{x}" cy="{y}" r="2.6"/>')
    return "".join([*parts, "</svg>"])


class _Axis:
    """From the values of an axis to the units of a panel; ticks: values to be named."""

    def __init__(self, values, start, end):
        low, high = (_within(x, -LARGEST, LARGEST) for x in (min(values), max(values)))
        if not high - low > max(1e-9 * max(abs(low), abs(high)), SMALLEST):
            room = 0.05 * abs(high) if abs(high) > SMALLEST else 0.5
            low, high = low - room, high + room
        step = round_step((high - low) / TICKS)
        first = math.ceil(low / step - 1e-9)
        count = math.floor(high / step + 1e-9) - first + 1
        self.ticks = [(first + i) * step for i in range(count)]
        self.low, self.high, self.start = low, high, start
        self.length = end - start

    def __call__(self, value):
        share = (_within(value, self.low, self.high) - self.low) / (self.high - self.low)
        return self.start + share * self.length


def _within(value, low, high):
    return min(max(value, low), high)


def round_step(step: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... and their tenths that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * x for x in (1, 2, 5, 10) if power * x >= step * (1 - 1e-9))


def label(value: float) -> str:
    """A tick's value in a few letters: 0.05, 20, 15k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k" if abs(value) < 1e6 else f"{value:.2g}"
    return f"{value:.4g}"
