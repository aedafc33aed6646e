"""The other way round: from money to a schedule."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hdm_lightning.errors import UserError
from hdm_lightning.profiling.duration import Assumptions
from hdm_lightning.profiling.forecast import Forecast, forecast, plain
from hdm_lightning.profiling.gpus import GPUS, Machine
from hdm_lightning.profiling.recipe import Recipe, StageRecipe

# A stage that spends more than a quarter of its samples on warming up, or has fewer steps than this, teaches little.
_WARMUPS = 4
_FEWEST_STEPS = 1000


@dataclass(frozen=True)
class Proposal:
    """A schedule for a budget."""

    budget_usd: float  # what may be spent
    forecast: Forecast  # of the proposed schedule
    share: float  # proposed samples over those of the schedule it was made from
    dropped: tuple[str, ...]  # stages left out, the highest resolutions first to go
    overrides: tuple[str, ...]  # what makes hdm-train run it

    def to_json(self) -> dict[str, Any]:
        """Plain values, those of the forecast beside the others."""
        own = {name: plain(getattr(self, name)) for name in ("budget_usd", "share", "dropped", "overrides")}
        return {**own, **self.forecast.to_json()}


def propose(
    recipe: Recipe,
    machine: Machine,
    budget_usd: float,
    assumptions: Assumptions | None = None,
    *,
    utilisation: Mapping[str, float] | None = None,
) -> Proposal:
    """Scale a schedule to a budget.

    All stages shrink or grow by the same factor, so that each keeps its share of the money. Where the last one
    would become shorter than `least_samples`, it is dropped and the rest gets its share.

    Args:
        recipe: the schedule to scale.
        machine: where; its price counts.
        budget_usd: what may be spent on rent.
        assumptions: figures behind the forecast; the usual ones by default.
        utilisation: measured figures by stage name, in place of the assumed one.

    Raises:
        UserError: the machine has no price, or the budget is below the smallest schedule.
    """
    if machine.usd_per_hour <= 0:
        raise UserError(
            f"{machine.name} has no price, so a budget says nothing", where="gpu.usd_per_hour", hint="give one"
        )
    for count in range(len(recipe.stages), 0, -1):
        part = replace(recipe, stages=recipe.stages[:count])
        cost = forecast(part, machine, assumptions, utilisation=utilisation).total("rent_usd")
        share = budget_usd / cost
        samples = [_whole_steps(stage, share) for stage in part.stages]
        if all(have >= least_samples(stage) for have, stage in zip(samples, part.stages, strict=True)):
            chosen = part.with_samples(iter(samples))
            dropped = tuple(stage.name for stage in recipe.stages[count:])
            plan = forecast(chosen, machine, assumptions, utilisation=utilisation)
            return Proposal(budget_usd, plan, share, dropped, _overrides(chosen, dropped))
    assumed, first = assumptions or Assumptions(), recipe.stages[0].name
    in_force = replace(assumed, utilisation=(utilisation or {}).get(first, assumed.utilisation))
    raise _below_the_smallest(recipe, machine, budget_usd, in_force)


def least_samples(stage: StageRecipe) -> int:
    """Samples below which a stage is not worth its warm-up."""
    return max(_WARMUPS * stage.warmup_samples, _FEWEST_STEPS * stage.batch_size)


def smallest(recipe: Recipe) -> Recipe:
    """The smallest schedule that `propose` makes: the first stage alone, as short as it may be."""
    first = recipe.stages[0]
    return replace(recipe, stages=(replace(first, samples=least_samples(first)),))


def _whole_steps(stage: StageRecipe, share: float) -> int:
    """Samples scaled down to whole optimizer steps, so that the cost stays within the budget."""
    return int(stage.samples * share / stage.batch_size) * stage.batch_size


def _overrides(recipe: Recipe, dropped: tuple[str, ...]) -> tuple[str, ...]:
    kept = [f"schedule.stages.{stage.name}.samples={stage.samples}" for stage in recipe.stages]
    return (*kept, *(f"~schedule.stages.{name}" for name in dropped))


def _below_the_smallest(recipe: Recipe, machine: Machine, budget_usd: float, assumptions: Assumptions) -> UserError:
    alone = smallest(recipe)
    least = forecast(alone, machine, assumptions).total("rent_usd")
    plans = {name: forecast(alone, replace(machine, gpu=gpu, count=1), assumptions) for name, gpu in GPUS.items()}
    costs = {name: plan.total("rent_usd") for name, plan in plans.items() if plan.stages[0].micro_batch}
    cheapest = min(costs, key=lambda name: costs[name], default=None)
    other = f"gpus=1x{cheapest} (${costs[cheapest]:.2f}), or " if cheapest else ""
    return UserError(
        f"${budget_usd:g} is below the smallest schedule, {alone.stages[0].samples:,} samples of "
        f"{alone.stages[0].name}, which costs ${least:.2f} on {machine.name}",
        where="budget_usd",
        hint=f"give budget_usd={int(least) + 1}, or {other}start from a smaller schedule or model",
    )
