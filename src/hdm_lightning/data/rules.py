"""Settings of a stream of samples as plain values, and how they are read from a configuration.

Every error names its key.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from hdm_lightning.data.captions import MOST_WEIGHT, CaptionRules, is_weight, require_share
from hdm_lightning.data.crops import Buckets, CropRules, require_least
from hdm_lightning.data.shard_bytes import is_local
from hdm_lightning.errors import UserError, did_you_mean

Rules = TypeVar("Rules")

FIXED = {Buckets: ("block",)}
"""Fields derived from other settings; no key may set them."""


@dataclass(frozen=True)
class Source:
    """Shards that belong together.

    Attributes:
        urls: folders, shards (`…/0000.tar`) or brace patterns (`…/{0000..0099}.tar`), local or remote.
        weight: share of the samples that come from this source, relative to the other sources; None for its number
            of samples. Set it for all sources or for none.
        index: location of the index, if not beside the shards.
    """

    urls: tuple[str, ...]
    weight: float | None = None
    index: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.urls, str):  # a single address would pass for a sequence of characters
            object.__setattr__(self, "urls", (self.urls,))


def sources_from(value: Any, where: str) -> tuple[Source, ...]:
    """Return the sources that a plain value describes.

    Args:
        value: a folder, shard, brace pattern or address; a list of them, which is one source; or a list in which
            sources are mappings with `urls`, `weight` and `index`.
        where: the value's key.

    Raises:
        UserError: the value is none of these.
    """
    entries = [value] if isinstance(value, str | os.PathLike | Mapping) else value
    if not isinstance(entries, Sequence) or not entries:
        raise UserError("no source is given", where=where, hint="name a folder of shards")
    if all(isinstance(entry, str | os.PathLike) for entry in entries):
        return (Source(urls=tuple(map(_tidy, entries))),)
    return tuple(_source(entry, f"{where}[{number}]") for number, entry in enumerate(entries))


def _source(entry: Any, where: str) -> Source:
    if isinstance(entry, str | os.PathLike):
        return Source(urls=(_tidy(entry),))
    if not isinstance(entry, Mapping) or "urls" not in entry or set(entry) - {"urls", "weight", "index"}:
        raise UserError(f"{entry!r} is not a source", where=where, hint="name a folder, or use {urls: …, weight: …}")
    weight = entry.get("weight")
    if weight is not None and not is_weight(weight):
        hint = f"set it to a number up to {MOST_WEIGHT:g}, or leave the weights of all sources out"
        raise UserError(f"is {str(weight)[:80]}", where=f"{where}.weight", hint=hint)
    urls = entry["urls"]
    several = [urls] if isinstance(urls, str | os.PathLike) else urls
    return Source(tuple(map(_tidy, several)), entry.get("weight"), entry.get("index"))


def _tidy(url: str | os.PathLike[str]) -> str:
    """Resolve `~` and `..` in a local path, textually: the folders that it passes through may not exist yet."""
    text = os.fspath(url)
    return os.path.normpath(os.path.expanduser(text)) if is_local(text) else text


Alpha = Literal["white", "mask"]
"""How transparency is treated: composited onto white, or as a mask for the loss."""


@dataclass(frozen=True)
class StreamConfig:
    """A stream of samples: its sources (at least one), their order, and how samples are cropped and captioned.

    The fields are those of `ShardDataModule`; `workers` is its `num_workers`, 0 to load in the training process.
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
            require_least(f"data.{name}", getattr(self, name), least)
        for name in ("cache_gb", "memory_cache_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"is {getattr(self, name)}", where=f"data.{name}", hint="set it to 0 GB or more")
        if self.alpha not in get_args(Alpha):
            raise UserError(f"is {self.alpha!r}", where="data.alpha", hint="set it to white or mask")
        require_share("data.max_bad_share", self.max_bad_share)


def rules_from(value: Any, kind: type[Rules], where: str) -> Rules:
    """Return an instance of a rules dataclass: as given, from a mapping of its fields, or the defaults for None.

    Raises:
        UserError: a key below `where` is unknown, has the wrong type, or is out of range.
    """
    if value is None:
        return kind()
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        hint = f"set its keys one by one: {where}.KEY=VALUE"
        raise UserError(f"expected a mapping of keys, got {value!r}", where=where, hint=hint)
    types = get_type_hints(kind)
    known = [each.name for each in fields(kind) if each.name not in FIXED.get(kind, ())]  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            raise UserError(f"unknown key '{key}'", where=f"{where}.{key}", hint=did_you_mean(str(key), known))
    return kind(**{key: _typed(given, types[key], f"{where}.{key}") for key, given in value.items()})


def _typed(value: Any, wanted: Any, where: str) -> Any:
    """Return the value converted to the annotated type."""
    if get_origin(wanted) is UnionType:
        kinds = get_args(wanted)
        if value is None and NoneType in kinds:
            return None
        wanted = next(kind for kind in kinds if kind is not NoneType)
    if is_dataclass(wanted):
        return rules_from(value, wanted, where)  # type: ignore[arg-type]
    if get_origin(wanted) is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"is {value!r}", where=where, hint="map names to numbers, as in {long: 0.7, txt: 0.3}")
        return {str(name): _typed(each, float, f"{where}.{name}") for name, each in value.items()}
    if get_origin(wanted) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"is {value!r}", where=where, hint="set it to a list")
        return tuple(_typed(each, str, f"{where}[{number}]") for number, each in enumerate(value))
    accepted = (int, float) if wanted is float else (wanted,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        names = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}
        raise UserError(f"is {value!r}", where=where, hint=f"set it to {names[wanted]}")
    try:
        return wanted(value)
    except OverflowError as error:
        raise UserError("is too large for a float", where=where, hint="set it to a smaller number") from error
