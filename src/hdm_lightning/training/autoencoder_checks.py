"""What the configuration of an autoencoder's training must say, checked before the first weight is allocated."""

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
from hdm_lightning.training.hub_upload import check_name
from hdm_lightning.training.modules.autoencoder_network import build_vae
from hdm_lightning.training.run_recipe import Recipe, group, with_stage
from hdm_lightning.training.stages import Count, Decay, Interval, NotNegative, Positive, StagePlan, Validation, settings

JUDGED = ("adversarial.channels", "adversarial.layers", "adversarial.norm")
KEPT = ("autoencoder.config", "autoencoder.source", "autoencoder.train_encoder", "stage.batch_size")
KEPT_TOO = ("adversarial.weight", "callbacks.weight_averages.halflife_samples")
COURSE = (
    *("seed", "stage", "loss", "equivariance", "patches", "adversarial", "data", "optimizer", "lr_scheduler", "module"),
    "callbacks.weight_averages",
)
"""What the card of a finished training says, or what its weights come of."""


@settings
class AutoencoderSource:
    """Where the autoencoder to train comes from: exactly one of `source` and `config`.

    Attributes:
        source: a diffusers folder or hub name (`OWNER/NAME`, `OWNER/NAME/vae`) to fine-tune.
        config: fields of a diffusers AutoencoderKL to train from scratch.
        train_encoder: False keeps the encoder, and with it the latent space, and trains the decoder alone.
        initial_log_variance: posterior log-variance of a network from scratch; diffusers' own start (0) drowns the
            latents of the first steps in noise.
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
        perceptual_network: `efficientnet_lite0`, `lpips_vgg`, `lpips_alex`, `lpips_squeeze`, or None for none.
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
    """A first part of the training on patches of the images, which cost less than whole ones.

    Attributes:
        size_px: side of the square patch in pixels.
        samples: samples seen before whole images are trained on; 0 means whole images from the start.
    """

    size_px: Interval = 0
    samples: Interval = 0


@settings
class Adversarial:
    """PatchGAN with hinge loss; `weight: 0` trains without a discriminator.

    Attributes:
        weight: weight of the adversarial term, times the adaptive weight where that is on.
        adaptive: balance the term against the reconstruction at the decoder's last layer.
        adaptive_largest: upper clamp of the adaptive weight.
        start_samples: samples seen before discriminator and adversarial term set in.
        learning_rate: rate of the discriminator.
        weight_decay: of the discriminator.
        betas: moment decays of the discriminator.
        gradient_clip: largest gradient norm of the discriminator; 0 means no clipping.
        channels: channels of the discriminator's first layer.
        layers: its downsampling layers.
        norm: of the discriminator.
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
        images: samples drawn.
        perceptual_network: perceptual distance to report; None reports that of the loss, if it has one.
        features: feature network of the reconstructions' kernel and Fréchet distances, as for `hdm-evaluate
            --features`; None leaves them out.
    """

    batch_size: Count = 16
    images: Interval = 6
    perceptual_network: str | None = None
    features: str | None = None


def check(config: DictConfig, recipe: Recipe, plan: StagePlan) -> None:
    """Check a configuration; indices and configurations are read, and of shards that look changed a few samples.

    Raises:
        UserError: naming the key or file and what to do.
    """
    groups = {name: group(config, recipe, name) for name in recipe.groups}
    check_name(groups["hub"])
    factor = autoencoder_factor(groups["autoencoder"])
    stage = with_stage(config, plan, **recipe.stage_values(config, plan))
    check_settings(groups, stage, plan, factor)
    _check_crop(stage)
    check_call(stage, "module", supplied=("autoencoder", "perceptual", "discriminator", "optimizer", "lr_scheduler"))
    check_call(stage, "data", supplied=("tokenizer",))
    check_kept(config, [plan])
    if plain(stage, "data").get("alpha") == "mask":
        what = "an autoencoder learns whole pictures"
        raise UserError(what, where="data.alpha", hint="set data.alpha=white; masks are for hdm-train")
    if target_of(stage.data, "data") is ShardDataModule:
        data = build(stage, "data", tokenizer=None)
        data.prepare(unchanged=not has_begun(config, [plan]))
        data.train_plan.require_images("data.train")
        if data.validation_samples:
            data.validation_plan.require_images("data.validation")


def check_kept(config: DictConfig, plans: list[StagePlan]) -> None:
    """What the run's folder holds goes with the configuration; see `continued.check_continued`."""
    judged = JUDGED if plain(config, "adversarial.weight") else ()
    check_continued(config, plans, (*KEPT, *KEPT_TOO, *judged), COURSE)


def check_settings(groups: dict[str, Any], stage: DictConfig, plan: StagePlan, factor: int) -> None:
    """Check what needs no data: sizes, names and weights.

    Args:
        groups: the plain groups by name.
        stage: the configuration with its stage filled in.
        plan: the stage.
        factor: pixels per latent cell of the autoencoder.

    Raises:
        UserError: naming the key.
    """
    _check_sizes(groups, plan, factor)
    _check_loss(groups)
    _check_validation(groups)
    _check_start(groups, plan)
    _check_averages(stage)
    _check_patches(groups, plan, factor)
    _check_perceptual(groups, plan, factor)
    _check_discriminator(groups, plan, factor)
    if plain(stage, "trainer.precision") == hardware.FLOAT16 and groups["adversarial"].weight:
        raise UserError(
            "float16 scales gradients, which the two optimizers of adversarial training would clip wrongly",
            where="trainer.precision",
            hint="use bf16-mixed or 32-true",
        )


def _check_averages(stage: DictConfig) -> None:
    averages = plain(stage, "callbacks").get("weight_averages") if stage.callbacks else None
    if averages and averages.get("sigma_rel"):
        raise UserError(
            "has no effect on an autoencoder's training",
            where="callbacks.weight_averages.sigma_rel",
            hint="leave it out",
        )


def _check_loss(groups: dict[str, Any]) -> None:
    loss = groups["loss"]
    perceptual = loss.perceptual_network is not None and loss.perceptual_weight
    if not loss.pixel_weight and not perceptual:
        raise UserError(
            "is 0 and there is no perceptual term: nothing asks for the image back",
            where="loss.pixel_weight",
            hint="give a positive weight, or a loss.perceptual_network with a weight",
        )
    if loss.perceptual_network is not None:
        require_perceptual(loss.perceptual_network)


def _check_validation(groups: dict[str, Any]) -> None:
    """There are samples to measure, and the packages of what is measured."""
    validation = groups["validation"]
    if validation.samples < 1:
        raise UserError(
            "the latent statistics of the result are measured on the validation samples, so there must be some",
            where="validation.samples",
            hint="give at least 1, better 256",
        )
    if validation.perceptual_network is not None:
        require_perceptual(validation.perceptual_network, where="validation.perceptual_network")
    if validation.features == LITE0:
        require_perceptual(LITE0, where="validation.features")


def _check_start(groups: dict[str, Any], plan: StagePlan) -> None:
    adversarial = groups["adversarial"]
    if adversarial.weight and adversarial.start_samples >= plan.settings.samples:
        raise UserError(
            f"the discriminator would set in after {adversarial.start_samples} samples, when the training of "
            f"{plan.settings.samples} is over",
            where="adversarial.start_samples",
            hint="set it below stage.samples, or adversarial.weight=0 for no discriminator",
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
            f"{resolution} px are too few to measure, {SMALLEST_SIDE} are needed",
            where="stage.resolution",
            hint=f"set it to {-(-SMALLEST_SIDE // factor) * factor} or more",
        )
    smallest_trained(groups["equivariance"], resolution // factor)


def _check_crop(stage: DictConfig) -> None:
    crop = plain(stage, "data").get("crop")
    if isinstance(crop, dict) and crop.get("buckets"):
        raise UserError(
            "the transforms of the equivariance need square images",
            where="data.crop.buckets",
            hint="set it to null",
        )


def smallest_trained(branches: BranchSettings, cells: int) -> int:
    """Side in latent cells of the smallest image that the branches make out of `cells`.

    Raises:
        UserError: no scale gives a whole number of cells.
    """
    if not (branches.equivariant or branches.downscaled):
        return cells
    where = "equivariance.scale_numerators"
    if not branches.scale_numerators:
        if branches.downscaled:
            what, hint = "is empty, so that the down-scaled branch would not scale", "equivariance.downscaled=0"
            raise UserError(what, where=where, hint=f"give some, or {hint}")
        return cells
    scales = exact_scales(cells, branches.scale_numerators, branches.scale_denominator)
    if not scales:
        raise UserError(
            f"no scale n/{branches.scale_denominator} gives a whole size of a latent of {cells} cells",
            where=where,
            hint=f"choose scale_denominator={cells} and numerators below it, or another size of the images",
        )
    moves = branches.flips or any(turns % 4 for turns in branches.quarter_turns)
    if max(branches.downscaled, 0 if moves else branches.equivariant) and min(scales) == 1:
        raise UserError(
            f"of these scales only 1 gives a whole size of a latent of {cells} cells, and it changes nothing",
            where=where,
            hint="give numerators below scale_denominator, or set the probability of the branch to 0",
        )
    return int(cells * min(scales))


def _check_patches(groups: dict[str, Any], plan: StagePlan, factor: int) -> None:
    patches, resolution = groups["patches"], plan.settings.resolution
    if not patches.samples:
        return
    if patches.size_px < factor or patches.size_px % factor or patches.size_px > resolution:
        raise UserError(
            f"{patches.size_px} px is not a multiple of the autoencoder's factor {factor} between it and {resolution}",
            where="patches.size_px",
            hint=f"set it to {max(factor, resolution // 2 // factor * factor)}, or patches.samples=0",
        )
    smallest_trained(groups["equivariance"], patches.size_px // factor)


def _smallest_image(groups: dict[str, Any], plan: StagePlan, factor: int) -> int:
    """Side in pixels of the smallest image that the losses see."""
    patches = groups["patches"]
    sides = [plan.settings.resolution, *([patches.size_px] if patches.samples else [])]
    return min(smallest_trained(groups["equivariance"], side // factor) for side in sides) * factor


def _check_perceptual(groups: dict[str, Any], plan: StagePlan, factor: int) -> None:
    named = groups["loss"].perceptual_network
    smallest = _smallest_image(groups, plan, factor)
    if named is not None and smallest < SMALLEST_SIDES[named]:
        raise UserError(
            f"images get as small as {smallest} px, {named} needs {SMALLEST_SIDES[named]} px",
            where="loss.perceptual_network",
            hint="use efficientnet_lite0, larger equivariance.scale_numerators or a larger stage.resolution",
        )


def _check_discriminator(groups: dict[str, Any], plan: StagePlan, factor: int) -> None:
    adversarial = groups["adversarial"]
    if not adversarial.weight:
        return
    smallest = _smallest_image(groups, plan, factor)
    if smallest < smallest_side(adversarial.layers):
        raise UserError(
            f"images get as small as {smallest} px, a discriminator of {adversarial.layers} layers needs "
            f"{smallest_side(adversarial.layers)} px",
            where="adversarial.layers",
            hint="use fewer layers, larger equivariance.scale_numerators or a larger stage.resolution",
        )


def autoencoder_factor(source: AutoencoderSource) -> int:
    """Pixels per latent cell, from the autoencoder's configuration alone.

    Raises:
        UserError: naming `autoencoder.source` or `autoencoder.config`.
    """
    return int(2 ** (len(autoencoder_config(source)["block_out_channels"]) - 1))


def keeps_normalisation(source: AutoencoderSource) -> bool:
    """Whether the latent space stays and its normalisation is known, so that what was trained on it still works."""
    if source.train_encoder or source.source is None:
        return False
    written = autoencoder_config(source)
    return any(written.get(key) is not None for key in ("latents_std", "scaling_factor"))


def autoencoder_config(source: AutoencoderSource) -> dict[str, Any]:
    """Fields of the AutoencoderKL that will be trained.

    Raises:
        UserError: naming `autoencoder.source` or `autoencoder.config`.
    """
    config = source.config
    if (source.source is None) == (config is None):
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
    assert source.source is not None
    where = "autoencoder.source"
    return read_config(locate_autoencoder(source.source, where=where), where=where)
