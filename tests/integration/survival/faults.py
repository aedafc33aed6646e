"""What tests do to a training from within: poison samples, jump over samples, note what is trained on, die.

Installed in forked processes only, where nothing has to be put back.
"""

import io
import json
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hdm_lightning import whole_files
from hdm_lightning.data.loader import _Chunks
from hdm_lightning.training import run_folder, schedule, worker
from hdm_lightning.training.callbacks.stage_checkpoint import StageCheckpoint
from hdm_lightning.training.callbacks.weight_averages import WeightAverages
from hdm_lightning.training.modules.flow_module import FlowModule
from hdm_lightning.training.strategies.sharded_tensors import local_parts


def install(faults: dict[str, Any], rank: int) -> None:
    """Install each named fault with its arguments."""
    for name, arguments in faults.items():
        INSTALLERS[name](rank, **arguments)


def note_positions(rank: int, folder: str) -> None:
    """Write the positions of every training micro-batch into a file of this process."""
    original, fits = FlowModule.training_step, []
    path = Path(folder) / f"rank{rank}-{os.getpid()}.jsonl"

    def training_step(self: FlowModule, batch: dict[str, Any], batch_idx: int) -> Any:
        if self not in fits:
            fits.append(self)
        line = {
            "fit": fits.index(self),
            "stage": self.stage,
            "step": self.trainer.global_step + 1,
            "positions": batch["index"].tolist(),
        }
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return original(self, batch, batch_idx)

    FlowModule.training_step = training_step


def note_parts(rank: int, folder: str) -> None:
    """Write how many elements this process holds, before every optimizer step, into a file of its own."""
    original = FlowModule.on_before_optimizer_step

    def elements(tensors: Iterable[Any]) -> int:
        return sum(local.numel() for local in local_parts(tensors) if local.dim() > 0)

    def on_before_optimizer_step(self: FlowModule, optimizer: Any) -> None:
        averages = next(each.state for each in self.trainer.callbacks if isinstance(each, WeightAverages))
        held = {
            "weights": elements(self.parameters()),
            "gradients": elements(weight.grad for weight in self.parameters()),
            "moments": elements(each for state in optimizer.state.values() for each in state.values()),
            "averages": elements(each for shadow in averages.shadows for each in shadow),
        }
        Path(folder, f"rank{rank}.json").write_text(json.dumps(held))
        original(self, optimizer)

    FlowModule.on_before_optimizer_step = on_before_optimizer_step


def poison(rank: int, stage: str, positions: list[int], factor: float | None) -> None:
    """Make the noise of some positions of a stage NaN, or `factor` times too large."""
    original = FlowModule.with_draws

    def with_draws(self: FlowModule, batch: Any, *, validation: bool = False) -> dict[str, Any]:
        drawn = original(self, batch, validation=validation)
        if not validation and self.stage == stage:
            rows = torch.isin(batch["index"], torch.tensor(positions))
            drawn["noise"][rows] *= float("nan") if factor is None else factor
        return drawn

    FlowModule.with_draws = with_draws


def jump(rank: int, stage: str, first: int, end: int) -> None:
    """Leave out the positions from `first` to `end` of a stage's training stream, from the beginning on."""
    original = _Chunks._sample

    def sample(self: _Chunks, preparation: Any, row: int) -> Any:
        position = self.first + row * self.world
        if self.training and self.config.stage == stage and position >= first:
            row += (end - first) // self.world
        return original(self, preparation, row)

    _Chunks._sample = sample


def die(rank: int, at: str, nth: int, how: str, on: int | None) -> None:
    """End this process (or all of its group) at the n-th passing of a point; see `POINTS`.

    Args:
        rank: this process's rank.
        at: the point.
        nth: which passing, from 1, counted in this process.
        how: `kill` or `term`, of this process; `kill all` or `term all`, of its group.
        on: the rank that does it; None for all.
    """
    if on is not None and rank != on:
        return
    passed = Counter()

    def pass_by(point: str) -> None:
        passed[point] += 1
        if point == at and passed[point] == nth:
            number = signal.SIGKILL if how.startswith("kill") else signal.SIGTERM
            os.killpg(0, number) if how.endswith("all") else os.kill(os.getpid(), number)

    watch(pass_by)


def count_points(rank: int, path: str) -> None:
    """Write how often each point is passed, after every passing, into a file (rank 0)."""
    passed = Counter()

    def pass_by(point: str) -> None:
        passed[point] += 1
        Path(path).write_text(json.dumps(passed))

    if rank == 0:
        watch(pass_by)


def watch(pass_by: Callable[[str], None]) -> None:
    """Call `pass_by(point)` wherever the training passes a point."""
    wrap(_Chunks, "_sample", pass_by, before="data")
    wrap(FlowModule, "training_step", pass_by, before="forward", after="backward")
    wrap(FlowModule, "on_before_optimizer_step", pass_by, before="optimizer")
    wrap(FlowModule, "on_validation_start", pass_by, before="validation begins")
    wrap(FlowModule, "on_validation_end", pass_by, after="validation ends")
    wrap(FlowModule, "with_draws", pass_by, before="validation", only=lambda *_, validation=False: validation)
    halve_writes(pass_by)
    wrap(torch, "save", pass_by, after="written, not synced")
    checkpoint = lambda source, target: str(target).endswith(".ckpt")  # noqa: E731
    wrap(whole_files.os, "replace", pass_by, before="written, not in place", after="in place", only=checkpoint)
    wrap(schedule, "hand_over", pass_by, before="hand-over begins", after="hand-over ends")
    wrap(schedule, "write_rewind", pass_by, before="rewind not noted", after="rewind noted")
    wrap(run_folder, "mark_stage_done", pass_by, before="stage not marked", after="stage marked")
    wrap(schedule, "export", pass_by, before="export begins", after="export ends")


def wrap(
    owner: Any,
    name: str,
    pass_by: Callable[[str], None],
    before: str | None = None,
    after: str | None = None,
    only: Callable[..., bool] | None = None,
) -> None:
    """Let a function of a module or class pass by points before and after."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        counts = only is None or only(*arguments, **keywords)
        if before is not None and counts:
            pass_by(before)
        result = original(*arguments, **keywords)
        if after is not None and counts:
            pass_by(after)
        return result

    setattr(owner, name, wrapped)


def halve_writes(pass_by: Callable[[str], None]) -> None:
    """Pass by a point with the first half of a checkpoint written."""
    original = torch.save

    def save(checkpoint: Any, file: Any) -> None:
        buffer = io.BytesIO()
        original(checkpoint, buffer)
        content = buffer.getvalue()
        file.write(content[: len(content) // 2])
        file.flush()
        pass_by("half written")
        file.write(content[len(content) // 2 :])

    torch.save = save


def fill_disk(rank: int, at: int) -> None:
    """Let the `at`-th checkpoint hit a full disk half-way."""
    saves = Counter()

    def pass_by(point: str) -> None:
        saves[point] += 1
        if saves[point] == at:
            raise OSError(28, "No space left on device")

    halve_writes(pass_by)


def limit_files(rank: int, size: int) -> None:
    """Let no file grow beyond `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def lose_patience(rank: int, seconds: float) -> None:
    """Wait so long, and no longer, for another start that is at work in the folder."""
    worker.PATIENCE_S = seconds


def never_overdue(rank: int, on: int) -> None:
    """Stop the clock of a process that says when a checkpoint is overdue."""
    original = StageCheckpoint.__init__

    def begin(self: StageCheckpoint, *arguments: Any, **settings: Any) -> None:
        original(self, *arguments, **settings)
        self.every_s = 1e12

    if rank == on:
        StageCheckpoint.__init__ = begin


INSTALLERS = {
    "note_positions": note_positions,
    "note_parts": note_parts,
    "poison": poison,
    "jump": jump,
    "die": die,
    "count_points": count_points,
    "fill_disk": fill_disk,
    "limit_files": limit_files,
    "lose_patience": lose_patience,
    "never_overdue": never_overdue,
}
POINTS = (
    "data",
    "forward",
    "backward",
    "optimizer",
    "validation begins",
    "validation",
    "validation ends",
    "half written",
    "written, not synced",
    "written, not in place",
    "in place",
    "hand-over begins",
    "hand-over ends",
    "stage not marked",
    "stage marked",
    "export begins",
    "export ends",
)
