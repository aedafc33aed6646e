"""Repeated timing with warm-up: medians, quartiles, two settings in turn; results as rows, a table and JSON."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hdm_lightning.metrics.bootstrap import Bootstrap

_RATES = (("samples_per_s", "samples/s"), ("gb_per_s", "GB/s"), ("bus_gb_per_s", "GB/s bus"), ("mb_per_s", "MB/s"))

Call = Callable[[], Any]

_RESAMPLES = 2000


class Timing(NamedTuple):
    """Seconds of each repeat of one call."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The shortest."""
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the repeats took less than the first, a quarter more than the second."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median."""
        first, third = self.quartiles
        return (third - first) / self.median

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        derived = {"median_s": self.median, "quartiles_s": list(self.quartiles), "spread": self.spread}
        return {**derived, "repeats": len(self.seconds), "seconds": list(self.seconds)}


class Comparison(NamedTuple):
    """Two calls timed in turn: median of the rounds' ratios, second over first, and its bootstrap interval at 95%."""

    ratio: float
    interval: tuple[float, float]
    second_faster: int
    rounds: int


def time_call(call: Call, device: torch.device, *, warmup: int = 2, repeats: int = 10) -> Timing:
    """Time one call `repeats` times after `warmup` calls; the device is waited for before and after each repeat."""
    (timing,) = time_in_turn({"": call}, device, warmup=warmup, repeats=repeats).values()
    return timing


def time_in_turn(
    calls: Mapping[str, Call], device: torch.device, *, warmup: int = 2, repeats: int = 10
) -> dict[str, Timing]:
    """Time several calls in turn, A B B A …, so that what drifts on the machine meets all of them alike.

    Raises:
        ValueError: no repeats are asked for.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats, warmup: got {repeats}, {warmup}; expected at least 1 and 0")
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for number in range(repeats):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            seconds[name].append(_once(calls[name], device))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def compare(first: Timing, second: Timing, *, seed: int = 0) -> Comparison:
    """The second against the first, round by round. Raises ValueError: they have different numbers of rounds."""
    ratios = [b / a for a, b in zip(first.seconds, second.seconds, strict=True)]
    found = Bootstrap(_RESAMPLES, seed).median(ratios)
    return Comparison(found.value, (found.low, found.high), sum(ratio < 1 for ratio in ratios), len(ratios))


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _once(call: Call, device: torch.device) -> float:
    wait_for(device)
    begin = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - begin


def measurement(
    name: str,
    timing: Timing,
    *,
    samples: int = 0,
    flops: float = 0.0,
    model_flops: float = 0.0,
    peak_flops: float = 0.0,
    peak_bytes: int = 0,
    **values: Any,
) -> dict[str, Any]:
    """One thing that was timed, as it stands in the JSON file; what is 0 was not measured and is left out.

    Args:
        name, timing: what, and its repeats.
        samples: images or captions of one call.
        flops, model_flops: operations of one call, and those of them that MFU counts, padding left out.
        peak_flops: what the device could do in a second.
        peak_bytes: most bytes alive on the device.
        values: further figures with their units in their names.
    """
    row: dict[str, Any] = {"name": name, **timing.to_json()}
    if samples:
        row |= {"samples": samples, "samples_per_s": samples / timing.median}
    if flops:
        row |= {"flop": flops, "tflop_per_s": flops / timing.median / 1e12}
    if model_flops:
        row["useful_tflop_per_s"] = model_flops / timing.median / 1e12
    if model_flops and peak_flops:
        row["mfu"] = model_flops / timing.median / peak_flops
    if peak_bytes:
        row["peak_memory_gib"] = peak_bytes / 2**30
    return {**row, **values}


def record(
    part: str,
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    rows: list[dict[str, Any]],
    compared: Comparison | None = None,
) -> dict[str, Any]:
    """What one sub-command measured, as it stands in the JSON file.

    Args:
        part, machine, settings: the sub-command, where (see `system.describe_machine`), and what was run.
        rows: from `measurement`, in order.
        compared: the first two rows, where two settings ran in turn.
    """
    content: dict[str, Any] = {"benchmark": part, "machine": machine, "settings": settings, "results": rows}
    if compared is not None:
        content["comparison"] = {
            "of": [row["name"] for row in rows[:2]],
            "time_ratio": compared.ratio,
            "interval_95": list(compared.interval),
            "second_faster": f"{compared.second_faster} of {compared.rounds} rounds",
        }
    return content


def report(content: Mapping[str, Any]) -> RenderableType:
    """A line per measurement of a record, and what came of a comparison."""
    machine, compared = content["machine"], content.get("comparison")
    table = Table(title=str(machine.get("gpu", machine["cpu"])), title_justify="left")
    for column in ("", "median", "quartiles", "rate", "TFLOP/s", "useful MFU", "peak GiB"):
        table.add_column(column, justify="right" if column else "left")
    for row in content["results"]:
        table.add_row(*_cells(row))
    if compared is None:
        return table
    low, high = compared["interval_95"]
    text = (
        f"{compared['of'][1]} takes {compared['time_ratio']:.3f} of the first's time "
        f"(95% interval {low:.3f} … {high:.3f}; less in {compared['second_faster']})"
    )
    return Group(table, Text(text))


def duration(seconds: float) -> str:
    """Seconds in a unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _cells(row: Mapping[str, Any]) -> list[str]:
    quartiles = " … ".join(map(duration, row["quartiles_s"]))
    rate = next((f"{row[key]:.4g} {unit}" for key, unit in _RATES if key in row), "")
    tflops = f"{row['tflop_per_s']:.3f}" if "tflop_per_s" in row else ""
    mfu = f"{100 * row['mfu']:.1f}%" if "mfu" in row else ""
    peak = f"{row['peak_memory_gib']:.3g}" if "peak_memory_gib" in row else ""
    return [row["name"], duration(row["median_s"]), quartiles, rate, tflops, mfu, peak]
