"""A run's config.yaml as data: read as plain values, of which none is resolved, imported, run or written to.

A run's folder may come from somebody else, and what stands in its configuration with it. Everything that reads one
back goes through here.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hdm_lightning.data.datamodule import ShardDataModule
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.data.sample_plan import expanded
from hdm_lightning.data.shard_bytes import is_local
from hdm_lightning.errors import UserError
from hdm_lightning.training.settings import TrainSettings, train_settings_from
from hdm_lightning.training.stages import StagePlan

RETIRED = (("text_encoder", "max_batch"), ("vae", "max_batch"))
"""Keys that runs of earlier versions have in their config.yaml, and that changed nothing in what they learned."""

Sources = tuple[Source, ...]
LARGEST_BYTES = 1_000_000
MOST_ADDRESSES = 1_000_000
WHERE_FROM = "look where the folder comes from"


def read_recorded(file: Path) -> dict[str, Any]:
    """The plain values of a run's config.yaml.

    Raises:
        UserError: it cannot be read, or holds what no run writes: `${…}`, which would be replaced by other keys or by
            the environment's secrets, and YAML's references, by which a small file becomes a huge one.
    """
    content = _parsed(file)
    if any("${" in text for text in _texts(content)):
        what = "holds ${…}: a run records the values that it ran with, and others are not filled in"
        raise UserError(what, where=str(file), hint=f"write the value itself there; {WHERE_FROM}")
    return content


def is_training(file: Path) -> bool:
    """Whether a config.yaml is that of a run of `hdm-train`; the name is common for other things, too."""
    try:
        return {"model", "schedule"} <= set(_parsed(file))
    except UserError:
        return False


def _parsed(file: Path) -> dict[str, Any]:
    """The values of a YAML file as they are written."""
    try:
        if file.stat().st_size > LARGEST_BYTES:
            raise UserError(f"is larger than {LARGEST_BYTES} bytes", where=str(file), hint=WHERE_FROM)
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise UserError("holds a reference (*NAME), which no run writes", where=str(file), hint=WHERE_FROM)
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot be read ({reason})", where=str(file), hint="restore the file") from error
    if not isinstance(content, dict):
        raise UserError("is no mapping of keys to values", where=str(file), hint="restore the file")
    return {str(key): value for key, value in content.items()}


def recorded_settings(file: Path) -> TrainSettings:
    """The settings of a run of `hdm-train`, also where an earlier version wrote them; see `RETIRED`.

    Raises:
        UserError: as `read_recorded`, or naming the key that is wrong.
    """
    plain = read_recorded(file)
    for group, key in RETIRED:
        if isinstance(plain.get(group), dict):
            plain[group].pop(key, None)
    return train_settings_from(plain)


def recorded_training_stream(settings: TrainSettings, plan: StagePlan, given: Sources | None) -> StreamConfig:
    """The training stream of a recorded run, or its rules for the sources `given`.

    Raises:
        UserError: its own sources are to be read, and are no plain ones; see `_harmless`.
    """
    return _harmless(_recorded_data(settings, plan, settings.validation.seed).training_stream, given, "--train-data")


def recorded_validation_stream(settings: TrainSettings, plan: StagePlan, given: Sources | None) -> StreamConfig:
    """The validation stream of a recorded run in the order of its seed, or its rules for the sources `given`.

    Raises:
        UserError: its own sources are to be read, and are no plain ones; see `_harmless`.
    """
    data = _recorded_data(settings, plan, settings.seed)
    stream = replace(data.validation_stream, crop=data.training_stream.crop, captions=data.training_stream.captions)
    return _harmless(stream, given, "--data")


_TAKEN = ("train", "validation", "crop", "captions", "lanes", "window", "max_bad_share", "bad_patience")
"""Of the recorded arguments of the data; where files are written to, and how many processes read, is decided here."""


def _recorded_data(settings: TrainSettings, plan: StagePlan, validation_seed: int) -> ShardDataModule:
    stage = plan.settings
    recorded = {**settings.data, **stage.data}
    return ShardDataModule(
        **{key: recorded[key] for key in _TAKEN if key in recorded},
        resolution=stage.resolution,
        batch_size=stage.micro_batch_size,
        samples_per_step=stage.batch_size,
        context_length=stage.context_length,
        seed=settings.seed,
        stage=plan.name,
        validation_seed=validation_seed,
        tokenizer=_no_tokens,
        num_workers=0,
    )


def _no_tokens(caption: str) -> tuple[list[int], int]:
    """Stands in for a tokenizer where nothing is trained on."""
    return [0], 1


def _harmless(stream: StreamConfig, given: Sources | None, option: str) -> StreamConfig:
    """The stream, which writes nothing, and reads from what the user gives or from folders and http(s) addresses.

    Other addresses run commands (`pipe:`) or whatever an fsspec chain stands for.
    """
    stream = replace(stream, workers=0, quarantine=None, cache_dir=None, memory_cache_gb=0.0)
    if given is not None:
        return replace(stream, sources=given)
    for address in (address for source in stream.sources for address in _addresses(source)):
        if not (is_local(address) or address.startswith(("http://", "https://"))):
            raise UserError(
                f"the run's configuration names {address[:200]!r}; of what is recorded, only folders and http(s) "
                "addresses are opened",
                where=option,
                hint=f"name the shards yourself: {option} FOLDER_OR_ADDRESS",
            )
    return stream


def _addresses(source: Source) -> Iterator[str]:
    """Every address that a source leads to."""
    for pattern in source.urls:
        yield from islice(expanded(pattern), MOST_ADDRESSES)
    if source.index is not None:
        yield source.index


def _texts(value: Any) -> Iterator[str]:
    """All keys and texts of plain values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value
