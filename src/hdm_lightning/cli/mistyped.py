"""Suggest corrections for mistyped keys, groups and choices of Hydra commands."""

import difflib
import re
from collections.abc import Mapping

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

KEY = re.compile(r"Could not override '([^']+)'")
CHOICE = re.compile(r"Could not find '([^']+)/([^'/]+)'")
OPTION = re.compile(r"^\t(\w\S*)$", re.MULTILINE)
USUAL = "`--help` shows the groups, their choices and every key, `--explain KEY` what a key means"


def hint_for(message: str, config_name: str) -> str:
    """Return a hint for one of Hydra's errors.

    Args:
        message: message of the error.
        config_name: name of the command's configuration.
    """
    chosen, typed = CHOICE.search(message), KEY.search(message)
    if chosen:
        choices = difflib.get_close_matches(chosen[2], OPTION.findall(message), n=1)
        return f"did you mean {chosen[1]}={choices[0]}?" if choices else USUAL
    if typed:
        config, wanted = _composed(config_name), typed[1].lstrip("+~")
        if (above := _null_above(wanted, config)) is not None:
            below = wanted[len(above) + 1 :].split(".")
            value = "".join(f"{{{part}: " for part in below) + "VALUE" + "}" * len(below)
            return f"{above} is null; set it as a whole: '{above}={value}'"
        key = nearest_key(wanted, config)
        return f"did you mean {key}? {USUAL}" if key else USUAL
    return USUAL


def nearest_key(key: str, config: DictConfig) -> str | None:
    """Return the most similar key of a configuration, matched part by part from the left; None if there is none.

    Args:
        key: dotted key as typed.
        config: configuration with all valid keys.
    """
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


def _composed(config_name: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_module("hdm_lightning.conf", version_base="1.3"):
        return compose(config_name)
