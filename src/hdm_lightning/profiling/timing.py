"""Repeated timing with warm-up; medians and quartiles; two settings in turn."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

_RESAMPLES = 2000
_CONFIDENCE = 0.95


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
    """Time one call; the device is waited for before and after each repeat.

    Args:
        call: the work.
        device: where it runs.
        warmup: calls before the clock runs.
        repeats: timed calls, at least 1.
    """
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
    """The second against the first, round by round.

    Raises:
        ValueError: they have different numbers of rounds.
    """
    ratios = [b / a for a, b in zip(first.seconds, second.seconds, strict=True)]
    draw, count = random.Random(seed), len(ratios)
    medians = sorted(statistics.median(draw.choices(ratios, k=count)) for _ in range(_RESAMPLES))
    tail = int(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    interval = medians[tail], medians[-1 - tail]
    return Comparison(statistics.median(ratios), interval, sum(ratio < 1 for ratio in ratios), count)


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
