"""Keys of earlier versions: translated in a run's record; on a command line, translated or refused with the new key."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigTypeError

from hdm_lightning.errors import UserError

RENAMED = {"data.workers": "data.num_workers"}
"""Former names of keys, which still work."""
EXPERIMENTS = ("experiment", "experiment_vae")
"""The groups of experiments for networks and for autoencoders."""
OTHER_COMMAND = {
    "train": "hdm-train-vae",
    "train_vae": "hdm-train",
    "plan": "hdm-plan autoencoder",
    "plan_autoencoder": "hdm-plan",
}
"""For each command's configuration, the same command for the other kind of training."""
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
"""Key or group of an earlier version, and where its values are set now; parts of a group come before the group."""
OPTIMIZERS = {"adamw": "torch.optim.AdamW", "muon": "hdm_lightning.training.optimization.muon.MuonAdamW"}
"""`_target_` for each `optimizer.name` of earlier versions."""
_OVERRIDE = re.compile(r"(?P<mark>[~+]*)(?P<key>[\w./@]+)(?P<rest>=.*|)", re.DOTALL)


def present_keys(arguments: Sequence[str], config_name: str) -> list[str]:
    """Return the arguments of a Hydra command with the current keys.

    Args:
        arguments: overrides and flags.
        config_name: name of the command's configuration.

    Raises:
        UserError: a key has moved.
    """
    if config_name not in OTHER_COMMAND:
        return list(arguments)
    return [_present(argument, config_name) for argument in arguments]


def _present(argument: str, config_name: str) -> str:
    match = _OVERRIDE.fullmatch(argument)
    if match is None or argument.startswith("-"):
        return argument
    key, rest = match["key"], match["rest"]
    _check_experiment(key, rest.removeprefix("="), config_name)
    for old in sorted(MOVED, key=len, reverse=True):
        if key == old or key.startswith(f"{old}."):
            new = MOVED[old]
            exact = f"{new}{key.removeprefix(old)}" + ("" if "=" in new else rest)
            raise UserError("has moved", where=key, hint=exact)
    return f"{match['mark']}{RENAMED.get(key, key)}{rest}"


def _check_experiment(key: str, choice: str, config_name: str) -> None:
    """Raise UserError if an experiment is for the other kind of training, naming the command for it."""
    if key not in EXPERIMENTS:
        return
    own, other = EXPERIMENTS if config_name in ("train", "plan") else EXPERIMENTS[::-1]
    if choice in _choices(own) and key != own:
        raise UserError(f"this command's experiments are in the group {own}", where=key, hint=f"{own}={choice}")
    if choice in _choices(other):
        command = OTHER_COMMAND[config_name]
        raise UserError(f"{choice} belongs to {command}", where=key, hint=f"{command} {other}={choice}")


def _choices(group: str) -> set[str]:
    """Return the names of a group's files."""
    folder = resources.files("hdm_lightning.conf") / group
    return {file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")}


def present_spelling(values: Mapping[str, Any]) -> DictConfig:
    """Return a recorded configuration with the current keys, without those that no longer exist.

    A group with a `_target_` already has the current keys, except that `data.workers` was renamed later.
    """
    config = OmegaConf.create(dict(values))
    for old, new in {**MOVED, **RENAMED}.items():
        if old == "optimizer.name":
            continue
        group, _, key = old.rpartition(".")
        try:
            place: Any = OmegaConf.select(config, group) if group else config
        except ConfigTypeError:  # a list in the path, which no version has written
            continue
        if not OmegaConf.is_dict(place) or key not in place or (old not in RENAMED and _is_of_now(place, place[key])):
            continue
        value = place.pop(key)
        if "=" not in new:
            OmegaConf.update(config, new, value, force_add=True)
    optimizer = config.get("optimizer")
    if OmegaConf.is_dict(optimizer) and "name" in optimizer and not _is_of_now(optimizer):
        name = optimizer.pop("name")
        optimizer["_target_"] = OPTIMIZERS.get(name, name)
    return config


def _is_of_now(*nodes: Any) -> bool:
    return any(OmegaConf.is_dict(node) and "_target_" in node for node in nodes)
