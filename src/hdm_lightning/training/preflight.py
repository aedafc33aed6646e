"""Everything that can be known to be wrong before the first weight is allocated."""

from pathlib import Path

from hdm_lightning.encoders.autoencoder_folder import locate_autoencoder, read_config
from hdm_lightning.encoders.pretrained import UNREADABLE, read_transformer_config
from hdm_lightning.encoders.sources import locate_model
from hdm_lightning.encoders.text import MODEL_FILES
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUTConfig
from hdm_lightning.training import run_folder
from hdm_lightning.training.hardware import local_devices
from hdm_lightning.training.initial_weights import find_weights
from hdm_lightning.training.launching.launched import outside_world_size
from hdm_lightning.training.settings import GuardSettings, TrainerSettings, TrainSettings
from hdm_lightning.training.stages import StagePlan


def check_encoder_limits(settings: TrainSettings) -> None:
    """What the frozen encoders take at once is at least something.

    Raises:
        UserError: naming `text_encoder.max_tokens` or `vae.max_pixels`.
    """
    limits = {
        "text_encoder.max_tokens": settings.text_encoder.max_tokens,
        "vae.max_pixels": settings.vae.max_pixels,
    }
    for where, limit in limits.items():
        if limit < 1:
            raise UserError(f"{limit} is below 1", where=where, hint="give 1 or more; 1 takes one sample at a time")


def check_text_encoder(settings: TrainSettings, model: XUTConfig) -> None:
    """The text encoder exists and is as wide as the network's context.

    Raises:
        UserError: naming `text_encoder.name` or `model.context_width`.
    """
    width = text_width(settings.text_encoder.name)
    if width != model.context_width:
        raise UserError(
            f"the text encoder {settings.text_encoder.name} is {width} wide, the model's context {model.context_width}",
            where="model.context_width",
            hint=f"set model.context_width={width}, or choose another text_encoder",
        )


def text_width(name: str) -> int:
    """Width of a text encoder's hidden states, from its configuration file alone.

    Raises:
        UserError: there is none, or transformers cannot read its configuration.
    """
    where = "text_encoder.name"
    folder = locate_model(name, where=where, required=MODEL_FILES)
    try:
        return int(read_transformer_config(folder).get_text_config().hidden_size)
    except (*UNREADABLE, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"transformers cannot read the configuration of a text encoder from {folder} ({reason})",
            where=where,
            hint="give a folder written by save_pretrained, of an architecture that transformers knows",
        ) from error


def check_autoencoder(settings: TrainSettings, model: XUTConfig, plans: list[StagePlan]) -> int:
    """The autoencoder exists, has the network's channels, and divides every resolution; returns its factor.

    Raises:
        UserError: naming `vae.name`, `model.channels` or a stage's resolution.
    """
    folder = locate_autoencoder(settings.vae.name, where="vae.name", made_by=settings.vae.made_by)
    config = read_config(folder, where="vae.name")
    channels, factor = int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1)
    if channels != model.channels:
        raise UserError(
            f"the autoencoder {settings.vae.name} has {channels} latent channels, the model {model.channels}",
            where="model.channels",
            hint=f"set model.channels={channels}, or choose another vae",
        )
    unit = factor * model.patch_size
    for plan in plans:
        if plan.settings.resolution % unit:
            nearest = max(1, round(plan.settings.resolution / unit)) * unit
            raise UserError(
                f"{plan.settings.resolution} is not a multiple of {unit} (autoencoder factor {factor} x patch "
                f"{model.patch_size})",
                where=f"schedule.stages.{plan.name}.resolution",
                hint=f"set it to {nearest}",
            )
    return factor


def check_world_size(trainer: TrainerSettings) -> int:
    """How many processes the run will have, on all machines.

    Raises:
        UserError: naming `trainer.nodes`, for several machines that nothing has started processes on.
    """
    outside = outside_world_size()
    if outside is not None:
        return outside
    if trainer.nodes != 1:
        raise UserError(
            f"{trainer.nodes} machines, but neither torchrun nor srun has started this process",
            where="trainer.nodes",
            hint="start the command by torchrun or srun on every machine; see docs/survival.md",
        )
    return local_devices(trainer)


def check_stops(settings: TrainSettings, plans: list[StagePlan]) -> None:
    """What is to end a stage early can be measured.

    Raises:
        UserError: a budget in dollars where a device costs nothing, a plateau where nothing is validated.
    """
    for plan in plans:
        stop, where = plan.settings.stop, f"schedule.stages.{plan.name}.stop"
        if stop.max_cost_usd is not None and not settings.trainer.usd_per_device_hour > 0:
            what, hint = "no device has a price", "set trainer.usd_per_device_hour, or stop.max_hours instead"
            raise UserError(what, where=f"{where}.max_cost_usd", hint=hint)
        if stop.plateau_samples is not None and settings.validation.samples < 1:
            what = "without validation samples there is no loss that could stand still"
            raise UserError(what, where=f"{where}.plateau_samples", hint="set validation.samples")


def check_init(settings: TrainSettings, plans: list[StagePlan]) -> None:
    """The model to start from is there, as long as it may be needed.

    Raises:
        UserError: naming `init`.
    """
    if settings.init is not None and not run_folder.stage_is_done(Path(settings.run_dir), plans[0]):
        find_weights(settings.init)


def check_guard(guard: GuardSettings) -> None:
    """The rules by which a training counts as gone wrong make sense.

    Raises:
        UserError: naming the key under `guard`.
    """
    if guard.spike_factor is not None and not guard.spike_factor > 1:
        raise UserError(
            f"{guard.spike_factor:g} times the running mean is no spike",
            where="guard.spike_factor",
            hint="give a factor above 1, e.g. 3, or null to look for losses that are not finite only",
        )
    for key, least in (("spike_steps", 1), ("warmup_steps", 0), ("rewinds", 0)):
        if getattr(guard, key) < least:
            raise UserError(
                f"{getattr(guard, key)} is below {least}", where=f"guard.{key}", hint=f"give {least} or more"
            )
