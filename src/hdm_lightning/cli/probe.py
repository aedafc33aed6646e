"""Run a few training steps on this machine, to replace the assumed utilization with a measured one."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hdm_lightning.cli.bench_training import TrainingStep
from hdm_lightning.errors import UserError
from hdm_lightning.precision import half_dtype
from hdm_lightning.profiling.bench_settings import ProbeSettings
from hdm_lightning.profiling.duration import Assumptions, step_time
from hdm_lightning.profiling.encoder_costs import EncoderConfigs
from hdm_lightning.profiling.forecast import forecast
from hdm_lightning.profiling.gpus import CPU, Machine
from hdm_lightning.profiling.planned_run import Recipe, StageRecipe
from hdm_lightning.profiling.system import machine_at_hand
from hdm_lightning.profiling.timing import time_call
from hdm_lightning.training.recorded import TrainSettings

_CPU_MICRO_BATCH = 4


@dataclass(frozen=True)
class Probe:
    """Steps of a schedule's stages on one device of this machine, with random weights."""

    run: TrainSettings
    encoders: EncoderConfigs
    recipe: Recipe
    machine: Machine
    settings: ProbeSettings
    assumptions: Assumptions  # of the forecast that determines the micro-batch

    def utilisation(self, log: Callable[[str], None]) -> dict[str, float]:
        """Return stage name to utilization: time at data-sheet rates over measured time; `log` gets each result.

        Stages that are not measured get the mean of those that are.

        Raises:
            UserError: the plan is for another machine, a stage is unknown, or no sample fits.
        """
        self._require_at_hand()
        names = [stage.name for stage in self.recipe.stages]
        unknown = sorted(set(self.settings.stages) - set(names))
        if unknown:
            what, hint = f"the schedule has no stage {unknown[0]!r}", "choose from " + ", ".join(names)
            raise UserError(what, where="probe_settings.stages", hint=hint)
        one = replace(self.machine, count=1)
        found: dict[str, float] = {}
        for expected in forecast(self.recipe, one, self.assumptions).stages:
            name = expected.stage.name
            if self.settings.stages and name not in self.settings.stages:
                continue
            most = _CPU_MICRO_BATCH if one.gpu.name == CPU else expected.micro_batch
            micro = self.settings.micro_batch or min(expected.micro_batch, most)
            if not micro:
                raise UserError("not one sample fits", where=f"schedule.stages.{name}", hint=" ".join(expected.notes))
            seconds = self._seconds(expected.stage, micro)
            # The steps encode pixels and captions even if the stage will read latents and states.
            single = replace(expected.stage, cached=False, text_stored=False, batch_size=micro, micro_batch_size=micro)
            found[name] = step_time(self.recipe, single, one, micro, 1.0).ideal / seconds
            log(f"{name}: {micro / seconds:.2f} images/s on one device, utilization {found[name]:.3f}")
        mean = sum(found.values()) / len(found)
        return {name: found.get(name, mean) for name in names}

    def _require_at_hand(self) -> None:
        planned = self.machine.gpu.name
        here = planned if planned == CPU else machine_at_hand().gpu.name
        if here != planned:
            found = "no GPU" if here == CPU else f"a {here}"
            what = f"a probe measures this machine, which has {found}, but the plan is for {self.machine.name}"
            hint = "set gpus=here, or probe on such a machine and set assumptions.utilisation to its result"
            raise UserError(what, where="probe", hint=hint)

    def _seconds(self, stage: StageRecipe, micro: int) -> float:
        device = torch.device("cpu" if self.machine.gpu.name == CPU else "cuda")
        half = half_dtype(device) if device.type == "cuda" else torch.bfloat16
        step = TrainingStep(
            self.recipe.network,
            self.encoders.text,
            self.encoders.autoencoder,
            replace(self.run.schedule.stages[stage.name], batch_size=micro, micro_batch_size=micro),
            device=device,
            dtype=half if self.recipe.mixed else torch.float32,
            compiled=self.recipe.compiled,
            text_max_tokens=self.recipe.text_max_tokens,
            autoencoder_max_pixels=self.recipe.autoencoder_max_pixels,
            averages=self.recipe.averages,
            muon=self.recipe.muon,
        )
        return time_call(step, device, warmup=self.settings.warmup, repeats=self.settings.steps).median
