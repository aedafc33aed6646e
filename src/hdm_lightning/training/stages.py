"""Schemas of the groups of plain keys, and everything derived from a stage's settings."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import ConfigDict, Field

from hdm_lightning.errors import UserError

Kind = TypeVar("Kind")
MOST_RESOLUTION = 1 << 14
"""Largest side in pixels of the images that decoders accept."""
MOST_THREADS = 1024
"""Largest number of threads of a process; torch crashes if the system cannot start that many."""
Count = Annotated[int, Field(gt=0)]
Interval = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass_transform(field_specifiers=(field, Field))
def settings(kind: type[Kind]) -> type[Kind]:
    """Turn a class into a group of keys: unknown keys are refused, values are checked against the annotations."""
    made: Any = pydantic.dataclasses.dataclass(config=ConfigDict(extra="forbid"))(kind)
    return made


@settings
class Hardware:
    """Hardware settings that are not the trainer's.

    Attributes:
        compile: compile the network block by block, for the shapes of the training.
        compile_cache: keep compiled code in the run's folder, for a machine that comes back empty (CUDA only). Use it
            only if nobody else can write to the folder: the code is run.
        float8: multiply the blocks' matrices in FP8 (needs torchao, and a card of compute capability 8.9 or later).
        threads: CPU threads of each process; 0 leaves torch's choice.
        usd_per_device_hour: price of a device-hour in USD, for the ledger.
        peak_tflops: a device's peak rate in 10^12 operations per second, for the MFU; None looks up a known GPU.
        compress_gradients: exchange gradients in bfloat16 under DDP (CUDA only).
        overlap_encoders: encode a micro-batch while the network still processes the one before (CUDA only).
    """

    compile: bool = False
    compile_cache: bool = False
    float8: bool = False
    threads: Annotated[int, Field(ge=0, le=MOST_THREADS)] = 0
    usd_per_device_hour: NotNegative = 0.0
    peak_tflops: Positive | None = None
    compress_gradients: bool = False
    overlap_encoders: bool = False


@settings
class Guard:
    """When training counts as diverged, and how often it rewinds and skips the samples that led there.

    Attributes:
        spike_factor: a step's loss is high above this multiple of the running mean; None: only a loss that is not
            finite counts.
        spike_steps: consecutive high steps that count as a spike.
        warmup_steps: steps of a stage before high losses count.
        rewinds: how often a stage rewinds before the run stops.
    """

    spike_factor: Annotated[float, Field(gt=1)] | None = 3.0
    spike_steps: Count = 3
    warmup_steps: Interval = 100
    rewinds: Interval = 3


@settings
class Validation:
    """The fixed validation set.

    Attributes:
        samples: number of samples, all devices together.
        batch_size: samples per device and batch.
        seed: seed of the samples and of their noise and times: separate from the run's seed, so that runs with
            different seeds are comparable.
    """

    samples: Interval = 256
    batch_size: Count = 32
    seed: int = 0


@settings
class StopSettings:
    """What ends a stage before all its samples are seen; None means never.

    Attributes:
        max_hours: wall-clock hours of the stage, including restarts.
        max_cost_usd: cost of the stage in dollars at `hardware.usd_per_device_hour`.
        plateau_samples: samples without an improvement of the validation loss by `plateau_delta`.
        plateau_delta: the smallest improvement that counts.
    """

    max_hours: Positive | None = None
    max_cost_usd: Positive | None = None
    plateau_samples: Count | None = None
    plateau_delta: NotNegative = 0.0


@settings
class BasicStageSettings:
    """Settings of every training's stages: sizes in pixels, progress in samples of all devices together.

    Attributes:
        resolution: side of the square crop in pixels.
        samples: samples to see in this stage, all devices together.
        batch_size: samples of one optimizer step, all devices and accumulation steps together.
        micro_batch_size: samples that one device processes at once.
        learning_rate: base learning rate.
        weight_decay: AdamW's decoupled weight decay.
        betas: AdamW's two moment decays.
        gradient_clip: largest gradient norm; 0 means no clipping.
        warmup_samples: samples of linear warm-up.
        final_learning_rate_ratio: where the cosine ends, as a fraction of the base rate; 1 keeps the rate constant.
        activation_checkpointing: recompute each block in the backward pass to save memory; `selective` (XUT only) keeps
            the output of attention.
        validate_every: samples between validations; 0 means at the stage's start and end only.
        save_every: samples between checkpoints; 0 means by time and at the stage's end only.
    """

    resolution: Annotated[int, Field(gt=0, le=MOST_RESOLUTION)]
    samples: Count
    batch_size: Count
    micro_batch_size: Count
    learning_rate: Positive
    weight_decay: NotNegative = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    gradient_clip: NotNegative = 1.0
    warmup_samples: Interval = 0
    final_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.01
    activation_checkpointing: bool | Literal["selective"] = False
    validate_every: Interval = 0
    save_every: Interval = 0


@settings
class StageSettings(BasicStageSettings):
    """One stage of `hdm-train`.

    Attributes:
        routing_rate: TREAD's fraction of image tokens that skip the U (arXiv 2501.04765); 0 means none.
        time_mean: mean of the logit-normal time; above 0 trains more near noise (a time shift of e^mean),
            which pays where latents are redundant: large flat areas, high resolutions.
        time_std: standard deviation of the logit-normal time.
        context_length: caption tokens kept.
        sample_every: samples between sample images; 0 means at the stage's end only.
        latents: whether `data.train` must contain latents, which `hdm-plan` assumes and a run checks; None: either.
        stop: what ends the stage early.
        data, module, trainer: keys of these groups that differ in this stage.
    """

    routing_rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    time_mean: float = 0.0
    time_std: Positive = 1.0
    context_length: Count = 256
    sample_every: Interval = 0
    latents: bool | None = None
    stop: StopSettings = field(default_factory=StopSettings)
    data: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


@settings
class Schedule:
    """An ordered mapping of named stages, and what is carried from one to the next.

    Attributes:
        stages: name to stage; names begin with a letter so that they can be overridden on the command line.
        carry_moments: pass the optimizer's moments on to the next stage.
    """

    stages: dict[str, StageSettings] = field(default_factory=dict)
    carry_moments: bool = False


@settings
class AutoencoderStageSettings(BasicStageSettings):
    """The one stage of `hdm-train-vae`; by default with a constant rate and EQ-VAE's moment decays."""

    weight_decay: NotNegative = 0.0
    betas: tuple[Decay, Decay] = (0.5, 0.9)
    activation_checkpointing: bool = False
    final_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0


@dataclass(frozen=True)
class StagePlan:
    """One stage with everything derived for a number of devices.

    Attributes:
        number: place in the schedule, from 1.
        name: the stage's key in `schedule.stages`.
        settings: as configured.
        world_size: processes, one per device.
        accumulation: micro-batches per optimizer step on each device.
        steps: optimizer steps; `steps * batch_size` samples are seen, the configured count rounded up.
        samples_before: samples of the stages before this one, as planned.
        written_at: the key under which the user sets the stage's settings.
    """

    number: int
    name: str
    settings: Any
    world_size: int
    accumulation: int
    steps: int
    samples_before: int
    written_at: str = ""

    @property
    def samples(self) -> int:
        """Samples that the stage sees if nothing ends it early."""
        return self.steps * self.settings.batch_size

    @property
    def folder_name(self) -> str:
        """The stage's folder inside the run's folder."""
        return f"{self.number:02d}-{self.name}"

    def folder(self, run_dir: Path) -> Path:
        """Return the stage's folder."""
        return run_dir / self.folder_name

    def steps_for(self, samples: int) -> int:
        """Return the optimizer steps that cover `samples` samples; 0 stays 0."""
        return -(-samples // self.settings.batch_size)

    def values(self) -> dict[str, Any]:
        """Return the values of `${stage.…}` in a configuration: the settings, and what is derived from them."""
        settings = asdict(self.settings)
        accumulation = {"accumulation": self.accumulation, "clip": settings["gradient_clip"] or None}
        interval = self.steps_for(settings["validate_every"]) or self.steps
        return {
            **settings,
            "betas": list(settings["betas"]),
            "name": self.name,
            "number": self.number,
            "folder": self.folder_name,
            "written_at": self.written_at,
            "steps": self.steps,
            "accumulation": self.accumulation,
            "validation_batches": interval * self.accumulation,
            "sample_steps": self.steps_for(settings.get("sample_every", 0)),
            "samples_before": self.samples_before,
            "samples_after": 0.0,
            "next_sample": self.samples_before + 1,
            # A module that steps its optimizers itself accumulates and clips itself.
            "of_trainer": accumulation,
            "of_module": {"accumulation": 1, "clip": 0.0},
        }


def plan_stages(schedule: Schedule, world_size: int) -> list[StagePlan]:
    """Return every stage's plan for `world_size` processes on all machines.

    Raises:
        UserError: naming the key.
    """
    return plans_of({f"schedule.stages.{name}": stage for name, stage in schedule.stages.items()}, world_size)


def plans_of(stages: Mapping[str, Any], world_size: int) -> list[StagePlan]:
    """Return the plans as `plan_stages` does, for settings by the key under which they are set."""
    if not stages:
        raise UserError("the schedule has no stage", where="schedule.stages", hint="choose one, e.g. schedule=demo")
    plans: list[StagePlan] = []
    for number, (where, stage) in enumerate(stages.items(), start=1):
        name = where.rpartition(".")[2] if "." in where else "vae"
        _check_name(name, where)
        _check_plateau(stage, where)
        accumulation = _accumulation(stage, world_size, where)
        before = plans[-1].samples_before + plans[-1].samples if plans else 0
        steps = -(-stage.samples // stage.batch_size)
        plans.append(StagePlan(number, name, stage, world_size, accumulation, steps, before, where))
    return plans


def _check_plateau(stage: Any, where: str) -> None:
    stop = getattr(stage, "stop", None)
    if stop is None or stop.plateau_samples is None or 0 < stage.validate_every <= stop.plateau_samples:
        return
    raise UserError(
        f"a plateau of {stop.plateau_samples} samples cannot be detected with validate_every={stage.validate_every}",
        where=f"{where}.stop.plateau_samples",
        hint="validate at least once within it, better several times",
    )


def _check_name(name: str, where: str) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise UserError(
            "a stage's name must begin with a letter and contain only letters, digits, '_' and '-'",
            where=where,
            hint=f"rename it, e.g. px{name}",
        )


def _accumulation(stage: Any, world_size: int, where: str) -> int:
    together = stage.micro_batch_size * world_size
    if stage.batch_size % together:
        raise UserError(
            f"batch_size {stage.batch_size} is not a multiple of micro_batch_size {stage.micro_batch_size} "
            f"x {world_size} device(s) = {together}",
            where=f"{where}.batch_size",
            hint=_divisible(stage, world_size, where),
        )
    return int(stage.batch_size // together)


def _divisible(stage: Any, world_size: int, where: str) -> str:
    """Return a hint: a smaller micro-batch of at least two samples if one divides, else the nearest batch size."""
    share, rest = divmod(stage.batch_size, world_size)
    smaller = next((each for each in range(stage.micro_batch_size, 1, -1) if share % each == 0), None)
    if smaller and not rest:
        return f"set {where}.micro_batch_size={smaller}"
    together = stage.micro_batch_size * world_size
    return f"set {where}.batch_size={max(1, round(stage.batch_size / together)) * together}"
