"""Forecast a schedule on a machine (time, memory, disk, energy, money), or fit a schedule to a budget."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from hdm_lightning.errors import UserError
from hdm_lightning.profiling.duration import (
    UTILISATION_SPREAD,
    Assumptions,
    StepTime,
    billed,
    exchange_seconds,
    exchanges_of_step,
    step_time,
)
from hdm_lightning.profiling.encoding_time import EncodingForecast, captions_forecast, encoding_forecast, stored_tokens
from hdm_lightning.profiling.gpus import GPUS, Machine
from hdm_lightning.profiling.memory import (
    GIB,
    DeviceMemory,
    device_memory,
    fitting_encoder_batches,
    largest_micro_batch,
    sample_activation_bytes,
    usable_micro_batch,
)
from hdm_lightning.profiling.operations import Operations
from hdm_lightning.profiling.planned_run import WHOLE_IMAGE, Recipe, StageRecipe

# A stage that warms up for more than a quarter of its samples, or has fewer steps than this, is not worthwhile.
_WARMUPS = 4
_FEWEST_STEPS = 1000

DOES_NOT_FIT = "memory (does not fit)"
# Tokens that keep a GPU's matrix products efficient; with fewer, recomputation may be the better choice.
_ENOUGH_TOKENS = 8192


@dataclass(frozen=True)
class StageForecast:
    """Forecast of one stage."""

    stage: StageRecipe  # as requested
    image_tokens: int  # of one sample
    text_tokens: int  # of one sample, with padding, on average
    kept_tokens: int  # image tokens of one sample inside the U
    tokens: int  # image and text tokens of all samples
    operations: Operations  # of one sample
    total_flops: float  # of all samples, all devices together
    micro_batch: int  # samples per device at once in this forecast: the stage's, or the largest divisor that fits
    largest_micro_batch: int  # the largest that fits with the stage's settings
    largest_checkpointed: int  # with activation checkpointing
    largest_plain: int  # without it
    memory: DeviceMemory  # of one device, with the stage's own micro-batch
    activations_plain: int  # bytes of activations for the stage's own micro-batch without checkpointing
    activations_checkpointed: int  # the same with checkpointing
    fits: bool  # whether the stage's own micro-batch fits
    text_batch: int  # captions of `micro_batch` to encode at once so that it fits
    autoencoder_batch: int  # images of `micro_batch` to encode at once so that it fits
    step: StepTime  # seconds of one optimizer step
    utilisation: float  # assumed or measured
    useful_flops: float  # model FLOPs of one sample in the network, without padding
    padding_share: float  # share of padding in the text tokens
    mfu: float  # useful model FLOPs over peak FLOPs
    images_per_s: float  # all devices together
    hours: float  # wall clock
    device_hours: float  # hours × devices
    read_mb_s: float  # read by the loaders
    exchange_gb: float  # gradients (sharded: and weights) that each device sends in the stage, 10^9 bytes
    kwh: float  # electricity
    rent_usd: float  # device hours × the GPU's price
    electricity_usd: float  # kwh × the price of electricity, for your own machine
    binds: str  # bottleneck: what takes the largest share of a step
    notes: tuple[str, ...]  # settings to change so that it fits; empty if it does
    savings: tuple[str, ...]  # optional settings that save operations


@dataclass(frozen=True)
class Storage:
    """Disk and network, 10^9 bytes."""

    dataset_gb: float  # the shards
    checkpoint_gb: float  # one training checkpoint
    checkpoints_gb: float  # all that are kept, with the exported weights
    latents_gb: float  # the sets of latents read by the stages
    text_states_gb: float  # the text states read by the stages
    cache_gb: float  # latents (half precision, every resolution) and padded text states of all images, if stored
    download_hours: float  # download time of the shards


@dataclass(frozen=True)
class Forecast:
    """Forecast of a whole schedule."""

    machine: Machine
    recipe: Recipe
    assumptions: Assumptions
    measured: Mapping[str, float]  # measured utilization by stage name
    encodings: tuple[EncodingForecast, ...]  # encoding of latents and text states before the first stage
    stages: tuple[StageForecast, ...]
    storage: Storage

    def total(self, field: str) -> float:
        """Return the sum of a field over the stages, and over the encodings if they have it."""
        parts = (*self.encodings, *self.stages)
        return float(sum(getattr(part, field) for part in parts if hasattr(part, field)))

    def total_range(self, field: str) -> tuple[float, float]:
        """Return the lowest and highest total over `UTILISATION_SPREAD`; measured stages do not vary."""
        ends = sorted(self._at(factor).total(field) for factor in UTILISATION_SPREAD)
        return ends[0], ends[-1]

    def _at(self, factor: float) -> "Forecast":
        """Return the forecast with the assumed utilization multiplied by `factor`."""
        utilisation = min(1.0, factor * self.assumptions.utilisation)
        assumptions = replace(self.assumptions, utilisation=utilisation)
        return forecast(self.recipe, self.machine, assumptions, utilisation=self.measured)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, including sums and derived numbers."""
        sums = ("hours", "device_hours", "kwh", "electricity_usd", "total_flops", "tokens", "exchange_gb")
        low, high = self.total_range("rent_usd")
        rent = {"low": low, "expected": self.total("rent_usd"), "high": high}
        return {
            "machine": plain(self.machine),
            "recipe": plain(replace(self.recipe, stages=())),
            "assumptions": plain(self.assumptions),
            "encodings": plain(self.encodings),
            "stages": plain(self.stages),
            "storage": plain(self.storage),
            "total": {**{name: self.total(name) for name in sums}, "rent_usd": rent},
        }


def forecast(
    recipe: Recipe,
    machine: Machine,
    assumptions: Assumptions | None = None,
    *,
    utilisation: Mapping[str, float] | None = None,
) -> Forecast:
    """Forecast a schedule on a machine; `utilisation` holds measured values by stage name that replace the assumed one.

    Raises ValueError: a stage's resolution is not a multiple of autoencoder factor × patch.
    """
    assumed, measured = assumptions or Assumptions(), utilisation or {}
    stages = tuple(
        _stage(recipe, stage, machine, assumed, measured.get(stage.name, assumed.utilisation))
        for stage in recipe.stages
    )
    encodings = tuple(encoding_forecast(recipe, each, machine, assumed) for each in recipe.encoded_resolutions())
    if any(stage.text_stored for stage in recipe.stages):
        encodings += (captions_forecast(recipe, machine, assumed),)
    return Forecast(machine, recipe, assumed, measured, encodings, stages, _storage(recipe, machine))


def _stage(
    recipe: Recipe, stage: StageRecipe, machine: Machine, assumptions: Assumptions, utilisation: float
) -> StageForecast:
    room, devices, gpu = machine.gpu.memory_gib, machine.count, machine.gpu
    fit: dict[str, Any] = {"devices": devices, "reserve_gib": assumptions.reserve_gib}
    ways = dict.fromkeys((False, True, stage.checkpointing))
    either_way = {again: replace(stage, checkpointing=again) for again in ways}
    largest = {again: largest_micro_batch(recipe, changed, room, **fit) for again, changed in either_way.items()}
    activations = [stage.micro_batch_size * sample_activation_bytes(recipe, each) for each in either_way.values()]
    micro = usable_micro_batch(stage, devices, min(largest[stage.checkpointing], stage.micro_batch_size))
    running = max(1, micro)
    encoder_batches = fitting_encoder_batches(recipe, replace(stage, micro_batch_size=running), room, **fit)
    memory = device_memory(recipe, stage, **fit)
    work, count = recipe.work(stage), recipe.operations(stage)
    text, lengths = sum(share * each.context_length for share, each in recipe.padded(stage)), recipe.true_lengths(stage)
    useful = recipe.useful_flops(stage)
    step = step_time(recipe, stage, machine, running, utilisation)
    exchanges = exchanges_of_step(recipe, stage, devices, running) * exchange_seconds(recipe, gpu, devices)
    hours, rate = stage.steps * step.total / 3600, stage.batch_size / step.total
    return StageForecast(
        stage=stage,
        image_tokens=work.image,
        text_tokens=round(text),
        kept_tokens=work.kept,
        tokens=(work.image + round(text)) * stage.samples,
        operations=count,
        total_flops=float(count.total) * stage.samples,
        micro_batch=micro,
        largest_micro_batch=largest[stage.checkpointing],
        largest_checkpointed=largest[True],
        largest_plain=largest[False],
        memory=memory,
        activations_plain=activations[0],
        activations_checkpointed=activations[1],
        fits=memory.total <= room * GIB,
        text_batch=encoder_batches[0],
        autoencoder_batch=encoder_batches[1],
        step=step,
        utilisation=utilisation,
        useful_flops=useful,
        padding_share=max(0.0, 1 - sum(lengths) / len(lengths) / text),
        mfu=useful * rate / (devices * gpu.peak_tflops * 1e12),
        images_per_s=rate,
        read_mb_s=rate * recipe.sample_kb(stage) / 1e3,
        exchange_gb=stage.steps * exchanges * gpu.link_gb_s,
        **billed(hours, machine, assumptions),
        binds=step.binds() if micro else DOES_NOT_FIT,
        notes=_notes(recipe, stage, machine, micro, largest, encoder_batches),
        savings=_savings(recipe, stage, machine, largest[False]) if micro else (),
    )


def _notes(
    recipe: Recipe,
    stage: StageRecipe,
    machine: Machine,
    micro: int,
    largest: Mapping[Any, int],
    encoder_batches: tuple[int, int],
) -> tuple[str, ...]:
    """Return the settings to change so that the stage fits on the machine."""
    key, memory = f"schedule.stages.{stage.name}", f"{machine.gpu.memory_gib:g} GiB"
    notes = []
    if not micro and not largest[True]:
        notes.append(f"not even one sample fits into {memory}: use a smaller model, or a GPU with more memory")
    elif not micro:
        notes.append(f"does not fit into {memory}: set {key}.activation_checkpointing=true")
    elif micro < stage.micro_batch_size:
        change = f"{stage.micro_batch_size} samples per micro-batch do not fit into {memory}"
        other = usable_micro_batch(stage, machine.count, min(largest[True], stage.micro_batch_size))
        also = "" if stage.checkpointing or other <= micro else f" ({other} with activation_checkpointing=true)"
        notes.append(f"{change}: set {key}.micro_batch_size={micro}{also}")
    for setting, batch, asked, each in (
        ("text_encoder.max_tokens", encoder_batches[0], recipe.captions_at_once(stage), stage.context_length),
        ("vae.max_pixels", encoder_batches[1], recipe.images_at_once(stage), stage.resolution**2),
    ):
        if batch < min(asked, micro):
            notes.append(f"set {setting}={batch * each} so that the encoder's own activations fit")
    return tuple(notes)


def _savings(recipe: Recipe, stage: StageRecipe, machine: Machine, largest_plain: int) -> tuple[str, ...]:
    """Return settings that save operations in a stage that fits, if they keep the GPU busy enough."""
    key, count, found = f"schedule.stages.{stage.name}", recipe.operations(stage), []
    micro = usable_micro_batch(stage, machine.count, largest_plain)
    if stage.checkpointing and micro * recipe.work(stage).full >= _ENOUGH_TOKENS:
        change = f"{key}.activation_checkpointing=false {key}.micro_batch_size={micro}"
        found.append(f"{change} also fits and saves {100 * count.recompute / count.total:.0f}% of the operations")
    seen = sum(each.samples for each in recipe.stages if each.cached and each.resolution == stage.resolution)
    if stage.cached and seen < WHOLE_IMAGE * recipe.dataset.images:
        found.append(
            f"use images instead of latents: encoding {seen / 1e6:.1f} million samples during training is less work "
            f"than encoding {recipe.dataset.images / 1e6:.1f} million whole images once"
        )
    return tuple(found)


def _storage(recipe: Recipe, machine: Machine) -> Storage:
    dataset = recipe.dataset.images * recipe.dataset.image_kb * 1e3
    checkpoint = 4 * (recipe.trained * (1 + recipe.averages) + recipe.moments)
    exported = 4 * recipe.trained * (1 + recipe.averages)
    kept = len(recipe.stages) * recipe.checkpoints_kept * checkpoint + exported
    latents = sum(recipe.autoencoder.latent_values(stage.resolution, stage.resolution) for stage in recipe.stages)
    context = max(stage.context_length for stage in recipe.stages) * recipe.text.width
    return Storage(
        dataset_gb=dataset / 1e9,
        checkpoint_gb=checkpoint / 1e9,
        checkpoints_gb=kept / 1e9,
        latents_gb=sum(recipe.latent_kb(each) * recipe.dataset.images for each in recipe.encoded_resolutions()) / 1e6,
        text_states_gb=recipe.state_kb(stored_tokens(recipe)) / 1e6,
        cache_gb=2 * (latents + context) * recipe.dataset.images / 1e9,
        download_hours=dataset / (machine.host.network_mb_s * 1e6) / 3600,
    )


def plain(value: Any) -> Any:
    """Return a dataclass and its properties as plain values, for JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        derived = [key for key, each in vars(type(value)).items() if isinstance(each, property)]
        names = [entry.name for entry in fields(value)] + [key for key in derived if not key.startswith("_")]
        return {name: plain(getattr(value, name)) for name in names}
    return [plain(each) for each in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Proposal:
    """A schedule for a budget."""

    budget_usd: float  # the budget
    forecast: Forecast  # of the proposed schedule
    share: float  # proposed samples over those of the original schedule
    dropped: tuple[str, ...]  # stages left out, starting from the last
    overrides: tuple[str, ...]  # hdm-train overrides that run it

    def to_json(self) -> dict[str, Any]:
        """Return plain values, including those of the forecast."""
        own = {name: plain(getattr(self, name)) for name in ("budget_usd", "share", "dropped", "overrides")}
        return {**own, **self.forecast.to_json()}


def propose(
    recipe: Recipe,
    machine: Machine,
    budget_usd: float,
    assumptions: Assumptions | None = None,
    *,
    utilisation: Mapping[str, float] | None = None,
) -> Proposal:
    """Scale a schedule so that its rent on a machine stays within a budget.

    All stages are scaled by the same factor, so that each keeps its share of the cost. If a stage would become
    shorter than `least_samples`, the last one is dropped and the others get its share.

    Raises UserError: the machine has no price, or the budget is below the smallest schedule.
    """
    if machine.usd_per_hour <= 0:
        raise UserError(
            f"{machine.name} has no price, so a budget has no effect", where="gpu.usd_per_hour", hint="set one"
        )
    for count in range(len(recipe.stages), 0, -1):
        part = replace(recipe, stages=recipe.stages[:count])
        whole = forecast(part, machine, assumptions, utilisation=utilisation)
        encoding = sum(each.rent_usd for each in whole.encodings)  # independent of the number of samples
        share = max(0.0, budget_usd - encoding) / (whole.total("rent_usd") - encoding)
        samples = [_whole_steps(stage, share) for stage in part.stages]
        if all(have >= least_samples(stage) for have, stage in zip(samples, part.stages, strict=True)):
            chosen = part.with_samples(iter(samples))
            dropped = tuple(stage.name for stage in recipe.stages[count:])
            plan = forecast(chosen, machine, assumptions, utilisation=utilisation)
            return Proposal(budget_usd, plan, share, dropped, _overrides(chosen, dropped))
    assumed, first = assumptions or Assumptions(), recipe.stages[0].name
    in_force = replace(assumed, utilisation=(utilisation or {}).get(first, assumed.utilisation))
    raise _below_the_smallest(recipe, machine, budget_usd, in_force)


def least_samples(stage: StageRecipe) -> int:
    """Return the fewest samples for which a stage is worthwhile."""
    return max(_WARMUPS * stage.warmup_samples, _FEWEST_STEPS * stage.batch_size)


def smallest(recipe: Recipe) -> Recipe:
    """Return the smallest schedule that `propose` considers: the first stage alone, at its minimum length."""
    first = recipe.stages[0]
    return replace(recipe, stages=(replace(first, samples=least_samples(first)),))


def _whole_steps(stage: StageRecipe, share: float) -> int:
    """Return the scaled samples, rounded down to whole optimizer steps to stay within the budget."""
    return int(stage.samples * share / stage.batch_size) * stage.batch_size


def _overrides(recipe: Recipe, dropped: tuple[str, ...]) -> tuple[str, ...]:
    kept = [f"schedule.stages.{stage.name}.samples={stage.samples}" for stage in recipe.stages]
    return (*kept, *(f"~schedule.stages.{name}" for name in dropped))


def _below_the_smallest(recipe: Recipe, machine: Machine, budget_usd: float, assumptions: Assumptions) -> UserError:
    alone = smallest(recipe)
    least = forecast(alone, machine, assumptions).total("rent_usd")
    plans = {name: forecast(alone, replace(machine, gpu=gpu, count=1), assumptions) for name, gpu in GPUS.items()}
    costs = {name: plan.total("rent_usd") for name, plan in plans.items() if plan.stages[0].micro_batch}
    cheapest = min(costs, key=lambda name: costs[name], default=None)
    other = f"gpus=1x{cheapest} (${costs[cheapest]:.2f}), or " if cheapest else ""
    return UserError(
        f"${budget_usd:g} is below the smallest schedule, {alone.stages[0].samples:,} samples of "
        f"{alone.stages[0].name}, which costs ${least:.2f} on {machine.name}",
        where="budget_usd",
        hint=f"set budget_usd={int(least) + 1}, or {other}start from a smaller schedule or model",
    )
