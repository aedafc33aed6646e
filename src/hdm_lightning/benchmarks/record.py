"""One benchmark's result: what ran, where, how fast; written as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdm_lightning.benchmarks.timing import Comparison, Timing
from hdm_lightning.whole_files import write_json


@dataclass(frozen=True)
class Measurement:
    """One thing that was timed.

    Attributes:
        name: what.
        timing: its repeats.
        samples: images or captions of one call; 0 where there are none.
        flops: operations of one call; 0 where they are not counted.
        model_flops: those of them that MFU counts.
        peak_flops: what the device could do in a second; 0 if not known.
        peak_bytes: most bytes alive on the device; 0 if not measured.
        values: further figures with their units in their names.
    """

    name: str
    timing: Timing
    samples: int = 0
    flops: float = 0.0
    model_flops: float = 0.0
    peak_flops: float = 0.0
    peak_bytes: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what was not measured is left out."""
        result: dict[str, Any] = {"name": self.name, **self.timing.to_json()}
        if self.samples:
            result |= {"samples": self.samples, "samples_per_s": self.samples / self.timing.median}
        if self.flops:
            result |= {"flop": self.flops, "tflop_per_s": self.flops / self.timing.median / 1e12}
        if self.model_flops and self.peak_flops:
            result["mfu"] = self.model_flops / self.timing.median / self.peak_flops
        if self.peak_bytes:
            result["peak_memory_gib"] = self.peak_bytes / 2**30
        return {**result, **self.values}


@dataclass(frozen=True)
class Record:
    """What one command measured.

    Attributes:
        part: the sub-command.
        machine: from `machine.describe_machine`.
        settings: what was run.
        measurements: in order.
        comparison: of the first two measurements, where two settings ran in turn.
        findings: what follows from the measurements.
    """

    part: str
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    measurements: tuple[Measurement, ...]
    comparison: Comparison | None = None
    findings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        result: dict[str, Any] = {
            "benchmark": self.part,
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "results": [measurement.to_json() for measurement in self.measurements],
        }
        if self.comparison is not None:
            compared = self.comparison
            result["comparison"] = {
                "of": [measurement.name for measurement in self.measurements[:2]],
                "time_ratio": compared.ratio,
                "interval_95": list(compared.interval),
                "second_faster": f"{compared.second_faster} of {compared.rounds} rounds",
            }
        return {**result, **self.findings}

    def write(self, file: Path) -> None:
        """Write the JSON file, whole or not at all."""
        write_json(file, self.to_json())
