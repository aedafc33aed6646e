"""Learning-rate schedules, counted in samples."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def rate_factor(samples: int, total: int, warmup: int, final_ratio: float) -> float:
    """Share of the base rate after `samples`: linear warm-up, then a cosine from 1 to `final_ratio`."""
    if samples < warmup:
        return samples / warmup
    progress = min(1.0, (samples - warmup) / max(1, total - warmup))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(
    optimizer: Optimizer,
    *,
    samples: int,
    samples_per_step: int,
    warmup_samples: int = 0,
    final_ratio: float = 0.01,
) -> LambdaLR:
    """Linear warm-up and a cosine, one tick an optimizer step.

    The step about to be taken counts as seen, so that the first step of a warm-up is not lost at rate 0.

    Args:
        optimizer: whose groups' rates are scaled.
        samples: after which the cosine has ended.
        samples_per_step: samples of an optimizer step, all processes together.
        warmup_samples: of the warm-up.
        final_ratio: where the cosine ends, as a share of the rate; 1 keeps the rate.
    """

    def factor(step: int) -> float:
        return rate_factor((step + 1) * samples_per_step, samples, warmup_samples, final_ratio)

    return LambdaLR(optimizer, factor)
