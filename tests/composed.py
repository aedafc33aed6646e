"""Trainings at toy size: a few groups of keys, laid over what the commands compose without any override."""

import functools
import json
from pathlib import Path

from omegaconf import OmegaConf, open_dict

from hdm_lightning.cli import overrides
from hdm_lightning.training import job
from hdm_lightning.training.checkpoint_io import checkpoints_in, network_weights, read_checkpoint
from hdm_lightning.training.launch import launch
from hdm_lightning.training.schedule import run_schedule

NO_PICTURES = "callbacks.sample_images.prompts=[]"
BASES = {
    "train": ["model=xut_base", "vae=folder", "trainer=cpu", "data.train=nowhere", "vae.name=nowhere", NO_PICTURES],
    "train_vae": ["~vae_training", "trainer=cpu", "data.train=nowhere"],
}


@functools.cache
def base(command):
    """The configuration of `train` or `train_vae`, as text."""
    return OmegaConf.to_yaml(overrides.composed(command, BASES[command]))


def composed(groups):
    """A configuration with some groups' keys replaced, and with exactly the stages that they name."""
    command = "train" if "schedule" in groups else "train_vae"
    config = OmegaConf.create(base(command))
    with open_dict(config):
        if command == "train":
            config.schedule.stages = {}
    return OmegaConf.merge(config, groups)


def check_job(groups):
    """`training.job.check_job` of the composed configuration."""
    return job.check_job(composed(groups))


def run_job(checked):
    """Train as the command does; returns the exit status."""
    return launch(run_schedule, checked.order(), checked.processes)


def folder_of(run):
    """A run's folder; in all functions here a run is its configuration or its folder."""
    return run if isinstance(run, Path) else Path(run["run_dir"])


def saved_in(run, stage):
    """Paths of a stage's checkpoints, the newest last."""
    return checkpoints_in(folder_of(run) / stage / "checkpoints")


def done_of(run, stage="01-px16"):
    """What a stage has recorded of its end."""
    return json.loads((folder_of(run) / stage / "done.json").read_text())


def ledger_of(run):
    """The events of a run's ledger."""
    return [json.loads(line) for line in (folder_of(run) / "ledger.jsonl").read_text().splitlines()]


def scalars_of(run, tag, stage="01-px16"):
    """The points of a curve that a stage has written for TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder_of(run) / stage / "tensorboard")).Reload().Scalars(tag)


def end_of(run, stage="01-px16"):
    """What the newest checkpoint of a stage holds."""
    return read_checkpoint(saved_in(run, stage)[-1])


def weights_of(run, stage="01-px16"):
    """The network's weights in the newest checkpoint of a stage."""
    return network_weights(end_of(run, stage))


OPTIMIZERS = ("torch.optim.AdamW", "hdm_lightning.training.optimization.muon.MuonAdamW")


def tiny_job(folder, shards, text_encoder, autoencoder, optimizer, trainer):
    """A training of one stage of 64 steps on a device and in a precision: what the GPU's tests run."""
    stage = {"resolution": 16, "samples": 512, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 0.05}
    return {
        "name": "toy",
        "run_dir": str(folder),
        "model": {"patch_size": 1, "width": 64, "mlp_width": 96, "heads": 2, "head_dim": 32, "context_width": 16},
        "text_encoder": {"name": str(text_encoder)},
        "vae": {"name": str(autoencoder)},
        "data": {"train": str(shards), "num_workers": 0, "lanes": 4, "window": 4},
        "validation": {"samples": 8, "batch_size": 4},
        "optimizer": {"_target_": optimizer},
        "trainer": trainer,
        "callbacks": {"progress": None},
        "schedule": {"stages": {"px16": {**stage, "context_length": 8, "gradient_clip": 1.0}}},
    }
