"""What `hdm-plan` does with its checked configuration: forecasts, proposals and probes."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from hdm_lightning.cli.outputs import require_file
from hdm_lightning.cli.plan_recipe import EncoderConfigs, encoder_configs, recipe_from
from hdm_lightning.cli.probe import machine_at_hand, measured_utilisation, require_at_hand
from hdm_lightning.errors import UserError
from hdm_lightning.planning.assumptions import Assumptions
from hdm_lightning.planning.budget import propose
from hdm_lightning.planning.forecast import Forecast, forecast
from hdm_lightning.planning.gpus import override, parse_gpus
from hdm_lightning.planning.machine import Host, Machine
from hdm_lightning.planning.report import comparison_report, plan_report, proposal_report
from hdm_lightning.planning.settings import PlanSettings
from hdm_lightning.training.checks import settings_from, train_settings_from
from hdm_lightning.training.settings import TrainSettings

HERE = "here"
_MISSING = "???"
_MAY_BE_ZERO = {("host", "power_w"), ("probe_settings", "warmup"), ("probe_settings", "micro_batch")}


@dataclass(frozen=True)
class PlanResult:
    """What the command prints and writes.

    Attributes:
        report: for the terminal.
        content: for the JSON file.
        out: that file, or None.
    """

    report: RenderableType
    content: dict[str, Any]
    out: str | None


def run_plan(config: Mapping[str, Any], *, tell: Callable[[str], None] = lambda _text: None) -> PlanResult:
    """Forecast a composed configuration.

    Args:
        config: the keys of a training run and those of `PlanSettings`.
        tell: hears of what takes a while.

    Raises:
        UserError: naming the key and the hint.
    """
    wanted, settings = _split(config)
    _check_figures(wanted)
    if wanted.out is not None:
        require_file(Path(wanted.out), "out")
    encoders = encoder_configs(settings)
    spellings = wanted.gpus if isinstance(wanted.gpus, list) else [wanted.gpus]
    if not spellings:
        raise UserError("names no machine", where="gpus", hint="give a count and a name, e.g. gpus=4x5090")
    plans = [_forecast(settings, wanted, encoders, str(spelling), tell) for spelling in spellings]
    if len(plans) > 1:
        if wanted.budget_usd is not None:
            raise UserError("a budget needs one machine", where="gpus", hint=f"e.g. gpus={spellings[0]}")
        return PlanResult(comparison_report(plans), {"plans": [each.to_json() for each in plans]}, wanted.out)
    (plan,) = plans
    if wanted.budget_usd is None:
        return PlanResult(plan_report(plan), plan.to_json(), wanted.out)
    measured = {stage.stage.name: stage.utilisation for stage in plan.stages}
    proposal = propose(plan.recipe, plan.machine, wanted.budget_usd, plan.assumptions, utilisation=measured)
    content = {
        "budget_usd": proposal.budget_usd,
        "share": proposal.share,
        "dropped": list(proposal.dropped),
        "overrides": list(proposal.overrides),
        **proposal.forecast.to_json(),
    }
    return PlanResult(proposal_report(proposal), content, wanted.out)


def _split(config: Mapping[str, Any]) -> tuple[PlanSettings, TrainSettings]:
    own = {field.name for field in fields(PlanSettings)}
    wanted = settings_from({key: value for key, value in config.items() if key in own}, PlanSettings)
    rest = {key: value for key, value in config.items() if key not in own}
    rest["data"] = {key: value for key, value in rest["data"].items() if value != _MISSING}  # no data are needed
    return wanted, train_settings_from(rest)


def _check_figures(wanted: PlanSettings) -> None:
    """Raise UserError for a figure of the host, the training set or the probe that cannot be."""
    for section in ("host", "dataset", "probe_settings"):
        for key, value in asdict(getattr(wanted, section)).items():
            may_be_none = (section, key) in _MAY_BE_ZERO
            if isinstance(value, int | float) and not (value > 0 or (may_be_none and value == 0)):
                least = "0 or more" if may_be_none else "more than 0"
                raise UserError(f"{value} cannot be", where=f"{section}.{key}", hint=f"give {least}")


def _forecast(
    settings: TrainSettings,
    wanted: PlanSettings,
    encoders: EncoderConfigs,
    spelling: str,
    tell: Callable[[str], None],
) -> Forecast:
    machine = machine_from(wanted, spelling)
    recipe = recipe_from(settings, wanted, encoders, machine)
    assumptions = assumptions_from(wanted)
    utilisation = None
    if wanted.probe:
        require_at_hand(machine)
        utilisation = measured_utilisation(
            recipe, machine, settings, encoders, wanted.probe_settings, assumptions, tell
        )
        mean = sum(utilisation.values()) / len(utilisation)
        assumptions = replace(assumptions, utilisation=mean)
    return forecast(recipe, machine, assumptions, utilisation=utilisation)


def machine_from(wanted: PlanSettings, spelling: str) -> Machine:
    """The machine of a spelling of `gpus`, with the overrides of `gpu` and `host`."""
    host = Host(**asdict(wanted.host))
    if spelling == HERE:
        found = machine_at_hand()
        return Machine(override(found.gpu, asdict(wanted.gpu)), found.count, host)
    gpu, count = parse_gpus(spelling)
    return Machine(override(gpu, asdict(wanted.gpu)), count, host)


def assumptions_from(wanted: PlanSettings) -> Assumptions:
    """The assumptions, checked.

    Raises:
        UserError: a share is not within 0 … 1, or a figure is negative.
    """
    values = asdict(wanted.assumptions)
    for key in ("utilisation", "power_share"):
        if not 0 < values[key] <= 1:
            raise UserError(
                f"{values[key]} is outside 0 … 1", where=f"assumptions.{key}", hint="give a share, e.g. 0.6"
            )
    for key in ("reserve_gib", "usd_per_kwh"):
        if values[key] < 0:
            raise UserError(f"{values[key]} is negative", where=f"assumptions.{key}", hint="give 0 or more")
    return Assumptions(**values)
