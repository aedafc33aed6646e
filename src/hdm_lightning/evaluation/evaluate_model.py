"""Evaluation of a model: checks first, then each set of weights, part by part."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from hdm_lightning.data.rules import StreamConfig, sources_from
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.clip import load_clip
from hdm_lightning.evaluation.context import Context, Measuring, RealData
from hdm_lightning.evaluation.findings import Evaluation, LeftOut
from hdm_lightning.evaluation.image_sets import Progress, middle_crops
from hdm_lightning.evaluation.request import PARTS, PRIMARY, EvaluationSettings, ModelRequest
from hdm_lightning.evaluation.subject import RunRecord, Subject, load_subject
from hdm_lightning.generation.feature_networks import load_feature_network
from hdm_lightning.generation.loading import LoadOptions
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.metrics.features import FeatureNetwork, kernel_name, with_names_apart
from hdm_lightning.precision import dtype_name
from hdm_lightning.training import hardware
from hdm_lightning.training.recorded_data import recorded_training_stream, recorded_validation_stream


def evaluate(
    request: ModelRequest, options: LoadOptions, progress: Progress, keep: Callable[[Evaluation], None]
) -> Evaluation:
    """Evaluate a model.

    A part that turns out to be impossible is left out, unless it was asked for by name or measured for other weights.
    One that fails, for whatever reason, is recorded, and the others are still measured. After each part, which may have
    taken hours, `keep` gets all results so far.

    Raises:
        UserError: something is missing for a part asked for by name, or nothing can be measured at all.
        Exception: of the first part that failed, if none succeeded.
    """
    begin = time.monotonic()
    subject = load_subject(request.model, options)
    sampling = _sampling(subject, request)
    chosen = _weights(subject, request.weights)
    real = _real_data(request, options, subject, sampling, progress)
    titles = {key: part.title for key, part in PARTS.items()}
    settings = _pinned(request, options, real, sampling)
    found = Evaluation(subject.facts, settings, {weights: {} for weights in chosen}, titles)
    parts = _possible(request.asked, Context(real, subject.encoders, "", sampling), found)
    errors: list[Exception] = []
    for weights in chosen:
        context = Context(real, subject.pipeline(weights), weights, sampling)
        for key in list(parts):
            try:
                found.results[weights][key] = measuring(key).run(context)
            except Exception as error:  # must not lose what the others found in hours
                measured = any(key in parts_of for parts_of in found.results.values())
                if isinstance(error, UserError) and not request.asked and not measured:
                    found.left_out.append(_omission(key, error))
                    parts.remove(key)
                else:
                    found.fail(key, weights, error)
                    errors.append(error)
            found.seconds = time.monotonic() - begin
            keep(found)
    if errors and not any(found.results.values()):
        raise errors[0]
    return found


def measuring(key: str) -> Measuring:
    """Import and return the function that measures a part."""
    module, _, name = PARTS[key].function.partition(":")
    return getattr(import_module(f"{__package__}.{module}"), name)


def _possible(asked: Sequence[str], context: Context, found: Evaluation) -> list[str]:
    """Return the parts to measure; those not asked for by name are left out if something they need is missing."""
    parts = []
    for key in asked or PARTS:
        try:
            measuring(key).require(context)
            parts.append(key)
        except UserError as error:
            if asked:
                raise
            found.left_out.append(_omission(key, error))
    return parts


def _omission(part: str, error: UserError) -> LeftOut:
    hint = f"{error.where}: {error.hint}" if error.where and error.hint else error.hint or ""
    return LeftOut(part, error.what, hint)


def _weights(subject: Subject, asked: Sequence[str]) -> list[str]:
    for name in asked:
        if name not in subject.networks:
            there = ", ".join(subject.networks)
            raise UserError(f"there are no {name} weights", where="--weights", hint=f"choose one of {there}")
    return list(dict.fromkeys(asked or subject.networks))


def _sampling(subject: Subject, request: ModelRequest) -> SamplingSettings:
    """Return the model's own sampling settings for square images, with the overrides of the request."""
    own = dict(subject.sampling)
    side = request.size or min(own.get("height", 256), own.get("width", 256))
    multiple = subject.encoders.size_multiple
    try:
        settings = SamplingSettings.from_json({**own, "height": side, "width": side, **request.drawing})
    except (TypeError, ValueError) as error:
        raise UserError(str(error), where="settings", hint="see hdm-evaluate --help") from error
    if settings.height % multiple:
        nearest = max(1, round(settings.height / multiple)) * multiple
        raise UserError(f"{settings.height} is not a multiple of {multiple}", where="--size", hint=f"use {nearest}")
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
    streams = middle_crops(reference), None if train is None else middle_crops(train)
    real = RealData(request.settings, *streams, networks, clip, subject.encoders, progress, missing)
    real.require_indices(train_named=bool(request.train_data))
    return real


def _streams(request: ModelRequest, subject: Subject, side: int) -> tuple[StreamConfig, StreamConfig | None]:
    """Return reference and training streams: the run's rules, if there is a run, with the sources that were passed."""
    run = subject.run
    if run is None and not request.data:
        raise UserError(
            "there are no real images to compare with",
            where="--data",
            hint="pass --data FOLDER, shards with captions (`hdm-shards build` makes them)",
        )
    plain = StreamConfig((), side, subject.encoders.caption_tokenizer.context_length, seed=0, stage="validation")
    given = sources_from(list(request.data), "--data") if request.data else None
    if run is None:
        assert given is not None
        reference = dataclasses.replace(plain, sources=given)
    else:
        reference = dataclasses.replace(recorded_validation_stream(run.settings, run.plan, given), resolution=side)
    return reference, _train_stream(request, run, plain)


def _train_stream(request: ModelRequest, run: RunRecord | None, plain: StreamConfig) -> StreamConfig | None:
    """Return the training stream: what was passed, or the run's own if the reference is the run's own, too.

    None if the run's own cannot be opened, for example because it is not on this machine.
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
    """Return everything that the numbers depend on besides the model."""
    streams = {"reference": _described(real.reference_stream, real.reference_plan)}
    if real.train_stream is not None and real.train_plan is not None:
        streams["train"] = _described(real.train_stream, real.train_plan)
    return {
        **dataclasses.asdict(request.settings),
        "primary": [*PRIMARY[:-1], *(f"kernel.{kernel_name(network)}" for network in real.networks[:1])],
        "bootstrap": dataclasses.asdict(request.settings.bootstrap),
        "sampling": sampling.to_json(),
        "networks": [network.to_json() for network in real.all_networks],
        "data": streams,
        "precision": dtype_name(options.autocast or torch.float32),
        "environment": hardware.environment(),
    }


def _described(stream: StreamConfig, plan: Plan) -> dict[str, Any]:
    sources = [list(source.urls) for source in stream.sources]
    return {"sources": sources, "resolution": stream.resolution, "crop": "middle square", "order": plan.fingerprint}
