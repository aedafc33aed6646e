"""Repeated timing with warm-up: medians, quartiles, alternating settings; results as rows, a table and JSON."""

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
    """Seconds of each repeat of a call."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Shortest seconds."""
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the seconds."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        first, third = self.quartiles
        return (third - first) / self.median

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        derived = {"median_s": self.median, "quartiles_s": list(self.quartiles), "spread": self.spread}
        return {**derived, "repeats": len(self.seconds), "seconds": list(self.seconds)}


class Comparison(NamedTuple):
    """Two alternating calls: median ratio of the rounds, second over first, with its 95% bootstrap interval."""

    ratio: float
    interval: tuple[float, float]
    second_faster: int
    rounds: int


def time_call(call: Call, device: torch.device, *, warmup: int = 2, repeats: int = 10) -> Timing:
    """Time a call `repeats` times after `warmup` calls, synchronizing the device before and after each."""
    (timing,) = time_in_turn({"": call}, device, warmup=warmup, repeats=repeats).values()
    return timing


def time_in_turn(
    calls: Mapping[str, Call], device: torch.device, *, warmup: int = 2, repeats: int = 10
) -> dict[str, Timing]:
    """Time several calls alternately, A B B A …, so that drift of the machine affects all alike.

    Raises:
        ValueError: `repeats` is below 1 or `warmup` below 0.
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
    """Compare the second with the first, round by round. Raises ValueError: the numbers of rounds differ."""
    ratios = [b / a for a, b in zip(first.seconds, second.seconds, strict=True)]
    found = Bootstrap(_RESAMPLES, seed).median(ratios)
    return Comparison(found.value, (found.low, found.high), sum(ratio < 1 for ratio in ratios), len(ratios))


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
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
    """Return a row of the JSON file for one timed call; values of 0 were not measured and are omitted.

    Args:
        name, timing: name of the call, and its repeats.
        samples, flops, model_flops: per call: images or captions, operations, those that MFU counts (without padding).
        peak_flops, peak_bytes: peak operations per second of the device, and peak bytes on it.
        values: further figures, with units in their names.
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
    """Return the content of the JSON file of the subcommand `part`.

    Args:
        machine, settings: see `system.describe_machine`, and the settings used.
        rows: rows from `measurement`; the first two are `compared` if two settings alternated.
        compared: their comparison.
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
    """Return a table with a row per measurement of a record, a note if MFU is lacking, and a comparison's result."""
    machine, compared = content["machine"], content.get("comparison")
    table = Table(title=str(machine.get("gpu", machine["cpu"])), title_justify="left")
    for column in ("", "median", "quartiles", "rate", "TFLOP/s", "useful MFU", "peak GiB"):
        table.add_column(column, justify="right" if column else "left")
    for row in content["results"]:
        table.add_row(*_cells(row))
    parts: list[RenderableType] = [table]
    if any("useful_tflop_per_s" in row and "mfu" not in row for row in content["results"]):
        parts.append(Text(f"no useful MFU: the peak rate of this GPU, {machine.get('gpu')}, is not known"))
    if compared is not None:
        low, high = compared["interval_95"]
        text = (
            f"{compared['of'][1]} takes {compared['time_ratio']:.3f} times as long as the first "
            f"(95% interval {low:.3f} … {high:.3f}; faster in {compared['second_faster']})"
        )
        parts.append(Text(text))
    return Group(*parts)


def duration(seconds: float) -> str:
    """Format seconds in a suitable unit."""
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
