"""Which of the ready-made trainings of `conf/experiment` suit a machine."""

from dataclasses import dataclass

from hdm_lightning.profiling.gpus import CPU, Machine


@dataclass(frozen=True)
class Preset:
    """A ready-made training: `hdm-train experiment=NAME`."""

    name: str  # file in conf/experiment
    offers: str  # what it makes, in a few words
    memory_gib: float  # what a card must have
    cards: int  # from so many on
    alone: bool = False  # one card is used, however many there are


ON_A_CPU = Preset("openclipart_cpu", "1,000 drawings at 128 px in two and a half hours", 0, 0)
PRESETS = (
    Preset("evening_gpu", "1,000 drawings at 256 px in less than an hour", 10, 1, alone=True),
    Preset("weekend_24gb", "from scratch to 512 px in a few days", 20, 1),
    Preset("paper", "the paper's recipe to 1024 px", 24, 4),
    Preset("paper_cached", "the same on latents from disk", 24, 4),
)
"""On GPUs, the smallest first."""


def presets_for(machine: Machine) -> list[Preset]:
    """The trainings that fit the memory of a machine's cards and are meant for as many, the smallest first.

    One that is meant for several cards is left out on fewer: it would take months.
    """
    if machine.gpu.name == CPU:
        return [ON_A_CPU]
    fitting = [each for each in PRESETS if each.memory_gib <= machine.gpu.memory_gib and each.cards <= machine.count]
    several = [each for each in fitting if each.cards > 1]
    return several or fitting
