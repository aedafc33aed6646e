"""What the trainings of networks and of autoencoders differ in, for one runner of both; what a run's stages share."""

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
    """One kind of training: what its configuration must say, and what it builds and leaves behind.

    Attributes:
        groups: the groups of plain keys, with their schemas.
        others: all other keys of the configuration.
        sharded: whether the network can be split over devices.
    """

    groups: ClassVar[dict[str, type[Any]]]
    others: ClassVar[tuple[str, ...]]
    sharded: ClassVar[bool]

    @abstractmethod
    def plans(self, config: DictConfig, world_size: int) -> list[StagePlan]:
        """The stages for so many processes."""

    def stage_values(self, config: DictConfig, plan: StagePlan) -> dict[str, Any]:
        """What `${stage.…}` stands for beside the plan's values, as far as the configuration says it."""
        return {}

    @abstractmethod
    def check(self, config: DictConfig, plans: list[StagePlan]) -> None:
        """All that can be known to be wrong before a weight is allocated."""

    @abstractmethod
    def check_continued(self, config: DictConfig, plans: list[StagePlan]) -> None:
        """What the run's folder holds goes with the configuration; see `continued.check_continued`."""

    @abstractmethod
    def build(self, run: "Run") -> nn.Module:
        """Build what the stages share and return the network, the same in every process."""

    @abstractmethod
    def module_arguments(self, run: "Run", plan: StagePlan) -> dict[str, Any]:
        """What the module's `_target_` is called with beside its keys."""

    @abstractmethod
    def data_arguments(self, run: "Run") -> dict[str, Any]:
        """What the data's `_target_` is called with beside its keys."""

    @abstractmethod
    def begin(self, run: "Run") -> None:
        """Give the network the weights that the first stage begins with."""

    def values(self, run: "Run", plan: StagePlan) -> dict[str, Any]:
        """As `stage_values`, with what has been built."""
        return self.stage_values(run.config, plan)

    @abstractmethod
    def layout(self, config: DictConfig) -> Any:
        """TensorBoard's page of a stage."""

    @abstractmethod
    def missing_callbacks(self, config: DictConfig, made: list[Any]) -> list[Any]:
        """What the training cannot do without and the configuration has left out."""

    def trainer_arguments(self, config: DictConfig) -> dict[str, Any]:
        """What the trainer is called with beside its keys."""
        return {}

    @abstractmethod
    def summary(self, trainer: Any) -> dict[str, Any]:
        """What is noted of a stage's end beside its length."""

    def after_stage(self, run: "Run", plan: StagePlan, checkpoint: Path) -> None:
        """Whatever is to be done with the last checkpoint of a stage; the first process works."""
        del run, plan, checkpoint

    @abstractmethod
    def kind(self, run: "Run") -> str:
        """What is trained, for people."""

    @abstractmethod
    def outcome(self, summary: dict[str, Any]) -> str:
        """The most telling number of a stage's summary, for people; empty where there is none."""

    @abstractmethod
    def next_command(self, run: "Run", folder: str) -> str:
        """A command that does something with the result of the run in `folder`."""

    @abstractmethod
    def export(self, run: "Run", checkpoint: Path) -> None:
        """Write `final/` from the last checkpoint; the first process works."""


@dataclass
class Run:
    """What the stages of a run have in common.

    Attributes:
        config: the composed configuration, interpolations of `stage` included.
        recipe: the kind of training.
        plans: the stages.
        run_dir: the run's folder.
        rewinds: how often a stage may go back.
        carry_moments: whether a stage begins with the optimizer's moments of the one before.
        network: what is trained; on the CPU between stages, a sharded one on its devices.
        parts: what else the recipe has built.
    """

    config: DictConfig
    recipe: Recipe
    plans: list[StagePlan]
    run_dir: Path
    rewinds: int
    carry_moments: bool
    network: nn.Module = field(init=False)
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_trial(self) -> bool:
        """Whether this is a `fast_dev_run`, which leaves nothing behind."""
        return bool(self.config.trainer.get("fast_dev_run"))


def group(config: DictConfig, recipe: Recipe, name: str) -> Any:
    """A group of plain keys, checked.

    Raises:
        UserError: naming the key.
    """
    return parse(recipe.groups[name], plain(config, name), name)


def with_stage(config: DictConfig, plan: StagePlan, **values: Any) -> DictConfig:
    """The configuration of one stage: `stage` filled in, the stage's own keys of groups laid over them."""
    filled = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    assert isinstance(filled, DictConfig)
    filled["stage"] = {**plan.values(), **values}
    for name in ("data", "module", "trainer"):
        own = getattr(plan.settings, name, None)
        if own:
            filled[name] = OmegaConf.merge(filled[name], own)
    hardware.resolve(filled)
    return filled
