"""What can be asked of a measurement, as dataclasses of which `hdm-bench` makes its flags; nothing slow to import."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt


@dataclass(frozen=True)
class RunSettings:
    """How often to measure, and where the result goes.

    Attributes:
        warmup: calls before the clock runs.
        repeats: timed calls.
        threads: of the CPU (default: torch's choice).
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
        resolution: side of the images in pixels (default: 256; of tiny 64).
        batch: samples at once.
        dtype: of autocast and of the encoders; auto is float32 on a CPU, on CUDA bfloat16 if it has it, else float16.
        compile: compile the network.
        checkpointing: recompute activations.
        routing_rate: share of image tokens that skip the U.
        context_length: caption tokens.
        caption_tokens: mean tokens of a caption, padded as on a GPU; 0 fills the context.
        accumulation: micro-batches of a call, made by the length of their captions.
        latents: take the images' latents from disk, as `hdm-shards encode` writes them, so that none is encoded.
        overlap: encode a micro-batch while the network works on the one before (CUDA; more than one a call).
        mode: of vae encode (default) or decode; of xut train (forward and backward pass, default) or forward.
        steps: solver steps.
        guidance_scale: 1 is none.
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
    """The machine's own rates.

    Attributes:
        repeats: timed calls.
        threads: of the CPU (default: torch's choice).
        out: write the result as JSON.
        device: auto, cpu or cuda.
        matmul: side of the matrices (default: by device).
        disk: folder on the disk to measure (default: this one).
        mib: size of copies and of the file, 2^20 bytes (default: by device).
        processes: of the all-reduce (default: GPUs).
        schedule: name what binds in this schedule on this machine.
        model: for a schedule.
        text_encoder: for a schedule (default: what the model is made for).
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
    """The loading of training samples.

    Attributes:
        shards: folder of shards whose loading is timed as well.
        resolution: sides of the crops, in pixels.
        batch: samples at once.
        batches: of a repeat.
        workers: processes that load.
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
    """A measurement of training steps on the machine at hand, for `hdm-plan`."""

    steps: Annotated[int, Gt(0)] = 5  # optimizer steps timed for each stage, after `warmup`
    warmup: Annotated[int, Ge(0)] = 2  # steps before
    micro_batch: Annotated[int, Ge(0)] = 0  # samples at once; 0 takes what the forecast says fits
    stages: list[str] = field(default_factory=list)  # names of the stages to measure; empty measures all
