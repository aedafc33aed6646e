"""A published network, from a single file or a diffusers folder: the network, and the autoencoder beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.encoders.autoencoder import autoencoder_from_tensors, load_autoencoder
from hdm_lightning.encoders.base import ImageAutoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.generation.text_encoder_source import TextEncoderSource
from hdm_lightning.interop import diffusers_folder
from hdm_lightning.interop.layouts import read_release
from hdm_lightning.interop.release import Release
from hdm_lightning.interop.vae_folder import WEIGHTS
from hdm_lightning.models import XUT, XUTConfig

CONTEXT_LENGTH = 512
SAMPLING: Mapping[str, Any] = {"height": 1024, "width": 1024, "guidance_scale": 3.0}

# Table 1 of arXiv 2509.06068: the text encoders of the three sizes, by the width of their hidden states.
TEXT_ENCODERS: Mapping[int, str] = {
    640: "google/gemma-3-270m",
    1024: "Qwen/Qwen3-0.6B",
    1152: "google/gemma-3-1b-pt",
}
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class PublishedModel:
    """A network in one of the published layouts.

    Args:
        path: the file, or the diffusers folder.
        release: what it holds.
    """

    path: Path
    release: Release

    @property
    def config(self) -> XUTConfig:
        """The network's, read off its tensors."""
        return self.release.network.config

    @property
    def sampling(self) -> Mapping[str, Any]:
        """Settings to draw with: those that hdm-convert left in the file, else those of the released networks."""
        return self.release.settings.get("sampling") or SAMPLING

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that decide what it draws."""
        if self.path.is_file():
            return (self.path,)
        return tuple(sorted(file for file in self.path.rglob("*") if file.suffix in _WEIGHT_SUFFIXES))

    def load_model(self) -> XUT:
        """The network on the CPU, in evaluation mode, in float32 whatever the file has: autocast lowers it."""
        return self.release.network.float().eval()

    def load_autoencoder(self) -> ImageAutoencoder:
        """The autoencoder beside the network in float32, normalised as the file says.

        Raises:
            UserError: if there is none, it is incomplete, or nothing tells its normalisation.
        """
        release = self.release
        if self.path.is_dir() and release.vae:
            return load_autoencoder(str(self.path / diffusers_folder.VAE), dtype=torch.float32, where=str(self.path))
        if not release.vae or release.vae_mean is None or release.vae_std is None:
            raise UserError(
                "holds no autoencoder with its normalisation (vae., vae_mean, vae_std, or a folder vae/)",
                where=str(self.path),
                hint="name one with --vae, the one the network was trained with",
            )
        tensors = {name: tensor.float() for name, tensor in release.vae.items()}
        mean, std = release.vae_mean.flatten().tolist(), release.vae_std.flatten().tolist()
        try:
            return autoencoder_from_tensors(tensors, mean, std, config=release.vae_config)
        except ValueError as error:
            raise UserError(str(error), where=str(self.path)) from error

    def text_encoder(self) -> TextEncoderSource:
        """The text encoder that it was trained with; one inside the file has no tokenizer and is passed over.

        Raises:
            UserError: if no published size has this context width, and the file names none.
        """
        written = self.release.settings.get("text_encoder")
        if written:
            return TextEncoderSource(**written)
        return TextEncoderSource(text_encoder_name(self.config, self.path), context_length=CONTEXT_LENGTH)


def read(path: Path) -> PublishedModel:
    """Read a published file, .safetensors or torch's (weights only), in any precision, or a diffusers folder.

    Raises:
        UserError: if it cannot be read, or holds no published network; the message lists what differs.
    """
    if path.is_dir() and not any(path.glob(f"{WEIGHTS}*")) and not any(path.glob(f"*/{WEIGHTS}*")):
        raise UserError(
            "holds no trained model: neither final/config.json nor a diffusers network",
            where=str(path),
            hint="give the folder of a finished run, its final/ folder, a diffusers folder or a single file",
        )
    return PublishedModel(path, read_release(path))


def text_encoder_name(config: XUTConfig, path: Path) -> str:
    """The text encoder that a published network of this context width was trained with.

    Raises:
        UserError: if no published size has this width.
    """
    if config.context_width not in TEXT_ENCODERS:
        raise UserError(
            f"needs a text encoder of width {config.context_width}, which no published size has",
            where=str(path),
            hint="name one with --text-encoder",
        )
    return TEXT_ENCODERS[config.context_width]
