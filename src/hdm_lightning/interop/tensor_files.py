"""Files of named tensors, read without running anything in them and replaced only when whole, and how they differ."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import shlex
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hdm_lightning.errors import UserError, first_line
from hdm_lightning.json_files import read_object
from hdm_lightning.printable import in_one_line
from hdm_lightning.whole_files import replacing

_SHOWN = 8

_AGAIN = "download the file again, and compare its size with what the page says"
_NO_WEIGHTS = (
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, which stands for the file",
        "git lfs pull, where it was cloned",
    ),
    (
        b"<",
        "is a page of HTML or XML, not the file",
        "download it by its own link, logged in where the page asks for it",
    ),
    (b"{", "is JSON, not the file", _AGAIN),
    (b"GGUF", "is a GGUF file, whose quantized weights only llama.cpp's relatives read", "take the .safetensors of it"),
    (b"\x1f\x8b", "is compressed (gzip)", "gunzip it first"),
    (b"\x89PNG", "is a picture", "give a file of weights"),
)
"""How a file begins that has been saved in the place of weights, what it is, and what to do."""
_ZIP = b"PK"
_PICKLE = b"\x80"
_LONGEST_HEADER = 100_000_000
"""Of a safetensors file, as its own reader has it."""
_MOST_STEPS = 2_000_000
"""Of a pickle; ten thousand tensors with their moments take half of it."""
_LONGEST_PICKLE = 256 << 20
_OLD_PARTS = 5
"""Pickles, one behind the other, with which a torch file of the older kind begins."""
_UNREADABLE = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, EOFError, ImportError),
    *(pickle.UnpicklingError, RecursionError, MemoryError, OverflowError, AssertionError, struct.error),
)
"""What torch's reader raises for files that are damaged or hold other things."""


def read_tensors(path: Path, *, every: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file: flat, or in one mapping inside, as a checkpoint has them.

    What a file is stands in its first bytes; its name does not count. Nothing in it is run. Mappings beside the usual
    one that have its names, such as an average, come with their key before the names.

    Args:
        path: the file.
        every: where there are several mappings and none is the usual one, all of them come, with their keys.

    Raises:
        UserError: no such file, another format, one that is cut off, or a torch file with more than plain data in it.
    """
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), hint="look at its name, or download it")
    try:
        with path.open("rb") as file:
            begin, size = file.read(64), path.stat().st_size
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})", where=str(path), hint="look at its permissions"
        ) from error
    if is_safetensors(begin):
        return _read_safetensors(path)
    if begin.startswith((_ZIP, _PICKLE)):
        return _read_pickled(path, every=every)
    raise _no_weights(path, begin, size)


def is_safetensors(begin: bytes) -> bool:
    """Whether a file that begins so is a safetensors file: the length of its header, then the header, which is JSON."""
    return len(begin) > 8 and int.from_bytes(begin[:8], "little") <= _LONGEST_HEADER and begin[8:9] == b"{"


def _no_weights(path: Path, begin: bytes, size: int) -> UserError:
    if not begin.strip(b"\0"):
        what = "is empty" if not size else "begins with zeros alone, as after a crash or a broken download"
        return UserError(what, where=str(path), hint=_AGAIN)
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, what, hint in _NO_WEIGHTS:
        if text.startswith(start):
            return UserError(what, where=str(path), hint=hint)
    what = f"is neither a safetensors file nor one of torch: it begins with {begin[:8]!r}"
    return UserError(what, where=str(path), hint=_AGAIN)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, *_UNREADABLE) as error:
        what = f"is no whole safetensors file ({first_line(error)})"
        raise UserError(what, where=str(path), hint=_AGAIN) from error


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The texts beside the tensors of a safetensors file; none in any other file, or in one that is damaged."""
    try:
        with path.open("rb") as file:
            if not is_safetensors(file.read(64)):
                return {}
        with safe_open(path, "pt") as stored:
            return dict(stored.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def shards(path: Path) -> tuple[Path, ...]:
    """The files that a safetensors file consists of: itself, or those that its index names; none if it is not there.

    Raises:
        UserError: its index cannot be read.
    """
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        return (path,) if path.is_file() else ()
    places = read_object(index, hint="get the folder again").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) and place for place in places.values()):
        raise UserError("is no index of weights: weight_map", where=str(index), hint="get the folder again")
    return tuple(path.with_name(part) for part in sorted({Path(place).name for place in places.values()}))


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


def _read_pickled(path: Path, *, every: bool) -> dict[str, Tensor]:
    try:
        # By its name torch would take one file for another; its warnings are of a pickle's protocol.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            require_modest_pickle(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except EndlessPickle as error:
        raise UserError(str(error), where=str(path), hint="take a .safetensors of it") from error
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    named = dict(_mappings(content))
    if not named:
        what = "holds no tensors by name, nor a mapping inside that does"
        raise UserError(what, where=str(path), hint="save the network's state_dict()")
    for usual in ("", "state_dict"):
        if usual in named:
            return named[usual] | _copies(named, usual)
    if len(named) > 1 and every:
        return {f"{key}.{name}": tensor for key, each in named.items() for name, tensor in each.items()}
    if len(named) > 1:
        sets = ", ".join(f"{in_one_line(key)} ({len(each)})" for key, each in named.items())
        what = f"holds several sets of tensors: {sets}"
        largest = max(named, key=lambda each: len(named[each]))
        hint = f"take one out: hdm-convert {shlex.quote(str(path))} OUT --copy {shlex.quote(largest)}"
        raise UserError(what, where=str(path), hint=hint)
    return next(iter(named.values()))


class EndlessPickle(ValueError):
    """What a torch file has beside its tensors would take its reader many minutes, or all memory."""


def require_modest_pickle(file: IO[bytes]) -> None:
    """Count the steps that reading a torch file would take, without taking them; the file is at its begin afterwards.

    Raises:
        EndlessPickle: they are millions.
    """
    try:
        parts = _zipped(file) if zipfile.is_zipfile(file) else [file] * _OLD_PARTS
        file.seek(0)
        steps = chain.from_iterable(pickletools.genops(part) for part in parts)
        if next(islice(steps, _MOST_STEPS, None), None) is not None:
            raise EndlessPickle(f"has more than {_MOST_STEPS:,} entries beside its tensors, which no network has")
    except EndlessPickle:
        raise
    except (zipfile.BadZipFile, *_UNREADABLE):
        pass  # torch's reader has the last word
    finally:
        file.seek(0)


def _zipped(file: IO[bytes]) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".pkl"):
                if entry.file_size > _LONGEST_PICKLE:
                    raise EndlessPickle(f"has {entry.file_size:,} bytes beside its tensors, which no network has")
                yield io.BytesIO(archive.read(entry))


def _copies(named: Mapping[str, Mapping[str, Tensor]], usual: str) -> dict[str, Tensor]:
    """The tensors of other sets that have at least half of the usual one's names, with their keys before the names."""
    own = named[usual]
    others = {
        key: each for key, each in named.items() if key != usual and 2 * len(own.keys() & each.keys()) >= len(own)
    }
    return {f"{key}.{name}": tensor for key, each in others.items() for name, tensor in each.items()}


def _mappings(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The sets of named tensors in what torch has read, by their keys: `""` for what it is itself."""
    if not isinstance(content, Mapping):
        return
    for key, inner in (("", content), *content.items()):
        if isinstance(inner, Mapping):
            tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
            if tensors:
                yield str(key), tensors


def _unreadable(path: Path, error: BaseException) -> UserError:
    """What torch's reader has found, in words of our own: its messages advise to run what is in the file."""
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if foreign is not None:
        what = f"holds more than tensors and plain data ({foreign[1]}), which reading would have to run"
        hint = "take a .safetensors of it; of a file of your own, save the network's state_dict() alone"
        return UserError(what, where=str(path), hint=hint)
    what = "is no whole file of torch: it is cut off or damaged, or holds something else"
    return UserError(what, where=str(path), hint=_AGAIN)


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError that lists tensors with values that are no numbers, or infinite, if there are any."""
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise ValueError(f"the weights hold NaN or infinity\n{listed('not finite', broken)}")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or not tensor.is_floating_point():
        return True
    return bool((tensor.float() if tensor.dtype.itemsize < 2 else tensor).isfinite().all())


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
    return f"  {kind} ({len(names)}): {', '.join(map(in_one_line, names[:_SHOWN]))}{more}"
