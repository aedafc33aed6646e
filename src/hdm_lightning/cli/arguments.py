"""Command lines from dataclasses: one flag per field, with help from the docstring and a checked value.

A field's annotation determines how pydantic parses its value: ``int``, ``float``, ``str``, ``Path``, ``bool`` (a
switch), ``Literal`` (choices), ``X | None``, ``tuple[X, ...]`` (several values), ``tuple[X, X]`` (two), ``list[X]``
(a repeatable flag). Limits go in ``Annotated`` (`annotated_types.Ge`, `Gt`, `Le`, `Lt`, `Interval`), for several
values inside the X. The help is the field's line under "Attributes:" in the class docstring. Nothing slow is imported
here, to keep ``--help`` fast; modules that define such dataclasses should do the same.
"""

import argparse
import inspect
import os
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from hdm_lightning.cli.docstrings import described
from hdm_lightning.errors import UserError, did_you_mean
from hdm_lightning.version import __version__

Settings = TypeVar("Settings")

_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
_METAVARS = {int: "N", float: "X", Path: "PATH", str: "NAME"}
_LIMITS = {
    "greater_than_equal": ("ge", "is below {}", "use {} or more"),
    "greater_than": ("gt", "is not above {}", "use more than {}"),
    "less_than_equal": ("le", "is above {}", "use {} or less"),
    "less_than": ("lt", "is not below {}", "use less than {}"),
}
"""Pydantic error type to the key of its limit, the message and the hint."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` and suggests the closest name for an unknown one."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings})
        if " " not in self.prog:  # a command itself, not a subcommand
            self.add_argument("--version", action="version", version=f"hdm-lightning {__version__}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but reject unknown arguments; a subparser suggests its own options."""
        given, rest = super().parse_known_args(args, namespace)
        self._require_none_left(rest)
        return given, rest

    def _require_none_left(self, rest: list[str]) -> None:
        if not rest:
            return
        if not rest[0].startswith("-"):
            hint = f"quote arguments that contain spaces; see `{self.prog} --help`"
            raise UserError(f"unexpected argument {rest[0]!r}", where=self.prog, hint=hint)
        known = [option for action in self._actions for option in action.option_strings]
        raise UserError(f"unknown argument {rest[0]!r}", where=self.prog, hint=did_you_mean(rest[0], known))

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a `UserError` that names the argument."""
        about = re.fullmatch(r"argument (\S+): (.*)", message, re.DOTALL)
        where, what = (about[1], about[2]) if about else (self.prog, message)
        hint = f"see `{self.prog} --help`"
        chosen = re.match(r"invalid choice: '(.*?)' \(choose from (.*)\)", what)
        if chosen:
            what, hint = f"{chosen[1]!r} is not known", did_you_mean(chosen[1], re.findall(r"[\w.-]+", chosen[2]))
        raise UserError(what, where=where, hint=hint)


class IntermixedParser(Parser):
    """A parser whose positional arguments may come before, between or after the options.

    argparse parses them in two passes; the first leaves arguments over.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Run one pass, as in argparse."""
        return super(Parser, self).parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Run both passes, then reject unknown arguments."""
        given, rest = self.parse_known_intermixed_args(args, namespace)
        self._require_none_left(rest)
        positional = [vars(given).get(action.dest) for action in self._actions if not action.option_strings]
        for word in [word for value in positional for word in (value if isinstance(value, list) else [value])]:
            self._require_no_override(str(word))
        return given

    def _require_no_override(self, word: str) -> None:
        """Reject ``steps=4``: a prompt may be any text, but this is meant as an option, written as `hdm-train` does."""
        name, equals, value = word.partition("=")
        flag = f"--{name.replace('_', '-')}"
        if equals and flag in self._option_string_actions and not os.path.exists(word):  # text of any length
            option = f"{self.prog} takes flags: {flag} {shlex.quote(value)}"
            hint = f"{option}; to use it as text, put a space before it"
            raise UserError("is an option without dashes", where=word, hint=hint)


@dataclass(frozen=True)
class Flags(Generic[Settings]):
    """The flags of a dataclass.

    Attributes:
        kind: the dataclass.
        names: flags that differ from the field's name, as ``{"context_length": "--context N"}``; a name without
            dashes makes a positional argument. The second word is the metavar.
    """

    kind: type[Settings]
    names: Mapping[str, str] = field(default_factory=dict)

    def add(self, parser: argparse._ActionsContainer, *, only: Collection[str] | None = None) -> None:
        """Add the flags of all fields, or `only` of some, to a parser or group; the others keep their defaults."""
        texts = _documented(self.kind)
        for entry, annotation in _annotated_fields(self.kind):
            if only is None or entry.name in only:
                self._add_flag(parser, entry, annotation, texts.get(entry.name, ""))

    def read(self, given: argparse.Namespace) -> Settings:
        """Return the dataclass with the command line's values, checked against their limits.

        Raises:
            UserError: a value cannot be parsed or is outside its limits; names the flag.
        """
        values = {
            entry.name: _valid(annotation, getattr(given, entry.name), self.flag(entry.name))
            for entry, annotation in _annotated_fields(self.kind)
            if hasattr(given, entry.name)
        }
        return self.kind(**values)

    def changed(self, settings: Settings, change: str, *, where: str, only: Collection[str]) -> Settings:
        """Return a copy with one field changed as in ``key=value``; the key may have underscores or dashes.

        Raises:
            UserError: the key is not in `only`, or the value has the wrong type or is outside its limits; names the
                option `where`.
        """
        key, equals, text = change.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or name not in only:
            hint = did_you_mean(name, only) if equals else f"use KEY=VALUE with one of the keys {', '.join(only)}"
            raise UserError(f"{change!r} does not change a setting", where=where, hint=hint)
        annotation = {entry.name: kind for entry, kind in _annotated_fields(self.kind)}[name]
        return replace(settings, **{name: _valid(annotation, text.strip(), where)})  # type: ignore[type-var]

    def flag(self, name: str) -> str:
        """Return the flag of a field."""
        return self.names.get(name, "--" + name.replace("_", "-")).split()[0]

    def _add_flag(self, parser: argparse._ActionsContainer, entry: Field[Any], annotation: Any, text: str) -> None:
        kind, many = _kind(annotation)
        flag, required = self.flag(entry.name), entry.default is MISSING and entry.default_factory is MISSING
        options: dict[str, Any] = {"help": _help(text, entry.default), "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction if entry.default else "store_true"
            parser.add_argument(flag, dest=entry.name, **options)
            return
        own = self.names.get(entry.name, "").split()[flag.startswith("-") :]
        options["metavar"] = own[0] if own else _metavar(kind)
        if many:
            options |= _several(annotation)
        if flag.startswith("-"):
            parser.add_argument(flag, dest=entry.name, required=required, **options)
            return
        if not required:
            options["nargs"] = "*" if many else "?"
        parser.add_argument(entry.name, **options)


def _valid(annotation: Any, given: Any, where: str) -> Any:
    """Return the parsed value, checked against its limits."""
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415  (takes 0.1 s; keeps --help fast)

    kind, many = _kind(annotation)
    if isinstance(given, str) and given.lower() in ("none", "null") and type(None) in get_args(_bare(annotation)):
        return None
    try:
        return TypeAdapter(annotation).validate_python([given] if many and isinstance(given, str) else given)
    except ValidationError as error:
        raise _as_user_error(dict(error.errors()[0]), kind, where) from error


def _as_user_error(error: dict[str, Any], kind: Any, where: str) -> UserError:
    given = error["input"]
    if error["type"] in _LIMITS and given == given:  # NaN is beyond every limit
        key, complaint, hint = _LIMITS[error["type"]]
        bound = error["ctx"][key]
        limit = int(bound) if bound == int(bound) else bound
        return UserError(f"{given} {complaint.format(limit)}", where=where, hint=hint.format(limit))
    if error["type"] == "literal_error":
        return UserError(f"{given!r} is not known", where=where, hint=did_you_mean(str(given), get_args(kind)))
    hint = "use true or false" if kind is bool else "use one"
    return UserError(f"{given!r} is not {_KINDS.get(kind, 'a valid value')}", where=where, hint=hint)


def _annotated_fields(kind: type) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return [(entry, hints[entry.name]) for entry in fields(kind) if entry.init]


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _present(annotation: Any) -> Any:
    """Return the type without None."""
    kind = _bare(annotation)
    if get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    return kind


def _several(annotation: Any) -> dict[str, Any]:
    """Return argparse options for several values: a repeatable flag, or one flag followed by all values."""
    kind = _present(annotation)
    if get_origin(kind) is list:
        return {"action": "append"}
    return {"nargs": "+" if Ellipsis in get_args(kind) else len(get_args(kind))}


def _kind(annotation: Any) -> tuple[Any, bool]:
    """Return the type of one value, and whether several are allowed."""
    kind = _present(annotation)
    return (_bare(get_args(kind)[0]), True) if get_origin(kind) in (tuple, list) else (kind, False)


def _metavar(kind: Any) -> str:
    return "{" + ",".join(get_args(kind)) + "}" if get_origin(kind) is Literal else _METAVARS.get(kind, "VALUE")


def _help(text: str, default: Any) -> str:
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    complete = shown in (None, "", False, MISSING) or "default" in text
    return (text if complete else f"{text} (default: {shown})").replace("%", "%%")


def _documented(kind: type) -> dict[str, str]:
    """Return each field's text under "Attributes:", including base classes."""
    texts: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        texts |= described(inspect.cleandoc(each.__dict__.get("__doc__") or ""), "Attributes")
    return {name: text.replace("`", "").removesuffix(".") for name, text in texts.items()}
