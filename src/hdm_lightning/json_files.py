"""JSON and YAML that others may have written: of a bounded size and depth, and a mistake is the file's."""

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hdm_lightning.errors import UserError
from hdm_lightning.regular_files import read_regular

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Kind = TypeVar("Kind")

LARGEST_BYTES = 100_000_000
DEEPEST = 64
"""Levels of brackets: PyYAML's time grows with their square."""
AGAIN = "restore the file, or get it again"


def read_object(path: Path, *, hint: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is not there, too large, no JSON in UTF-8, or something else than an object.
    """
    try:
        content = read_regular(path, LARGEST_BYTES)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", where=str(path), hint=hint) from error
    try:
        return parse_object(content)
    except ValueError as error:
        raise UserError(f"is no JSON object ({error})", where=str(path), hint=hint) from error


def object_or_empty(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, or a kill or a full disk has left half of one."""
    try:
        return parse_object(read_regular(path, LARGEST_BYTES))
    except (OSError, ValueError):
        return {}


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object in a JSON text. Raises ValueError: it is no JSON, in no known encoding, or no object."""
    if not text.strip():
        raise ValueError("it is empty")
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is something else, such as a list or a number")
    return found


def require_shallow(text: str) -> None:
    """Raise ValueError for a text that opens more than `DEEPEST` brackets within each other."""
    depth = 0
    for found in re.finditer(r"[\[{}\]]", text):
        depth = depth + 1 if found[0] in "[{" else max(0, depth - 1)
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")


def typed(kind: type[Kind], values: object) -> Kind | None:
    """Values as a type whose annotations they fit to the letter, such as a NamedTuple; None where they do not."""
    from pydantic import ValidationError  # noqa: PLC0415 (for --help's sake)

    try:
        return _adapter(kind).validate_python(values, strict=True)  # type: ignore[arg-type]
    except ValidationError:
        return None


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter  # noqa: PLC0415 (as above)

    return TypeAdapter(kind)
