"""Command lines made of dataclasses: a flag for each field, its help from the docstring, its value checked.

A field's annotation says how its text is read: ``int``, ``float``, ``str``, ``Path``, ``bool`` (a switch), ``Literal``
(choices), ``X | None``, ``tuple[X, ...]`` (several values), ``tuple[X, X]`` (two), ``list[X]`` (the flag may be
repeated). In ``Annotated`` may stand limits (`annotated_types.Ge`, `Gt`, `Le`, `Lt`, `Interval`) and a `Flag`. The help
is the field's line under "Attributes:" in the class docstring.
Nothing slow is imported here, so that ``--help`` stays quick; the modules of such dataclasses should do the same.
"""

import argparse
import inspect
import operator
import re
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from hdm_lightning.errors import UserError, did_you_mean

Settings = TypeVar("Settings")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_KINDS = {int: "a whole number", float: "a number"}
_METAVARS = {int: "N", float: "X", Path: "PATH", str: "NAME"}
_LIMITS = {
    "ge": (operator.ge, "is less than {}", "give {} or more"),
    "gt": (operator.gt, "is not more than {}", "give more than {}"),
    "le": (operator.le, "is more than {}", "give {} or less"),
    "lt": (operator.lt, "is not less than {}", "give less than {}"),
}


@dataclass(frozen=True)
class Flag:
    """How a field stands on the command line, where that does not follow from its name and kind.

    Attributes:
        name: of the option, with its dashes; without dashes, the field is a positional argument of that name.
        metavar: stands for the value in the help.
    """

    name: str = ""
    metavar: str = ""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`, with the closest name where one is not known."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but nothing unknown may be left; a subparser suggests from its own options."""
        given, rest = super().parse_known_args(args, namespace)
        if rest:
            known = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"unknown argument {rest[0]!r}", where=self.prog, hint=did_you_mean(rest[0], known))
        return given, rest

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong as a `UserError` that names the argument."""
        about = re.fullmatch(r"argument (\S+): (.*)", message, re.DOTALL)
        where, what = (about[1], about[2]) if about else (self.prog, message)
        hint = f"see `{self.prog} --help`"
        chosen = re.match(r"invalid choice: '(.*?)' \(choose from (.*)\)", what)
        if chosen:
            what, hint = f"{chosen[1]!r} is not known", did_you_mean(chosen[1], re.findall(r"[\w.-]+", chosen[2]))
        raise UserError(what, where=where, hint=hint)


def add_flags(parser: argparse._ActionsContainer, kind: type, *, only: Collection[str] | None = None) -> None:
    """Add a flag for each field of a dataclass.

    Args:
        parser: or an argument group.
        kind: the dataclass; read the result with `read`.
        only: names of the fields to add; None adds all. Fields left out keep their defaults.
    """
    texts = _documented(kind)
    for entry, annotation in _annotated_fields(kind):
        if only is None or entry.name in only:
            _add_flag(parser, entry, annotation, texts.get(entry.name, ""))


def read(kind: type[Settings], given: argparse.Namespace) -> Settings:
    """The dataclass as given on a command line made by `add_flags`, its limits checked.

    Raises:
        UserError: a value cannot be read or is outside its limits; names the flag.
    """
    values = {
        entry.name: _convert(annotation, getattr(given, entry.name), flag_name(entry.name, annotation))
        for entry, annotation in _annotated_fields(kind)
        if hasattr(given, entry.name)
    }
    return check_limits(kind(**values))


def changed(settings: Settings, change: str, *, where: str, only: Collection[str]) -> Settings:
    """The dataclass with one field replaced as in ``key=value``.

    Args:
        settings: to change.
        change: the field's name, with underscores or dashes, and the value's text.
        where: the flag or key to name in errors.
        only: names of the fields that may change.

    Raises:
        UserError: the key is unknown, or the value of another kind or outside its limits.
    """
    key, equals, text = change.partition("=")
    name = key.strip().replace("-", "_")
    if not equals or name not in only:
        hint = did_you_mean(name, only) if equals else f"give KEY=VALUE, KEY one of {', '.join(only)}"
        raise UserError(f"{change!r} changes no setting", where=where, hint=hint)
    annotation = {entry.name: kind for entry, kind in _annotated_fields(type(settings))}[name]
    return check_limits(replace(settings, **{name: _convert(annotation, text.strip(), where)}), where=where)  # type: ignore[type-var]


def check_limits(values: Settings, *, where: str | None = None, group: str | None = None) -> Settings:
    """The same dataclass, if every field is within the limits of its annotation.

    Args:
        values: a dataclass.
        where: what to name in errors; by default the field's flag.
        group: where the fields are keys of a configuration, the group that they stand in.

    Raises:
        UserError: a number is outside its limits.
    """
    for entry, annotation in _annotated_fields(type(values)):
        value = getattr(values, entry.name)
        for each in value if isinstance(value, list | tuple) else [value]:
            key = f"{group}.{entry.name}" if group else where or flag_name(entry.name, annotation)
            _check_number(each, annotation, key)
    return values


def flag_name(name: str, annotation: Any) -> str:
    """The option that stands for a field of that name and annotation."""
    return _flag(annotation).name or "--" + name.replace("_", "-")


def _check_number(value: Any, annotation: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    for constraint in _metadata(annotation):
        for key, (holds, complaint, hint) in _LIMITS.items():
            limit = getattr(constraint, key, None)
            if limit is not None and not holds(value, limit):
                raise UserError(f"{value} {complaint.format(limit)}", where=where, hint=hint.format(limit))


def _add_flag(parser: argparse._ActionsContainer, entry: Field[Any], annotation: Any, text: str) -> None:
    kind, many = _kind(annotation)
    name, required = flag_name(entry.name, annotation), entry.default is MISSING and entry.default_factory is MISSING
    options: dict[str, Any] = {"help": _help(text, entry.default), "default": argparse.SUPPRESS}
    if kind is bool:
        if entry.default:
            parser.add_argument(name, dest=entry.name, action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(name, dest=entry.name, action="store_true", **options)
        return
    options["metavar"] = _flag(annotation).metavar or _metavar(kind)
    if many and get_origin(_present(annotation)) is list:
        options["action"] = "append"
    elif many:
        each = get_args(_present(annotation))
        options["nargs"] = "+" if Ellipsis in each else len(each)
    if name.startswith("-"):
        parser.add_argument(name, dest=entry.name, required=required, **options)
        return
    if not required:
        options["nargs"] = "*" if many else "?"
    parser.add_argument(entry.name, **options)


def _convert(annotation: Any, given: Any, where: str) -> Any:
    """The value of a text or texts; switches are values already."""
    kind, many = _kind(annotation)
    if many:
        return tuple(_convert(kind, each, where) for each in ([given] if isinstance(given, str) else given))
    if not isinstance(given, str):
        return given
    if given.lower() in ("none", "null") and type(None) in get_args(_bare(annotation)):
        return None
    if kind is bool:
        if given.lower() not in (*_TRUE, *_FALSE):
            raise UserError(f"{given!r} is neither true nor false", where=where, hint="give true or false")
        return given.lower() in _TRUE
    if get_origin(kind) is Literal:
        if given not in get_args(kind):
            raise UserError(f"{given!r} is not known", where=where, hint=did_you_mean(given, get_args(kind)))
        return given
    try:
        return kind(given)
    except ValueError as error:
        raise UserError(f"{given!r} is not {_KINDS.get(kind, 'understood')}", where=where, hint="give one") from error


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


def _metadata(annotation: Any) -> Sequence[Any]:
    """What stands beside the kind in ``Annotated``; pydantic's Field holds its limits once more."""
    beside = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return [inner for each in beside for inner in getattr(each, "metadata", [each])]


def _flag(annotation: Any) -> Flag:
    return next((each for each in _metadata(annotation) if isinstance(each, Flag)), Flag())


def _kind(annotation: Any) -> tuple[Any, bool]:
    """The kind of one value, and whether there may be several."""
    kind = _present(annotation)
    return (get_args(kind)[0], True) if get_origin(kind) in (tuple, list) else (kind, False)


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
