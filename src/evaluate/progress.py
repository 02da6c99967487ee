"""A line with the rate and the time to go, now and then."""

import logging
import time

from ..run.log import duration

logger = logging.getLogger(__name__)

LOG_SECONDS = 5.0


class Progress:
    """Counts what is done of `total`; unit: what it is, for people, such as "images"."""

    def __init__(self, total: int, unit: str):
        self.total, self.unit, self.done = total, unit, 0
        self.start = self.logged = time.perf_counter()

    def count(self, subject: str = "") -> None:
        """One more is done; subject: of what, for the line."""
        self.done += 1
        now = time.perf_counter()
        if now - self.logged > LOG_SECONDS:
            self.logged, rate = now, self.done / (now - self.start)
            logger.info(
                f"{subject}{': ' if subject else ''}{self.done} of {self.total} {self.unit}, {rate:.2g} "
                f"{self.unit}/s, ETA {duration((self.total - self.done) / rate)}"
            )
