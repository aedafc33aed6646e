"""What an evaluation found, as plain values: measures with intervals, curves, galleries, and what was left out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.metrics.bootstrap import Estimate

FORMAT = "hdm-lightning evaluation 1"
Better = Literal["lower", "higher", "one", "zero", "none"]
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Measure:
    """One number of one model.

    Attributes:
        name: unique within a part, lower case, such as `frechet_efficientnet_lite0`.
        estimate: value and interval.
        better: which way is better; `one` and `zero` name an ideal value, `none` a number for orientation only.
        unit: of the value, or empty.
        about: one sentence for a reader who does not know the measure.
        chance: value of a model that knows nothing, where there is one.
    """

    name: str
    estimate: Estimate
    better: Better = "lower"
    unit: str = ""
    about: str = ""
    chance: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        rest = {"better": self.better, "unit": self.unit, "about": self.about, "chance": self.chance}
        return {**asdict(self.estimate), **rest}


@dataclass(frozen=True)
class Curve:
    """Estimates along an axis, for a chart.

    Attributes:
        title, x_label, y_label: what is shown.
        x: centres of the points.
        estimates: one each.
    """

    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True)
class Gallery:
    """Pictures, uint8 (H,W,3), with captions, shown in rows of `columns`."""

    title: str
    pictures: tuple[Picture, ...]
    captions: tuple[str, ...]
    columns: int = 0


@dataclass(frozen=True)
class PartResult:
    """What one part of an evaluation found for one set of weights.

    Attributes:
        part: its key, such as `distances`.
        title: its heading.
        measures: in the order of showing.
        curves, galleries: for the report.
        record: settings and counts that pin the numbers.
    """

    part: str
    title: str
    measures: Sequence[Measure] = ()
    curves: Sequence[Curve] = ()
    galleries: Sequence[Gallery] = ()
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """A part that was not evaluated: why, and what would make it possible."""

    part: str
    why: str
    hint: str = ""


@dataclass(frozen=True)
class Failed:
    """A part that broke off: which weights it measured, the error as people are told it, and its traceback."""

    part: str
    weights: str
    error: str
    traceback: str = ""


@dataclass(frozen=True)
class Evaluation:
    """All that was found.

    Attributes:
        subject: what was evaluated: path, fingerprint, samples seen …
        settings: counts, seeds, networks with their preprocessing, sampling settings, bootstrap.
        results: for each set of weights (`ema`, `raw`) its parts.
        left_out: parts that could not be measured.
        seconds: how long it took.
        failed: parts that broke off.
    """

    subject: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: Mapping[str, Sequence[PartResult]]
    left_out: Sequence[LeftOut] = ()
    seconds: float = 0.0
    failed: Sequence[Failed] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but pictures, as plain values."""
        return {
            "format": FORMAT,
            "subject": dict(self.subject),
            "settings": dict(self.settings),
            "results": {weights: {one.part: _part(one) for one in parts} for weights, parts in self.results.items()},
            "left_out": [asdict(one) for one in self.left_out],
            "failed": [asdict(one) for one in self.failed],
            "seconds": round(self.seconds, 1),
        }

    def parts(self) -> list[tuple[str, str]]:
        """Key and title of every part that some weights have, in order."""
        return list(dict.fromkeys((one.part, one.title) for parts in self.results.values() for one in parts))

    def of(self, weights: str, part: str) -> PartResult | None:
        """The result of one part for one set of weights."""
        return next((one for one in self.results.get(weights, ()) if one.part == part), None)


def _part(result: PartResult) -> dict[str, Any]:
    return {
        "record": dict(result.record),
        "measures": {measure.name: measure.to_json() for measure in result.measures},
        "curves": [
            {
                **{k: v for k, v in vars(curve).items() if k != "estimates"},
                "points": [asdict(e) for e in curve.estimates],
            }
            for curve in result.curves
        ],
    }


def rounded(estimate: Estimate) -> tuple[str, str]:
    """Value and interval for people, to a digit below the interval's width."""
    width = abs(estimate.high - estimate.low)
    if not width:
        return f"{estimate.value:.4g}", f"{estimate.low:.4g} … {estimate.high:.4g}"
    digits = int(np.clip(1 - np.floor(np.log10(width)), 0, 6))
    return f"{estimate.value:.{digits}f}", f"{estimate.low:.{digits}f} … {estimate.high:.{digits}f}"
