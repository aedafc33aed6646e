"""Metrics of any logger on an axis of samples instead of steps."""

from collections.abc import Mapping
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger

AnyLogger = TypeVar("AnyLogger", bound=Logger)


def on_sample_axis(logger: AnyLogger, module: LightningModule, samples_before: int = 0) -> AnyLogger:
    """Let a logger write every entry at the samples that the module has been trained on when it is made.

    Entries of trainings with other batch sizes then stand on one axis, after one another.

    Args:
        logger: changed in place and returned.
        module: with `samples_trained`.
        samples_before: samples of the trainings before this one.
    """
    original = logger.log_metrics

    def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> Any:
        del step
        return original(dict(metrics), step=samples_before + int(module.samples_trained))  # type: ignore[arg-type]

    logger.log_metrics = log_metrics  # type: ignore[method-assign]
    return logger
