"""The TensorBoard logger of a stage: one run per stage, all on the axis of samples seen."""

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

LAYOUT = {
    "Training": {
        "loss": ["Multiline", ["train/loss", "validation/loss_.*"]],
        "loss by time": ["Multiline", ["train_loss_by_time/.*"]],
        "speed": ["Multiline", ["speed/images_per_s"]],
        "a step's time (ms)": ["Multiline", ["step_time_ms/.*"]],
        "gradient norm": ["Multiline", ["optimiser/gradient_norm"]],
        "learning rate, share of base": ["Multiline", ["optimiser/learning_rate_factor"]],
    }
}


def stage_logger(folder: Path, config_text: str, first_sample: int) -> TensorBoardLogger:
    """Logger into `folder`/tensorboard.

    Args:
        folder: the stage's folder.
        config_text: the run's configuration as YAML, shown under Text.
        first_sample: where this fit starts; what an interrupted fit wrote beyond it is hidden.
    """
    logger = TensorBoardLogger(folder, name="", version="tensorboard", purge_step=first_sample + 1, max_queue=100)
    if first_sample == 0 or not any((folder / "tensorboard").glob("events.*")):
        logger.experiment.add_custom_scalars(LAYOUT)
        logger.experiment.add_text("config", f"```yaml\n{config_text}\n```", first_sample)
    return logger
