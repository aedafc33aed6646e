"""The `data` group of a configuration: what a stage's streams are made from, checked key by key."""

import os
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from hdm_lightning.data.buckets import Buckets
from hdm_lightning.data.captions import CaptionRules, TagGrammar
from hdm_lightning.data.config import Source, StreamConfig
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.datamodule import ShardDataModule
from hdm_lightning.data.plan import Plan
from hdm_lightning.data.storage import is_local
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError
from hdm_lightning.training import run_folder
from hdm_lightning.training.checks import settings_from
from hdm_lightning.training.settings import TrainSettings
from hdm_lightning.training.stages import StagePlan


@dataclass
class BucketSettings:
    """Aspect-ratio buckets instead of square crops; see `data.buckets.Buckets`."""

    step_px: int = 64
    max_aspect: float = 2.0


@dataclass
class CropSettings:
    """Which images are taken and how they are cut; see `data.crops.CropRules`. None means no limit."""

    centre: bool = False
    min_size_px: int = 1
    max_upscale: float | None = None
    max_aspect: float = 8.0
    flip: bool = False
    buckets: BucketSettings | None = None


@dataclass
class TagSettings:
    """The tag grammar of captions; see `data.captions.TagGrammar`."""

    kept: str = "|||"
    group: str = "%%"
    tag: str = "$$"
    join: str = ", "
    shuffle: bool = True
    group_drop: float = 0.3
    tag_drop: float = 0.25


@dataclass
class CaptionSettings:
    """How captions are found and changed; see `data.captions.CaptionRules`."""

    prefer: str = "txt"
    fields: list[str] = field(default_factory=lambda: ["captions", "caption"])
    drop: float = 0.1
    tags: TagSettings | None = None
    clean: bool = True
    allow_missing: bool = False


@dataclass
class DataSettings:
    """Sources and rules of the training and validation streams; see `data.config.StreamConfig`.

    Attributes:
        train: a folder, shard, brace pattern or address; or a list of them; or a list of
            `{urls: …, weight: …, index: …}`.
        validation: the same; None validates on the first samples of a fixed order of the training set.
    """

    train: Any = MISSING
    validation: Any = None
    crop: CropSettings = field(default_factory=CropSettings)
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    workers: int = 4
    lanes: int = 96
    window: int = 32
    max_bad_share: float = 0.05
    bad_patience: int = 1000
    cache_dir: str | None = None
    cache_gb: float = 100.0
    memory_cache_gb: float = 0.0


def stage_data(settings: TrainSettings, plan: StagePlan) -> DataSettings:
    """The data settings of one stage: the group, with the stage's own keys laid over it.

    Raises:
        UserError: naming the key under `data`.
    """
    try:
        return settings_from({**settings.data, **plan.settings.data}, DataSettings)
    except UserError as error:
        raise UserError(error.what, where=f"data.{error.where}", hint=error.hint) from error


def training_stream(settings: TrainSettings, plan: StagePlan) -> StreamConfig:
    """The training stream of one stage."""
    return _stream(settings, plan, stage_data(settings, plan).train, plan.name, settings.seed)


def validation_stream(settings: TrainSettings, plan: StagePlan, seed: int) -> StreamConfig:
    """The validation stream of one stage, in the order of a seed: the same samples in every stage."""
    data = stage_data(settings, plan)
    return _stream(settings, plan, data.train if data.validation is None else data.validation, "validation", seed)


def build_datamodule(settings: TrainSettings, plan: StagePlan, consumed: int) -> ShardDataModule:
    """The stage's data, starting after `consumed` samples of it."""
    return ShardDataModule(
        training_stream(settings, plan),
        validation_stream(settings, plan, settings.validation.seed),
        tokenize=Tokenizer(settings.text_encoder.name).bind(plan.settings.context_length),
        batch_size=plan.settings.micro_batch_size,
        consumed=consumed,
        validation_samples=settings.validation.samples,
        validation_batch_size=settings.validation.batch_size,
    )


def check_data(settings: TrainSettings, plan: StagePlan) -> None:
    """Both streams of a stage exist and have samples; reads indices, no shard.

    Raises:
        UserError: naming the folder or key.
    """
    Plan(training_stream(settings, plan))
    if settings.validation.samples:
        Plan(validation_stream(settings, plan, settings.validation.seed))


def sources_from(value: Any, where: str) -> tuple[Source, ...]:
    """The sources that a value of `data.train` or `data.validation` means.

    Raises:
        UserError: when it is none of the spellings.
    """
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise UserError("no source is given", where=where, hint="give a folder of shards")
    if all(isinstance(entry, str) for entry in entries):
        return (Source(urls=tuple(map(_tidy, entries))),)
    return tuple(_source(entry, f"{where}[{number}]") for number, entry in enumerate(entries))


def _source(entry: Any, where: str) -> Source:
    if isinstance(entry, str):
        return Source(urls=(_tidy(entry),))
    known = {"urls", "weight", "index"}
    if not isinstance(entry, dict) or "urls" not in entry or set(entry) - known:
        raise UserError(f"{entry!r} is no source", where=where, hint="give a folder, or {urls: …, weight: …}")
    urls, index = entry["urls"], entry.get("index")
    several = urls if isinstance(urls, list) else [urls]
    for address in [*several, *([] if index is None else [index])]:
        if not isinstance(address, str):
            raise UserError(f"{address!r} is no address", where=where, hint="give urls and index as text")
    return Source(tuple(map(_tidy, several)), entry.get("weight"), index)


def _tidy(url: str) -> str:
    """A local path without `~` and `..`: a configuration may name what lies beside a folder not made yet."""
    return os.path.normpath(os.path.expanduser(url)) if is_local(url) else url


def _stream(settings: TrainSettings, plan: StagePlan, sources: Any, order: str, seed: int) -> StreamConfig:
    data = stage_data(settings, plan)
    crop, captions = dict(vars(data.crop)), dict(vars(data.captions))
    if crop["max_upscale"] is None:
        del crop["max_upscale"]
    if data.crop.buckets is not None:  # a step's samples share a shape, on every rank
        crop["buckets"] = Buckets(**vars(data.crop.buckets), block=plan.settings.batch_size)
    captions["fields"] = tuple(captions["fields"])
    captions["tags"] = TagGrammar(**vars(data.captions.tags)) if data.captions.tags else None
    return StreamConfig(
        sources=sources_from(sources, f"data.{'validation' if order == 'validation' else 'train'}"),
        resolution=plan.settings.resolution,
        context_length=plan.settings.context_length,
        seed=seed,
        stage=order,
        crop=CropRules(**crop),
        captions=CaptionRules(**captions),
        lanes=data.lanes,
        window=data.window,
        workers=data.workers,
        max_bad_share=data.max_bad_share,
        bad_patience=data.bad_patience,
        quarantine=f"{settings.run_dir}/{run_folder.QUARANTINE}",
        cache_dir=data.cache_dir,
        cache_gb=data.cache_gb,
        memory_cache_gb=data.memory_cache_gb,
    )
