"""`hdm-bench vae|text|xut|step|sample`: time one part, or two settings of it in turn."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hdm_lightning.benchmarks.cases import Case, peak_bytes
from hdm_lightning.benchmarks.machine import describe_machine
from hdm_lightning.benchmarks.record import Measurement, Record
from hdm_lightning.benchmarks.settings import CaseSettings
from hdm_lightning.benchmarks.system import matmul
from hdm_lightning.benchmarks.timing import Timing, compare, time_in_turn
from hdm_lightning.cli.bench_cases import BUILDERS
from hdm_lightning.errors import UserError
from hdm_lightning.planning.gpus import find_gpu

_CPU_MATMUL = 1536


def bench_part(given: argparse.Namespace) -> Record:
    """Time the case of the command line, print the result and write it."""
    check_counts(given)
    if given.threads:
        torch.set_num_threads(given.threads)
    own = {field.name for field in fields(CaseSettings)}
    first = CaseSettings(**{key: value for key, value in vars(given).items() if key in own}).checked()
    chosen = {"settings": first}
    if given.against:
        chosen = {"first": first, given.against: _changed(first, given)}
    cases = {name: BUILDERS[given.part](settings) for name, settings in chosen.items()}
    timings = time_in_turn(
        {name: case.call for name, case in cases.items()},
        first.torch_device,
        warmup=given.warmup,
        repeats=given.repeats,
    )
    measured = [_measurement(cases, timings[name], settings, name) for name, settings in chosen.items()]
    record = Record(
        given.part,
        describe_machine(first.torch_device),
        {key: value for key, value in first.to_json().items() if key in vars(given)}
        | ({"against": given.against} if given.against else {}),
        tuple(measured),
        compare(*timings.values()) if given.against else None,
    )
    print_record(record)
    if given.out is not None:
        record.write(given.out)
    return record


def _changed(first: CaseSettings, given: argparse.Namespace) -> CaseSettings:
    """The second setting of a comparison.

    Raises:
        UserError: it changes nothing that the part has, or the device, which the clock waits for.
    """
    changed = first.changed(given.against)
    own = [entry.name for entry in fields(CaseSettings) if hasattr(given, entry.name) and entry.name != "device"]
    if not any(getattr(changed, name) != getattr(first, name) for name in own) or changed.device != first.device:
        raise UserError(
            f"{given.against!r} makes no second setting of {given.part}",
            where="--against",
            hint=f"give another value of one of {', '.join(own)}",
        )
    return changed


def check_counts(given: argparse.Namespace) -> None:
    """Raise UserError for repeats, warm-ups and other counts that cannot be."""
    at_least_one = ("repeats", "batch", "batches")
    for name in (*at_least_one, "warmup", "threads", "workers", "matmul", "mib", "processes"):
        least = 1 if name in at_least_one else 0
        if getattr(given, name, least) < least:
            raise UserError(f"{getattr(given, name)} is less than {least}", where=f"--{name}", hint=f"give {least}")


def print_record(record: Record) -> None:
    """A line per measurement, and what came of a comparison."""
    table = Table(title=f"{record.machine.get('gpu', record.machine['cpu'])}", title_justify="left")
    columns = ("", "median", "quartiles", "rate", "TFLOP/s", "MFU", "peak GiB")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for measurement in record.measurements:
        row = measurement.to_json()
        low, high = row["quartiles_s"]
        table.add_row(
            row["name"],
            duration(row["median_s"]),
            f"{duration(low)} … {duration(high)}",
            _rate(row),
            f"{row['tflop_per_s']:.3f}" if "tflop_per_s" in row else "",
            f"{100 * row['mfu']:.1f}%" if "mfu" in row else "",
            f"{row['peak_memory_gib']:.3g}" if "peak_memory_gib" in row else "",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if record.comparison is not None:
        seen = record.comparison
        low, high = seen.interval
        console.print(
            f"{record.measurements[1].name} takes {seen.ratio:.3f} of the first's time "
            f"(95% interval {low:.3f} … {high:.3f}; less in {seen.second_faster} of {seen.rounds} rounds)"
        )


def _rate(row: Mapping[str, Any]) -> str:
    for key, unit in (
        ("samples_per_s", "samples/s"),
        ("gb_per_s", "GB/s"),
        ("bus_gb_per_s", "GB/s bus"),
        ("mb_per_s", "MB/s"),
    ):
        if key in row:
            return f"{row[key]:.4g} {unit}"
    return ""


def duration(seconds: float) -> str:
    """Seconds in a unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _measurement(cases: Mapping[str, Case], timing: Timing, settings: CaseSettings, label: str) -> Measurement:
    case = cases[label]
    others = [other for other in cases.values() if other is not case]
    name = case.name if label == "settings" else f"{case.name}, {label}"
    return Measurement(
        name,
        timing,
        samples=case.samples,
        flops=case.flops,
        model_flops=case.model_flops,
        peak_flops=_peak_flops(settings),
        values=case.values(),
        peak_bytes=peak_bytes(case, settings, beside=others),
    )


def _peak_flops(settings: CaseSettings) -> float:
    """The data sheet's rate of a GPU that the table has; of a CPU what a large matrix product reaches."""
    device = settings.torch_device
    if device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name(device))
        return 0.0 if gpu is None else gpu.peak_tflops * 1e12
    timing, _ = matmul(device, settings.torch_dtype, _CPU_MATMUL, repeats=5)
    return 2 * _CPU_MATMUL**3 / timing.best
