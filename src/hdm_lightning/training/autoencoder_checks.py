"""Checks of an autoencoder training's configuration, before the first weight is allocated."""

from typing import Annotated, Any, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field

from hdm_lightning.autoencoding.branches import BranchSettings
from hdm_lightning.autoencoding.perceptual import LITE0, SMALLEST_SIDES, require_perceptual
from hdm_lightning.autoencoding.transforms import exact_scales
from hdm_lightning.data.datamodule import ShardDataModule
from hdm_lightning.encoders.vae_folder import check_shapes, locate_autoencoder, read_config
from hdm_lightning.errors import UserError
from hdm_lightning.metrics.autoencoder_quality import SMALLEST_SIDE
from hdm_lightning.models.discriminator import smallest_side
from hdm_lightning.training import hardware
from hdm_lightning.training.composition import build, check_call, plain, target_of
from hdm_lightning.training.continued import check_continued, has_begun
from hdm_lightning.training.modules.autoencoder_network import build_vae
from hdm_lightning.training.run_recipe import Recipe, group, with_stage
from hdm_lightning.training.stages import Count, Decay, Interval, NotNegative, Positive, StagePlan, Validation, settings


@settings
class AutoencoderSource:
    """Where the autoencoder to train comes from: exactly one of `source` and `config`.

    Attributes:
        source: a diffusers folder or hub name (`OWNER/NAME`, `OWNER/NAME/vae`) to fine-tune.
        config: fields of a diffusers AutoencoderKL to train from scratch.
        train_encoder: False freezes the encoder, and with it the latent space, and trains only the decoder.
        initial_log_variance: initial posterior log-variance of a network trained from scratch; diffusers' default (0)
            drowns the latents of the first steps in noise.
    """

    source: str | None = None
    config: dict[str, Any] | None = None
    train_encoder: bool = True
    initial_log_variance: Annotated[float, Field(allow_inf_nan=False)] = -5.0


@settings
class AutoencoderLoss:
    """Terms of the generator's loss, all means.

    Attributes:
        pixel: kind of the pixel term.
        pixel_weight: weight of the pixel term.
        perceptual_network: `efficientnet_lite0`, `lpips_vgg`, `lpips_alex`, `lpips_squeeze`, or None to omit the term.
        perceptual_weight: weight of the perceptual term.
        kl_weight: weight of the KL divergence per latent element.
    """

    pixel: Literal["l1", "l2", "huber"] = "l1"
    pixel_weight: NotNegative = 1.0
    perceptual_network: str | None = "efficientnet_lite0"
    perceptual_weight: NotNegative = 1.0
    kl_weight: NotNegative = 1e-6


@settings
class Patches:
    """A first phase of training on image patches, which cost less than whole images.

    Attributes:
        size_px: side of the square patch in pixels.
        samples: samples to see before training on whole images; 0 trains on whole images from the start.
    """

    size_px: Interval = 0
    samples: Interval = 0


@settings
class Adversarial:
    """PatchGAN with hinge loss; `weight: 0` trains without a discriminator.

    Attributes:
        weight: weight of the adversarial term, multiplied by the adaptive weight if that is on.
        adaptive: balance the gradients of the term and of the reconstruction at the decoder's last layer.
        adaptive_largest: upper limit of the adaptive weight.
        start_samples: samples to see before the discriminator and the adversarial term start.
        learning_rate: learning rate of the discriminator.
        weight_decay: weight decay of the discriminator.
        betas: moment decays of the discriminator.
        gradient_clip: largest gradient norm of the discriminator; 0 means no clipping.
        channels: channels of the discriminator's first layer.
        layers: downsampling layers of the discriminator.
        norm: normalization of the discriminator.
    """

    weight: NotNegative = 0.0
    adaptive: bool = True
    adaptive_largest: Positive = 1e4
    start_samples: Interval = 0
    learning_rate: Positive = 1e-4
    weight_decay: NotNegative = 0.0
    betas: tuple[Decay, Decay] = (0.5, 0.9)
    gradient_clip: NotNegative = 1.0
    channels: Count = 64
    layers: Count = 3
    norm: Literal["batch", "group", "none"] = "group"


@settings
class AutoencoderValidation(Validation):
    """The fixed validation set and what is measured on it.

    Attributes:
        images: images to show with their reconstructions.
        perceptual_network: perceptual distance to report; None reports the one of the loss, if any.
        features: feature network for the kernel and Fréchet distances of the reconstructions, as in `hdm-evaluate
            --features`; None omits them.
    """

    batch_size: Count = 16
    images: Interval = 6
    perceptual_network: str | None = None
    features: str | None = None


def check(config: DictConfig, recipe: Recipe, plan: StagePlan) -> None:
    """Check a configuration, reading indices, configurations and a few samples of shards that seem to have changed.

    Raises:
        UserError: naming the key or file and what to do.
    """
    groups = {name: group(config, recipe, name) for name in recipe.groups}
    factor = autoencoder_factor(groups["autoencoder"])
    stage = with_stage(config, plan, **recipe.stage_values(config, plan))
    check_settings(groups, stage, plan, factor)
    crop = plain(stage, "data.crop")
    if isinstance(crop, dict) and crop.get("buckets"):
        what = "the equivariance transforms need square images"
        raise UserError(what, where="data.crop.buckets", hint="set it to null")
    check_call(stage, "module", supplied=("autoencoder", "perceptual", "discriminator", "optimizer", "lr_scheduler"))
    check_call(stage, "data", supplied=("tokenizer",))
    check_continued(config, [plan])
    if plain(stage, "data.alpha") == "mask":
        what = "an autoencoder is trained on whole images"
        raise UserError(what, where="data.alpha", hint="set data.alpha=white; masks are for hdm-train")
    if target_of(stage.data, "data") is ShardDataModule:
        data = build(stage, "data", tokenizer=None)
        data.prepare(unchanged=not has_begun(config, [plan]))
        data.train_plan.require_images("data.train")
        if data.validation_samples:
            data.validation_plan.require_images("data.validation")


def check_settings(groups: dict[str, Any], stage: DictConfig, plan: StagePlan, factor: int) -> None:
    """Check everything that needs no data: sizes, names and weights.

    `groups` are the parsed groups of plain keys, `stage` is the configuration with its stage filled in, and `factor`
    the pixels per latent cell of the autoencoder.

    Raises:
        UserError: naming the key.
    """
    _check_sizes(groups, plan, factor)
    _check_loss(groups)
    _check_validation(groups)
    _check_start(groups, plan)
    if plain(stage, "callbacks.weight_averages.sigma_rel"):
        raise UserError(
            "has no effect when training an autoencoder",
            where="callbacks.weight_averages.sigma_rel",
            hint="leave it out",
        )
    smallest = _smallest_image(groups, plan, factor)
    _check_perceptual(groups, plan, smallest)
    _check_discriminator(groups["adversarial"], smallest)
    if plain(stage, "trainer.precision") == hardware.FLOAT16 and groups["adversarial"].weight:
        raise UserError(
            "float16 scales gradients, which the two optimizers of adversarial training would clip wrongly",
            where="trainer.precision",
            hint="use bf16-mixed or 32-true",
        )


def _check_loss(groups: dict[str, Any]) -> None:
    loss = groups["loss"]
    perceptual = loss.perceptual_network is not None and loss.perceptual_weight
    if not loss.pixel_weight and not perceptual:
        raise UserError(
            "is 0 and there is no perceptual term, so no term compares the images",
            where="loss.pixel_weight",
            hint="set a positive weight, or a loss.perceptual_network with a weight",
        )
    if loss.perceptual_network is not None:
        require_perceptual(loss.perceptual_network)


def _check_validation(groups: dict[str, Any]) -> None:
    """Check that there are samples to measure, and that the packages of the measures are installed."""
    validation = groups["validation"]
    if validation.samples < 1:
        raise UserError(
            "the latent statistics of the result are measured on the validation samples, so there must be at least one",
            where="validation.samples",
            hint="set at least 1, better 256",
        )
    if validation.perceptual_network is not None:
        require_perceptual(validation.perceptual_network, where="validation.perceptual_network")
    if validation.features == LITE0:
        require_perceptual(LITE0, where="validation.features")


def _check_start(groups: dict[str, Any], plan: StagePlan) -> None:
    adversarial = groups["adversarial"]
    if adversarial.weight and adversarial.start_samples >= plan.settings.samples:
        raise UserError(
            f"the discriminator would start after {adversarial.start_samples} samples, but the training ends after "
            f"{plan.settings.samples}",
            where="adversarial.start_samples",
            hint="set it below stage.samples, or adversarial.weight=0 to train without a discriminator",
        )


def _check_sizes(groups: dict[str, Any], plan: StagePlan, factor: int) -> None:
    resolution = plan.settings.resolution
    if resolution % factor:
        raise UserError(
            f"{resolution} px is not a multiple of the autoencoder's factor {factor}",
            where="stage.resolution",
            hint=f"set it to {max(1, round(resolution / factor)) * factor}",
        )
    if resolution < SMALLEST_SIDE:
        raise UserError(
            f"{resolution} px is too small to measure, at least {SMALLEST_SIDE} px are needed",
            where="stage.resolution",
            hint=f"set it to {-(-SMALLEST_SIDE // factor) * factor} or more",
        )


def _smallest_trained(branches: BranchSettings, cells: int) -> int:
    """Return the side in latent cells of the smallest image that the branches make out of `cells`."""
    if not branches.scale_numerators or not (branches.equivariant or branches.downscaled):
        return cells
    where = "equivariance.scale_numerators"
    scales = exact_scales(cells, branches.scale_numerators, branches.scale_denominator)
    if not scales:
        raise UserError(
            f"no scale n/{branches.scale_denominator} gives a latent of {cells} cells a whole size",
            where=where,
            hint=f"choose scale_denominator={cells} and numerators below it, or another image size",
        )
    moves = branches.flips or any(turns % 4 for turns in branches.quarter_turns)
    if max(branches.downscaled, 0 if moves else branches.equivariant) and min(scales) == 1:
        raise UserError(
            f"only the scale 1 gives a latent of {cells} cells a whole size, and it changes nothing",
            where=where,
            hint="add numerators below scale_denominator, or set the probability of the branch to 0",
        )
    return int(cells * min(scales))


def _smallest_image(groups: dict[str, Any], plan: StagePlan, factor: int) -> int:
    """Return the side in pixels of the smallest image that the losses see, after checking the patches and scales."""
    patches, resolution = groups["patches"], plan.settings.resolution
    sides = [resolution, *([patches.size_px] if patches.samples else [])]
    if patches.samples and not (factor <= patches.size_px <= resolution and patches.size_px % factor == 0):
        raise UserError(
            f"{patches.size_px} px is not a positive multiple of the autoencoder's factor {factor} up to {resolution}",
            where="patches.size_px",
            hint=f"set it to {max(factor, resolution // 2 // factor * factor)}, or patches.samples=0",
        )
    return min(_smallest_trained(groups["equivariance"], side // factor) for side in sides) * factor


def _check_perceptual(groups: dict[str, Any], plan: StagePlan, smallest: int) -> None:
    """Check the images of the loss, and those of the validation, which are whole."""
    loss, reported = groups["loss"], groups["validation"].perceptual_network
    if loss.perceptual_weight:
        hint = "use efficientnet_lite0, larger equivariance.scale_numerators"
        _require_side(loss.perceptual_network, smallest, "loss", hint)
    named, where = (reported, "validation") if reported is not None else (loss.perceptual_network, "loss")
    _require_side(named, plan.settings.resolution, where, "use efficientnet_lite0")


def _require_side(name: str | None, smallest: int, where: str, hint: str) -> None:
    if name is not None and smallest < SMALLEST_SIDES[name]:
        raise UserError(
            f"images get as small as {smallest} px, but {name} needs {SMALLEST_SIDES[name]} px",
            where=f"{where}.perceptual_network",
            hint=f"{hint} or a larger stage.resolution",
        )


def _check_discriminator(adversarial: Adversarial, smallest: int) -> None:
    if adversarial.weight and smallest < smallest_side(adversarial.layers):
        raise UserError(
            f"images get as small as {smallest} px, but a discriminator of {adversarial.layers} layers needs "
            f"{smallest_side(adversarial.layers)} px",
            where="adversarial.layers",
            hint="use fewer layers, larger equivariance.scale_numerators or a larger stage.resolution",
        )


def autoencoder_factor(source: AutoencoderSource) -> int:
    """Return the pixels per latent cell, from the autoencoder's configuration alone.

    Raises:
        UserError: naming `autoencoder.source` or `autoencoder.config`.
    """
    return int(2 ** (len(autoencoder_config(source)["block_out_channels"]) - 1))


def keeps_normalisation(source: AutoencoderSource) -> bool:
    """Return whether the latent space and its known normalization stay, so that models trained on it still work."""
    if source.train_encoder or source.source is None:
        return False
    written = autoencoder_config(source)
    return any(written.get(key) is not None for key in ("latents_std", "scaling_factor"))


def autoencoder_config(source: AutoencoderSource) -> dict[str, Any]:
    """Return the fields of the AutoencoderKL to train.

    Raises:
        UserError: naming `autoencoder.source` or `autoencoder.config`.
    """
    config = source.config
    if (source.source is None) == (config is None):
        raise UserError(
            "needs exactly one of source (to fine-tune) and config (to train from scratch)",
            where="autoencoder",
            hint="set autoencoder.source=FOLDER, or choose vae_training=from_scratch_tiny",
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
    assert source.source is not None
    where = "autoencoder.source"
    return read_config(locate_autoencoder(source.source, where=where), where=where)
