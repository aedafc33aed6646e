"""Models of the hub, of this project's layout or published otherwise, and what their cards say of their license."""

import re
from collections.abc import Mapping
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
    """The folder or file of a model of the hub, or of a LoRA, downloaded at most once.

    Args:
        name: OWNER/NAME, or OWNER/NAME/FILE.safetensors of a repository with several files.
        where: names the argument in errors.
        hub: further options of `huggingface_hub.snapshot_download`, such as `revision`.

    Raises:
        UserError: there is no such model, it cannot be had, or the repository has several.
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
        raise UserError(f"{name} holds neither {INDEX} nor a .safetensors file", where=where) from lacking
    if len(single) > 1:
        choice = " or ".join(f"{name}/{each}" for each in single[:3])
        raise UserError(f"{name} has {len(single)} files of weights", where=where, hint=f"name one: {choice}")
    return _file(repository, single[0], where, hub)


def license_note(path: Path, name: str, *, published: bool = False) -> str:
    """What the card beside a downloaded model says of its license.

    Args:
        path: where it lies.
        name: on the hub.
        published: whether it has the layout of the released HDM weights, whose license is then named, too.
    """
    folder = path if path.is_dir() else path.parent
    told = card_license(folder / CARD)
    released = f"; {_RELEASED}" if published else ""
    if told is None:
        return f"{name} does not say under which license it is: ask its owner before images of it are used{released}"
    told = told.removeprefix(OTHER)
    kept = f"{name} is under {told}, by its card; it binds what may be done with the model and perhaps with its images"
    return kept + (_NO_COMMERCE if _NON_COMMERCIAL.search(told) else "")


def _file(repository: str, file: str, where: str, hub: Mapping[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  (slow import, not needed for local models)

    hub = {key: value for key, value in hub.items() if key != "proxies"}
    _card(repository, hub)
    try:
        return Path(hf_hub_download(repository, file, **hub))
    except Exception as error:  # the hub client raises its own errors, its HTTP library's and OSError alike
        what = f"{repository}/{file} could not be had ({type(error).__name__}: {first_line(error, 120)})"
        raise UserError(what, where=where, hint=f"download it by hand, hf download {repository} {file}") from error


def _card(repository: str, hub: Mapping[str, Any]) -> None:
    """Have the card beside the file, if there is one."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  (as above)

    try:
        hf_hub_download(repository, CARD, **hub)
    except Exception:  # without a card the note says so
        return


def _listed(repository: str, hub: Mapping[str, Any]) -> list[str]:
    """The files of a repository; none where the hub does not say."""
    from huggingface_hub import HfApi  # noqa: PLC0415  (as above)

    try:
        return list(HfApi(token=hub.get("token")).list_repo_files(repository, revision=hub.get("revision")))
    except Exception:  # whoever asked has an error of its own to tell
        return []
