"""Models of the hub, of this project's layout or published otherwise, and what their cards say of their licence."""

import re
from pathlib import Path
from typing import Any

import yaml

from hdm_lightning.encoders.pretrained import locate_model
from hdm_lightning.encoders.vae_folder import WEIGHTS
from hdm_lightning.errors import UserError
from hdm_lightning.generation.pipeline_adapters import DOWNLOAD as ADAPTER_DOWNLOAD
from hdm_lightning.generation.stored_pipeline import DOWNLOAD
from hdm_lightning.interop.adapter_files import CONFIG as ADAPTER
from hdm_lightning.interop.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from hdm_lightning.interop.layouts import UNET_FOLDER
from hdm_lightning.interop.pipeline_folder import CARD, INDEX
from hdm_lightning.json_files import require_shallow

_UNET = f"{UNET_FOLDER}/{WEIGHTS}.safetensors"
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


def hub_model(name: str, *, where: str = "MODEL") -> Path:
    """The folder or file of a model of the hub, or of a LoRA, downloaded at most once.

    Args:
        name: OWNER/NAME, or OWNER/NAME/FILE.safetensors of a repository with several files.
        where: names the argument in errors.

    Raises:
        UserError: there is no such model, it cannot be had, or the repository has several.
    """
    parts = name.split("/")
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    if file.endswith(".safetensors"):
        return _file(repository, file, where)
    try:
        return locate_model(name, where=where, required=[INDEX], download=DOWNLOAD)
    except UserError as error:
        files = _listed(repository)
        if file or not files or INDEX in files:
            raise
        lacking = error
    if ADAPTER in files:
        return locate_model(name, where=where, required=[ADAPTER, ADAPTER_WEIGHTS], download=ADAPTER_DOWNLOAD)
    if _UNET in files:
        return locate_model(name, where=where, required=[_UNET], download=DOWNLOAD)
    single = [each for each in files if each.endswith(".safetensors") and "/" not in each]
    if not single:
        raise UserError(f"{name} holds neither {INDEX} nor a .safetensors file", where=where) from lacking
    if len(single) > 1:
        choice = " or ".join(f"{name}/{each}" for each in single[:3])
        raise UserError(f"{name} has {len(single)} files of weights", where=where, hint=f"name one: {choice}")
    return _file(repository, single[0], where)


def licence_note(path: Path, name: str) -> str:
    """What the card beside a downloaded model says of its licence."""
    folder = path if path.is_dir() else path.parent
    try:
        front = _FRONT.match((folder / CARD).read_text(encoding="utf-8"))
        if front:
            require_shallow(front[1])
        card: Any = yaml.safe_load(front[1]) if front else {}
        told = card.get("license_name") or card.get("license")
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        told = None
    if not isinstance(told, str):
        return f"{name} does not say under which license it is: ask its owner before images of it are used"
    return f"{name} is under {told}, by its card; it binds what may be done with the model and perhaps with its images"


def _file(repository: str, file: str, where: str) -> Path:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  (slow import, not needed for local models)

    _card(repository)
    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub client raises its own errors, its HTTP library's and OSError alike
        what = (
            f"{repository}/{file} could not be had ({type(error).__name__}: {str(error).strip().splitlines()[0][:120]})"
        )
        raise UserError(what, where=where, hint=f"download it by hand, hf download {repository} {file}") from error


def _card(repository: str) -> None:
    """Have the card beside the file, if there is one."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  (as above)

    try:
        hf_hub_download(repository, CARD)
    except Exception:  # without a card the note says so
        return


def _listed(repository: str) -> list[str]:
    """The files of a repository; none where the hub does not say."""
    from huggingface_hub import HfApi  # noqa: PLC0415  (as above)

    try:
        return list(HfApi().list_repo_files(repository))
    except Exception:  # whoever asked has an error of its own to tell
        return []
