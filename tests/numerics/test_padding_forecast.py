"""What captions are padded to, by quantiles, against a draw of captions that are sorted and padded one by one."""

import numpy as np
import pytest

from hdm_lightning.profiling.padding import SPREAD, caption_quantile, padded_shares

LENGTHS = (32, 64, 96, 128, 192, 256)


def drawn(captions, count):
    """Lengths of captions of the same distribution, by another way."""
    random = np.random.default_rng(0)
    if isinstance(captions, float):
        return random.lognormal(np.log(captions) - SPREAD**2 / 2, SPREAD, size=count)
    return np.interp(random.random(count), np.linspace(0, 1, len(captions)), captions)


@pytest.mark.parametrize("captions", [64.0, 20.0, [8, 30, 60, 90, 300]])
def test_quantiles_are_those_of_the_distribution(captions):
    lengths = drawn(captions, 200_000)
    for share in (0.01, 0.3, 0.5, 0.9):
        assert caption_quantile(captions, share) == pytest.approx(np.quantile(lengths, share), rel=0.02)
    if isinstance(captions, float):
        assert lengths.mean() == pytest.approx(captions, rel=0.01)


@pytest.mark.parametrize(("batch", "batches"), [(64, 1), (32, 16), (128, 4)])
@pytest.mark.parametrize("captions", [64.0, 20.0, [8, 30, 60, 90, 300]])
def test_shares_are_those_of_sorted_micro_batches(captions, batch, batches):
    shares = padded_shares(captions, LENGTHS, batch, batches)
    steps = np.sort(drawn(captions, 200 * batch * batches).reshape(200, -1), axis=1).reshape(200, batches, batch)
    longest = np.minimum(steps.max(axis=2), LENGTHS[-1])
    padded = np.asarray(LENGTHS)[np.searchsorted(LENGTHS, longest)]
    assert sum(shares.values()) == pytest.approx(1)
    expected, found = padded.mean(), sum(length * share for length, share in shares.items())
    assert found == pytest.approx(expected, rel=0.15)  # a longest caption varies from step to step
