"""The parts of a pipeline that a published network comes with or names: its autoencoder, its text encoder."""

from pathlib import Path
from typing import Any

import torch

from hdm_lightning.encoders.autoencoder import autoencoder_from_tensors, load_autoencoder
from hdm_lightning.encoders.base import ImageAutoencoder
from hdm_lightning.encoders.pretrained import TextEncoderSource
from hdm_lightning.encoders.vae_folder import VAE_FOLDER, WEIGHTS
from hdm_lightning.errors import UserError
from hdm_lightning.interop import published
from hdm_lightning.interop.layouts import UNET_FOLDER
from hdm_lightning.interop.release import Release
from hdm_lightning.models import XUTConfig


def is_published(path: Path) -> bool:
    """Whether a path is a single file of weights, or a folder with unet/, as the released network has it."""
    return path.is_file() or any((path / UNET_FOLDER).glob(f"{WEIGHTS}*"))


def text_encoder_of(release: Release, path: Path, *, named: str | None = None) -> TextEncoderSource:
    """The text encoder that a release records, else the one that is named, or that of its width.

    Raises:
        UserError: what it records is none, or nothing says which it is.
    """
    written = release.settings.get("text_encoder")
    if written:
        return _source(written, path)
    return published_text_encoder(release.network.config, path, named=named)


def published_text_encoder(config: XUTConfig, path: Path, *, named: str | None = None) -> TextEncoderSource:
    """The text encoder that was named, or that of the published network of this context width."""
    name = named or published.text_encoder_name(config, where=str(path))
    return TextEncoderSource(name, context_length=published.CONTEXT_LENGTH)


def _source(written: Any, path: Path) -> TextEncoderSource:
    try:
        return TextEncoderSource.from_json(written)
    except (TypeError, ValueError) as error:
        raise UserError(str(error), where=str(path), hint="name one with --text-encoder") from error


def autoencoder_of(release: Release, path: Path) -> ImageAutoencoder:
    """The autoencoder beside a published network in float32, normalized as the file says.

    Raises:
        UserError: there is none, or it does not fit its configuration.
    """
    if path.is_dir() and release.vae:
        return load_autoencoder(str(path / VAE_FOLDER), dtype=torch.float32, where=str(path))
    if not release.vae or release.vae_mean is None or release.vae_std is None:
        raise UserError(
            "holds no autoencoder with its normalization (vae., vae_mean, vae_std, or a folder vae/)",
            where=str(path),
            hint="name one with --vae (vae= in Python), the one the network was trained with",
        )
    mean, std = release.vae_mean.flatten().tolist(), release.vae_std.flatten().tolist()
    try:
        return autoencoder_from_tensors(release.vae, mean, std, config=release.vae_config)
    except ValueError as error:
        raise UserError(str(error), where=str(path)) from error
