"""Drawing for the page: the same prompt, seeds and settings with several models, as `hdm-sample` would draw each."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.app.loaded_models import LoadedModels
from hdm_lightning.app.shelf import chosen, find_runs
from hdm_lightning.errors import UserError
from hdm_lightning.generation.drawing import draw_request
from hdm_lightning.generation.image_files import read_record, sha256_of
from hdm_lightning.generation.loading import find_pipeline_folder
from hdm_lightning.generation.sampling_settings import MAX_SEED, DrawingMachine, DrawingRequest, SamplingSettings
from hdm_lightning.interop import published
from hdm_lightning.interop.adapter_files import is_adapter
from hdm_lightning.interop.pipeline_folder import WEIGHT_KINDS, Weights

MOST_IMAGES = 256
"""Of one click, all models together."""
LAST_WEIGHTS = " (last weights)"


@dataclass(frozen=True)
class Choice:
    """A model of the page: where it is, and which of its weights."""

    path: Path
    weights: Weights = "ema"


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn: names as on the page, settings as in `SamplingSettings` without the size.

    Attributes:
        loras: names and weights.
        settings: what differs from the models' own settings.
    """

    prompt: str
    models: Sequence[str]
    width: int
    height: int
    seed: int = 0
    count: int = 1
    loras: Sequence[tuple[str, float]] = ()
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Drawn:
    """An image, its place in the grid of seeds and models, and what it was drawn with."""

    path: Path
    model: str
    seed: int


class Studio:
    """All that is drawn with.

    Args:
        runs: folders below which models and LoRAs are found.
        models, loras: further ones.
        out: folder for the images.
        machine: device, precision and batch.
        device: where.
        keep: models in memory.
    """

    def __init__(
        self,
        *,
        runs: Sequence[Path] = (),
        models: Sequence[str] = (),
        loras: Sequence[str] = (),
        out: Path = Path("samples"),
        machine: DrawingMachine | None = None,
        device: torch.device | None = None,
        keep: int = 2,
    ) -> None:
        self._runs, self._named, self._named_loras = runs, models, loras
        self.out, self.machine, self.device = out, machine or DrawingMachine(), device or torch.device("cpu")
        self.loaded = LoadedModels(keep)

    def models(self) -> dict[str, Choice]:
        """The models by name, those with averaged and last weights twice; read anew at each call."""
        paths = {name: run for name, run in find_runs(self._runs).items() if not is_adapter(run)}
        paths |= {name: Path(name) for name in self._named}
        found: dict[str, Choice] = {}
        for name, path in paths.items():
            try:
                folder = find_pipeline_folder(path)
            except UserError:  # damaged, which ends nothing here
                continue
            if folder is None:
                if name in self._named:
                    found[name] = Choice(path)
                continue
            kinds = [kind for kind in WEIGHT_KINDS if folder[0].has(kind)]
            found |= {name + (LAST_WEIGHTS if kind == "raw" else ""): Choice(path, kind) for kind in kinds}
        return found

    def loras(self) -> dict[str, Path]:
        """The LoRAs by name."""
        found = {name: run for name, run in find_runs(self._runs).items() if is_adapter(run)}
        return found | {name: Path(name) for name in self._named_loras}

    def settings_of(self, model: str) -> dict[str, Any]:
        """What a model is drawn with where nothing is said, all of `SamplingSettings`; no weights are read."""
        choice = chosen(self.models(), model, "model")
        found = find_pipeline_folder(choice.path, choice.weights)
        own = found[0].sampling if found else published.SAMPLING
        try:
            return SamplingSettings.from_json(own).to_json()
        except (TypeError, ValueError) as error:
            raise UserError(str(error), where=model, hint="look where the model comes from") from error

    def draw(
        self,
        wanted: Wanted,
        *,
        warn: Callable[[str], None],
        progress: Callable[[str, int, int], None],
    ) -> Iterator[list[Drawn]]:
        """All images drawn so far, after each model; those of one seed stand together.

        Raises:
            UserError: something does not fit; as `draw_request`.
        """
        models, choices = self.models(), {}
        for name in dict.fromkeys(wanted.models):
            choices[name] = chosen(models, name, "models")
        loras = [f"{chosen(self.loras(), name, 'LoRAs')}:{weight!r}" for name, weight in wanted.loras]
        if not choices:
            raise UserError("none is chosen", where="models", hint="choose one, or several to compare")
        if not 1 <= wanted.count <= MOST_IMAGES // len(choices):
            what = f"{wanted.count} of each of {len(choices)} models"
            raise UserError(what, where="images", hint=f"draw from 1 to {MOST_IMAGES} at once")
        drawn: dict[str, list[Path]] = {}
        for name, choice in choices.items():
            drawn[name] = draw_request(
                DrawingRequest(
                    model=str(choice.path),
                    prompts=(wanted.prompt,),
                    count=wanted.count,
                    seed=wanted.seed,
                    size=[f"{wanted.width}x{wanted.height}"],
                    out=self.out,
                    sheet=False,
                ),
                replace(self.machine, weights=choice.weights, lora=loras),
                dict(wanted.settings or {}),
                self.device,
                warn=lambda text, name=name: warn(f"{name}: {text}" if len(choices) > 1 else text),  # type: ignore[misc]
                progress=lambda _, done, total, name=name: progress(name, done, total),  # type: ignore[misc]
                load=self.loaded.load,
            )
            yield _by_seed(drawn, wanted.seed)

    def settings_from(self, picture: Path) -> tuple[Wanted, list[str]]:
        """What a picture of `hdm-sample` or of this page was drawn with, and what of it cannot be had here.

        Of the paths in it none is opened: a model or a LoRA is one that the page has, or is named as missing.

        Raises:
            UserError: it carries no settings.
        """
        record = read_record(picture)
        settings, notes = record.settings.to_json(), []
        model = next((name for name, choice in self.models().items() if _is_of(choice, record.model)), None)
        if model is None:
            notes.append(f"it was drawn with {record.model}, which is none of this page's models")
        elif sha256_of(*_weight_files(self.models()[model])) != record.fingerprint:
            notes.append(f"{model} has other weights by now than it was drawn with")
        if record.image is not None:
            notes.append("it was started from an image: hdm-sample --repeat does that, this page does not")
        here, loras = {path.resolve(): name for name, path in self.loras().items()}, []
        for each in record.loras:
            name = here.get(Path(each["name"]).resolve())
            if name is None:
                notes.append(f"it was drawn with the LoRA {each['name']}, which is none of this page's")
            else:
                loras.append((name, float(each["weight"])))
        size = {key: settings.pop(key) for key in ("width", "height")}
        del settings["strength"]  # of the image that it was started from
        models = [] if model is None else [model]
        return Wanted(record.prompt, models, **size, seed=record.seed, loras=loras, settings=settings), notes


def seed_from(text: object) -> int:
    """A seed as typed: digits, as a browser's numbers end at 2⁵³.

    Raises:
        UserError: it is none.
    """
    digits = str(text).strip()
    if not digits.isascii() or not digits.isdigit() or len(digits) > 19 or int(digits) > MAX_SEED:
        raise UserError(f"{digits[:30]!r} is no seed", where="seed", hint=f"give a whole number from 0 to {MAX_SEED}")
    return int(digits)


def settings_from_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from the numbers and texts of a form, each in the kind that `SamplingSettings` has for it.

    Raises:
        UserError: a number is missing or none.
    """
    kinds = {each.name: each.type for each in fields(SamplingSettings)}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if kinds[name] in (int, float):
            found[name] = number_from(value, name.replace("_", " "), whole=kinds[name] is int)
        else:
            found[name] = value
    return found


def number_from(value: Any, where: str, *, whole: bool = False) -> float | int:
    """A finite number of a form. Raises UserError, naming the field: it is none, or not whole where it must be."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise UserError(f"{value!r} is no {kind}", where=where, hint="give one")
    return int(value) if whole else float(value)


def _by_seed(drawn: Mapping[str, Sequence[Path]], first: int) -> list[Drawn]:
    rows = max(map(len, drawn.values()))
    return [Drawn(paths[row], name, first + row) for row in range(rows) for name, paths in drawn.items()]


def _weight_files(choice: Choice) -> Sequence[Path]:
    found = find_pipeline_folder(choice.path, choice.weights)
    if found is None:
        return (choice.path,)
    return found[0].weight_files(found[1])


def _is_of(choice: Choice, recorded: str) -> bool:
    """Whether a record means this model: by its path, which is compared and not opened."""
    try:
        files = _weight_files(choice)
    except UserError:
        return False
    return Path(recorded).resolve() == files[0].resolve()
