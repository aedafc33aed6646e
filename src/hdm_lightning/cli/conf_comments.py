"""Read the comments in `conf/`: the header comment of a file, and the comments beside its keys."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import yaml

from hdm_lightning.cli.overrides import CONF

ROOT = Path(str(resources.files(CONF)))
_GLOBAL = "# @package _global_\n"
_PACKAGE = re.compile(r"\A# @package .*\n")
_LEAD_IN = re.compile(r"(?<=[.:;])\s(?:(?![.:;]\s).)*:$")
"""The last clause of a paragraph, if it introduces the command below."""
_COMMENT = re.compile(r"(?:^|\s)#\s?(.*)$")


@dataclass(frozen=True)
class ConfFile:
    """One file of `conf/`.

    Attributes:
        path: path of the file.
        is_global: whether its package is `_global_`, so that its keys are top-level.
        head: first paragraph of its header comment.
        comments: dotted key to the complete comment beside it; empty if there is none.
        parents: files of the same group in its defaults list, the last takes precedence.
    """

    path: Path
    is_global: bool
    head: str
    comments: dict[str, str]
    parents: tuple[str, ...]


@cache
def conf_file(path: Path) -> ConfFile:
    """Parse a file."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    root = yaml.compose(text)
    beside = dict(_beside(root, lines, "")) if isinstance(root, yaml.MappingNode) else {}
    defaults = (yaml.safe_load(text) or {}).get("defaults", ())
    parents = tuple(each for each in defaults if isinstance(each, str) and each != "_self_")
    return ConfFile(path, text.startswith(_GLOBAL), first_paragraph(text), beside, parents)


def lineage(path: Path) -> Iterator[ConfFile]:
    """Yield a file and the files it inherits from, in order of precedence."""
    file = conf_file(path)
    yield file
    for parent in reversed(file.parents):
        yield from lineage(path.with_name(f"{parent}.yaml"))


def first_paragraph(text: str) -> str:
    """Return the first paragraph of a file's header comment."""
    lines = []
    for line in _PACKAGE.sub("", text).splitlines():
        if not line.startswith("# ") or line.startswith("#   "):
            break
        lines.append(line.lstrip("# "))
    return _LEAD_IN.sub("", " ".join(lines)).rstrip(":;")


def _beside(node: yaml.MappingNode, lines: list[str], above: str) -> Iterator[tuple[str, str]]:
    for key, value in node.value:
        name = f"{above}{key.value}"
        block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        mark = key.end_mark if block else value.end_mark
        yield name, _comment(lines, mark.line, mark.column)
        if isinstance(value, yaml.MappingNode):
            yield from _beside(value, lines, f"{name}.")


def _comment(lines: list[str], number: int, column: int) -> str:
    """Return the comment after a position, with the lines below that continue it at the same column."""
    found = _COMMENT.search(lines[number], column) if number < len(lines) else None
    if found is None:
        return ""
    texts, start = [found[1]], lines[number].index("#", column)
    for line in lines[number + 1 :]:
        if not line.startswith(" " * start + "#"):
            break
        texts.append(line.strip("# "))
    return " ".join(each.strip() for each in texts)
