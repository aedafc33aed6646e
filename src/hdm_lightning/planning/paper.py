"""The paper's measured stage times (arXiv 2509.06068, appendix), which the forecast is calibrated against."""

from collections.abc import Mapping

from hdm_lightning.planning.duration import step_time
from hdm_lightning.planning.gpus import GPUS
from hdm_lightning.planning.machine import Machine
from hdm_lightning.planning.recipe import Recipe

PAPER_HOURS: Mapping[int, float] = {256: 174.0, 512: 120.0, 768: 42.0, 1024: 49.0}
"""Wall-clock hours of the stages by resolution, four RTX 5090."""

PAPER_MACHINE = Machine(GPUS["5090"], 4)


def hours_at(recipe: Recipe, utilisation: float) -> dict[int, float]:
    """Forecast hours of each stage on the paper's machine, by resolution."""
    hours = {}
    for stage in recipe.stages:
        step = step_time(recipe, stage, PAPER_MACHINE, stage.micro_batch_size, utilisation)
        hours[stage.resolution] = stage.steps * step.device / 3600
    return hours


def calibrated_utilisation(recipe: Recipe) -> float:
    """The utilisation that makes the largest relative error over the paper's stages smallest.

    Args:
        recipe: the paper's schedule.
    """

    def worst(utilisation: float) -> float:
        hours = hours_at(recipe, utilisation)
        return max(abs(hours[side] / PAPER_HOURS[side] - 1) for side in PAPER_HOURS)

    return min((step / 1000 for step in range(200, 1001)), key=worst)
