"""Read what `hdm-evaluate` and `hdm-demo` wrote: numbers, the outcomes behind them, and what they depend on."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.request import PRIMARY, SHAPES_PRIMARY
from hdm_lightning.json_files import parse_object

FILES = ("evaluation.json", "evaluation/evaluation.json", "demo.json")


@dataclass(frozen=True)
class Recorded:
    """The numbers of one set of weights.

    Attributes:
        path: of the file.
        weights: `ema`, `raw` or `file`.
        measures: by `part.measure`: value, better, chance; for shares also `trials`.
        outcomes: by `part.measure`, image by image: values, and trials and units if there are any.
        depends: by part, what must be equal for images of the same number to have the same prompt and seed.
        primary: names of the primary measures.
    """

    path: Path
    weights: str
    measures: Mapping[str, Mapping[str, Any]]
    outcomes: Mapping[str, Mapping[str, Any]]
    depends: Mapping[str, Any]
    primary: tuple[str, ...]


def read_recorded(path: Path, weights: str | None = None) -> Recorded:
    """Read a file, or the folder that it is in.

    Raises:
        UserError: there is no such file, it is not an evaluation, or does not have these weights.
    """
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        hint = f"run `hdm-evaluate {shlex.quote(str(path))}` first"
        raise UserError("contains no evaluation", where=str(path), hint=hint)
    try:
        content = parse_object(file.read_bytes())
        kind = str(content["format"])
        if kind.startswith("hdm-lightning demo"):
            return _of_demo(file, content)
        if kind.startswith("hdm-lightning evaluation"):
            return _of_evaluation(file, content, weights)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "pass what hdm-evaluate or hdm-demo of this version wrote"
        raise UserError(
            f"is not a readable evaluation ({type(error).__name__}: {error})", where=str(file), hint=hint
        ) from error
    raise UserError(f"has the format {kind!r}", where=str(file), hint="pass an evaluation.json or a demo.json")


def _of_evaluation(file: Path, content: Mapping[str, Any], weights: str | None) -> Recorded:
    there = content["results"]
    chosen = weights or next(iter(there))
    if chosen not in there:
        raise UserError(f"has no {chosen} weights", where=str(file), hint=f"choose one of {', '.join(there)}")
    measures, outcomes, depends = {}, {}, {}
    settings = content["settings"]
    for part, found in there[chosen].items():
        for name, images in found.get("outcomes", {}).items():
            outcomes[f"{part}.{name}"] = images
        for name, measure in found["measures"].items():
            trials = sum(found.get("outcomes", {}).get(name, {}).get("trials", [])) or _trials_of_share(measure)
            measures[f"{part}.{name}"] = {**measure, "trials": trials}
        reference = {} if part == "shapes" else settings["data"]["reference"]
        same = {"reference images": [reference.get(key) for key in ("order", "resolution")]}
        depends[part] = {"seed": settings["seed"], "counts and networks": found["record"], **same}
    primary = settings.get("primary", PRIMARY)
    return Recorded(file, chosen, measures, outcomes, depends, tuple(primary))


def _trials_of_share(measure: Mapping[str, Any]) -> int:
    return int(measure["samples"]) if str(measure.get("method", "")).startswith("Wilson") else 0


def _of_demo(file: Path, content: Mapping[str, Any]) -> Recorded:
    measures, outcomes = {}, {}
    for prefix, kinds in content["scores"].items():
        for kind, images in content["outcomes"][prefix].items():
            for criterion, right in images["right"].items():
                name = f"shapes.{prefix}_{kind}_{criterion}"
                score = kinds[kind][criterion]
                measures[name] = {"value": score["share"], "better": "higher", **score}
                trials = images["trials"][criterion]
                outcomes[name] = {"values": right, "trials": trials, "units": images["units"]}
    return Recorded(
        file, "ema", measures, outcomes, {"shapes": {"rule of what is held out": content["held_out"]}}, SHAPES_PRIMARY
    )
