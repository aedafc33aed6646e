"""Which layout a path has, and reading it whichever it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hdm_lightning.errors import UserError
from hdm_lightning.interop.diffusers_folder import read_diffusers
from hdm_lightning.interop.project_folder import is_project_folder, read_project
from hdm_lightning.interop.release import Release, release_from_tensors
from hdm_lightning.interop.tensor_files import read_tensors

OUR_SENTINEL = "patch_embedding.weight"
"""A name that tells this project's state dict from a published one."""
TRAINING_SENTINEL = "network." + OUR_SENTINEL
"""The same in a training checkpoint."""
SETTINGS_KEY = "hdm_lightning"
"""Key in a safetensors file's metadata under which this project leaves what the layout has no place for."""
VAE_CONFIG_KEY = "vae_config"
"""Key of those settings that holds the autoencoder's config.json."""


def read_file(path: Path) -> Release:
    """A published single file, .safetensors or .ckpt, with any of the known prefixes.

    Raises:
        UserError: it cannot be read, or its tensors are not those of an XUT.
    """
    tensors, settings = read_tensors(path), _settings(path)
    if OUR_SENTINEL in tensors:
        raise UserError(
            "has the weights of this project without their configuration",
            where=str(path),
            hint="put the config.json of its folder beside it, or give the folder",
        )
    if TRAINING_SENTINEL in tensors:
        raise UserError(
            "is a checkpoint of a training of this project, whose configuration lies in its run's folder",
            where=str(path),
            hint="give the run's folder: its final/ is written when the last stage ends (or init=RUN in training)",
        )
    vae_config = settings.pop(VAE_CONFIG_KEY, None)
    try:
        return replace(release_from_tensors(tensors, settings), vae_config=vae_config)
    except ValueError as error:
        raise UserError(str(error), where=str(path)) from error


def _read_weights_of_project(path: Path) -> Release:
    return read_project(path.parent, path.name)


def _read_run(path: Path) -> Release:
    return read_project(path / "final")


_LAYOUTS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path], Release]], ...] = (
    ("project folder", is_project_folder, read_project),
    ("run folder", lambda path: is_project_folder(path / "final"), _read_run),
    ("weights of a project folder", lambda path: _is_ours(path), _read_weights_of_project),
    ("published file", Path.is_file, read_file),
    ("diffusers folder", Path.is_dir, read_diffusers),
)


def detect_layout(path: Path) -> str:
    """The name of the layout that `read_release` takes the path for.

    Raises:
        UserError: there is nothing.
    """
    for name, fits, _ in _LAYOUTS:
        if fits(path):
            return name
    raise UserError("there is no such file or folder", where=str(path))


def read_release(path: Path) -> Release:
    """A trained network with what lies beside it, from any layout.

    Raises:
        UserError: there is nothing, or what there is does not hold an XUT; the message lists what differs.
    """
    layout = detect_layout(path)
    reader = next(read for name, _, read in _LAYOUTS if name == layout)
    return reader(path)


def _is_ours(path: Path) -> bool:
    """Whether a file holds tensors under this project's names beside their config.json."""
    if path.suffix != ".safetensors" or not is_project_folder(path.parent):
        return False
    try:
        with safe_open(path, "pt") as file:
            return OUR_SENTINEL in file.keys()  # noqa: SIM118 (a file handle, not a dict)
    except (SafetensorError, OSError):
        return False  # whoever reads it will say what is wrong


def _settings(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return dict(json.loads(metadata.get(SETTINGS_KEY, "{}")))
