"""Plain typed settings of a training run, as the configuration files spell them.

The dataclasses name every key that a configuration may hold; `training.checks` turns a composed
configuration into them and reports unknown keys and wrong types by name.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class StopSettings:
    """What ends a stage before its samples are spent; None means never.

    Attributes:
        max_hours: wall-clock hours of the stage, restarts counted in.
        max_cost_usd: dollars of the stage at `trainer.usd_per_device_hour`.
        plateau_samples: samples without an improvement of the validation loss by `plateau_delta`.
        plateau_delta: the smallest improvement that counts.
    """

    max_hours: float | None = None
    max_cost_usd: float | None = None
    plateau_samples: int | None = None
    plateau_delta: float = 0.0


@dataclass
class StageSettings:
    """One stage of a schedule. Sizes are in pixels, progress in samples, whatever the number of devices.

    Attributes:
        resolution: side of the square crop in pixels.
        samples: samples to see in this stage, all devices together.
        batch_size: samples of one optimizer step, all devices and accumulation steps together.
        micro_batch_size: samples that one device takes at once.
        learning_rate: base rate; each tensor's own rate follows from `optimizer.rule`.
        weight_decay: AdamW's decoupled decay.
        betas: AdamW's two moment decays.
        gradient_clip: largest gradient norm; 0 means no clipping.
        warmup_samples: samples of linear warm-up.
        final_learning_rate_ratio: where the cosine ends, as a share of the rate.
        routing_rate: TREAD's share of image tokens that skip the U (arXiv 2501.04765); 0 means none.
        time_mean: mean of the logit-normal time; above 0 trains more near noise (a time shift of e^mean),
            which pays where latents are redundant: large flat areas, high resolutions.
        time_std: its standard deviation.
        context_length: caption tokens kept.
        activation_checkpointing: recompute each block in the backward pass to save memory.
        validate_every: samples between validations; 0 means at the stage's end only.
        save_every: samples between checkpoints; 0 means at the stage's end only (and see `CheckpointSettings`).
        sample_every: samples between sample pictures; 0 means at the stage's end only.
        stop: other ends of the stage.
        data: keys of the data group that differ in this stage.
    """

    resolution: int = MISSING
    samples: int = MISSING
    batch_size: int = MISSING
    micro_batch_size: int = MISSING
    learning_rate: float = MISSING
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    gradient_clip: float = 1.0
    warmup_samples: int = 0
    final_learning_rate_ratio: float = 0.01
    routing_rate: float = 0.5
    time_mean: float = 0.0
    time_std: float = 1.0
    context_length: int = 256
    activation_checkpointing: bool = False
    validate_every: int = 0
    save_every: int = 0
    sample_every: int = 0
    stop: StopSettings = field(default_factory=StopSettings)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleSettings:
    """An ordered mapping of named stages and what goes from one to the next.

    Attributes:
        stages: name to stage; names begin with a letter so that they can be overridden on the command line.
        carry_moments: hand the optimizer's moments over to the next stage.
    """

    stages: dict[str, StageSettings] = MISSING
    carry_moments: bool = False


@dataclass
class TextEncoderSettings:
    """The frozen text encoder: a transformers model by hub name, folder or `package:NAME/FOLDER`.

    Attributes:
        name: hub name, folder, or `package:` and a folder inside an installed Python package.
        layer: which hidden state is the context; -1 is the last.
        dtype: `auto` (bfloat16 on CUDA devices that have it, float32 elsewhere) or a torch dtype's name.
        max_tokens: of the captions encoded at once, together, padding included; one caption always is.
        cache_size: caption embeddings kept in memory; 0 means none.
        whiten_captions: training captions on which the states' mean and covariance are measured, to be made
            white before the network sees them (see `encoders.whitening`); 0 leaves the states as they are.
    """

    name: str = MISSING
    layer: int = -1
    dtype: str = "auto"
    max_tokens: int = 65_536
    cache_size: int = 0
    whiten_captions: int = 0


@dataclass
class VaeSettings:
    """The frozen autoencoder: a diffusers AutoencoderKL by hub name or folder.

    Attributes:
        name: hub name or folder.
        dtype: as for the text encoder.
        max_pixels: of the images encoded or decoded at once, together; one image always is. The same memory at
            every resolution.
        cache_size: latents kept in memory, for small sets on a CPU; 0 means none.
        mean: per-channel latent means, where the model's own config has none.
        std: per-channel latent standard deviations, likewise.
        made_by: the command that trains it, told where `name` is a run that is not there.
    """

    name: str = MISSING
    dtype: str = "auto"
    max_pixels: int = 5_500_000
    cache_size: int = 0
    mean: list[float] | None = None
    std: list[float] | None = None
    made_by: str | None = None


@dataclass
class OptimizerSettings:
    """The optimizer's kind and its rule of learning rates.

    Attributes:
        name: `adamw`, or `muon` for the blocks' matrices with AdamW for the rest, see `training.optimization.muon`.
        rule: how a tensor's rate follows from the base rate, see `training.optimization.parameter_groups`.
        eps: AdamW's epsilon.
        muon_momentum: Muon's momentum.
        muon_rounds: Newton–Schulz rounds of a Muon step.
    """

    name: str = "adamw"
    rule: str = "mup"
    eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_rounds: int = 5


@dataclass
class EmaSettings:
    """Weight averages kept beside the model, in float32.

    Attributes:
        halflife_samples: one exponential average per entry; each forgets half of its past in so many samples.
        ramp: early on, no average reaches further back than this share of the samples seen (EDM2's warm-up).
        sigma_rel: one power-function average per entry, of this relative width (arXiv 2312.02696, section 3).
            Two of them, 0.05 and 0.10, are enough to put together any other when training is over.
        snapshot_every: samples between two times that the power-function averages are put on disk; 0 means at
            each stage's end only.
        snapshot_dtype: of the files, `float16` or `float32`.
    """

    halflife_samples: list[int] = field(default_factory=lambda: [500_000])
    ramp: float = 0.05
    sigma_rel: list[float] = field(default_factory=list)
    snapshot_every: int = 0
    snapshot_dtype: str = "float16"


@dataclass
class CheckpointSettings:
    """Which checkpoints there are beside those of `save_every`.

    Attributes:
        keep: how many of a stage stay on disk.
        every_minutes: of training after which one is written where `save_every` has not come round; 0 means never.
    """

    keep: int = 2
    every_minutes: float = 20.0


@dataclass
class SamplePictureSettings:
    """The fixed prompts drawn with the averaged weights while training goes on.

    Attributes:
        prompts: what is drawn; empty means no pictures.
        aspect_ratios: width / height of the pictures, area as the stage's.
        steps: solver steps.
        guidance_scale: classifier-free guidance.
        shift: of the solver's time grid; above 1 takes more steps near noise.
        seed: noise of the first picture.
    """

    prompts: list[str] = field(default_factory=list)
    aspect_ratios: list[float] = field(default_factory=lambda: [1.0, 1.5, 0.6667])
    steps: int = 24
    guidance_scale: float = 4.0
    shift: float = 1.0
    seed: int = 0


@dataclass
class CallbackSettings:
    """Settings of the callbacks that every run has, and further callbacks as `_target_` mappings."""

    ema: EmaSettings = field(default_factory=EmaSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    pictures: SamplePictureSettings = field(default_factory=SamplePictureSettings)
    progress_bar: bool = True
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainerSettings:
    """Devices, precision and what a device costs.

    Attributes:
        accelerator: `auto`, `cpu` or `cuda`.
        devices: devices on this machine; 0 means all of them (one process on CPU).
        nodes: machines; more than one needs torchrun or SLURM around the command.
        strategy: `auto` or `ddp`: one process alone, or DDP over several. `fsdp2` (`hdm-train` only): network, moments
            and averages split over them, see docs/decisions.md.
        precision: Lightning's precision, or `auto` (bf16-mixed, 16-mixed without bf16, 32-true on CPU).
        compile: compile the network block by block, for the shapes of the training.
        threads: CPU threads of each process; 0 leaves torch's choice.
        usd_per_device_hour: price for the ledger.
        peak_tflops: a device's peak rate for the MFU in 10^12 operations a second; None looks a known GPU up.
        compress_gradients: exchange gradients in bfloat16 under DDP (CUDA only).
        static_graph: let DDP assume that every step uses the same parameters.
    """

    accelerator: str = "auto"
    devices: int = 0
    nodes: int = 1
    strategy: str = "auto"
    precision: str = "auto"
    compile: bool = False
    threads: int = 0
    usd_per_device_hour: float = 0.0
    peak_tflops: float | None = None
    compress_gradients: bool = False
    static_graph: bool = False


@dataclass
class LoggerSettings:
    """How often scalars are written, in optimizer steps, and into how many bins the loss by time falls."""

    every_steps: int = 20
    time_bins: int = 8


@dataclass
class GuardSettings:
    """When a training counts as gone wrong, and how often it goes back and skips the samples that led there.

    Attributes:
        spike_factor: a step's loss is high above so many running means; None: only a loss that is not finite counts.
        spike_steps: high steps in a row that count as a spike.
        warmup_steps: steps of a stage before high losses count.
        rewinds: how often a stage goes back before the run stops.
    """

    spike_factor: float | None = 3.0
    spike_steps: int = 3
    warmup_steps: int = 100
    rewinds: int = 3


@dataclass
class ValidationSettings:
    """The fixed validation set.

    Attributes:
        samples: how many samples, all devices together.
        batch_size: per device.
        seed: which samples, and their noise and times: apart from the run's seed, so that runs of other seeds compare.
    """

    samples: int = 256
    batch_size: int = 32
    seed: int = 0


@dataclass
class TrainSettings:
    """A whole `hdm-train` run.

    Attributes:
        name: the run's name.
        run_dir: the run's folder.
        seed: every random draw of the training follows from it.
        resume: `auto` continues what the run's folder holds; `never` refuses a folder that holds something.
        init: weights to start from (a trained model's folder or file), or None.
        model: the fields of `XUTConfig`.
        data: see `training.data_settings`.
    """

    name: str = MISSING
    run_dir: str = MISSING
    seed: int = 0
    resume: str = "auto"
    init: str | None = None
    model: dict[str, Any] = MISSING
    text_encoder: TextEncoderSettings = field(default_factory=TextEncoderSettings)
    vae: VaeSettings = field(default_factory=VaeSettings)
    data: dict[str, Any] = MISSING
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    callbacks: CallbackSettings = field(default_factory=CallbackSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
