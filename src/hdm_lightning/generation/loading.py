"""A model on disk, of whatever kind, as an object that draws."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.encoders.base import ImageAutoencoder
from hdm_lightning.encoders.text import load_text_encoder
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError
from hdm_lightning.generation import published_model
from hdm_lightning.generation.bundle import CONFIG_FILE, WEIGHT_FILES, Bundle, Weights, load_bundle
from hdm_lightning.generation.fingerprints import sha256_of_all
from hdm_lightning.generation.fitting import require_fit
from hdm_lightning.generation.pipeline import TextToImage
from hdm_lightning.generation.published_model import PublishedModel
from hdm_lightning.generation.text_encoder_source import TextEncoderSource
from hdm_lightning.interop.project_folder import is_project_folder
from hdm_lightning.models import XUT

FINAL_FOLDER = "final"


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model.

    Args:
        device: where to draw.
        autocast: lower precision of the network's computation, and of the text encoder if it is bfloat16; None is
            float32.
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
        """Dtype of the text encoder; the autoencoder, which loses more by it, stays in float32.

        Under float16 the text encoder does as well, as in training: its states may be beyond that range.
        """
        return torch.bfloat16 if self.autocast == torch.bfloat16 else torch.float32


@dataclass
class LoadedModel:
    """A model ready to draw.

    Args:
        pipeline: draws.
        sampling: settings to start from, as the training run found them good.
        path: what to load to have it again.
        weight_files: the files that make it this model and no other.
    """

    pipeline: TextToImage
    sampling: Mapping[str, Any]
    path: Path
    weight_files: tuple[Path, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights' file, or of all files' where there are several."""
        return sha256_of_all(self.weight_files)


def load_text_to_image(path: Path, options: LoadOptions) -> LoadedModel:
    """Load a run's folder, its `final/` folder, a weights file inside one, or a published file or folder.

    Raises:
        UserError: if there is no model, or one of its parts is missing or does not fit.
    """
    found = find_bundle(path, options.weights)
    if found is not None:
        return _from_bundle(*found, options)
    if not path.exists():
        raise UserError("does not exist", where=str(path), hint="give a run's folder, a diffusers folder or a file")
    return _from_published(published_model.read(path), options)


def find_bundle(path: Path, weights: Weights = "ema") -> tuple[Bundle, Weights] | None:
    """The bundle that a path means, and which of its weights; None where it means something published.

    Args:
        path: a run's folder, a `final/` folder or a weights file inside one.
        weights: those to take of a folder; a file says for itself.

    Raises:
        UserError: if the bundle cannot be read.
    """
    for folder in (path / FINAL_FOLDER, path):
        if _is_bundle(folder):
            return load_bundle(folder), weights
    kinds: dict[str, Weights] = {"model.safetensors": "ema", "model_raw.safetensors": "raw"}
    if path.name in kinds and path.is_file() and (path.parent / CONFIG_FILE).is_file():
        return load_bundle(path.parent), kinds[path.name]
    return None


def _is_bundle(folder: Path) -> bool:
    """Whether a config.json is ours: a diffusers folder has one too, beside weights of another name."""
    has_weights = any((folder / name).is_file() for name in WEIGHT_FILES.values())
    return is_project_folder(folder) or ((folder / CONFIG_FILE).is_file() and has_weights)


def _from_bundle(bundle: Bundle, weights: Weights, options: LoadOptions) -> LoadedModel:
    if not options.vae and not bundle.vae_folder.is_dir():
        raise UserError(
            f"holds no autoencoder ({bundle.vae_folder.name}/)",
            where=str(bundle.folder),
            hint="name one with --vae, the one the network was trained with",
        )
    autoencoder = load_autoencoder(options.vae or str(bundle.vae_folder), dtype=torch.float32, where="vae")
    require_fit("vae", "latent channels", autoencoder.channels, bundle.latent_channels)
    require_fit("vae", "pixels a latent cell", autoencoder.factor, bundle.latent_factor)
    pipeline = _pipeline(bundle.load_model(weights), bundle.text_encoder, autoencoder, options)
    file = bundle.weights_file(weights)
    return LoadedModel(pipeline, bundle.sampling, file, (file,))


def _from_published(model: PublishedModel, options: LoadOptions) -> LoadedModel:
    if options.text_encoder:
        source = TextEncoderSource(options.text_encoder, context_length=published_model.CONTEXT_LENGTH)
    else:
        source = model.text_encoder()
    autoencoder = (
        load_autoencoder(options.vae, dtype=torch.float32, where="vae") if options.vae else model.load_autoencoder()
    )
    pipeline = _pipeline(model.load_model(), source, autoencoder, options)
    return LoadedModel(pipeline, model.sampling, model.path, model.weight_files)


def _pipeline(
    network: XUT, source: TextEncoderSource, autoencoder: ImageAutoencoder, options: LoadOptions
) -> TextToImage:
    """Network and encoders on the device, checked against each other."""
    name = options.text_encoder or source.name
    text_encoder = load_text_encoder(name, dtype=options.encoder_dtype, layer=source.layer, where="text_encoder")
    require_fit("text_encoder", "numbers a token", text_encoder.width, network.config.context_width)
    return TextToImage(
        network.to(options.device),
        text_encoder.to(options.device),
        Tokenizer(name, where="text_encoder").bind(source.context_length),
        autoencoder.to(options.device),
        max_batch=options.max_batch,
        autocast=options.autocast,
    )
