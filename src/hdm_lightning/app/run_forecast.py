"""How long a run will still take and what it will cost, from the cost of its samples so far."""

from collections.abc import Sequence
from dataclasses import dataclass

from hdm_lightning.app.run_history import Run, StageRow
from hdm_lightning.errors import UserError
from hdm_lightning.profiling.encoder_costs import EncoderConfigs
from hdm_lightning.training.callbacks.progress_bar import duration
from hdm_lightning.training.callbacks.throughput import stage_flops
from hdm_lightning.training.recorded import model_config_from


@dataclass(frozen=True)
class Remainder:
    """What is left of a run.

    Attributes:
        samples, seconds, cost_usd: for all stages that have not ended; seconds of wall-clock time.
        stage_seconds: for the current stage.
        spent_seconds, spent_usd: time and cost so far.
    """

    samples: int
    seconds: float
    cost_usd: float
    stage_seconds: float
    spent_seconds: float
    spent_usd: float

    def text(self) -> str:
        """Return a one-line summary."""
        spent = f"{duration(self.spent_seconds)} spent"
        if self.spent_usd:
            spent += f", ${self.spent_usd:.2f}"
        if not self.samples:
            return f"{spent}, nothing left"
        left = f"{duration(self.stage_seconds)} left in this stage, {duration(self.seconds)} in total"
        return f"{spent}; {left}" + (f", ${self.cost_usd:.2f}" if self.cost_usd else "") + ", at the pace so far"


def remainder(run: Run) -> Remainder | None:
    """Return what is left of a run, at the pace of the last stage that began; None if nothing was counted yet.

    Samples of a later stage are weighted by the network's operations at its resolution, as in the progress of training.
    """
    stages = run.stages()
    spent = sum(stage.seconds for stage in stages), sum(stage.cost_usd for stage in stages)
    left = [(stage, stage.plan.samples - stage.samples) for stage in stages if not stage.state.startswith("ended")]
    left = [(stage, samples) for stage, samples in left if samples > 0]
    if not left or run.is_finished:
        return Remainder(0, 0.0, 0.0, 0.0, *spent) if spent[0] else None
    measured = [stage for stage in stages if stage.samples and stage.seconds]
    if not measured:
        return None
    paced = measured[-1]
    weights, pace = _sample_costs(run, stages), paced.seconds / paced.samples
    seconds = [
        samples * pace * weights[stage.plan.number - 1] / weights[paced.plan.number - 1] for stage, samples in left
    ]
    total, usd_per_second = sum(seconds), paced.cost_usd / paced.seconds
    return Remainder(sum(samples for _, samples in left), total, total * usd_per_second, seconds[0], *spent)


def _sample_costs(run: Run, stages: Sequence[StageRow]) -> list[float]:
    """Return the relative cost of a sample of each stage: operations, or pixels if the encoders are not known."""
    plans = [stage.plan for stage in stages]
    if run.of_pipeline:
        try:
            names = run.settings.text_encoder.name, run.settings.vae.name
            factor = EncoderConfigs.of(*names).architectures()[1].factor
            config = model_config_from(run.settings.model)
            return [float(stage_flops(config, plan.settings, factor)) for plan in plans]
        except (UserError, ValueError, OSError):  # an encoder that has moved
            pass
    return [float(plan.settings.resolution**2) for plan in plans]
