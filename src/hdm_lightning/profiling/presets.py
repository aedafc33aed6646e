"""Select the presets in `conf/experiment` that suit a machine."""

from dataclasses import dataclass

from hdm_lightning.profiling.gpus import CPU, Machine


@dataclass(frozen=True)
class Preset:
    """A preset run: `hdm-train experiment=NAME`."""

    name: str  # file in conf/experiment
    offers: str  # short description
    memory_gib: float  # memory required per card
    cards: int  # minimum number of cards
    alone: bool = False  # whether it uses only one card


ON_A_CPU = Preset("openclipart_cpu", "1,000 drawings at 128 px in 2.5 hours", 0, 0)
PRESETS = (
    Preset("evening_gpu", "1,000 drawings at 256 px in less than an hour", 10, 1, alone=True),
    Preset("weekend_24gb", "from scratch to 512 px in a few days", 20, 1),
    Preset("paper", "the paper's recipe to 1024 px", 24, 4),
    Preset("paper_cached", "the same on latents from disk", 24, 4),
)
"""Presets for GPUs, the smallest first."""


def presets_for(machine: Machine) -> list[Preset]:
    """Return the presets that fit a machine's memory and number of cards, the smallest first.

    If presets for several cards fit, only these are returned; on fewer cards they would take months and are skipped.
    """
    if machine.gpu.name == CPU:
        return [ON_A_CPU]
    fitting = [each for each in PRESETS if each.memory_gib <= machine.gpu.memory_gib and each.cards <= machine.count]
    several = [each for each in fitting if each.cards > 1]
    return several or fitting
