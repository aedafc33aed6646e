"""The groups of a training's configuration that make no object by themselves: their keys, types and ranges."""

from typing import Annotated, Any, Literal

from pydantic import Field

from hdm_lightning.training.stages import Count, Decay, Interval, NotNegative, Positive, settings

Resume = Literal["auto", "never"]


@settings
class Hardware:
    """What is not the trainer's.

    Attributes:
        compile: compile the network block by block, for the shapes of the training.
        threads: CPU threads of each process; 0 leaves torch's choice.
        usd_per_device_hour: price for the ledger.
        peak_tflops: a device's peak rate for the MFU in 10^12 operations a second; None looks a known GPU up.
        compress_gradients: exchange gradients in bfloat16 under DDP (CUDA only).
    """

    compile: bool = False
    threads: Interval = 0
    usd_per_device_hour: NotNegative = 0.0
    peak_tflops: Positive | None = None
    compress_gradients: bool = False


@settings
class Guard:
    """When a training counts as gone wrong, and how often it goes back and skips the samples that led there.

    Attributes:
        spike_factor: a step's loss is high above so many running means; None: only a loss that is not finite counts.
        spike_steps: high steps in a row that count as a spike.
        warmup_steps: steps of a stage before high losses count.
        rewinds: how often a stage goes back before the run stops.
    """

    spike_factor: Annotated[float, Field(gt=1)] | None = 3.0
    spike_steps: Count = 3
    warmup_steps: Interval = 100
    rewinds: Interval = 3


@settings
class Validation:
    """The fixed validation set.

    Attributes:
        samples: how many samples, all devices together.
        batch_size: per device.
        seed: which samples, and their noise and times: apart from the run's seed, so that runs of other seeds compare.
    """

    samples: Interval = 256
    batch_size: Count = 32
    seed: int = 0


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
