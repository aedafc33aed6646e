"""A few real training steps on the machine at hand, to put a measured utilisation in place of the assumed one."""

from collections.abc import Callable
from dataclasses import replace

import torch

from hdm_lightning.benchmarks.machine import physical_memory_bytes
from hdm_lightning.benchmarks.system import matmul, memory_bandwidth
from hdm_lightning.benchmarks.timing import time_call
from hdm_lightning.cli.bench_step import TrainingStep
from hdm_lightning.cli.plan_recipe import CPU, EncoderConfigs
from hdm_lightning.errors import UserError
from hdm_lightning.planning.assumptions import Assumptions
from hdm_lightning.planning.duration import step_time
from hdm_lightning.planning.forecast import forecast
from hdm_lightning.planning.gpus import Gpu, find_gpu
from hdm_lightning.planning.machine import Machine
from hdm_lightning.planning.recipe import Recipe, StageRecipe
from hdm_lightning.planning.settings import ProbeSettings
from hdm_lightning.precision import half_dtype
from hdm_lightning.training.settings import StageSettings, TrainSettings

_CPU_MATMUL = 1536
_CPU_BANDWIDTH_MIB = 256
_CPU_MICRO_BATCH = 4


def machine_at_hand() -> Machine:
    """This machine: its GPUs by the table, with their own memory; or the CPU, its rates measured (seconds).

    Raises:
        UserError: the GPU is not in the table.
    """
    if not torch.cuda.is_available():
        return Machine(_measured_cpu(), 1)
    properties = torch.cuda.get_device_properties(0)
    gpu = find_gpu(properties.name)
    if gpu is None:
        raise UserError(
            f"this machine's GPU, {properties.name}, is not in the table",
            where="gpus",
            hint="name the nearest one, e.g. gpus=1x5090, and override its figures with gpu.peak_tflops=… …",
        )
    return Machine(replace(gpu, memory_gib=properties.total_memory / 2**30), torch.cuda.device_count())


def require_at_hand(machine: Machine) -> None:
    """Raise UserError unless this machine has the kind of device that is planned for."""
    here = machine_at_hand() if machine.gpu.name != CPU else None
    if here is not None and here.gpu.name != machine.gpu.name:
        found = "no GPU" if here.gpu.name == CPU else f"a {here.gpu.name}"
        raise UserError(
            f"a probe measures the machine at hand, which has {found}, while the plan is for {machine.name}",
            where="probe",
            hint="set gpus=here, or run the probe on such a machine and set assumptions.utilisation to what it finds",
        )


def measured_utilisation(
    recipe: Recipe,
    machine: Machine,
    settings: TrainSettings,
    encoders: EncoderConfigs,
    probe: ProbeSettings,
    assumptions: Assumptions,
    tell: Callable[[str], None],
) -> dict[str, float]:
    """Time steps of each stage on one device.

    Args:
        recipe: what is trained.
        machine: this one.
        settings: the run's settings.
        encoders: the encoders' configurations; their weights are random.
        probe: how many steps, and of which stages.
        assumptions: for what fits.
        tell: hears the result of each stage.

    Returns:
        Stage name to utilisation: time at the data sheet's rates over measured time. Stages that are not
        measured get the mean of those that are.

    Raises:
        UserError: an unknown stage is asked for, or no sample fits.
    """
    names = [stage.name for stage in recipe.stages]
    unknown = sorted(set(probe.stages) - set(names))
    if unknown:
        raise UserError(
            f"the schedule has no stage {unknown[0]!r}",
            where="probe_settings.stages",
            hint="choose of " + ", ".join(names),
        )
    one = replace(machine, count=1)
    plan = forecast(recipe, one, assumptions)
    found: dict[str, float] = {}
    for stage, expected in zip(recipe.stages, plan.stages, strict=True):
        if probe.stages and stage.name not in probe.stages:
            continue
        micro = probe.micro_batch or min(expected.micro_batch, _CPU_MICRO_BATCH if one.gpu.name == CPU else 10**6)
        if not micro:
            raise UserError("not one sample fits", where=f"schedule.stages.{stage.name}", hint=" ".join(expected.notes))
        seconds = _seconds(recipe, stage, micro, one, settings, encoders, probe)
        single = replace(stage, batch_size=micro, micro_batch_size=micro)
        found[stage.name] = step_time(recipe, single, one, micro, 1.0).ideal / seconds
        tell(f"{stage.name}: {micro / seconds:.2f} images/s on one device, utilisation {found[stage.name]:.3f}")
    mean = sum(found.values()) / len(found)
    return {name: found.get(name, mean) for name in names}


def _seconds(
    recipe: Recipe,
    stage: StageRecipe,
    micro: int,
    machine: Machine,
    settings: TrainSettings,
    encoders: EncoderConfigs,
    probe: ProbeSettings,
) -> float:
    device = torch.device("cpu" if machine.gpu.name == CPU else "cuda")
    step = TrainingStep(
        recipe.network,
        encoders.text,
        encoders.autoencoder,
        _one_micro_batch(settings.schedule.stages[stage.name], micro),
        device=device,
        dtype=_mixed_dtype(device) if recipe.mixed else torch.float32,
        compiled=recipe.compiled,
        text_max_tokens=recipe.text_max_tokens,
        autoencoder_max_pixels=recipe.autoencoder_max_pixels,
        averages=recipe.averages,
        optimizer=settings.optimizer,
    )
    return time_call(step, device, warmup=probe.warmup, repeats=probe.steps).median


def _mixed_dtype(device: torch.device) -> torch.dtype:
    return half_dtype(device) if device.type == "cuda" else torch.bfloat16


def _one_micro_batch(stage: StageSettings, micro: int) -> StageSettings:
    return replace(stage, batch_size=micro, micro_batch_size=micro)


def _measured_cpu() -> Gpu:
    device = torch.device("cpu")
    _, rate = matmul(device, torch.float32, _CPU_MATMUL, repeats=5)
    _, bandwidth = memory_bandwidth(device, mib=_CPU_BANDWIDTH_MIB, repeats=5)
    memory = physical_memory_bytes() / 2**30
    return Gpu(CPU, rate / 1e12, memory, bandwidth / 1e9, link_gb_s=10.0, power_w=0.0, usd_per_hour=0.0)
