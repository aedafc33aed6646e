"""One stage of a schedule as one Lightning fit: fresh trainer, logger and callbacks around the same network."""

import time
from typing import TYPE_CHECKING, Any

import hydra.utils
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.training import hardware, processes, run_folder
from hdm_lightning.training.apply import prepare_network
from hdm_lightning.training.averaging import ema_snapshots
from hdm_lightning.training.callbacks.averages import AverageWeights
from hdm_lightning.training.callbacks.checkpoints import SaveCheckpoints
from hdm_lightning.training.callbacks.ema_snapshots import StoreAverages
from hdm_lightning.training.callbacks.guard import GuardLoss, LossRewind
from hdm_lightning.training.callbacks.handover import CarryMoments
from hdm_lightning.training.callbacks.ledger import KeepLedger
from hdm_lightning.training.callbacks.pictures import DrawPictures
from hdm_lightning.training.callbacks.progress import ShowProgress
from hdm_lightning.training.callbacks.scalars import LogScalars
from hdm_lightning.training.callbacks.signals import StopOnSignal, StoppedBySignal
from hdm_lightning.training.callbacks.stops import StopStage
from hdm_lightning.training.callbacks.validation import ValidateFlow
from hdm_lightning.training.data_settings import build_datamodule
from hdm_lightning.training.flow_module import FlowMatchingModule
from hdm_lightning.training.monitoring.data_counts import DataCounts
from hdm_lightning.training.monitoring.tensorboard import flow_layout, stage_logger
from hdm_lightning.training.monitoring.throughput import stage_flops
from hdm_lightning.training.recovery.rewinds import StartPoint
from hdm_lightning.training.recovery.spikes import SpikeDetector
from hdm_lightning.training.sharded_strategy import ShardedStrategy
from hdm_lightning.training.sharding import is_sharded
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.static_graph import StaticGraphStrategy
from hdm_lightning.training.step_trainer import step_trainer

if TYPE_CHECKING:
    from hdm_lightning.data.datamodule import ShardDataModule
    from hdm_lightning.training.run import Run


def fit_stage(run: "Run", plan: StagePlan, start: StartPoint, previous: dict[str, Any] | None) -> None:
    """Train one stage to its end.

    Args:
        run: what the stages share; `run.network` holds the weights to start from where `start` is the beginning.
        plan: the stage.
        start: the checkpoint to go on from, or the stage's beginning.
        previous: the checkpoint of the stage before, for its optimizer's moments.
    """
    data = build_datamodule(run.settings, plan, consumed=start.consumed(plan.settings.batch_size))
    prepare_network(run.network, plan.settings, run.settings.trainer)
    module = FlowMatchingModule(
        run.network,
        run.encoders,
        plan,
        run.settings.optimizer,
        run.settings.logger,
        run.settings.seed,
        skipped=start.skipped,
        rewinds=start.rewinds,
        static_shapes=run.settings.trainer.compile,
    )
    callbacks = stage_callbacks(run, plan, data, previous)
    trainer = stage_trainer(run, plan, callbacks, first_step=start.step)
    ledger = next(callback for callback in callbacks if isinstance(callback, KeepLedger))
    begin = time.monotonic()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
        _finish(run, plan, trainer, module, callbacks, time.monotonic() - begin)
    except (LossRewind, StoppedBySignal) as end:
        ledger.note("rewind" if isinstance(end, LossRewind) else "stop", trainer, module, reason=str(end))
        raise


def stage_callbacks(
    run: "Run", plan: StagePlan, data: "ShardDataModule", previous: dict[str, Any] | None
) -> list[Callback]:
    """The stage's callbacks in the order in which they act after a step.

    What ends the stage early comes first, so that all others see that this step is the last one; then the guard, so
    that nothing uses weights that have gone wrong; then the averages, so that all that follows sees them. The scalars
    come before all that is no part of a step's time, the checkpoint after validation and pictures, so that a resumed
    run does not repeat them; the signal comes last.
    """
    settings, stage = run.settings, plan.settings
    save_every = plan.steps_for(stage.save_every)
    ledger = KeepLedger(run.ledger, plan, save_every, settings.trainer.usd_per_device_hour)
    counts = DataCounts(data.train_plan.samples, run.run_dir / run_folder.QUARANTINE)
    scalars = LogScalars(settings.logger.every_steps, counts, settings.trainer.peak_tflops)
    validation = ValidateFlow(data, run.averages, plan.steps_for(stage.validate_every), settings.validation)
    folder = run_folder.checkpoint_folder(run.run_dir, plan)
    guard = _guard(run, plan)
    save = SaveCheckpoints(folder, save_every, settings.callbacks.checkpoints, before=guard.look)
    callbacks: list[Callback] = [
        StopStage(stage.stop, ledger, validation, stage.batch_size),
        guard,
        AverageWeights(run.averages, stage.batch_size),
        scalars,
        _store_averages(run, plan),
        validation,
        DrawPictures(
            settings.callbacks.pictures,
            Tokenizer(settings.text_encoder.name).bind(stage.context_length),
            run.averages,
            plan.folder(run.run_dir) / "samples",
            plan.steps_for(stage.sample_every),
        ),
        save,
        ledger,
        StopOnSignal(save),
    ]
    if settings.schedule.carry_moments and previous is not None:
        callbacks.insert(0, CarryMoments(previous))
    if settings.callbacks.progress_bar and processes.rank() == 0:
        callbacks.insert(-1, ShowProgress(plan, _samples_after(run, plan), ledger, scalars))
    extra = [hydra.utils.instantiate(each) for each in settings.callbacks.extra.values()]
    return [*callbacks[:-1], *extra, callbacks[-1]]


def _samples_after(run: "Run", plan: StagePlan) -> float:
    """What the stages after this one cost, in samples of this stage, by the network's operations."""
    factor = run.encoders.autoencoder.factor
    costs = {each.number: stage_flops(run.network.config, each.settings, factor) for each in run.plans}
    later = [each for each in run.plans if each.number > plan.number]
    return sum(each.samples * costs[each.number] for each in later) / costs[plan.number]


def _guard(run: "Run", plan: StagePlan) -> GuardLoss:
    """Watches the loss, always before validation, pictures and checkpoints."""
    rules, stage = run.settings.guard, plan.settings
    detector = SpikeDetector(rules.spike_factor, rules.spike_steps, rules.warmup_steps)
    snapshots = run.settings.callbacks.ema.snapshot_every
    uses = (stage.validate_every, stage.sample_every, stage.save_every, snapshots)
    return GuardLoss(detector, [plan.steps_for(samples) for samples in uses])


def _store_averages(run: "Run", plan: StagePlan) -> StoreAverages:
    ema = run.settings.callbacks.ema
    dtype = torch.float16 if ema.snapshot_dtype == "float16" else torch.float32
    folder, every = run.run_dir / ema_snapshots.FOLDER, plan.steps_for(ema.snapshot_every)
    return StoreAverages(run.averages, folder, every, dtype, run.whitening)


def stage_trainer(run: "Run", plan: StagePlan, callbacks: list[Callback], first_step: int) -> Trainer:
    """The stage's trainer, its metrics beginning where the run stands."""
    settings, stage = run.settings, plan.settings
    layout = flow_layout(settings.logger.time_bins)
    first_sample = plan.samples_before + first_step * stage.batch_size
    return step_trainer(
        settings.trainer,
        plan.steps,
        callbacks,
        stage_logger(plan.folder(run.run_dir), run.config_text, first_sample, layout),
        strategy=_strategy(run),
        accumulate_grad_batches=plan.accumulation,
        gradient_clip_val=stage.gradient_clip or None,
    )


def _strategy(run: "Run") -> Any:
    if processes.world_size() == 1:
        return "auto"
    if is_sharded(run.network):
        return ShardedStrategy()
    hook = None
    if run.settings.trainer.compress_gradients and hardware.accelerator(run.settings.trainer) == "cuda":
        hook = bf16_compress_hook
    kind = StaticGraphStrategy if run.settings.trainer.static_graph else DDPStrategy
    return kind(gradient_as_bucket_view=True, ddp_comm_hook=hook)


def _finish(
    run: "Run", plan: StagePlan, trainer: Trainer, module: FlowMatchingModule, callbacks: list[Callback], seconds: float
) -> None:
    """Save the stage's end, note it, and mark the stage as done."""
    by_type = {type(callback): callback for callback in callbacks}
    stop, ledger, save = by_type[StopStage], by_type[KeepLedger], by_type[SaveCheckpoints]
    validation = by_type[ValidateFlow]
    assert isinstance(stop, StopStage) and isinstance(ledger, KeepLedger)
    assert isinstance(save, SaveCheckpoints) and isinstance(validation, ValidateFlow)
    save.save(trainer)
    ledger.note("end", trainer, module)
    if trainer.is_global_zero:
        summary = {
            "stage": plan.name,
            "steps": trainer.global_step,
            "samples": trainer.global_step * plan.settings.batch_size,
            "ended_by": stop.reason or "samples",
            "seconds_of_last_start": round(seconds, 1),
            "validation": validation.latest,
        }
        run_folder.mark_stage_done(run.run_dir, plan, summary)
    processes.barrier()
