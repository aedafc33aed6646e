"""The model that fine-tuning starts from: where it is, and which keys of a configuration it fills in.

Null in `model`, `text_encoder.name`, `text_encoder.layer`, `vae.name` or a stage's `resolution` or `context_length`
means the value of `init`.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hdm_lightning.encoders.pretrained import is_local_path, locate_model
from hdm_lightning.encoders.vae_folder import is_autoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_files import is_adapter
from hdm_lightning.interop.pipeline_folder import (
    INDEX,
    PipelineFolder,
    is_pipeline_folder,
    read_pipeline_folder,
    refuse_unfinished,
)
from hdm_lightning.models import XUTConfig

DOWNLOAD = ["*.json", "README.md", "*/*.json", "*/*.safetensors"]
_OF_A_STAGE = ("resolution", "context_length")


def base_folder(source: str) -> PipelineFolder:
    """Return the pipeline folder that `init` names: a run's, a `final/`, or one on the hub.

    Raises:
        UserError: it names something else, or cannot be loaded.
    """
    path = Path(source).expanduser()
    for folder in (path / "final", path):
        if is_pipeline_folder(folder):
            return read_pipeline_folder(folder)
    if is_adapter(path):
        hint = f"merge it: hdm-convert {shlex.quote(str(path))} FOLDER, then init=FOLDER"
        raise UserError(f"{source} is a LoRA, not a model", where="init", hint=hint)
    if not path.exists() and "/" in source and not is_local_path(source):
        return read_pipeline_folder(locate_model(source, where="init", required=[INDEX], download=DOWNLOAD))
    if any(is_autoencoder(folder) for folder in (path / "final", path)):
        hint = "name a run of hdm-train; an autoencoder goes in vae.name"
        raise UserError(f"{source} is an autoencoder, not a model", where="init", hint=hint)
    refuse_unfinished(path, where="init")
    if path.exists():
        what = f"{source} does not specify the text encoder, autoencoder and sizes of its weights"
        hint = f"convert it to a folder that does: hdm-convert {shlex.quote(str(path))} FOLDER"
        raise UserError(what, where="init", hint=hint)
    hint = "name the folder of a finished run, a pipeline folder or a hub name OWNER/NAME"
    raise UserError(f"there is no model in {source}", where="init", hint=hint)


def fill_from_init(config: DictConfig) -> None:
    """Fill the null values of a composed configuration from the model of `init`, in place.

    A run that was started before has recorded these values, and `init`; its record takes precedence.

    Raises:
        UserError: there are null values but no model, or the record cannot be read.
    """
    _fill_from_record(config)
    wanted = _open_keys(config)
    if not wanted:
        return
    source = config.get("init")
    if source is None:
        hint = "name the model to start from: init=runs/mine, or init=OWNER/NAME"
        raise UserError(f"{wanted[0]} is left to the model of init, which is not set", where="init", hint=hint)
    answers = _answers(base_folder(str(source)), OmegaConf.select(config, "schedule.stages") or {})
    for key in wanted:
        if answers.get(key) is None:
            raise UserError(f"the model of init does not specify {key}", where=key, hint=f"give one: {key}=VALUE")
        OmegaConf.update(config, key, answers[key])


def _fill_from_record(config: DictConfig) -> None:
    """Fill null values from the run's record, unless the run is now to start from another model."""
    wanted = _open_keys(config)
    if config.get("run_dir") is None or not (wanted or config.get("adapter")):
        return
    from hdm_lightning.training.continued import configuration_of  # noqa: PLC0415 (imports a trainer)

    began, source = configuration_of(Path(str(config.run_dir))) or OmegaConf.create({}), config.get("init")
    recorded = began.get("init")
    if recorded is None or (source is not None and kept_name(str(source)) != kept_name(str(recorded))):
        return
    config["init"] = recorded
    for key in wanted:
        if (value := OmegaConf.select(began, key)) is not None:
            OmegaConf.update(config, key, value)


def _open_keys(config: DictConfig) -> list[str]:
    """Return the null keys that a model can fill in."""
    values: Any = OmegaConf.to_container(config, resolve=False)
    stages = _written(values, "schedule.stages")
    names = stages if isinstance(stages, Mapping) else ()  # anything else is refused later
    keys = [
        *(f"model.{name}" for name in XUTConfig.__dataclass_fields__),
        *("text_encoder.name", "text_encoder.layer", "vae.name"),
        *(f"schedule.stages.{stage}.{name}" for stage in names for name in _OF_A_STAGE),
    ]
    return [key for key in keys if _written(values, key) is None]


def _written(values: Any, key: str) -> Any:
    """Return the value at a dotted key, without resolving it; empty if there is no such key, which is refused later."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return ""
        values = values[part]
    return values


def _answers(found: PipelineFolder, stages: Mapping[str, Any]) -> dict[str, Any]:
    source = None if found.inside else found.text_encoder
    answers = {f"model.{name}": value for name, value in found.xut.to_json().items()}
    answers["vae.name"] = str(found.vae) if found.vae.is_dir() else None
    if source is not None:
        answers |= {"text_encoder.name": source.name, "text_encoder.layer": source.layer}
    height, width = found.sampling.get("height"), found.sampling.get("width")
    for stage in stages:
        context = found.text_encoder.context_length if found.text_encoder else None
        answers[f"schedule.stages.{stage}.context_length"] = context
        answers[f"schedule.stages.{stage}.resolution"] = height if height == width else None
    return answers


def kept_name(source: str) -> str:
    """Return a model's name that works from any folder: an absolute path, or the hub name."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source
