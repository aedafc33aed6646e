"""Format forecasts as terminal tables, with the settings to change if something does not fit and presets that do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hdm_lightning.profiling.duration import UTILISATION_SPREAD
from hdm_lightning.profiling.forecast import Forecast, Proposal, StageForecast
from hdm_lightning.profiling.gpus import CPU, HERE, Machine
from hdm_lightning.profiling.memory import GIB
from hdm_lightning.profiling.padding import caption_quantile


@dataclass(frozen=True)
class Preset:
    """A preset run: `hdm-train experiment=NAME`."""

    name: str  # file in conf/experiment
    offers: str  # short description
    memory_gib: float  # memory required per card
    cards: int  # minimum number of cards
    alone: bool = False  # whether it uses only one card


ON_A_CPU = Preset("openclipart_cpu", "1,000 drawings at 128 px in 2.5 hours", 0, 0)
PRESETS = (
    Preset("evening_gpu", "1,000 drawings at 256 px in less than an hour", 10, 1, alone=True),
    Preset("weekend_24gb", "from scratch to 512 px in a few days", 20, 1),
    Preset("paper", "the paper's recipe to 1024 px", 24, 4),
    Preset("paper_cached", "the same on latents from disk", 24, 4),
)
"""Presets for GPUs, the smallest first."""

Row = tuple[str, Callable[[StageForecast], str], str | None]
"""Label, function that formats a stage's cell, and the field to sum over the stages."""


def plan_report(plan: Forecast) -> RenderableType:
    """Return the report of a forecast: time and cost, operations, memory, storage, and settings that help."""
    parts: list[RenderableType] = [
        _stage_table(f"{plan.machine.name}: time and cost", plan, _TIME_ROWS),
        *([_encoding_table(plan)] if plan.encodings else []),
        Text(_range_line(plan)),
        _stage_table("work per sample", plan, _WORK_ROWS),
        _stage_table(f"memory of one device (of {plan.machine.gpu.memory_gib:g} GiB)", plan, _memory_rows(plan)),
        _storage_table(plan),
        Text(_assumption_line(plan)),
    ]
    notes = [f"! {stage.stage.name}: {note}" for stage in plan.stages for note in stage.notes]
    savings = [f"or {stage.stage.name}: {saving}" for stage in plan.stages for saving in stage.savings]
    return Group(*parts, *map(Text, notes), *map(Text, savings))


def proposal_report(proposal: Proposal) -> RenderableType:
    """Return the report of a proposal: the schedule, how to run it, and its forecast."""
    kept = ", ".join(f"{stage.stage.name} {stage.stage.samples:,}" for stage in proposal.forecast.stages)
    lines = [f"${proposal.budget_usd:g} buys {100 * proposal.share:.0f}% of the schedule's samples: {kept}"]
    if proposal.dropped:
        lines.append("dropped because they would be too short: " + ", ".join(proposal.dropped))
    lines += [
        "run hdm-train with the same schedule, model and other options, and:",
        *(f"  {override}" for override in proposal.overrides),
        "",
    ]
    return Group(*(Text(line) for line in lines), plan_report(proposal.forecast))


def presets_for(machine: Machine) -> list[Preset]:
    """Return the presets that fit a machine's memory and number of cards, the smallest first.

    If presets for several cards fit, only these are returned; on fewer cards they would take months and are skipped.
    """
    if machine.gpu.name == CPU:
        return [ON_A_CPU]
    fitting = [each for each in PRESETS if each.memory_gib <= machine.gpu.memory_gib and each.cards <= machine.count]
    several = [each for each in fitting if each.cards > 1]
    return several or fitting


def presets_line(plan: Forecast) -> RenderableType:
    """Return the presets that suit the machine, and how to plan them."""
    machine, found = plan.machine, presets_for(plan.machine)
    offers = [f"  experiment={each.name}  {each.offers}" for each in found]
    gpus = (
        HERE if machine.gpu.name == CPU else f"{1 if found and found[-1].alone else machine.count}x{machine.gpu.name}"
    )
    how = f"  plan with: hdm-plan experiment={found[-1].name} gpus={gpus}" if found else ""
    lines = [f"presets for {machine.name}:", *offers, how] if found else []
    return Text("\n".join(lines), no_wrap=True)


def comparison_report(plans: Sequence[Forecast]) -> RenderableType:
    """Return a table of the same schedule on several machines, one per row."""
    table = Table(title="machines", title_justify="left")
    names = [stage.stage.name for stage in plans[0].stages]
    for column in ("machine", *(f"{name} h" for name in names), "total h", "kWh", "rent $", "electricity $"):
        table.add_column(column, justify="left" if column == "machine" else "right")
    for plan in plans:
        hours = [_hours(stage.hours) for stage in plan.stages]
        sums = [_hours(plan.total("hours")), *(f"{plan.total(f):.0f}" for f in ("kwh", "rent_usd", "electricity_usd"))]
        table.add_row(plan.machine.name, *hours, *sums)
    return table


def _stage_table(title: str, plan: Forecast, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for stage in plan.stages:
        table.add_column(stage.stage.name, justify="right")
    totals = any(summed for _, _, summed in rows) and len(plan.stages) + len(plan.encodings) > 1
    if totals:
        table.add_column("with encoding" if plan.encodings else "total", justify="right")
    for label, cell, summed in rows:
        total = f"{plan.total(summed):,.1f}" if summed else ""
        table.add_row(label, *(cell(stage) for stage in plan.stages), *([total] if totals else []))
    return table


def _encoding_table(plan: Forecast) -> Table:
    table = Table(
        title="beforehand: hdm-shards encode and encode-captions, each image and caption once",
        title_justify="left",
    )
    for column in ("", "count, 10^6", "per second", "hours", "rent, $", "disk, GB", "binds"):
        table.add_column(column, justify="right" if column else "left")
    for each in plan.encodings:
        row = (f"{each.images / 1e6:.3f}", f"{each.images_per_s:.1f}", _hours(each.hours), f"{each.rent_usd:.2f}")
        name = "captions" if each.resolution is None else f"{each.resolution} px"
        table.add_row(name, *row, f"{each.disk_gb:,.0f}", each.binds)
    return table


def _range_line(plan: Forecast) -> str:
    low, high = plan.total_range("rent_usd")
    least, most = UTILISATION_SPREAD
    return (
        f"total rent {_dollars(plan.total('rent_usd'))}, {_dollars(low)} to {_dollars(high)}: fitted one by one, the "
        f"paper's stages have {least:g} to {most:g} times the utilization fitted to all four"
    )


def _dollars(sum_usd: float) -> str:
    """Format a sum, with cents only if it is small."""
    return f"${sum_usd:,.0f}" if sum_usd >= 10 else f"${sum_usd:.2f}"


def _storage_table(plan: Forecast) -> Table:
    table = Table(title="storage and network", title_justify="left", show_header=False)
    storage = plan.storage
    for label, value in (
        ("shards", f"{storage.dataset_gb:,.0f} GB"),
        ("download of the shards", f"{_hours(storage.download_hours)} h"),
        ("one training checkpoint", f"{storage.checkpoint_gb:.1f} GB"),
        ("all checkpoints kept", f"{storage.checkpoints_gb:.1f} GB"),
        *([("latents read by stages", f"{storage.latents_gb:,.0f} GB")] if storage.latents_gb else []),
        *([("text states read by stages", f"{storage.text_states_gb:,.0f} GB")] if storage.text_states_gb else []),
        ("latents of all stages and padded text states, if stored", f"{storage.cache_gb:,.0f} GB"),
    ):
        table.add_row(label, value)
    return table


def _assumption_line(plan: Forecast) -> str:
    gpu, assumed = plan.machine.gpu, plan.assumptions
    return (
        f"assumes {gpu.peak_tflops:g} TFLOP/s, {gpu.bandwidth_gb_s:g} GB/s, ${gpu.usd_per_hour:g}/h per GPU, "
        f"utilization {assumed.utilisation:g}, {assumed.reserve_gib:g} GiB reserve, "
        f"{100 * assumed.power_share:.0f}% of {gpu.power_w:g} W, ${assumed.usd_per_kwh:g}/kWh, {_captions(plan)}"
    )


def _captions(plan: Forecast) -> str:
    given = plan.recipe.dataset.caption_tokens
    if given is None:
        return "captions that fill the context"
    if isinstance(given, int | float):
        return f"captions of {given:g} tokens on average"
    return f"captions of {given[0]:g} to {given[-1]:g} tokens, median {caption_quantile(given, 0.5):.0f}"


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.3f}"


def _tera(value: float) -> str:
    return f"{value / 1e12:.3f}"


def gib(value: float) -> str:
    """Format bytes in GiB."""
    return f"{value / GIB:.2f}"


_TIME_ROWS: tuple[Row, ...] = (
    ("samples, 10^6", lambda s: f"{s.stage.samples / 1e6:.3f}", None),
    ("optimizer steps", lambda s: f"{s.stage.steps:,}", None),
    ("tokens, 10^9", lambda s: f"{s.tokens / 1e9:.1f}", None),
    ("FLOP, 10^18", lambda s: f"{s.total_flops / 1e18:.2f}", None),
    ("images/s", lambda s: f"{s.images_per_s:.1f}", None),
    ("hours", lambda s: _hours(s.hours), "hours"),
    ("GPU-hours", lambda s: _hours(s.device_hours), "device_hours"),
    ("rent, $", lambda s: f"{s.rent_usd:.2f}", "rent_usd"),
    ("energy, kWh", lambda s: f"{s.kwh:.1f}", "kwh"),
    ("or electricity, $", lambda s: f"{s.electricity_usd:.2f}", "electricity_usd"),
    ("read, MB/s", lambda s: f"{s.read_mb_s:.1f}", None),
    ("useful MFU of the network", lambda s: f"{100 * s.mfu:.1f}%", None),
    ("binds", lambda s: s.binds, None),
)
_WORK_ROWS: tuple[Row, ...] = (
    ("image + text tokens", lambda s: f"{s.image_tokens} + {s.text_tokens}", None),
    ("padding in the text", lambda s: f"{100 * s.padding_share:.0f}%", None),
    ("image tokens in the U", lambda s: f"{s.kept_tokens}", None),
    ("network, without padding, TFLOP", lambda s: _tera(s.useful_flops), None),
    ("network forward", lambda s: _tera(s.operations.forward), None),
    ("network backward", lambda s: _tera(s.operations.backward), None),
    ("recompute", lambda s: _tera(s.operations.recompute), None),
    ("autoencoder", lambda s: _tera(s.operations.autoencoder), None),
    ("text encoder", lambda s: _tera(s.operations.text), None),
    ("total", lambda s: _tera(s.operations.total), None),
)
_CHECKPOINTING = {False: "no", True: "yes", "selective": "selective"}
_EITHER_WAY = "  plain / checkpointed"


def _memory_rows(plan: Forecast) -> tuple[Row, ...]:
    copies = "gathered weights" if plan.recipe.sharded else "half-precision weights"
    encoding = "and while encoding" if plan.recipe.overlapped else "or while encoding"
    return (
        ("micro-batch", lambda s: f"{s.stage.micro_batch_size}", None),
        ("with checkpointing", lambda s: _CHECKPOINTING[s.stage.checkpointing], None),
        ("weights + gradients, GiB", lambda s: gib(s.memory.weights + s.memory.gradients), None),
        ("optimizer + averages", lambda s: gib(s.memory.optimizer + s.memory.averages), None),
        (copies, lambda s: gib(s.memory.half_copies), None),
        ("encoders", lambda s: gib(s.memory.encoders), None),
        ("activations", lambda s: gib(s.memory.activations), None),
        (_EITHER_WAY, lambda s: f"{gib(s.activations_plain)} / {gib(s.activations_checkpointed)}", None),
        (encoding, lambda s: gib(s.memory.encoding), None),
        ("peak", lambda s: gib(s.memory.total) + ("" if s.fits else " !"), None),
        ("largest micro-batch", lambda s: f"{s.largest_micro_batch}", None),
        (_EITHER_WAY, lambda s: f"{s.largest_plain} / {s.largest_checkpointed}", None),
    )
