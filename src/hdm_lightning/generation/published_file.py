"""A published single file: the network, and the autoencoder where it lies beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hdm_lightning.encoders.vae import KLAutoencoder
from hdm_lightning.encoders.vae_tensors import autoencoder_from_tensors
from hdm_lightning.errors import UserError
from hdm_lightning.interop import published
from hdm_lightning.models import XUT, XUTConfig

CONTEXT_LENGTH = 512
SAMPLING: Mapping[str, Any] = {"height": 1024, "width": 1024, "guidance_scale": 3.0}

# Table 1 of arXiv 2509.06068: the text encoders of the three sizes, by the width of their hidden states.
TEXT_ENCODERS: Mapping[int, str] = {
    640: "google/gemma-3-270m",
    1024: "Qwen/Qwen3-0.6B",
    1152: "google/gemma-3-1b-pt",
}
VAE_PREFIX = "vae."


@dataclass(frozen=True)
class PublishedFile:
    """What a published file holds.

    Args:
        path: the file.
        config: the network's, read off its tensors.
        tensors: all of the file's.
    """

    path: Path
    config: XUTConfig
    tensors: Mapping[str, Tensor]

    def load_model(self) -> XUT:
        """The network on the CPU in float32, in evaluation mode.

        Raises:
            UserError: listing missing, unexpected and mis-shaped tensors.
        """
        try:
            return published.load_xut(self.config, self.tensors).float().eval()
        except ValueError as error:
            raise UserError(str(error), where=str(self.path)) from error

    def load_autoencoder(self) -> KLAutoencoder:
        """The autoencoder in the file, normalised as the file says.

        Raises:
            UserError: if there is none, or it is incomplete.
        """
        tensors = {
            name.removeprefix(VAE_PREFIX): tensor.float()
            for name, tensor in self.tensors.items()
            if name.startswith(VAE_PREFIX)
        }
        mean, std = self.tensors.get("vae_mean"), self.tensors.get("vae_std")
        if not tensors or mean is None or std is None:
            raise UserError(
                "holds no autoencoder with its normalisation (vae., vae_mean, vae_std)",
                where=str(self.path),
                mend="name one with --vae, the one the network was trained with",
            )
        try:
            return autoencoder_from_tensors(tensors, mean.flatten().tolist(), std.flatten().tolist())
        except ValueError as error:
            raise UserError(str(error), where=str(self.path)) from error


def read(path: Path) -> PublishedFile:
    """Read a published file.

    Raises:
        UserError: if it is no safetensors file, or no published network.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"cannot be read as safetensors ({error})",
            where=str(path),
            mend="convert it first with hdm-convert",
        ) from error
    try:
        return PublishedFile(path, published.infer_config(tensors), tensors)
    except ValueError as error:
        raise UserError(str(error), where=str(path)) from error


def text_encoder_name(config: XUTConfig, path: Path) -> str:
    """The text encoder that a published network of this context width was trained with.

    Raises:
        UserError: if no published size has this width.
    """
    if config.context_width not in TEXT_ENCODERS:
        raise UserError(
            f"needs a text encoder of width {config.context_width}, which no published size has",
            where=str(path),
            mend="name one with --text-encoder",
        )
    return TEXT_ENCODERS[config.context_width]
