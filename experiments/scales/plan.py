"""The trainings of the study: widths × samples for the law, rates × widths, rates × batches, and points held out."""

from dataclasses import dataclass, replace
from typing import Literal

from hdm_lightning.training.optimization.learning_rates import Rule

HEAD_DIM = 16
RATE, SAMPLES, BATCH = 0.16, 6_400, 32
"""Base rate under the muP rule, fixed before any training; samples and batch of the sweeps."""
WIDTHS = (32, 48, 64, 96, 128)
LENGTHS = (3_200, 6_400, 12_800)
SEEDS = (0, 1, 2)
HELD_OUT = ((192, 3_200), (192, 6_400), (192, 12_800), (64, 25_600), (96, 25_600))
"""Widths and samples that the law is to predict: a wider network, and longer trainings."""
RATES = (0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
"""The last two were added when the best of the first five was the largest of them, at every width."""
RATE_WIDTHS = (32, 64, 128)
CONSTANT_RATES = tuple(rate / 64 for rate in RATES[:5])
"""The rates that the muP rule gives hidden matrices at width 64, here used for all tensors at every width."""
BATCHES = (8, 32, 128)

Kind = Literal["law", "held out", "rates", "batches"]


@dataclass(frozen=True)
class Training:
    """One training of the study."""

    kind: Kind
    width: int
    samples: int = SAMPLES
    rate: float = RATE
    rule: Rule = "mup"
    batch: int = BATCH
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the job: only what is trained, whatever its purpose, so that no training runs twice."""
        return f"width{self.width}-samples{self.samples}-{self.rule}{self.rate:g}-batch{self.batch}-seed{self.seed}"


def trainings() -> list[Training]:
    """Return all trainings, the most informative first; one with two purposes is listed once for each."""
    found: list[Training] = []
    for seed in SEEDS:
        found += [Training("law", width, samples, seed=seed) for samples in LENGTHS for width in WIDTHS]
        found += [Training("rates", width, rate=rate, seed=seed) for rate in RATES for width in RATE_WIDTHS]
    for seed in SEEDS[:2]:
        found += [Training("held out", width, samples, seed=seed) for width, samples in HELD_OUT]
        found += [Training("batches", 64, rate=rate, batch=batch, seed=seed) for rate in RATES for batch in BATCHES]
    found += [Training("rates", width, rate=rate, rule="constant") for rate in CONSTANT_RATES for width in RATE_WIDTHS]
    return found


def jobs() -> list[Training]:
    """Return every training once."""
    return list({each.name: replace(each) for each in trainings()}.values())
