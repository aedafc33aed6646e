"""The TensorBoard logger of a stage: one run per stage, all on the axis of samples seen."""

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

LAYOUT = {
    "Is it learning?": {
        "loss: training, validation": ["Multiline", ["train/loss", "validation/loss_.*"]],
        "loss by time t (1 is noise)": ["Multiline", ["train_loss_by_time/.*"]],
        "gradient norm before clipping": ["Multiline", ["optimiser/gradient_norm"]],
        "learning rate, share of the stage's": ["Multiline", ["optimiser/learning_rate_factor"]],
        "weight norm": ["Multiline", ["optimiser/weight_norm"]],
    },
    "Is it fast?": {
        "images a second": ["Multiline", ["speed/images_per_s"]],
        "where a step's time goes (ms)": ["Multiline", ["step_time_ms/.*"]],
        "TFLOP/s of the network": ["Multiline", ["speed/tflops"]],
        "shares: of peak (MFU), of the time spent training": ["Multiline", ["speed/mfu", "speed/training_share"]],
        "memory (GB)": ["Multiline", ["memory_gb/.*"]],
    },
    "What has it seen?": {
        "passes over the data": ["Multiline", ["data/passes"]],
        "samples that could not be used": ["Multiline", ["data/holes", "data/quarantined"]],
    },
}
"""Categories and charts of the Custom Scalars page, most asked first; tags are regular expressions."""


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
