"""Read JSON and YAML from untrusted files: size and depth are bounded, and errors name the file."""

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
"""Largest depth of nested brackets: PyYAML's run time grows with the square of it."""
AGAIN = "restore the file, or get it again"


def read_object(path: Path, *, hint: str = AGAIN) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: the file is missing, too large, not JSON in UTF-8, or not an object.
    """
    try:
        content = read_regular(path, LARGEST_BYTES)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", where=str(path), hint=hint) from error
    try:
        return parse_object(content)
    except ValueError as error:
        raise UserError(f"is not a JSON object ({error})", where=str(path), hint=hint) from error


def object_or_empty(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if it is missing, or cut short by a kill or a full disk."""
    try:
        return parse_object(read_regular(path, LARGEST_BYTES))
    except (OSError, ValueError):
        return {}


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the object in a JSON text. Raises ValueError: not JSON, of unknown encoding, or not an object."""
    if not text.strip():
        raise ValueError("it is empty")
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is another kind of value, such as a list or a number")
    return found


def require_shallow(text: str) -> None:
    """Raise ValueError if a text nests more than `DEEPEST` levels of brackets."""
    depth = 0
    for found in re.finditer(r"[\[{}\]]", text):
        depth = depth + 1 if found[0] in "[{" else max(0, depth - 1)
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")


def typed(kind: type[Kind], values: object) -> Kind | None:
    """Return values as a type, such as a NamedTuple, or None if they do not match its annotations exactly."""
    from pydantic import ValidationError  # noqa: PLC0415 (keeps --help fast)

    try:
        return _adapter(kind).validate_python(values, strict=True)  # type: ignore[arg-type]
    except ValidationError:
        return None


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter  # noqa: PLC0415 (as above)

    return TypeAdapter(kind)
