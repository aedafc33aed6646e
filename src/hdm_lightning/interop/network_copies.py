"""Files that contain a network more than once, such as weights and their average: select the one to read."""

import shlex
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

from torch import Tensor

from hdm_lightning.errors import UserError, did_you_mean
from hdm_lightning.interop.pipeline_folder import NETWORK_PREFIX
from hdm_lightning.interop.published import BESIDE, PREFIXES, TELLING

SENTINELS = ("patch_embedding.weight", next(iter(TELLING)))
"""A tensor name that every network has, in this project's naming and in the published one."""
USUAL = (NETWORK_PREFIX, *PREFIXES)


def one_network(
    tensors: Mapping[str, Tensor], copy: str | None = None, *, where: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors with a single network among them, and the prefixes of the other networks.

    Args:
        tensors: the tensors of a file.
        copy: prefix of the network to keep; its tensors get the names of the usual one.
        where: the file.

    Raises:
        UserError: there is no network with this prefix, or there are several and none is the usual one.
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
    """Return a message for the user about the copies that were not read."""
    names = [each.rstrip(".") for each in copies]
    command = f"hdm-convert {shlex.quote(str(path))} OUT --copy {shlex.quote(names[0])}"
    return f"{path} contains the network more than once; not read: {', '.join(names)} ({command} extracts one)"


def _require_one(prefixes: list[str], names: Iterable[str], where: str) -> None:
    """Raise UserError if networks are copies of each other and none of them is the usual one."""
    own = [set(_names(prefix, set(prefixes) - {prefix}, names)) for prefix in prefixes]
    if any(2 * len(one & other) >= max(len(one), len(other)) for one, other in combinations(own, 2)):
        known = ", ".join(each.rstrip(".") for each in prefixes)
        hint = f"extract one: hdm-convert {shlex.quote(where)} OUT --copy {shlex.quote(prefixes[0].rstrip('.'))}"
        raise UserError(f"there are several networks, under {known}", where=where, hint=hint)


def _networks(names: Iterable[str]) -> tuple[str | None, list[str]]:
    """Return the prefix of the usual network, None if there is none, and the prefixes of its copies."""
    found = {
        name.removesuffix(each) for name in names for each in SENTINELS if name == each or name.endswith(f".{each}")
    }
    usual = next((each for each in USUAL if each in found), None)
    if usual is None:  # `module.` rather than `ema.module.`
        usual = next((each for each in sorted(found) if all(other.endswith(each) for other in found)), None)
    if usual is None:
        return None, sorted(found)
    others = sorted(found - {usual})
    own = _names(usual, others, names)
    there = set(names)
    return usual, [each for each in others if 2 * sum(f"{each}{name}" in there for name in own) >= len(own)]


def _names(prefix: str, others: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the bare names of one network's tensors."""
    foreign = tuple(each for each in others if each.startswith(prefix))
    mine = [name.removeprefix(prefix) for name in names if name.startswith(prefix) and not name.startswith(foreign)]
    return [name for name in mine if prefix or not name.startswith(BESIDE)]


def _named(copy: str, prefixes: Iterable[str], where: str) -> str:
    """Return the prefix that equals `copy`, or the only one that begins with it."""
    name = copy.rstrip(".")
    found = [each for each in prefixes if each.rstrip(".") == name] or [
        each for each in prefixes if each.startswith(f"{name}.")
    ]
    if len(found) == 1:
        return found[0]
    known = [each.rstrip(".") or "''" for each in prefixes]
    what = f"contains no network under {copy!r}" + (f", only under {', '.join(known)}" if known else "")
    raise UserError(what, where=where, hint=did_you_mean(copy, known) if known else "leave --copy out")
