"""Results of an evaluation as plain values: measures with intervals, curves, galleries, and what was left out."""

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.errors import UserError
from hdm_lightning.metrics.bootstrap import Estimate

FORMAT = "hdm-lightning evaluation 1"
Better = Literal["lower", "higher", "one", "zero", "none"]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Measure:
    """One number of one model; `about` is a sentence for a reader who does not know it.

    Attributes:
        name: unique within a part, lower case, such as `frechet_efficientnet_lite0`.
        better: which way is better; `one` and `zero` are ideal values, `none` is a number for orientation only.
        chance: value of a model that knows nothing, if there is one.
    """

    name: str
    estimate: Estimate
    better: Better = "lower"
    unit: str = ""
    about: str = ""
    chance: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        rest = {"better": self.better, "unit": self.unit, "about": self.about, "chance": self.chance}
        return {**asdict(self.estimate), **rest}


@dataclass(frozen=True)
class Curve:
    """Estimates along an axis, one at each point, for a chart."""

    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    estimates: tuple[Estimate, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values, the estimates as `points`."""
        values = asdict(self)
        values["points"] = values.pop("estimates")
        return values


@dataclass(frozen=True)
class Group:
    """Images that belong together, uint8 (H,W,3), each under its label, with a caption for all."""

    caption: str
    images: Mapping[str, Pixels]


@dataclass(frozen=True)
class Gallery:
    """Groups of images under a title, shown with sides of at most `largest_px`."""

    title: str
    groups: tuple[Group, ...]
    largest_px: int = 320


@dataclass(frozen=True)
class Outcomes:
    """The values behind a measure, image by image, for other means or a comparison with another model's.

    Attributes:
        values: (N,); right answers if there are trials.
        trials: (N,), or none: then the measure is the mean of the values.
        units: names of what each image is about, if images depend on each other by it.
    """

    values: Sequence[float]
    trials: Sequence[int] = ()
    units: Sequence[Sequence[str]] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with seven digits."""
        kept = {"trials": [int(each) for each in self.trials], "units": [list(each) for each in self.units]}
        return {"values": [float(f"{value:.7g}") for value in self.values], **{k: v for k, v in kept.items() if v}}


@dataclass(frozen=True)
class Found:
    """Results of a part for one set of weights: measures in display order; settings and counts behind them in `record`.

    `outcomes` are those of measures that are means over images, by the measure's name.
    """

    measures: Sequence[Measure] = ()
    curves: Sequence[Curve] = ()
    galleries: Sequence[Gallery] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return everything but images, as plain values."""
        return {
            "record": dict(self.record),
            "measures": {measure.name: measure.to_json() for measure in self.measures},
            "curves": [curve.to_json() for curve in self.curves],
            "outcomes": {name: each.to_json() for name, each in self.outcomes.items()},
        }


@dataclass(frozen=True)
class LeftOut:
    """A part that was not evaluated: why, and what would make it possible."""

    part: str
    why: str
    hint: str = ""


@dataclass(frozen=True)
class Failed:
    """A part that failed: the weights it measured, the error message, and its traceback."""

    part: str
    weights: str
    error: str
    traceback: str = ""


@dataclass
class Evaluation:
    """All results, filled in part by part.

    Attributes:
        subject: what was evaluated: path, fingerprint, samples seen …
        settings: counts, seeds, networks with their preprocessing, sampling settings, bootstrap.
        results: for each set of weights (`ema`, `raw`) the results of each part, by its key.
        titles: headings of the parts, by their keys.
        left_out: parts that could not be measured.
        failed: parts that failed.
        seconds: how long it took.
        date: when it began, ISO 8601 with the offset from UTC.
        command: the command line of the evaluation.
    """

    subject: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: dict[str, dict[str, Found]]
    titles: Mapping[str, str] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    seconds: float = 0.0
    date: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))
    command: str = ""

    def fail(self, part: str, weights: str, error: Exception) -> None:
        """Record a part that failed."""
        if isinstance(error, UserError):
            self.failed.append(Failed(part, weights, str(error)))
        else:
            trace = "".join(traceback.format_exception(error))
            self.failed.append(Failed(part, weights, f"{type(error).__name__}: {error}", trace))

    def to_json(self) -> dict[str, Any]:
        """Return everything but images, as plain values."""
        results = {
            weights: {part: found.to_json() for part, found in parts.items()} for weights, parts in self.results.items()
        }
        return {
            "format": FORMAT,
            "subject": dict(self.subject),
            "settings": dict(self.settings),
            "results": results,
            "left_out": [asdict(one) for one in self.left_out],
            "failed": [asdict(one) for one in self.failed],
            "seconds": round(self.seconds, 1),
            "date": self.date,
            "command": self.command,
        }

    def parts(self) -> dict[str, str]:
        """Return the title of every part that some weights have, by key, in order."""
        keys = dict.fromkeys(part for parts in self.results.values() for part in parts)
        return {key: self.titles.get(key, key) for key in keys}

    def of(self, part: str) -> dict[str, Found]:
        """Return the results of a part, for each set of weights that it was measured on."""
        return {weights: parts[part] for weights, parts in self.results.items() if part in parts}

    def measures(self, part: str) -> list[dict[str, Measure]]:
        """Return the rows of a part's table: for each measure, in order, its value by weights."""
        rows: dict[str, dict[str, Measure]] = {}
        for weights, found in self.of(part).items():
            for measure in found.measures:
                rows.setdefault(measure.name, {})[weights] = measure
        return list(rows.values())


def rounded(estimate: Estimate) -> tuple[str, str]:
    """Format value and interval for display, to a digit below the interval's width."""
    width = abs(estimate.high - estimate.low)
    if not width:
        return f"{estimate.value:.4g}", f"{estimate.low:.4g} … {estimate.high:.4g}"
    digits = int(np.clip(1 - np.floor(np.log10(width)), 0, 6))
    return f"{estimate.value:.{digits}f}", f"{estimate.low:.{digits}f} … {estimate.high:.{digits}f}"
