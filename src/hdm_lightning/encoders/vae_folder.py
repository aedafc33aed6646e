"""The diffusers folder of an AutoencoderKL: what it must hold, its configuration, and its model, each checked.

Shapes: image (B,3,f·H,f·W); latent (B,C,H,W).
"""

import json
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.encoders.sources import FINAL, RUNS, locate_model
from hdm_lightning.errors import UserError

AUTOENCODER_FILES = ["config.json", "*.safetensors|*.bin"]
# Repositories also hold half-precision variants and single files of other layouts.
AUTOENCODER_DOWNLOAD = ["config.json", "diffusion_pytorch_model.safetensors"]
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

AutoencoderKL = Any
"""A diffusers AutoencoderKL, whose classes carry no types and take seconds to import."""

_CELLS = 4
_MEND = "give a folder written by AutoencoderKL.save_pretrained"


def locate_autoencoder(name_or_path: str, *, where: str, made_by: str | None = None) -> Path:
    """The folder of an AutoencoderKL, downloaded from the hub at most once; see `encoders.sources.locate_model`.

    Args:
        name_or_path: folder or hub name.
        where: configuration key or argument to name in errors.
        made_by: the command that trains it, to be told where it is a run that is not there.

    Raises:
        UserError: there is none.
    """
    path = Path(name_or_path).expanduser()
    if path.name == FINAL and not path.is_dir():
        raise _no_run(path, name_or_path, where, made_by)
    return locate_model(name_or_path, where=where, required=AUTOENCODER_FILES, download=AUTOENCODER_DOWNLOAD)


def _no_run(path: Path, name: str, where: str, made_by: str | None) -> UserError:
    """What to say of a run of hdm-train-vae that is not there, or not finished."""
    run = path.parent
    if run.is_dir():
        hint = "the same hdm-train-vae command goes on with it until it is finished"
        return UserError(f"the run {str(run)!r} has not written its {FINAL}/ yet", where=where, hint=hint)
    named = f"name={run.name}" if str(run.parent) == RUNS else f"run_dir={run}"
    command = made_by if made_by and named in made_by.split() else f"hdm-train-vae data.train=SHARDS {named}"
    return UserError(f"there is no folder {name!r}", where=where, hint=f"train it: {command}")


def read_config(folder: Path, *, where: str) -> dict[str, Any]:
    """Fields of a folder's AutoencoderKL.

    Args:
        folder: with a config.json.
        where: configuration key or argument to name where another model lies there.

    Raises:
        UserError: it is no JSON, or that of another model.
    """
    file = folder / "config.json"
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"is no JSON ({error})", where=str(file), hint="hint the file") from error
    kind = written.get("_class_name", "AutoencoderKL") if isinstance(written, dict) else "no object"
    if kind != "AutoencoderKL" or "block_out_channels" not in written:
        raise UserError(f"is no AutoencoderKL ({file} says {kind})", where=where, hint=_MEND)
    fields: dict[str, Any] = written
    return fields


def read_autoencoder(folder: Path, dtype: torch.dtype, *, where: str) -> AutoencoderKL:
    """The AutoencoderKL of a folder.

    Args:
        folder: with a config.json and weights.
        dtype: of the weights.
        where: configuration key or argument to name in errors.

    Raises:
        UserError: config and weights do not belong together, weights are missing, or it takes no RGB pictures.
    """
    from diffusers import AutoencoderKL  # noqa: PLC0415 (seconds to import)

    read_config(folder, where=where)
    try:
        model, loading = AutoencoderKL.from_pretrained(
            str(folder), torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        what = f"diffusers cannot read an AutoencoderKL from {folder} ({str(error).splitlines()[0]})"
        raise UserError(what, where=where, hint=_MEND) from error
    if missing := loading["missing_keys"]:  # diffusers leaves them random and says so in a warning alone
        what = f"{folder} lacks {len(missing)} weights, {missing[0]} among them"
        raise UserError(what, where=where, hint=_MEND)
    check_shapes(model, where=where)
    return model


def check_shapes(model: AutoencoderKL, *, where: str) -> None:
    """Send a picture without contents through an AutoencoderKL of this configuration.

    Args:
        model: on any device; nothing is computed.
        where: configuration key or argument to name in errors.

    Raises:
        UserError: it cannot encode RGB pictures, or gives back another size.
    """
    from diffusers import AutoencoderKL  # noqa: PLC0415 (seconds to import)

    factor = 2 ** (len(model.config.block_out_channels) - 1)
    side = factor * _CELLS
    hint = (
        "give down_block_types, up_block_types and block_out_channels the same length, "
        "3 in_channels and out_channels, and at least one latent channel"
    )
    try:
        with torch.device("meta"):
            empty = AutoencoderKL.from_config(model.config)
            latent = empty.encode(torch.empty(1, 3, side, side)).latent_dist.mode()
            shape = tuple(empty.decode(latent).sample.shape)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"cannot encode a picture ({str(error).splitlines()[0]})", where=where, hint=hint) from error
    if shape != (1, 3, side, side):
        what = f"gives back {shape} of a picture of {(1, 3, side, side)}"
        raise UserError(what, where=where, hint=hint)
    if tuple(latent.shape[1:]) != (int(model.config.latent_channels), _CELLS, _CELLS):
        what = f"has a latent of {tuple(latent.shape[1:])} for a picture of {_CELLS} × {_CELLS} cells of {factor} px"
        raise UserError(what, where=where, hint=hint)
