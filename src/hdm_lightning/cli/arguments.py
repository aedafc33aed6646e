"""Command lines made of dataclasses: a flag for each field, its help from the docstring, its value checked.

A field's annotation says how pydantic reads its text: ``int``, ``float``, ``str``, ``Path``, ``bool`` (a switch),
``Literal`` (choices), ``X | None``, ``tuple[X, ...]`` (several values), ``tuple[X, X]`` (two), ``list[X]`` (the flag
may be repeated); limits stand in ``Annotated`` (`annotated_types.Ge`, `Gt`, `Le`, `Lt`, `Interval`), those of several
values in the X. The help is the field's line under "Attributes:" in the class docstring. Nothing slow is imported here,
so that ``--help`` stays quick; the modules of such dataclasses should do the same.
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

from hdm_lightning.errors import UserError, did_you_mean
from hdm_lightning.version import __version__

Settings = TypeVar("Settings")

_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
_METAVARS = {int: "N", float: "X", Path: "PATH", str: "NAME"}
_LIMITS = {
    "greater_than_equal": ("ge", "is below {}", "give {} or more"),
    "greater_than": ("gt", "is not above {}", "give more than {}"),
    "less_than_equal": ("le", "is above {}", "give {} or less"),
    "less_than": ("lt", "is not below {}", "give less than {}"),
}
"""By pydantic's name of an error: where its limit stands, what to say, what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`, with the closest name where one is not known."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings})
        if " " not in self.prog:  # a command's own, not one of its parts
            self.add_argument("--version", action="version", version=f"hdm-lightning {__version__}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but nothing unknown may be left; a subparser suggests from its own options."""
        given, rest = super().parse_known_args(args, namespace)
        self._require_none_left(rest)
        return given, rest

    def _require_none_left(self, rest: list[str]) -> None:
        if not rest:
            return
        if not rest[0].startswith("-"):
            hint = f"put quotes around what has spaces in it; see `{self.prog} --help`"
            raise UserError(f"{rest[0]!r} is one word too many", where=self.prog, hint=hint)
        known = [option for action in self._actions for option in action.option_strings]
        raise UserError(f"unknown argument {rest[0]!r}", where=self.prog, hint=did_you_mean(rest[0], known))

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong as a `UserError` that names the argument."""
        about = re.fullmatch(r"argument (\S+): (.*)", message, re.DOTALL)
        where, what = (about[1], about[2]) if about else (self.prog, message)
        hint = f"see `{self.prog} --help`"
        chosen = re.match(r"invalid choice: '(.*?)' \(choose from (.*)\)", what)
        if chosen:
            what, hint = f"{chosen[1]!r} is not known", did_you_mean(chosen[1], re.findall(r"[\w.-]+", chosen[2]))
        raise UserError(what, where=where, hint=hint)


class IntermixedParser(Parser):
    """Of a command with optional arguments that may stand before, between or behind its options.

    argparse reads them in two turns, with arguments left over by the first.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """One turn, as in argparse."""
        return super(Parser, self).parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Both turns, after which nothing unknown may be left."""
        given, rest = self.parse_known_intermixed_args(args, namespace)
        self._require_none_left(rest)
        positional = [vars(given).get(action.dest) for action in self._actions if not action.option_strings]
        for word in [word for value in positional for word in (value if isinstance(value, list) else [value])]:
            self._require_no_override(str(word))
        return given

    def _require_no_override(self, word: str) -> None:
        """A prompt may be any text, but ``steps=4`` was meant for an option, as `hdm-train` takes its keys."""
        name, equals, value = word.partition("=")
        flag = f"--{name.replace('_', '-')}"
        if equals and flag in self._option_string_actions and not os.path.exists(word):  # also of any length
            option = f"{self.prog} takes flags: {flag} {shlex.quote(value)}"
            hint = f"{option}; a text that reads so is given with a space before it"
            raise UserError("is an option without its dashes", where=word, hint=hint)


@dataclass(frozen=True)
class Flags(Generic[Settings]):
    """The flags of a dataclass.

    Attributes:
        kind: the dataclass.
        names: fields whose flag is not just their name, as ``{"context_length": "--context N"}``; a name without
            dashes makes a positional argument. The second word stands for the value in the help.
    """

    kind: type[Settings]
    names: Mapping[str, str] = field(default_factory=dict)

    def add(self, parser: argparse._ActionsContainer, *, only: Collection[str] | None = None) -> None:
        """Add the flags to a parser or a group of one.

        Args:
            parser: to add to; nothing given leaves the dataclass's own defaults.
            only: names of the fields to add; None adds all.
        """
        texts = _documented(self.kind)
        for entry, annotation in _annotated_fields(self.kind):
            if only is None or entry.name in only:
                self._add_flag(parser, entry, annotation, texts.get(entry.name, ""))

    def read(self, given: argparse.Namespace) -> Settings:
        """The dataclass as given on the command line, its limits checked.

        Raises:
            UserError: a value cannot be read or is outside its limits; names the flag.
        """
        values = {
            entry.name: _valid(annotation, getattr(given, entry.name), self.flag(entry.name))
            for entry, annotation in _annotated_fields(self.kind)
            if hasattr(given, entry.name)
        }
        return self.kind(**values)

    def changed(self, settings: Settings, change: str, *, where: str, only: Collection[str]) -> Settings:
        """The dataclass with one field replaced as in ``key=value``.

        Args:
            settings: to change.
            change: the field's name, with underscores or dashes, and the value's text.
            where: what to name in errors.
            only: names of the fields that may change.

        Raises:
            UserError: the key is unknown, or the value of another kind or outside its limits.
        """
        key, equals, text = change.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or name not in only:
            hint = did_you_mean(name, only) if equals else f"give KEY=VALUE, KEY one of {', '.join(only)}"
            raise UserError(f"{change!r} changes no setting", where=where, hint=hint)
        annotation = {entry.name: kind for entry, kind in _annotated_fields(self.kind)}[name]
        return replace(settings, **{name: _valid(annotation, text.strip(), where)})  # type: ignore[type-var]

    def flag(self, name: str) -> str:
        """The flag of a field."""
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
    """What was given, read from its text or texts and within its limits."""
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415  (a tenth of a second, for --help's sake)

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
    hint = "give true or false" if kind is bool else "give one"
    return UserError(f"{given!r} is not {_KINDS.get(kind, 'understood')}", where=where, hint=hint)


def _annotated_fields(kind: type) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return [(entry, hints[entry.name]) for entry in fields(kind) if entry.init]


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _present(annotation: Any) -> Any:
    """The kind of a value that is not None."""
    kind = _bare(annotation)
    if get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    return kind


def _several(annotation: Any) -> dict[str, Any]:
    """How argparse takes several values: one each time the flag stands there, or all after one flag."""
    kind = _present(annotation)
    if get_origin(kind) is list:
        return {"action": "append"}
    return {"nargs": "+" if Ellipsis in get_args(kind) else len(get_args(kind))}


def _kind(annotation: Any) -> tuple[Any, bool]:
    """The kind of one value, and whether there may be several."""
    kind = _present(annotation)
    return (_bare(get_args(kind)[0]), True) if get_origin(kind) in (tuple, list) else (kind, False)


def _metavar(kind: Any) -> str:
    return "{" + ",".join(get_args(kind)) + "}" if get_origin(kind) is Literal else _METAVARS.get(kind, "VALUE")


def _help(text: str, default: Any) -> str:
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    complete = shown in (None, "", False, MISSING) or "default" in text
    return (text if complete else f"{text} (default: {shown})").replace("%", "%%")


def _documented(kind: type) -> dict[str, str]:
    """Field to its lines under "Attributes:", base classes included."""
    texts: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        lines = inspect.cleandoc(each.__dict__.get("__doc__") or "")
        found = re.search(r"^Attributes:\n((?: .*\n?|\n)*)", lines, re.MULTILINE)
        for line in re.split(r"\n {4}(?! )", "\n" + found[1]) if found else ():
            names, _, text = line.partition(": ")
            plain = " ".join(text.split()).replace("`", "").removesuffix(".")
            texts |= dict.fromkeys(names.split(", "), plain)
    return texts
