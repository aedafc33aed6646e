"""From a composed configuration to a checked plan of an autoencoder's training, every mistake named by its key."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig

from hdm_lightning.autoencoding.branches import BranchSettings
from hdm_lightning.autoencoding.perceptual import SMALLEST_SIDES
from hdm_lightning.autoencoding.transforms import exact_scales
from hdm_lightning.encoders.autoencoder_folder import check_shapes, locate_autoencoder, read_config
from hdm_lightning.errors import UserError
from hdm_lightning.metrics.image_quality import SMALLEST_SIDE
from hdm_lightning.models.discriminator import smallest_side
from hdm_lightning.training import hardware
from hdm_lightning.training.checks import settings_from
from hdm_lightning.training.settings import ScheduleSettings, StageSettings
from hdm_lightning.training.stages import StagePlan, plan_stages
from hdm_lightning.training.vae.network import build_vae
from hdm_lightning.training.vae.ranges import check_adversarial, check_loss, check_validation, check_without_effect
from hdm_lightning.training.vae.settings import VaeTrainSettings

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
            hint=(error.hint or "").replace(rename, "stage") or None,
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
        raise UserError(str(error), where="equivariance", hint="see conf/vae_training for complete examples") from error


def check_vae_settings(settings: VaeTrainSettings, factor: int) -> None:
    """Check what needs no data: sizes, names and weights.

    Args:
        settings: of the run.
        factor: pixels per latent cell of the autoencoder.

    Raises:
        UserError: naming the key.
    """
    _check_sizes(settings, factor)
    check_loss(settings)
    check_validation(settings)
    check_adversarial(settings)
    check_without_effect(settings)
    _check_patches(settings, factor)
    _check_perceptual(settings, factor)
    _check_discriminator(settings, factor)
    _check_trainer(settings)


def _check_trainer(settings: VaeTrainSettings) -> None:
    hardware.check_strategy(settings.trainer, optimizer="adamw")
    if settings.trainer.strategy == hardware.SHARDED:
        raise UserError(
            "an autoencoder is small and is trained whole on every device: fsdp2 is for hdm-train",
            where="trainer.strategy",
            hint="use auto or ddp",
        )
    if hardware.precision(settings.trainer) == hardware.FLOAT16 and settings.adversarial.weight:
        raise UserError(
            "float16 scales gradients, which the two optimizers of adversarial training would clip wrongly",
            where="trainer.precision",
            hint="use bf16-mixed or 32-true",
        )


def _check_sizes(settings: VaeTrainSettings, factor: int) -> None:
    resolution = settings.stage.resolution
    if resolution % factor:
        raise UserError(
            f"{resolution} px is not a multiple of the autoencoder's factor {factor}",
            where="stage.resolution",
            hint=f"set it to {max(1, round(resolution / factor)) * factor}",
        )
    if resolution < SMALLEST_SIDE:
        raise UserError(
            f"{resolution} px are too few to measure, {SMALLEST_SIDE} are needed",
            where="stage.resolution",
            hint=f"set it to {-(-SMALLEST_SIDE // factor) * factor} or more",
        )
    crop = settings.data.get("crop")
    if isinstance(crop, Mapping) and crop.get("buckets"):
        raise UserError(
            "the transforms of the equivariance need square pictures",
            where="data.crop.buckets",
            hint="set it to null",
        )
    smallest_trained(settings, resolution // factor)


def smallest_trained(settings: VaeTrainSettings, cells: int) -> int:
    """Side in latent cells of the smallest picture that the branches make out of `cells`.

    Raises:
        UserError: no scale gives a whole number of cells.
    """
    branches = branch_settings(settings)
    if not (branches.equivariant or branches.downscaled):
        return cells
    if not branches.scale_numerators:
        if branches.downscaled:
            raise UserError(
                "is empty, so that the down-scaled branch would not scale",
                where="equivariance.scale_numerators",
                hint="give some, or equivariance.downscaled=0",
            )
        return cells
    scales = exact_scales(cells, branches.scale_numerators, branches.scale_denominator)
    if not scales:
        raise UserError(
            f"no scale n/{branches.scale_denominator} gives a whole size of a latent of {cells} cells",
            where="equivariance.scale_numerators",
            hint=f"choose scale_denominator={cells} and numerators below it, or another size of the pictures",
        )
    moves = branches.flips or any(turns % 4 for turns in branches.quarter_turns)
    if max(branches.downscaled, 0 if moves else branches.equivariant) and min(scales) == 1:
        raise UserError(
            f"of these scales only 1 gives a whole size of a latent of {cells} cells, and it changes nothing",
            where="equivariance.scale_numerators",
            hint="give numerators below scale_denominator, or set the probability of the branch to 0",
        )
    return int(cells * min(scales))


def _check_patches(settings: VaeTrainSettings, factor: int) -> None:
    patches, resolution = settings.patches, settings.stage.resolution
    if patches.samples < 0:
        raise UserError("is negative", where="patches.samples", hint="give 0 or a positive number")
    if not patches.samples:
        return
    if patches.size_px < factor or patches.size_px % factor or patches.size_px > resolution:
        raise UserError(
            f"{patches.size_px} px is not a multiple of the autoencoder's factor {factor} between it and {resolution}",
            where="patches.size_px",
            hint=f"set it to {max(factor, resolution // 2 // factor * factor)}, or patches.samples=0",
        )
    smallest_trained(settings, patches.size_px // factor)


def _smallest_picture(settings: VaeTrainSettings, factor: int) -> int:
    """Side in pixels of the smallest picture that the losses see."""
    sides = [settings.stage.resolution, *([settings.patches.size_px] if settings.patches.samples else [])]
    return min(smallest_trained(settings, side // factor) for side in sides) * factor


def _check_perceptual(settings: VaeTrainSettings, factor: int) -> None:
    named = settings.loss.perceptual_network
    smallest = _smallest_picture(settings, factor)
    if named is not None and smallest < SMALLEST_SIDES[named]:
        raise UserError(
            f"pictures get as small as {smallest} px, {named} needs {SMALLEST_SIDES[named]} px",
            where="loss.perceptual_network",
            hint="use efficientnet_lite0, larger equivariance.scale_numerators or a larger stage.resolution",
        )


def _check_discriminator(settings: VaeTrainSettings, factor: int) -> None:
    adversarial = settings.adversarial
    if not adversarial.weight:
        return
    smallest = _smallest_picture(settings, factor)
    if smallest < smallest_side(adversarial.layers):
        raise UserError(
            f"pictures get as small as {smallest} px, a discriminator of {adversarial.layers} layers needs "
            f"{smallest_side(adversarial.layers)} px",
            where="adversarial.layers",
            hint="use fewer layers, larger equivariance.scale_numerators or a larger stage.resolution",
        )


def autoencoder_factor(settings: VaeTrainSettings) -> int:
    """Pixels per latent cell, from the autoencoder's configuration alone.

    Raises:
        UserError: naming `autoencoder.source` or `autoencoder.config`.
    """
    return 2 ** (len(autoencoder_config(settings)["block_out_channels"]) - 1)


def keeps_normalisation(settings: VaeTrainSettings) -> bool:
    """Whether the latent space stays and its normalisation is known, so that what was trained on it goes on working."""
    if settings.autoencoder.train_encoder or settings.autoencoder.source is None:
        return False
    written = autoencoder_config(settings)
    return any(written.get(key) is not None for key in ("latents_std", "scaling_factor"))


def autoencoder_config(settings: VaeTrainSettings) -> dict[str, Any]:
    """Fields of the AutoencoderKL that will be trained.

    Raises:
        UserError: naming `autoencoder.source` or `autoencoder.config`.
    """
    source, config = settings.autoencoder.source, settings.autoencoder.config
    if (source is None) == (config is None):
        raise UserError(
            "give exactly one of source (to fine-tune) and config (to train from scratch)",
            where="autoencoder",
            hint="autoencoder.source=FOLDER, or choose vae_training=from_scratch_tiny",
        )
    if config is not None:
        if not config.get("block_out_channels"):
            raise UserError(
                "is missing",
                where="autoencoder.config.block_out_channels",
                hint="e.g. [64, 128, 256], with as many down_block_types and up_block_types",
            )
        with torch.device("meta"):
            check_shapes(build_vae(config), where="autoencoder.config")
        return config
    assert source is not None
    where = "autoencoder.source"
    return read_config(locate_autoencoder(source, where=where), where=where)
