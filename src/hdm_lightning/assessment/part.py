"""What a part of an evaluation is: a key, a heading, a check that costs nothing, and the measuring."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass

from hdm_lightning.assessment.context import Context
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.results import Failed, PartResult


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        key: as on the command line.
        title: its heading.
        check: raises `UserError` where the part cannot be done, before anything is read or drawn.
        run: measures one set of weights.
    """

    key: str
    title: str
    check: Callable[[Context], None]
    run: Callable[[Context], PartResult]


def nothing_to_check(context: Context) -> None:
    """For parts that can always be done."""


def check_networks(context: Context) -> None:
    """For parts that need a feature network and nothing else.

    Raises:
        UserError: there is none.
    """
    context.data.require_networks()


def failure(part: str, weights: str, error: Exception) -> Failed:
    """The record of a part that failed."""
    told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    trace = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    return Failed(part, weights, told, trace)
