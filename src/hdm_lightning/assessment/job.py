"""A whole evaluation: checks first, then each set of weights, part by part."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.assessment.agreement import AGREEMENT
from hdm_lightning.assessment.aspect import ASPECT
from hdm_lightning.assessment.camera import CAMERA
from hdm_lightning.assessment.clip import load_clip
from hdm_lightning.assessment.context import Context, Progress, RealData, require_reference
from hdm_lightning.assessment.copies import COPIES
from hdm_lightning.assessment.distances import FRECHET, KERNEL
from hdm_lightning.assessment.diversity import DIVERSITY
from hdm_lightning.assessment.loss import LOSS
from hdm_lightning.assessment.neighbours import NEIGHBOUR_MEASURES
from hdm_lightning.assessment.part import Part, failure
from hdm_lightning.assessment.settings import EvaluationSettings
from hdm_lightning.assessment.shapes import SHAPES
from hdm_lightning.assessment.subject import RunRecord, Subject, load_subject
from hdm_lightning.data.config import StreamConfig
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.features import FeatureNetwork, with_names_apart
from hdm_lightning.evaluation.results import Evaluation, Failed, LeftOut, PartResult
from hdm_lightning.generation.feature_networks import load_feature_network
from hdm_lightning.generation.loading import LoadOptions
from hdm_lightning.generation.settings import SamplingSettings
from hdm_lightning.precision import dtype_name
from hdm_lightning.training import hardware
from hdm_lightning.training.data_settings import sources_from
from hdm_lightning.training.recorded import recorded_training_stream, recorded_validation_stream

PARTS: Mapping[str, Part] = {
    part.key: part
    for part in (
        LOSS,
        FRECHET,
        KERNEL,
        NEIGHBOUR_MEASURES,
        AGREEMENT,
        SHAPES,
        DIVERSITY,
        ASPECT,
        CAMERA,
        COPIES,
    )
}


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate and how.

    Attributes:
        model: run, final/ folder, weights file, published file or checkpoint.
        settings: counts, seeds, networks.
        options: how to load the model.
        parts: keys of `PARTS` to do; None for all that can be done.
        weights: `ema`, `raw`; None for all there are.
        data: folders of reference shards instead of the run's own.
        train_data: folders of training shards instead of the run's own.
        sampling: settings of `SamplingSettings` instead of the model's own.
    """

    model: Path
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    options: LoadOptions = field(default_factory=LoadOptions)
    parts: tuple[str, ...] | None = None
    weights: tuple[str, ...] | None = None
    data: tuple[str, ...] = ()
    train_data: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


def evaluate(
    request: EvaluationRequest, progress: Progress, keep: Callable[[Evaluation], None]
) -> tuple[Evaluation, int]:
    """Evaluate a model; returns what was found, and the training samples behind the model.

    Args:
        request: what and how.
        progress: told of each picture.
        keep: given all that was found so far after each part, which may have taken hours.

    A part that fails is recorded, and the others go on.

    Raises:
        UserError: something is missing for what was asked for by name, or nothing can be done at all.
        Exception: of the first part that failed, where none succeeded.
    """
    begin = time.monotonic()
    subject = load_subject(request.model, request.options)
    sampling = _sampling(subject, request.sampling)
    chosen = _weights(subject, request.weights)
    data = _real_data(request, subject, sampling, progress)
    parts, left_out = _possible(request.parts, Context(data, request.settings, subject.encoders, "", sampling))
    outcome = _Outcome({weights: [] for weights in chosen}, left_out)

    def found() -> Evaluation:
        settings, seconds = _pinned(request, data, sampling), time.monotonic() - begin
        return Evaluation(subject.facts, settings, outcome.results, left_out, seconds, outcome.failed)

    for weights in chosen:
        context = Context(data, request.settings, subject.pipeline(weights), weights, sampling)
        for part in list(parts):
            if not _measure(part, context, outcome, by_name=request.parts is not None):
                parts.remove(part)
            keep(found())
    outcome.require_some()
    return found(), subject.samples_seen


@dataclass
class _Outcome:
    """What the parts came to."""

    results: dict[str, list[PartResult]]
    left_out: list[LeftOut]
    failed: list[Failed] = field(default_factory=list)
    first_error: Exception | None = None

    def require_some(self) -> None:
        """Raise the first error if it is all that there is."""
        if self.first_error is not None and not any(self.results.values()):
            raise self.first_error


def _measure(part: Part, context: Context, outcome: _Outcome, *, by_name: bool) -> bool:
    """Measure a part and note what comes of it; whether it can be tried on other weights.

    One that turns out impossible is left out, unless it was asked for by name. One that fails, for whatever reason,
    must not cost what the others found in hours.
    """
    try:
        outcome.results[context.weights].append(part.run(context))
    except Exception as error:
        if isinstance(error, UserError) and not by_name:
            outcome.left_out.append(_omission(part, error))
            return False
        outcome.failed.append(failure(part.key, context.weights, error))
        outcome.first_error = outcome.first_error or error
    return True


def _possible(asked: Sequence[str] | None, context: Context) -> tuple[list[Part], list[LeftOut]]:
    """The parts to do; those not asked for by name are left out where something is missing for them."""
    unknown = [key for key in asked or () if key not in PARTS]
    if unknown:
        raise UserError(f"{unknown[0]!r} is no part", where="--parts", hint=f"choose among {', '.join(PARTS)}")
    parts, left_out = [], []
    for key in asked or PARTS:
        try:
            PARTS[key].check(context)
            parts.append(PARTS[key])
        except UserError as error:
            if asked is not None:
                raise
            left_out.append(_omission(PARTS[key], error))
    return parts, left_out


def _omission(part: Part, error: UserError) -> LeftOut:
    hint = f"{error.where}: {error.hint}" if error.where and error.hint else error.hint or ""
    return LeftOut(part.key, error.what, hint)


def _weights(subject: Subject, asked: Sequence[str] | None) -> list[str]:
    for name in asked or ():
        if name not in subject.networks:
            there = ", ".join(subject.networks)
            raise UserError(f"there are no {name} weights", where="--weights", hint=f"choose among {there}")
    return list(dict.fromkeys(asked or subject.networks))


def _sampling(subject: Subject, given: Mapping[str, Any]) -> SamplingSettings:
    """The model's own settings of square pictures, overridden."""
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
    request: EvaluationRequest, subject: Subject, sampling: SamplingSettings, progress: Progress
) -> RealData:
    device, missing = request.options.device, None
    networks: list[FeatureNetwork] = []
    try:
        networks = [load_feature_network(name, device) for name in dict.fromkeys(request.settings.features)]
    except UserError as error:
        if request.settings.features != EvaluationSettings().features:  # asked for by name
            raise
        missing = error
    clip = load_clip(request.settings.clip, device) if request.settings.clip else None
    networks = with_names_apart(networks if clip is None else [*networks, clip.network])
    if clip is not None:  # it may be a feature network as well
        clip = dataclasses.replace(clip, network=networks.pop())
    reference, train = _streams(request, subject, sampling.height)
    data = RealData(request.settings, reference, train, networks, clip, progress, missing)
    _check_there(data, train_named=bool(request.train_data))
    return data


def _check_there(data: RealData, *, train_named: bool) -> None:
    """Read the indices of both sets now: what is missing would end the evaluation after hours.

    A training set that a run names is done without where it is not on this machine.
    """
    require_reference(data.reference_count)
    try:
        _ = data.train_plan
    except UserError:
        if train_named:
            raise
        data.train_stream = None


def _streams(request: EvaluationRequest, subject: Subject, side: int) -> tuple[StreamConfig, StreamConfig | None]:
    """Reference and training streams: the run's rules, where there is a run, with the sources that were given."""
    run = subject.run
    if run is None and not request.data:
        raise UserError(
            "nothing tells which real pictures to compare with",
            where="--data",
            hint="give --data FOLDER, shards with captions (`hdm-shards build` makes them)",
        )
    plain = StreamConfig((), side, subject.encoders.caption_tokenizer.context_length, seed=0, stage="validation")
    given = sources_from(list(request.data), "--data") if request.data else None
    if run is None:
        assert given is not None
        reference = dataclasses.replace(plain, sources=given)
    else:
        reference = dataclasses.replace(recorded_validation_stream(run.settings, run.plan, given), resolution=side)
    return reference, _train_stream(request, run, plain)


def _train_stream(request: EvaluationRequest, run: RunRecord | None, plain: StreamConfig) -> StreamConfig | None:
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


def _pinned(request: EvaluationRequest, data: RealData, sampling: SamplingSettings) -> dict[str, Any]:
    """Everything that the numbers depend on besides the model."""
    settings = request.settings
    streams: dict[str, Any] = {"reference": _described(data.reference_stream, data.reference_plan.fingerprint)}
    if data.train_stream is not None and data.train_plan is not None:
        streams["train"] = _described(data.train_stream, data.train_plan.fingerprint)
    return {
        **settings.to_json(),
        "bootstrap": dataclasses.asdict(settings.bootstrap),
        "sampling": sampling.to_json(),
        "networks": [network.to_json() for network in data.judges],
        "data": streams,
        "precision": dtype_name(request.options.autocast or torch.float32),
        "environment": hardware.environment(),
    }


def _described(stream: StreamConfig, fingerprint: str) -> dict[str, Any]:
    return {
        "sources": [list(source.urls) for source in stream.sources],
        "resolution": stream.resolution,
        "crop": "middle square",
        "order": fingerprint,
    }
