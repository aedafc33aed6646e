"""The cost of a run, counted from its folder: operations of the network, and of the autoencoder if it was trained too.

Matrix products and convolutions count, two operations per multiply-add; a training step is three times a forward pass.
Encoders that were not trained for the task are listed instead: they are the same for everybody.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hdm_lightning.encoders.vae_folder import locate_autoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.challenge_tasks import Task
from hdm_lightning.generation.image_files import sha256_of
from hdm_lightning.interop.layouts import FINAL_FOLDER
from hdm_lightning.interop.pipeline_folder import WEIGHT_KINDS, read_pipeline_folder
from hdm_lightning.json_files import read_object
from hdm_lightning.profiling.encoder_costs import AutoencoderArchitecture
from hdm_lightning.profiling.operations import TRAINING_FACTOR, training_flops
from hdm_lightning.training import run_folder
from hdm_lightning.training.callbacks.keep_ledger import Ledger
from hdm_lightning.training.recorded import (
    TrainSettings,
    is_training,
    model_config_from,
    read_recorded,
    recorded_settings,
)
from hdm_lightning.training.stages import plan_stages


@dataclass(frozen=True)
class Cost:
    """What an entry's training cost.

    Attributes:
        operations: of all trainings on the task; None if they were not counted.
        usd: rent of the machine; None if it had none.
        hours: wall-clock time of all trainings together.
        hardware: what it ran on.
        told_by: "run" (counted from the run's own folder) or "entrant".
    """

    operations: float | None
    usd: float | None
    hours: float
    hardware: str
    told_by: str


@dataclass(frozen=True)
class CountedRun:
    """A finished run of `hdm-train` on a task's data.

    Attributes:
        cost: of its trainings.
        weights: SHA-256 of each kind of weights that it has.
        pretrained: encoders that were not trained for the task.
        settings: of the run, for the record.
    """

    cost: Cost
    weights: Mapping[str, str]
    pretrained: tuple[str, ...]
    settings: Mapping[str, Any]


def count_run(run: Path, task: Task) -> CountedRun:
    """Count the cost of a run, and check it against the rules: finished, from random weights, on the task's data alone.

    Raises:
        UserError: it is not finished, or breaks the rules.
    """
    if not run_folder.is_finished(run):
        raise UserError(
            "is not a finished run of hdm-train", where=str(run), hint="pass the folder that the training wrote"
        )
    settings = recorded_settings(run / run_folder.CONFIG)
    if settings.init or settings.adapter:
        raise UserError("did not start from random weights", where=str(run), hint="train without init and adapter")
    task.require_data(_training_folder(settings))
    operations, ledgers = _network_operations(run, settings), [Ledger(run / run_folder.LEDGER)]
    pretrained = [settings.text_encoder.name]
    if autoencoder := autoencoder_run(settings.vae.name):
        operations += _autoencoder_operations(autoencoder, task)
        pretrained += _perceptual_network(autoencoder)
        ledgers.append(Ledger(autoencoder / run_folder.LEDGER))
    else:
        pretrained.append(settings.vae.name)
    usd = sum(ledger.spent("cost_usd") for ledger in ledgers)
    hours = sum(ledger.spent("seconds") for ledger in ledgers) / 3600
    environment = run_folder.read_environment(run)
    devices = ", ".join(map(str, environment.get("devices") or ()))
    hardware = devices or f"CPU, {environment.get('cpu_count', '?')} cores"
    folder = read_pipeline_folder(run / FINAL_FOLDER)
    present = [kind for kind in WEIGHT_KINDS if folder.has(kind)]
    weights: dict[str, str] = {kind: sha256_of(*folder.weight_files(kind)) for kind in present}
    told = {"model": settings.model, "seed": settings.seed, "schedule": asdict(settings.schedule)}
    cost = Cost(float(operations), usd or None, hours, hardware, "run")
    return CountedRun(cost, weights, tuple(pretrained), told)


def autoencoder_run(name: str) -> Path | None:
    """Return the run that trained an autoencoder, by any of its names; None if no run of this package did.

    Raises:
        UserError: it is not there, so its cost is unknown.
    """
    folder = locate_autoencoder(name, where="vae.name").resolve()
    if folder.parent.name == FINAL_FOLDER:  # the copy in a pipeline's folder
        run = folder.parents[1]
        copied = (run / run_folder.CONFIG).is_file() and is_training(run / run_folder.CONFIG)
        return autoencoder_run(recorded_settings(run / run_folder.CONFIG).vae.name) if copied else None
    run = folder.parent
    return run if folder.name == FINAL_FOLDER and (run / run_folder.CONFIG).is_file() else None


def _training_folder(settings: TrainSettings) -> Path:
    source = settings.data.get("train")
    for stage in settings.schedule.stages.values():  # each can have data of its own
        data = {**settings.data, **stage.data}
        if not isinstance(source, str) or data["train"] != source or data.get("validation") is not None:
            raise UserError("is more than one folder", where="data.train", hint="train on the task's folder alone")
    return Path(str(source))


def _network_operations(run: Path, settings: TrainSettings) -> int:
    config, total = model_config_from(settings.model), 0
    folder = read_pipeline_folder(run / FINAL_FOLDER)
    factor = AutoencoderArchitecture.from_config(read_object(folder.vae / "config.json")).factor
    for plan in plan_stages(settings.schedule, 1):
        stage, cells = plan.settings, plan.settings.resolution // factor
        samples = int(run_folder.read_done(run, plan)["samples"])
        total += samples * training_flops(config, (cells, cells), stage.context_length, stage.routing_rate)
    return total


def _autoencoder_operations(run: Path, task: Task) -> int:
    """Count encoding and decoding of every image and patch; the losses on the reconstruction are not counted."""
    recorded = read_recorded(run / run_folder.CONFIG)
    if recorded["autoencoder"].get("source"):  # what it began with would cost nothing
        hint = "train it from scratch, or use a pretrained autoencoder as it is"
        raise UserError("did not start from random weights", where=str(run), hint=hint)
    task.require_data(Path(str(recorded["data"]["train"])))
    architecture = AutoencoderArchitecture.from_config(read_object(run / FINAL_FOLDER / "config.json"))
    samples, side = int(recorded["stage"]["samples"]), int(recorded["stage"]["resolution"])
    patches = recorded.get("patches") or {}
    size = patches.get("size_px")
    small = min(samples, int(patches.get("samples") or 0)) if size else 0
    sizes = [(small, int(size or side)), (samples - small, side)]
    return sum(
        TRAINING_FACTOR * count * (architecture.encode_flops(px, px) + architecture.decode_flops(px, px))
        for count, px in sizes
    )


def _perceptual_network(run: Path) -> list[str]:
    """Return the network of an autoencoder's perceptual loss, if it has one."""
    loss = read_recorded(run / run_folder.CONFIG)["loss"]
    return [loss["perceptual_network"]] if loss.get("perceptual_network") and loss.get("perceptual_weight") else []
