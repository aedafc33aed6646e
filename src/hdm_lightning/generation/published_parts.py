"""The autoencoder and the text encoder that a published network contains or names."""

from pathlib import Path

import torch

from hdm_lightning.encoders.autoencoder import autoencoder_from_tensors, load_autoencoder
from hdm_lightning.encoders.base import ImageAutoencoder
from hdm_lightning.encoders.pretrained import TextEncoderSource
from hdm_lightning.encoders.vae_folder import VAE_FOLDER, WEIGHTS
from hdm_lightning.errors import UserError
from hdm_lightning.interop import published
from hdm_lightning.interop.layouts import UNET_FOLDER
from hdm_lightning.interop.release import Release
from hdm_lightning.json_files import AGAIN
from hdm_lightning.models import XUTConfig


def is_published(path: Path) -> bool:
    """Return whether a path is a single weights file, or a folder with unet/ like the released network."""
    return path.is_file() or any((path / UNET_FOLDER).glob(f"{WEIGHTS}*"))


def text_encoder_of(release: Release, path: Path, *, named: str | None = None) -> TextEncoderSource:
    """Return the text encoder that a release records, else `named`, else the published one of its context width.

    Raises:
        UserError: the record is invalid, or no text encoder is known for this width.
    """
    written = release.settings.get("text_encoder")
    if not written:
        return published_text_encoder(release.network.config, path, named=named)
    try:
        return TextEncoderSource.from_json(written)
    except (TypeError, ValueError) as error:
        raise UserError(str(error), where=str(path), hint=AGAIN) from error


def published_text_encoder(config: XUTConfig, path: Path, *, named: str | None = None) -> TextEncoderSource:
    """Return the text encoder `named`, or that of the published network of this context width."""
    name = named or published.text_encoder_name(config, where=str(path))
    return TextEncoderSource(name, context_length=published.CONTEXT_LENGTH)


def autoencoder_of(release: Release, path: Path) -> ImageAutoencoder:
    """Return the autoencoder of a published network in float32, with the normalization in the file.

    Raises:
        UserError: there is none, or it does not fit its configuration.
    """
    if path.is_dir() and release.vae:
        return load_autoencoder(str(path / VAE_FOLDER), dtype=torch.float32, where=str(path))
    if not release.vae or release.vae_mean is None or release.vae_std is None:
        raise UserError(
            "contains no autoencoder with its normalization (vae., vae_mean, vae_std, or a folder vae/)",
            where=str(path),
            hint="name one with --vae (vae= in Python), the one the network was trained with",
        )
    mean, std = release.vae_mean.flatten().tolist(), release.vae_std.flatten().tolist()
    try:
        return autoencoder_from_tensors(release.vae, mean, std, config=release.vae_config)
    except ValueError as error:
        raise UserError(str(error), where=str(path), hint=AGAIN) from error
