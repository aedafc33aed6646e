"""What a stream of samples is made from, as plain values, and rules from a configuration's plain values.

Every mistake names its key.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from hdm_lightning.data.captions import MOST_WEIGHT, CaptionRules, is_weight
from hdm_lightning.data.crops import Buckets, CropRules
from hdm_lightning.data.shard_bytes import is_local
from hdm_lightning.errors import UserError, did_you_mean

Rules = TypeVar("Rules")

FIXED = {Buckets: ("block",)}
"""Fields that follow from other settings, so that no key may set them."""


@dataclass(frozen=True)
class Source:
    """Shards that belong together.

    Attributes:
        urls: folders, shards (`…/0000.tar`) or brace patterns (`…/{0000..0099}.tar`), local or remote.
        weight: share of the samples that come from this source, relative to the other sources; None for its number
            of samples. Give it for all sources or for none.
        index: where the index lies, if not beside the shards.
    """

    urls: tuple[str, ...]
    weight: float | None = None
    index: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.urls, str):  # a lone address would pass for a sequence of letters
            object.__setattr__(self, "urls", (self.urls,))


def sources_from(value: Any, where: str) -> tuple[Source, ...]:
    """The sources that a plain value means.

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
    if not isinstance(entry, Mapping) or "urls" not in entry or set(entry) - {"urls", "weight", "index"}:
        raise UserError(f"{entry!r} is no source", where=where, hint="give a folder, or {urls: …, weight: …}")
    weight = entry.get("weight")
    if weight is not None and not is_weight(weight):
        hint = f"give a number up to {MOST_WEIGHT:g}, or none for any source"
        raise UserError(f"is {str(weight)[:80]}", where=f"{where}.weight", hint=hint)
    urls = entry["urls"]
    several = [urls] if isinstance(urls, str | os.PathLike) else urls
    return Source(tuple(map(_tidy, several)), entry.get("weight"), entry.get("index"))


def _tidy(url: str | os.PathLike[str]) -> str:
    """A local path without `~` and `..`: a configuration may name what lies beside a folder not made yet."""
    text = os.fspath(url)
    return os.path.normpath(os.path.expanduser(text)) if is_local(text) else text


Alpha = Literal["white", "mask"]
"""What becomes of transparency: it is laid on white, or does not count in the loss."""


@dataclass(frozen=True)
class StreamConfig:
    """A stream of samples: where from (at least one source), in which order, cut and captioned how.

    The fields are those of `ShardDataModule`; `workers` is its `num_workers`, 0 works in the training process.
    """

    sources: tuple[Source, ...]
    resolution: int
    context_length: int
    seed: int = 0
    stage: str = ""
    crop: CropRules = field(default_factory=CropRules)
    captions: CaptionRules = field(default_factory=CaptionRules)
    lanes: int = 96
    window: int = 32
    workers: int = 0
    max_bad_share: float = 0.05
    bad_patience: int = 1000
    quarantine: str | None = None
    cache_dir: str | None = None
    cache_gb: float = 100.0
    memory_cache_gb: float = 0.0
    alpha: Alpha = "white"

    def __post_init__(self) -> None:
        for name, least in (("resolution", 1), ("context_length", 1), ("lanes", 1), ("window", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"is {getattr(self, name)}", where=f"data.{name}", hint=f"give {least} or more")
        for name in ("cache_gb", "memory_cache_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"is {getattr(self, name)}", where=f"data.{name}", hint="give gigabytes, 0 or more")
        if self.alpha not in get_args(Alpha):
            raise UserError(f"is {self.alpha!r}", where="data.alpha", hint="give white or mask")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"is {self.max_bad_share}", where="data.max_bad_share", hint="give a share from 0 to 1")


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
            raise UserError(f"unknown key '{key}'", where=f"{where}.{key}", hint=did_you_mean(str(key), known))
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
    if get_origin(wanted) is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"is {value!r}", where=where, hint="give names with numbers, {long: 0.7, txt: 0.3}")
        return {str(name): _typed(each, float, f"{where}.{name}") for name, each in value.items()}
    if get_origin(wanted) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"is {value!r}", where=where, hint="give a list")
        return tuple(_typed(each, str, f"{where}[{number}]") for number, each in enumerate(value))
    accepted = (int, float) if wanted is float else (wanted,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
        raise UserError(f"is {value!r}", where=where, hint=f"give {names[wanted]}")
    try:
        return wanted(value)
    except OverflowError as error:
        raise UserError("is beyond all numbers", where=where, hint="give a smaller one") from error
