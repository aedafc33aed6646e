"""Padded caption lengths of a step with micro-batches grouped by length, from the distribution of lengths."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, log
from statistics import NormalDist

SPREAD = 0.6
"""Assumed standard deviation of the log caption length if only the mean is known: half of the captions are between two
thirds of and one and a half times the median."""


def caption_quantile(captions: float | Sequence[float], share: float) -> float:
    """Return the length in tokens that a share of the captions does not exceed.

    Args:
        captions: mean length of a log-normal distribution, or evenly spaced quantiles from the shortest to the
            longest length.
        share: above 0 and below 1.
    """
    if isinstance(captions, int | float):
        return exp(log(captions) - SPREAD**2 / 2 + SPREAD * NormalDist().inv_cdf(share))
    place = share * (len(captions) - 1)
    below = min(int(place), len(captions) - 2)
    return captions[below] + (place - below) * (captions[below + 1] - captions[below])


def even_lengths(captions: float | Sequence[float], context_length: int, count: int = 64) -> list[int]:
    """Return `count` unpadded caption lengths evenly spaced over the distribution of `caption_quantile`.

    They are at least 1; longer captions are truncated to the context length.
    """
    quantiles = (caption_quantile(captions, (number + 0.5) / count) for number in range(count))
    return [min(context_length, max(1, round(length))) for length in quantiles]


def padded_shares(
    captions: float | Sequence[float], lengths: Sequence[int], batch: int, batches: int
) -> Mapping[int, float]:
    """Return padded length to the share of samples padded to it.

    Args:
        captions: as in `caption_quantile`.
        lengths: allowed padded lengths, ascending up to the context length, to which longer captions are truncated.
        batch: samples per micro-batch.
        batches: micro-batches formed from one group sorted by length.
    """
    longest = (caption_quantile(captions, (number + 1 - 0.5 / batch) / batches) for number in range(batches))
    found = Counter(next((each for each in lengths if each >= length), lengths[-1]) for length in longest)
    return {length: count / batches for length, count in sorted(found.items())}
