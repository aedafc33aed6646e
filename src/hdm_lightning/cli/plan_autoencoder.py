"""`hdm-plan autoencoder`: the memory of an autoencoder's training on a device, and what fits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from omegaconf import DictConfig, OmegaConf
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hdm_lightning.cli.arguments import check_group
from hdm_lightning.cli.autoencoder_step import AutoencoderStep, StepSettings
from hdm_lightning.cli.outputs import require_file
from hdm_lightning.errors import UserError
from hdm_lightning.profiling.architectures import AUTOENCODERS
from hdm_lightning.profiling.forecast import plain as plain_values
from hdm_lightning.profiling.gpus import parse_gpus
from hdm_lightning.profiling.live_memory import StepMemory, step_memory
from hdm_lightning.profiling.memory import GIB
from hdm_lightning.training.autoencoder_checks import AutoencoderSource, autoencoder_config, check_settings
from hdm_lightning.training.autoencoder_run import AutoencoderRecipe
from hdm_lightning.training.composition import parse, plain
from hdm_lightning.training.run_recipe import group, with_stage

# Where presets look for LPIPS, whose packages a planning machine need not have.
_STAND_IN = "efficientnet_lite0"


@dataclass
class AutoencoderPlanSettings:
    """The keys beside those of `hdm-train-vae`."""

    gpus: str = "4x5090"  # a count and a name, ``4x5090``
    gpu_memory_gib: float | None = None  # memory of one device in place of the table's
    reserve_gib: Annotated[float, Ge(0)] = 1.5  # memory that is not tensors
    out: str | None = None  # file for the forecast as JSON; None writes none


@dataclass(frozen=True)
class AutoencoderPlan:
    """A forecast."""

    machine: str  # as asked for
    memory_gib: float  # of one device
    reserve_gib: float  # what of it is not tensors
    resolution: int  # pixels
    micro_batch: int  # samples a device takes at once
    memory: StepMemory  # of a step with that micro-batch
    largest: int  # the largest micro-batch that fits, 0 if not even one sample does
    out: str | None  # file to write

    @property
    def fits(self) -> bool:
        """Whether the step as configured fits."""
        return self.micro_batch <= self.largest

    def to_json(self) -> dict[str, Any]:
        """Plain values, sums included."""
        content: dict[str, Any] = plain_values(self)
        return {key: value for key, value in content.items() if key != "out"}


def plan_autoencoder(
    config: DictConfig | Mapping[str, Any], *, log: Callable[[str], None] = lambda _text: None
) -> AutoencoderPlan:
    """Forecast a composed configuration.

    Raises:
        UserError: naming the key and the hint.
    """
    config = OmegaConf.create(config if isinstance(config, DictConfig) else dict(config))
    own = set(AutoencoderPlanSettings.__dataclass_fields__)
    wanted = parse(AutoencoderPlanSettings, {key: plain(config, key) for key in own if key in config}, "")
    gpu, count = parse_gpus(wanted.gpus)
    room = _room_gib(wanted, gpu.memory_gib)
    if wanted.out is not None:
        require_file(Path(wanted.out), "out")
    recipe = AutoencoderRecipe()
    groups = {name: group(config, recipe, name) for name in recipe.groups}
    fields = _config_of(groups["autoencoder"])
    if groups["loss"].perceptual_network is not None:
        groups["loss"] = replace(groups["loss"], perceptual_network=_STAND_IN)
    (stage,) = recipe.plans(config, count)
    config.trainer.accelerator = "cpu"  # whatever is here, the plan is for another machine
    precision = str(plain(config, "trainer.precision"))
    config.trainer.precision = "auto" if precision == "16-mixed" else precision
    filled = with_stage(config, stage, **recipe.stage_values(config, stage))
    check_settings(groups, filled, stage, 2 ** (len(fields["block_out_channels"]) - 1))
    averages = OmegaConf.select(config, "callbacks.weight_averages.halflife_samples") or ()
    settings = StepSettings(groups, stage.settings, len(averages))
    mixed = not precision.startswith("32")
    micro_batches = 2 if stage.accumulation > 1 else 1
    asked = settings.stage.micro_batch_size

    def rehearsed(samples: int) -> StepMemory:
        log(f"rehearsing a step of {samples} × {settings.stage.resolution} px")
        sized = replace(settings, stage=replace(settings.stage, micro_batch_size=samples))
        return step_memory(partial(AutoencoderStep, sized, fields, mixed=mixed), micro_batches=micro_batches)

    memory, one_more = rehearsed(asked), rehearsed(asked + 1)
    # The line through the two: the parts of a peak grow with samples.
    free = (room - wanted.reserve_gib) * GIB - memory.peak
    largest = max(0, asked + int(free // max(1, one_more.peak - memory.peak)))
    return AutoencoderPlan(
        f"{count}x{gpu.name}", room, wanted.reserve_gib, settings.stage.resolution, asked, memory, largest, wanted.out
    )


def autoencoder_report(plan: AutoencoderPlan) -> RenderableType:
    """A table for the terminal, and what to set where the step does not fit."""
    title = f"memory of an autoencoder's step on one device of {plan.machine} ({plan.memory_gib:g} GiB)"
    table = Table(title=title, title_justify="left", show_header=False)
    memory = plan.memory
    rows = [
        ("parameters", f"{memory.parameters:,}"),
        ("micro-batch", f"{plan.micro_batch} × {plan.resolution} px"),
        ("weights, GiB", _gib(memory.weights)),
        ("moments of the optimizers", _gib(memory.moments)),
        ("averages", _gib(memory.averages)),
        ("activations, gradients, temporaries", _gib(memory.passing)),
        ("  gradients alone", _gib(memory.gradients)),
        ("beside tensors", f"{plan.reserve_gib:.2f}"),
        ("peak", _gib(memory.peak + int(plan.reserve_gib * GIB)) + ("" if plan.fits else " !")),
        ("largest micro-batch", str(plan.largest)),
    ]
    for row in rows:
        table.add_row(*row)
    return Group(table, *(Text(f"! {note}") for note in _notes(plan)))


def _notes(plan: AutoencoderPlan) -> list[str]:
    if plan.fits:
        return []
    if plan.largest:
        return [f"does not fit: set stage.micro_batch_size={plan.largest}, or stage.activation_checkpointing=true"]
    return ["not even one sample fits: stage.activation_checkpointing=true, patches, or a smaller stage.resolution"]


def _room_gib(wanted: AutoencoderPlanSettings, of_the_table: float) -> float:
    room = of_the_table if wanted.gpu_memory_gib is None else wanted.gpu_memory_gib
    check_group(wanted, "")
    if room <= wanted.reserve_gib:
        what = f"{room:g} GiB leave nothing beside the {wanted.reserve_gib:g} that are not tensors"
        raise UserError(what, where="gpu_memory_gib", hint="give more, or a smaller reserve_gib")
    return room


def _config_of(source: AutoencoderSource) -> dict[str, Any]:
    """Fields of the autoencoder, as this package knows them or its folder says."""
    if source.source is not None and source.source in AUTOENCODERS and source.config is None:
        return dict(AUTOENCODERS[source.source])
    try:
        return autoencoder_config(source)
    except UserError as error:
        known = ", ".join(AUTOENCODERS)
        raise UserError(error.what, where=error.where, hint=f"{error.hint}; known without it: {known}") from error


def _gib(value: int) -> str:
    return f"{value / GIB:.2f}"
