"""What the page passes to `hdm-plan`: listed experiments and cards, and numbers, so that nothing else is read."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from threading import Lock
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from hdm_lightning.app.shelf import chosen
from hdm_lightning.app.side_by_side import whole_from
from hdm_lightning.cli.overrides import CONF, composed
from hdm_lightning.cli.plan_schedule import PlanResult, run_plan
from hdm_lightning.errors import UserError, first_line
from hdm_lightning.profiling.gpus import CPU, GPUS
from hdm_lightning.training.recorded import recorded_values

PAPER = "the paper's schedule"
WIDTH = 120
_COMPOSING = Lock()
"""Hydra's state is global to the process."""


@dataclass(frozen=True)
class Plan:
    """A forecast: the command that prints it, its output, and one row per stage and a row of totals, see `COLUMNS`."""

    command: str
    text: str
    rows: Sequence[Sequence[str]]


COLUMNS = ("stage", "samples", "micro-batch", "images/s", "hours", "rent $", "kWh", "memory GiB", "fits")


def experiments() -> list[str]:
    """Return the ready-made trainings, and the default schedule of `hdm-plan`."""
    files = resources.files(CONF).joinpath("experiment").iterdir()
    return [PAPER, *sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))]


def cards() -> list[str]:
    """Return the cards whose figures are known."""
    return [name for name in GPUS if name != CPU]


def plan(experiment: str, card: str, count: float, budget_usd: float | None, more: Mapping[str, float | None]) -> Plan:
    """Forecast an experiment on some cards, or propose a schedule for a budget.

    Args:
        more: keys of `hdm-plan` and their numbers; None leaves a key out.

    Raises:
        UserError: a choice is not in its list, or the plan is refused.
    """
    overrides = [f"gpus={whole_from(count, 'cards', 1, 1024)}x{chosen({name: name for name in cards()}, card, 'card')}"]
    name = chosen({name: name for name in experiments()}, experiment, "experiment")
    overrides = [*([] if name == PAPER else [f"experiment={name}"]), *overrides]
    if budget_usd:
        overrides.append(f"budget_usd={_positive(budget_usd, 'budget'):.15g}")
    overrides += [f"{key}={_positive(value, key):.15g}" for key, value in more.items() if value]
    result, notes = _planned(overrides)
    console = Console(file=io.StringIO(), width=WIDTH, no_color=True)
    for note in notes:
        console.print(note, markup=False)
    console.print(result.report)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [_row(stage) for stage in result.content["stages"]]
    return Plan(" ".join(["hdm-plan", *overrides]), text, [*rows, _total(result.content["stages"])])


def _planned(overrides: Sequence[str]) -> tuple[PlanResult, list[str]]:
    notes: list[str] = []
    with _COMPOSING:
        try:
            config = recorded_values(composed("plan", overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(first_line(error), where="experiment", hint="choose another") from error
    return run_plan(config, log=notes.append), notes


def _row(stage: Mapping[str, Any]) -> list[str]:
    asked = stage["stage"]
    return [
        asked["name"],
        f"{asked['samples']:,}",
        str(stage["micro_batch"]),
        f"{stage['images_per_s']:,.1f}",
        f"{stage['hours']:,.1f}",
        f"{stage['rent_usd']:,.2f}",
        f"{stage['kwh']:,.1f}",
        f"{stage['memory']['total'] / 2**30:.1f}",
        "yes" if stage["fits"] else "no",
    ]


def _total(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row of totals, without the encoding of latents before the first stage."""
    sums = [sum(stage[key] for stage in stages) for key in ("hours", "rent_usd", "kwh")]
    samples = sum(stage["stage"]["samples"] for stage in stages)
    return ["all", f"{samples:,}", "", "", f"{sums[0]:,.1f}", f"{sums[1]:,.2f}", f"{sums[2]:,.1f}", "", ""]


def _positive(value: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
        raise UserError(f"is {value!r}", where=what, hint="enter a number above 0")
    return float(value)
