"""Keys of earlier versions: on a command line they are read or say where they went, in a run's record they are read."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hdm_lightning.errors import UserError

RENAMED = {"data.workers": "data.num_workers"}
"""Other names of keys, which mean the same."""
TRAINING = ("train", "train_vae", "plan", "plan_autoencoder")
MOVED = {
    "trainer.compile": "hardware.compile",
    "trainer.threads": "hardware.threads",
    "trainer.usd_per_device_hour": "hardware.usd_per_device_hour",
    "trainer.peak_tflops": "hardware.peak_tflops",
    "trainer.compress_gradients": "hardware.compress_gradients",
    "trainer.static_graph": "trainer.strategy=ddp_static_graph",
    "trainer.nodes": "trainer.num_nodes",
    "logger.every_steps": "trainer.log_every_n_steps",
    "logger.time_bins": "callbacks.loss_by_time.bins",
    "logger.progress_bar": "callbacks.progress=null",
    "callbacks.progress_bar": "callbacks.progress=null",
    "callbacks.ema.snapshot_every": "callbacks.store_averages.every_n_samples",
    "callbacks.ema.snapshot_dtype": "callbacks.store_averages.dtype",
    "callbacks.ema": "callbacks.weight_averages",
    "callbacks.checkpoints": "callbacks.checkpoint",
    "callbacks.pictures": "callbacks.sample_images",
    "callbacks.extra": "callbacks",
    "ema": "callbacks.weight_averages",
    "checkpoints": "callbacks.checkpoint",
    "validation.pictures": "validation.images",
    "optimizer.name": "optimizer",
    "optimizer.rule": "module.rule",
    "optimizer.muon_momentum": "optimizer.momentum",
    "optimizer.muon_rounds": "optimizer.rounds",
}
"""Key or group of an earlier version, and where its values are given now; parts of a group come before it."""
OPTIMIZERS = {"adamw": "torch.optim.AdamW", "muon": "hdm_lightning.training.optimization.muon.MuonAdamW"}
"""`optimizer.name` of earlier versions."""
_OVERRIDE = re.compile(r"(?P<mark>[~+]*)(?P<key>[\w./@]+)(?P<rest>=.*|)", re.DOTALL)
_ABSENT = object()


def present_keys(arguments: Sequence[str], config_name: str) -> list[str]:
    """The arguments of a Hydra command with the keys of now.

    Args:
        arguments: overrides and flags.
        config_name: the command's configuration.

    Raises:
        UserError: a key has moved.
    """
    if config_name not in TRAINING:
        return list(arguments)
    return [_present(argument, config_name) for argument in arguments]


def _present(argument: str, config_name: str) -> str:
    match = _OVERRIDE.fullmatch(argument)
    if match is None or argument.startswith("-"):
        return argument
    key, rest = match["key"], match["rest"]
    if key == "experiment" and config_name in ("train_vae", "plan_autoencoder"):
        raise UserError("is now a group of its own", where=key, hint=f"experiment_vae{rest}")
    for old in sorted(MOVED, key=len, reverse=True):
        if key == old or key.startswith(f"{old}."):
            new = MOVED[old]
            exact = f"{new}{key.removeprefix(old)}" + ("" if "=" in new else rest)
            raise UserError("has moved", where=key, hint=exact)
    return f"{match['mark']}{RENAMED.get(key, key)}{rest}"


def present_spelling(values: Mapping[str, Any]) -> DictConfig:
    """A recorded configuration with the keys of now; what has no place any more is left out."""
    config = OmegaConf.create(dict(values))
    name = OmegaConf.select(config, "optimizer.name", default=_ABSENT)
    if name is not _ABSENT:
        OmegaConf.update(config, "optimizer._target_", OPTIMIZERS.get(name, name), force_add=True)
    for old, new in {**MOVED, **RENAMED}.items():
        value = OmegaConf.select(config, old, default=_ABSENT)
        if value is _ABSENT:
            continue
        group, _, key = old.rpartition(".")
        del (OmegaConf.select(config, group) if group else config)[key]
        if "=" not in new and old != "optimizer.name":
            OmegaConf.update(config, new, value, force_add=True)
    return config
