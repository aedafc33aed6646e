"""Models on the hub, published ones among them: download, license, and the encoders that they contain or name."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.encoders.autoencoder import autoencoder_from_tensors, load_autoencoder
from hdm_lightning.encoders.base import ImageAutoencoder
from hdm_lightning.encoders.pretrained import TextEncoderSource, is_local_path, locate_model
from hdm_lightning.encoders.vae_folder import VAE_FOLDER, WEIGHTS
from hdm_lightning.errors import UserError, first_line
from hdm_lightning.generation.pipeline_adapters import DOWNLOAD as ADAPTER_DOWNLOAD
from hdm_lightning.interop import published
from hdm_lightning.interop.adapter_files import CONFIG as ADAPTER
from hdm_lightning.interop.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from hdm_lightning.interop.adapter_files import is_adapter
from hdm_lightning.interop.layouts import UNET_FOLDER
from hdm_lightning.interop.model_card import CARD, OTHER, card_license
from hdm_lightning.interop.pipeline_folder import DOWNLOAD, INDEX
from hdm_lightning.interop.release import Release
from hdm_lightning.json_files import AGAIN
from hdm_lightning.models import XUTConfig

_UNET = f"{UNET_FOLDER}/{WEIGHTS}.safetensors"
_NON_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial", re.IGNORECASE)
_NO_COMMERCE = ", and forbids commercial use"
_RELEASED = "the HDM weights that were released in this layout are under CC-BY-NC-SA-4.0, which forbids commercial use"


def located(path: Path, name: str, *, where: str = "MODEL", **hub: Any) -> tuple[Path, str | None]:
    """Return a path as it is, or the download of a hub name with a note about its license; `hub` as for `hub_model`."""
    if path.exists() or "/" not in name or is_local_path(name):
        return path, None
    found = hub_model(name, where=where, **hub)
    return found, license_note(found, name, published=is_published(found) and not is_adapter(found))


def hub_model(name: str, *, where: str, **hub: Any) -> Path:
    """Download a model or a LoRA from the hub, at most once, and return its folder or file.

    Args:
        name: OWNER/NAME, or OWNER/NAME/FILE.safetensors of a repository with several files.
        where: names the argument in errors.
        hub: further options of `huggingface_hub.snapshot_download`, such as `revision`.

    Raises:
        UserError: there is no such model, it cannot be downloaded, or the repository has several.
    """
    parts = name.split("/")
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    if file.endswith(".safetensors"):
        return _file(repository, file, where, hub)
    try:
        return locate_model(name, where=where, required=[INDEX], download=DOWNLOAD, **hub)
    except UserError as error:
        files = _listed(repository, hub)
        if file or not files or INDEX in files:
            raise
        lacking = error
    if ADAPTER in files:
        return locate_model(name, where=where, required=[ADAPTER, ADAPTER_WEIGHTS], download=ADAPTER_DOWNLOAD, **hub)
    if _UNET in files:
        return locate_model(name, where=where, required=[_UNET], download=DOWNLOAD, **hub)
    single = [each for each in files if each.endswith(".safetensors") and "/" not in each]
    if not single:
        what = f"{name} contains neither {INDEX} nor a .safetensors file"
        raise UserError(what, where=where, hint="name a repository with a trained model") from lacking
    if len(single) > 1:
        choice = " or ".join(f"{name}/{each}" for each in single[:3])
        raise UserError(f"{name} has {len(single)} weights files", where=where, hint=f"name one: {choice}")
    return _file(repository, single[0], where, hub)


def license_note(path: Path, name: str, *, published: bool = False) -> str:
    """Return what the card of a downloaded model says about its license.

    Args:
        path: the downloaded file or folder.
        name: its name on the hub.
        published: whether it has the layout of the released HDM weights; their license is then mentioned, too.
    """
    folder = path if path.is_dir() else path.parent
    told = card_license(folder / CARD)
    released = f"; {_RELEASED}" if published else ""
    if told is None:
        return f"{name} does not state a license: ask its owner before you use its images{released}"
    told = told.removeprefix(OTHER)
    kept = f"{name} is under {told}, according to its card; it applies to the model and perhaps to its images"
    return kept + (_NO_COMMERCE if _NON_COMMERCIAL.search(told) else "")


def _file(repository: str, file: str, where: str, hub: Mapping[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  (slow import, not needed for local models)

    hub = {key: value for key, value in hub.items() if key != "proxies"}
    with suppress(Exception):  # without a card, the note says that no license is stated
        hf_hub_download(repository, CARD, **hub)
    try:
        return Path(hf_hub_download(repository, file, **hub))
    except Exception as error:  # the hub client raises its own errors, its HTTP library's and OSError alike
        what = f"{repository}/{file} could not be downloaded ({type(error).__name__}: {first_line(error, 120)})"
        raise UserError(what, where=where, hint=f"download it by hand: hf download {repository} {file}") from error


def _listed(repository: str, hub: Mapping[str, Any]) -> list[str]:
    """List the files of a repository; empty if the hub does not answer."""
    from huggingface_hub import HfApi  # noqa: PLC0415  (as above)

    try:
        return list(HfApi(token=hub.get("token")).list_repo_files(repository, revision=hub.get("revision")))
    except Exception:  # the caller raises its own error
        return []


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
