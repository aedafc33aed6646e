"""Load a model of any kind on disk as a pipeline."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.encoders.base import ImageAutoencoder
from hdm_lightning.encoders.pretrained import TextEncoderSource, is_local_path, locate_model
from hdm_lightning.encoders.text import MODEL_DOWNLOAD, MODEL_FILES, TransformersTextEncoder, load_text_encoder
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.encoders.vae_folder import VAE_FOLDER, WEIGHTS, read_config
from hdm_lightning.errors import UserError
from hdm_lightning.generation.components import FlowScheduler
from hdm_lightning.generation.image_files import sha256_of
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.pipeline_adapters import AdapterUse, adapter_files
from hdm_lightning.generation.published_models import (
    autoencoder_of,
    located,
    published_text_encoder,
    text_encoder_of,
)
from hdm_lightning.generation.sampling_settings import require_fit
from hdm_lightning.interop import published
from hdm_lightning.interop.adapter_files import adapter_folder, is_adapter, read_adapter
from hdm_lightning.interop.adapters import Adapter
from hdm_lightning.interop.layouts import FINAL_FOLDER, read_release
from hdm_lightning.interop.network_copies import told
from hdm_lightning.interop.pipeline_folder import (
    CONFIG,
    INDEX,
    TRANSFORMER,
    PipelineFolder,
    Weights,
    holding,
    is_pipeline_folder,
    read_pipeline_folder,
    refuse_unfinished,
    split_sampling,
)
from hdm_lightning.models import XUT
from hdm_lightning.models.compiled_blocks import compile_blocks

_HERE = {"local_files_only": True}
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model.

    Args:
        device: where to compute.
        autocast: lower precision for the network, and for the text encoder if it is bfloat16; None is float32. The
            autoencoder, which loses more by it, stays in float32.
        weights: averaged ("ema") or last ("raw") weights of a pipeline folder.
        text_encoder: name or path instead of the model's own.
        vae: name or path instead of the model's own.
        max_batch: images per batch.
        compiled: whether to compile the network, block by block, for each image size.
        adapters: LoRAs to apply.
        any_base: accept LoRAs trained on other weights of the network's shape.
        local_only: do not contact the hub; model and text encoder must be on this machine.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: torch.dtype | None = None
    weights: Weights = "ema"
    text_encoder: str | None = None
    vae: str | None = None
    max_batch: int = 8
    compiled: bool = False
    adapters: tuple[AdapterUse, ...] = ()
    any_base: bool = False
    local_only: bool = False

    @property
    def encoder_dtype(self) -> torch.dtype:
        """Dtype of the text encoder.

        With float16 autocast it is float32, as in training: its states may exceed the range of float16.
        """
        return torch.bfloat16 if self.autocast == torch.bfloat16 else torch.float32


@dataclass
class LoadedModel:
    """A model ready to generate images, its default settings, its path and its weights files.

    `notice` is a message for the user: the license of a hub model, or the other networks in a file.
    """

    pipeline: HDMPipeline
    sampling: Mapping[str, Any]
    path: Path
    weight_files: tuple[Path, ...]
    notice: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights file, or of the hashes of all files if there are several."""
        return sha256_of(*self.weight_files)


def load_pipeline(path: Path, options: LoadOptions) -> LoadedModel:
    """Load a run's folder, its `final/` folder, a weights file inside one, a hub name, or a published file or folder.

    A LoRA (hub name, folder, run or file) loads as its base with the LoRA.

    Raises:
        UserError: there is no model, or one of its parts or an adapter is missing or does not fit.
    """
    found, notice = _located(path, options)
    if is_adapter(found):
        loaded = _load_adapted(adapter_folder(found) or found, options)
    else:
        loaded = _load_model(found, options)
    loaded.pipeline.use_adapters(options.adapters, any_base=options.any_base)
    return replace(loaded, notice=_both(notice, loaded.notice))


def _both(*notices: str | None) -> str | None:
    return "; ".join(filter(None, notices)) or None


def _load_adapted(folder: Path, options: LoadOptions) -> LoadedModel:
    """Load the base of an adapter with the adapter, whose own default settings win."""
    if options.weights != "ema":
        what = f"is a LoRA, whose base is loaded with its averaged weights, not {options.weights}"
        raise UserError(what, where=f"--weights {options.weights}", hint="leave it out")
    adapter, at = adapter_and_base(folder)
    base, notice = _located(at, options)
    if is_adapter(base):
        then = f"hdm-sample MERGED --lora {shlex.quote(str(folder))} --any-base"
        hint = f"merge that into its own base with hdm-convert, then {then}"
        raise UserError(f"its base, {at}, is itself a LoRA", where=str(folder), hint=hint)
    loaded = _load_model(base, options)
    loaded.pipeline.load_lora_weights(folder, any_base=options.any_base)
    sampling = {**loaded.sampling, **adapter.settings.get("sampling", {})}
    files = (*loaded.weight_files, *adapter_files(folder))
    return LoadedModel(loaded.pipeline, sampling, folder, files, _both(notice, loaded.notice))


def adapter_and_base(folder: Path) -> tuple[Adapter, Path]:
    """Return an adapter and the path of its base: as in training, or below one of the folders above the adapter's.

    Raises:
        UserError: it cannot be read, or its base is not found.
    """
    adapter = read_adapter(folder)
    name = adapter.base.name
    hint = f"name the base yourself: hdm-sample BASE --lora {shlex.quote(str(folder))}"
    if name is None:
        raise UserError("does not record its base", where=str(folder), hint=hint)
    if Path(name).exists() or not is_local_path(name):
        return adapter, Path(name)
    known, above = Path(name), folder.resolve().parents[:4]
    ends = [Path(*known.parts[-count:]) for count in (3, 2, 1) if count < len(known.parts)]
    places = [place / end for end in ends for place in above]
    found = next((place for place in places if place.exists() and not is_adapter(place)), None)
    if found is None:
        raise UserError(f"its base, {name}, no longer exists", where=str(folder), hint=hint)
    return adapter, found


def _located(path: Path, options: LoadOptions) -> tuple[Path, str | None]:
    return (path, None) if options.local_only else located(path, str(path))


def _load_model(path: Path, options: LoadOptions) -> LoadedModel:
    found = find_pipeline_folder(path, options.weights)
    if found is not None:
        return _from_folder(*found, options)
    if not path.exists():
        raise UserError("does not exist", where=str(path), hint="use a run's folder, a diffusers folder or a file")
    return _from_release(path, options)


def find_pipeline_folder(path: Path, weights: Weights = "ema") -> tuple[PipelineFolder, Weights] | None:
    """Return the pipeline folder that a path refers to, and which weights; None if it refers to anything else.

    `path` is a run's folder, a `final/` folder, or a weights file inside one, which overrides `weights`.
    Raises UserError: the folder cannot be read.
    """
    for folder in (path / FINAL_FOLDER, path):
        if is_pipeline_folder(folder):
            return read_pipeline_folder(folder), weights
    place = holding(path)
    return None if place is None else (read_pipeline_folder(place[0]), place[1])


def _from_folder(found: PipelineFolder, weights: Weights, options: LoadOptions) -> LoadedModel:
    if not options.vae and not found.vae.is_dir():
        raise UserError(
            f"contains no autoencoder ({VAE_FOLDER}/)",
            where=str(found.folder),
            hint="name one with --vae (vae= in Python), the one the network was trained with",
        )
    files = found.weight_files(weights)
    autoencoder = load_autoencoder(options.vae or str(found.vae), dtype=torch.float32, where="vae")
    if found.vae.is_dir():
        levels = len(read_config(found.vae, where=str(found.folder))["block_out_channels"])
        require_fit("vae", "pixels per latent cell", autoencoder.factor, 2 ** (levels - 1))
    source = found.text_encoder
    if source is None:
        source = published_text_encoder(found.xut, found.folder, named=options.text_encoder)
    network, sampling = found.load_network(weights), found.sampling
    pipeline = build_pipeline(network, source, autoencoder, sampling, options, tokenizer=found.tokenizer)
    return LoadedModel(pipeline, found.sampling, files[0], files)


def _from_release(path: Path, options: LoadOptions) -> LoadedModel:
    """Load a published file, .safetensors or torch's (weights only), in any precision, or a diffusers folder."""
    refuse_unfinished(path, where="model")
    if (path / TRANSFORMER / CONFIG).is_file():
        raise UserError(
            f"is incomplete: {INDEX}, which is written last, is missing",
            where=str(path),
            hint="run the training command again, which writes it",
        )
    if path.is_dir() and not any(path.glob(f"{WEIGHTS}*")) and not any(path.glob(f"*/{WEIGHTS}*")):
        raise UserError(
            f"contains no trained model: neither final/{INDEX} nor a diffusers network",
            where=str(path),
            hint="use the folder of a finished run, its final/ folder, a diffusers folder or a single file",
        )
    release = read_release(path)
    source = text_encoder_of(release, path, named=options.text_encoder)
    if options.vae:
        autoencoder = load_autoencoder(options.vae, dtype=torch.float32, where="vae")
    else:
        autoencoder = autoencoder_of(release, path)
    sampling = release.settings.get("sampling") or published.SAMPLING
    pipeline = build_pipeline(release.network, source, autoencoder, sampling, options)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in _WEIGHT_SUFFIXES)
    notice = told(path, release.copies) if release.copies else None
    return LoadedModel(pipeline, sampling, path, tuple(files), notice)


def build_pipeline(
    network: XUT,
    source: TextEncoderSource,
    autoencoder: ImageAutoencoder,
    sampling: Mapping[str, Any],
    options: LoadOptions,
    *,
    tokenizer: str | None = None,
) -> HDMPipeline:
    """Build a pipeline on the device from a network, which becomes float32, and encoders, checking that they fit.

    The text encoder is that of the options, else `source`'s; layer and context length are always `source`'s.
    `tokenizer` is the name or folder of the tokenizer if it is not the text encoder's own.
    """
    name = options.text_encoder or source.name
    if options.local_only:
        name = str(locate_model(name, where="text_encoder", required=MODEL_FILES, download=MODEL_DOWNLOAD, **_HERE))
        tokenizer = tokenizer if tokenizer and Path(tokenizer).is_dir() else None
    encoder = load_text_encoder(name, dtype=options.encoder_dtype, layer=source.layer, where="text_encoder")
    own_tokenizer = None if options.text_encoder or tokenizer is None else Tokenizer(tokenizer, where="text_encoder")
    if own_tokenizer is not None and isinstance(encoder, TransformersTextEncoder):
        encoder.tokenizer = own_tokenizer
    network = network.float().eval().to(options.device)
    if options.compiled:
        compile_blocks(network)
    solving, others = split_sampling(sampling)
    pipeline = HDMPipeline(
        network,
        autoencoder.to(options.device),
        FlowScheduler(**solving),
        encoder.to(options.device),
        own_tokenizer,
        text_encoder_name=name,
        text_encoder_layer=source.layer,
        context_length=source.context_length,
        sampling=others,
    )
    pipeline.max_batch, pipeline.autocast = options.max_batch, options.autocast
    return pipeline
