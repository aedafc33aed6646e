"""What captions are padded to in a step whose micro-batches are made by length, from how long captions are."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, log
from statistics import NormalDist

SPREAD = 0.6
"""Standard deviation of the logarithm of a caption's length, where its mean alone is known: half of the captions lie
between two thirds and one and a half times the median."""


def caption_quantile(captions: float | Sequence[float], share: float) -> float:
    """The length in tokens that a share of the captions does not exceed.

    Args:
        captions: the mean length, of a log-normal distribution; or quantiles, evenly spaced from the least to the
            greatest length.
        share: above 0 and below 1.
    """
    if isinstance(captions, int | float):
        return exp(log(captions) - SPREAD**2 / 2 + SPREAD * NormalDist().inv_cdf(share))
    place = share * (len(captions) - 1)
    below = min(int(place), len(captions) - 2)
    return captions[below] + (place - below) * (captions[below + 1] - captions[below])


def even_lengths(captions: float | Sequence[float], context_length: int, count: int = 64) -> list[int]:
    """True lengths of so many captions, evenly spaced over the distribution, from 1 to the context length.

    Args:
        captions: as of `caption_quantile`.
        context_length: to which longer captions are cut.
        count: how many.
    """
    quantiles = (caption_quantile(captions, (number + 0.5) / count) for number in range(count))
    return [min(context_length, max(1, round(length))) for length in quantiles]


def padded_shares(
    captions: float | Sequence[float], lengths: Sequence[int], batch: int, batches: int
) -> Mapping[int, float]:
    """Padded length to the share of samples that are padded to it.

    Args:
        captions: as of `caption_quantile`.
        lengths: that captions may be padded to, rising up to the context length, to which longer ones are cut.
        batch: samples of a micro-batch.
        batches: micro-batches that are made of one group, sorted by length.
    """
    longest = (caption_quantile(captions, (number + 1 - 0.5 / batch) / batches) for number in range(batches))
    found = Counter(next((each for each in lengths if each >= length), lengths[-1]) for length in longest)
    return {length: count / batches for length, count in sorted(found.items())}
