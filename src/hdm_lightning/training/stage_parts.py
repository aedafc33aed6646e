"""Build data, module, callbacks, loggers and trainer of one fit around the run's network."""

from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from hdm_lightning.training import hardware, run_folder
from hdm_lightning.training.callbacks.ends import ValidateAtEnds
from hdm_lightning.training.callbacks.images import ReconstructionImages, SampleImages
from hdm_lightning.training.callbacks.keep_ledger import KeepLedger
from hdm_lightning.training.callbacks.stage_checkpoint import StageCheckpoint
from hdm_lightning.training.callbacks.stop_on_signal import StopOnSignal
from hdm_lightning.training.callbacks.usable_samples import UsableSamples
from hdm_lightning.training.callbacks.weight_averages import StoreAverages, WeightAverages, averages_state
from hdm_lightning.training.checkpoint_io import AtomicCheckpointIO
from hdm_lightning.training.composition import build, has_target, plain
from hdm_lightning.training.flow_run import folded
from hdm_lightning.training.loggers import on_sample_axis, write_page
from hdm_lightning.training.optimization.moments import CarryMoments
from hdm_lightning.training.recorded import recorded_text
from hdm_lightning.training.rewind import NoteRewinds, StartPoint
from hdm_lightning.training.run_recipe import Run, with_stage
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.strategies import processes
from hdm_lightning.training.strategies.own_strategies import ShardedStrategy, StaticGraphStrategy
from hdm_lightning.training.world import cluster_environment, local_world_size, nodes

LEAVING_FILES = (KeepLedger, StoreAverages, SampleImages, ReconstructionImages)


def build_fit(
    run: Run, plan: StagePlan, start: StartPoint, before: dict[str, Any] | None
) -> tuple[Trainer, LightningModule, LightningDataModule]:
    """Return the trainer of a fit, its module with optimizer and schedule, and the data at the first sample to consume.

    `before` is the last checkpoint of the stage before, if this stage is at its beginning.
    """
    sample = plan.samples_before + start.step * plan.settings.batch_size
    config = with_stage(run.config, plan, **run.recipe.values(run, plan), next_sample=sample + 1)
    data: Any = build(config, "data", **run.recipe.data_arguments(run))
    data.skip_to(start.consumed(plan.settings.batch_size))
    optimizer, schedule = build(config, "optimizer"), build(config, "lr_scheduler")
    parts = run.recipe.module_arguments(run, plan)
    module: LightningModule = build(config, "module", optimizer=optimizer, lr_scheduler=schedule, **parts)
    callbacks = _callbacks(run, config, start, before)
    return _trainer(run, config, callbacks, _loggers(run, config, module, plan, start)), module, data


def _callbacks(run: Run, config: DictConfig, start: StartPoint, before: dict[str, Any] | None) -> list[Callback]:
    """Return the configured callbacks in their order, between those that every run requires."""
    names = [name for name in config.callbacks if has_target(config.callbacks[name])]
    made = [each for each in (build(config, f"callbacks.{name}") for name in names) if each is not None]
    if run.is_trial:
        made = [each for each in made if not isinstance(each, LEAVING_FILES)]
    if not any(isinstance(each, WeightAverages) for each in made):
        made = [each for each in made if not isinstance(each, StoreAverages)]
    saved = None if before is None else averages_state(before)
    for each in made:
        if isinstance(each, WeightAverages) and saved is not None:
            each.load_state_dict(saved)
        if isinstance(each, StoreAverages) and run.parts.get("whitening") is not None:
            each.transform = partial(folded, whitening=run.parts["whitening"])
    first: list[Callback] = [NoteRewinds(start)]
    if before is not None and OmegaConf.select(run.config, "schedule.carry_moments"):
        first.append(CarryMoments(before))
    first += _missing(made, UsableSamples, UsableSamples)
    first += _missing(made, ValidateAtEnds, ValidateAtEnds)
    last = run.recipe.missing_callbacks(config, made)
    if not run.is_trial:
        folder = run.run_dir / str(config.stage.folder) / run_folder.CHECKPOINTS
        last += _missing(made, StageCheckpoint, lambda: StageCheckpoint(folder))
        price = float(plain(config, "hardware.usd_per_device_hour"))
        ledger = partial(KeepLedger, run.run_dir / run_folder.LEDGER, stage=config.stage.name)
        last += _missing(made, KeepLedger, lambda: ledger(usd_per_device_hour=price))
    return [*first, *made, *last, *_missing(made, StopOnSignal, StopOnSignal)]


def _missing(made: list[Callback], kind: type[Callback], make: Any) -> list[Callback]:
    return [] if any(isinstance(each, kind) for each in made) else [make()]


def _loggers(run: Run, config: DictConfig, module: LightningModule, plan: StagePlan, start: StartPoint) -> Any:
    """Return the configured loggers, on the run's sample axis; False if there are none."""
    nodes_ = config.logger or {}
    loggers: list[Logger] = [build(config, f"logger.{name}") for name in nodes_ if has_target(nodes_[name])]
    for logger in loggers:
        on_sample_axis(logger, module, plan.samples_before)
        if isinstance(logger, TensorBoardLogger) and not (start.step or run.is_trial) and processes.rank() == 0:
            write_page(logger, run.recipe.layout(config), recorded_text(run.config), plan.samples_before)
    return loggers or False


def _trainer(run: Run, config: DictConfig, callbacks: list[Callback], loggers: Any) -> Trainer:
    given = plain(config, "trainer")
    own: dict[str, Any] = {
        "callbacks": [*callbacks, *_made_of(config, "trainer.callbacks")],
        "logger": loggers,
        "plugins": [AtomicCheckpointIO(), cluster_environment(), *_made_of(config, "trainer.plugins")],
        "devices": local_world_size(),
        "num_nodes": nodes(),
        "strategy": _strategy(config, given.get("strategy", "auto")),
    }
    if "enable_progress_bar" not in given:
        own["enable_progress_bar"] = any(isinstance(each, ProgressBar) for each in callbacks)
    trainer: Trainer = build(config, "trainer", **run.recipe.trainer_arguments(config), **own)
    return trainer


def _made_of(config: DictConfig, path: str) -> list[Any]:
    return [build(config, f"{path}.{number}") for number in range(len(plain(config, path) or ()))]


def _strategy(config: DictConfig, name: Any) -> Any:
    if processes.world_size() == 1:
        return "auto" if name in (*hardware.OWN_STRATEGIES, hardware.SHARDED) else name
    if name == hardware.SHARDED:
        return ShardedStrategy()
    if name not in hardware.OWN_STRATEGIES:
        return name
    compressed = plain(config, "hardware.compress_gradients") and plain(config, "trainer.accelerator") == "cuda"
    kind = StaticGraphStrategy if name == "ddp_static_graph" else DDPStrategy
    return kind(gradient_as_bucket_view=True, ddp_comm_hook=bf16_compress_hook if compressed else None)
