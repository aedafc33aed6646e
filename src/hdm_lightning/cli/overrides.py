"""Arguments of the Hydra commands before Hydra sees them: flags in any place, a sweep's names, what to quote."""

import hashlib
import re
import shlex
from collections.abc import Sequence
from importlib import resources

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, QuotedString
from hydra.errors import HydraException

from hdm_lightning.errors import UserError

WITH_VALUE = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p", "--cfg", "-c")
"""Flags of Hydra that are followed by a value."""
MULTIRUN = ("-m", "--multirun")
MODES = {
    **dict.fromkeys(MULTIRUN, "-m"),
    **dict.fromkeys(("-c", "--cfg"), "--cfg"),
    **dict.fromkeys(("-i", "--info"), "--info"),
    **dict.fromkeys(("-r", "--run"), "--run"),
}
"""What Hydra does one of, by its flags; it ends in a stack trace where it is given two."""
SUBDIR, EXCLUDED = "hydra.sweep.subdir", "hydra.job.config.override_dirname.exclude_keys"

MOST_DIGITS = re.compile(r"\d{4300}")
"""What Python reads as no number any more."""

EXPLAIN = "--explain"
"""The flag that asks what keys mean; words beside it are keys and overrides."""


def arranged(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra wants them: flags first; in a sweep jobs are named by what differs between them.

    What all jobs share goes into their folders' names as a hash, so that the same command finds its folders again and
    another one does not.

    Raises:
        UserError: an argument cannot be parsed, where the hint is the argument quoted; flags contradict each other.
    """
    flags, rest = _apart(arguments)
    for argument in filter(MOST_DIGITS.search, arguments):
        raise UserError("has thousands of digits", where=argument[:60], hint="give a number of fewer digits")
    modes = list(dict.fromkeys(MODES[name] for flag in flags if (name := flag.partition("=")[0]) in MODES))
    if len(modes) > 1:
        raise UserError(f"does not go with {modes[1]}", where=modes[0], hint=f"leave {modes[0]} or {modes[1]} out")
    overrides = [argument for argument in rest if "=" in argument or argument.startswith("~")]
    for override in overrides:
        _require_choice(override)
    fixed = [override for override in overrides if not _varies(override)]
    if not set(MULTIRUN) & set(flags) or not fixed or any(each.startswith((SUBDIR, EXCLUDED)) for each in overrides):
        return [*flags, *rest]
    digest = hashlib.blake2b("\n".join(sorted(fixed)).encode("utf-8", "replace"), digest_size=3).hexdigest()
    keys = ",".join(_quoted(_key(override)) for override in fixed if not _key(override).startswith("hydra."))
    name = f'{SUBDIR}="${{hdm.short:${{hydra.job.override_dirname}}}}-{digest}"'
    return [*flags, *rest, f"{EXCLUDED}=[{keys}]", name]


def _require_choice(override: str) -> None:
    """Raise UserError for a group that is given something else than names of its files: Hydra ends in a stack trace."""
    key, _, text = override.lstrip("+").partition("=")
    choices = _choices(key)
    if not choices or override.startswith("~"):
        return
    try:
        parsed = OverridesParser.create().parse_override(override)
        if isinstance(parsed.value(), Glob):  # of the group's own files
            return
        values = list(parsed.sweep_iterator()) if parsed.is_choice_sweep() else [parsed.value()]
    except HydraException as error:
        raise unparsable(override) from error
    for value in values:
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str | dict | QuotedString) for name in names):
            choice = f"{key}=none" if "none" in choices else f"leave it out, or choose one: {', '.join(choices)}"
            raise UserError(f"{text} is no file of this group", where=key, hint=choice)


def _choices(group: str) -> list[str]:
    """The files of a group of this package or of Hydra, none where it is no group."""
    if not re.fullmatch(r"\w+(/\w+)?", group):
        return []
    places = [resources.files("hdm_lightning.conf") / group, resources.files("hydra.conf") / group]
    files = [file.name for place in places if place.is_dir() for file in place.iterdir()]
    return sorted({name.removesuffix(".yaml") for name in files if name.endswith(".yaml")})


def _apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and the rest, each in their order."""
    flags: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        is_flag = argument.startswith("-") and argument != "-"
        (flags if is_flag else rest).append(argument)
        if argument in WITH_VALUE:
            flags += [value for value in [next(waiting, None)] if value is not None]
    return flags, rest


def _varies(override: str) -> bool:
    """Whether an override has several values."""
    try:
        return bool(OverridesParser.create().parse_override(override).is_sweep_override())
    except HydraException as error:
        raise unparsable(override) from error


def _key(override: str) -> str:
    """The key or group of an override that can be parsed."""
    return str(OverridesParser.create().parse_override(override).key_or_group)


def unparsable(override: str) -> UserError:
    """The error for an override that Hydra cannot parse, with one that it can."""
    key, equals, value = override.partition("=")
    quoted = f"{key.strip()}={_quoted_list(value.strip()) or _quoted(value.strip())}"
    try:
        OverridesParser.create().parse_override(quoted)
    except HydraException:
        equals = ""
    if not equals:
        hint = "give KEY=VALUE, GROUP=CHOICE or ~KEY; `--cfg job` shows every key, `--help` the groups"
        return UserError("cannot be parsed", where=override, hint=hint)
    what = "has letters that mean something to Hydra, which quotation marks prevent, those for the shell around them"
    return UserError(what, where=override, hint=shlex.quote(quoted))


def _quoted_list(value: str) -> str | None:
    """A list whose entries are quoted where Hydra cannot parse them; None for what is no plain list."""
    inside = value[1:-1]
    if value[:1] + value[-1:] != "[]" or any(mark in inside for mark in "[]{}()'\""):
        return None
    return "[" + ",".join(map(_quoted_if_need_be, inside.split(","))) + "]"


def _quoted_if_need_be(entry: str) -> str:
    try:
        OverridesParser.create().parse_override(f"key={entry.strip()}")
    except HydraException:
        return _quoted(entry.strip())
    return entry.strip()


def _quoted(value: str) -> str:
    """A text as a string of Hydra's grammar, where backslashes before a quotation mark, and only there, are doubled."""
    mark = "'" if '"' in value and "'" not in value else '"'
    parts = value.split(mark)
    doubled = [part + "\\" * (len(part) - len(part.rstrip("\\"))) for part in parts]
    return mark + f"\\{mark}".join(doubled) + mark
