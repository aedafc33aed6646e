"""Files of named tensors, read without running anything in them and replaced only when whole, and how they differ."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import replacing

_SHOWN = 8

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
"""Suffixes of files that torch.save writes."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file: flat, or under a checkpoint's ``state_dict``.

    Raises:
        UserError: no such file, another format, or a torch file with more than plain data in it.
    """
    if not path.is_file():
        raise UserError("there is no such file", where=str(path))
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"it is no readable safetensors file ({error})", where=str(path)) from error
    if path.suffix not in PICKLED:
        raise UserError(
            f"the suffix {path.suffix!r} is unknown; expected .safetensors or one of {', '.join(PICKLED)}",
            where=str(path),
        )
    return _read_pickled(path)


def shards(path: Path) -> tuple[Path, ...]:
    """The files that a safetensors file consists of: itself, or those that its index names; none if it is not there.

    Raises:
        UserError: its index cannot be read.
    """
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        return (path,) if path.is_file() else ()
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        parts = sorted({Path(place).name for place in places})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"is no index of weights ({error!r})", where=str(index), hint="get the folder again") from error
    return tuple(path.with_name(part) for part in parts)


def read_sharded(folder: Path, stem: str) -> dict[str, Tensor] | None:
    """The tensors of ``stem`` in a diffusers or transformers folder, in one file or several; None if there are none."""
    files = shards(folder / f"{stem}.safetensors")
    for variant in (*sorted(folder.glob(f"{stem}.*.safetensors")), folder / f"{stem}.bin"):
        files = files or ((variant,) if variant.is_file() else ())
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()} if files else None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file, a Lightning-like .ckpt (under ``state_dict``) or a flat torch file.

    The file appears under its name only when it is whole. Tied tensors are written as often as they are named.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storages: set[int] = set()
    for name, tensor in contiguous.items():
        place = tensor.untyped_storage().data_ptr()
        contiguous[name] = tensor.clone() if place in storages else tensor
        storages.add(place)

    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
        else:
            torch.save({"state_dict": contiguous} if path.suffix == ".ckpt" else contiguous, temporary)


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"torch cannot read it as plain data ({str(error).splitlines()[0]})",
            where=str(path),
            hint="where you trust the file: load it, and save its tensors alone as .safetensors",
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError("it holds no named tensors, nor a state_dict with any", where=str(path))
    return tensors


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError that lists missing, unexpected and mis-shaped tensors, if there are any.

    Args:
        found: the file's tensors.
        wanted: names and shapes of what the network needs.
    """
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    misshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    parts = [
        listed("missing", missing),
        listed("unexpected", unexpected),
        listed("mis-shaped", misshaped),
    ]
    if any(parts):
        raise ValueError("the tensors do not fit the network\n" + "\n".join(part for part in parts if part))


def listed(kind: str, names: Sequence[str]) -> str:
    """One line with how many and which, the first ones by name; empty where there are none."""
    if not names:
        return ""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"  {kind} ({len(names)}): {', '.join(names[:_SHOWN])}{more}"
