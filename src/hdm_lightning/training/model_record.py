"""The record of a training for a model's folder and card: how long, on which data, with which result."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_files import is_on_hub, shown_name
from hdm_lightning.interop.model_card import SAMPLES
from hdm_lightning.training import run_folder
from hdm_lightning.training.callbacks.keep_ledger import Ledger
from hdm_lightning.training.callbacks.weight_averages import averages_state
from hdm_lightning.training.checkpoint_io import network_weights
from hdm_lightning.training.composition import build, plain
from hdm_lightning.training.initial_weights import read_init
from hdm_lightning.training.run_recipe import Run, group, with_stage
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.whole_files import write_bytes

SAMPLES_OF_STAGE = "samples"
"""Folder of a stage's preview images."""


def trained_weights(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the weights of the network in a training checkpoint: raw ones, and the first average or None."""
    raw, averages = network_weights(checkpoint), averages_state(checkpoint)
    return raw, raw | averages["shadows"][0] if averages and averages["shadows"] else None


def sampling_of(run: Run, plan: StagePlan) -> dict[str, Any]:
    """Return the run's sampling settings for the model's folder."""
    images = OmegaConf.select(run.config, "callbacks.sample_images") or {}
    solver, side = {"steps": 24, "guidance_scale": 4.0, "shift": 1.0}, plan.settings.resolution
    return {"height": side, "width": side, **{key: images.get(key, value) for key, value in solver.items()}}


def write_samples(run: Run, plan: StagePlan, folder: Path) -> None:
    """Copy a stage's newest sheet of preview images, the closest to square, into a model's folder for its card."""
    drawn = sorted((run_folder.checkpoint_folder(run.run_dir, plan).parent / SAMPLES_OF_STAGE).glob("*-*x*.png"))
    newest = [path for path in drawn if path.name.partition("-")[0] == drawn[-1].name.partition("-")[0]]
    if newest:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / SAMPLES, min(newest, key=_squareness).read_bytes())


def _squareness(path: Path) -> float:
    """Return 0 for a sheet of square images, by its file name, and more the longer they are."""
    width, height = (int(side) for side in path.stem.rpartition("-")[2].split("x"))
    return abs(math.log(width / height))


def run_record(run: Run) -> dict[str, Any]:
    """Return what every model card shows of a run: its name, seed, time, version and license."""
    environment = run_folder.read_environment(run.run_dir)
    return {
        "name": str(run.config.name),
        "seed": int(run.config.seed),
        "seconds": round(Ledger(run.run_dir / run_folder.LEDGER, writes=False).spent("seconds"), 1),
        "license": group(run.config, run.recipe, "hub").license,
        "commit": environment.get("commit"),
        "hdm_lightning": environment.get("hdm_lightning"),
    }


def training_record(run: Run, plan: StagePlan) -> dict[str, Any]:
    """Return the record of the training up to a stage's end for the model card, without local paths."""
    stages = [run_folder.read_done(run.run_dir, each) for each in run.plans[: plan.number]]
    return {
        **run_record(run),
        "samples": sum(stage["samples"] for stage in stages),
        "stages": stages,
        "resolution": plan.settings.resolution,
        **data_record(run, plan),
        "prompts": list(OmegaConf.select(run.config, "callbacks.sample_images.prompts") or []),
        **base_record(run),
    }


def base_record(run: Run) -> dict[str, Any]:
    """Return name and license of the model that the run started from under `base`; empty if from scratch."""
    began = read_init(run.run_dir)
    if not (source := began.get("source")):
        return {}
    name = str(source)
    return {"base": {"name": shown_name(name), "license": began.get("license"), "hub": is_on_hub(name)}}


def data_record(run: Run, plan: StagePlan) -> dict[str, Any]:
    """Return the names of a stage's sources, their number of samples, and the caption settings."""
    config = with_stage(run.config, plan)
    given = plain(config, "data")
    train = given.get("train")
    found: dict[str, Any] = {}
    if train is not None:
        found["data"] = [_source(each) for each in (train if isinstance(train, list) else [train])]
    try:
        data: Any = build(config, "data", **run.recipe.data_arguments(run))
        found["data_samples"] = data.train_plan.samples
    except (UserError, AttributeError, OSError):  # of a kind without a plan, or no longer there
        found["data_samples"] = None
    rules = {key: value for key, value in (given.get("captions") or {}).items() if not key.startswith("_")}
    found["captions"] = {"tokens at most": plan.settings.context_length, **rules}
    return found


def _source(given: Any) -> dict[str, Any]:
    """Return a source's weight, and a name that reveals nothing about this machine."""
    if not isinstance(given, Mapping):
        return {"source": public_name(given)}
    urls = given.get("urls")
    names = [public_name(each) for each in (urls if isinstance(urls, list) else [urls])]
    return {"source": ", ".join(names), "weight": given.get("weight")}


def public_name(url: Any) -> str:
    """Return a source's name without anything that belongs to a machine or a person.

    The base name of a folder or file, or a URL without login and query; a command is only called one, as its arguments
    may contain folders, logins or keys.
    """
    text = str(url)
    if text.startswith("pipe:"):
        return "a command"
    parts = urlsplit(text)
    if parts.scheme and parts.scheme != "file" and parts.netloc:
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    name = Path(text.partition("?")[0] if "://" in text else text).name
    return name if name.strip(".") else "a folder"
