"""Compare two evaluations image by image, and summarize several trainings of one recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.findings import rounded
from hdm_lightning.evaluation.recorded_numbers import Recorded
from hdm_lightning.metrics.bootstrap import Estimate
from hdm_lightning.metrics.comparisons import (
    OverTrainings,
    PairedDifference,
    holm,
    over_trainings,
    paired_difference,
)
from hdm_lightning.metrics.proportions import count_independent

_NOT_IN_BOTH = "{} is not measured image by image in both"

Verdict = Literal["better", "worse", "differs", "the same", "not told apart"]


@dataclass(frozen=True)
class ComparedMeasure:
    """One measure of two models.

    Attributes:
        name: `part.measure`.
        first, second: values.
        difference: second − first, image by image.
        adjusted_p: p-value for the whole family (Holm).
        margin: within which the two count as the same.
        primary: whether it is one of the primary measures.
    """

    name: str
    first: float
    second: float
    difference: PairedDifference
    adjusted_p: float
    margin: float
    primary: bool
    better: str
    level: float

    @property
    def verdict(self) -> Verdict:
        """How the second model compares, at the level of the intervals."""
        if not self.adjusted_p < self.level:
            return "the same" if self.difference.within(self.margin) else "not told apart"
        if self.better not in ("higher", "lower"):
            return "differs"
        return "better" if (self.difference.value > 0) == (self.better == "higher") else "worse"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class ModelComparison:
    """All measures that two evaluations have image by image, and the parts and measures left out, with reasons."""

    measures: tuple[ComparedMeasure, ...]
    apart: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"measures": [each.to_json() for each in self.measures], "not_compared": dict(self.apart)}


def compare_models(
    first: Recorded, second: Recorded, *, primary: Sequence[str] = (), margin: float = 0.05, confidence: float = 0.95
) -> ModelComparison:
    """Compare the second model with the first, on the same prompts, seeds and reference images.

    Args:
        first, second: two evaluations.
        primary: measures that the comparison is about, named before looking; by default those of the evaluation.
            They are one family for Holm's correction, the others another.
        margin: shares within it, and other numbers within this share of the first's value, count as the same.
        confidence: of intervals; 1 minus it is the level of the tests.

    Raises:
        UserError: nothing can be compared image by image, or a primary measure is missing.
    """
    apart = _parts_apart(first, second)
    shared = [n for n in first.outcomes if n in second.outcomes and n.partition(".")[0] not in apart]
    apart |= {name: reason for name in shared if (reason := _too_few(first.outcomes[name]))}
    names = [name for name in shared if name not in apart]
    if not names:
        raise _nothing_compared(second, shared, apart)
    asked = list(primary) or [name for name in first.primary if name in names]
    for name in asked:
        if name not in names:
            what = f"{name} cannot be compared: {apart[name]}" if name in apart else _NOT_IN_BOTH.format(name)
            raise UserError(what, where="--primary", hint=f"choose one of {', '.join(names)}")
    found = {name: _difference(first.outcomes[name], second.outcomes[name], name, confidence) for name in names}
    adjusted: dict[str, float] = {}
    for family in (asked, [name for name in names if name not in asked]):
        adjusted |= holm({name: found[name].p for name in family})
    rows = []
    for name in [*asked, *(each for each in names if each not in asked)]:
        one, other = (each.measures[name]["value"] for each in (first, second))
        of_share = bool(first.measures[name].get("trials"))
        allowed, better = margin if of_share else margin * abs(one), str(first.measures[name]["better"])
        numbers = (one, other, found[name], adjusted[name], allowed)
        rows.append(ComparedMeasure(name, *numbers, name in asked, better, level=1 - confidence))
    return ModelComparison(tuple(rows), apart)


def _parts_apart(first: Recorded, second: Recorded) -> dict[str, str]:
    """Return the parts whose images of one number do not have the same prompt and seed, each with the reason."""
    apart = {}
    for part, needed in first.depends.items():
        if part not in second.depends:
            apart[part] = "only in one"
        elif different := [key for key, value in needed.items() if value != second.depends[part].get(key)]:
            apart[part] = f"not of the same {' and '.join(different)}"
    return apart


def _too_few(outcome: Mapping[str, Any]) -> str | None:
    """Return why a measure's images say nothing about others; None if they do."""
    count = len(outcome["values"])
    trials = outcome.get("trials") or [1] * count
    units = outcome.get("units") or [[str(row)] for row in range(count)]
    used = [names for names, asked in zip(units, trials, strict=False) if asked]
    if not used:
        return "no image has a trial of it"
    if count_independent(used) > 1:
        return None
    return "one image alone" if len(used) == 1 else "images of one combination alone"


def _nothing_compared(second: Recorded, shared: Sequence[str], apart: Mapping[str, str]) -> UserError:
    """Return the error; `shared` is what both have image by image, all of it too little."""
    why = "; ".join(f"{name}: {reason}" for name, reason in apart.items()) or "no part has outcomes of both"
    hint = (
        "evaluate both with more images, of two combinations or more"
        if shared
        else "evaluate both with the same --seed, --data and counts, by this version"
    )
    return UserError(f"nothing can be compared image by image ({why})", where=str(second.path), hint=hint)


def _difference(first: Mapping[str, Any], second: Mapping[str, Any], name: str, confidence: float) -> PairedDifference:
    same = all(first.get(key) == second.get(key) for key in ("units", "trials"))
    if not same or len(first["values"]) != len(second["values"]):
        raise UserError("the images have different prompts", where=name, hint="evaluate both with the same counts")
    options = {"trials": first.get("trials") or None, "units": first.get("units") or None}
    return paired_difference(first["values"], second["values"], confidence=confidence, **options)


def _table(*columns: str) -> Table:
    """Return a table in which a narrow terminal folds names, never numbers."""
    table = Table()
    table.add_column("measure", overflow="fold", min_width=12)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def comparison_table(comparison: ModelComparison) -> Table:
    """Return a table with a row per measure, the primary ones first."""
    table = _table("first", "second", "difference", "interval", "p (Holm)", "could show", "second is")
    for row in comparison.measures:
        one = row.difference
        value, interval = rounded(Estimate(one.value, one.low, one.high, one.units))
        table.add_row(
            f"{row.name} *" if row.primary else row.name,
            f"{row.first:.4g}",
            f"{row.second:.4g}",
            value,
            interval,
            f"{row.adjusted_p:.2g}",
            f"±{one.smallest:.2g}",
            f"{row.verdict} (±{row.margin:.2g})" if row.verdict == "the same" else row.verdict,
        )
    return table


def summarise_trainings(runs: Sequence[Recorded], confidence: float = 0.95) -> dict[str, OverTrainings]:
    """Summarize over trainings each number that all of them have.

    Raises:
        UserError: there are fewer than two, or they have no measure in common.
    """
    if len(runs) < 2:
        raise UserError("one training says nothing about another", where="RUNS", hint="pass two or more, better 5 to 8")
    names = [name for name in runs[0].measures if all(name in run.measures for run in runs)]
    if not names:
        raise UserError("the evaluations have no measure in common", where="RUNS", hint="evaluate all of them alike")
    found = {}
    for name in names:
        measures = [run.measures[name] for run in runs]
        trials = [int(each.get("trials") or 0) for each in measures]
        shares = trials if all(trials) and all(0 <= each["value"] <= 1 for each in measures) else None
        found[name] = over_trainings([each["value"] for each in measures], trials=shares, confidence=confidence)
    return found


def trainings_table(found: Mapping[str, OverTrainings], confidence: float) -> Table:
    """Return a table with a row per measure: these trainings, the center of all such trainings, and one further one.

    That center is the share at the mean logit for shares, and the mean for other numbers.
    """
    level = f"{confidence:.0%}"
    table = _table("mean", "range", f"center of all\nsuch, {level}", f"one further\ntraining, {level}")
    for name, one in found.items():
        spans = ((one.least, one.most), (one.low, one.high), (one.next_low, one.next_high))
        table.add_row(name, f"{one.mean:.3g}", *(f"{low:.3g} … {high:.3g}" for low, high in spans))
    return table
