"""A stage that goes back to its last good checkpoint and skips samples when its loss goes wrong."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line
from hdm_lightning.training import processes, run_folder
from hdm_lightning.training.callbacks.guard import GUARD_KEY, LossRewind
from hdm_lightning.training.callbacks.signals import stop_between_fits
from hdm_lightning.training.handover import hand_over, read_checkpoint
from hdm_lightning.training.initial_weights import initial_network
from hdm_lightning.training.recovery.rewinds import (
    RECORD,
    Rewind,
    StartPoint,
    read_rewinds,
    remove_superseded,
    start_point,
    write_rewind,
)
from hdm_lightning.training.sharding import load_weights
from hdm_lightning.training.stage_fit import fit_stage
from hdm_lightning.training.stages import StagePlan

if TYPE_CHECKING:
    from hdm_lightning.training.run import Run


def train_stage(run: "Run", plan: StagePlan, previous: Callable[[], Path] | None) -> None:
    """Train one stage to its end, rewinding as often as `guard.rewinds` allows.

    Args:
        run: what the stages share.
        plan: the stage.
        previous: gives the last checkpoint of the stage before, asked only where this stage begins at its beginning;
            None for the first stage, whose weights `run.network` holds.

    Raises:
        StoppedBySignal: on every process, when one was asked to stop.
        UserError: on every process, when the loss goes wrong once more than allowed, or no checkpoint is intact.
    """
    hit: LossRewind | None = None
    while True:
        start = processes.decided_by_first(partial(_begin, run, plan))
        checkpoint = None
        if start.checkpoint is None and previous is not None:
            checkpoint = read_checkpoint(previous(), lazily=True)
            hand_over(checkpoint, run.network, run.averages)
        elif start.checkpoint is None and hit is not None:
            load_weights(run.network, initial_network(run.settings, run.whitening)[0].state_dict())
            run.averages.restart()
        stop_between_fits()
        hit = _fit(run, plan, start, checkpoint)
        if hit is None:
            return
        gc.collect()  # the trainer that failed, its optimizer and its data workers, before the next is built
        _rewind(run, plan, hit)


def _begin(run: "Run", plan: StagePlan) -> StartPoint:
    """Where the next fit begins; what a rewind has superseded is cleared away."""
    checkpoints = run_folder.checkpoint_folder(run.run_dir, plan)
    start = start_point(checkpoints, read_rewinds(plan.folder(run.run_dir)))
    remove_superseded(checkpoints, start)
    return start


def _fit(run: "Run", plan: StagePlan, start: StartPoint, checkpoint: dict[str, Any] | None) -> LossRewind | None:
    """The hit that ended the fit, without the frames that hold on to its trainer; None when the stage is done."""
    try:
        fit_stage(run, plan, start, checkpoint)
    except LossRewind as hit:
        hit.__context__ = None
        return hit.with_traceback(None)
    return None


def _rewind(run: "Run", plan: StagePlan, hit: LossRewind) -> None:
    """Write down what is to be skipped, so that this process and any later one starts accordingly."""
    folder, allowed = plan.folder(run.run_dir), run.settings.guard.rewinds
    rewinds = processes.from_first(read_rewinds(folder))
    if len(rewinds) >= allowed:
        raise _too_many(folder / RECORD, plan, hit, allowed)
    if processes.rank() == 0:
        checkpoints = run_folder.checkpoint_folder(run.run_dir, plan)
        begun, back = start_point(checkpoints, rewinds), start_point(checkpoints, rewinds, calm_by=GUARD_KEY)
        rewind = skip_window(hit, begun, back, plan.settings.batch_size)
        write_rewind(folder, rewind)
        print(
            f"{plan.name}: {in_one_line(rewind.reason)}; going back to step {back.step} and skipping samples "
            f"{rewind.first} to {rewind.end - 1} (rewind {len(rewinds) + 1} of {allowed}, keys in {folder / RECORD})",
            flush=True,
        )
    processes.barrier()


def skip_window(hit: LossRewind, begun: StartPoint, back: StartPoint, batch_size: int) -> Rewind:
    """The samples to skip: from the checkpoint gone back to, to the end of the step that went wrong.

    Args:
        hit: what went wrong.
        begun: the newest start of the stage; tells how much was skipped before the step that went wrong.
        back: the start to go back to.
        batch_size: samples of a step.
    """
    first, end = back.consumed(batch_size), hit.finding.step * batch_size + begun.skipped
    keys = [key for position, key in hit.samples if first <= position < end]
    return Rewind(
        reason=hit.finding.reason,
        step=hit.finding.step,
        checkpoint_step=back.step,
        first=first,
        end=end,
        skipped=end - back.step * batch_size,
        suspects=hit.suspects,
        keys=keys,
        keys_forgotten=end - first - len(keys),
    )


def _too_many(record: Path, plan: StagePlan, hit: LossRewind, allowed: int) -> UserError:
    return UserError(
        f"{hit}, after {allowed} rewind(s) of stage {plan.name}; suspect samples: {', '.join(hit.suspects)}",
        where=str(record),
        hint=f"look at the samples named here and there, lower schedule.stages.{plan.name}.learning_rate or "
        "gradient_clip, or raise guard.rewinds; the same command goes on from the last good checkpoint",
    )
