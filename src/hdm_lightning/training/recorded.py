"""A run's config.yaml: how a composed configuration is written, and how it is read back as plain data.

A run's folder, and its configuration with it, may come from somebody else: nothing that is read is resolved, imported,
run or written to, and only the fields of `TrainSettings` are used.
"""

from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hdm_lightning.encoders.autoencoder import MAX_PIXELS
from hdm_lightning.encoders.text import MAX_TOKENS
from hdm_lightning.errors import UserError, did_you_mean, first_line
from hdm_lightning.json_files import require_shallow
from hdm_lightning.models import XUTConfig
from hdm_lightning.regular_files import read_regular
from hdm_lightning.training.composition import OF_HYDRA, parse
from hdm_lightning.training.former_keys import present_spelling
from hdm_lightning.training.stages import Guard, Hardware, Interval, Schedule, Validation, settings

LARGEST_BYTES = 1_000_000
WHERE_FROM = "check where the folder comes from"
RESTORE = "restore the file; or delete it, and repeat the run's command with exactly the settings that it began with"
OTHERS = ("module", "lr_scheduler", "stage", "logger", "hub", "hydra")
"""Groups that matter only to commands that build a trainer."""
RETIRED = {"text_encoder": "max_batch", "vae": "max_batch"}
"""Keys in runs of earlier versions that did not affect what was learned."""
_ABSENT = object()
_UNREADABLE = (OSError, ValueError, TypeError, AssertionError, RecursionError, yaml.YAMLError, OmegaConfBaseException)


# Writing


def recorded_values(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain values, without those derived from a stage: `schedule.stages` has them."""
    values = _plain(config, "")
    assert isinstance(values, dict)
    return {key: value for key, value in values.items() if key != "hydra"}


def recorded_text(config: DictConfig) -> str:
    """Return the same as YAML, the content of a run's config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(recorded_values(config)))


def _plain(config: Any, path: str) -> Any:
    node = OmegaConf.select(config, path) if path else config
    if OmegaConf.is_dict(node):
        written: Any = OmegaConf.to_container(node, resolve=False)
        places = {key: f"{path}.{key}" if path else str(key) for key in written if not OmegaConf.is_missing(node, key)}
        found = {str(key): _leaf(config, place, written[key]) for key, place in places.items()}
        return {key: value for key, value in found.items() if value is not _ABSENT}
    if OmegaConf.is_list(node):
        return OmegaConf.to_container(node, resolve=True)
    return node


def _leaf(config: Any, path: str, written: Any) -> Any:
    """Return the resolved value; `_ABSENT` if it depends on a stage or on a missing value."""
    if isinstance(written, str) and "${stage." in written:
        return _ABSENT
    try:
        return _plain(config, path)
    except OmegaConfBaseException:
        return _ABSENT


# Reading


def read_recorded(file: Path) -> dict[str, Any]:
    """Return the plain values of a run's config.yaml.

    Raises:
        UserError: it cannot be read, or contains something that no run writes: `${…}`, which could be replaced by other
            keys or by secrets of the environment, and YAML aliases, by which a small file becomes a huge one.
    """
    content = _parsed(file)
    if any("${" in text for _, text in texts_in(content)):
        what = "contains ${…}: a run records the values that it ran with, and interpolations are not resolved"
        raise UserError(what, where=str(file), hint=f"write the value itself there; {WHERE_FROM}")
    return content


def is_training(file: Path) -> bool:
    """Return whether a config.yaml is from a run of `hdm-train`; other tools use this file name, too."""
    try:
        return {"model", "schedule"} <= set(_parsed(file))
    except UserError:
        return False


def _parsed(file: Path) -> dict[str, Any]:
    """Return the values of a YAML file as written."""
    try:
        text = read_regular(file, LARGEST_BYTES).decode("utf-8")
        if not text.strip():
            raise UserError("is empty", where=str(file), hint=RESTORE)
        require_shallow(text)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise UserError("contains an alias (*NAME), which no run writes", where=str(file), hint=WHERE_FROM)
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(f"cannot be read ({first_line(error)})", where=str(file), hint=RESTORE) from error
    if not isinstance(content, dict):
        raise UserError("is not a mapping of keys to values", where=str(file), hint=RESTORE)
    return {str(key): value for key, value in content.items()}


def texts_in(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield all keys and strings in plain values, each with its dotted key."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            place = f"{key}.{name}".lstrip(".")
            yield place, str(name)
            yield from texts_in(inner, place)
    elif isinstance(value, str):
        yield key, value


# Fields


@settings
class TextEncoderSettings:
    """Arguments of `load_text_encoder`, and the number of captions its states were whitened on."""

    name: str = ""
    layer: int = -1
    dtype: str = "auto"
    max_tokens: int = MAX_TOKENS
    cache_size: Interval = 0
    whiten_captions: Interval = 0


@settings
class VaeSettings:
    """Arguments of `load_autoencoder`, and the command that trains this autoencoder."""

    name: str = ""
    dtype: str = "auto"
    max_pixels: int = MAX_PIXELS
    cache_size: Interval = 0
    mean: list[float] | None = None
    std: list[float] | None = None
    made_by: str | None = None


@settings
class TrainSettings:
    """The plain fields of a run of `hdm-train`, for commands that read a run without building its parts.

    Attributes:
        model: the fields of `XUTConfig`.
        data: plain arguments of `ShardDataModule`.
        optimizer, trainer, callbacks: as composed; no `_target_` is called.
    """

    model: dict[str, Any]
    schedule: Schedule
    name: str = "train"
    run_dir: str = ""
    seed: int = 0
    resume: str = "auto"
    init: str | None = None
    adapter: dict[str, Any] | None = None
    text_encoder: TextEncoderSettings = field(default_factory=TextEncoderSettings)
    vae: VaeSettings = field(default_factory=VaeSettings)
    data: dict[str, Any] = field(default_factory=dict)
    validation: Validation = field(default_factory=Validation)
    optimizer: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    hardware: Hardware = field(default_factory=Hardware)
    callbacks: dict[str, Any] = field(default_factory=dict)
    guard: Guard = field(default_factory=Guard)

    def callback(self, name: str) -> dict[str, Any]:
        """Return the keys of a callback; empty if it is left out."""
        return dict(self.callbacks.get(name) or {})


def train_settings_from(config: DictConfig | Mapping[str, Any]) -> TrainSettings:
    """Return the settings of a composed configuration, or of one recorded by a run of any version.

    Raises:
        UserError: naming the key that is unknown, missing, or has a wrong value.
    """
    recorded = recorded_values(config) if isinstance(config, DictConfig) else config
    values: Any = OmegaConf.to_container(present_spelling(recorded), resolve=False)
    for group in ("text_encoder", "vae", "model", "data"):
        if isinstance(values.get(group), dict):
            dropped = (*OF_HYDRA, RETIRED.get(group))
            values[group] = {key: value for key, value in values[group].items() if key not in dropped}
    found: TrainSettings = parse(TrainSettings, {key: values[key] for key in values if key not in OTHERS}, "")
    return found


def recorded_settings(file: Path) -> TrainSettings:
    """Return the settings of a run of `hdm-train`, also of an earlier version.

    Raises:
        UserError: as in `read_recorded`, or naming the key that is wrong.
    """
    recorded = read_recorded(file)
    try:
        found = train_settings_from(recorded)
    except UserError as error:
        raise UserError(f"{error.where}: {error.what}", where=str(file), hint=RESTORE) from error
    if not found.schedule.stages:
        raise UserError("schedule.stages: is empty, and every run has a stage", where=str(file), hint=RESTORE)
    return found


def model_config_from(model: Mapping[str, Any]) -> XUTConfig:
    """Return the network's config from the `model` group; errors name unknown keys and wrong values."""
    known = list(XUTConfig.__dataclass_fields__)
    fields = {key: value for key, value in model.items() if key not in OF_HYDRA}
    for key in fields:
        if key not in known:
            raise UserError(f"unknown key '{key}'", where=f"model.{key}", hint=did_you_mean(key, known))
    try:
        return XUTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(str(error), where="model", hint="see conf/model/ for complete examples") from error
