"""Files that hold a network more than once, as trainers write weights and their average: which one is read."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

from torch import Tensor

from hdm_lightning.errors import UserError, did_you_mean
from hdm_lightning.interop.pipeline_folder import NETWORK_PREFIX
from hdm_lightning.interop.published import BESIDE, PREFIXES, TELLING

SENTINELS = ("patch_embedding.weight", next(iter(TELLING)))
"""A name that every network has, under this project's names and under the published ones."""
USUAL = (NETWORK_PREFIX, *PREFIXES)


def one_network(
    tensors: Mapping[str, Tensor], copy: str | None = None, *, where: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors with one network alone among them, and what stands before the names of the others.

    Args:
        tensors: of a file.
        copy: what stands before the names of the one that is meant; its names get those of the usual one.
        where: the file.

    Raises:
        UserError: there is no network of that name.
    """
    usual, copies = _networks(tensors)
    if usual is None and (copy is None or not copies):
        _require_one(copies, tensors, where)
    every = copies if usual is None else [usual, *copies]
    chosen = usual if copy is None else _named(copy, every, where)
    if chosen is None:
        return dict(tensors), ()
    usual = chosen if usual is None else usual
    own = _names(usual, set(every) - {usual}, tensors)
    networks = {f"{prefix}{name}" for prefix in every for name in own}
    beside = {name: tensor for name, tensor in tensors.items() if name not in networks}
    network = {f"{usual}{name}": tensors[f"{chosen}{name}"] for name in own if f"{chosen}{name}" in tensors}
    return beside | network, tuple(copies) if copy is None else ()


def told(path: str | Path, copies: Iterable[str]) -> str:
    """What the user of a file should know of the copies that were not read."""
    names = [each.rstrip(".") for each in copies]
    command = f"hdm-convert {shlex.quote(str(path))} OUT --copy {shlex.quote(names[0])}"
    return f"{path} holds the network more than once; not read: {', '.join(names)} ({command} writes that one)"


def _require_one(prefixes: list[str], names: Iterable[str], where: str) -> None:
    """Raise UserError where networks of which none is the usual one are copies of each other."""
    own = [set(_names(prefix, set(prefixes) - {prefix}, names)) for prefix in prefixes]
    if any(2 * len(one & other) >= max(len(one), len(other)) for one, other in combinations(own, 2)):
        known = ", ".join(each.rstrip(".") for each in prefixes)
        hint = f"take one out: hdm-convert {shlex.quote(where)} OUT --copy {shlex.quote(prefixes[0].rstrip('.'))}"
        raise UserError(f"there are several networks, under {known}", where=where, hint=hint)


def _networks(names: Iterable[str]) -> tuple[str | None, list[str]]:
    """What stands before the usual network's names, None where none is, and before those of its copies."""
    found = {
        name.removesuffix(each) for name in names for each in SENTINELS if name == each or name.endswith(f".{each}")
    }
    usual = next((each for each in USUAL if each in found), None)
    if usual is None:  # of `module.` and `ema.module.` the first
        usual = next((each for each in sorted(found) if all(other.endswith(each) for other in found)), None)
    if usual is None:
        return None, sorted(found)
    others = sorted(found - {usual})
    own = _names(usual, others, names)
    there = set(names)
    return usual, [each for each in others if 2 * sum(f"{each}{name}" in there for name in own) >= len(own)]


def _names(prefix: str, others: Iterable[str], names: Iterable[str]) -> list[str]:
    """The bare names of one network's tensors."""
    foreign = tuple(each for each in others if each.startswith(prefix))
    mine = [name.removeprefix(prefix) for name in names if name.startswith(prefix) and not name.startswith(foreign)]
    return [name for name in mine if prefix or not name.startswith(BESIDE)]


def _named(copy: str, prefixes: Iterable[str], where: str) -> str:
    """The prefix that a user means by it, or by the beginning of it."""
    name = copy.rstrip(".")
    found = [each for each in prefixes if each.rstrip(".") == name] or [
        each for each in prefixes if each.startswith(f"{name}.")
    ]
    if len(found) == 1:
        return found[0]
    known = [each.rstrip(".") or "''" for each in prefixes]
    what = f"holds no network under {copy!r}" + (f", but under {', '.join(known)}" if known else "")
    raise UserError(what, where=where, hint=did_you_mean(copy, known) if known else "leave --copy out")
