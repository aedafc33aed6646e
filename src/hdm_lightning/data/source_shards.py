"""Resolve the shards of a source: addresses, indices, and the kind of their samples (images or latents)."""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from hdm_lightning.data.index import INDEX_NAME, Index, index_file, load_index, set_folder
from hdm_lightning.data.latent_sets import LatentFormat
from hdm_lightning.data.rules import Source
from hdm_lightning.data.shard_bytes import is_local
from hdm_lightning.data.shard_files import is_shard
from hdm_lightning.data.shard_record import ShardRecord
from hdm_lightning.errors import UserError

MOST_SHARDS = 1_000_000
"""Maximum number of shards in one pattern."""
_BRACES = re.compile(r"\{([^{}]*)\}")

State = tuple[int, int] | None
"""Size and modification time of a local index, None for a remote or missing one."""


def resolve(source: Source) -> list[tuple[str, ShardRecord]]:
    """Return addresses and records of the shards of a source, in the order in which they are named.

    Raises:
        UserError: an index is missing, or does not include a named shard.
    """
    found: list[tuple[str, ShardRecord]] = []
    known = {place: known_index(place) for place in places_of(source)}
    by_name = {place: {record.name: record for record in index.shards} for place, index in known.items()}
    for url in addresses_of(source):
        place, records = _place(source, url), by_name[_place(source, url)]
        if known[place].resolutions:
            what = f"contains sets of latents, at {_listed(known[place].resolutions)}"
            raise UserError(what, where=url, hint=f"name one, such as {_set_of(url, known[place].resolutions[0])}")
        if not is_shard(url):
            found += [(f"{url.rstrip('/')}/{record.name}", record) for record in records.values()]
        elif (name := url.rpartition("/")[2]) in records:
            found.append((url, records[name]))
        else:
            raise _unknown_shard(url, place)
    return found


def _unknown_shard(url: str, place: str) -> UserError:
    """Return the error for a shard that is not in the index."""
    folder = url.rpartition("/")[0] or "."
    if "*" in url or "?" in url:
        what = "wildcards are not supported"
        hint = f"name the folder, {folder}, or a pattern such as {{000..099}}.tar"
    elif "::" in url:
        what = "webdataset's :: between addresses is not supported"
        hint = f"use a list, [{','.join(url.split('::'))}], or a pattern such as {{000..099}}.tar"
    elif is_local(url) and not Path(url).exists():
        what = "there is no such file"
        hint = f"name existing shards, or the folder {folder} for all shards in its index"
    elif is_local(place):
        what, hint = "this shard is not in the index", f"run `hdm-shards index --new-only {shlex.quote(place)}`"
    else:
        what, hint = "this shard is not in the index", "index the shards again, see `hdm-shards index --help`"
    return UserError(what, where=url, hint=hint)


def at_resolution(source: Source, resolution: int) -> Source:
    """Return the source with each folder of sets of latents replaced by its set at this resolution.

    Raises:
        UserError: there is no such set, or an index is missing.
    """
    there = {place: known_index(place).resolutions for place in places_of(source)}
    if not any(there.values()):
        return source
    for place, resolutions in there.items():
        if resolutions and resolution not in resolutions:
            folder = place.removesuffix(f"/{INDEX_NAME}")
            raise UserError(
                f"there are no latents of images at {resolution} px, only at {_listed(resolutions)}",
                where=folder,
                hint=f"make them: hdm-shards encode IMAGES --out {shlex.quote(folder)} --vae NAME --resolution "
                f"{resolution}, or train this stage on images: ++schedule.stages.NAME.data.train=IMAGES",
            )
    urls = (_set_of(url, resolution) if there[_place(source, url)] else url for url in addresses_of(source))
    index = source.index
    if index is not None and there[index]:
        index = _set_of(index.removesuffix(f"/{INDEX_NAME}"), resolution)
    return Source(tuple(urls), source.weight, index)


def common_latents(sources: Sequence[Source]) -> LatentFormat | None:
    """Return the common latent format of sources, None for images; see `at_resolution`.

    Raises:
        UserError: the sources differ.
    """
    found = {place: known_index(place).latents for source in sources for place in places_of(source)}
    if len(set(found.values())) > 1:
        raise _unlike(found)
    return next(iter(found.values()))


_ALIKE = {
    "resolution": "name sets of one resolution",
    **dict.fromkeys(("factor", "channels", "autoencoder"), "encode all of them with the same autoencoder"),
    "moments": "encode all of them with --std, or all without it",
}
"""Hints for sets of latents that differ in a field."""


def _unlike(found: Mapping[str, LatentFormat | None]) -> UserError:
    """Return the error for sources that differ in what their samples contain."""
    formats = {place: each for place, each in found.items() if each is not None}
    if len(formats) < len(found):
        kinds = (f"{place}: {'images' if each is None else f'latents of {each.name}'}" for place, each in found.items())
        what = f"the sources of one stream mix images and latents ({'; '.join(kinds)})"
        hint = "encode all of them with the same autoencoder, or none; only separate stages may use images and latents"
        return UserError(what, where="data.train", hint=hint)
    compared = (each.name for each in fields(LatentFormat) if each.compare)
    unlike = [name for name in compared if len({getattr(each, name) for each in formats.values()}) > 1]
    values = {place: ", ".join(f"{name} {getattr(each, name)}" for name in unlike) for place, each in formats.items()}
    kinds = (f"{place}, of {each.name}: {values[place]}" for place, each in formats.items())
    what = f"the latents of one stream differ in {', '.join(unlike)} ({'; '.join(kinds)})"
    return UserError(what, where="data.train", hint="; ".join(dict.fromkeys(_ALIKE[name] for name in unlike)))


def _listed(resolutions: Sequence[int]) -> str:
    return ", ".join(f"{each} px" for each in resolutions)


def _set_of(url: str, resolution: int) -> str:
    return f"{url.rstrip('/')}/{set_folder(resolution)}"


def known_index(place: str) -> Index:
    """Return the index at a place, cached as by `known_shards`."""
    return known_shards(place, state_of(place))


@lru_cache(maxsize=16)
def known_shards(place: str, state: State) -> Index:
    """Return an index, which is read once per process unless its local file changes."""
    return load_index(place)


def addresses_of(source: Source) -> Iterator[str]:
    """Yield the folders and shards that a source names."""
    return (url for pattern in source.urls for url in expanded(pattern))


def places_of(source: Source) -> list[str]:
    """Return the locations of the indices of a source."""
    return list(dict.fromkeys(_place(source, url) for url in addresses_of(source)))


def _place(source: Source, url: str) -> str:
    if "::" in url:
        raise _unknown_shard(url, url)
    return source.index or ((url.rpartition("/")[0] or ".") if is_shard(url) else url)


def state_of(place: str) -> State:
    """Return size and modification time of a local index, None for a remote or missing one."""
    path = Path(index_file(place))
    if not is_local(place) or not path.is_file():
        return None
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def expanded(pattern: str) -> Iterator[str]:
    """Yield the addresses that a brace pattern names.

    Raises:
        UserError: a brace is not closed, or there are more than `MOST_SHARDS`.
    """
    _require_few(pattern)
    try:
        addresses = iter(braceexpand(pattern))
        yield from islice(addresses, MOST_SHARDS)
        more = next(addresses, None)
    except ValueError as error:
        raise UserError(f"is malformed ({error})", where=pattern, hint="close each brace: {0000..0099}.tar") from error
    if more is not None:
        raise _too_many(pattern)


def _require_few(pattern: str) -> None:
    """Raise UserError if braces have too many choices, before braceexpand builds each range in memory."""
    braces = _BRACES.findall(pattern)
    nested = pattern.count("{") > len(braces)
    sizes = [_choices(each) for each in braces]
    if (max(sizes, default=0) if nested else math.prod(sizes)) > MOST_SHARDS:
        raise _too_many(pattern)


def _choices(inside: str) -> int:
    """Return an upper bound on the choices in a brace: a range of numbers or letters, with a step, or a list."""
    bounds = inside.split("..")
    if len(bounds) < 2:
        return inside.count(",") + 1
    numbers = [int(each[:30]) if re.fullmatch(r"-?\d+", each) else ord(each[0]) if each else 0 for each in bounds[:2]]
    step = int(bounds[2][:30]) if len(bounds) == 3 and re.fullmatch(r"-?\d+", bounds[2]) else 1
    return abs(numbers[1] - numbers[0]) // max(1, abs(step)) + 1


def _too_many(pattern: str) -> UserError:
    hint = "name only existing shards, or their folder"
    return UserError(f"names more than {MOST_SHARDS:,} shards", where=pattern[:200], hint=hint)
