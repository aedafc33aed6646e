"""Values of an autoencoder's training that are wrong whatever the sizes: negative, unknown, or without effect."""

import math
from typing import Any

from hdm_lightning.autoencoding.losses import PIXEL_LOSSES
from hdm_lightning.autoencoding.perceptual import LITE0, require_perceptual
from hdm_lightning.errors import UserError
from hdm_lightning.models.discriminator import NORMS
from hdm_lightning.training.vae.settings import VaeTrainSettings


def check_loss(settings: VaeTrainSettings) -> None:
    """Kind and weights of the terms, and what the perceptual one needs.

    Raises:
        UserError: naming the key.
    """
    if settings.loss.pixel not in PIXEL_LOSSES:
        known = ", ".join(PIXEL_LOSSES)
        raise UserError(f"'{settings.loss.pixel}' is none of {known}", where="loss.pixel", hint="choose one of them")
    _not_negative(settings.loss, "loss", "pixel_weight", "perceptual_weight", "kl_weight")
    perceptual = settings.loss.perceptual_network is not None and settings.loss.perceptual_weight
    if not settings.loss.pixel_weight and not perceptual:
        raise UserError(
            "is 0 and there is no perceptual term: nothing asks for the picture back",
            where="loss.pixel_weight",
            hint="give a positive weight, or a loss.perceptual_network with a weight",
        )
    if not math.isfinite(settings.autoencoder.initial_log_variance):
        value = settings.autoencoder.initial_log_variance
        raise UserError(f"{value} is no number", where="autoencoder.initial_log_variance", hint="e.g. -5")
    if settings.loss.perceptual_network is not None:
        require_perceptual(settings.loss.perceptual_network)


def check_validation(settings: VaeTrainSettings) -> None:
    """There are samples to measure, and the packages of what is measured.

    Raises:
        UserError: naming the key.
    """
    validation = settings.validation
    if validation.samples < 1:
        raise UserError(
            "the latent statistics of the result are measured on the validation samples, so there must be some",
            where="validation.samples",
            hint="give at least 1, better 256",
        )
    _positive(validation, "validation", "batch_size")
    _not_negative(validation, "validation", "pictures")
    if validation.perceptual_network is not None:
        require_perceptual(validation.perceptual_network, where="validation.perceptual_network")
    if validation.features == LITE0:
        require_perceptual(LITE0, where="validation.features")


def check_adversarial(settings: VaeTrainSettings) -> None:
    """The discriminator's settings, where there is one.

    Raises:
        UserError: naming the key.
    """
    adversarial = settings.adversarial
    _not_negative(adversarial, "adversarial", "weight", "start_samples")
    if not adversarial.weight:
        return
    if adversarial.norm not in NORMS:
        raise UserError(
            f"'{adversarial.norm}' is none of {', '.join(NORMS)}", where="adversarial.norm", hint="use group"
        )
    _positive(adversarial, "adversarial", "learning_rate", "channels", "layers", "adaptive_largest")
    _not_negative(adversarial, "adversarial", "weight_decay", "gradient_clip")
    if not all(0 <= beta < 1 for beta in adversarial.betas):
        raise UserError(f"{adversarial.betas} are not in [0, 1)", where="adversarial.betas", hint="e.g. [0.5, 0.9]")
    if adversarial.start_samples >= settings.stage.samples:
        raise UserError(
            f"the discriminator would set in after {adversarial.start_samples} samples, when the training of "
            f"{settings.stage.samples} is over",
            where="adversarial.start_samples",
            hint="set it below stage.samples, or adversarial.weight=0 for no discriminator",
        )


def check_without_effect(settings: VaeTrainSettings) -> None:
    """Keys that the groups share with `hdm-train` and that only it follows are left alone.

    Raises:
        UserError: naming the key.
    """
    for where, value in (
        ("trainer.compress_gradients", settings.trainer.compress_gradients),
        ("trainer.static_graph", settings.trainer.static_graph),
        ("ema.sigma_rel", settings.ema.sigma_rel),
        ("ema.snapshot_every", settings.ema.snapshot_every),
    ):
        if value:
            raise UserError("has no effect on an autoencoder's training", where=where, hint="leave it out")


def _positive(group: Any, name: str, *keys: str) -> None:
    for key in keys:
        value = getattr(group, key)
        if not 0 < value < math.inf:
            raise UserError(f"{value} is not positive and finite", where=f"{name}.{key}", hint="give such a value")


def _not_negative(group: Any, name: str, *keys: str) -> None:
    for key in keys:
        value = getattr(group, key)
        if not 0 <= value < math.inf:
            what = f"{value} is negative" if value < 0 else f"{value} is no finite number"
            raise UserError(what, where=f"{name}.{key}", hint="give 0 or a positive value")
