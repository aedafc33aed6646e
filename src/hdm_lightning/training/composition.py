"""Check the nodes of a composed configuration against the signatures of their `_target_`, and call them.

The constructor is the schema: its parameters are the keys, its annotations the types and ranges. Errors name the key
that the user would change, even if the value comes from another key by interpolation.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import hydra.utils
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from hdm_lightning.errors import UserError, did_you_mean, first_line
from hdm_lightning.models import XUTConfig
from hdm_lightning.printable import in_one_line

TARGET = "_target_"
OF_HYDRA = (TARGET, "_partial_", "_convert_", "_recursive_", "_args_")
OWN_PACKAGES = ("hdm_lightning", "torch", "lightning")
EXTRAS = {"torchao": "lowbit"}
"""Libraries named in the configuration groups, and this project's extra that installs each."""
OFFERED = {
    "model": tuple(XUTConfig.__dataclass_fields__),
    "optimizer": ("betas", "eps", "momentum", "rounds"),
}
"""Keys for a group's usual classes that a class from another package need not accept."""
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def parse(kind: type[Any], values: Any, where: str) -> Any:
    """Return a dataclass from plain values, validated against its annotations.

    Raises:
        UserError: naming the key below `where` that is unknown, missing, of a wrong type or out of range.
    """
    _refuse_unknown(kind, values, where)
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise _as_user_error(error.errors(), where) from error


def _refuse_unknown(kind: Any, values: Any, where: str) -> None:
    """Refuse keys without a field, here and in nested groups: standard-library dataclasses would drop them."""
    if get_origin(kind) is dict and isinstance(values, Mapping):
        for key, value in values.items():
            _refuse_unknown(get_args(kind)[1], value, f"{where}.{key}")
    if not is_dataclass(kind):
        return
    if not isinstance(values, Mapping):
        hint = f"set its keys, {where}.KEY=VALUE; `--cfg job` shows the whole configuration"
        raise UserError(f"expected a mapping of keys, got {values!r}", where=where, hint=hint)
    hints = get_type_hints(kind)
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise UserError(f"unknown key '{key}'", where=path, hint=did_you_mean(str(key), hints))
        _refuse_unknown(hints[key], value, path)


HINTS = {
    "greater_than": "use a value above {gt:g}",
    "greater_than_equal": "use {ge:g} or more",
    "less_than": "use a value below {lt:g}",
    "less_than_equal": "use {le:g} or less",
    "literal_error": "use {expected}",
    "dict_type": "set its keys one by one, as in GROUP.KEY=VALUE",
    "dataclass_type": "set its keys one by one, as in GROUP.KEY=VALUE",
}
"""Hint for each of pydantic's error types."""


ALTERNATIVE = re.compile(r"function-|(bool|int|float|str|none|list|dict|tuple)\b|literal\[")
"""The parts of pydantic's error locations that name an alternative of a union."""


def _as_user_error(errors: Sequence[Any], where: str) -> UserError:
    """Return pydantic's first error with its key below `where`; for a union, what each alternative expects."""
    first, place = errors[0], _place(errors[0])
    key = ".".join([each for each in (where, *place) if each])
    if first["type"] in ("missing", "missing_argument") or first["input"] == "???":
        return UserError("a value is required and none was given", where=key, hint=f"give one: {key}=VALUE")
    given = in_one_line(repr(first["input"])[:80])
    same = [each for each in errors if _place(each) == place]
    told = [each["msg"].replace("Input should", "it should").removeprefix("Value error, ") for each in same]
    hints = [HINTS[each["type"]].format(**each.get("ctx", {})) for each in same if each["type"] in HINTS]
    hint = " or ".join(hints) or f"set a valid value; `--explain {key}` describes it"
    return UserError(f"is {given}: {', or '.join(told)}", where=key, hint=hint)


def _place(error: Any) -> list[str]:
    """Return the keys that lead to an error."""
    return [step for step in error["loc"] if isinstance(step, str) and not ALTERNATIVE.match(step)]


def has_target(node: Any) -> bool:
    """Return whether a node has a `_target_`."""
    return isinstance(node, Mapping | DictConfig) and node.get(TARGET) is not None


def plain(config: Any, path: str) -> Any:
    """Return the value at a dotted path as plain containers, fully resolved; None if there is no such key.

    Raises:
        UserError: a required value is missing, or an interpolation cannot be resolved.
    """
    try:
        node = OmegaConf.select(config, path, throw_on_missing=True)
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
    except MissingMandatoryValue as error:
        key = _written(config, error.full_key or path)
        raise UserError("a value is required and none was given", where=key, hint=f"give one: {key}=VALUE") from error
    except OmegaConfBaseException as error:
        what = first_line(error.msg or error)
        raise UserError(what, where=error.full_key or path, hint="`--cfg job` shows the whole configuration") from error


def _written(config: Any, path: str) -> str:
    """Return the key at which the value at a path is set: the path, or the key that its interpolation refers to."""
    for _ in range(8):
        parent, _, key = path.rpartition(".")
        try:
            node = OmegaConf.select(config, parent) if parent else config
            raw = OmegaConf.to_container(node, resolve=False).get(key)  # type: ignore[union-attr]
        except (OmegaConfBaseException, AttributeError, ValueError):
            return path
        match = _REFERENCE.fullmatch(raw) if isinstance(raw, str) else None
        if match is None:
            break
        path = match[1]
    if path.startswith("stage."):
        written_at = OmegaConf.select(config, "stage.written_at")
        return f"{written_at}.{path.removeprefix('stage.')}" if written_at else path
    return path


def target_of(node: Any, where: str) -> Callable[..., Any]:
    """Return the class or function that a node's `_target_` names.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        found: Callable[..., Any] = hydra.utils.get_object(str(node[TARGET]))
    except Exception as error:  # a foreign module may raise anything on import
        reason = first_line(error.__cause__ or error)
        hint = "use the dotted name of a class or function in an installed package or on PYTHONPATH"
        if (extra := EXTRAS.get(str(node[TARGET]).partition(".")[0])) is not None:
            hint = f"pip install 'hdm-lightning[{extra}]'"
        what = f"'{node[TARGET]}' cannot be imported ({reason})"
        raise UserError(what, where=f"{where}.{TARGET}", hint=hint) from error
    return found


def _offered(config: DictConfig, path: str, target: Callable[..., Any]) -> list[str]:
    """Return the keys of a node that its target does not accept and that are dropped without an error.

    These are keys whose value is interpolated, for any class, and the keys in `OFFERED`, for a class from outside this
    project, torch and Lightning.
    """
    parameters = inspect.signature(target).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return []
    foreign = target.__module__.partition(".")[0] not in OWN_PACKAGES
    raw: Any = OmegaConf.to_container(OmegaConf.select(config, path), resolve=False)
    return [
        key
        for key, value in raw.items()
        if key not in parameters
        and ((isinstance(value, str) and "${" in value) or (foreign and key in OFFERED.get(path, ())))
    ]


def check_call(config: DictConfig, path: str, *, supplied: Iterable[str] = (), own: Iterable[str] = ()) -> None:
    """Check the arguments of the node at `path` against the signature of its `_target_`, without calling it.

    Args:
        config: the composed configuration, with its interpolations.
        path: dotted path of the node.
        supplied: names of the arguments that `build` gets beside the node's keys.
        own: keys of the node that are not passed to its target.

    Raises:
        UserError: naming the key as the user wrote it.
    """
    values = plain(config, path)
    if not has_target(values):
        raise UserError("has no _target_ to call", where=path, hint=f"set {path}.{TARGET}=package.Class")
    target = target_of(values, path)
    parameters = inspect.signature(target).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    spare = (*OF_HYDRA, *own, *_offered(config, path, target))
    given = {key: value for key, value in values.items() if key not in spare}
    for key, value in given.items():
        if key not in parameters and not takes_all:
            where, known = f"{path}.{key}", [name for name in parameters if name not in supplied]
            raise UserError(f"unknown key '{key}'", where=where, hint=did_you_mean(key, known))
        if has_target(value):
            check_call(config, f"{path}.{key}")
    _check_types(config, path, target, {key: value for key, value in given.items() if not _holds_target(value)})
    if values.get("_partial_") or "_args_" in values:
        return
    for name, parameter in parameters.items():
        named = parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in given and name not in supplied:
            what = "a value is required and none was given"
            raise UserError(what, where=f"{path}.{name}", hint=f"give one: +{path}.{name}=VALUE")


def _check_types(config: DictConfig, path: str, target: Callable[..., Any], given: Mapping[str, Any]) -> None:
    try:
        hints = get_type_hints(getattr(target, "__init__") if isinstance(target, type) else target, include_extras=True)  # noqa: B009
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can resolve
        return
    for key, value in given.items():
        adapter = _adapter(hints.get(key))
        if adapter is None:
            continue
        try:
            made = adapter.validate_python(value)
        except ValidationError as error:
            errors = [{**each, "loc": ()} for each in error.errors()]
            raise _as_user_error(errors, _written(config, f"{path}.{key}")) from error
        if isinstance(made, bool | int | float) and isinstance(value, str):  # the target would get the text itself
            where = _written(config, f"{path}.{key}")
            raise UserError(
                f"is the string {value!r}", where=where, hint=f"remove the quotation marks: {where}={value}"
            )


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    if hint is None or hint is Any:
        return None
    for config in (ConfigDict(arbitrary_types_allowed=True), None):
        try:
            return TypeAdapter(hint, config=config)
        except (PydanticUserError, TypeError, NameError, ValueError):
            continue
    return None


def _holds_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return has_target(value) or any(map(_holds_target, value.values()))
    return isinstance(value, list) and any(map(_holds_target, value))


def build(config: DictConfig, path: str, *, own: Iterable[str] = (), **supplied: Any) -> Any:
    """Call the `_target_` of the node at a path with the node's keys and the supplied arguments, which take precedence.

    See `check_call` for the arguments.

    Raises:
        UserError: the target refuses a value.
    """
    values = plain(config, path)
    target = target_of(values, path)
    spare = (*OF_HYDRA, *own, *_offered(config, path, target))
    arguments = {key: value for key, value in values.items() if key not in spare}
    try:
        for key, value in arguments.items():
            if _holds_target(value):
                arguments[key] = hydra.utils.instantiate(value, _convert_="all")
        arguments |= supplied
        if values.get("_partial_"):
            return functools.partial(target, *values.get("_args_", ()), **arguments)
        return target(*values.get("_args_", ()), **arguments)
    except hydra.errors.InstantiationException as error:
        raise _placed(config, path, arguments, error.__cause__ or error) from error
    except (ValueError, TypeError) as error:
        raise _placed(config, path, arguments, error) from error
    except ModuleNotFoundError as error:
        hint = f"install it, or leave {path} out"
        raise UserError(f"a package is missing ({first_line(error, 120)})", where=path, hint=hint) from error


def _placed(config: DictConfig, path: str, arguments: Mapping[str, Any], error: BaseException) -> BaseException:
    """Return an error that names the key as the user wrote it."""
    if isinstance(error, UserError):
        where = error.where
        if where in arguments:
            where = _written(config, f"{path}.{where}")
        return UserError(error.what, where=where, hint=error.hint)
    if isinstance(error, ValueError | TypeError):
        return UserError(first_line(error), where=path, hint="`--cfg job` shows the whole configuration")
    return error
