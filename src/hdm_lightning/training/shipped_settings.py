"""The values that this package's configuration files set for a key, and that a run has unless it sets its own."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

ROOT = Path(str(import_module("hdm_lightning.conf").__file__)).parent
OF_THE_PACKAGE = "# @package _global_"
OF_A_STAGE = "${stage."


def is_shipped(key: str, value: Any) -> bool:
    """Return whether a value may come from this package rather than from the user.

    Args:
        key: its dotted name; keys of a stage are below `stage`.
        value: a plain value.
    """
    shipped = _shipped().get(key, ())
    return any(each == value or (isinstance(each, str) and _follows(each)) for each in shipped)


def _follows(value: str) -> bool:
    """Return whether a value refers to other keys; one that refers to a stage is never recorded, so it was typed."""
    return "${" in value and OF_A_STAGE not in value


@cache
def _shipped() -> dict[str, list[Any]]:
    """Return the values of each key in all files, with interpolations as written."""
    found: dict[str, list[Any]] = defaultdict(list)
    for file in ROOT.rglob("*.yaml"):
        folder = file.parent.relative_to(ROOT).parts
        group = () if file.read_text(encoding="utf-8").startswith(OF_THE_PACKAGE) else folder
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        for key, value in _leaves(values, ".".join(group)):
            found[key].append(value)
    return dict(found)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}".lstrip("."))
    else:
        yield key, value
