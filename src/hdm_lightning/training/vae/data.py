"""Images for an autoencoder's training and validation: the streams of `training.data_settings` without captions."""

from collections.abc import Mapping

from hdm_lightning.data.datamodule import ShardDataModule
from hdm_lightning.data.plan import Plan
from hdm_lightning.training.data_settings import datamodule_from, training_stream, validation_stream
from hdm_lightning.training.settings import TrainSettings
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.vae.settings import VaeTrainSettings


def build_images(settings: VaeTrainSettings, plan: StagePlan, consumed: int) -> ShardDataModule:
    """Return the data, starting after `consumed` samples."""
    return datamodule_from(_shared(settings), plan, settings.validation, None, consumed)


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
