"""Arguments of Hydra commands: order, sweep folder names, quoting, hints for mistyped ones, composition."""

import difflib
import hashlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from hdm_lightning.errors import UserError

CONF = "hdm_lightning.conf"
LONGEST_FOLDER_NAME = 120
"""In bytes, as file systems count."""

WITH_VALUE = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p", "--cfg", "-c")
"""Hydra flags that are followed by a value."""
MULTIRUN = ("-m", "--multirun")
MODES = {
    **dict.fromkeys(MULTIRUN, "-m"),
    **dict.fromkeys(("-c", "--cfg"), "--cfg"),
    **dict.fromkeys(("-i", "--info"), "--info"),
    **dict.fromkeys(("-r", "--run"), "--run"),
}
"""Hydra's mutually exclusive modes by flag; it crashes with a stack trace if two are used."""
SUBDIR, EXCLUDED = "hydra.sweep.subdir", "hydra.job.config.override_dirname.exclude_keys"

_KEY = re.compile(r"Could not override '([^']+)'")
_CHOICE = re.compile(r"Could not find '([^']+)/([^'/]+)'")
_OPTION = re.compile(r"^\t(\w\S*)$", re.MULTILINE)
USUAL = "`--help` shows the groups, their choices and every key, `--explain KEY` what a key means"

MOST_DIGITS = re.compile(r"\d{4300}")
"""More digits than Python converts to an integer."""

EXPLAIN = "--explain"
"""The flag that explains keys; its arguments are keys and overrides."""


def composed(config_name: str, overrides: Sequence[str] = (), **options: Any) -> DictConfig:
    """Return a command's configuration as it composes it; `options` are those of `hydra.compose`.

    Raises:
        HydraException: the overrides do not compose.
    """
    OmegaConf.register_new_resolver("hdm.short", short_name, replace=True)
    GlobalHydra.instance().clear()  # Hydra composes for one command at a time
    with initialize_config_module(CONF, version_base="1.3"):
        return compose(config_name, overrides=list(overrides), **options)


def short_name(text: str) -> str:
    """Return a folder name for a job's overrides: unchanged if short, else its beginning and a hash."""
    safe = text.replace("/", "-")
    content = os.fsencode(safe)
    if len(content) <= LONGEST_FOLDER_NAME:
        return safe or "job"
    digest = hashlib.blake2b(content, digest_size=6).hexdigest()
    return f"{content[: LONGEST_FOLDER_NAME - 13].decode(errors='ignore')}-{digest}"


def arranged(arguments: Sequence[str]) -> list[str]:
    """Return the arguments in Hydra's order: flags first; in a sweep, jobs are named by the overrides that vary.

    The overrides that all jobs share go into the folder names as a hash, so the same command finds its folders again
    and another one does not.

    Raises:
        UserError: an argument cannot be parsed (the hint quotes it), or flags contradict each other.
    """
    flags, rest = _apart(arguments)
    for argument in filter(MOST_DIGITS.search, arguments):
        raise UserError("has thousands of digits", where=argument[:60], hint="use a number with fewer digits")
    modes = list(dict.fromkeys(MODES[name] for flag in flags if (name := flag.partition("=")[0]) in MODES))
    if len(modes) > 1:
        raise UserError(f"cannot be combined with {modes[1]}", where=modes[0], hint=f"omit {modes[0]} or {modes[1]}")
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
    """Raise UserError if a group is set to anything but names of its files, for which Hydra crashes."""
    key, _, text = override.lstrip("+").partition("=")
    choices = _choices(key)
    if not choices or override.startswith("~"):
        return
    try:
        parsed = OverridesParser.create().parse_override(override)
        if isinstance(parsed.value(), Glob):  # expands to the group's own files
            return
        values = list(parsed.sweep_iterator()) if parsed.is_choice_sweep() else [parsed.value()]
    except HydraException as error:
        raise unparsable(override) from error
    for value in values:
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str | dict | QuotedString) for name in names):
            choice = f"{key}=none" if "none" in choices else f"omit it, or choose one: {', '.join(choices)}"
            raise UserError(f"{text} is not an option of this group", where=key, hint=choice)


def _choices(group: str) -> list[str]:
    """Return the options of a group of this package or of Hydra; empty if it is not a group."""
    if not re.fullmatch(r"\w+(/\w+)?", group):
        return []
    places = [resources.files(CONF) / group, resources.files("hydra.conf") / group]
    files = [file.name for place in places if place.is_dir() for file in place.iterdir()]
    return sorted({name.removesuffix(".yaml") for name in files if name.endswith(".yaml")})


def _apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags with their values, and the remaining arguments, both in order."""
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
    """Return whether an override is a sweep."""
    try:
        return bool(OverridesParser.create().parse_override(override).is_sweep_override())
    except HydraException as error:
        raise unparsable(override) from error


def _key(override: str) -> str:
    """Return the key or group of a valid override."""
    return str(OverridesParser.create().parse_override(override).key_or_group)


def unparsable(override: str) -> UserError:
    """Return the error for an override that Hydra cannot parse, with a quoted one that it can as the hint."""
    key, equals, value = override.partition("=")
    quoted = f"{key.strip()}={_quoted_list(value.strip()) or _quoted(value.strip())}"
    try:
        OverridesParser.create().parse_override(quoted)
    except HydraException:
        equals = ""
    if not equals:
        hint = "use KEY=VALUE, GROUP=CHOICE or ~KEY; `--cfg job` shows every key, `--help` the groups"
        return UserError("cannot be parsed", where=override, hint=hint)
    what = "contains characters that are special to Hydra; quote the value, and quote it again for the shell"
    return UserError(what, where=override, hint=shlex.quote(quoted))


def _quoted_list(value: str) -> str | None:
    """Return a list with quotes around entries that Hydra cannot parse; None if it is not a plain list."""
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
    """Quote a string for Hydra's grammar, which doubles backslashes only before a quotation mark."""
    mark = "'" if '"' in value and "'" not in value else '"'
    parts = value.split(mark)
    doubled = [part + "\\" * (len(part) - len(part.rstrip("\\"))) for part in parts]
    return mark + f"\\{mark}".join(doubled) + mark


def hint_for(message: str, config_name: str) -> str:
    """Return a hint for the message of one of Hydra's errors."""
    chosen, typed = _CHOICE.search(message), _KEY.search(message)
    if chosen:
        choices = difflib.get_close_matches(chosen[2], _OPTION.findall(message), n=1)
        return f"did you mean {chosen[1]}={choices[0]}?" if choices else USUAL
    if typed:
        config, wanted = composed(config_name), typed[1].lstrip("+~")
        if (above := _null_above(wanted, config)) is not None:
            below = wanted[len(above) + 1 :].split(".")
            value = "".join(f"{{{part}: " for part in below) + "VALUE" + "}" * len(below)
            return f"{above} is null; set it as a whole: '{above}={value}'"
        key = nearest_key(wanted, config)
        return f"did you mean {key}? {USUAL}" if key else USUAL
    return USUAL


def nearest_key(key: str, config: DictConfig) -> str | None:
    """Return the key of a configuration most similar to `key`, matched part by part from the left; None if none is."""
    found: list[str] = []
    node = OmegaConf.to_container(config, resolve=False)
    for part in key.split("."):
        if not isinstance(node, Mapping):
            return None
        names = [str(name) for name in node]
        swapped = [name for name in names if sorted(name) == sorted(part)]  # transposed letters
        close = [part] if part in names else swapped or difflib.get_close_matches(part, names, n=1)
        if not close:
            return None
        found.append(close[0])
        node = node[close[0]]
    return ".".join(found)


def _null_above(key: str, config: DictConfig) -> str | None:
    """Return the prefix of a key that is null in the configuration; None if there is none."""
    node: object = OmegaConf.to_container(config, resolve=False)
    parts = key.split(".")
    for count, part in enumerate(parts):
        if node is None:
            return ".".join(parts[:count])
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return None
