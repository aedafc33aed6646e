"""Power-function averages: closed forms against integrals, running averages and reconstructions against sums."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.integrate import quad
from torch import nn

from hdm_lightning.errors import UserError
from hdm_lightning.training.averaging.averages import ParameterAverages
from hdm_lightning.training.averaging.power_function import (
    WIDEST,
    Profile,
    combination,
    gamma_of,
    inner_product,
    reconstruct,
    residual,
    snapshot_path,
    step_decay,
    write_snapshot,
)

STEP, STEPS = 8, 1200
WIDTHS = (0.05, 0.10)


def profile(time, end, gamma):
    return (gamma + 1) * time**gamma / end ** (gamma + 1)


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1, 0.2, WIDEST])
def test_the_width_is_the_profile_s_standard_deviation(sigma):
    gamma = gamma_of(sigma)
    moments = [quad(lambda t, n=n: t**n * profile(t, 1.0, gamma), 0, 1)[0] for n in range(3)]
    assert moments[0] == pytest.approx(1)
    assert (moments[2] - moments[1] ** 2) ** 0.5 == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.0, -0.1, 0.289])
def test_widths_out_of_range_are_refused(sigma):
    with pytest.raises(ValueError, match="sigma_rel"):
        gamma_of(sigma)


def test_inner_products_are_the_integrals():
    one, other = Profile(300.0, 2.5), Profile(500.0, 7.0)
    integral = quad(lambda t: profile(t, 300, 2.5) * profile(t, 500, 7.0), 0, 300)[0]
    assert inner_product(one, other) == pytest.approx(integral, rel=1e-9)
    assert inner_product(other, one) == pytest.approx(integral, rel=1e-9)


def test_steps_multiply_to_the_profile():
    decays = [step_decay(0.1, step * STEP, STEP) for step in range(1, 51)]
    shares = np.array([(1 - decays[i]) * np.prod(decays[i + 1 :]) for i in range(50)])
    gamma, edges = gamma_of(0.1), np.arange(51) / 50
    assert np.allclose(shares, edges[1:] ** (gamma + 1) - edges[:-1] ** (gamma + 1), atol=1e-14)


def values(count=STEPS):
    """A known sequence of weights: a drift with noise, as training gives."""
    random = np.random.default_rng(0)
    drift = np.linspace(0, 3, count)[:, None] * np.array([1.0, -0.5, 0.2])
    return drift + np.cumsum(random.normal(scale=0.05, size=(count, 3)), axis=0) + random.normal(size=(count, 3))


def direct(sequence, sigma):
    """The average of the sequence by its profile's integral over each step."""
    edges = np.arange(len(sequence) + 1) / len(sequence)
    shares = np.diff(edges ** (gamma_of(sigma) + 1))
    return shares @ sequence


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Snapshots of two tracks, every 1/24 of a run."""
    folder = tmp_path_factory.mktemp("snapshots")
    layer = nn.Linear(3, 1, bias=False)
    averages = ParameterAverages(layer, [500], sigma_rel=WIDTHS)
    for step, value in enumerate(values(), start=1):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(value)[None])
        averages.update(STEP)
        if step % (STEPS // 24) == 0:
            for place, width in enumerate(WIDTHS, start=1):
                write_snapshot(folder, averages.weights(place), averages.samples_seen, width, torch.float32)
    return folder, averages


def test_tracks_are_the_sums_written_out(stored):
    _, averages = stored
    for place, width in enumerate(WIDTHS, start=1):
        assert np.allclose(averages.shadows[place][0].numpy(), direct(values(), width), atol=1e-5)
    assert averages.names() == ["ema_500", "power_0.050", "power_0.100"]


@pytest.mark.parametrize(
    ("sigma", "tolerance"), [(0.03, 0.06), (0.06, 0.003), (0.08, 0.003), (0.12, 0.003), (0.2, 0.02)]
)
def test_other_widths_are_put_together_from_two_tracks(stored, sigma, tolerance):
    folder, _ = stored
    result = reconstruct(folder, sigma)
    expected = direct(values(), sigma)
    spread = np.abs(direct(values(), 0.05) - direct(values(), 0.10)).max()  # what is to be told apart
    assert spread > 0.05
    assert np.abs(result.tensors["weight"].numpy() - expected).max() < tolerance
    assert result.used == 48
    assert result.samples == STEP * STEPS


def test_the_fit_is_as_good_as_it_says():
    profiles = [Profile((i + 1) / 16, gamma_of(width)) for i in range(16) for width in WIDTHS]
    wanted = Profile(1.0, gamma_of(0.15))
    x = combination(profiles, wanted)
    assert x.sum() == pytest.approx(1, abs=1e-9)

    def difference(t):
        mixture = sum(c * profile(t, p.samples, p.gamma) * (t <= p.samples) for c, p in zip(x, profiles, strict=True))
        return (mixture - profile(t, 1.0, wanted.gamma)) ** 2

    grid = np.linspace(0, 1, 200_001)[:-1] + 0.5 / 200_000
    distance = np.sqrt(np.mean([difference(t) for t in grid[::50]]))
    norm = inner_product(wanted, wanted) ** 0.5
    assert residual(profiles, wanted, x) == pytest.approx(distance / norm, rel=0.05)
    nudged = x + 0.01 * np.array([1, -1] * 16)  # any other mixture with the same sum is worse
    assert residual(profiles, wanted, nudged) > residual(profiles, wanted, x)


def test_a_stored_track_comes_back_exactly(stored):
    folder, averages = stored
    for place, width in enumerate(WIDTHS, start=1):
        assert torch.equal(reconstruct(folder, width).tensors["weight"], averages.shadows[place][0])
    profiles = [Profile(float(t), gamma_of(width)) for t in (400, 800, 1200) for width in WIDTHS]
    assert np.allclose(combination(profiles, profiles[3])[:4], [0, 0, 0, 1], atol=1e-6)


def test_an_earlier_time_uses_nothing_later(stored):
    folder, _ = stored
    half = STEP * STEPS // 2
    result = reconstruct(folder, 0.08, half)
    assert result.used == 24
    assert np.abs(result.tensors["weight"].numpy() - direct(values()[: STEPS // 2], 0.08)).max() < 0.01


def test_state_goes_on_bit_for_bit_and_a_lost_track_is_refused():
    def run(averages, steps, layer):
        for value in steps:
            nn.init.constant_(layer.weight, float(value))
            averages.update(STEP)

    layer, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    whole = ParameterAverages(layer, [100], sigma_rel=WIDTHS)
    run(whole, range(5), layer)
    half = ParameterAverages(other, [100], sigma_rel=WIDTHS)
    half.load_state_dict(whole.state_dict())
    run(whole, range(5, 9), layer)
    run(half, range(5, 9), other)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole.shadows, half.shadows, strict=True))
    with pytest.raises(UserError, match="no power-function average"):
        ParameterAverages(other, [100], sigma_rel=[0.2]).load_state_dict(whole.state_dict())


def test_a_first_update_forgets_the_initial_weights():
    layer = nn.Linear(1, 1, bias=False)
    averages = ParameterAverages(layer, [], sigma_rel=[0.1])
    nn.init.constant_(layer.weight, 7.0)
    averages.update(STEP)
    assert averages.shadows[0][0].item() == 7.0


def test_files_tell_what_they_are_and_keep_what_half_precision_cannot_hold(tmp_path):
    write_snapshot(tmp_path, {"a": torch.tensor([1e6]), "b": torch.tensor([0.5])}, 640, 0.05, torch.float16)
    with safe_open(snapshot_path(tmp_path, 640, 0.05), framework="pt") as file:
        assert json.loads(file.metadata()["ema"]) == {"samples_seen": 640, "sigma_rel": 0.05}
        assert file.get_tensor("a").item() == 1e6
        assert file.get_tensor("b").dtype == torch.float16


@pytest.mark.parametrize(
    ("sigma", "samples", "where"), [(0.3, None, "--average"), (0.01, None, "--average"), (0.08, 5, "--samples")]
)
def test_what_cannot_be_put_together_is_refused(stored, sigma, samples, where):
    with pytest.raises(UserError) as caught:
        reconstruct(stored[0], sigma, samples)
    assert caught.value.where == where


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no stored averages"):
        reconstruct(tmp_path, 0.1)
