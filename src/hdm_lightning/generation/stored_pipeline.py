"""Loading, saving, uploading and offloading a pipeline as diffusers does, with checks on what a folder may contain."""

import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import is_accelerate_available
from torch import Tensor, nn

from hdm_lightning.encoders.base import ImageAutoencoder
from hdm_lightning.encoders.pretrained import (
    PACKAGE_SCHEME,
    TextEncoderSource,
    forget_places,
    is_local_path,
    locate_model,
    require_finite_model,
)
from hdm_lightning.encoders.text import cut_after, read_text_model
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError
from hdm_lightning.generation.components import FlowScheduler
from hdm_lightning.generation.published_models import autoencoder_of, is_published, located, text_encoder_of
from hdm_lightning.interop.adapter_files import is_adapter
from hdm_lightning.interop.layouts import read_release
from hdm_lightning.interop.model_card import CARD, SAMPLES, model_card
from hdm_lightning.interop.pipeline_folder import (
    COMPONENTS,
    DOWNLOAD,
    INDEX,
    PIPELINE_CLASS,
    TEXT_ENCODER,
    TOKENIZER,
    PipelineFolder,
    Weights,
    is_pipeline_folder,
    read_pipeline_folder,
    split_sampling,
    write_pipeline_folder,
)
from hdm_lightning.interop.published import SAMPLING
from hdm_lightning.json_files import read_object
from hdm_lightning.models import XUTConfig
from hdm_lightning.whole_files import move_in, write_text

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_KNOWN = {
    "transformer": [COMPONENTS, "XUTTransformer"],
    "scheduler": [COMPONENTS, "FlowScheduler"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_TEXT_PARTS = ("text_encoder", "tokenizer")
_PASSED = "passed in Python"
"""Placeholder for the name of a text encoder that was passed as an object, where a release records none."""


class StoredPipeline(DiffusionPipeline):
    """Loading, saving and offloading of an `HDMPipeline`."""

    config: Any
    transformer: Any
    vae: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    require_no_adapters: Callable[[str], None]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """Load a pipeline from a folder (a pipeline's or a run's) or from the hub.

        The components are built from plain fields by an allow-list of classes; no code from the folder is run. A text
        encoder that is not in the folder is loaded by its name. Networks in the layout of the released HDM weights
        load too: a single file, a folder with unet/, or a hub repository with either, whose license is reported in a
        warning.

        Args:
            pretrained_model_name_or_path: folder or hub name.
            options: those of diffusers, such as `torch_dtype`; `variant="raw"` loads the last weights instead of the
                averaged ones; components passed by name (`vae=`, `text_encoder=`) replace the folder's.

        Raises:
            UserError: there is no such model, or a component is missing or of an unknown class.
        """
        name = os.fspath(pretrained_model_name_or_path)
        hub = {key: options.pop(key) for key in _HUB_OPTIONS if key in options}
        path = Path(name).expanduser()
        unlike = [place for place in (path, path / "final") if not (place / INDEX).is_file()]
        if old := [place for place in unlike if is_pipeline_folder(place)]:
            hint = f"convert it with hdm-convert {shlex.quote(str(old[0]))} FOLDER; hdm-sample reads it as it is"
            raise UserError("has the old layout, which is not a diffusers pipeline", where=str(old[0]), hint=hint)
        folder = path / "final"
        if not (folder / INDEX).is_file() and (release := _released(path, name, hub)) is not None:
            return cls._of_release(release, options)
        if not (folder / INDEX).is_file():
            required = [INDEX, *(f"{part}/*" for part in _KNOWN if part not in options)]
            folder = locate_model(name, where="model", required=required, download=DOWNLOAD, **hub)
        passed = {name for name, part in options.items() if part is not None}
        _check_parts(folder, options)
        found = read_pipeline_folder(folder)
        if not found.inside and "text_encoder" not in options and found.text_encoder is not None:
            options["text_encoder"] = _referred(found.text_encoder, options)
        if not found.inside and "tokenizer" not in options and found.text_encoder is not None:
            options["tokenizer"] = Tokenizer(found.text_encoder.name, where="text_encoder").transformers
        options.setdefault("low_cpu_mem_usage", is_accelerate_available())
        pipeline = super().from_pretrained(str(folder), **options)
        if "text_encoder" in passed:  # not the one that the folder names
            pipeline.register_to_config(text_encoder_name=None)
        for part in ("transformer", "vae", "text_encoder"):
            if isinstance(model := getattr(pipeline, part), nn.Module) and part not in passed:
                require_finite_model(model, f"{folder}/{part}", part)
        return pipeline

    @classmethod
    def _of_release(cls, path: Path, options: dict[str, Any]) -> Self:
        """Build a pipeline from a published file or folder; `options` are those of `from_pretrained`."""
        dtype = options.pop("torch_dtype", options.pop("dtype", None)) or torch.float32
        given = {name: options.pop(name, None) for name in ("vae", "scheduler", *_TEXT_PARTS)}
        if options:
            what = f"is a published network, which does not take the options {', '.join(options)}"
            hint = f"make a pipeline folder of it: hdm-convert {shlex.quote(str(path))} FOLDER"
            raise UserError(what, where=str(path), hint=hint)
        release = read_release(path)
        text, tokenizer = given["text_encoder"], given["tokenizer"]
        source = text_encoder_of(release, path, named=None if text is None else _PASSED)
        if text is None:
            text = _referred(source, {"torch_dtype": dtype})
            tokenizer = tokenizer or Tokenizer(source.name, where="text_encoder").transformers
        solving, sampling = split_sampling(release.settings.get("sampling") or SAMPLING)
        kind: Any = cls
        pipeline: Any = kind(
            release.network.float().eval(),
            given["vae"] or autoencoder_of(release, path),
            given["scheduler"] or FlowScheduler(**solving),
            text,
            tokenizer,
            text_encoder_name=None if given["text_encoder"] is not None else source.name,
            text_encoder_layer=source.layer,
            context_length=source.context_length,
            sampling=sampling,
        )
        return pipeline.to(dtype)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *arguments: Any,
        include_text_encoder: bool | None = None,
        **options: Any,
    ) -> None:
        """Save the pipeline as a folder: each file atomically, with the umask's permissions, model_index.json last.

        Args:
            save_directory: created if missing; files of the same names are replaced.
            arguments, options: those of diffusers.
            include_text_encoder: whether to save the text encoder, too; None saves it unless it can be loaded again
                by its hub or package name.

        Raises:
            UserError: the network has adapters loaded.
        """
        self.require_no_adapters("save_pretrained")
        folder, name = Path(save_directory), self.config.text_encoder_name
        if include_text_encoder is None:
            include_text_encoder = not (name and (name.startswith(PACKAGE_SCHEME) or not is_local_path(name)))
        if isinstance(self.tokenizer, Tokenizer):
            self.tokenizer = self.tokenizer.transformers
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".") as inside:
            with self._with_text_encoder(include_text_encoder):
                super().save_pretrained(inside, *arguments, **options)
            forget_places(Path(inside))
            write_text(Path(inside) / CARD, self._card(include_text_encoder, folder))
            move_in(Path(inside), folder, last=INDEX)

    def enable_model_cpu_offload(self, *arguments: Any, **options: Any) -> None:
        """Keep each component on the GPU only while it computes, as in diffusers.

        Raises:
            UserError: the package accelerate is missing.
        """
        _require_accelerate("enable_model_cpu_offload")
        super().enable_model_cpu_offload(*arguments, **options)

    def enable_sequential_cpu_offload(self, *arguments: Any, **options: Any) -> None:
        """Keep each layer on the GPU only while it computes, as in diffusers.

        Raises:
            UserError: the package accelerate is missing.
        """
        _require_accelerate("enable_sequential_cpu_offload")
        super().enable_sequential_cpu_offload(*arguments, **options)

    def enable_vae_tiling(self) -> None:
        """Encode and decode large images in tiles, which takes less memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode whole images again."""
        self.vae.disable_tiling()

    @contextmanager
    def _with_text_encoder(self, included: bool) -> Iterator[None]:
        """Inside the with statement, list text encoder and tokenizer in the configuration only if they are included.

        A path on this machine is never listed: an included encoder is found in the folder.
        """
        named = {part: self.config[part] for part in (*_TEXT_PARTS, "text_encoder_name")}
        if not included:
            self.register_to_config(**dict.fromkeys(_TEXT_PARTS, (None, None)))
        elif named["text_encoder_name"] and is_local_path(named["text_encoder_name"]):
            self.register_to_config(text_encoder_name=None)
        try:
            yield
        finally:
            self.register_to_config(**named)

    def _upload_folder(self, working_dir: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
        """Replace diffusers' template of a model card with ours, right before the folder is uploaded."""
        folder = Path(working_dir)
        write_text(folder / CARD, self._card((folder / TEXT_ENCODER).is_dir(), folder))
        return super()._upload_folder(working_dir, *arguments, **options)

    def _card(self, included: bool, folder: Path) -> str:
        config = self.config
        text = {"layer": config.text_encoder_layer, "context_length": config.context_length}
        named = {"name": config.text_encoder_name, **text} if config.text_encoder_name else None
        return model_card(
            dict(self.transformer.config), named, config.training, inside=included, sampled=(folder / SAMPLES).is_file()
        )


def _released(path: Path, name: str, hub: dict[str, Any]) -> Path | None:
    """Return the published file or folder that a path or hub name refers to, None if it refers to anything else."""
    found, note = located(path, name, where="model", **hub)
    if not is_published(found) or (note is not None and is_adapter(found)):
        return None
    if note is not None:
        warnings.warn(note, stacklevel=3)
    return found


def _check_parts(folder: Path, given: dict[str, Any]) -> None:
    """Raise UserError unless a folder's components, except those passed in Python, are of known classes."""
    path = folder / INDEX
    index = read_object(path, hint="use a run's final/ folder")
    if index.get("_class_name") != PIPELINE_CLASS:
        raise UserError("does not describe an HDMPipeline", where=str(path), hint="use a run's final/ folder")
    for part in (*_KNOWN, *_TEXT_PARTS):
        named = index.get(part) or []
        if not isinstance(named, list):
            fits = False
        elif part in _KNOWN:
            fits = part in given or named == _KNOWN[part]
        else:
            fits = part in given or not named or named[0] in (None, "transformers")
        if not fits:
            raise UserError(f"names {index.get(part)!r} as {part}", where=str(path), hint=f"pass your own with {part}=")


def _referred(source: TextEncoderSource, options: dict[str, Any]) -> Any:
    """Load the text encoder that a folder names, in the dtype of the other components."""
    dtype = options.get("torch_dtype", options.get("dtype"))
    if isinstance(dtype, dict):
        dtype = dtype.get("text_encoder", dtype.get("default"))
    model = read_text_model(source.name, dtype or torch.float32, where="text_encoder")
    return cut_after(model, source.layer, where="text_encoder")


def _require_accelerate(what: str) -> None:
    if not is_accelerate_available():
        raise UserError("needs the package accelerate", where=what, hint="pip install 'hdm-lightning[offload]'")


def save_final(
    folder: Path,
    averaged_state: Mapping[str, Tensor],
    *,
    xut: XUTConfig,
    text_encoder: TextEncoderSource,
    autoencoder: ImageAutoencoder,
    raw_state: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    include_text_encoder: bool = False,
) -> PipelineFolder:
    """Write a `final/` folder; model_index.json comes last, so a folder that has one is complete.

    Args:
        averaged_state: state dict of the network, with averaged weights if there are any.
        autoencoder: saved in `vae/`, with its normalization.
        raw_state: the last weights, if they are to be saved next to the averaged ones.
        include_text_encoder: whether to save the text encoder, too; otherwise it is loaded by its name.
        folder, xut, text_encoder, training, sampling: as for `write_pipeline_folder`.
    """
    weights: dict[Weights, Mapping[str, Tensor]] = {"ema": averaged_state}
    if raw_state is not None:
        weights["raw"] = raw_state
    write_pipeline_folder(
        folder,
        weights,
        xut=xut,
        text_encoder=text_encoder,
        write_vae=autoencoder.save,
        write_text_encoder=(lambda place: _write_text_encoder(place, text_encoder)) if include_text_encoder else None,
        training=training,
        sampling=sampling,
    )
    return read_pipeline_folder(folder)


def _write_text_encoder(folder: Path, source: TextEncoderSource) -> dict[str, list[str]]:
    """Write the text encoder, without its unused blocks, and its tokenizer, each to its own subfolder.

    Returns:
        Library and class of each.
    """
    model: Any = cut_after(read_text_model(source.name, torch.float32, where="text_encoder"), source.layer)
    parts = {TEXT_ENCODER: model, TOKENIZER: Tokenizer(source.name, where="text_encoder").transformers}
    for name, part in parts.items():
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".") as inside:
            part.save_pretrained(inside)
            forget_places(Path(inside))
            move_in(Path(inside), folder / name, last="config.json")
    return {name: ["transformers", type(part).__name__] for name, part in parts.items()}
