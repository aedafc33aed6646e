"""The `data` group of a configuration: what a stage's streams are made from, checked key by key."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.datamodule import ShardDataModule
from hdm_lightning.data.plan import Plan
from hdm_lightning.data.rules import StreamConfig, rules_from
from hdm_lightning.data.samples import Tokenize
from hdm_lightning.data.sources import sources_from
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError
from hdm_lightning.training import run_folder
from hdm_lightning.training.checks import settings_from
from hdm_lightning.training.settings import TrainSettings, ValidationSettings
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.vae.settings import VaeValidationSettings


@dataclass
class DataSettings:
    """Sources and rules of the training and validation streams; see `data.rules.StreamConfig`.

    Attributes:
        train: a folder, shard, brace pattern or address; or a list of them; or a list of
            `{urls: …, weight: …, index: …}`.
        validation: the same; None validates on the first samples of a fixed order of the training set.
        crop, captions: keys of `data.crops.CropRules` and `data.captions.CaptionRules`.
    """

    train: Any = MISSING
    validation: Any = None
    crop: Any = None
    captions: Any = None
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
    tokenizer = Tokenizer(settings.text_encoder.name).bind(plan.settings.context_length)
    return datamodule_from(settings, plan, settings.validation, tokenizer, consumed)


def datamodule_from(
    settings: TrainSettings,
    plan: StagePlan,
    validation: ValidationSettings | VaeValidationSettings,
    tokenizer: Tokenize | None,
    consumed: int,
) -> ShardDataModule:
    """The data module of a stage, whose position a rewind may have moved: `consumed` wins over a checkpoint's."""
    data = stage_data(settings, plan)
    module = ShardDataModule(
        data.train,
        resolution=plan.settings.resolution,
        batch_size=plan.settings.micro_batch_size,
        tokenizer=tokenizer,
        context_length=plan.settings.context_length,
        validation=data.validation,
        validation_samples=validation.samples,
        validation_batch_size=validation.batch_size,
        validation_seed=validation.seed,
        num_workers=data.workers,
        seed=settings.seed,
        stage=plan.name,
        crop=data.crop,
        captions=data.captions,
        lanes=data.lanes,
        window=data.window,
        max_bad_share=data.max_bad_share,
        bad_patience=data.bad_patience,
        cache_dir=data.cache_dir,
        cache_gb=data.cache_gb,
        memory_cache_gb=data.memory_cache_gb,
        quarantine=f"{settings.run_dir}/{run_folder.QUARANTINE}",
        consumed=consumed,
        samples_per_step=plan.settings.batch_size,
    )
    module.skip_to(consumed)
    return module


def check_data(settings: TrainSettings, plan: StagePlan) -> None:
    """Both streams of a stage exist and have samples; reads indices, no shard.

    Raises:
        UserError: naming the folder or key.
    """
    Plan(training_stream(settings, plan))
    if settings.validation.samples:
        Plan(validation_stream(settings, plan, settings.validation.seed))


def _stream(settings: TrainSettings, plan: StagePlan, sources: Any, order: str, seed: int) -> StreamConfig:
    data = stage_data(settings, plan)
    crop = rules_from(data.crop, CropRules, "data.crop")
    return StreamConfig(
        sources=sources_from(sources, f"data.{'validation' if order == 'validation' else 'train'}"),
        resolution=plan.settings.resolution,
        context_length=plan.settings.context_length,
        seed=seed,
        stage=order,
        crop=crop.with_block(plan.settings.batch_size),  # a step's samples share a shape, on every rank
        captions=rules_from(data.captions, CaptionRules, "data.captions"),
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
