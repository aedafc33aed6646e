"""Images for an autoencoder's training and validation: the streams of `training.data_settings` without captions."""

from collections.abc import Mapping

from hdm_lightning.data.datamodule import ShardDataModule
from hdm_lightning.data.plan import Plan
from hdm_lightning.training.data_settings import training_stream, validation_stream
from hdm_lightning.training.settings import TrainSettings
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.vae.settings import VaeTrainSettings


def no_tokens(caption: str) -> tuple[list[int], int]:
    """Stand in for a tokenizer where captions play no part."""
    return [0], 1


def build_images(settings: VaeTrainSettings, plan: StagePlan, consumed: int) -> ShardDataModule:
    """Return the data, starting after `consumed` samples."""
    shared = _shared(settings)
    return ShardDataModule(
        training_stream(shared, plan),
        validation_stream(shared, plan, settings.validation.seed),
        tokenize=no_tokens,
        batch_size=plan.settings.micro_batch_size,
        consumed=consumed,
        validation_samples=settings.validation.samples,
        validation_batch_size=settings.validation.batch_size,
    )


def check_images(settings: VaeTrainSettings, plan: StagePlan) -> None:
    """Both streams exist and have samples; reads indices, no shard.

    Raises:
        UserError: naming the folder or key.
    """
    shared = _shared(settings)
    Plan(training_stream(shared, plan))
    Plan(validation_stream(shared, plan, settings.validation.seed))


def _shared(settings: VaeTrainSettings) -> TrainSettings:
    """The part of the settings that the streams of both training commands have in common."""
    data = dict(settings.data)
    captions = data.get("captions") or {}
    if isinstance(captions, Mapping):  # what is no group is named where the stream is built
        data["captions"] = {**captions, "allow_missing": True}
    return TrainSettings(
        name=settings.name,
        run_dir=settings.run_dir,
        seed=settings.seed,
        model={},
        data=data,
        schedule=None,  # type: ignore[arg-type]
    )
