"""A run's loggers: their sample axis, TensorBoard's charts, and a row of settings and results."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from hdm_lightning.training.callbacks.step_metrics import time_bin_tag

AnyLogger = TypeVar("AnyLogger", bound=Logger)


def on_sample_axis(logger: AnyLogger, module: LightningModule, samples_before: int = 0) -> AnyLogger:
    """Make a logger use the module's number of trained samples as the step of every entry.

    Stages with different batch sizes then follow each other on one axis.

    Args:
        logger: changed in place and returned.
        module: has an attribute `samples_trained`.
        samples_before: samples of the stages before this one.
    """
    original = logger.log_metrics

    def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> Any:
        del step
        return original(dict(metrics), step=samples_before + int(module.samples_trained))  # type: ignore[arg-type]

    logger.log_metrics = log_metrics  # type: ignore[method-assign]
    return logger


Layout = dict[str, dict[str, list[str | list[str]]]]
"""Categories and charts of the Custom Scalars page, most wanted first; tags are regular expressions."""


def lines(*tags: str) -> list[str | list[str]]:
    """Return a chart of every scalar whose tag matches one of the patterns."""
    return ["Multiline", list(tags)]


def flow_layout(time_bins: int) -> Layout:
    """Return the page of a flow-matching stage, with the loss by time in the first, the middle and the last bin."""
    shown = [time_bin_tag(number, time_bins) for number in sorted({0, time_bins // 2, time_bins - 1})]
    return {
        "Is it learning?": {
            "loss: training, validation": lines("train/loss_mean", "val/loss.*"),
            "loss at times t: near data, middle, near noise": lines(*(tag.replace(".", r"\.") for tag in shown)),
            "gradient norm before clipping": lines("optimizer/gradient_norm"),
            "learning rate": lines("lr$"),
            "weight norm": lines("optimizer/weight_norm"),
        },
        "Is it fast?": {
            "images per second": lines("speed/images_per_s"),
            "where a step's time goes (ms)": lines("step_time_ms/.*"),
            "TFLOP/s of the network": lines("speed/tflops"),
            "shares: of peak (MFU), of the time spent training": lines("speed/mfu", "speed/training_share"),
            "memory (GB)": lines("memory_gb/.*"),
        },
        "What has it seen?": {
            "passes over the data": lines("seen/passes"),
            "samples that could not be used": lines("seen/masked", "seen/quarantined"),
        },
    }


VAE_LAYOUT: Layout = {
    "Autoencoder: is it learning?": {
        "training: loss terms": lines(r"train/(?!loss(_mean)?$).*"),
        "validation: PSNR (dB)": lines("reconstruction/psnr_db"),
        "validation: L1 error": lines("reconstruction/l1"),
        "validation: equivariance errors": lines("equivariance/(en|de)coder_(rotation|scale|scale_antialiased)$"),
        "learning rate": lines("lr$"),
    },
    "Autoencoder: is it fast?": {"images per second": lines("speed/images_per_s")},
}
"""The page of an autoencoder's training, with category names of its own so that it can share a log folder."""


def write_page(logger: TensorBoardLogger, layout: Layout, config_text: str, sample: int) -> None:
    """Write a stage's Custom Scalars page, and the run's configuration under Text."""
    logger.experiment.add_custom_scalars(layout)
    logger.experiment.add_text("config", f"```yaml\n{config_text}\n```", sample)


FOLDER = "hparams"
OUTCOME_PREFIX = "outcome/"
LEFT_OUT = (
    r"run_dir|name|resume|(logger|guard|trainer|hardware|stage)\..*|.*\._(target|partial)_",
    r"callbacks\.(?!weight_averages).*",
    r"data\.(num_workers|lanes|window|max_bad_share|bad_patience|cache_dir|cache_gb|memory_cache_gb|quarantine)",
    r"(text_encoder|vae)\.(max_tokens|max_pixels|cache_size|made_by)",
    r"schedule\.stages\.\w+\.(micro_batch_size|activation_checkpointing|validate_every|save_every|sample_every)",
)
"""Patterns of full keys that affect where a run is, what it shows and how fast it is, but not what it learns."""


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, float | str | bool]:
    """Return every leaf under its dotted key, except `LEFT_OUT`; lists become text, None becomes `null`."""
    flat: dict[str, float | str | bool] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{name}.")
        elif not any(re.fullmatch(pattern, name) for pattern in LEFT_OUT):
            flat[name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


def write_row(folder: Path, settings: dict[str, float | str | bool], outcome: dict[str, float], step: int) -> None:
    """Write settings and results to `folder` as the only session of the HParams plugin there.

    The tags of the results are prefixed with `OUTCOME_PREFIX`; `step` is the number of samples seen.
    """
    for old in folder.glob("events.*"):
        old.unlink()
    logger = TensorBoardLogger(folder.parent, name="", version=folder.name)
    logger.log_hyperparams(dict(settings), {f"{OUTCOME_PREFIX}{name}": value for name, value in outcome.items()}, step)
    logger.experiment.close()
