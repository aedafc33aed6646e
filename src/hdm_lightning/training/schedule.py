"""A schedule of stages inside one process: one Lightning fit after another, each from what the one before left."""

import gc
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig
from torch import nn

from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line
from hdm_lightning.training import hardware, run_folder
from hdm_lightning.training.callbacks.loss_guard import LossRewind
from hdm_lightning.training.callbacks.stage_checkpoint import StageCheckpoint
from hdm_lightning.training.callbacks.stop_on_signal import stop_if_asked
from hdm_lightning.training.callbacks.weight_averages import WeightAverages, averages_state
from hdm_lightning.training.checkpoint_io import network_weights, read_checkpoint
from hdm_lightning.training.composition import build
from hdm_lightning.training.recipe import Recipe, with_stage
from hdm_lightning.training.record import recorded_text
from hdm_lightning.training.rewind import (
    RECORD,
    StartPoint,
    read_rewinds,
    remove_superseded,
    skip_window,
    start_point,
    write_rewind,
)
from hdm_lightning.training.stage_parts import stage_callbacks, stage_loggers, stage_trainer
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.strategies import processes
from hdm_lightning.training.strategies.sharded_tensors import load_weights
from hdm_lightning.whole_files import write_json, write_text


@dataclass
class Run:
    """What the stages of a run have in common.

    Attributes:
        config: the composed configuration, interpolations of `stage` included.
        recipe: the kind of training.
        plans: the stages.
        run_dir: the run's folder.
        rewinds: how often a stage may go back.
        carry_moments: whether a stage begins with the optimizer's moments of the one before.
        network: what is trained; on the CPU between stages, a sharded one on its devices.
        parts: what else the recipe has built.
    """

    config: DictConfig
    recipe: Recipe
    plans: list[StagePlan]
    run_dir: Path
    rewinds: int
    carry_moments: bool
    network: nn.Module = field(init=False)
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_trial(self) -> bool:
        """Whether this is a `fast_dev_run`, which leaves nothing behind."""
        return bool(self.config.trainer.get("fast_dev_run"))


def run_schedule(run: Run) -> None:
    """Run every stage that is not done yet, then export."""
    if run.is_trial:
        for plan in run.plans:
            fit_stage(run, plan)
        return
    find = partial(run_folder.next_stage, run.run_dir, run.plans)
    while (pending := processes.decided_by_first(find)) is not None:
        describe(run)
        fit_stage(run, pending)
    end = run_folder.stage_end(run.run_dir, run.plans[-1])
    assert end is not None
    run.recipe.export(run, end)
    processes.barrier()


def describe(run: Run) -> None:
    """Write the configuration and the environment that the run trains with; the first process works."""
    if processes.rank() == 0:
        write_text(run.run_dir / run_folder.CONFIG, recorded_text(run.config))
        write_json(run.run_dir / run_folder.ENVIRONMENT, hardware.environment())


def fit_stage(run: Run, plan: StagePlan) -> None:
    """Train one stage to its end, going back as often as `guard.rewinds` allows.

    Raises:
        StoppedBySignal: on every process, when one was asked to stop.
        UserError: on every process, when the loss goes wrong once more than allowed, or no checkpoint is intact.
    """
    while True:
        start = processes.decided_by_first(partial(begin, run, plan))
        before = _before(run, plan) if start.checkpoint is None else None
        data, module, trainer = prepare_fit(run, plan, start, before)
        stop_if_asked("between two stages")
        began = time.monotonic()
        try:
            trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
        except LossRewind as hit:  # kept without the frames that hold on to its trainer
            hit.__context__ = None
            gone_wrong = hit.with_traceback(None)
        else:
            report_profile(trainer)
            _finish(run, plan, trainer, module, time.monotonic() - began)
            return
        del data, module, trainer, before
        gc.collect()  # the trainer that failed, its optimizer and its data workers, before the next is built
        rewind(run, plan, gone_wrong)


def report_profile(trainer: Trainer) -> None:
    """Print what a profiler (`trainer.profiler=simple`) has found: Lightning's own messages are kept off the screen."""
    summary = trainer.profiler.summary()  # type: ignore[attr-defined]
    if summary and trainer.is_global_zero:
        print(summary, flush=True)


def begin(run: Run, plan: StagePlan) -> StartPoint:
    """Where the next fit begins; what a rewind has superseded is cleared away."""
    checkpoints = run_folder.checkpoint_folder(run.run_dir, plan)
    start = start_point(checkpoints, read_rewinds(plan.folder(run.run_dir)))
    if not run.is_trial:
        remove_superseded(checkpoints, start)
    return start


def _before(run: Run, plan: StagePlan) -> dict[str, Any] | None:
    """The last checkpoint of the stage before; the network has its weights then, else those that the run begins with.

    A stage always starts from the file, also when the last stage ran in the same process, so that an interrupted
    schedule and an uninterrupted one take the same way.
    """
    if plan.number == 1 or run.is_trial:
        run.recipe.begin(run)
        return None
    path = run_folder.stage_end(run.run_dir, run.plans[plan.number - 2])
    assert path is not None
    return hand_over(read_checkpoint(path, lazily=True), run.network)


def hand_over(checkpoint: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """Give the network the weights of a checkpoint; returns the checkpoint."""
    load_weights(network, network_weights(checkpoint))
    return checkpoint


def prepare_fit(
    run: Run, plan: StagePlan, start: StartPoint, before: dict[str, Any] | None
) -> tuple[LightningDataModule, LightningModule, Trainer]:
    """Data, module and trainer of one fit, all new around the run's network.

    Args:
        run: what the stages share.
        plan: the stage.
        start: the checkpoint to resume from, or the stage's beginning.
        before: the last checkpoint of the stage before, where the stage is at its beginning.
    """
    sample = plan.samples_before + start.step * plan.settings.batch_size
    config = with_stage(run.config, plan, **run.recipe.values(run, plan), next_sample=sample + 1)
    data = build(config, "data", **run.recipe.data_arguments(run))
    data.skip_to(start.consumed(plan.settings.batch_size))
    optimizer, schedule = build(config, "optimizer"), build(config, "lr_scheduler")
    parts = run.recipe.module_arguments(run, plan)
    module = build(config, "module", optimizer=optimizer, lr_scheduler=schedule, **parts)
    callbacks = stage_callbacks(run, config, start, before)
    averages = next((each for each in callbacks if isinstance(each, WeightAverages)), None)
    saved = None if before is None else averages_state(before)
    if averages is not None and saved is not None:
        averages.load_state_dict(saved)
    loggers = stage_loggers(run, config, module, plan, fresh=start.step == 0)
    return data, module, stage_trainer(run, config, callbacks, loggers)


def _finish(run: Run, plan: StagePlan, trainer: Trainer, module: LightningModule, seconds: float) -> None:
    """Note the stage's end, once its last checkpoint is there."""
    if run.is_trial:
        return
    save = next(each for each in trainer.checkpoint_callbacks if isinstance(each, StageCheckpoint))
    path = save.save(trainer) if trainer.global_step else None
    if trainer.is_global_zero and path is not None:
        reasons = (getattr(each, "reason", None) for each in trainer.callbacks)  # type: ignore[attr-defined]
        ended = next((reason for reason in reasons if reason), None)
        early = "another callback" if trainer.global_step < trainer.max_steps else "samples"
        summary = {
            "stage": plan.name,
            "steps": trainer.global_step,
            "samples": trainer.global_step * plan.settings.batch_size,
            "ended_by": ended or early,
            "seconds_of_last_start": round(seconds, 1),
            **run.recipe.summary(trainer),
        }
        run_folder.mark_stage_done(run.run_dir, plan, summary)
    processes.barrier()


def rewind(run: Run, plan: StagePlan, hit: LossRewind) -> None:
    """Write down what is to be skipped, so that this process and any later one starts accordingly.

    Raises:
        UserError: on every process, when the stage has gone back as often as it may.
    """
    folder, allowed = plan.folder(run.run_dir), run.rewinds
    rewinds = processes.from_first(read_rewinds(folder))
    if len(rewinds) >= allowed:
        raise UserError(
            f"{hit}, after {allowed} rewind(s) of stage {plan.name}",
            where=str(folder / RECORD),
            hint=f"look at the samples named here and there, lower {plan.written_at}.learning_rate or gradient_clip, "
            "or raise guard.rewinds; the same command goes on from the last good checkpoint",
        )
    if processes.rank() == 0:
        checkpoints = run_folder.checkpoint_folder(run.run_dir, plan)
        begun, back = start_point(checkpoints, rewinds), start_point(checkpoints, rewinds, calm=True)
        line = skip_window(hit, begun, back, plan.settings.batch_size)
        write_rewind(folder, line)
        print(
            f"{plan.name}: {in_one_line(line.reason)}; going back to step {back.step} and skipping samples "
            f"{line.first} to {line.end - 1} (rewind {len(rewinds) + 1} of {allowed}, keys in {folder / RECORD})",
            flush=True,
        )
    processes.barrier()
