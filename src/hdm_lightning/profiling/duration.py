"""Duration of an optimizer step: the time at data-sheet rates, divided by a single utilization."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval

from hdm_lightning.profiling.gpus import GPUS, Gpu, Machine
from hdm_lightning.profiling.memory import COMPILED_SHARE, activation_bytes
from hdm_lightning.profiling.planned_run import Recipe, StageRecipe

CALIBRATED_UTILISATION = 0.62
"""Utilization fitted to the paper's four stage times: it minimizes the largest of their relative errors (derived by a
test from `PAPER_HOURS`)."""

PAPER_HOURS: Mapping[int, float] = {256: 174.0, 512: 120.0, 768: 42.0, 1024: 49.0}
"""Wall-clock hours of the paper's stages by resolution, on four RTX 5090 (arXiv 2509.06068, appendix)."""

UTILISATION_SPREAD = (0.79, 1.22)
"""Lowest and highest utilization of the paper's stages fitted one by one, relative to that value (a test derives them):
the error range of a forecast with a single utilization."""

PAPER_MACHINE = Machine(GPUS["5090"], 4)

# Memory passes per saved activation: written, read by the next operation, read again in the backward pass, its
# gradient written and read. Eager mode runs about twice as many kernels between matrix products.
_PASSES = {True: 5, False: 10}
_RECOMPUTE_PASSES = 2
# Bytes per parameter and micro-batch: make its half copy (4 + 2), read it twice (2 + 2), add its gradient (2 + 4 + 4).
_WEIGHT_BYTES = 20
# The same for a frozen parameter, which has no gradient.
_FROZEN_BYTES = 10
# Bytes per parameter and optimizer step: AdamW reads weight, gradient and moments and writes three (28), clipping
# reads the gradient and scales it (12); an average reads two and writes one (12).
_OPTIMIZER_BYTES = 28 + 12
_AVERAGE_BYTES = 12


@dataclass
class Assumptions:
    """Assumptions of a forecast beyond data sheets and operation counts; a probe replaces the first."""

    # time at data-sheet rates (peak operations, and full bandwidth for the operations between matrix products)
    # over actual time
    utilisation: Annotated[float, Interval(gt=0, le=1)] = CALIBRATED_UTILISATION
    # memory not used by tensors: driver context, library workspaces, allocator fragmentation
    reserve_gib: Annotated[float, Ge(0)] = 1.5
    power_share: Annotated[float, Interval(gt=0, le=1)] = 0.9  # share of the GPUs' power limit drawn while training
    usd_per_kwh: Annotated[float, Ge(0)] = 0.30  # price of electricity, for your own machine


def billed(hours: float, machine: Machine, assumptions: Assumptions) -> dict[str, float]:
    """Return what `hours` (wall clock) on a machine take, by the names of a forecast's fields."""
    watts = machine.count * machine.gpu.power_w * assumptions.power_share + machine.host.power_w
    kwh = hours * watts / 1000
    return {
        "hours": hours,
        "device_hours": hours * machine.count,
        "kwh": kwh,
        "rent_usd": hours * machine.usd_per_hour,
        "electricity_usd": kwh * assumptions.usd_per_kwh,
    }


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on each device.

    The first five are at data-sheet rates; `exchange` is the part of the gradient exchange that the last backward pass
    does not hide (sharded: for every micro-batch, what its passes do not hide); `data` is the time the host needs to
    prepare the step's samples.
    """

    network: float
    autoencoder: float
    text: float
    between: float
    optimizer: float
    exchange: float
    data: float
    utilisation: float

    @property
    def ideal(self) -> float:
        """Device time at data-sheet rates."""
        return self.network + self.autoencoder + self.text + self.between + self.optimizer

    @property
    def device(self) -> float:
        """Device time at the given utilization, plus the exchange that is not hidden."""
        return self.ideal / self.utilisation + self.exchange

    @property
    def total(self) -> float:
        """The slower of device and host."""
        return max(self.device, self.data)

    def binds(self) -> str:
        """Return the bottleneck: what takes the largest share of the step."""
        if self.data > self.device:
            return "data"
        parts = {
            "compute (network)": self.network / self.utilisation,
            "compute (autoencoder)": self.autoencoder / self.utilisation,
            "compute (text encoder)": self.text / self.utilisation,
            "memory bandwidth": (self.between + self.optimizer) / self.utilisation,
            "gradient exchange": self.exchange,
        }
        return max(parts, key=lambda part: parts[part])


def step_time(recipe: Recipe, stage: StageRecipe, machine: Machine, micro_batch: int, utilisation: float) -> StepTime:
    """Forecast one optimizer step with micro-batches of `micro_batch` samples per device."""
    gpu, samples = machine.gpu, stage.batch_size / machine.count
    count, peak = recipe.operations(stage), machine.gpu.peak_tflops * 1e12
    between = samples * sample_traffic_bytes(recipe, stage)
    weights = _WEIGHT_BYTES * recipe.trained + _FROZEN_BYTES * (recipe.parameters - recipe.trained)
    between += samples / micro_batch * weights
    own = recipe.trained / (machine.count if recipe.sharded else 1)
    optimizer = (_OPTIMIZER_BYTES + _AVERAGE_BYTES * recipe.averages) * own
    bandwidth = gpu.bandwidth_gb_s * 1e9
    exchanges = exchanges_of_step(recipe, stage, machine.count, micro_batch)
    hiding = count.network if recipe.sharded else count.backward + count.recompute
    hidden = hiding * micro_batch / peak / utilisation
    return StepTime(
        network=samples * count.network / peak,
        autoencoder=samples * count.autoencoder / peak,
        text=samples * count.text / peak,
        between=between / bandwidth,
        optimizer=optimizer / bandwidth,
        exchange=exchanges * max(0.0, exchange_seconds(recipe, gpu, machine.count) - hidden),
        data=stage.batch_size / images_per_s_of_host(recipe, machine, stage),
        utilisation=utilisation,
    )


def sample_traffic_bytes(recipe: Recipe, stage: StageRecipe) -> int:
    """Return the mean bytes per sample moved by operations between matrix products, in network and encoders."""
    return round(sum(share * _traffic_bytes(recipe, each) for share, each in recipe.padded(stage)))


def _traffic_bytes(recipe: Recipe, stage: StageRecipe) -> int:
    kept = activation_bytes(recipe.network, recipe.work(stage), element_bytes=recipe.element_bytes)
    share = COMPILED_SHARE if recipe.compiled else 1.0
    passes = _PASSES[recipe.compiled] + (_RECOMPUTE_PASSES if stage.checkpointing else 0)
    side = stage.resolution
    encoders = 0 if stage.cached else recipe.autoencoder.encode_traffic_bytes(side, side, recipe.element_bytes)
    if not stage.text_stored:
        encoders += recipe.text.traffic_bytes(stage.context_length, recipe.element_bytes)
    return int(passes * share * kept) + encoders


def exchanges_of_step(recipe: Recipe, stage: StageRecipe, devices: int, micro_batch: int) -> float:
    """Return how many exchanges of `exchange_seconds` a device runs per optimizer step."""
    return stage.batch_size / devices / micro_batch if recipe.sharded else 1


def exchange_seconds(recipe: Recipe, gpu: Gpu, devices: int) -> float:
    """Return the seconds of one all-reduce of all gradients: 2·(n − 1)/n of their bytes at the bus bandwidth.

    Sharded, per micro-batch: (n − 1)/n of the weights gathered twice and of the float32 gradients scattered.
    """
    if recipe.sharded:
        size = (2 * recipe.element_bytes + 4) * recipe.parameters
    else:
        size = 2 * (2 if recipe.half_gradients else 4) * recipe.trained
    return (devices - 1) / devices * size / (gpu.link_gb_s * 1e9)


def images_per_s_of_host(recipe: Recipe, machine: Machine, stage: StageRecipe) -> float:
    """Return the images per second that the host's cores can decode and its disk can read for a stage."""
    host, read = machine.host, machine.host.disk_mb_s * 1e3 / recipe.sample_kb(stage)
    return read if stage.cached else min(host.cores * host.decode_mpx_per_core_s / recipe.dataset.image_mpx, read)
