"""Settings of measurements, as dataclasses that define the flags of `hdm-bench`; imports nothing slow."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt


@dataclass(frozen=True)
class RunSettings:
    """Number of calls, and the output file.

    Attributes:
        warmup: untimed calls before the measurement.
        repeats: timed calls.
        threads: CPU threads (default: torch's choice).
        out: write the result as JSON.
    """

    warmup: Annotated[int, Ge(0)] = 2
    repeats: Annotated[int, Ge(1)] = 10
    threads: Annotated[int, Ge(0)] = 0
    out: Path | None = None


@dataclass(frozen=True)
class CaseSettings:
    """One part of a training step or of sampling.

    Attributes:
        size: tiny, xut_small, xut_base or xut_large.
        resolution: side of the images in pixels (default: 256; tiny: 64).
        batch: samples per micro-batch.
        dtype: of autocast and of the encoders; auto: float32 on a CPU, on CUDA bfloat16 if supported, else float16.
        compile: compile the network.
        checkpointing: recompute activations.
        routing_rate: share of image tokens that skip the U.
        context_length: caption tokens.
        caption_tokens: mean caption length in tokens, padded as on a GPU; 0 fills the context.
        accumulation: micro-batches per call, grouped by caption length.
        latents: use latents as read from disk (`hdm-shards encode`), so no image is encoded.
        overlap: encode a micro-batch while the network processes the previous one (CUDA; more than one per call).
        mode: for vae, encode (default) or decode; for xut, train (forward and backward pass, default) or forward.
        steps: solver steps.
        guidance_scale: 1 disables guidance.
        device: auto, cpu or cuda.
    """

    size: str = "xut_base"
    resolution: Annotated[int, Ge(0)] = 0
    batch: Annotated[int, Ge(1)] = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: bool = False
    checkpointing: bool = False
    routing_rate: Annotated[float, Ge(0), Lt(1)] = 0.5
    context_length: Annotated[int, Ge(1)] = 256
    caption_tokens: Annotated[float, Ge(0)] = 0
    accumulation: Annotated[int, Ge(1)] = 1
    latents: bool = False
    overlap: bool = False
    mode: str = ""
    steps: Annotated[int, Ge(1)] = 20
    guidance_scale: float = 3.0
    device: str = "auto"


@dataclass(frozen=True)
class SystemSettings:
    """Benchmark of the machine's rates.

    Attributes:
        repeats: timed calls.
        threads: CPU threads (default: torch's choice).
        out: write the result as JSON.
        device: auto, cpu or cuda.
        matmul: side of the matrices (default: depends on the device).
        disk: folder on the disk to measure (default: the current one).
        mib: size of copies and of the file, 2^20 bytes (default: depends on the device).
        processes: processes in the all-reduce (default: number of GPUs).
        schedule: report the bottleneck of this schedule on this machine.
        model: model for the schedule.
        text_encoder: text encoder for the schedule (default: the model's).
    """

    repeats: Annotated[int, Ge(1)] = 10
    threads: Annotated[int, Ge(0)] = 0
    out: Path | None = None
    device: str = "auto"
    matmul: Annotated[int, Ge(0)] = 0
    disk: Path = Path()
    mib: Annotated[int, Ge(0)] = 0
    processes: Annotated[int, Ge(0)] = 0
    schedule: str | None = None
    model: str = "xut_base"
    text_encoder: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """Benchmark of loading training samples.

    Attributes:
        shards: folder of shards; also times loading from it.
        resolution: sides of the crops, in pixels.
        batch: samples per batch.
        batches: batches per repeat.
        workers: loader processes.
        repeats: timed passes.
        out: write the result as JSON.
    """

    shards: str | None = None
    resolution: tuple[Annotated[int, Ge(1)], ...] = (256,)
    batch: Annotated[int, Ge(1)] = 32
    batches: Annotated[int, Ge(1)] = 20
    workers: Annotated[int, Ge(0)] = 0
    repeats: Annotated[int, Ge(1)] = 5
    out: Path | None = None


@dataclass
class ProbeSettings:
    """A measurement of training steps on this machine, for `hdm-plan`."""

    steps: Annotated[int, Gt(0)] = 5  # optimizer steps to time per stage, after `warmup`
    warmup: Annotated[int, Ge(0)] = 2  # untimed steps before them
    micro_batch: Annotated[int, Ge(0)] = 0  # samples per micro-batch; 0 uses the largest that fits by the forecast
    stages: list[str] = field(default_factory=list)  # names of the stages to measure; empty measures all
