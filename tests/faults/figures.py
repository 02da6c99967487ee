"""How many faults of each kind were tried and survived: kept with the tests' reports, also under xdist."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

PROPERTY = "faults"


class Figures:
    """Keeps count of the faults of a test. record: pytest's record_property."""

    def __init__(self, record: Callable[[str, object], None]):
        self._record = record

    @contextlib.contextmanager
    def fault(self, kind: str, count: int = 1) -> Iterator[None]:
        """Inside, faults are tried and what is left is looked at: an error means that they were lost."""
        survived = 0
        try:
            yield
            survived = count
        finally:
            self._record(PROPERTY, [kind, count, survived])


def table(reports: list) -> list[str]:
    """Markdown, a row a kind of fault, of the reports of a session; empty if no fault was tried."""
    tried, survived = Counter(), Counter()
    for report in reports:
        if getattr(report, "when", None) != "call":
            continue
        for name, value in report.user_properties:
            if name == PROPERTY:
                kind, count, good = value
                tried[kind] += count
                survived[kind] += good
    if not tried:
        return []
    lines = ["", "| fault | tried | survived | lost |", "|---|---|---|---|"]
    for kind in sorted(tried):
        lost = tried[kind] - survived[kind]
        lines.append(f"| {kind} | {tried[kind]:,} | {survived[kind]:,} | {lost:,} |")
    return lines
