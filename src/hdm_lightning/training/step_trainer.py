"""The Lightning trainer of a fit that counts steps: no epochs, and no work of Lightning's own beyond the loop."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from hdm_lightning.training import hardware, processes
from hdm_lightning.training.checkpoint_io import AtomicCheckpointIO
from hdm_lightning.training.settings import TrainerSettings
from hdm_lightning.training.stop_request import without_own_signals


def step_trainer(
    settings: TrainerSettings, steps: int, callbacks: list[Callback], logger: Logger, **options: Any
) -> Trainer:
    """A trainer for so many optimizer steps on this process's device.

    Args:
        settings: devices and precision.
        steps: optimizer steps after which the fit ends.
        callbacks: in the order in which they act; validation, checkpoints and the progress bar are among them.
        logger: where metrics go.
        options: of `lightning.Trainer` in which the trainings differ: strategy, accumulation, clipping.
    """
    trainer = Trainer(
        accelerator=hardware.accelerator(settings),
        devices=processes.local_world_size(),
        num_nodes=processes.nodes(),
        precision=hardware.precision(settings),
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), processes.cluster_environment()],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        **options,
    )
    return without_own_signals(trainer)
