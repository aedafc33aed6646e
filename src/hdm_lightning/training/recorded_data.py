"""The data for evaluating a recorded run: its rules, its own or other sources, and nothing written."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from hdm_lightning.data.datamodule import ShardDataModule
from hdm_lightning.data.inspection import trained_caption_lengths
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.data.shard_bytes import is_local
from hdm_lightning.data.source_shards import expanded
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError
from hdm_lightning.training.recorded import TrainSettings
from hdm_lightning.training.stages import StagePlan

Sources = tuple[Source, ...]
MOST_ADDRESSES = 1_000_000


def recorded_training_stream(settings: TrainSettings, plan: StagePlan, given: Sources | None) -> StreamConfig:
    """Return the training stream of a recorded run, or one with its rules over the sources `given`.

    Raises:
        UserError: its own sources are not all folders or http(s) addresses; see `_harmless`.
    """
    return _harmless(_recorded_data(settings, plan, settings.validation.seed).training_stream, given, "--train-data")


def recorded_validation_stream(settings: TrainSettings, plan: StagePlan, given: Sources | None) -> StreamConfig:
    """Return a recorded run's validation stream in its order, or one with its rules over the sources `given`.

    Raises:
        UserError: its own sources are not all folders or http(s) addresses; see `_harmless`.
    """
    data = _recorded_data(settings, plan, settings.seed)
    stream = replace(data.validation_stream, crop=data.training_stream.crop, captions=data.training_stream.captions)
    return _harmless(stream, given, "--data")


def caption_lengths(settings: TrainSettings, plan: StagePlan, context_length: int, count: int) -> list[int]:
    """Return token counts of some captions as the stage trains on them, ascending; see `trained_caption_lengths`.

    Raises:
        UserError: the data or the tokenizer is not available.
    """
    tokenizer = Tokenizer(settings.text_encoder.name).load().bind(context_length)
    stream = replace(_recorded_data(settings, plan, settings.seed).training_stream, context_length=context_length)
    return trained_caption_lengths(stream, tokenizer, count)


_TAKEN = ("train", "validation", "crop", "captions", "lanes", "window", "max_bad_share", "bad_patience")
"""Recorded arguments of the data that are used; where files go and how many processes read is decided here."""


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
    """Stand in for a tokenizer where nothing is trained."""
    return [0], 1


def _harmless(stream: StreamConfig, given: Sources | None, option: str) -> StreamConfig:
    """Return a stream that writes nothing and reads the sources `given`, else only folders and http(s) addresses.

    Other addresses run commands (`pipe:`) or whatever an fsspec chain stands for.
    """
    stream = replace(stream, workers=0, quarantine=None, cache_dir=None, memory_cache_gb=0.0)
    if given is not None:
        return replace(stream, sources=given)
    for address in (address for source in stream.sources for address in _addresses(source)):
        if not (is_local(address) or address.startswith(("http://", "https://"))):
            raise UserError(
                f"the run's configuration names {address[:200]!r}; of recorded sources, only folders and http(s) "
                "addresses are opened",
                where=option,
                hint=f"name the shards yourself: {option} FOLDER_OR_ADDRESS",
            )
    return stream


def _addresses(source: Source) -> Iterator[str]:
    """Yield every address of a source."""
    for pattern in source.urls:
        yield from islice(expanded(pattern), MOST_ADDRESSES)
    if source.index is not None:
        yield source.index
