"""Image rates of this machine: decoding on one core, loading from shards."""

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hdm_lightning.data.benchmark import SIZES, LoadingSpeed, benchmark_images, measure_decoding, measure_loading
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.profiling.bench_settings import DataSettings
from hdm_lightning.profiling.system import describe_machine
from hdm_lightning.profiling.timing import Timing, duration, measurement

_CONTEXT = 256
_DECODED_PX = 512


def measure_data(settings: DataSettings) -> tuple[dict[str, Any], RenderableType]:
    """Time decoding on one core at each resolution and, with shards, loading; return JSON content and a report."""
    decoding = [measure_decoding(side, repeats=settings.repeats) for side in settings.resolution]
    loading = [_loading(settings, side) for side in settings.resolution] if settings.shards is not None else []
    content = {
        "benchmark": "data",
        "machine": describe_machine(torch.device("cpu")),
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
    return content, Group(table, *(Text(_line(*each)) for each in loading))


def decoding_rate() -> dict[str, Any]:
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
