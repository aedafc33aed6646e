"""This project's folder of a trained model: model.safetensors, config.json and vae/.

config.json has the network's configuration under ``xut``; its other keys are passed through unread.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.interop.mismatch import check_tensors
from hdm_lightning.interop.release import Release
from hdm_lightning.interop.tensor_files import read_sharded, read_tensors, write_tensors
from hdm_lightning.interop.vae_folder import read_vae_folder, write_vae_folder
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.whole_files import write_json

WEIGHTS, CONFIG, VAE, TEXT_ENCODER = "model.safetensors", "config.json", "vae", "text_encoder"


def is_project_folder(folder: Path) -> bool:
    """Whether the folder's config.json describes an XUT."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "xut" in config


def read_project(folder: Path, weights: str = WEIGHTS) -> Release:
    """The release in a folder of this project.

    Args:
        folder: with config.json.
        weights: name of the weights' file.

    Raises:
        UserError: a file is missing, the configuration is wrong or the tensors do not fit it.
    """
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = read_tensors(folder / weights)
    try:
        config = XUTConfig.from_json(settings.pop("xut"))
        network = network_from_tensors(config, tensors)
    except (TypeError, ValueError) as error:
        raise UserError(str(error), where=str(folder)) from error
    vae = read_vae_folder(folder / VAE)
    text_encoder = read_sharded(folder / TEXT_ENCODER, "model") or {}
    return Release(network, vae.tensors, vae.config, vae.mean, vae.std, text_encoder, settings)


def network_from_tensors(config: XUTConfig, tensors: dict[str, Tensor]) -> XUT:
    """The network with these tensors under our names, in the dtype they have.

    Raises:
        ValueError: tensors are missing, unexpected or mis-shaped; the message lists them.
    """
    with torch.device("meta"):
        network = XUT(config)
    check_tensors(tensors, {name: value.shape for name, value in network.state_dict().items()})
    network.load_state_dict(tensors, assign=True)
    return network


def write_project(folder: Path, release: Release) -> None:
    """Write a folder of this project; config.json comes last, so that a folder with one is whole.

    Raises:
        ValueError: there is an autoencoder without a configuration.
    """
    if release.vae and release.vae_config is None:
        raise ValueError("vae_config is None beside an autoencoder; expected its config.json")
    write_tensors(folder / WEIGHTS, release.network.state_dict())
    if release.vae and release.vae_config is not None:
        write_vae_folder(folder / VAE, release.vae, release.vae_config, release.vae_mean, release.vae_std)
    if release.text_encoder:
        write_tensors(folder / TEXT_ENCODER / WEIGHTS, release.text_encoder)
    write_json(folder / CONFIG, {**release.settings, "xut": release.network.config.to_json()})
