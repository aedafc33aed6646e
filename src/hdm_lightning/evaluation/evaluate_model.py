"""A model evaluated: checks first, then each set of weights, part by part."""

import dataclasses
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hdm_lightning.data.config import StreamConfig
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.clip import load_clip
from hdm_lightning.evaluation.context import Context
from hdm_lightning.evaluation.image_sets import Progress
from hdm_lightning.evaluation.parts import PARTS, Part
from hdm_lightning.evaluation.real_data import RealData
from hdm_lightning.evaluation.request import EvaluationSettings, ModelRequest
from hdm_lightning.evaluation.results import Evaluation, Failed, Found, LeftOut
from hdm_lightning.evaluation.subject import RunRecord, Subject, load_subject
from hdm_lightning.generation.feature_networks import load_feature_network
from hdm_lightning.generation.loading import LoadOptions
from hdm_lightning.generation.settings import SamplingSettings
from hdm_lightning.metrics.features import FeatureNetwork, with_names_apart
from hdm_lightning.training import hardware
from hdm_lightning.training.data_settings import sources_from
from hdm_lightning.training.recorded import recorded_training_stream, recorded_validation_stream


def evaluate(
    request: ModelRequest, options: LoadOptions, progress: Progress, keep: Callable[[Evaluation], None]
) -> tuple[Evaluation, int]:
    """Evaluate a model; returns what was found, and the training samples behind the model.

    A part that fails is recorded, and the others are measured.

    Args:
        request: what and how.
        options: how to load the model.
        progress: called for each image.
        keep: given all that was found so far after each part, which may have taken hours.

    Raises:
        UserError: something is missing for what was asked for by name, or nothing can be done at all.
        Exception: of the first part that failed, where none succeeded.
    """
    begin = time.monotonic()
    subject = load_subject(request.model, options)
    sampling = _sampling(subject, request.drawing.given())
    chosen = _weights(subject, request.weights)
    real = _real_data(request, options, subject, sampling, progress)
    parts, left_out = _possible(request.asked, Context(real, request.settings, subject.encoders, "", sampling))
    outcome = Outcome({weights: {} for weights in chosen}, left_out)

    def found() -> Evaluation:
        settings, titles = _pinned(request, options, real, sampling), {key: part.title for key, part in PARTS.items()}
        return outcome.evaluation(subject.facts, settings, titles, time.monotonic() - begin)

    for weights in chosen:
        context = Context(real, request.settings, subject.pipeline(weights), weights, sampling)
        for part in list(parts):
            if not _measure(part, context, outcome, by_name=bool(request.asked)):
                parts.remove(part)
            keep(found())
    outcome.require_some()
    return found(), subject.samples_seen


@dataclass
class Outcome:
    """What the parts came to."""

    results: dict[str, dict[str, Found]]
    left_out: list[LeftOut] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    first_error: Exception | None = None

    def fail(self, part: str, weights: str, error: Exception) -> None:
        """Record a part that failed."""
        user = isinstance(error, UserError)
        text = str(error) if user else f"{type(error).__name__}: {error}"
        trace = "" if user else "".join(traceback.format_exception(error))
        self.failed.append(Failed(part, weights, text, trace))
        self.first_error = self.first_error or error

    def require_some(self) -> None:
        """Raise the first error if it is all that there is."""
        if self.first_error is not None and not any(self.results.values()):
            raise self.first_error

    def evaluation(
        self, subject: Mapping[str, Any], settings: Mapping[str, Any], titles: Mapping[str, str], seconds: float
    ) -> Evaluation:
        """All of it as results."""
        return Evaluation(subject, settings, self.results, titles, self.left_out, self.failed, seconds)


def _measure(part: Part, context: Context, outcome: Outcome, *, by_name: bool) -> bool:
    """Measure a part and note what comes of it; whether it can be tried on other weights.

    One that turns out impossible is left out, unless it was asked for by name. One that fails, for whatever reason,
    must not cost what the others found in hours.
    """
    try:
        outcome.results[context.weights][part.key] = part.load()(context)
    except Exception as error:
        if isinstance(error, UserError) and not by_name:
            outcome.left_out.append(_omission(part, error))
            return False
        outcome.fail(part.key, context.weights, error)
    return True


def _possible(asked: Sequence[str], context: Context) -> tuple[list[Part], list[LeftOut]]:
    """The parts to do; those not asked for by name are left out where something is missing for them."""
    parts, left_out = [], []
    for key in asked or PARTS:
        try:
            PARTS[key].load().require(context)
            parts.append(PARTS[key])
        except UserError as error:
            if asked:
                raise
            left_out.append(_omission(PARTS[key], error))
    return parts, left_out


def _omission(part: Part, error: UserError) -> LeftOut:
    hint = f"{error.where}: {error.hint}" if error.where and error.hint else error.hint or ""
    return LeftOut(part.key, error.what, hint)


def _weights(subject: Subject, asked: Sequence[str]) -> list[str]:
    for name in asked:
        if name not in subject.networks:
            there = ", ".join(subject.networks)
            raise UserError(f"there are no {name} weights", where="--weights", hint=f"choose among {there}")
    return list(dict.fromkeys(asked or subject.networks))


def _sampling(subject: Subject, given: Mapping[str, Any]) -> SamplingSettings:
    """The model's own settings of square images, overridden."""
    own = dict(subject.sampling)
    side = min(own.get("height", 256), own.get("width", 256))
    multiple = subject.encoders.size_multiple
    try:
        settings = SamplingSettings.from_json({**own, "height": side, "width": side, **given})
    except (TypeError, ValueError) as error:
        raise UserError(str(error), where="settings", hint="see hdm-evaluate --help") from error
    if settings.height % multiple:
        nearest = max(1, round(settings.height / multiple)) * multiple
        raise UserError(f"{settings.height} is no multiple of {multiple}", where="--size", hint=f"give {nearest}")
    return settings


def _real_data(
    request: ModelRequest, options: LoadOptions, subject: Subject, sampling: SamplingSettings, progress: Progress
) -> RealData:
    missing: UserError | None = None
    networks: list[FeatureNetwork] = []
    try:
        networks = [load_feature_network(name, options.device) for name in dict.fromkeys(request.settings.features)]
    except UserError as error:
        if request.settings.features != EvaluationSettings().features:  # asked for by name
            raise
        missing = error
    clip = load_clip(request.settings.clip, options.device) if request.settings.clip else None
    networks = with_names_apart(networks if clip is None else [*networks, clip.network])
    if clip is not None:  # it may be a feature network as well
        clip = dataclasses.replace(clip, network=networks.pop())
    reference, train = _streams(request, subject, sampling.height)
    real = RealData(request.settings, reference, train, networks, clip, progress, missing)
    real.require_indices(train_named=bool(request.train_data))
    return real


def _streams(request: ModelRequest, subject: Subject, side: int) -> tuple[StreamConfig, StreamConfig | None]:
    """Reference and training streams: the run's rules, where there is a run, with the sources that were given."""
    run = subject.run
    if run is None and not request.data:
        raise UserError(
            "it is not known which real images to compare with",
            where="--data",
            hint="give --data FOLDER, shards with captions (`hdm-shards build` makes them)",
        )
    plain = StreamConfig((), side, subject.encoders.tokenizer.context_length, seed=0, stage="validation")
    given = sources_from(list(request.data), "--data") if request.data else None
    if run is None:
        assert given is not None
        reference = dataclasses.replace(plain, sources=given)
    else:
        reference = dataclasses.replace(recorded_validation_stream(run.settings, run.plan, given), resolution=side)
    return reference, _train_stream(request, run, plain)


def _train_stream(request: ModelRequest, run: RunRecord | None, plain: StreamConfig) -> StreamConfig | None:
    """The training stream: what was given, or the run's own where the reference is the run's own, too.

    The run's own is done without where it is not to be opened, as where it is not on this machine.
    """
    given = sources_from(list(request.train_data), "--train-data") if request.train_data else None
    if run is None:
        return None if given is None else dataclasses.replace(plain, stage="train", sources=given)
    if given is None and request.data:
        return None
    try:
        train = recorded_training_stream(run.settings, run.plan, given)
    except UserError:
        if given is not None:
            raise
        return None
    return dataclasses.replace(train, stage=train.stage if given is None else "train", resolution=plain.resolution)


def _pinned(request: ModelRequest, options: LoadOptions, real: RealData, sampling: SamplingSettings) -> dict[str, Any]:
    """Everything that the numbers depend on besides the model."""
    settings = request.settings
    streams: dict[str, Any] = {"reference": _described(real.reference_stream, real.reference_plan.fingerprint)}
    if real.train_stream is not None and real.train_plan is not None:
        streams["train"] = _described(real.train_stream, real.train_plan.fingerprint)
    return {
        **settings.to_json(),
        "bootstrap": dataclasses.asdict(settings.bootstrap),
        "sampling": sampling.to_json(),
        "networks": [network.to_json() for network in real.all_networks],
        "data": streams,
        "precision": str(options.autocast or torch.float32).removeprefix("torch."),
        "environment": hardware.environment(),
    }


def _described(stream: StreamConfig, fingerprint: str) -> dict[str, Any]:
    return {
        "sources": [list(source.urls) for source in stream.sources],
        "resolution": stream.resolution,
        "crop": "middle square",
        "order": fingerprint,
    }
