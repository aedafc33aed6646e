"""`hdm-bench data`: how fast one core decodes images, and how fast a loader yields samples from shards."""

import argparse
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hdm_lightning.benchmarks.machine import describe_machine
from hdm_lightning.benchmarks.timing import Timing
from hdm_lightning.cli.bench_part import check_counts, duration
from hdm_lightning.data.benchmark import DecodingSpeed, LoadingSpeed, measure_decoding, measure_loading
from hdm_lightning.data.config import Source, StreamConfig
from hdm_lightning.whole_files import write_json

_CONTEXT = 256


def bench_data(given: argparse.Namespace) -> dict[str, Any]:
    """Time decoding on one core at each resolution; with shards, also their loading."""
    check_counts(given)
    decoding = [measure_decoding(side, repeats=given.repeats) for side in given.resolution]
    loading = [] if given.shards is None else [_loading(given, side) for side in given.resolution]
    _print(decoding, loading)
    content = {
        "benchmark": "data",
        "machine": describe_machine(torch.device("cpu")),
        "settings": {"repeats": given.repeats, "batch": given.batch, "workers": given.workers},
        "decoding": [{**asdict(each), "over_plain": each.over_plain, "of_bound": each.of_bound} for each in decoding],
        "loading": [
            {"resolution": side, **asdict(speed), "samples_per_s_of_each_repeat": list(rates.seconds)}
            for side, speed, rates in loading
        ],
    }
    if given.out is not None:
        write_json(given.out, content)
    return content


def _loading(given: argparse.Namespace, resolution: int) -> tuple[int, LoadingSpeed, Timing]:
    """The repeat of median speed, and the speeds of all."""
    config = StreamConfig((Source((str(given.shards),)),), resolution, _CONTEXT, workers=given.workers)
    speeds = [
        measure_loading(config, _count_letters, batch_size=given.batch, batches=given.batches)
        for _ in range(given.repeats)
    ]
    speeds.sort(key=lambda speed: speed.samples_per_s)
    return resolution, speeds[len(speeds) // 2], Timing(tuple(speed.samples_per_s for speed in speeds))


def _count_letters(caption: str) -> tuple[list[int], int]:
    """Stands for a tokenizer: a token per letter."""
    ids = [ord(letter) % 256 for letter in caption[:_CONTEXT]]
    return ids + [0] * (_CONTEXT - len(ids)), max(1, len(ids))


def _print(decoding: list[DecodingSpeed], loading: list[tuple[int, LoadingSpeed, Timing]]) -> None:
    table = Table(title="decoding on one core, images/s", title_justify="left")
    for column in ("resolution", "this pipeline", "plain pipeline", "bare decoder", "of the bare decoder"):
        table.add_column(column, justify="right")
    for each in decoding:
        cells = (f"{each.ours:.1f}", f"{each.plain:.1f}", f"{each.bound:.1f}", f"{100 * each.of_bound:.0f}%")
        table.add_row(str(each.resolution), *cells)
    console = Console()
    console.print(table)
    for side, speed, rates in loading:
        low, high = rates.quartiles
        console.print(
            f"loading at {side} px with {speed.workers} workers: {speed.samples_per_s:.1f} samples/s "
            f"(quartiles {low:.1f} … {high:.1f}), first batch after {duration(speed.first_batch_s)}"
        )
