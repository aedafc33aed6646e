"""The plain fields of a network's training, for commands that read one (`hdm-plan`, `hdm-evaluate`) and build none.

An allow-list: of a composed configuration or a run's config.yaml nothing else is looked at, and
no `_target_` is called.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from omegaconf import DictConfig

from hdm_lightning.errors import UserError, did_you_mean
from hdm_lightning.models import XUTConfig
from hdm_lightning.training.composition import OF_HYDRA, parse
from hdm_lightning.training.groups import Guard, Validation
from hdm_lightning.training.record import TARGETS, recorded_values
from hdm_lightning.training.stages import Count, Interval, StageSettings, settings

__all__ = ["StageSettings", "TrainSettings", "model_config_from", "train_settings_from"]


@settings
class ScheduleSettings:
    """Named stages, in their order."""

    stages: dict[str, StageSettings]
    carry_moments: bool = False


@settings
class TextEncoderSettings:
    """Arguments of `load_text_encoder`, and on how many captions its states were whitened."""

    name: str
    layer: int = -1
    dtype: str = "auto"
    max_tokens: int = 65_536
    cache_size: Interval = 0
    whiten_captions: Interval = 0


@settings
class VaeSettings:
    """Arguments of `load_autoencoder`, and the command that trains the one meant."""

    name: str
    dtype: str = "auto"
    max_pixels: int = 5_500_000
    cache_size: Interval = 0
    mean: list[float] | None = None
    std: list[float] | None = None
    made_by: str | None = None


@settings
class OptimizerSettings:
    """The optimizer's kind (`adamw`, `muon` or whatever class) and the rule of learning rates."""

    name: str = "adamw"
    rule: str = "mup"
    eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_rounds: int = 5


@settings
class EmaSettings:
    """The weight averages."""

    halflife_samples: list[float] = field(default_factory=lambda: [500_000])
    ramp: float = 0.05
    sigma_rel: list[float] = field(default_factory=list)
    snapshot_every: Interval = 0
    snapshot_dtype: str = "float16"


@settings
class CheckpointSettings:
    """How many checkpoints stay on disk."""

    keep: int = 2
    every_minutes: float = 20.0


@settings
class SampleImageSettings:
    """How images were drawn during the training."""

    prompts: list[str] = field(default_factory=list)
    aspect_ratios: list[float] = field(default_factory=lambda: [1.0, 1.5, 0.6667])
    steps: Count = 24
    guidance_scale: float = 4.0
    shift: float = 1.0
    seed: int = 0


@settings
class CallbackSettings:
    """What of the callbacks says something about memory, disk and drawing."""

    ema: EmaSettings = field(default_factory=EmaSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    pictures: SampleImageSettings = field(default_factory=SampleImageSettings)
    progress_bar: bool = True
    extra: dict[str, Any] = field(default_factory=dict)


@settings
class TrainerSettings:
    """Devices, precision and what a device costs."""

    accelerator: str = "auto"
    devices: Any = 0
    nodes: Any = 1
    strategy: Any = "auto"
    precision: Any = "auto"
    compile: bool = False
    threads: Interval = 0
    usd_per_device_hour: float = 0.0
    peak_tflops: float | None = None
    compress_gradients: bool = False
    static_graph: bool = False


@settings
class LoggerSettings:
    """How often scalars are written, in optimizer steps, and into how many bins the loss by time falls."""

    every_steps: int = 20
    time_bins: int = 8


@settings
class TrainSettings:
    """A whole `hdm-train` run.

    Attributes:
        model: the fields of `XUTConfig`.
        data: plain arguments of `ShardDataModule`.
    """

    model: dict[str, Any]
    schedule: ScheduleSettings
    name: str = "train"
    run_dir: str = ""
    seed: int = 0
    resume: str = "auto"
    init: str | None = None
    text_encoder: TextEncoderSettings = field(default_factory=lambda: TextEncoderSettings(name=""))
    vae: VaeSettings = field(default_factory=lambda: VaeSettings(name=""))
    data: dict[str, Any] = field(default_factory=dict)
    validation: Validation = field(default_factory=Validation)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    callbacks: CallbackSettings = field(default_factory=CallbackSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    guard: Guard = field(default_factory=Guard)


def model_config_from(model: Mapping[str, Any]) -> XUTConfig:
    """The network's config from the `model` group, unknown keys and wrong values named."""
    known = list(XUTConfig.__dataclass_fields__)
    fields = {key: value for key, value in model.items() if key not in OF_HYDRA}
    for key in fields:
        if key not in known:
            raise UserError(f"unknown key '{key}'", where=f"model.{key}", hint=did_you_mean(key, known))
    try:
        return XUTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(str(error), where="model", hint="see conf/model/ for complete examples") from error


GROUPS = (
    *("model", "text_encoder", "vae", "data", "module", "optimizer", "lr_scheduler"),
    *("stage", "trainer", "hardware", "callbacks", "logger"),
)
"""Of a configuration whose groups make objects."""


def train_settings_from(config: DictConfig | Mapping[str, Any]) -> TrainSettings:
    """The fields of a composed configuration, or of one that a run of whatever version has recorded.

    Raises:
        UserError: naming the key: unknown, missing, or with a wrong value.
    """
    values: dict[str, Any] = recorded_values(config) if isinstance(config, DictConfig) else dict(config)
    found: TrainSettings = parse(TrainSettings, _former_spelling(values) if "module" in values else values, "")
    return found


def _former_spelling(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration whose groups make objects, as `TrainSettings` names them."""
    optimizer, callbacks = _group(values, "optimizer"), _group(values, "callbacks")
    trainer, hardware = _group(values, "trainer"), _group(values, "hardware")
    kinds = {target: name for name, target in TARGETS.items()}
    averages, images = _group(callbacks, "weight_averages"), _group(callbacks, "sample_images")
    kept = ("name", "run_dir", "seed", "resume", "init", "schedule", "validation", "guard")
    steps = ("prompts", "aspect_ratios", "steps", "guidance_scale", "shift", "seed")
    unknown = values.keys() - set(kept) - set(GROUPS)
    return {
        **{key: values[key] for key in values if key in unknown},  # named by the check that follows
        **{key: values[key] for key in kept if key in values},
        **{key: _group(values, key) for key in ("model", "text_encoder", "vae", "data")},
        "optimizer": {
            "name": kinds.get(values["optimizer"].get("_target_"), values["optimizer"].get("_target_")),
            "rule": values["module"].get("rule", "mup"),
            **_picked(optimizer, ("eps",)),
        },
        "trainer": {
            **_picked(trainer, ("accelerator", "devices", "strategy", "precision")),
            "nodes": trainer.get("num_nodes", 1),
            "static_graph": trainer.get("strategy") == "ddp_static_graph",
            **hardware,
        },
        "callbacks": {
            "ema": _picked(averages, ("halflife_samples", "ramp", "sigma_rel"))
            if averages
            else {"halflife_samples": []},
            "checkpoints": _picked(_group(callbacks, "checkpoint"), ("keep", "every_minutes")),
            "pictures": _picked(images, steps),
        },
    }


def _group(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key) or {}
    return {name: value for name, value in found.items() if name not in OF_HYDRA}


def _picked(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: values[key] for key in keys if values.get(key) is not None}
