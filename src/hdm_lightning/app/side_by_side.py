"""Generate images for the page: the same prompt, seeds and settings with several models, each as `hdm-sample` does."""

import gc
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.app.app_settings import AppSettings
from hdm_lightning.app.shelf import chosen, find_runs
from hdm_lightning.errors import UserError
from hdm_lightning.generation.drawing import draw_request
from hdm_lightning.generation.image_files import read_record, sha256_of
from hdm_lightning.generation.loading import LoadedModel, LoadOptions, find_pipeline_folder, load_pipeline
from hdm_lightning.generation.pipeline_adapters import adapter_files, find_adapter
from hdm_lightning.generation.sampling_settings import MAX_SEED, DrawingMachine, DrawingRequest, SamplingSettings
from hdm_lightning.interop import published
from hdm_lightning.interop.adapter_files import is_adapter
from hdm_lightning.interop.pipeline_folder import WEIGHT_KINDS, Weights

MOST_IMAGES = 256
"""Most images per click, over all models."""
LAST_WEIGHTS = " (last weights)"
_State = tuple[tuple[str, int, int], ...]
"""Name, size and modification time of the files that a model was read from."""


@dataclass(frozen=True)
class Choice:
    """A model on the page: where it is, and which of its weights."""

    path: Path
    weights: Weights = "ema"


@dataclass(frozen=True)
class Wanted:
    """What to generate: models and LoRAs (with weights) by their names on the page, and the settings that differ from
    the models' own, as in `SamplingSettings` without the size."""

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
    """An image, and the model and seed that it was generated with."""

    path: Path
    model: str
    seed: int


class Studio:
    """Generates images for the page.

    Args:
        settings: where models and LoRAs are, and where images go.
        machine: precision and batch.
        device: device to generate on.
    """

    def __init__(self, settings: AppSettings, machine: DrawingMachine, device: torch.device) -> None:
        self.settings, self.machine, self.device = settings, machine, device
        self.loaded = LoadedModels(settings.keep)

    def models(self) -> dict[str, Choice]:
        """Return the models by name, those with averaged and last weights twice; read again at each call."""
        paths = {name: run for name, run in find_runs(self.settings.runs).items() if not is_adapter(run)}
        paths |= {name: Path(name) for name in self.settings.models}
        found: dict[str, Choice] = {}
        for name, path in paths.items():
            try:
                folder = find_pipeline_folder(path)
            except UserError:  # damaged: not listed
                continue
            if folder is None:
                if name in self.settings.models:
                    found[name] = Choice(path)
                continue
            kinds = [kind for kind in WEIGHT_KINDS if folder[0].has(kind)]
            found |= {name + (LAST_WEIGHTS if kind == "raw" else ""): Choice(path, kind) for kind in kinds}
        return found

    def loras(self) -> dict[str, Path]:
        """Return the LoRAs by name."""
        found = {name: run for name, run in find_runs(self.settings.runs).items() if is_adapter(run)}
        return found | {name: Path(name) for name in self.settings.loras}

    def settings_of(self, model: str) -> dict[str, Any]:
        """Return the default settings of a model, all of `SamplingSettings`; no weights are read."""
        choice = chosen(self.models(), model, "model")
        found = find_pipeline_folder(choice.path, choice.weights)
        own = found[0].sampling if found else published.SAMPLING
        try:
            return SamplingSettings.from_json(own).to_json()
        except (TypeError, ValueError) as error:
            raise UserError(str(error), where=model, hint="correct the settings in the model's folder") from error

    def draw(
        self,
        wanted: Wanted,
        *,
        warn: Callable[[str], None],
        progress: Callable[[str, int, int], None],
    ) -> Iterator[list[Drawn]]:
        """Yield, after each model, all images generated so far; those of one seed are next to each other.

        Raises:
            UserError: something does not fit; see `draw_request`.
        """
        models, choices = self.models(), {}
        for name in dict.fromkeys(wanted.models):
            choices[name] = chosen(models, name, "models")
        loras = [f"{chosen(self.loras(), name, 'LoRAs')}:{weight!r}" for name, weight in wanted.loras]
        if not choices:
            raise UserError("none is chosen", where="models", hint="choose one, or several to compare")
        if not 1 <= wanted.count <= MOST_IMAGES // len(choices):
            what = f"{wanted.count} for each of {len(choices)} models"
            raise UserError(what, where="images", hint=f"generate 1 to {MOST_IMAGES} images at once")
        drawn: dict[str, list[Path]] = {}
        for name, choice in choices.items():
            drawn[name] = draw_request(
                DrawingRequest(
                    model=str(choice.path),
                    prompts=(wanted.prompt,),
                    count=wanted.count,
                    seed=wanted.seed,
                    size=[f"{wanted.width}x{wanted.height}"],
                    out=self.settings.out,
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
        """Return what an image by `hdm-sample` or this page was generated with, and notes on what is missing here.

        No path in it is opened: a model or LoRA is one that the page has, or is reported as missing.

        Raises:
            UserError: the image contains no settings.
        """
        record = read_record(picture)
        settings, notes = record.settings.to_json(), []
        model = next((name for name, choice in self.models().items() if _is_of(choice, record.model)), None)
        if model is None:
            notes.append(f"it was generated with {record.model}, which is not a model of this page")
        elif sha256_of(*_weight_files(self.models()[model])) != record.fingerprint:
            notes.append(f"the weights of {model} have changed since it was generated")
        if record.image is not None:
            notes.append("it was generated from an image, which this page cannot do: use hdm-sample --repeat")
        here, loras = {path.resolve(): name for name, path in self.loras().items()}, []
        for each in record.loras:
            name = here.get(Path(each["name"]).resolve())
            if name is None:
                notes.append(f"it was generated with the LoRA {each['name']}, which is not a LoRA of this page")
            else:
                loras.append((name, float(each["weight"])))
        size = {key: settings.pop(key) for key in ("width", "height")}
        del settings["strength"]  # for the image that it was generated from
        models = [] if model is None else [model]
        return Wanted(record.prompt, models, **size, seed=record.seed, loras=loras, settings=settings), notes


def seed_from(text: object) -> int:
    """Return a seed typed as text, since numbers in a browser are exact only up to 2⁵³.

    Raises:
        UserError: it is not a seed.
    """
    digits = str(text).strip()
    if not digits.isascii() or not digits.isdigit() or len(digits) > 19 or int(digits) > MAX_SEED:
        raise UserError(f"{digits[:30]!r} is not a seed", where="seed", hint=f"enter a whole number, 0 to {MAX_SEED}")
    return int(digits)


def settings_from_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings from the numbers of a form, each in its type in `SamplingSettings`.

    Raises:
        UserError: a number is missing or invalid.
    """
    kinds = {each.name: each.type for each in fields(SamplingSettings)}
    return {
        name: number_from(value, name.replace("_", " "), whole=kinds[name] is int) for name, value in values.items()
    }


def number_from(value: Any, where: str, *, whole: bool = False) -> float | int:
    """Return a finite number from a form. Raises UserError, naming the field, if it is not one, or not whole."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise UserError(f"{value!r} is not a {kind}", where=where, hint="enter one")
    return int(value) if whole else float(value)


def whole_from(value: Any, where: str, least: int, most: int) -> int:
    """Return a whole number from a form. Raises UserError, naming the field, if it is not one in this range."""
    number = number_from(value, where, whole=True)
    if not least <= number <= most:
        raise UserError(f"is {number}", where=where, hint=f"enter a whole number from {least} to {most}")
    return int(number)


def _by_seed(drawn: Mapping[str, Sequence[Path]], first: int) -> list[Drawn]:
    rows = max(map(len, drawn.values()))
    return [Drawn(paths[row], name, first + row) for row in range(rows) for name, paths in drawn.items()]


def _weight_files(choice: Choice) -> Sequence[Path]:
    found = find_pipeline_folder(choice.path, choice.weights)
    if found is None:
        return (choice.path,)
    return found[0].weight_files(found[1])


def _is_of(choice: Choice, recorded: str) -> bool:
    """Return whether a record refers to this model, by its path, which is compared and not opened."""
    try:
        files = _weight_files(choice)
    except UserError:
        return False
    return Path(recorded).resolve() == files[0].resolve()


class LoadedModels:
    """At most `keep` models in memory, each with its LoRAs and precision, and reloaded if its files have changed.

    They are loaded on first use; the least recently used one is dropped first.
    """

    def __init__(self, keep: int, load: Callable[[Path, LoadOptions], LoadedModel] = load_pipeline) -> None:
        self.keep, self._load = keep, load
        self._held: OrderedDict[tuple[Path, LoadOptions], tuple[LoadedModel, _State]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def load(self, path: Path, options: LoadOptions) -> LoadedModel:
        """Return the model, from memory if its files are unchanged; otherwise see `load_pipeline`."""
        key = (path, options)
        held = self._held.pop(key, None)
        if held is None or held[1] != _state(held[0], options):
            held = None
            self._make_room()
            loaded = self._load(path, options)
            held = (loaded, _state(loaded, options))
        self._held[key] = held
        return held[0]

    def _make_room(self) -> None:
        while len(self._held) >= self.keep:
            self._held.popitem(last=False)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _state(loaded: LoadedModel, options: LoadOptions) -> _State:
    adapters = (file for use in options.adapters for file in adapter_files(find_adapter(use.name)))
    files = [file for file in (*loaded.weight_files, *adapters) if file.exists()]
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
