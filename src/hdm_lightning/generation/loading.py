"""A model on disk, of whatever kind, as an object that draws."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.encoders.text import load_text_encoder
from hdm_lightning.encoders.tokeniser import Tokeniser
from hdm_lightning.encoders.vae import load_autoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.generation import published_file
from hdm_lightning.generation.bundle import CONFIG_FILE, Bundle, Weights, load_bundle
from hdm_lightning.generation.fingerprints import sha256_of
from hdm_lightning.generation.pipeline import TextToImage, require_fit

FINAL_FOLDER = "final"


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model.

    Args:
        device: where to draw.
        autocast: lower precision of the network's computation and of the encoders; None is float32.
        weights: averaged ("ema") or last ("raw") weights of a bundle.
        text_encoder: name or path instead of the model's own.
        vae: name or path instead of the model's own.
        max_batch: pictures drawn at once.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: torch.dtype | None = None
    weights: Weights = "ema"
    text_encoder: str | None = None
    vae: str | None = None
    max_batch: int = 8

    @property
    def encoder_dtype(self) -> torch.dtype:
        """Dtype of the text encoder; the autoencoder, which loses more by it, stays in float32."""
        return self.autocast or torch.float32


@dataclass
class LoadedModel:
    """A model ready to draw.

    Args:
        pipeline: draws.
        sampling: settings to start from, as the training run found them good.
        path: the weights' file.
    """

    pipeline: TextToImage
    sampling: Mapping[str, Any]
    path: Path

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights' file."""
        return sha256_of(self.path)


def load_text_to_image(path: Path, options: LoadOptions) -> LoadedModel:
    """Load a run's folder, its `final/` folder, a weights file inside one, or a published single file.

    Raises:
        UserError: if there is no model, or one of its parts is missing or does not fit.
    """
    for folder in (path / FINAL_FOLDER, path):
        if (folder / CONFIG_FILE).is_file():
            return _from_bundle(load_bundle(folder), options, options.weights)
    kinds: dict[str, Weights] = {"model.safetensors": "ema", "model_raw.safetensors": "raw"}
    if path.name in kinds and (path.parent / CONFIG_FILE).is_file():
        return _from_bundle(load_bundle(path.parent), options, kinds[path.name])
    if path.is_file():
        return _from_published_file(path, options)
    if path.is_dir():
        raise UserError(
            f"holds no trained model ({FINAL_FOLDER}/{CONFIG_FILE})",
            where=str(path),
            mend="give the folder of a finished run, its final/ folder, or a .safetensors file",
        )
    raise UserError("does not exist", where=str(path), mend="give a run's folder or a .safetensors file")


def _from_bundle(bundle: Bundle, options: LoadOptions, weights: Weights) -> LoadedModel:
    source = bundle.text_encoder
    name = options.text_encoder or source.name
    text_encoder = load_text_encoder(
        name, dtype=options.encoder_dtype, layer=source.layer, max_batch=64, where="text_encoder"
    )
    require_fit("text_encoder", "numbers a token", text_encoder.width, bundle.xut.context_width)
    autoencoder = load_autoencoder(options.vae or str(bundle.vae_folder), where="vae")
    require_fit("vae", "latent channels", autoencoder.channels, bundle.latent_channels)
    require_fit("vae", "pixels a latent cell", autoencoder.factor, bundle.latent_factor)
    pipeline = TextToImage(
        bundle.load_model(weights).to(options.device),
        text_encoder.to(options.device),
        Tokeniser(name, source.context_length, where="text_encoder"),
        autoencoder.to(options.device),
        max_batch=options.max_batch,
        autocast=options.autocast,
    )
    return LoadedModel(pipeline, bundle.sampling, bundle.weights_file(weights))


def _from_published_file(path: Path, options: LoadOptions) -> LoadedModel:
    published = published_file.read(path)
    name = options.text_encoder or published_file.text_encoder_name(published.config, path)
    text_encoder = load_text_encoder(name, dtype=options.encoder_dtype, where="text_encoder")
    require_fit("text_encoder", "numbers a token", text_encoder.width, published.config.context_width)
    autoencoder = load_autoencoder(options.vae, where="vae") if options.vae else published.load_autoencoder()
    pipeline = TextToImage(
        published.load_model().to(options.device),
        text_encoder.to(options.device),
        Tokeniser(name, published_file.CONTEXT_LENGTH, where="text_encoder"),
        autoencoder.to(options.device),
        max_batch=options.max_batch,
        autocast=options.autocast,
    )
    return LoadedModel(pipeline, published_file.SAMPLING, path)
