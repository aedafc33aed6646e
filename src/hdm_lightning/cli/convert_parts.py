"""The steps of hdm-convert: describing a release, completing it and writing it in each layout."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hdm_lightning.encoders.autoencoder_folder import infer_config
from hdm_lightning.errors import UserError
from hdm_lightning.generation import published_model
from hdm_lightning.generation.bundle import BUNDLE_FORMAT, CARD_FILE
from hdm_lightning.generation.model_card import model_card
from hdm_lightning.interop import diffusers_folder, project_folder, published
from hdm_lightning.interop.comfyui import comfyui_tensors
from hdm_lightning.interop.layouts import SETTINGS_KEY, VAE_CONFIG_KEY
from hdm_lightning.interop.release import Release, release_to_tensors
from hdm_lightning.interop.tensor_files import write_tensors
from hdm_lightning.interop.vae_folder import read_vae_folder
from hdm_lightning.models.config import WIRING
from hdm_lightning.printable import in_one_line
from hdm_lightning.profiling.operations import parameter_count
from hdm_lightning.whole_files import write_text


def describe(release: Release) -> str:
    """What a release holds, one fact a line."""
    config = release.network.config
    wiring = ", ".join(f"{name} {getattr(config, name)}" for name in WIRING)
    lines = [
        f"network       {parameter_count(config):,} parameters, {release.network.patch_embedding.weight.dtype}",
        f"wiring        {wiring}" + (" (published)" if config.is_published_wiring else ""),
        *(f"  {name:20} {value}" for name, value in config.to_json().items()),
        f"autoencoder   {_tensors(release.vae)}",
        f"vae_mean      {None if release.vae_mean is None else release.vae_mean.flatten().tolist()}",
        f"vae_std       {None if release.vae_std is None else release.vae_std.flatten().tolist()}",
        f"text encoder  {_tensors(release.text_encoder)}{_recorded(release.settings.get('text_encoder'))}",
    ]
    return "\n".join(map(in_one_line, lines))


def with_vae(release: Release, folder: Path) -> Release:
    """The release with the autoencoder of a diffusers folder.

    Raises:
        UserError: there is none in the folder.
    """
    vae = read_vae_folder(folder)
    if not vae.tensors:
        raise UserError("holds no diffusers autoencoder", where=str(folder), hint="give the folder of its weights")
    return replace(release, vae=vae.tensors, vae_config=vae.config, vae_mean=vae.mean, vae_std=vae.std)


def write_project(release: Release, folder: Path, text_encoder: str | None) -> None:
    """A folder of this project, complete for hdm-sample where an autoencoder is in the release."""
    release = _with_vae_config(release)
    release = replace(release, settings=_project_settings(release, text_encoder, folder))
    project_folder.write_project(folder, release)
    description = {**release.settings, "xut": release.network.config.to_json()}
    write_text(folder / CARD_FILE, model_card(description))


def write_published(release: Release, path: Path) -> None:
    """The published single file."""
    write_tensors(path, release_to_tensors(release), _metadata(release))


def write_comfyui(release: Release, path: Path) -> None:
    """The single file for ComfyUI."""
    write_tensors(path, comfyui_tensors(release), _metadata(release))


def write_diffusers(release: Release, folder: Path) -> None:
    """The diffusers folder."""
    diffusers_folder.write_diffusers(folder, _with_vae_config(release))


def write_bare(release: Release, path: Path) -> None:
    """The network alone."""
    published.require_published_wiring(release.network.config)
    write_tensors(path, published.export_state_dict(release.network), _metadata(release))


def _tensors(tensors: Mapping[str, Any]) -> str:
    return f"{len(tensors)} tensors" if tensors else "none"


def _recorded(text_encoder: Mapping[str, Any] | None) -> str:
    return f" inside; trained with {text_encoder['name']}" if text_encoder else ""


def _with_vae_config(release: Release) -> Release:
    if not release.vae or release.vae_config is not None:
        return release
    config: dict[str, Any] = infer_config(release.vae)
    return replace(release, vae_config=config)


def _project_settings(release: Release, text_encoder: str | None, folder: Path) -> dict[str, Any]:
    """The keys of config.json besides the network's, completed where the source did not have them."""
    config = release.network.config
    levels = len((release.vae_config or {}).get("block_out_channels", (0, 0, 0, 0)))
    settings: dict[str, Any] = {
        "format": BUNDLE_FORMAT,
        "latent": {"channels": config.channels, "factor": 2 ** (levels - 1)},
        "training": {},
        "sampling": dict(published_model.SAMPLING),
        **release.settings,
    }
    if text_encoder or "text_encoder" not in settings:
        name = text_encoder or published_model.text_encoder_name(config, folder)
        length = published_model.CONTEXT_LENGTH
        settings["text_encoder"] = {"name": name, "layer": -1, "context_length": length}
    return settings


def _metadata(release: Release) -> dict[str, str]:
    """What the layout has no place for, so that the way back finds it."""
    kept = {**release.settings, VAE_CONFIG_KEY: release.vae_config}
    kept = {key: value for key, value in kept.items() if value}
    return {SETTINGS_KEY: json.dumps(kept)} if kept else {}
