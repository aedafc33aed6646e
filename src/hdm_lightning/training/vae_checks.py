"""From a composed configuration to a checked plan of an autoencoder's training, every mistake named by its key."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hdm_lightning.autoencoding.branches import BranchSettings, draw_branch
from hdm_lightning.autoencoding.losses import PIXEL_LOSSES
from hdm_lightning.encoders.sources import locate_model
from hdm_lightning.encoders.vae import AUTOENCODER_FILES
from hdm_lightning.errors import UserError
from hdm_lightning.training.checks import settings_from
from hdm_lightning.training.settings import ScheduleSettings, StageSettings
from hdm_lightning.training.stages import StagePlan, plan_stages
from hdm_lightning.training.vae_settings import VaeTrainSettings

STAGE = "vae"


def vae_settings_from(config: DictConfig | Mapping[str, Any]) -> VaeTrainSettings:
    """Settings of `hdm-train-vae`.

    Raises:
        UserError: naming an unknown key, a missing value or a wrong type.
    """
    return settings_from(config, VaeTrainSettings)


def plan_vae(settings: VaeTrainSettings, world_size: int) -> StagePlan:
    """Derive steps and accumulation for `world_size` processes.

    Raises:
        UserError: naming the key under `stage`.
    """
    stage = asdict(settings.stage)
    shared = StageSettings(**stage, routing_rate=0.0, context_length=1)
    try:
        return plan_stages(ScheduleSettings(stages={STAGE: shared}), world_size)[0]
    except UserError as error:
        rename = f"schedule.stages.{STAGE}"
        raise UserError(
            error.what.replace(rename, "stage"),
            where=(error.where or "stage").replace(rename, "stage"),
            mend=(error.mend or "").replace(rename, "stage") or None,
        ) from error


def branch_settings(settings: VaeTrainSettings) -> BranchSettings:
    """How branches are drawn.

    Raises:
        UserError: naming the key under `equivariance`.
    """
    values = asdict(settings.equivariance)
    for key in ("scale_numerators", "quarter_turns"):
        values[key] = tuple(values[key])
    try:
        return BranchSettings(**values)
    except ValueError as error:
        raise UserError(str(error), where="equivariance", mend="see conf/vae_training for complete examples") from error


def check_vae_settings(settings: VaeTrainSettings, factor: int) -> None:
    """Check what needs no data: sizes, names and weights.

    Args:
        settings: of the run.
        factor: pixels per latent cell of the autoencoder.

    Raises:
        UserError: naming the key.
    """
    _check_sizes(settings, factor)
    if settings.loss.pixel not in PIXEL_LOSSES:
        known = ", ".join(PIXEL_LOSSES)
        raise UserError(f"'{settings.loss.pixel}' is none of {known}", where="loss.pixel", mend="choose one of them")
    for key in ("pixel_weight", "perceptual_weight", "kl_weight"):
        if getattr(settings.loss, key) < 0:
            raise UserError("is negative", where=f"loss.{key}", mend="give 0 or a positive weight")
    if settings.validation.samples < 1:
        raise UserError(
            "the latent statistics of the result are measured on the validation samples, so there must be some",
            where="validation.samples",
            mend="give at least 1, better 256",
        )
    if settings.adversarial.weight and settings.trainer.precision == "16-mixed":
        raise UserError(
            "float16 scales gradients, which the two optimisers of adversarial training would clip wrongly",
            where="trainer.precision",
            mend="use bf16-mixed or 32-true",
        )


def _check_sizes(settings: VaeTrainSettings, factor: int) -> None:
    resolution = settings.stage.resolution
    if resolution % factor:
        raise UserError(
            f"{resolution} px is not a multiple of the autoencoder's factor {factor}",
            where="stage.resolution",
            mend=f"set it to {max(1, round(resolution / factor)) * factor}",
        )
    cells, branches = resolution // factor, branch_settings(settings)
    scaled = branches.equivariant > 0 or branches.downscaled > 0
    if scaled and branches.scale_numerators:
        always = BranchSettings(**{**asdict(branches), "equivariant": 1.0, "downscaled": 0.0})
        try:
            draw_branch(always, cells, cells, seed=0, samples_seen=0)
        except ValueError as error:
            raise UserError(
                str(error),
                where="equivariance.scale_numerators",
                mend=f"choose scale_denominator={cells} and numerators below it, or another stage.resolution",
            ) from error


def autoencoder_factor(settings: VaeTrainSettings) -> int:
    """Pixels per latent cell, from the autoencoder's configuration alone.

    Raises:
        UserError: naming `autoencoder.source` or `autoencoder.config`.
    """
    return 2 ** (len(autoencoder_config(settings)["block_out_channels"]) - 1)


def autoencoder_config(settings: VaeTrainSettings) -> dict[str, Any]:
    """Fields of the AutoencoderKL that will be trained.

    Raises:
        UserError: naming `autoencoder.source` or `autoencoder.config`.
    """
    source, config = settings.autoencoder.source, settings.autoencoder.config
    if (source is None) == (config is None):
        raise UserError(
            "give exactly one of source (to fine-tune) and config (to train from nothing)",
            where="autoencoder",
            mend="autoencoder.source=FOLDER, or choose vae_training=from_nothing_tiny",
        )
    if config is not None:
        if not config.get("block_out_channels"):
            raise UserError("is missing", where="autoencoder.config.block_out_channels", mend="e.g. [64, 128, 256]")
        return config
    assert source is not None
    folder = locate_model(source, where="autoencoder.source", required=AUTOENCODER_FILES)
    written: dict[str, Any] = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    if "block_out_channels" not in written:
        raise UserError("is no AutoencoderKL", where="autoencoder.source", mend="give a diffusers AutoencoderKL folder")
    return written
