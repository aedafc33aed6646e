"""How network and autoencoder trainings differ behind one runner, and what the stages of a run share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf
from torch import nn

from hdm_lightning.training import hardware
from hdm_lightning.training.composition import parse, plain
from hdm_lightning.training.stages import StagePlan

COMMON = (
    *("name", "run_dir", "seed", "resume", "stage"),
    *("data", "module", "optimizer", "lr_scheduler", "trainer", "callbacks", "logger"),
)
"""Keys of every training."""


class Recipe(ABC):
    """One kind of training: how its configuration is checked, its parts are built and its result is exported.

    Attributes:
        groups: the groups of plain keys, with their schemas.
        others: all other keys of the configuration.
        of_vae: whether it trains an autoencoder, which is never sharded and has neither FP8 blocks nor frozen encoders.
    """

    groups: ClassVar[dict[str, type[Any]]]
    others: ClassVar[tuple[str, ...]]
    of_vae: ClassVar[bool]

    @abstractmethod
    def plans(self, config: DictConfig, world_size: int) -> list[StagePlan]:
        """Return the stages for `world_size` processes."""

    def stage_values(self, config: DictConfig, plan: StagePlan) -> dict[str, Any]:
        """Return values of `${stage.…}` beyond the plan's, as far as the configuration determines them."""
        return {}

    @abstractmethod
    def check(self, config: DictConfig, plans: list[StagePlan]) -> None:
        """Check everything that can be checked before a weight is allocated."""

    @abstractmethod
    def build(self, run: "Run") -> nn.Module:
        """Build what the stages share and return the network, the same in every process."""

    @abstractmethod
    def module_arguments(self, run: "Run", plan: StagePlan) -> dict[str, Any]:
        """Return the arguments of the module's `_target_` in addition to its keys."""

    @abstractmethod
    def data_arguments(self, run: "Run") -> dict[str, Any]:
        """Return the arguments of the data's `_target_` in addition to its keys."""

    @abstractmethod
    def begin(self, run: "Run") -> None:
        """Load the weights that the first stage starts with into the network."""

    def values(self, run: "Run", plan: StagePlan) -> dict[str, Any]:
        """Return `stage_values`, and values that depend on the built parts."""
        return self.stage_values(run.config, plan)

    @abstractmethod
    def layout(self, config: DictConfig) -> Any:
        """Return the TensorBoard page of a stage."""

    def missing_callbacks(self, config: DictConfig, made: list[Any]) -> list[Any]:
        """Return the callbacks that the training requires and the configuration has left out."""
        return []

    def trainer_arguments(self, config: DictConfig) -> dict[str, Any]:
        """Return the arguments of the trainer in addition to its keys."""
        return {}

    @abstractmethod
    def summary(self, trainer: Any) -> dict[str, Any]:
        """Return what to record of a stage's end in addition to its length."""

    def after_stage(self, run: "Run", plan: StagePlan, checkpoint: Path) -> None:
        """Process the last checkpoint of a stage; the first process calls this."""
        del run, plan, checkpoint

    @abstractmethod
    def kind(self, run: "Run") -> str:
        """Return what is trained, for display."""

    @abstractmethod
    def outcome(self, summary: dict[str, Any]) -> str:
        """Return the most important number of a stage's summary, for display; empty if there is none."""

    @abstractmethod
    def next_command(self, run: "Run", folder: str) -> str:
        """Return a command that uses the result of the run in `folder`."""

    @abstractmethod
    def export(self, run: "Run", checkpoint: Path) -> None:
        """Write `final/` from the last checkpoint; the first process calls this."""


@dataclass
class Run:
    """What the stages of a run share.

    Attributes:
        config: the composed configuration, interpolations of `stage` included.
        recipe: the kind of training.
        plans: the stages.
        run_dir: the run's folder.
        network: the network to train; on the CPU between stages, a sharded one on its devices.
        parts: other objects that the recipe has built.
    """

    config: DictConfig
    recipe: Recipe
    plans: list[StagePlan]
    run_dir: Path
    network: nn.Module = field(init=False)
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_trial(self) -> bool:
        """Whether this is a `fast_dev_run`, which leaves nothing behind."""
        return bool(self.config.trainer.get("fast_dev_run"))


def group(config: DictConfig, recipe: Recipe, name: str) -> Any:
    """Return a group of plain keys, checked.

    Raises:
        UserError: naming the key.
    """
    return parse(recipe.groups[name], plain(config, name), name)


def with_stage(config: DictConfig, plan: StagePlan, **values: Any) -> DictConfig:
    """Return the configuration of one stage, with `stage` filled in and its overrides of other groups applied."""
    filled = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    assert isinstance(filled, DictConfig)
    filled["stage"] = {**plan.values(), **values}
    for name in ("data", "module", "trainer"):
        own = getattr(plan.settings, name, None)
        if own:
            filled[name] = OmegaConf.merge(filled[name], own)
    hardware.resolve(filled)
    return filled
