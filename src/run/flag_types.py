"""Types of command-line values, each with an error that says what would be right."""

import argparse
import math
from collections.abc import Callable


def boolean(text: str) -> bool:
    """The published true / false values of a flag."""
    values = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return values[text.lower()]


def positive(kind: Callable) -> Callable:
    """An argparse type: int or float above zero."""

    def parse(text):
        value = kind(text)
        if not value > 0 or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def at_least_zero(kind: Callable) -> Callable:
    """An argparse type: int or float, zero or more."""

    def parse(text):
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
        return value

    parse.__name__ = f"{kind.__name__} of 0 or more"
    return parse


def probability(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a probability from 0 to 1, not {text}")
    return value
