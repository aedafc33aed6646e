"""What a run writes down of its configuration, in the present spelling also where an earlier version has written it."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

_ABSENT = object()


def recorded_values(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, without what follows from a stage: `schedule.stages` says that."""
    values = _plain(config, "")
    assert isinstance(values, dict)
    return {key: value for key, value in values.items() if key != "hydra"}


def recorded_text(config: DictConfig) -> str:
    """The same as YAML, as config.yaml in a run's folder has it."""
    return OmegaConf.to_yaml(OmegaConf.create(recorded_values(config)))


def _plain(config: Any, path: str) -> Any:
    node = OmegaConf.select(config, path) if path else config
    if OmegaConf.is_dict(node):
        found = {str(key): _leaf(config, f"{path}.{key}" if path else str(key), node, key) for key in node}
        return {key: value for key, value in found.items() if value is not _ABSENT}
    if OmegaConf.is_list(node):
        return OmegaConf.to_container(node, resolve=True)
    return node


def _leaf(config: Any, path: str, node: Any, key: Any) -> Any:
    """A value filled in; `_ABSENT` where it is missing or depends on a stage."""
    try:
        raw = OmegaConf.to_container(node, resolve=False)[key]  # type: ignore[index]
        if OmegaConf.is_missing(node, key) or (isinstance(raw, str) and "${stage." in raw):
            return _ABSENT
        return _plain(config, path)
    except OmegaConfBaseException:
        return _ABSENT


RENAMED = {
    "data.workers": "data.num_workers",
    "optimizer.rule": "module.rule",
    "ema.halflife_samples": "callbacks.weight_averages.halflife_samples",
    "callbacks.ema.halflife_samples": "callbacks.weight_averages.halflife_samples",
    "callbacks.ema.sigma_rel": "callbacks.weight_averages.sigma_rel",
}
"""Keys of earlier versions and what they are called now."""
TARGETS = {
    "adamw": "torch.optim.AdamW",
    "muon": "hdm_lightning.training.optimization.muon.MuonAdamW",
}
"""`optimizer.name` of earlier versions."""


def present_spelling(values: Mapping[str, Any]) -> DictConfig:
    """A recorded configuration with the keys of now, for comparing one with a configuration of now."""
    config = OmegaConf.create(dict(values))
    for old, new in RENAMED.items():
        value = OmegaConf.select(config, old, default=_ABSENT)
        if value is not _ABSENT:
            OmegaConf.update(config, new, value, force_add=True)
            group, _, key = old.rpartition(".")
            del OmegaConf.select(config, group)[key]
    name = OmegaConf.select(config, "optimizer.name")
    if name in TARGETS:
        OmegaConf.update(config, "optimizer._target_", TARGETS[name], force_add=True)
    return config
