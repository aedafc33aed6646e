"""The model under evaluation: loaded from a run, a model, a published one or a checkpoint, with all of its weights."""

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.encoders.pretrained import TextEncoderSource
from hdm_lightning.encoders.text_whitening import TextWhitening
from hdm_lightning.encoders.vae_folder import is_autoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.generation.image_files import sha256_of
from hdm_lightning.generation.loading import LoadOptions, build_pipeline, find_pipeline_folder, load_pipeline
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.interop.adapter_files import adapter_folder
from hdm_lightning.interop.layouts import FINAL_FOLDER
from hdm_lightning.interop.pipeline_folder import (
    TRANSFORMER,
    WEIGHT_KINDS,
    PipelineFolder,
    is_pipeline_folder,
    network_from_tensors,
)
from hdm_lightning.json_files import AGAIN
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.printable import in_one_line
from hdm_lightning.training import run_folder
from hdm_lightning.training.callbacks.weight_averages import averages_state
from hdm_lightning.training.checkpoint_io import (
    DamagedCheckpoint,
    checkpoints_in,
    compare_checksums,
    network_weights,
    read_intact,
)
from hdm_lightning.training.flow_run import folded
from hdm_lightning.training.modules.frozen_weights import FROZEN
from hdm_lightning.training.recorded import TrainSettings, is_training, model_config_from, recorded_settings
from hdm_lightning.training.stages import StagePlan, plan_stages

EMA, RAW, FILE = "ema", "raw", "file"
DRAWN = {"steps": 24, "guidance_scale": 4.0}
"""Sampling settings of a run that does not set its own."""


@dataclass(frozen=True)
class RunRecord:
    """The run that a model came from: its settings, and the stage it was in."""

    folder: Path
    settings: TrainSettings
    plan: StagePlan


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        facts: what the report says about it.
        sampling: sampling settings of the training run.
        run: where it came from, or None.
        encoders: a pipeline whose encoders all weights share.
        networks: for each set of weights, a function that loads it (on the CPU).
    """

    facts: Mapping[str, Any]
    sampling: Mapping[str, Any]
    run: RunRecord | None
    encoders: HDMPipeline
    networks: Mapping[str, Callable[[], XUT]]

    def pipeline(self, weights: str) -> HDMPipeline:
        """Return the pipeline of one set of weights."""
        return self.encoders.with_network(self.networks[weights]().float().to(self.encoders.device).eval())


def load_subject(path: Path, options: LoadOptions) -> Subject:
    """Load a run's folder, its `final/`, a weights file in it, a published file or folder, or a training's checkpoint.

    A run without `final/` is represented by its newest checkpoint. Raises UserError: there is no model, or a part of
    it is missing or does not fit.
    """
    _refuse_autoencoder(path)
    if path.match("step-*.ckpt"):
        return _from_checkpoint(path, options)
    has_final = any(is_pipeline_folder(folder) for folder in (path / FINAL_FOLDER, path)) or adapter_folder(path)
    if path.is_dir() and not has_final and (path / run_folder.CONFIG).is_file():
        return _from_checkpoint(_newest(path), options)
    return _from_model(path, options)


def find_run(path: Path) -> RunRecord | None:
    """Return the run that `path` is or is inside, at a model's or a checkpoint's place, with the run's last stage.

    None if there is no run: other folders above are unrelated, and their config.yaml is not read.
    Raises UserError: the run's config.yaml has mistakes.
    """
    folder = _run_folder(path.resolve())
    config = folder / run_folder.CONFIG
    if not config.is_file() or (settings := _settings(config)) is None:
        return None
    return RunRecord(folder, settings, plan_stages(settings.schedule, 1)[-1])


def _run_folder(path: Path) -> Path:
    """Return the run's folder, if it is one, of RUN, RUN/final[/transformer], RUN/NN-STAGE/checkpoints, files there."""
    folder = path if path.is_dir() else path.parent
    if folder.name == TRANSFORMER and folder.parent.name == FINAL_FOLDER:
        folder = folder.parent
    if folder.name == FINAL_FOLDER:
        return folder.parent
    if folder.name == run_folder.CHECKPOINTS and re.match(r"\d+-", folder.parent.name):
        return folder.parent.parent
    return folder


def _settings(config: Path) -> TrainSettings | None:
    """Return the settings of a run; None if the config.yaml is of something else, as the name is common."""
    try:
        return recorded_settings(config) if is_training(config) else None
    except UserError as error:
        wrong = error.what if error.where in (None, str(config)) else f"{error.where}: {error.what}"
        what = f"is not a valid hdm-train configuration: {wrong}"
        raise UserError(what, where=str(config), hint=error.hint or AGAIN) from error


def _refuse_autoencoder(path: Path) -> None:
    """Raise UserError if the folder is an autoencoder, which another command evaluates."""
    if any(is_autoencoder(folder) for folder in (path / FINAL_FOLDER, path)):
        hint = f"run `hdm-evaluate vae {shlex.quote(str(path))} --data FOLDER`"
        raise UserError("is an autoencoder", where=str(path), hint=hint)


def _from_model(path: Path, options: LoadOptions) -> Subject:
    found = find_pipeline_folder(path)
    folder = found[0] if found else None
    weights: dict[str, tuple[Path, ...]] = {FILE: (path,)} if folder is None else _weight_files(path, folder)
    first = next(iter(weights))
    loaded = load_pipeline(path, replace(options, weights=first if first in WEIGHT_KINDS else EMA))  # type: ignore[arg-type]
    networks: dict[str, Callable[[], XUT]] = {first: lambda: loaded.pipeline.network}
    if folder is not None:
        networks |= {name: partial(folder.load_network, name) for name in weights if name != first}
        hashes = {name: sha256_of(*files) for name, files in weights.items()}
    else:
        hashes = {first: loaded.fingerprint}
    training = dict(folder.training) if folder is not None else {}
    run = find_run(path)
    facts = {
        "name": training.get("name") or (run.settings.name if run else path.stem),
        "model": str(path),
        "sha256": hashes,
        "samples_seen": training.get("samples"),
    }
    return Subject(facts, loaded.sampling, run, loaded.pipeline, networks)


def _weight_files(path: Path, folder: PipelineFolder) -> dict[str, tuple[Path, ...]]:
    """Return the files of the folder's weights: those of the weights file that `path` names, or all."""
    kinds: list[str] = [kind for kind in WEIGHT_KINDS if folder.has(kind)]
    present = {kind: folder.weight_files(kind) for kind in kinds}
    if path.is_file():
        return {kind: files for kind, files in present.items() if path in files}
    if not present:
        raise UserError("contains no weights", where=str(folder.folder), hint="pass a run's final/ folder")
    return present


def _newest(folder: Path) -> Path:
    stages = sorted(folder.glob(f"*/{run_folder.CHECKPOINTS}"))
    found = [path for stage in stages for path in checkpoints_in(stage)]
    if not found:
        raise UserError(
            "contains neither final/ nor a checkpoint", where=str(folder), hint="wait for the run's first checkpoint"
        )
    for path in reversed(found):
        try:
            compare_checksums(path)
        except DamagedCheckpoint as damage:  # not renamed, as the run may be somebody else's
            print(f"warning: {in_one_line(path)} is damaged ({in_one_line(damage.reason)}): skipped", file=sys.stderr)
            continue
        return path
    raise UserError(
        f"every checkpoint is damaged ({len(found)} in total)", where=str(folder), hint="copy the run's folder again"
    )


def _from_checkpoint(path: Path, options: LoadOptions) -> Subject:
    if not path.is_file():
        raise UserError("does not exist", where=str(path), hint="pass NN-STAGE/checkpoints/step-….ckpt of a run")
    run = find_run(path)
    if run is None:
        raise UserError(
            "is not inside a run's folder, so its network and encoders are unknown",
            where=str(path),
            hint="pass the checkpoint at its place in the run: RUN/NN-STAGE/checkpoints/step-….ckpt",
        )
    checkpoint = read_intact(path)
    place = checkpoint["hdm"]
    if FROZEN in place:
        what, hint = "belongs to an adapter, without its base", f"evaluate {run.folder} once it is finished"
        raise UserError(what, where=str(path), hint=hint)
    plans = plan_stages(run.settings.schedule, 1)
    plan = next((one for one in plans if one.name == place["stage"]), run.plan)
    config = model_config_from(run.settings.model)
    states = {RAW: network_weights(checkpoint)}
    averages = (averages_state(checkpoint) or {}).get("shadows", [])
    if averages:
        states = {EMA: {**states[RAW], **averages[0]}, **states}
    seen = plan.samples_before + int(place["samples"])
    whitening_file = run.folder / run_folder.WHITENING
    whitening = TextWhitening.load(whitening_file) if run.settings.text_encoder.whiten_captions else None
    facts = {"name": run.settings.name, "model": str(path), "sha256": sha256_of(path), "samples_seen": seen}
    side, drawn = plan.settings.resolution, run.settings.callback("sample_images")
    sampling = {"height": side, "width": side, **DRAWN}
    sampling |= {key: drawn[key] for key in DRAWN if key in drawn}
    networks = {name: partial(_network, config, folded(state, whitening), path) for name, state in states.items()}
    shared = _pipeline(next(iter(networks.values()))(), run.settings, plan, sampling, options)
    return Subject(facts, sampling, RunRecord(run.folder, run.settings, plan), shared, networks)


def _network(config: XUTConfig, state: Mapping[str, torch.Tensor], path: Path) -> XUT:
    try:
        return network_from_tensors(config, state)
    except ValueError as error:
        raise UserError(str(error), where=str(path), hint=AGAIN) from error


def _pipeline(
    network: XUT, run: TrainSettings, plan: StagePlan, sampling: Mapping[str, Any], options: LoadOptions
) -> HDMPipeline:
    """Return the network with the run's encoders, or those of the options, at the precisions of a model's folder."""
    vae = {**vars(run.vae), "dtype": torch.float32}
    vae.pop("made_by")
    if options.vae:
        vae |= {"name": options.vae, "mean": None, "std": None, "where": "vae"}
    source = TextEncoderSource(run.text_encoder.name, run.text_encoder.layer, plan.settings.context_length)
    return build_pipeline(network, source, load_autoencoder(**vae), sampling, options)
