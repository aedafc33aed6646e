"""Plain typed settings of an autoencoder's training, as the configuration files spell them."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from hdm_lightning.training.settings import CheckpointSettings, EmaSettings, TrainerSettings


@dataclass
class VaeSourceSettings:
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
    initial_log_variance: float = -5.0


@dataclass
class VaeStageSettings:
    """How long, how large and how fast, in pixels and samples whatever the number of devices.

    Attributes:
        resolution: side of the square crop in pixels.
        samples: samples to see, all devices together.
        batch_size: samples of one optimizer step, all devices and accumulation steps together.
        micro_batch_size: samples that one device takes at once.
        learning_rate: rate of the autoencoder.
        weight_decay: AdamW's decoupled decay.
        betas: moment decays; (0.5, 0.9) in EQ-VAE (arXiv 2502.09509).
        gradient_clip: largest gradient norm; 0 means no clipping.
        warmup_samples: samples of linear warm-up.
        final_learning_rate_ratio: where the cosine ends, as a share of the rate; 1 keeps it constant.
        activation_checkpointing: recompute each block in the backward pass to save memory.
        validate_every: samples between validations; 0 means start and end only.
        save_every: samples between checkpoints; 0 means at the end only.
    """

    resolution: int = MISSING
    samples: int = MISSING
    batch_size: int = MISSING
    micro_batch_size: int = MISSING
    learning_rate: float = MISSING
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.5, 0.9)
    gradient_clip: float = 1.0
    warmup_samples: int = 0
    final_learning_rate_ratio: float = 1.0
    activation_checkpointing: bool = False
    validate_every: int = 0
    save_every: int = 0


@dataclass
class VaeLossSettings:
    """Terms of the generator's loss, all means.

    Attributes:
        pixel: `l1`, `l2` or `huber`.
        pixel_weight: weight of the pixel term.
        perceptual_network: `efficientnet_lite0`, `lpips_vgg`, `lpips_alex`, `lpips_squeeze`, or null for none.
        perceptual_weight: weight of the perceptual term.
        kl_weight: weight of the KL divergence per latent element.
    """

    pixel: str = "l1"
    pixel_weight: float = 1.0
    perceptual_network: str | None = "efficientnet_lite0"
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6


@dataclass
class EquivarianceSettings:
    """How branches and transforms are drawn; see `autoencoding.branches.BranchSettings`."""

    equivariant: float = 0.5
    downscaled: float = 0.125
    scale_numerators: list[int] = field(default_factory=lambda: list(range(8, 32)))
    scale_denominator: int = 32
    quarter_turns: list[int] = field(default_factory=lambda: [1, 2, 3])
    anisotropic: bool = False
    antialias: bool = False
    flips: bool = False


@dataclass
class PatchSettings:
    """A first part of the training on patches of the images, which cost less than whole ones.

    Attributes:
        size_px: side of the square patch in pixels.
        samples: samples seen before whole images are trained on; 0 means whole images from the start.
    """

    size_px: int = 0
    samples: int = 0


@dataclass
class AdversarialSettings:
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
        norm: `batch`, `group` or `none`.
    """

    weight: float = 0.0
    adaptive: bool = True
    adaptive_largest: float = 1e4
    start_samples: int = 0
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.5, 0.9)
    gradient_clip: float = 1.0
    channels: int = 64
    layers: int = 3
    norm: str = "group"


@dataclass
class VaeValidationSettings:
    """The fixed validation set and what is measured on it.

    Attributes:
        samples: how many samples, all devices together.
        batch_size: per device.
        seed: which samples: apart from the run's seed, so that runs of other seeds compare.
        pictures: samples shown in TensorBoard.
        perceptual_network: perceptual distance to report; null reports that of the loss, if it has one.
        features: feature network of the reconstructions' kernel and Fréchet distances, as for `hdm-evaluate
            --features`; null leaves them out.
    """

    samples: int = 256
    batch_size: int = 16
    seed: int = 0
    pictures: int = 6
    perceptual_network: str | None = None
    features: str | None = None


@dataclass
class VaeLoggerSettings:
    """Optimizer steps between two entries of the scalars, and whether progress is shown."""

    every_steps: int = 20
    progress_bar: bool = True


@dataclass
class VaeTrainSettings:
    """A whole `hdm-train-vae` run.

    Attributes:
        name: the run's name.
        run_dir: the run's folder.
        seed: every random draw of the training follows from it.
        resume: `auto` continues what the run's folder holds; `never` refuses a folder that holds something.
        data: see `training.data_settings`; captions play no part.
        ema: weight averages; the first one is what the run exports.
    """

    name: str = MISSING
    run_dir: str = MISSING
    seed: int = 0
    resume: str = "auto"
    autoencoder: VaeSourceSettings = field(default_factory=VaeSourceSettings)
    stage: VaeStageSettings = field(default_factory=VaeStageSettings)
    patches: PatchSettings = field(default_factory=PatchSettings)
    loss: VaeLossSettings = field(default_factory=VaeLossSettings)
    equivariance: EquivarianceSettings = field(default_factory=EquivarianceSettings)
    adversarial: AdversarialSettings = field(default_factory=AdversarialSettings)
    data: dict[str, Any] = MISSING
    validation: VaeValidationSettings = field(default_factory=VaeValidationSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    logger: VaeLoggerSettings = field(default_factory=VaeLoggerSettings)
