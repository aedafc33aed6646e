"""A schedule of stages inside one process: build the parts once, then one fit after another."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from hdm_lightning.encoders.whitening import TextWhitening
from hdm_lightning.models import XUT
from hdm_lightning.training import hardware, processes, run_folder
from hdm_lightning.training.apply import shard_network
from hdm_lightning.training.averaging.averages import WeightAverages
from hdm_lightning.training.callbacks.ledger import Ledger
from hdm_lightning.training.checks import train_settings_from
from hdm_lightning.training.export import export_final
from hdm_lightning.training.frozen import FrozenEncoders
from hdm_lightning.training.initial_weights import initial_network, record_init
from hdm_lightning.training.launching.process_body import describe_run, run_process
from hdm_lightning.training.monitoring.hparams import write_hparams
from hdm_lightning.training.parts import load_encoders
from hdm_lightning.training.recovery.intact import intact_end
from hdm_lightning.training.recovery.stage_rewind import train_stage
from hdm_lightning.training.settings import TrainSettings
from hdm_lightning.training.stages import StagePlan, plan_stages
from hdm_lightning.training.text_whitening import run_whitening


@dataclass
class Run:
    """What the stages of a run have in common.

    Attributes:
        settings: the run's settings.
        config_text: the resolved configuration as YAML.
        run_dir: the run's folder.
        plans: the stages.
        network: the network, on the CPU between stages; a sharded one stays on its devices.
        whitening: of the text encoder's states, or None.
        encoders: the frozen encoders.
        averages: the weight averages.
        ledger: the run's ledger.
    """

    settings: TrainSettings
    config_text: str
    run_dir: Path
    plans: list[StagePlan]
    network: XUT
    whitening: TextWhitening | None
    encoders: FrozenEncoders
    averages: WeightAverages
    ledger: Ledger


def build_run(settings: TrainSettings) -> Run:
    """Build the network, the encoders and the averages of a run, the same in every process.

    What `init` names is read as long as a rewind could still go back to it.
    """
    kind, run_dir = hardware.accelerator(settings.trainer), Path(settings.run_dir)
    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    plans = plan_stages(settings.schedule, processes.world_size())
    whitening = run_whitening(settings, plans[0], device)
    begun = processes.from_first(run_folder.stage_is_done(run_dir, plans[0]))
    network, report = initial_network(replace(settings, init=None) if begun else settings, whitening)
    if report is not None and processes.rank() == 0:
        print(report)
        record_init(run_dir, report)
    if settings.trainer.strategy == hardware.SHARDED and processes.distributed():
        shard_network(network, settings.trainer)
    network.to(device)
    ema = settings.callbacks.ema
    return Run(
        settings=settings,
        config_text=OmegaConf.to_yaml(OmegaConf.structured(settings)),
        run_dir=run_dir,
        plans=plans,
        network=network,
        whitening=whitening,
        encoders=load_encoders(settings, whitening),
        averages=WeightAverages(network, ema.halflife_samples, ema.ramp, ema.sigma_rel),
        ledger=Ledger(run_dir / run_folder.LEDGER, writes=processes.rank() == 0),
    )


def run_schedule(run: Run) -> None:
    """Run every stage that is not done yet, each from what the one before it left on disk, then export."""
    for plan in run.plans:
        if not processes.from_first(run_folder.stage_is_done(run.run_dir, plan)):
            _train(run, plan)
    export_final(run, _end_of(run, run.plans[-1]))
    write_hparams(run)


def _train(run: Run, plan: StagePlan) -> None:
    before = [each for each in run.plans if each.number < plan.number]
    train_stage(run, plan, partial(_end_of, run, before[-1]) if before else None)


def _end_of(run: Run, plan: StagePlan) -> Path:
    """The last checkpoint of a stage that has been done; where it is damaged, the stage is trained to its end again."""
    while (path := processes.decided_by_first(partial(intact_end, run.run_dir, plan))) is None:
        _train(run, plan)
    return path


def work(config: dict[str, Any]) -> int:
    """One process of a run, from its plain settings; returns the exit status."""
    settings = train_settings_from(config)

    def body() -> None:
        run_folder.check_resume(Path(settings.run_dir), settings.resume)  # again: another start may just have ended
        run = build_run(settings)
        describe_run(run.run_dir, run.config_text)
        run_schedule(run)

    return run_process(settings.trainer, Path(settings.run_dir), body)
