"""The TensorBoard logger of a stage: one run per stage, all on the axis of samples seen."""

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

Layout = dict[str, dict[str, list[str | list[str]]]]
"""Categories and charts of the Custom Scalars page, most asked first; tags are regular expressions."""


def lines(*tags: str) -> list[str | list[str]]:
    """A chart with every scalar whose tag fits one of the patterns."""
    return ["Multiline", list(tags)]


def flow_layout(time_bins: int) -> Layout:
    """The page of a flow-matching stage; of the loss by time it shows the first, the middle and the last bin."""
    shown = [time_bin_tag(number, time_bins) for number in sorted({0, time_bins // 2, time_bins - 1})]
    return {
        "Is it learning?": {
            "loss: training, validation": lines("loss/.*"),
            "loss at times t: near data, middle, near noise": lines(*(tag.replace(".", r"\.") for tag in shown)),
            "gradient norm before clipping": lines("optimizer/gradient_norm"),
            "learning rate, share of the stage's": lines("optimizer/learning_rate_factor"),
            "weight norm": lines("optimizer/weight_norm"),
        },
        "Is it fast?": {
            "images a second": lines("speed/images_per_s"),
            "where a step's time goes (ms)": lines("step_time_ms/.*"),
            "TFLOP/s of the network": lines("speed/tflops"),
            "shares: of peak (MFU), of the time spent training": lines("speed/mfu", "speed/training_share"),
            "memory (GB)": lines("memory_gb/.*"),
        },
        "What has it seen?": {
            "passes over the data": lines("seen/passes"),
            "samples that could not be used": lines("seen/holes", "seen/quarantined"),
        },
    }


def time_bin_tag(number: int, bins: int) -> str:
    """Tag of the training loss in one bin of the time."""
    return f"loss_by_time/{number / bins:.3f}-{(number + 1) / bins:.3f}"


VAE_LAYOUT: Layout = {
    "Is it learning?": {
        "training: loss terms": lines("train/.*"),
        "validation: PSNR (dB)": lines("reconstruction/psnr_db"),
        "validation: L1 error": lines("reconstruction/l1"),
        "validation: equivariance errors": lines("equivariance/(en|de)coder_(rotation|scale|scale_antialiased)$"),
        "learning rate": lines("optimizer/learning_rate"),
    },
    "Is it fast?": {"images a second": lines("speed/images_per_s")},
}
"""The page of an autoencoder's training."""


def stage_logger(folder: Path, config_text: str, first_sample: int, layout: Layout) -> TensorBoardLogger:
    """Logger into `folder`/tensorboard.

    Args:
        folder: the stage's folder.
        config_text: the run's configuration as YAML, shown under Text.
        first_sample: where this fit starts; what an interrupted fit wrote beyond it is hidden.
        layout: of the Custom Scalars page.
    """
    logger = TensorBoardLogger(folder, name="", version="tensorboard", purge_step=first_sample + 1, max_queue=100)
    if first_sample == 0 or not any((folder / "tensorboard").glob("events.*")):
        logger.experiment.add_custom_scalars(layout)
        logger.experiment.add_text("config", f"```yaml\n{config_text}\n```", first_sample)
    return logger
