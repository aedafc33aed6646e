"""From a training run's settings to the plain recipe that planning reckons with."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hdm_lightning.encoders.sources import locate_model
from hdm_lightning.errors import UserError
from hdm_lightning.planning.architectures import AUTOENCODERS, TEXT_ENCODERS
from hdm_lightning.planning.autoencoder_cost import AutoencoderArchitecture
from hdm_lightning.planning.machine import Machine
from hdm_lightning.planning.recipe import Dataset, Recipe, StageRecipe
from hdm_lightning.planning.settings import PlanSettings
from hdm_lightning.planning.text_cost import TextArchitecture
from hdm_lightning.training.checks import model_config_from
from hdm_lightning.training.hardware import PRECISIONS, SHARDED, STRATEGIES
from hdm_lightning.training.optimization.optimizers import check_optimizer
from hdm_lightning.training.settings import TrainerSettings, TrainSettings
from hdm_lightning.training.stages import StagePlan, plan_stages

CPU = "cpu"


@dataclass(frozen=True)
class EncoderConfigs:
    """Configurations of the encoders, as their ``config.json`` says."""

    text: Mapping[str, Any]
    autoencoder: Mapping[str, Any]


def encoder_configs(settings: TrainSettings) -> EncoderConfigs:
    """The encoders' configurations, written out in this package or read from their folders.

    Raises:
        UserError: a model is neither known nor at hand.
    """
    return EncoderConfigs(
        _config_of(settings.text_encoder.name, TEXT_ENCODERS, "text_encoder.name"),
        _config_of(settings.vae.name, AUTOENCODERS, "vae.name"),
    )


def recipe_from(settings: TrainSettings, wanted: PlanSettings, encoders: EncoderConfigs, machine: Machine) -> Recipe:
    """The recipe of a run on a machine.

    Raises:
        UserError: naming the key that does not fit the others.
    """
    _check_trainer(settings.trainer)
    check_optimizer(settings.optimizer)
    for where, limit in (
        ("text_encoder.max_tokens", settings.text_encoder.max_tokens),
        ("vae.max_pixels", settings.vae.max_pixels),
    ):
        if limit < 1:
            raise UserError(f"{limit} is below 1", where=where, hint="give 1 or more; 1 takes one sample at a time")
    network = model_config_from(settings.model)
    autoencoder = _architecture(AutoencoderArchitecture, encoders.autoencoder, "vae.name")
    text = _architecture(TextArchitecture, encoders.text, "text_encoder.name")
    if text.width != network.context_width:
        raise UserError(
            f"the text encoder {settings.text_encoder.name} is {text.width} wide, the model's context "
            f"{network.context_width}",
            where="model.context_width",
            hint=f"set model.context_width={text.width}, or choose another text_encoder",
        )
    plans = plan_stages(settings.schedule, machine.count)
    for plan in plans:
        _check_resolution(plan, autoencoder.factor * network.patch_size)
    averages = settings.callbacks.ema
    return Recipe(
        network=network,
        stages=tuple(_stage(plan) for plan in plans),
        text=text,
        autoencoder=autoencoder,
        dataset=Dataset(**asdict(wanted.dataset)),
        text_max_tokens=settings.text_encoder.max_tokens,
        autoencoder_max_pixels=settings.vae.max_pixels,
        averages=len(averages.halflife_samples) + len(averages.sigma_rel),
        muon=settings.optimizer.name == "muon",
        compiled=settings.trainer.compile,
        half_gradients=settings.trainer.compress_gradients,
        sharded=settings.trainer.strategy == SHARDED and machine.count > 1,
        mixed=_is_mixed(settings.trainer.precision, machine),
        checkpoints_kept=settings.callbacks.checkpoints.keep,
    )


def _check_trainer(trainer: TrainerSettings) -> None:
    """What hdm-train would refuse on any machine; what it refuses on some, it tells there."""
    for key, value, known in (
        ("precision", trainer.precision, ("auto", *PRECISIONS)),
        ("strategy", trainer.strategy, STRATEGIES),
    ):
        if value not in known:
            raise UserError(
                f"'{value}' is none of {', '.join(known)}", where=f"trainer.{key}", hint=f"trainer.{key}={known[0]}"
            )


def _is_mixed(precision: str, machine: Machine) -> bool:
    """`auto` is bfloat16 autocast on a GPU and float32 on a CPU, as in training."""
    return machine.gpu.name != CPU if precision == "auto" else not precision.startswith("32")


def _config_of(name: str, known: Mapping[str, Mapping[str, Any]], where: str) -> Mapping[str, Any]:
    if name in known:
        return known[name]
    try:
        folder = locate_model(name, where=where, required=["config.json"])
    except UserError as error:
        raise UserError(
            error.what, where=where, hint=f"{error.hint}; sizes known without it: {', '.join(known)}"
        ) from error
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _architecture(kind: Any, config: Mapping[str, Any], where: str) -> Any:
    try:
        return kind.from_config(config)
    except ValueError as error:
        raise UserError(str(error), where=where, hint="choose a model of that kind") from error


def _check_resolution(plan: StagePlan, unit: int) -> None:
    if plan.settings.resolution % unit:
        raise UserError(
            f"{plan.settings.resolution} is not a multiple of {unit} (autoencoder factor x patch)",
            where=f"schedule.stages.{plan.name}.resolution",
            hint=f"set it to {max(1, round(plan.settings.resolution / unit)) * unit}",
        )


def _stage(plan: StagePlan) -> StageRecipe:
    stage = plan.settings
    return StageRecipe(
        name=plan.name,
        resolution=stage.resolution,
        samples=plan.samples,
        batch_size=stage.batch_size,
        micro_batch_size=stage.micro_batch_size,
        routing_rate=stage.routing_rate,
        context_length=stage.context_length,
        checkpointing=stage.activation_checkpointing,
        warmup_samples=stage.warmup_samples,
    )
