"""Types for argparse whose messages say what was expected."""

import argparse
from collections.abc import Callable
from math import isnan, nan


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a type for whole numbers from `least` to `most`, or without an upper limit."""

    def parsed(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least or (most is not None and number > most):
            wanted = f"{least} or more" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"is {number}; expected {wanted}")
        return number

    return parsed


def named_number(text: str) -> tuple[str, float]:
    """Parse NAME=NUMBER."""
    name, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = nan
    if not (equals and name) or isnan(value):
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text!r}")
    return name, value
