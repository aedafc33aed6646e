"""The keys of `hdm-plan` beside those of a training run, as plain typed values."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class GpuSettings:
    """Figures of the GPU that replace those of the table; None keeps them. See `gpus.Gpu`."""

    peak_tflops: float | None = None
    memory_gib: float | None = None
    bandwidth_gb_s: float | None = None
    link_gb_s: float | None = None
    power_w: float | None = None
    usd_per_hour: float | None = None


@dataclass
class HostSettings:
    """The machine around the GPUs; see `machine.Host`."""

    cores: int = 32
    decode_mpx_per_core_s: float = 40.0
    disk_mb_s: float = 2000.0
    network_mb_s: float = 100.0
    power_w: float = 250.0


@dataclass
class DatasetSettings:
    """The training set; see `recipe.Dataset`."""

    images: int = 8_469_000
    image_kb: float = 250.0
    image_mpx: float = 2.0


@dataclass
class AssumptionSettings:
    """Figures behind the forecast; see `assumptions.Assumptions`."""

    utilisation: float = 0.62
    reserve_gib: float = 1.5
    power_share: float = 0.9
    usd_per_kwh: float = 0.30


@dataclass
class ProbeSettings:
    """A measurement on the machine at hand.

    Attributes:
        steps: optimizer steps timed for each stage, after `warmup`.
        warmup: steps before.
        micro_batch: samples at once; 0 takes what the forecast says fits.
        stages: names of the stages to measure; empty measures all.
    """

    steps: int = 5
    warmup: int = 2
    micro_batch: int = 0
    stages: list[str] = field(default_factory=list)


@dataclass
class PlanSettings:
    """Everything that `hdm-plan` asks beyond the training run's own keys.

    Attributes:
        gpus: a count and a name, ``4x5090``; a list of them; or ``here``, the machine at hand.
        gpu: figures that replace the table's.
        host: the machine around the GPUs.
        dataset: the training set.
        assumptions: figures behind the forecast.
        budget_usd: propose a schedule for this money; None forecasts the schedule as it is.
        probe: measure steps on the machine at hand and recalibrate.
        probe_settings: how.
        out: file for the forecast as JSON; None writes none.
    """

    gpus: Any = "4x5090"
    gpu: GpuSettings = field(default_factory=GpuSettings)
    host: HostSettings = field(default_factory=HostSettings)
    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    assumptions: AssumptionSettings = field(default_factory=AssumptionSettings)
    budget_usd: float | None = None
    probe: bool = False
    probe_settings: ProbeSettings = field(default_factory=ProbeSettings)
    out: str | None = None
