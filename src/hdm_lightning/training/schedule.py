"""A run in one process: build data, module, callbacks and trainer of each stage, fit it, and export at the end."""

import gc
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf
from torch import nn

from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line
from hdm_lightning.training import hardware, run_folder
from hdm_lightning.training.announcements import announce_end, announce_stage_end, announce_start
from hdm_lightning.training.callbacks.loss_guard import LossRewind
from hdm_lightning.training.callbacks.stage_checkpoint import StageCheckpoint
from hdm_lightning.training.callbacks.stop_on_signal import StoppedBySignal, stop_if_asked
from hdm_lightning.training.callbacks.throughput import restart_peak
from hdm_lightning.training.checkpoint_io import network_weights, read_checkpoint
from hdm_lightning.training.continued import asked_too_late, check_continued, without_effect
from hdm_lightning.training.hub_upload import reserve
from hdm_lightning.training.job import recipe_of
from hdm_lightning.training.modules.frozen_weights import put_back_frozen
from hdm_lightning.training.recorded import recorded_text
from hdm_lightning.training.rewind import (
    StartPoint,
    read_rewinds,
    remove_superseded,
    skip_window,
    start_point,
    write_rewind,
)
from hdm_lightning.training.run_log import say
from hdm_lightning.training.run_recipe import Run, group
from hdm_lightning.training.stage_parts import build_fit
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.stop_request import STOP
from hdm_lightning.training.strategies import processes
from hdm_lightning.training.strategies.sharded_tensors import load_weights
from hdm_lightning.training.worker import working
from hdm_lightning.whole_files import write_json, write_text


def run_schedule(order: dict[str, Any]) -> int:
    """Run one process: every stage that is not done yet, then the export; return the exit status.

    Args:
        order: `config`, the composed configuration as YAML with its interpolations.

    Raises:
        UserError: see `worker.working` and `fit_stage`.
    """
    config = OmegaConf.create(order["config"])
    try:
        with working(config):
            recipe = recipe_of(config)
            run = Run(config, recipe, recipe.plans(config, processes.world_size()), Path(config.run_dir))
            if not run.is_trial:
                processes.decided_by_first(partial(_prepare, run))
            run.network = recipe.build(run)
            for plan in pending_stages(run):
                fit_stage(run, plan)
            export(run)
    except StoppedBySignal:
        return STOP.status
    return 0


def _prepare(run: Run) -> None:
    """Check again, as another start may have used the folder meanwhile, and create the repository of the result."""
    run_folder.require_writable(run.run_dir, run.plans)
    check_continued(run.config, run.plans)
    reserve(group(run.config, run.recipe, "hub"))
    for late in asked_too_late(run.config, run.plans):
        say(f"warning: {late}")


def pending_stages(run: Run) -> Iterator[StagePlan]:
    """Yield each stage when it is its turn, the same on every process, skipping those that are done."""
    if run.is_trial:
        yield from run.plans
        return
    find = partial(run_folder.next_stage, run.run_dir, run.plans)
    pending = processes.decided_by_first(find)
    if pending is None and processes.rank() == 0 and run_folder.is_finished(run.run_dir):
        kept = run_folder.stage_end(run.run_dir, run.plans[-1]) is not None
        what = "is written again" if kept else "stays as it is, as its checkpoints are gone"
        say(
            f"{run.run_dir} is finished: there is nothing to train, {run_folder.FINAL}/ {what}. Another run "
            f"needs another name=; {run_folder.way_on(run.config, run.run_dir)} starts it from this result"
        )
        if late := without_effect(run.config, run.plans):
            say(f"warning: it was trained with other settings, and these have no effect any more: {', '.join(late)}")
    while pending is not None:
        describe(run)
        yield pending
        pending = processes.decided_by_first(find)


def export(run: Run) -> None:
    """Write the result; a trial run has none."""
    if run.is_trial:
        return
    end = run_folder.stage_end(run.run_dir, run.plans[-1])
    if end is not None and processes.rank() == 0:  # without an end its checkpoints were deleted after the export
        run.recipe.export(run, end)
        announce_end(run)
    processes.wait_for_first()


def describe(run: Run) -> None:
    """Write the configuration and the environment that the run trains with; only the first process writes."""
    if processes.rank() == 0:
        write_text(run.run_dir / run_folder.CONFIG, recorded_text(run.config))
        write_json(run.run_dir / run_folder.ENVIRONMENT, hardware.environment())


def fit_stage(run: Run, plan: StagePlan) -> None:
    """Train one stage to its end, rewinding as often as `guard.rewinds` allows.

    Raises:
        StoppedBySignal: on every process, if one was asked to stop.
        UserError: on every process, if the loss goes wrong more often than allowed, or no checkpoint is intact.
    """
    while True:
        start = processes.decided_by_first(partial(begin, run, plan))
        before = _before(run, plan) if start.checkpoint is None else None
        trainer, module, data = build_fit(run, plan, start, before)
        announce_start(run, plan, start, data)
        stop_if_asked("between two stages")
        gone_wrong: LossRewind | None = None
        began = time.monotonic()
        restart_peak(trainer.strategy.root_device)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
        except LossRewind as hit:  # kept without the frames that reference its trainer
            hit.__context__ = None
            gone_wrong = hit.with_traceback(None)
        else:
            report_profile(trainer)
            _finish(run, plan, trainer, module, time.monotonic() - began)
        del data, module, trainer, before
        gc.collect()  # this trainer, its optimizer, averages and data workers, before the next is built
        if gone_wrong is None:
            return
        rewind(run, plan, gone_wrong)


def report_profile(trainer: Trainer) -> None:
    """Print the results of a profiler (`trainer.profiler=simple`): Lightning's own messages are not shown."""
    summary = trainer.profiler.summary()  # type: ignore[attr-defined]
    if summary and trainer.is_global_zero:
        say(summary)


def begin(run: Run, plan: StagePlan) -> StartPoint:
    """Return where the next fit starts, and delete checkpoints that a rewind has superseded."""
    checkpoints = run_folder.checkpoint_folder(run.run_dir, plan)
    start = start_point(checkpoints, read_rewinds(plan.folder(run.run_dir)))
    remove_superseded(checkpoints, start)
    return start


def _before(run: Run, plan: StagePlan) -> dict[str, Any] | None:
    """Load the weights that a stage starts with; return the last checkpoint of the stage before, if there is one.

    A stage always starts from the file, even if the last stage ran in the same process, so that an interrupted schedule
    and an uninterrupted one do the same.
    """
    if plan.number == 1 or run.is_trial:
        run.recipe.begin(run)
        return None
    path = run_folder.stage_end(run.run_dir, run.plans[plan.number - 2])
    assert path is not None
    return hand_over(read_checkpoint(path, lazily=True), run.network)


def hand_over(checkpoint: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """Load a checkpoint's weights into the network, except frozen ones, and return the checkpoint."""
    put_back_frozen(checkpoint, network)
    load_weights(network, network_weights(checkpoint))
    return checkpoint


def _finish(run: Run, plan: StagePlan, trainer: Trainer, module: LightningModule, seconds: float) -> None:
    """Save the stage's last checkpoint and record its end."""
    if run.is_trial:
        return
    save = next(each for each in trainer.checkpoint_callbacks if isinstance(each, StageCheckpoint))
    path = save.save(trainer) if trainer.global_step else None
    if trainer.is_global_zero and path is not None:
        reasons = (getattr(each, "reason", None) for each in trainer.callbacks)  # type: ignore[attr-defined]
        ended = next((reason for reason in reasons if reason), None)
        summary = {
            "stage": plan.name,
            "steps": trainer.global_step,
            "samples": trainer.global_step * plan.settings.batch_size,
            "ended_by": ended or _ended_by(plan, trainer),
            "seconds_of_last_start": round(seconds, 1),
            **run.recipe.summary(trainer),
        }
        run_folder.mark_stage_done(run.run_dir, plan, summary)
        announce_stage_end(run, plan, summary)
        run.recipe.after_stage(run, plan, path)
    processes.wait_for_first()


def _ended_by(plan: StagePlan, trainer: Trainer) -> str:
    """Return what ended a stage if no callback gives a reason."""
    if trainer.global_step >= plan.steps:
        return "samples"
    return "trainer.max_steps" if trainer.global_step >= trainer.max_steps else "another callback"


def rewind(run: Run, plan: StagePlan, hit: LossRewind) -> None:
    """Record the samples to skip, so that this process and any later one starts accordingly.

    Raises:
        UserError: on every process, if the stage has rewound as often as it may.
    """
    folder, allowed = plan.folder(run.run_dir), group(run.config, run.recipe, "guard").rewinds
    record = folder / run_folder.REWINDS
    rewinds = processes.from_first(read_rewinds(folder))
    if len(rewinds) >= allowed:
        raise UserError(
            f"{hit}, after {allowed} rewind(s) of stage {plan.name}",
            where=str(record),
            hint=f"look at the samples named above and in the file, lower {plan.written_at}.learning_rate or "
            "gradient_clip, or raise guard.rewinds; the same command resumes from the last good checkpoint",
        )
    if processes.rank() == 0:
        checkpoints = run_folder.checkpoint_folder(run.run_dir, plan)
        begun, back = start_point(checkpoints, rewinds), start_point(checkpoints, rewinds, calm=True)
        line = skip_window(hit, begun, back, plan.settings.batch_size)
        write_rewind(folder, line)
        say(
            f"{plan.name}: {in_one_line(line.reason)}; going back to step {back.step} and skipping samples "
            f"{line.first} to {line.end - 1} (rewind {len(rewinds) + 1} of {allowed}, keys in {record})"
        )
    processes.barrier()
