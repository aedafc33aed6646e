"""The benchmarks of `hdm-bench`: parts of a step, the machine's rates, and the bottleneck of a schedule on it."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hdm_lightning.cli.command import require_file, show_report
from hdm_lightning.cli.overrides import composed
from hdm_lightning.cli.plan_schedule import PlanResult, run_plan
from hdm_lightning.data.benchmark import SIZES, LoadingSpeed, benchmark_images, measure_decoding, measure_loading
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.errors import UserError
from hdm_lightning.precision import default_dtype, dtype_name
from hdm_lightning.profiling import system
from hdm_lightning.profiling.bench_settings import CaseSettings, DataSettings, RunSettings, SystemSettings
from hdm_lightning.profiling.cases import Setup, measured
from hdm_lightning.profiling.timing import Timing, compare, duration, measurement, record, report, time_in_turn
from hdm_lightning.training.recorded import recorded_values

_MATMUL = {"cuda": 8192, "cpu": system.CPU_MATMUL}
_MIB = {"cuda": 1024, "cpu": system.CPU_COPY_MIB}
_CONTEXT = 256
_DECODED_PX = 512
# The `text_encoder` preset that matches each model's context width.
_TEXT_ENCODERS = {
    "xut_small": "gemma3_270m",
    "xut_base": "qwen3_0.6b",
    "xut_large": "gemma3_1b",
    "xut_tiny": "minilm",
    "xut_demo": "minilm",
}


def bench_part(
    part: str,
    own: Sequence[str],
    run: RunSettings,
    first: CaseSettings,
    second: CaseSettings | None,
    against: str | None,
) -> None:
    """Time a part, or alternate between two settings of it; print and write the result.

    Args:
        part: a key of `bench_training.BUILDERS`.
        own: names of the part's settings.
        run, first, second: settings of the run and of the part, and the part's to compare with, if any.
        against: the change from `first` to `second` as the user typed it.
    """
    from hdm_lightning.cli.bench_training import BUILDERS  # noqa: PLC0415 (lightning and encoders take seconds)

    _prepare(run.threads, run.out)
    if second == first:
        hint = f"use a different value for one of {', '.join(own)}"
        raise UserError(f"{against!r} does not change the settings of {part}", where="--against", hint=hint)
    setups = {"": Setup.of(first)} if second is None else {"first": Setup.of(first), str(against): Setup.of(second)}
    cases = {label: BUILDERS[part](setup) for label, setup in setups.items()}
    setup = next(iter(setups.values()))
    calls = {label: case.call for label, case in cases.items()}
    timings = time_in_turn(calls, setup.device, warmup=run.warmup, repeats=run.repeats)
    rows = []
    for label, case in cases.items():
        others = [other for other in cases.values() if other is not case]
        rows.append(measured(case, timings[label], setups[label], label=label, beside=others))
    settings = {key: value for key, value in setup.to_json().items() if key in (*own, "device")}
    if against:
        settings["against"] = against
    compared = compare(*timings.values()) if second else None
    content = record(part, system.describe_machine(setup.device), settings, rows, compared)
    show_report(report(content), content, run.out)


def bench_data(settings: DataSettings) -> None:
    """Time decoding on one core at each resolution and, with shards, loading; print and write the result."""
    _prepare(0, settings.out)
    decoding = [measure_decoding(side, repeats=settings.repeats) for side in settings.resolution]
    loading = [_loading(settings, side) for side in settings.resolution] if settings.shards is not None else []
    content = {
        "benchmark": "data",
        "machine": system.describe_machine(torch.device("cpu")),
        "settings": {"repeats": settings.repeats, "batch": settings.batch, "workers": settings.workers},
        "decoding": [{**asdict(each), "over_plain": each.over_plain, "of_bound": each.of_bound} for each in decoding],
        "loading": [
            {"resolution": side, **asdict(speed), "samples_per_s_of_each_repeat": list(rates.seconds)}
            for side, speed, rates in loading
        ],
    }
    table = Table(title="decoding on one core, images/s", title_justify="left")
    for column in ("resolution", "this pipeline", "plain pipeline", "bare decoder", "of the bare decoder"):
        table.add_column(column, justify="right")
    for each in decoding:
        rates = (f"{rate:.1f}" for rate in (each.ours, each.plain, each.bound))
        table.add_row(str(each.resolution), *rates, f"{100 * each.of_bound:.0f}%")
    show_report(Group(table, *(Text(_line(*each)) for each in loading)), content, settings.out)


def _decoding_rate() -> dict[str, Any]:
    """Measure how fast one core decodes, resizes and crops, at a typical resolution."""
    speed = measure_decoding(_DECODED_PX, images=benchmark_images(len(SIZES)), repeats=3)
    megapixels = sum(height * width for height, width in SIZES) / len(SIZES) / 1e6
    rate = speed.ours * megapixels
    return measurement("decoding, one core", Timing((1 / speed.ours,)), mpx_per_s=rate, resolution=_DECODED_PX)


def _loading(settings: DataSettings, resolution: int) -> tuple[int, LoadingSpeed, Timing]:
    """Return the resolution, the repeat with median speed, and the speeds of all repeats."""
    config = StreamConfig((Source((str(settings.shards),)),), resolution, _CONTEXT, workers=settings.workers)
    speeds = [
        measure_loading(config, _count_letters, batch_size=settings.batch, batches=settings.batches)
        for _ in range(settings.repeats)
    ]
    speeds.sort(key=lambda speed: speed.samples_per_s)
    return resolution, speeds[len(speeds) // 2], Timing(tuple(speed.samples_per_s for speed in speeds))


def _count_letters(caption: str) -> tuple[list[int], int]:
    """Stand-in for a tokenizer: one token per letter."""
    ids = [ord(letter) % 256 for letter in caption[:_CONTEXT]]
    return ids + [0] * (_CONTEXT - len(ids)), max(1, len(ids))


def _line(side: int, speed: LoadingSpeed, rates: Timing) -> str:
    low, high = rates.quartiles
    return (
        f"loading at {side} px with {speed.workers} workers: {speed.samples_per_s:.1f} samples/s "
        f"(quartiles {low:.1f} … {high:.1f}), first batch after {duration(speed.first_batch_s)}"
    )


def bench_system(settings: SystemSettings) -> None:
    """Measure the machine's rates; print them and write them if asked to."""
    _prepare(settings.threads, settings.out)
    if not settings.disk.is_dir():
        what = f"there is no folder {str(settings.disk)!r}"
        raise UserError(what, where="--disk", hint="use an existing folder")
    device = system.chosen_device(settings.device)
    if settings.schedule:
        _check_schedule(settings, device)
    matmul, mib = settings.matmul or _MATMUL[device.type], settings.mib or _MIB[device.type]
    rows = [*system.machine_rates(settings, device, matmul, mib)]
    if settings.schedule:
        rows.append(_decoding_rate())
    shown = {"matmul": matmul, "mib": mib, "repeats": settings.repeats}
    content = record("system", system.describe_machine(device), shown, rows)
    lines = [report(content)]
    if settings.schedule:
        binding = _binding(settings, {row["name"]: row for row in rows}, device)
        content[f"schedule {settings.schedule}"] = binding
        for name, stage in binding.items():
            line = f"{settings.schedule}, {name}: limited by {stage['binds']}, {stage['images_per_s']:.2f} images/s"
            lines.append(Text(line))
    show_report(Group(*lines), content, settings.out)


def _prepare(threads: int, out: Path | None) -> None:
    if out is not None:
        require_file(out, "--out")
    if threads:
        torch.set_num_threads(threads)


def _check_schedule(settings: SystemSettings, device: torch.device) -> None:
    """Plan once on an arbitrary GPU, to report a mistake in the schedule before minutes of measuring."""
    if device.type == "cpu" and torch.cuda.is_available():
        raise UserError(
            "a schedule is planned for this machine's GPUs, but the CPU is to be measured",
            where="--device",
            hint="omit --device or --schedule",
        )
    try:
        _planned([*_chosen(settings), f"gpus={max(1, torch.cuda.device_count())}x5090"])
    except HydraException as error:
        what, where = " ".join(str(error).split()), "--schedule, --model, --text-encoder"
        raise UserError(what, where=where, hint="choose existing presets") from error


def _chosen(settings: SystemSettings) -> list[str]:
    text = settings.text_encoder or _TEXT_ENCODERS.get(settings.model, _TEXT_ENCODERS["xut_base"])
    return [f"schedule={settings.schedule}", f"model={settings.model}", f"text_encoder={text}"]


def _planned(overrides: list[str]) -> PlanResult:
    return run_plan(recorded_values(composed("plan", overrides)))


def _binding(
    settings: SystemSettings, measured: dict[str, dict[str, Any]], device: torch.device
) -> dict[str, dict[str, Any]]:
    """Return the bottleneck of each stage of the schedule, at this machine's measured rates."""
    half = dtype_name(default_dtype(device))
    overrides = [
        *_chosen(settings),
        "gpus=here",
        f"gpu.peak_tflops={measured[f'matmul {half}']['tflop_per_s']}",
        f"gpu.bandwidth_gb_s={measured['memory copy']['gb_per_s']}",
        f"host.disk_mb_s={measured['disk read']['mb_per_s']}",
        f"host.cores={os.cpu_count()}",
        f"host.decode_mpx_per_core_s={measured['decoding, one core']['mpx_per_s']}",
    ]
    if "all-reduce" in measured:
        overrides.append(f"gpu.link_gb_s={measured['all-reduce']['bus_gb_per_s']}")
    stages = _planned(overrides).content["stages"]
    return {each["stage"]["name"]: {key: each[key] for key in ("binds", "hours", "images_per_s")} for each in stages}
