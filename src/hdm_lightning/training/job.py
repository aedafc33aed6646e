"""Check a training command before it starts a process: its kind of training, and everything that can be checked."""

import os
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig, OmegaConf

from hdm_lightning.errors import UserError, did_you_mean
from hdm_lightning.training import hardware, run_folder
from hdm_lightning.training.base_model import fill_from_init
from hdm_lightning.training.composition import check_call, has_target, plain
from hdm_lightning.training.hub_upload import check_name
from hdm_lightning.training.recorded import texts_in
from hdm_lightning.training.run_recipe import Recipe, group, with_stage
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.world import outside_world_size


@dataclass(frozen=True)
class Job:
    """A checked training command.

    Attributes:
        config: the composed configuration, interpolations included.
        recipe: the kind of training.
        plans: its stages.
        processes: number of processes on this machine.
    """

    config: DictConfig
    recipe: Recipe
    plans: list[StagePlan]
    processes: int

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.run_dir)

    def order(self) -> dict[str, Any]:
        """Return the argument of `schedule.run_schedule`, the same in every process."""
        return {"config": OmegaConf.to_yaml(self.config)}


def recipe_of(config: DictConfig) -> Recipe:
    """Return the kind of training that a configuration describes."""
    from hdm_lightning.training.autoencoder_run import AutoencoderRecipe  # noqa: PLC0415 (diffusers takes seconds)
    from hdm_lightning.training.flow_run import FlowRecipe  # noqa: PLC0415 (transformers takes seconds)

    return FlowRecipe() if "schedule" in config else AutoencoderRecipe()


def check_job(config: DictConfig) -> Job:
    """Check everything that can be checked before a weight is allocated.

    Args:
        config: a composed configuration of `hdm-train` or `hdm-train-vae`, with its interpolations.

    Raises:
        UserError: naming the key or file and what to do.
    """
    composed: Any = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    composed.pop("hydra", None)
    _check_texts(composed)
    recipe = recipe_of(composed)
    known = [*recipe.groups, *recipe.others]
    for name in map(str, composed):
        if name not in known:
            raise UserError(f"unknown key '{name}'", where=name, hint=did_you_mean(name, known))
    _check_names(composed)
    run_folder.check_resume(Path(composed.run_dir), plain(composed, "resume"))
    fill_from_init(composed)
    groups = {name: group(composed, recipe, name) for name in recipe.groups}
    check_name(groups["hub"])
    kind = hardware.accelerator(plain(composed, "trainer.accelerator"))
    hardware.precision(plain(composed, "trainer.precision"), kind)
    processes = hardware.local_devices(plain(composed, "trainer.devices"), kind)
    plans = recipe.plans(composed, _world_size(composed, processes))
    _check_parts(with_stage(composed, plans[0], **recipe.stage_values(composed, plans[0])), recipe)
    recipe.check(composed, plans)
    if not composed.trainer.get("fast_dev_run"):
        run_folder.require_writable(Path(composed.run_dir), plans)
    return Job(composed, recipe, plans, processes)


def _check_texts(config: DictConfig) -> None:
    """Refuse a NUL and lone surrogates, which no file name, tokenizer or terminal can take."""
    for key, text in texts_in(OmegaConf.to_container(config, resolve=False)):
        try:
            damaged = b"\0" in os.fsencode(text)
        except UnicodeEncodeError:
            damaged = True
        if damaged:
            what = f"contains an invalid character: {text[:80]!r}"
            raise UserError(what, where=key, hint="retype the value in UTF-8 without NUL")


def _check_names(config: DictConfig) -> None:
    """Check name, folder and seed; a name that Hydra has parsed as a number becomes a string."""
    for key in ("name", "run_dir"):
        value = plain(config, key)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise UserError(f"is {value!r}, which is not a name", where=key, hint=f"give one: {key}=NAME")
        if key == "name" and (str(value).startswith("/") or {".", ".."} & set(str(value).split("/"))):
            what = f"is {value!r}, but the folder of a name must be below runs/"
            raise UserError(what, where=key, hint="choose another; run_dir= takes any folder")
        config[key] = str(value)
    seed = plain(config, "seed")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError(f"is {seed!r}, expected a whole number from 0 to 2⁶³ − 1", where="seed", hint="seed=0")


def _world_size(config: DictConfig, processes: int) -> int:
    """Return the number of the run's processes on all machines.

    Raises:
        UserError: naming `trainer.num_nodes`, if it is above 1 and no launcher has started processes on the machines.
    """
    outside = outside_world_size()
    if outside is not None:
        return outside
    nodes = plain(config, "trainer.num_nodes")
    if nodes not in (None, 1):
        raise UserError(
            f"{nodes} machines, but neither torchrun nor srun has started this process",
            where="trainer.num_nodes",
            hint="start the command with torchrun or srun on every machine; see docs/survival.md",
        )
    return processes


def _check_parts(config: DictConfig, recipe: Recipe) -> None:
    """Check the groups that every training has against the signatures of their `_target_`."""
    hardware.check_combination(config, of_vae=recipe.of_vae)
    strategy = plain(config, "trainer.strategy")
    known = [*hardware.STRATEGIES, *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy not in known:
        raise UserError(f"'{strategy}' is not a strategy", where="trainer.strategy", hint=did_you_mean(strategy, known))
    check_call(config, "trainer", supplied=("callbacks", "logger", "plugins"))
    check_call(config, "optimizer")
    check_call(config, "lr_scheduler")
    for groups in ("callbacks", "logger"):
        nodes: Any = config[groups] or {}
        if nodes and not OmegaConf.is_dict(nodes):
            raise UserError(f"is {nodes!r}, expected keys and values", where=groups, hint=f"use e.g. {groups}=none")
        for name, node in ((str(key), value) for key, value in nodes.items()):
            if node is None:
                continue
            if not has_target(node):
                if groups == "callbacks" and name in _usual_callbacks():  # `callbacks=none`, and a preset sets its key
                    continue
                known = [str(each) for each in nodes if has_target(nodes[each])]
                hint = f"set {groups}.{name}._target_=package.Class; {did_you_mean(str(name), known)}"
                raise UserError("has no _target_ to call", where=f"{groups}.{name}", hint=hint)
            check_call(config, f"{groups}.{name}")
            _require_package(str(node["_target_"]), f"{groups}.{name}")


def _require_package(target: str, where: str) -> None:
    """Raise UserError if one of Lightning's loggers lacks its package, before anything is loaded."""
    package = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}.get(target.rpartition(".")[2])
    if package is not None and find_spec(package) is None:
        raise UserError(f"needs the package {package}", where=where, hint=f"pip install {package}")


def _usual_callbacks() -> set[str]:
    """Return the names of the callbacks that this package's files set."""
    folder = resources.files("hdm_lightning.conf") / "callbacks"
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    return {name for file in files for name in yaml.safe_load(file.read_text(encoding="utf-8"))}
