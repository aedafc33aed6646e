"""What follows from a stage's settings: steps, accumulation, folder. Computed and checked in one place."""

import re
from dataclasses import dataclass
from pathlib import Path

from hdm_lightning.errors import UserError
from hdm_lightning.training.settings import ScheduleSettings, StageSettings


@dataclass(frozen=True)
class StagePlan:
    """One stage with everything derived for a number of devices.

    Attributes:
        number: place in the schedule, from 1.
        name: the stage's key in `schedule.stages`.
        settings: as configured.
        world_size: processes, one per device.
        accumulation: micro-batches per optimizer step on each device.
        steps: optimizer steps; `steps * batch_size` samples are seen, the configured count rounded up.
        samples_before: samples of the stages before this one, as planned.
    """

    number: int
    name: str
    settings: StageSettings
    world_size: int
    accumulation: int
    steps: int
    samples_before: int

    @property
    def samples(self) -> int:
        """Samples that the stage sees if nothing ends it early."""
        return self.steps * self.settings.batch_size

    @property
    def folder_name(self) -> str:
        """The stage's folder inside the run's folder."""
        return f"{self.number:02d}-{self.name}"

    def folder(self, run_dir: Path) -> Path:
        """The stage's folder."""
        return run_dir / self.folder_name

    def steps_for(self, samples: int) -> int:
        """Optimizer steps that cover so many samples; 0 stays 0."""
        return -(-samples // self.settings.batch_size)


def plan_stages(schedule: ScheduleSettings, world_size: int) -> list[StagePlan]:
    """Derive every stage's plan for `world_size` processes, or raise `UserError` naming the key."""
    if not schedule.stages:
        raise UserError("the schedule has no stage", where="schedule.stages", hint="choose one, e.g. schedule=demo")
    plans: list[StagePlan] = []
    for number, (name, stage) in enumerate(schedule.stages.items(), start=1):
        where = f"schedule.stages.{name}"
        _check_name(name)
        _check_ranges(stage, where)
        _check_stop(stage, f"{where}.stop")
        accumulation = _accumulation(stage, world_size, where)
        before = plans[-1].samples_before + plans[-1].samples if plans else 0
        steps = -(-stage.samples // stage.batch_size)
        plans.append(StagePlan(number, name, stage, world_size, accumulation, steps, before))
    return plans


def _check_stop(stage: StageSettings, where: str) -> None:
    stop = stage.stop
    for key in ("max_hours", "max_cost_usd", "plateau_samples"):
        value = getattr(stop, key)
        if value is not None and not value > 0:
            raise UserError(f"{value} is not positive", where=f"{where}.{key}", hint="give a positive value or null")
    if not stop.plateau_delta >= 0:
        raise UserError(f"{stop.plateau_delta} is negative", where=f"{where}.plateau_delta", hint="give 0 or more")
    if stop.plateau_samples is not None and not 0 < stage.validate_every <= stop.plateau_samples:
        raise UserError(
            f"a plateau of {stop.plateau_samples} samples cannot be seen with validate_every={stage.validate_every}",
            where=f"{where}.plateau_samples",
            hint="validate at least once within it, better several times",
        )


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise UserError(
            "a stage's name begins with a letter and holds letters, digits, '_' and '-'",
            where=f"schedule.stages.{name}",
            hint=f"rename it, e.g. px{name}",
        )


def _accumulation(stage: StageSettings, world_size: int, where: str) -> int:
    together = stage.micro_batch_size * world_size
    if stage.batch_size % together:
        nearest = max(1, round(stage.batch_size / together)) * together
        raise UserError(
            f"batch_size {stage.batch_size} is not a multiple of micro_batch_size {stage.micro_batch_size} "
            f"x {world_size} device(s) = {together}",
            where=f"{where}.batch_size",
            hint=f"set {where}.batch_size={nearest}, or a micro_batch_size that divides",
        )
    return stage.batch_size // together


def _check_ranges(stage: StageSettings, where: str) -> None:
    for key in (
        "time_std",
        "resolution",
        "samples",
        "batch_size",
        "micro_batch_size",
        "learning_rate",
        "context_length",
    ):
        if not getattr(stage, key) > 0:
            raise UserError(
                f"{getattr(stage, key)} is not positive", where=f"{where}.{key}", hint="give a positive value"
            )
    for key in (
        "weight_decay",
        "gradient_clip",
        "warmup_samples",
        "validate_every",
        "save_every",
        "sample_every",
    ):
        if getattr(stage, key) < 0:
            raise UserError(
                f"{getattr(stage, key)} is negative",
                where=f"{where}.{key}",
                hint="give 0 or a positive value",
            )
    for key, top in (("routing_rate", 1.0), ("final_learning_rate_ratio", 1.0001)):
        if not 0 <= getattr(stage, key) < top:
            raise UserError(
                f"{getattr(stage, key)} is outside 0..1",
                where=f"{where}.{key}",
                hint="give a share, e.g. 0.5",
            )
    if not all(0 <= beta < 1 for beta in stage.betas):
        raise UserError(f"{stage.betas} are not in [0, 1)", where=f"{where}.betas", hint="e.g. [0.9, 0.98]")
