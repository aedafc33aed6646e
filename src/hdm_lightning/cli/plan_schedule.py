"""`hdm-plan` on a composed configuration: derive a recipe and a machine, then forecast or propose a schedule.

Imports neither lightning nor transformers, which both take longer than a forecast; only a probe needs them.
"""

import gc
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Group, RenderableType

from hdm_lightning.cli.command import require_file
from hdm_lightning.data.caption_lengths import padded_lengths
from hdm_lightning.data.index import holds_latents
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.profiling.bench_settings import ProbeSettings
from hdm_lightning.profiling.duration import Assumptions
from hdm_lightning.profiling.encoder_costs import EncoderConfigs
from hdm_lightning.profiling.forecast import Forecast, forecast, propose
from hdm_lightning.profiling.gpus import CPU, HERE, Host, Machine, override, parse_gpus
from hdm_lightning.profiling.operations import AdapterCost
from hdm_lightning.profiling.plan_report import comparison_report, plan_report, presets_line, proposal_report
from hdm_lightning.profiling.planned_run import Dataset, Recipe, StageRecipe
from hdm_lightning.profiling.system import machine_at_hand
from hdm_lightning.training.base_model import fill_from_init
from hdm_lightning.training.composition import build, check_call, parse
from hdm_lightning.training.hardware import SHARDED, precision
from hdm_lightning.training.modules.adapted_layers import LayerAdapter
from hdm_lightning.training.recorded import TrainSettings, model_config_from, train_settings_from
from hdm_lightning.training.stages import StagePlan, plan_stages

CAPTIONS_READ = 2000
"""Number of captions of a data set to measure."""
QUANTILES = 33
OWN_NAME = "plan"
"""Default run name in `conf/plan.yaml`."""
_MISSING = "???"


@dataclass
class PlanSettings:
    """The keys that `hdm-plan` adds to those of a training run."""

    gpus: Any = "4x5090"  # a count and a name, ``4x5090``; a list of these; or ``here``, this machine
    # figures that override the table's; None keeps a figure. See `gpus.Gpu`
    gpu: dict[str, Any] = field(default_factory=dict)
    host: Host = field(default_factory=Host)
    dataset: Dataset = field(default_factory=Dataset)
    assumptions: Assumptions = field(default_factory=Assumptions)
    budget_usd: float | None = None  # propose a schedule for this budget; None forecasts the schedule as it is
    probe: bool = False  # measure steps on this machine and recalibrate
    probe_settings: ProbeSettings = field(default_factory=ProbeSettings)
    out: str | None = None  # file for the forecast as JSON; None writes none


@dataclass(frozen=True)
class PlanResult:
    """Output of the command."""

    report: RenderableType  # for the terminal
    content: dict[str, Any]  # for the JSON file


def run_plan(config: Mapping[str, Any], *, log: Callable[[str], None] = lambda _text: None) -> PlanResult:
    """Forecast from the keys of a training run and of `PlanSettings`; `log` receives progress messages."""
    wanted, settings = _split(config)
    if wanted.out is not None:
        require_file(Path(wanted.out), "out")
    encoders = EncoderConfigs.of(settings.text_encoder.name, settings.vae.name)
    spellings = wanted.gpus if isinstance(wanted.gpus, list) else [wanted.gpus]
    if not spellings:
        raise UserError("is empty", where="gpus", hint="use a count and a name, e.g. gpus=4x5090")
    plans = [_forecast(settings, wanted, encoders, str(spelling), log) for spelling in spellings]
    if len(plans) > 1:
        if wanted.budget_usd is not None:
            raise UserError("a budget needs a single machine", where="gpus", hint=f"e.g. gpus={spellings[0]}")
        return PlanResult(comparison_report(plans), {"plans": [each.to_json() for each in plans]})
    (plan,) = plans
    if wanted.budget_usd is None:
        chosen = config.get("name") != OWN_NAME  # a preset names its run
        report = plan_report(plan) if chosen else Group(plan_report(plan), presets_line(plan))
        return PlanResult(report, plan.to_json())
    proposal = propose(plan.recipe, plan.machine, wanted.budget_usd, plan.assumptions, utilisation=plan.measured)
    return PlanResult(proposal_report(proposal), proposal.to_json())


def _split(config: Mapping[str, Any]) -> tuple[PlanSettings, TrainSettings]:
    composed = OmegaConf.create(dict(config))
    fill_from_init(composed)
    filled: Any = OmegaConf.to_container(composed)
    own = {entry.name for entry in fields(PlanSettings)}
    wanted = parse(PlanSettings, {key: value for key, value in filled.items() if key in own}, "")
    rest = {key: value for key, value in filled.items() if key not in own}
    rest["data"] = {key: value for key, value in rest["data"].items() if value != _MISSING}  # no data is needed
    return wanted, train_settings_from(rest)


def _forecast(
    settings: TrainSettings, wanted: PlanSettings, encoders: EncoderConfigs, spelling: str, log: Callable[[str], None]
) -> Forecast:
    found = machine_at_hand() if spelling == HERE else Machine(*parse_gpus(spelling))
    machine = Machine(override(found.gpu, wanted.gpu), found.count, wanted.host)
    dataset = _with_captions(settings, wanted.dataset, log)
    recipe, assumptions = recipe_from(settings, dataset, encoders, machine), wanted.assumptions
    utilisation = None
    if wanted.probe:
        from hdm_lightning.cli.probe import Probe  # noqa: PLC0415 (seconds to import)

        gc.enable()  # a probe trains, while a forecast needs no collection
        filled = replace(recipe, dataset=replace(recipe.dataset, caption_tokens=None))  # like the probe's captions
        probe = Probe(settings, encoders, filled, machine, wanted.probe_settings, assumptions)
        utilisation = probe.utilisation(log)
        assumptions = replace(assumptions, utilisation=sum(utilisation.values()) / len(utilisation))
    return forecast(recipe, machine, assumptions, utilisation=utilisation)


def _with_captions(settings: TrainSettings, dataset: Dataset, log: Callable[[str], None]) -> Dataset:
    """Return the data set with quantiles of its caption lengths, if they are unset and `data.train` is local."""
    train = settings.data.get("train")
    if dataset.caption_tokens is not None or not isinstance(train, str) or not Path(train).expanduser().is_dir():
        return dataset
    from hdm_lightning.training.recorded_data import caption_lengths  # noqa: PLC0415 (seconds to import)

    plans = plan_stages(settings.schedule, 1)
    longest = max(plan.settings.context_length for plan in plans)
    try:
        lengths = caption_lengths(settings, plans[0], longest, CAPTIONS_READ)
    except UserError as error:
        log(f"assuming captions that fill the context: cannot measure those of {train} ({error.what})")
        return dataset
    if not lengths:
        return dataset
    last = len(lengths) - 1
    quantiles = [lengths[round(last * number / (QUANTILES - 1))] for number in range(QUANTILES)]
    log(f"captions of {train}: {sum(lengths) / len(lengths):.0f} tokens on average over {len(lengths):,}")
    return replace(dataset, caption_tokens=quantiles)


def recipe_from(settings: TrainSettings, dataset: Dataset, encoders: EncoderConfigs, machine: Machine) -> Recipe:
    """Return the recipe of a run on a machine. Raises UserError: names a key that conflicts with the others."""
    _check_limits(settings)
    network = model_config_from(settings.model)
    text, autoencoder = encoders.architectures()
    if text.width != network.context_width:
        raise UserError(
            f"the text encoder {settings.text_encoder.name} has width {text.width}, the model's context "
            f"{network.context_width}",
            where="model.context_width",
            hint=f"set model.context_width={text.width}, or choose another text_encoder",
        )
    averages, trainer = settings.callback("weight_averages"), settings.trainer
    plans = plan_stages(settings.schedule, machine.count)
    return Recipe(
        network=network,
        stages=tuple(
            replace(
                _stage(plan, autoencoder.factor * network.patch_size),
                cached=_is_cached(settings, plan, dataset),
                text_stored={**settings.data, **plan.settings.data}.get("text_states") is not None,
            )
            for plan in plans
        ),
        text=text,
        autoencoder=autoencoder,
        dataset=dataset,
        text_lengths=_text_lengths(settings, machine),
        text_max_tokens=settings.text_encoder.max_tokens,
        autoencoder_max_pixels=settings.vae.max_pixels,
        averages=len(averages.get("halflife_samples") or ()) + len(averages.get("sigma_rel") or ()),
        muon=str(settings.optimizer.get("_target_")).endswith("MuonAdamW"),
        # One byte each, and a four-byte scale per 256 of them.
        moment_bytes=1 + 4 / 256 if str(settings.optimizer.get("_target_")).endswith("8bit") else 4.0,
        compiled=settings.hardware.compile,
        half_gradients=settings.hardware.compress_gradients,
        sharded=trainer.get("strategy") == SHARDED and machine.count > 1,
        mixed=_is_mixed(trainer.get("precision"), machine),
        checkpoints_kept=settings.callback("checkpoint").get("keep", 2),
        overlapped=settings.hardware.overlap_encoders and machine.gpu.name != CPU,
        adapter=adapter_cost(settings.adapter, network),
    )


def adapter_cost(adapter_keys: Mapping[str, Any] | None, network: XUTConfig) -> AdapterCost | None:
    """Return the cost of a run's `adapter` group; None if there is none.

    Raises:
        UserError: it has an unknown key, matches no layer, or is a class of unknown size; names the key.
    """
    if adapter_keys is None:
        return None
    config = OmegaConf.create({"adapter": dict(adapter_keys)})
    check_call(config, "adapter")
    adapter = build(config, "adapter")
    if not isinstance(adapter, LayerAdapter):
        hint = "plan with hdm_lightning.LoRA or LyCORIS, or with adapter=null to train all weights"
        raise UserError(f"the size of a {type(adapter).__name__} is unknown", where="adapter", hint=hint)
    with torch.device("meta"):
        whole = XUT(network)
    parameters: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    try:
        for name in adapter.layers(whole):
            layer: Any = whole.get_submodule(name)
            out, size = layer.weight.shape
            part = name.partition(".")[0]
            parameters[part] += adapter.parameters_beside(size, out)
            elements[part] += adapter.elements_beside(size, out)
    except UserError as error:
        raise UserError(error.what, where=f"adapter.{error.where}", hint=error.hint) from error
    return AdapterCost(dict(parameters), dict(elements))


def _is_cached(settings: TrainSettings, plan: StagePlan, dataset: Dataset) -> bool:
    """Return whether a stage reads latents, according to its settings or a local folder of shards."""
    if plan.settings.latents is not None:
        return plan.settings.latents
    train = {**settings.data, **plan.settings.data}.get("train")
    if train is None or ("train" not in plan.settings.data and dataset.latents):
        return dataset.latents
    return isinstance(train, str) and holds_latents(train, plan.settings.resolution)


def _check_limits(settings: TrainSettings) -> None:
    """Raise UserError for settings that hdm-train would reject on any machine."""
    strategy = str(settings.trainer.get("strategy", "auto"))
    if strategy not in ("auto", SHARDED) and not strategy.startswith("ddp"):
        what = f"forecasts do not support '{strategy}'"
        raise UserError(what, where="trainer.strategy", hint=f"trainer.strategy=auto, or {SHARDED} to shard it")
    limits = {"text_encoder.max_tokens": settings.text_encoder.max_tokens, "vae.max_pixels": settings.vae.max_pixels}
    for where, limit in limits.items():
        if limit < 1:
            raise UserError(f"{limit} is below 1", where=where, hint="use 1 or more; 1 encodes one sample at a time")


def _text_lengths(settings: TrainSettings, machine: Machine) -> Any:
    """Resolve `auto` as in training: a few lengths on a GPU, one on a CPU."""
    wanted = settings.data.get("text_lengths", "auto")
    padded_lengths(wanted, 1, accelerated=True)  # raises if it is invalid
    return wanted if wanted != "auto" else "padded" if machine.gpu.name == CPU else "bucketed"


def _is_mixed(wanted: str | None, machine: Machine) -> bool:
    """Resolve `auto` as in training: bfloat16 autocast on a GPU, float32 on a CPU."""
    kind = "cpu" if machine.gpu.name == CPU else "cuda"
    if wanted in ("auto", None):
        return kind == "cuda"
    return not precision(wanted, kind).startswith("32")


def _stage(plan: StagePlan, unit: int) -> StageRecipe:
    """Return a stage for planning; raise UserError unless autoencoder factor × patch divides its resolution."""
    stage = plan.settings
    if stage.resolution % unit:
        raise UserError(
            f"{stage.resolution} is not a multiple of {unit} (autoencoder factor x patch)",
            where=f"schedule.stages.{plan.name}.resolution",
            hint=f"set it to {max(1, round(stage.resolution / unit)) * unit}",
        )
    same = ("resolution", "batch_size", "micro_batch_size", "routing_rate", "context_length", "warmup_samples")
    values = {name: getattr(stage, name) for name in same}
    values["accumulation"] = plan.accumulation
    return StageRecipe(plan.name, samples=plan.samples, checkpointing=stage.activation_checkpointing, **values)
