"""Files of named tensors: read without running anything in them, written atomically, and checked against a network."""

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
from hdm_lightning.regular_files import open_regular
from hdm_lightning.whole_files import replacing

_SHOWN = 8

_AGAIN = "download the file again, and compare its size with the one on its page"
_NO_WEIGHTS = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file",
        "run git lfs pull in the clone",
    ),
    (
        b"<",
        "is an HTML or XML page, not the file",
        "use the direct download link, and log in if the page asks for it",
    ),
    (b"{", "is JSON, not the file", _AGAIN),
    (b"GGUF", "is a GGUF file, which only llama.cpp and its relatives read", "use its .safetensors version"),
    (b"\x1f\x8b", "is compressed (gzip)", "gunzip it first"),
    (b"\x89PNG", "is an image", "use a weights file"),
)
"""First bytes of files that are often saved in place of weights, what they are, and what to do."""
_ZIP = b"PK"
_PICKLE = b"\x80"
_LONGEST_HEADER = 100_000_000
"""Maximum size of a safetensors header in bytes, as in its own reader."""
_MOST_STEPS = 2_000_000
"""Maximum opcodes of a pickle; ten thousand tensors with their moments take half of that."""
_LONGEST_PICKLE = 256 << 20
_OLD_PARTS = 5
"""Number of pickles at the start of a torch file in the old format."""
_UNREADABLE = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, EOFError, ImportError),
    *(pickle.UnpicklingError, RecursionError, MemoryError, OverflowError, AssertionError, struct.error),
)
"""Exceptions of torch's reader for files that are damaged or contain something else."""


def read_tensors(path: Path, *, every: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or torch file: flat, or in a mapping inside, as in checkpoints.

    The first bytes decide what a file is, not its name; nothing in it is run. Further mappings with the names of the
    usual one, such as an average, are included with their key as a prefix.

    Args:
        path: the file.
        every: include all mappings, with their keys as prefixes, if there are several and none is the usual one.

    Raises:
        UserError: no such file, another format, a truncated file, or a torch file with more than plain data in it.
    """
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), hint="check its name, or download it")
    try:
        with path.open("rb") as file:
            begin, size = file.read(64), path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path), hint="check its permissions") from error
    if is_safetensors(begin):
        return _read_safetensors(path)
    if begin.startswith((_ZIP, _PICKLE)):
        return _read_pickled(path, every=every)
    raise _no_weights(path, begin, size)


def is_safetensors(begin: bytes) -> bool:
    """Return whether a file with these first bytes is a safetensors file: the header's length, then the JSON header."""
    return len(begin) > 8 and int.from_bytes(begin[:8], "little") <= _LONGEST_HEADER and begin[8:9] == b"{"


def _no_weights(path: Path, begin: bytes, size: int) -> UserError:
    if not begin.strip(b"\0"):
        what = "is empty" if not size else "begins with zeros only, as after a crash or a broken download"
        return UserError(what, where=str(path), hint=_AGAIN)
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, what, hint in _NO_WEIGHTS:
        if text.startswith(start):
            return UserError(what, where=str(path), hint=hint)
    what = f"is neither a safetensors nor a torch file: it begins with {begin[:8]!r}"
    return UserError(what, where=str(path), hint=_AGAIN)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, *_UNREADABLE) as error:
        what = f"is not a complete safetensors file ({first_line(error)})"
        raise UserError(what, where=str(path), hint=_AGAIN) from error


def safetensors_header(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return metadata and tensor names of a safetensors file; both are empty for any other path, or a damaged file."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            if not is_safetensors(file.read(64)):
                return {}, []
        with safe_open(path, "pt") as stored:
            return dict(stored.metadata() or {}), list(stored.keys())
    except (SafetensorError, OSError):
        return {}, []


def shards(path: Path) -> tuple[Path, ...]:
    """Return the files that make up a safetensors file: itself, or those in its index; none if it does not exist.

    Raises:
        UserError: its index cannot be read.
    """
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        return (path,) if path.is_file() else ()
    places = read_object(index, hint="get the folder again").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) and place for place in places.values()):
        raise UserError("is not an index of weights (weight_map)", where=str(index), hint="get the folder again")
    return tuple(path.with_name(part) for part in sorted({Path(place).name for place in places.values()}))


def read_sharded(folder: Path, stem: str) -> dict[str, Tensor] | None:
    """Read the tensors of ``stem`` in a diffusers or transformers folder, from one file or several; None if missing."""
    files = shards(folder / f"{stem}.safetensors")
    for variant in (*sorted(folder.glob(f"{stem}.*.safetensors")), folder / f"{stem}.bin"):
        files = files or ((variant,) if variant.is_file() else ())
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()} if files else None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file, a Lightning-like .ckpt (under ``state_dict``) or a flat torch file.

    The file appears under its name only when it is complete. Tied tensors are written once for each name.
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
        # Opened here, as torch would judge a path by its name; its warnings are about pickle protocols.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            require_modest_pickle(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except EndlessPickle as error:
        raise UserError(str(error), where=str(path), hint="use a .safetensors version of it") from error
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    named = dict(_mappings(content))
    if not named:
        what = "contains no named tensors, neither directly nor in a mapping"
        raise UserError(what, where=str(path), hint="save the network's state_dict()")
    for usual in ("", "state_dict"):
        if usual in named:
            return named[usual] | _copies(named, usual)
    if len(named) > 1 and every:
        return {f"{key}.{name}": tensor for key, each in named.items() for name, tensor in each.items()}
    if len(named) > 1:
        sets = ", ".join(f"{in_one_line(key)} ({len(each)})" for key, each in named.items())
        what = f"contains several sets of tensors: {sets}"
        largest = max(named, key=lambda each: len(named[each]))
        hint = f"extract one: hdm-convert {shlex.quote(str(path))} OUT --copy {shlex.quote(largest)}"
        raise UserError(what, where=str(path), hint=hint)
    return next(iter(named.values()))


class EndlessPickle(ValueError):
    """Reading a torch file's contents besides its tensors would take many minutes, or all memory."""


def require_modest_pickle(file: IO[bytes]) -> None:
    """Count the steps that reading a torch file would take, without taking them, and rewind the file.

    Raises:
        EndlessPickle: there are millions.
    """
    try:
        parts = _zipped(file) if zipfile.is_zipfile(file) else [file] * _OLD_PARTS
        file.seek(0)
        steps = chain.from_iterable(pickletools.genops(part) for part in parts)
        if next(islice(steps, _MOST_STEPS, None), None) is not None:
            raise EndlessPickle(f"has more than {_MOST_STEPS:,} entries besides its tensors, which no network has")
    except EndlessPickle:
        raise
    except (zipfile.BadZipFile, *_UNREADABLE):
        pass  # left to torch's reader
    finally:
        file.seek(0)


def _zipped(file: IO[bytes]) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".pkl"):
                if entry.file_size > _LONGEST_PICKLE:
                    raise EndlessPickle(f"has {entry.file_size:,} bytes besides its tensors, which no network has")
                yield io.BytesIO(archive.read(entry))


def _copies(named: Mapping[str, Mapping[str, Tensor]], usual: str) -> dict[str, Tensor]:
    """Return the tensors of other sets that share at least half of the usual set's names, with keys as prefixes."""
    own = named[usual]
    others = {
        key: each for key, each in named.items() if key != usual and 2 * len(own.keys() & each.keys()) >= len(own)
    }
    return {f"{key}.{name}": tensor for key, each in others.items() for name, tensor in each.items()}


def _mappings(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the sets of named tensors in what torch has read, by their keys: `""` for the top level."""
    if not isinstance(content, Mapping):
        return
    for key, inner in (("", content), *content.items()):
        if isinstance(inner, Mapping):
            tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
            if tensors:
                yield str(key), tensors


def _unreadable(path: Path, error: BaseException) -> UserError:
    """Report what torch's reader found in our own words, as its messages advise running what is in the file."""
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if foreign is not None:
        what = f"contains more than tensors and plain data ({foreign[1]}), which reading would have to run"
        hint = "use a .safetensors version of it; if it is your own, save only the network's state_dict()"
        return UserError(what, where=str(path), hint=hint)
    what = "is not a complete torch file: it is truncated or damaged, or contains something else"
    return UserError(what, where=str(path), hint=_AGAIN)


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, listing the tensors with NaN or infinite values, if there are any."""
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise ValueError(listed("the weights contain NaN or infinity", {"not finite": broken}))


def _is_finite(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or not tensor.is_floating_point():
        return True
    return bool((tensor.float() if tensor.dtype.itemsize < 2 else tensor).isfinite().all())


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError, listing missing, unexpected and mis-shaped tensors, unless names and shapes are as wanted."""
    misshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "mis-shaped": misshaped,
    }
    if any(kinds.values()):
        raise ValueError(listed("the tensors do not fit the network", kinds))


def listed(what: str, kinds: Mapping[str, Sequence[str]]) -> str:
    """Return `what`, and a line for each kind of names that has any, with their number and the first few of them."""
    lines = [what]
    for kind, names in kinds.items():
        if names:
            more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"  {kind} ({len(names)}): {', '.join(map(in_one_line, names[:_SHOWN]))}{more}")
    return "\n".join(lines)
