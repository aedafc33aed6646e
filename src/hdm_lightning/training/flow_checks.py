"""Checks of a network training's configuration, before the first weight is allocated."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from hdm_lightning.data.datamodule import ShardDataModule
from hdm_lightning.data.latent_sets import LatentFormat
from hdm_lightning.data.text_states import read_format
from hdm_lightning.encoders.pretrained import same_model
from hdm_lightning.encoders.text import load_text_encoder, text_fingerprint, text_width
from hdm_lightning.encoders.vae_folder import folder_fingerprint, locate_autoencoder, read_config
from hdm_lightning.errors import UserError
from hdm_lightning.interop.pipeline_folder import INDEX, PipelineFolder
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.training import hardware, run_folder
from hdm_lightning.training.averaging.averages import check_averages
from hdm_lightning.training.base_model import base_folder
from hdm_lightning.training.composition import build, check_call, plain, target_of
from hdm_lightning.training.continued import check_continued, has_begun
from hdm_lightning.training.initial_weights import find_weights
from hdm_lightning.training.modules.adapted_layers import LayerAdapter
from hdm_lightning.training.modules.flow_step import other_autoencoder, other_text_encoder
from hdm_lightning.training.recorded import model_config_from
from hdm_lightning.training.run_recipe import with_stage
from hdm_lightning.training.stages import StagePlan

OF_THE_ENCODER = ("whiten_captions", "cache_size")
OF_THE_VAE = ("made_by",)
"""Keys of the run that are not passed to the text encoder and the autoencoder."""


def check(config: DictConfig, plans: list[StagePlan]) -> None:
    """Check a configuration and its stages.

    Reads only indices, configurations and the text encoder's vocabulary; for latents on disk also the weights of the
    autoencoder's encoder, to hash them; and a few samples of shards that seem to have changed.

    Raises:
        UserError: naming the key or file and what to do.
    """
    first = with_stage(config, plans[0])
    model = _check_model(first)
    averages = plain(first, "callbacks.weight_averages")
    if averages:
        check_averages(averages.get("halflife_samples", ()), averages.get("sigma_rel", ()))
    formats: list[LatentFormat] = []
    text_states: set[str] = set()
    fresh = not has_begun(config, plans)
    for plan in plans:
        stage = with_stage(config, plan)
        check_call(stage, "data", supplied=["tokenizer"])
        supplied = ("network", "text_encoder", "autoencoder", "optimizer", "lr_scheduler")
        check_call(stage, "module", supplied=supplied)
        formats += _check_data(stage, fresh=fresh)
        if (folder := plain(stage, "data.text_states")) is not None:
            text_states.add(str(folder))
    _check_stops(first, plans)
    source = config.get("init")
    if source is not None and not run_folder.stage_is_done(Path(config.run_dir), plans[0]):
        find_weights(source)
    if plain(config, "hub.push") is not None and model is None and config.get("adapter") is None:
        what = "only an XUT can be exported as a pipeline, and the network is not one"
        raise UserError(what, where="hub.push", hint="set hub.push=null")
    if config.get("adapter") is not None:
        _check_adapter_run(first, model, plans)
    check_continued(config, plans)
    check_call(first, "text_encoder", own=OF_THE_ENCODER)
    check_call(first, "vae", own=OF_THE_VAE)
    if model is not None:
        _check_text_encoder(first, model)
        _check_autoencoder(first, model, plans)
    _check_latents(first, formats)
    _check_text_states(first, text_states)


def _check_model(config: DictConfig) -> XUTConfig | None:
    """Check the network and return its configuration if it is an XUT."""
    check_call(config, "model")
    values = plain(config, "model")
    if target_of(values, "model") != XUT.from_fields:
        return None
    return model_config_from(values)


def _check_data(config: DictConfig, *, fresh: bool) -> list[LatentFormat]:
    """Check that the streams exist and have samples; return the formats of latents on disk.

    Reads indices, and a few samples of shards that seem to have changed. A run that has begun keeps its index, as
    another one would mean other positions.
    """
    if target_of(config.data, "data") is not ShardDataModule:
        return []
    data = build(config, "data", tokenizer=lambda caption: ([0], 1))
    data.prepare(unchanged=fresh)
    _check_kind(config, data.train_plan.latents)
    plans = [data.train_plan, *([data.validation_plan] if data.validation_samples else [])]
    return [plan.latents for plan in plans if plan.latents is not None]


def _check_kind(config: DictConfig, found: LatentFormat | None) -> None:
    """Check that the training set contains latents or images, as the stage requires."""
    wanted = config.stage.get("latents")
    if wanted is None or wanted == (found is not None):
        return
    where = f"{config.stage.written_at}.latents"
    if wanted:
        what = "is true, but data.train contains images, which would be encoded every time they are seen"
        hint = "set data.train to the output of `hdm-shards encode`"
    else:
        what = "is false, but data.train contains latents"
        hint = f"use images: ++{config.stage.written_at}.data.train=IMAGES"
    raise UserError(what, where=where, hint=f"{hint}; or set {where}=null")


def _check_text_encoder(config: DictConfig, model: XUTConfig) -> None:
    """Check that the text encoder exists and is as wide as the network's context."""
    if target_of(config.text_encoder, "text_encoder") is not load_text_encoder:
        return
    name = plain(config, "text_encoder.name")
    width = text_width(name)
    if width != model.context_width:
        raise UserError(
            f"the text encoder {name} is {width} wide, but the model's context is {model.context_width}",
            where="model.context_width",
            hint=f"set model.context_width={width}, or choose another text_encoder",
        )


def _autoencoder_folder(config: DictConfig) -> Path | None:
    """Return the folder of the run's autoencoder, or None if another class than this project's builds it."""
    if not str(config.vae["_target_"]).endswith(".load_autoencoder"):
        return None
    return locate_autoencoder(plain(config, "vae.name"), where="vae.name", made_by=config.vae.get("made_by"))


def _check_autoencoder(config: DictConfig, model: XUTConfig, plans: list[StagePlan]) -> None:
    """Check that the autoencoder exists, has the network's channels, and divides every resolution."""
    if (folder := _autoencoder_folder(config)) is None:
        return
    name, written = plain(config, "vae.name"), read_config(folder, where="vae.name")
    channels, factor = int(written["latent_channels"]), 2 ** (len(written["block_out_channels"]) - 1)
    if channels != model.channels:
        raise UserError(
            f"the autoencoder {name} has {channels} latent channels, but the model has {model.channels}",
            where="model.channels",
            hint=f"set model.channels={channels}, or choose another vae",
        )
    unit = factor * model.patch_size
    for plan in plans:
        resolution = plan.settings.resolution
        if resolution % unit:
            raise UserError(
                f"{resolution} is not a multiple of {unit} (autoencoder factor {factor} x patch {model.patch_size})",
                where=f"{plan.written_at}.resolution",
                hint=f"set it to {max(1, round(resolution / unit)) * unit}",
            )


def _check_latents(config: DictConfig, formats: list[LatentFormat]) -> None:
    """Check that latents on disk were made with the run's autoencoder."""
    found = {each.autoencoder: each.name for each in formats}
    if not found or (folder := _autoencoder_folder(config)) is None:
        return
    own = folder_fingerprint(folder, where="vae.name")
    for fingerprint, name in found.items():
        if fingerprint != own:
            raise other_autoencoder(fingerprint, own, named=name)


def _check_text_states(config: DictConfig, folders: set[str]) -> None:
    """Check that text states on disk are those of the run's text encoder, which must not be whitened."""
    if not folders or target_of(config.text_encoder, "text_encoder") is not load_text_encoder:
        return
    text = plain(config, "text_encoder")
    if text.get("whiten_captions"):
        what = "the states on disk are not whitened"
        raise UserError(what, where="text_encoder.whiten_captions", hint="set it to 0, or data.text_states=null")
    own = text_fingerprint(text["name"], text.get("layer", -1))
    for folder in folders:
        found = read_format(Path(folder), where="data.text_states")
        if found.text_encoder != own:
            raise other_text_encoder(found.text_encoder, own, named=found.name)


def _check_stops(config: DictConfig, plans: list[StagePlan]) -> None:
    """Check that the conditions for ending a stage early can be measured."""
    for plan in plans:
        stop, where = plan.settings.stop, f"{plan.written_at}.stop"
        if stop.max_cost_usd is not None and not plain(config, "hardware.usd_per_device_hour") > 0:
            what, hint = "devices have no price", "set hardware.usd_per_device_hour, or stop.max_hours instead"
            raise UserError(what, where=f"{where}.max_cost_usd", hint=hint)
        if stop.plateau_samples is not None and plain(config, "validation.samples") < 1:
            what = "without validation samples there is no loss to reach a plateau"
            raise UserError(what, where=f"{where}.plateau_samples", hint="set validation.samples")


def _check_adapter_run(config: DictConfig, model: XUTConfig | None, plans: list[StagePlan]) -> None:
    """Check that an adapter has a base, is trained with exactly that base, and has layers to adapt."""
    check_call(config, "adapter")
    if config.get("init") is None:
        hint = "name its base model: init=runs/mine, or init=OWNER/NAME"
        raise UserError("an adapter needs a trained base model, and none is set", where="init", hint=hint)
    _check_base(config, model, plans, base_folder(str(config.init)))
    if plain(config, "text_encoder").get("whiten_captions"):
        what = "whitened states need a different text projection from the base's"
        raise UserError(what, where="text_encoder.whiten_captions", hint="set it to 0 with an adapter")
    if plain(config, "trainer.strategy") == hardware.SHARDED:
        what = "an adapter is small: sharding the frozen base gains nothing"
        raise UserError(what, where="trainer.strategy", hint="use auto or ddp with an adapter")
    if plain(config, "module").get("rule", "mup") == "mup":
        what = "mup has a rate for every matrix of an XUT, but none for an adapter's"
        raise UserError(what, where="module.rule", hint="set module.rule=constant, with a rate such as 2e-4")
    adapter = build(config, "adapter")
    if model is not None and isinstance(adapter, LayerAdapter):
        with torch.device("meta"):
            network = XUT(model)
        try:
            adapter.layers(network)
        except UserError as error:
            raise UserError(error.what, where=f"adapter.{error.where}", hint=error.hint) from error
        adapter.require_packages()


def _check_base(config: DictConfig, model: XUTConfig | None, plans: list[StagePlan], base: PipelineFolder) -> None:
    """Check that the frozen network and the encoders are the base's, with which the adapter will be used."""
    fields = {} if model is None else asdict(model)
    pairs: list[tuple[str, Any, Any]] = [(f"model.{key}", fields[key], getattr(base.xut, key)) for key in fields]
    source = base.text_encoder
    if source is not None:
        pairs.append(("text_encoder.layer", plain(config, "text_encoder").get("layer", source.layer), source.layer))
        lengths = [(plan.written_at, plan.settings.context_length) for plan in plans]
        pairs += [(f"{written_at}.context_length", length, source.context_length) for written_at, length in lengths]
    for key, value, of_base in pairs:
        if value != of_base:
            raise _other_than_base(key, value, of_base, f"use the base's: {key}=null")
    name = plain(config, "text_encoder").get("name")
    if source is not None and not base.inside and name and not same_model(name, source.name):
        moved = f"; if the encoder has only moved, write its new location into {base.folder / INDEX}"
        raise _other_than_base("text_encoder.name", name, source.name, f"use the base's: text_encoder.name=null{moved}")
    name = plain(config, "vae").get("name")
    if name and base.vae.is_dir() and not _same_autoencoder(config, name, base.vae):
        raise _other_than_base("vae.name", name, base.vae, "use the base's: vae.name=null")


def _other_than_base(key: str, value: object, of_base: object, hint: str) -> UserError:
    return UserError(f"is {value}, but the adapter's base was trained with {of_base}", where=key, hint=hint)


def _same_autoencoder(config: DictConfig, name: str, of_base: Path) -> bool:
    """Return whether two autoencoders encode alike: the same folder, or copies of it."""
    if same_model(name, str(of_base)) or (folder := _autoencoder_folder(config)) is None:
        return True
    return folder_fingerprint(folder, where="vae.name") == folder_fingerprint(of_base, where="init")
