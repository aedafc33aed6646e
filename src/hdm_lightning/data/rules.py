"""Plain values, as a configuration or a caller gives them, to sources and rules; every mistake names its key."""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hdm_lightning.data.buckets import Buckets
from hdm_lightning.data.config import Source
from hdm_lightning.data.storage import is_local
from hdm_lightning.errors import UserError

Rules = TypeVar("Rules")

SOURCE_KEYS = ("urls", "weight", "index")
FIXED = {Buckets: ("block",)}
"""Fields that follow from other settings, so that no key may set them."""


def sources_from(value: Any, where: str) -> tuple[Source, ...]:
    """The sources that a value means.

    Args:
        value: a folder, shard, brace pattern or address; a list of them, which makes one source; or a list in which
            a source is a mapping of `urls`, `weight` and `index`.
        where: the value's key.

    Raises:
        UserError: it is none of these.
    """
    entries = [value] if isinstance(value, str | os.PathLike | Mapping) else value
    if not isinstance(entries, Sequence) or not entries:
        raise UserError("no source is given", where=where, hint="give a folder of shards")
    if all(isinstance(entry, str | os.PathLike) for entry in entries):
        return (Source(urls=tuple(map(_tidy, entries))),)
    return tuple(_source(entry, f"{where}[{number}]") for number, entry in enumerate(entries))


def _source(entry: Any, where: str) -> Source:
    if isinstance(entry, str | os.PathLike):
        return Source(urls=(_tidy(entry),))
    if not isinstance(entry, Mapping) or "urls" not in entry or set(entry) - set(SOURCE_KEYS):
        raise UserError(f"{entry!r} is no source", where=where, hint="give a folder, or {urls: …, weight: …}")
    urls = entry["urls"]
    several = [urls] if isinstance(urls, str | os.PathLike) else urls
    return Source(tuple(map(_tidy, several)), entry.get("weight"), entry.get("index"))


def _tidy(url: str | os.PathLike[str]) -> str:
    """A local path without `~` and `..`: a configuration may name what lies beside a folder not made yet."""
    text = os.fspath(url)
    return os.path.normpath(os.path.expanduser(text)) if is_local(text) else text


def rules_from(value: Any, kind: type[Rules], where: str) -> Rules:
    """Rules of a dataclass: as they are, from a mapping of its fields, or its defaults for None.

    Raises:
        UserError: naming the key below `where`: unknown, of a wrong type, or out of range.
    """
    if value is None:
        return kind()
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        hint = f"give its keys, {where}.KEY=VALUE"
        raise UserError(f"{value!r} is no group of keys", where=where, hint=hint)
    types = get_type_hints(kind)
    known = [each.name for each in fields(kind) if each.name not in FIXED.get(kind, ())]  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            raise UserError(f"unknown key '{key}'", where=f"{where}.{key}", hint=_suggestion(str(key), known))
    return kind(**{key: _typed(given, types[key], f"{where}.{key}") for key, given in value.items()})


def _typed(value: Any, wanted: Any, where: str) -> Any:
    """The value as the annotation wants it."""
    if get_origin(wanted) is UnionType:
        kinds = get_args(wanted)
        if value is None and NoneType in kinds:
            return None
        wanted = next(kind for kind in kinds if kind is not NoneType)
    if is_dataclass(wanted):
        return rules_from(value, wanted, where)  # type: ignore[arg-type]
    if get_origin(wanted) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"is {value!r}", where=where, hint="give a list")
        return tuple(_typed(each, str, f"{where}[{number}]") for number, each in enumerate(value))
    accepted = (int, float) if wanted is float else (wanted,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
        raise UserError(f"is {value!r}", where=where, hint=f"give {names[wanted]}")
    return wanted(value)


def _suggestion(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean '{close[0]}'?" if close else "known keys: " + ", ".join(sorted(known))
