"""Which models and adapters lie in ComfyUI's folders, and where a choice or a path leads."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import folder_paths

from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_files import is_adapter
from hdm_lightning.interop.layouts import FINAL_FOLDER
from hdm_lightning.interop.pipeline_folder import is_pipeline_folder

OWN_FOLDER = "hdm"
"""Of ComfyUI's models folder; it takes links to runs as well."""
MODEL_FOLDERS, ADAPTER_FOLDERS = (OWN_FOLDER, "checkpoints", "diffusion_models", "diffusers"), ("loras", OWN_FOLDER)
TEXT_ENCODER_FOLDERS = ("text_encoders", OWN_FOLDER)
BY_PATH = "(by path)"
"""The choice that leaves the word to the path."""
SUFFIXES = (".safetensors", ".ckpt")
DEEPEST = 3
"""Levels of folders below one of ComfyUI's that are looked through."""


def register() -> None:
    """Have ComfyUI know the folder of its own that these models have."""
    folder_paths.add_model_folder_path(OWN_FOLDER, str(Path(folder_paths.models_dir) / OWN_FOLDER))


def models() -> list[str]:
    """What may be chosen as a model: files, runs and pipelines' folders."""
    return [BY_PATH, *_names(MODEL_FOLDERS, is_model_folder)]


def adapters() -> list[str]:
    """What may be chosen as a LoRA: files, and folders of peft and of runs."""
    return [BY_PATH, *_names(ADAPTER_FOLDERS, is_adapter)]


def is_model_folder(folder: Path) -> bool:
    """Whether a folder is a run's or a pipeline's."""
    return any(is_pipeline_folder(place) for place in (folder, folder / FINAL_FOLDER))


def chosen(name: str, path: str, folders: Sequence[str]) -> Path:
    """Where a choice leads; a path, if one is given, goes before it.

    Raises:
        UserError: neither is given, or there is nothing.
    """
    if path.strip():
        found = Path(path.strip()).expanduser()
        if not found.exists():
            raise UserError("there is no such file or folder", where=str(found), hint="give the whole path of one")
        return found
    if name == BY_PATH:
        where = " or ".join(f"models/{folder}" for folder in folders[:2])
        raise UserError("neither a name nor a path is given", where="name", hint=f"put the file or folder into {where}")
    places = [root / name for root in _roots(folders)]
    found_at = next((place for place in places if place.exists()), None)
    if found_at is None:
        hint = "refresh the page of ComfyUI, or put the file back"
        raise UserError("is in none of ComfyUI's folders any more", where=name, hint=hint)
    return found_at


def text_encoder_folder(name: str) -> str | None:
    """The folder of that name among ComfyUI's text encoders, else the name itself; None if it is empty."""
    name = name.strip()
    places = [root / name for root in _roots(TEXT_ENCODER_FOLDERS)] if name else []
    return next((str(place) for place in places if (place / "config.json").is_file()), name or None)


def changed_at(name: str, path: str, folders: Sequence[str]) -> float:
    """When what a choice leads to was last written, so that ComfyUI reads it anew; 0 where it leads nowhere."""
    try:
        found = chosen(name, path, folders)
    except UserError:
        return 0.0
    inside = [found, *found.glob("*.json"), *found.glob("final/*.json")] if found.is_dir() else [found]
    return max(each.stat().st_mtime for each in inside)


def _roots(folders: Sequence[str]) -> list[Path]:
    known = [folder for folder in folders if folder in folder_paths.folder_names_and_paths]
    return [Path(root) for folder in known for root in folder_paths.get_folder_paths(folder)]


def _names(folders: Sequence[str], is_one: Callable[[Path], bool]) -> list[str]:
    found = {name for root in _roots(folders) for name in _below(root, root, is_one, DEEPEST)}
    return sorted(found)


def _below(root: Path, folder: Path, is_one: Callable[[Path], bool], levels: int) -> Iterator[str]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        path = Path(entry.path)
        if (entry.is_file() and path.suffix in SUFFIXES) or (entry.is_dir() and is_one(path)):
            yield str(path.relative_to(root))
        elif entry.is_dir() and levels:
            yield from _below(root, path, is_one, levels - 1)
