"""A callback that records every sample that a process has trained on, and its peak memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

PEAK_EVERY = 50


class SeenSamples(Callback):
    """Writes a line per micro-batch to `seen-RANK.jsonl`: stage, positions, names, which counted, at times memory.

    Args:
        folder: an existing folder.
        stage: its name.
    """

    def __init__(self, folder: str, stage: str) -> None:
        self.folder, self.stage = Path(folder), stage

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the line."""
        line: dict[str, Any] = {"stage": self.stage, "index": batch["index"].tolist(), "keys": batch["keys"]}
        line["good"] = [bool(each) for each in batch["weight"].tolist()]
        if batch_idx % PEAK_EVERY == 0:
            line["peak_mb"] = peak_mb("self")
            line["workers_peak_mb"] = [peak_mb(each) for each in _children()]
        with (self.folder / f"seen-{trainer.global_rank}.jsonl").open("a") as file:
            file.write("\n" + json.dumps(line))  # a killed process may have left half a line


def peak_mb(process: str) -> float:
    """Return the peak memory of a process, in MB (Linux)."""
    status = Path(f"/proc/{process}/status").read_text()
    return round(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1000, 1)


def _children() -> Iterator[str]:
    for task in Path("/proc/self/task").iterdir():
        yield from (task / "children").read_text().split()


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return all recorded lines, without incomplete ones."""
    found = []
    for path in sorted(folder.glob("seen-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                found.append({**json.loads(line), "rank": path.stem[5:]})
            except ValueError:
                continue
    return found
