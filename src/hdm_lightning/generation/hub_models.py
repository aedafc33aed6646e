"""Models on the hub, in this project's layout or the published one, and the licenses that their cards state."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hdm_lightning.encoders.pretrained import locate_model
from hdm_lightning.encoders.vae_folder import WEIGHTS
from hdm_lightning.errors import UserError, first_line
from hdm_lightning.generation.pipeline_adapters import DOWNLOAD as ADAPTER_DOWNLOAD
from hdm_lightning.interop.adapter_files import CONFIG as ADAPTER
from hdm_lightning.interop.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from hdm_lightning.interop.layouts import UNET_FOLDER
from hdm_lightning.interop.model_card import CARD, OTHER, card_license
from hdm_lightning.interop.pipeline_folder import DOWNLOAD, INDEX

_UNET = f"{UNET_FOLDER}/{WEIGHTS}.safetensors"
_NON_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial", re.IGNORECASE)
_NO_COMMERCE = ", and forbids commercial use"
_RELEASED = "the HDM weights that were released in this layout are under CC-BY-NC-SA-4.0, which forbids commercial use"


def hub_model(name: str, *, where: str = "MODEL", **hub: Any) -> Path:
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
