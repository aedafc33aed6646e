"""When a sequence of losses counts as gone wrong."""

import json
import math

import pytest

from hdm_lightning.training.callbacks.loss_guard import SpikeDetector


def found(detector, losses):
    """Steps (from 1) at which the detector finds something."""
    return [step for step, loss in enumerate(losses, start=1) if detector.observe(step, loss) is not None]


def test_high_steps_in_a_row_make_a_spike_and_fewer_do_not():
    calm = [1.0] * 10
    assert found(SpikeDetector(3.0, patience=3, warmup=5), [*calm, 3.1, 3.1, *calm, 3.1, 3.1, 3.1, 1.0]) == [25]
    assert found(SpikeDetector(3.0, patience=1, warmup=5), [*calm, 3.0]) == []  # above, not at, the factor
    assert found(SpikeDetector(3.0, patience=1, warmup=5), [*calm, 3.01]) == [11]


def test_high_steps_do_not_raise_the_mean_they_are_measured_by():
    detector = SpikeDetector(2.0, patience=100, warmup=1)
    found(detector, [1.0, 1.0, *[50.0] * 20])
    assert (detector.mean, detector.streak) == (1.0, 20)


def test_the_mean_follows_a_falling_loss():
    """After so many steps at 0.1 as the memory is long, a mean of ones has come down to 0.1 + 0.9 (1 - 1/20)^40."""
    detector = SpikeDetector(3.0, patience=2, warmup=1, memory=20)
    found(detector, [1.0] * 20 + [0.1] * 40)
    assert detector.mean == pytest.approx(0.1 + 0.9 * (1 - 1 / 20) ** 40, rel=1e-12)
    assert found(detector, [0.65, 0.65]) == [2]


def test_nothing_is_high_while_warming_up_or_without_a_factor():
    assert found(SpikeDetector(3.0, patience=1, warmup=4), [1.0, 9.0, 99.0, 999.0]) == []
    assert found(SpikeDetector(None), [1.0] * 200 + [1e6] * 10) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_counts_at_once(loss):
    assert found(SpikeDetector(None), [loss, 1.0, loss]) == [1, 3]
    detector = SpikeDetector(3.0)
    found(detector, [1.0, loss, 1.0])
    assert detector.mean == 1.0


def test_a_saved_detector_goes_on_as_if_it_had_not_stopped():
    losses = [1.0, 1.2, 0.9, 4.0, 4.5, 1.0, 5.0, 5.0, 5.0]
    whole = SpikeDetector(3.0, patience=3, warmup=2)
    expected = found(whole, losses)
    for cut in range(len(losses)):
        first, second = (SpikeDetector(3.0, patience=3, warmup=2) for _ in range(2))
        before = found(first, losses[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert before + [step + cut for step in found(second, losses[cut:])] == expected == [9]
        assert second.state_dict() == whole.state_dict()
