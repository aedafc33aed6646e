"""From a composed configuration to typed settings, with every mistake named by its key."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from hdm_lightning.errors import UserError

Settings = TypeVar("Settings")


def settings_from(config: DictConfig | Mapping[str, Any], kind: type[Settings]) -> Settings:
    """Turn a composed configuration into the settings dataclass `kind`, or raise `UserError` naming the key."""
    plain: dict[str, Any] = (
        OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)  # type: ignore[assignment]
    )
    shape = OmegaConf.structured(kind)
    for key, value in plain.items():
        if _is_group(shape, key) and not isinstance(value, Mapping | None):
            hint = f"give its keys, {key}.KEY=VALUE; `--cfg job` shows the whole configuration"
            raise UserError(f"{value!r} is no group of keys", where=key, hint=hint)
    try:
        merged = OmegaConf.merge(shape, plain)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise _as_user_error(error) from error


def _is_group(shape: DictConfig, key: str) -> bool:
    return key in shape and not OmegaConf.is_missing(shape, key) and OmegaConf.is_dict(shape[key])


def _as_user_error(error: OmegaConfBaseException) -> UserError:
    where = error.full_key or "configuration"
    if isinstance(error, MissingMandatoryValue):
        return UserError("a value is required and none was given", where=where, hint=f"give one: {where}=VALUE")
    message = (error.msg or str(error)).splitlines()[0]
    if isinstance(error, ConfigKeyError) and error.object_type is not None:
        key = where.rsplit(".", 1)[-1]
        known = [entry.name for entry in fields(error.object_type)]
        return UserError(f"unknown key '{key}'", where=where, hint=_suggestion(key, known))
    return UserError(
        message, where=where, hint="give a value of the right type; `--cfg job` shows the whole configuration"
    )


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known keys: " + ", ".join(sorted(known))
