"""The layouts of a trained network on disk: detect the layout of a path, read any of them, write another.

Shapes: C latent channels.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.encoders.pretrained import TextEncoderSource
from hdm_lightning.encoders.vae_folder import VAE_FOLDER, WEIGHTS, infer_config
from hdm_lightning.errors import UserError, first_line
from hdm_lightning.interop import published
from hdm_lightning.interop.model_card import CARD, card_license, recorded_license
from hdm_lightning.interop.network_copies import one_network
from hdm_lightning.interop.pipeline_folder import (
    TEXT_ENCODER,
    TRANSFORMER,
    Weights,
    holding,
    is_pipeline_folder,
    read_pipeline_folder,
    refuse_unfinished,
    write_pipeline_folder,
)
from hdm_lightning.interop.release import Release, release_from_tensors, release_to_tensors
from hdm_lightning.interop.single_file import SUFFIX, XUT_KEY, release_from_single, release_to_single
from hdm_lightning.interop.tensor_files import read_sharded, read_tensors, safetensors_header, write_tensors
from hdm_lightning.json_files import AGAIN, parse_object, read_object
from hdm_lightning.models import XUTConfig
from hdm_lightning.whole_files import write_json

FINAL_FOLDER, UNET_FOLDER = "final", "unet"
OUR_SENTINEL = "patch_embedding.weight"
"""A tensor name that this project's state dicts have and published ones do not."""
TRAINING_SENTINEL = "network." + OUR_SENTINEL
"""The same in a training checkpoint."""
_SETTINGS_KEY = "hdm_lightning"
"""Key in a safetensors file's metadata under which this project stores what the layout cannot record."""
_VAE_CONFIG_KEY = "vae_config"
_PUBLISHED_TEXT = "published_text_encoder"
"""Subfolder of a pipeline folder for the text encoder of a published file, which transformers cannot read."""
_DIFFUSERS_PREFIX = "model."
_ANOTHER = (
    "use a file or folder of a network written by this project, by the paper's authors or by one of their converters"
)


def detect_layout(path: Path) -> str:
    """Return the name of the layout that `read_release` reads a path as. Raises UserError: the path does not exist."""
    for name, fits, _ in _LAYOUTS:
        if fits(path):
            return name
    hint = "name a run's folder, a model's folder or a weights file"
    raise UserError("there is no such file or folder", where=str(path), hint=hint)


def read_release(path: Path, copy: str | None = None) -> Release:
    """Read a trained network with its other parts from any layout.

    Args:
        path: file or folder.
        copy: prefix of the network to read from a file that contains it more than once.

    Raises:
        UserError: the path does not exist or contains no XUT; the message lists what differs.
    """
    layout = detect_layout(path)
    read = next(read for name, _, read in _LAYOUTS if name == layout)
    if copy is not None and read is not _read_file:
        what = f"is a {layout}, which has only one network"
        raise UserError(what, where=str(path), hint="leave --copy out, or name the file to read in it")
    release = read(path) if copy is None else _read_file(path, copy)
    training = release.settings.get("training") or {}
    if recorded_license(training) is not None or (license := stated_license(path)) is None:
        return release
    return replace(release, settings={**release.settings, "training": {**training, "license": license}})


def stated_license(path: Path) -> str | None:
    """Return the license of a model: from a weights file's metadata, else from the card next to the weights.

    The card may also be in the parent of a weights subfolder, or in a run's final/.

    Raises:
        UserError: the file's metadata is broken.
    """
    file = path / UNET_FOLDER / f"{WEIGHTS}{SUFFIX}" if path.is_dir() else path
    if file.is_file() and (own := recorded_license(_settings(file).get("training") or {})) is not None:
        return own
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    if folder.name in (TRANSFORMER, UNET_FOLDER):
        folders = [folder, folder.parent]
    else:
        folders = [folder, folder / FINAL_FOLDER] if path.is_dir() else [folder]
    return next((license for each in folders if (license := card_license(each / CARD))), None)


def _read_folder(folder: Path, weights: Weights = "ema") -> Release:
    """Read the release in a pipeline folder."""
    found = read_pipeline_folder(folder)
    text = read_sharded(folder / (TEXT_ENCODER if found.old else _PUBLISHED_TEXT), "model")
    settings: dict[str, Any] = {"training": dict(found.training), "sampling": dict(found.sampling)}
    if found.text_encoder is not None:
        settings["text_encoder"] = asdict(found.text_encoder)
    vae = read_vae_folder(found.vae)
    return Release(found.load_network(weights), **vae, text_encoder=text or {}, settings=settings)


def _read_weights_in_folder(path: Path) -> Release:
    place = holding(path)
    assert place is not None
    return _read_folder(*place)


def _read_file(path: Path, copy: str | None = None) -> Release:
    """Read a single file, .safetensors or .ckpt: for any wiring, or a published one, with any known prefix."""
    settings = _settings(path)
    found = read_tensors(path, every=copy is not None)
    tensors, copies = one_network(published.unwrapped(found), copy, where=str(path))
    vae_config = _mapping(settings.pop(_VAE_CONFIG_KEY, None), path)
    try:
        if XUT_KEY in settings:
            return replace(release_from_single(tensors, settings), vae_config=vae_config, copies=copies)
        _require_no_training_checkpoint(tensors, path)
        return replace(release_from_tensors(tensors, settings), vae_config=vae_config, copies=copies)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error), where=str(path), hint=_ANOTHER) from error


def _require_no_training_checkpoint(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError for weights in this project's naming that lack their configuration."""
    if TRAINING_SENTINEL not in tensors and any(name.endswith(OUR_SENTINEL) for name in tensors):
        raise UserError(
            "has weights of this project without their configuration",
            where=str(path),
            hint="put it back into its folder, or use the folder",
        )
    if TRAINING_SENTINEL in tensors:
        raise UserError(
            "is a training checkpoint of this project, whose configuration is in its run's folder",
            where=str(path),
            hint="use the run's folder: its final/ is written when the last stage ends (or init=RUN in training)",
        )


def _read_diffusers(folder: Path) -> Release:
    """Read the release in a published diffusers folder, or in its network's subfolder alone.

    The network's shape is inferred from its tensors, in any subfolder.
    """
    refuse_unfinished(folder, where="source")
    for place in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        tensors = read_sharded(place, WEIGHTS)
        try:
            if tensors is None or published.find_prefix(tensors) is None:
                continue
            found = release_from_tensors(tensors)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error), where=str(place), hint=_ANOTHER) from error
        vae = read_vae_folder(folder / VAE_FOLDER)
        return replace(found, **vae) if vae["vae"] else found
    raise UserError(
        f"neither the folder nor a subfolder has a {WEIGHTS} file with an XUT in it",
        where=str(folder),
        hint="use the folder that contains the network, a run's final/ folder, or a single file",
    )


_LAYOUTS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path], Release]], ...] = (
    ("project folder", is_pipeline_folder, _read_folder),
    (
        "run folder",
        lambda path: is_pipeline_folder(path / FINAL_FOLDER),
        lambda path: _read_folder(path / FINAL_FOLDER),
    ),
    ("weights of a project folder", lambda path: _is_ours(path), _read_weights_in_folder),
    ("single file", lambda path: stated_config(path) is not None, _read_file),
    ("published file", Path.is_file, _read_file),
    ("diffusers folder", Path.is_dir, _read_diffusers),
)


def with_vae(release: Release, folder: Path) -> Release:
    """Return the release with the autoencoder of a diffusers folder. Raises UserError: the folder has none."""
    vae = read_vae_folder(folder)
    if not vae["vae"]:
        raise UserError("contains no diffusers autoencoder", where=str(folder), hint="use the folder of its weights")
    return replace(release, **vae)


def write_project(path: Path, release: Release, text_encoder: str | None = None) -> None:
    """Write a pipeline folder, which is ready for use if the release has an autoencoder.

    `text_encoder` is the name to record instead of the release's own; layer and context length stay. Raises
    UserError: no name is known.
    """
    release = _with_vae_config(release)
    recorded = release.settings.get("text_encoder") or {"context_length": published.CONTEXT_LENGTH}
    name = text_encoder or recorded.get("name") or published.text_encoder_name(release.network.config, where=str(path))
    write_pipeline_folder(
        path,
        {"ema": release.network.state_dict()},
        xut=release.network.config,
        text_encoder=TextEncoderSource(**{**recorded, "name": name}),
        write_vae=(lambda folder: write_vae_folder(folder, release)) if release.vae else None,
        training=release.settings.get("training"),
        sampling=release.settings.get("sampling", published.SAMPLING),
    )
    if release.text_encoder:
        write_tensors(path / _PUBLISHED_TEXT / "model.safetensors", release.text_encoder)


def write_published(path: Path, release: Release) -> None:
    """Write the published single file. Raises ValueError: the wiring is not the published one."""
    write_tensors(path, release_to_tensors(release), _metadata(release))


def write_single(path: Path, release: Release) -> None:
    """Write one .safetensors file for any wiring; see `interop.single_file`. Raises UserError: another suffix."""
    if path.suffix != SUFFIX:
        what = f"ends in {path.suffix!r}, but only {SUFFIX} can record the wiring"
        raise UserError(what, where=str(path), hint=f"end the name in {SUFFIX}")
    tensors, settings = release_to_single(release)
    write_tensors(path, tensors, _metadata(replace(release, settings=settings)))


def write_comfyui(path: Path, release: Release) -> None:
    """Write the single file for ComfyUI: network and autoencoder, without the text encoder.

    With the published wiring it is the published file, which HDM-ext reads, too; otherwise that of `write_single`,
    which only the nodes of this project read.

    Raises:
        ValueError: the autoencoder or its normalization is missing.
    """
    parts = {"vae": release.vae or None, "vae_mean": release.vae_mean, "vae_std": release.vae_std}
    if lacking := [name for name, value in parts.items() if value is None]:
        raise ValueError(f"the loader expects the autoencoder in the file, but {', '.join(lacking)} is missing")
    write = write_published if release.network.config.is_published_wiring else write_single
    write(path, replace(release, text_encoder={}))


def write_diffusers(path: Path, release: Release) -> None:
    """Write network and autoencoder as the published diffusers folder, whose unet/ no diffusers class reads.

    Raises:
        ValueError: the wiring is not the published one.
    """
    config = published.config_to_json(release.network.config)
    release = _with_vae_config(release)
    tensors = {_DIFFUSERS_PREFIX + n: t for n, t in published.export_state_dict(release.network).items()}
    write_tensors(path / UNET_FOLDER / f"{WEIGHTS}.safetensors", tensors, _metadata(release))
    write_json(path / UNET_FOLDER / "config.json", config)
    if release.vae:
        write_vae_folder(path / VAE_FOLDER, release)


def write_bare(path: Path, release: Release) -> None:
    """Write the network alone, under the published names. Raises ValueError: the wiring is not the published one."""
    published.require_published_wiring(release.network.config)
    write_tensors(path, published.export_state_dict(release.network), _metadata(release))


def read_vae_folder(folder: Path) -> dict[str, Any]:
    """Read the `Release` fields of an AutoencoderKL's folder; the normalization has the dtype of the tensors."""
    tensors = read_sharded(folder, WEIGHTS)
    if tensors is None:
        return {"vae": {}, "vae_config": None, "vae_mean": None, "vae_std": None}
    file = folder / "config.json"
    config = read_object(file) if file.is_file() else {}
    dtype = next(iter(tensors.values())).dtype
    mean, std = (_statistic(config.get(key), dtype, file) for key in ("latents_mean", "latents_std"))
    return {"vae": tensors, "vae_config": config or None, "vae_mean": mean, "vae_std": std}


def _statistic(values: Any, dtype: torch.dtype, file: Path) -> Tensor | None:
    try:
        return None if values is None else torch.tensor(values, dtype=torch.float64).to(dtype).view(1, -1, 1, 1)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"latents_mean and latents_std must be lists of numbers ({first_line(error)})"
        raise UserError(what, where=str(file), hint=AGAIN) from error


def write_vae_folder(folder: Path, release: Release) -> None:
    """Write a folder for `read_vae_folder` and for diffusers' ``AutoencoderKL.from_pretrained``.

    Mean and standard deviation are the whole normalization, so the scaling factor, which diffusers applies on top of
    them, becomes 1.
    """
    assert release.vae_config is not None
    written = {"_class_name": "AutoencoderKL", **release.vae_config}
    for key, value in (("latents_mean", release.vae_mean), ("latents_std", release.vae_std)):
        if value is not None:
            written[key] = value.double().flatten().tolist()
    if release.vae_mean is not None and release.vae_std is not None:
        written |= {"scaling_factor": 1.0, "shift_factor": None}
    write_tensors(folder / f"{WEIGHTS}.safetensors", release.vae)
    write_json(folder / "config.json", written)


def _with_vae_config(release: Release) -> Release:
    if not release.vae or release.vae_config is not None:
        return release
    return replace(release, vae_config=infer_config(release.vae))


def _metadata(release: Release) -> dict[str, str]:
    """Return the metadata with what the layout cannot record, so it survives a round trip."""
    kept: Mapping[str, Any] = {**release.settings, _VAE_CONFIG_KEY: release.vae_config}
    kept = {key: value for key, value in kept.items() if value}
    return {_SETTINGS_KEY: json.dumps(kept)} if kept else {}


def stated_config(path: Path) -> XUTConfig | None:
    """Return the network's configuration stated in a single file; None for any other path.

    Raises:
        UserError: it states an invalid configuration.
    """
    found = _settings(path).get(XUT_KEY) if path.is_file() else None
    if found is None:
        return None
    try:
        return XUTConfig.from_json(found)
    except (TypeError, ValueError) as error:
        raise UserError(f"does not describe a network: {error}", where=str(path), hint=AGAIN) from error


def _settings(path: Path) -> dict[str, Any]:
    """Read what `_metadata` left in a file."""
    written = safetensors_header(path)[0].get(_SETTINGS_KEY)
    try:
        settings = parse_object(written) if written is not None else {}
    except ValueError as error:
        raise UserError(f"has broken metadata {_SETTINGS_KEY} ({error})", where=str(path), hint=AGAIN) from error
    for key in ("training", "sampling", "text_encoder", XUT_KEY):
        _mapping(settings.get(key), path)
    return settings


def _mapping(value: Any, path: Path) -> dict[str, Any] | None:
    """Return a value of the metadata, which must be an object or None."""
    if value is not None and not isinstance(value, dict):
        what = f"has broken metadata {_SETTINGS_KEY} (expected an object, got {type(value).__name__})"
        raise UserError(what, where=str(path), hint=AGAIN)
    return value


def _is_ours(path: Path) -> bool:
    """Return whether a file contains tensors in this project's naming, next to their configuration."""
    return holding(path) is not None and not {OUR_SENTINEL, TRAINING_SENTINEL}.isdisjoint(safetensors_header(path)[1])
