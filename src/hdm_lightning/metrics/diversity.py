"""How different images of one prompt are, as a share of how different real images are.

Shapes: P prompts, S seeds, D features, N real samples.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hdm_lightning.metrics.bootstrap import Bootstrap, Estimate
from hdm_lightning.metrics.distances import euclidean_distances, mean_pairs


@dataclass(frozen=True)
class Diversity:
    """Mean distances of pairs of images, each with its interval.

    Attributes:
        within: of one prompt with different seeds, over the real images' mean distance.
        across: of different prompts, over the same.
        real: the real images' mean distance, in units of the features.
    """

    within: Estimate
    across: Estimate
    real: Estimate


def diversity_estimates(by_prompt: Tensor, real: Tensor, bootstrap: Bootstrap) -> Diversity:
    """Diversity of images drawn P × S.

    Args:
        by_prompt: features (P,S,D), at least two prompts of two seeds.
        real: features (N,D) of at least two real images.
        bootstrap: resamples prompts, and real images.

    Raises:
        ValueError: there is no pair to compare, or all real images are equal.
    """
    if by_prompt.dim() != 3 or min(by_prompt.shape[:2]) < 2 or len(real) < 2:
        shapes = f"{tuple(by_prompt.shape)}, {tuple(real.shape)}"
        raise ValueError(f"by_prompt, real: got shapes {shapes}, expected (P ≥ 2, S ≥ 2, D), (N ≥ 2, D)")
    prompts, seeds = by_prompt.shape[:2]
    scale, scales = mean_pairs(_distances(real), bootstrap, stream=2)
    if not scale:
        raise ValueError("real: all images are equal, expected different ones, whose mean distance is the unit")
    units = np.where(scales > 0, scales, np.nan)  # among few images, a resample can hold equal ones only
    per_prompt = np.array([mean_pairs(_distances(of_one), _NO_INTERVAL)[0] for of_one in by_prompt])
    within = bootstrap.counts(prompts) @ per_prompt / prompts
    # Images of one seed number, one a prompt, differ by prompt: the mean over seeds uses every image once a pair.
    across = [mean_pairs(_distances(by_prompt[:, seed]), bootstrap) for seed in range(seeds)]
    value = float(np.mean([one for one, _ in across]))
    replicates = np.mean([many for _, many in across], axis=0)
    return Diversity(
        within=bootstrap.centred(float(per_prompt.mean()) / scale, within / units, prompts, bounds=_POSITIVE),
        across=bootstrap.centred(value / scale, replicates / units, prompts, bounds=_POSITIVE),
        real=bootstrap.centred(scale, scales, len(real), bounds=_POSITIVE),
    )


_POSITIVE = (0.0, float("inf"))
_NO_INTERVAL = Bootstrap(resamples=2)


def _distances(features: Tensor) -> Tensor:
    values = features.double()
    return euclidean_distances(values, values)
