"""`hdm-plan autoencoder`: device memory of autoencoder training, and the largest micro-batch that fits."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import diffusers  # noqa: F401 (must be imported before a rehearsal)
import torch
from annotated_types import Ge
from omegaconf import DictConfig, OmegaConf
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW, Optimizer

from hdm_lightning.autoencoding.efficientnet_lite0 import EfficientNetLite0
from hdm_lightning.autoencoding.losses import discriminator_hinge, generator_adversarial
from hdm_lightning.autoencoding.perceptual import lite0_distance
from hdm_lightning.autoencoding.reconstruction import Reconstruction
from hdm_lightning.cli.command import require_file
from hdm_lightning.errors import UserError
from hdm_lightning.profiling.encoder_costs import AUTOENCODERS
from hdm_lightning.profiling.gpus import parse_gpus
from hdm_lightning.profiling.live_memory import LiveMemory
from hdm_lightning.profiling.memory import GIB
from hdm_lightning.profiling.plan_report import gib
from hdm_lightning.training.autoencoder_checks import AutoencoderSource, autoencoder_config, check_settings
from hdm_lightning.training.autoencoder_run import AutoencoderRecipe, build_discriminator
from hdm_lightning.training.composition import parse, plain
from hdm_lightning.training.modules.adversarial import AdversarialTerm, GeneratorObjective, frozen_call
from hdm_lightning.training.modules.autoencoder_module import adamw_groups
from hdm_lightning.training.modules.autoencoder_network import AutoencoderNetwork, build_vae
from hdm_lightning.training.run_recipe import group, with_stage

# The first step allocates the optimizer's moments at its end, so the second step has the peak.
_STEPS = 2
# Replaces the presets' LPIPS, whose packages may be missing on the planning machine.
_STAND_IN = "efficientnet_lite0"


@dataclass
class AutoencoderPlanSettings:
    """The keys added to those of `hdm-train-vae`."""

    gpus: str = "4x5090"  # a count and a name, ``4x5090``
    gpu_memory_gib: float | None = None  # memory of one device; replaces the table's
    reserve_gib: Annotated[float, Ge(0)] = 1.5  # memory that is not tensors
    out: str | None = None  # file for the forecast as JSON; None writes none


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors on one device, without library workspaces and allocator overhead."""

    parameters: int  # number of parameters of the model
    weights: int  # of all networks
    gradients: int  # of trained parameters
    moments: int  # two per trained parameter
    averages: int  # of the model's weights
    peak: int  # most bytes alive at once, including the above

    @property
    def kept(self) -> int:
        """Bytes kept between steps."""
        return self.weights + self.moments + self.averages

    @property
    def passing(self) -> int:
        """Bytes allocated only within a step: activations, gradients, temporaries."""
        return self.peak - self.kept


@dataclass(frozen=True)
class AutoencoderPlan:
    """Memory forecast of autoencoder training."""

    machine: str  # as requested
    memory_gib: float  # of one device
    reserve_gib: float  # part of it not used by tensors
    resolution: int  # pixels
    micro_batch: int  # samples per device
    memory: StepMemory  # of a step with this micro-batch
    largest: int  # the largest micro-batch that fits, 0 if not even one sample does

    @property
    def fits(self) -> bool:
        """Whether the configured step fits."""
        return self.micro_batch <= self.largest


def plan_autoencoder(
    config: DictConfig | Mapping[str, Any], *, log: Callable[[str], None] = lambda _text: None
) -> AutoencoderPlan:
    """Forecast a composed configuration; `log` receives progress messages."""
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
    config.trainer.accelerator = "cpu"  # the plan is for another machine
    precision = str(plain(config, "trainer.precision"))
    config.trainer.precision = "auto" if precision == "16-mixed" else precision
    filled = with_stage(config, stage, **recipe.stage_values(config, stage))
    check_settings(groups, filled, stage, 2 ** (len(fields["block_out_channels"]) - 1))
    averages = OmegaConf.select(config, "callbacks.weight_averages.halflife_samples") or ()
    mixed = not precision.startswith("32")
    micro_batches = 2 if stage.accumulation > 1 else 1
    resolution, asked = stage.settings.resolution, stage.settings.micro_batch_size

    def rehearsed(samples: int) -> StepMemory:
        log(f"rehearsing a step of {samples} × {resolution} px")
        sized = replace(stage.settings, micro_batch_size=samples)
        step = partial(AutoencoderStep, groups, sized, fields, averages=len(averages), mixed=mixed)
        return step_memory(step, micro_batches=micro_batches)

    memory, one_more = rehearsed(asked), rehearsed(asked + 1)
    # Extrapolate linearly from the two: peak memory grows with samples.
    free = (room - wanted.reserve_gib) * GIB - memory.peak
    largest = max(0, asked + int(free // max(1, one_more.peak - memory.peak)))
    return AutoencoderPlan(f"{count}x{gpu.name}", room, wanted.reserve_gib, resolution, asked, memory, largest)


def _room_gib(wanted: AutoencoderPlanSettings, of_the_table: float) -> float:
    room = of_the_table if wanted.gpu_memory_gib is None else wanted.gpu_memory_gib
    if room <= wanted.reserve_gib:
        what = f"{room:g} GiB leave no memory beyond the reserve of {wanted.reserve_gib:g} GiB"
        raise UserError(what, where="gpu_memory_gib", hint="use a larger value, or a smaller reserve_gib")
    return room


def _config_of(source: AutoencoderSource) -> dict[str, Any]:
    """Return the autoencoder's fields from this package's table or from its folder."""
    if source.source is not None and source.source in AUTOENCODERS and source.config is None:
        return dict(AUTOENCODERS[source.source])
    try:
        return autoencoder_config(source)
    except UserError as error:
        known = ", ".join(AUTOENCODERS)
        raise UserError(error.what, where=error.where, hint=error.hint_with(f"known without it: {known}")) from error


def autoencoder_report(plan: AutoencoderPlan) -> RenderableType:
    """Return a table for the terminal, with the settings to change if the step does not fit."""
    title = f"memory of an autoencoder step on one device of {plan.machine} ({plan.memory_gib:g} GiB)"
    table = Table(title=title, title_justify="left", show_header=False)
    memory = plan.memory
    rows = [
        ("parameters", f"{memory.parameters:,}"),
        ("micro-batch", f"{plan.micro_batch} × {plan.resolution} px"),
        ("weights, GiB", gib(memory.weights)),
        ("optimizer moments", gib(memory.moments)),
        ("averages", gib(memory.averages)),
        ("activations, gradients, temporaries", gib(memory.passing)),
        ("  gradients alone", gib(memory.gradients)),
        ("reserve", f"{plan.reserve_gib:.2f}"),
        ("peak", gib(memory.peak + int(plan.reserve_gib * GIB)) + ("" if plan.fits else " !")),
        ("largest micro-batch", str(plan.largest)),
    ]
    for row in rows:
        table.add_row(*row)
    return Group(table, *(Text(f"! {note}") for note in _autoencoder_notes(plan)))


def _autoencoder_notes(plan: AutoencoderPlan) -> list[str]:
    if plan.fits:
        return []
    if plan.largest:
        return [f"does not fit: set stage.micro_batch_size={plan.largest}, or stage.activation_checkpointing=true"]
    return ["not even one sample fits: set stage.activation_checkpointing=true, patches, or a smaller stage.resolution"]


def step_memory(build: Callable[[], "AutoencoderStep"], *, micro_batches: int = 1) -> StepMemory:
    """Rehearse training steps in eager mode on fake tensors.

    Kernels are those of a CPU, whose attention, like a GPU's, does not store the square score matrix.

    Args:
        build: builds the step; all libraries that it needs must already be imported, since constants of modules
            imported within a rehearsal would be fake tensors.
        micro_batches: micro-batches per optimizer step; with several, gradients are alive alongside activations.
    """
    with FakeTensorMode(), LiveMemory() as memory:
        step = build()
        for _ in range(_STEPS):
            step(micro_batches)
        trained = _bytes(step.trained)
        return StepMemory(
            parameters=sum(parameter.numel() for parameter in step.networks[0].parameters()),
            weights=sum(_bytes(network.state_dict().values()) for network in step.networks),
            gradients=trained,
            moments=2 * trained,
            averages=_bytes(step.averages),
            peak=memory.peak_bytes,
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class AutoencoderStep:
    """Plain steps on whole images, with discriminator and perceptual network as configured.

    EfficientNet-Lite0 stands in for LPIPS networks, whose packages may be missing.

    Args:
        groups: the settings groups of `hdm-train-vae` by name, see `training.autoencoder_checks`.
        stage: resolution, micro-batch and activation checkpointing.
        config: fields of the AutoencoderKL.
        averages: number of weight averages.
        mixed: bfloat16 autocast, as on a GPU; else float32.
    """

    def __init__(
        self, groups: Mapping[str, Any], stage: Any, config: dict[str, Any], *, averages: int = 1, mixed: bool = False
    ) -> None:
        self.stage, self.mixed = stage, mixed
        fields = {key: value for key, value in config.items() if not key.startswith("_")}
        network = AutoencoderNetwork(build_vae(fields), train_encoder=groups["autoencoder"].train_encoder)
        if stage.activation_checkpointing:
            network.vae.enable_gradient_checkpointing()
        for parameter in network.parameters():
            if parameter.dim() == 4:  # as in training; a module of fake tensors cannot be converted as a whole
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.network = network.train()
        self.discriminator = build_discriminator(groups["adversarial"])
        loss = groups["loss"]
        perceptual = None if loss.perceptual_network is None else EfficientNetLite0().eval().requires_grad_(False)
        distance = None if perceptual is None else partial(lite0_distance, perceptual)
        weights = (loss.pixel_weight, loss.perceptual_weight, loss.kl_weight)
        self.objective = GeneratorObjective(loss.pixel, *weights, distance)
        trained = [network for network in (self.network, self.discriminator) if network is not None]
        self.networks: list[nn.Module] = [*trained, *([] if perceptual is None else [perceptual])]
        self.trained = [each for network in trained for each in network.parameters() if each.requires_grad]
        settings = groups["adversarial"]
        self.adversarial = AdversarialTerm(settings.weight, settings.adaptive, settings.adaptive_largest)
        self.optimizers: list[Optimizer] = [AdamW(adamw_groups(network, 1e-4, 0.0), fused=True) for network in trained]
        averaged = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.averages = [each.detach().clone() for _ in range(averages) for each in averaged]

    def __call__(self, micro_batches: int) -> None:
        """Take one optimizer step."""
        for _ in range(micro_batches):
            self._micro_batch()
        for optimizer in self.optimizers:
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def _micro_batch(self) -> None:
        side = self.stage.resolution
        image = torch.zeros(self.stage.micro_batch_size, 3, side, side)
        with self._precision():
            posterior = self.network.posterior(image)
            output = self.network.decode(posterior.sample(torch.zeros_like(posterior.mean)))
            loss = self._generator_loss(Reconstruction(output, image, posterior))
        loss.backward()
        if self.discriminator is not None:
            with self._precision():
                hinge = discriminator_hinge(self.discriminator(image), self.discriminator(output.detach())).mean()
            hinge.backward()

    def _generator_loss(self, result: Reconstruction) -> Tensor:
        terms = self.objective.terms(result)
        loss = self.objective.total(terms).mean()
        if self.discriminator is None:
            return loss
        adversarial = generator_adversarial(frozen_call(self.discriminator, result.output)).mean()
        reconstruction = self.objective.reconstruction(terms).mean()
        balance = self.adversarial.balance(reconstruction, adversarial, self.network.last_layer())
        return loss + balance * self.adversarial.weight * adversarial

    def _precision(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.mixed else nullcontext()
