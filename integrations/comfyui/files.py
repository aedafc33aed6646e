"""List the models and adapters in ComfyUI's folders, and resolve a choice or a path to one."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import folder_paths

from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_files import is_adapter
from hdm_lightning.interop.layouts import FINAL_FOLDER
from hdm_lightning.interop.pipeline_folder import is_pipeline_folder

OWN_FOLDER = "hdm"
"""Subfolder of ComfyUI's models folder; may contain links to runs."""
MODEL_FOLDERS, ADAPTER_FOLDERS = (OWN_FOLDER, "checkpoints", "diffusion_models", "diffusers"), ("loras", OWN_FOLDER)
TEXT_ENCODER_FOLDERS = ("text_encoders", OWN_FOLDER)
BY_PATH = "(by path)"
"""The choice that uses the path."""
SUFFIXES = (".safetensors", ".ckpt")
DEEPEST = 3
"""Levels of subfolders of ComfyUI's folders that are searched."""


def register() -> None:
    """Register this pack's own model folder with ComfyUI."""
    folder_paths.add_model_folder_path(OWN_FOLDER, str(Path(folder_paths.models_dir) / OWN_FOLDER))


def models() -> list[str]:
    """List the choices of a model: files, runs and pipeline folders."""
    return [BY_PATH, *_names(MODEL_FOLDERS, is_model_folder)]


def adapters() -> list[str]:
    """List the choices of a LoRA: files, peft folders and runs."""
    return [BY_PATH, *_names(ADAPTER_FOLDERS, is_adapter)]


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder is a run's or a pipeline's."""
    return any(is_pipeline_folder(place) for place in (folder, folder / FINAL_FOLDER))


def chosen(name: str, path: str, folders: Sequence[str]) -> Path:
    """Return the path of a choice; `path`, if not empty, takes precedence over `name`.

    Raises:
        UserError: neither is given, or it does not exist.
    """
    if path.strip():
        found = Path(path.strip()).expanduser()
        if not found.exists():
            raise UserError("there is no such file or folder", where=str(found), hint="enter its full path")
        return found
    if name == BY_PATH:
        where = " or ".join(f"models/{folder}" for folder in folders[:2])
        raise UserError("neither a name nor a path is given", where="name", hint=f"put the file or folder into {where}")
    places = [root / name for root in _roots(folders)]
    found_at = next((place for place in places if place.exists()), None)
    if found_at is None:
        hint = "refresh the page of ComfyUI, or put the file back"
        raise UserError("is no longer in any of ComfyUI's folders", where=name, hint=hint)
    return found_at


def text_encoder_folder(name: str) -> str | None:
    """Return the folder of that name among ComfyUI's text encoders, else the name itself; None if it is empty."""
    name = name.strip()
    places = [root / name for root in _roots(TEXT_ENCODER_FOLDERS)] if name else []
    return next((str(place) for place in places if (place / "config.json").is_file()), name or None)


def changed_at(name: str, path: str, folders: Sequence[str]) -> float:
    """Return when a choice was last modified, so ComfyUI reloads it after a change; 0 if it does not exist."""
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
