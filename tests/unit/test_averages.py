"""Weight averages against their closed form and against a loop written out."""

import torch
from torch import nn

from hdm_lightning.training.averaging.averages import ParameterAverages
from hdm_lightning.training.averaging.power_function import snapshot_path


def linear(value):
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def set_weight(layer, value):
    with torch.no_grad():
        layer.weight.fill_(value)


def test_half_of_the_past_is_forgotten_in_a_halflife():
    layer = linear(1.0)
    averages = ParameterAverages(layer, [1000], ramp=0.0)
    set_weight(layer, 0.0)
    for _ in range(10):
        averages.update(100)
    assert abs(averages.shadows[0][0].item() - 0.5) < 1e-6


def test_ramp_equals_the_recursion_written_out():
    layer = linear(0.0)
    averages = ParameterAverages(layer, [500, 100_000], ramp=0.1)
    expected = [0.0, 0.0]
    for step in range(1, 200):
        value = float(step % 7)
        set_weight(layer, value)
        averages.update(32)
        for which, halflife in enumerate((500, 100_000)):
            decay = 0.5 ** (32 / min(halflife, 0.1 * 32 * step))
            expected[which] = decay * expected[which] + (1 - decay) * value
    got = [shadow[0].item() for shadow in averages.shadows]
    assert torch.allclose(torch.tensor(got), torch.tensor(expected), rtol=1e-5)


def test_bound_network_uses_the_average_and_leaves_the_weights_alone():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    averages = ParameterAverages(network, [100], ramp=0.0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(5, 3)
    wanted = network(x).detach()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    assert torch.equal(averages.bound(0)(x), wanted)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name] + 1.0)


def test_averages_stay_float32_beside_half_precision_weights():
    layer = nn.Linear(2, 2).to(torch.bfloat16)
    averages = ParameterAverages(layer, [10_000_000], ramp=0.0)
    start = averages.shadows[0][0].clone()
    set_weight(layer, 3.0)
    for _ in range(100):
        averages.update(8)  # each update moves by 5.5e-7 of the distance: nothing in bfloat16
    moved = (averages.shadows[0][0] - start) / (3.0 - start)
    assert torch.allclose(moved, torch.full_like(moved, 1 - 0.5 ** (800 / 10_000_000)), rtol=0.05)


def test_state_survives_a_round_trip_and_a_change_of_halflives():
    layer = linear(1.0)
    averages = ParameterAverages(layer, [100, 10_000], ramp=0.05)
    set_weight(layer, 2.0)
    averages.update(64)
    other = ParameterAverages(linear(9.0), [90], ramp=0.05)
    other.load_state_dict(averages.state_dict())
    assert other.samples_seen == 64
    assert torch.equal(other.shadows[0][0], averages.shadows[0][0])


def test_names():
    assert ParameterAverages(linear(0.0), [500, 50_000, 2_000_000]).names() == ["ema_500", "ema_50k", "ema_2M"]


def test_close_averages_have_names_and_files_of_their_own(tmp_path):
    averages = ParameterAverages(linear(0.0), [1_234_567, 1_234_568], sigma_rel=[0.05, 0.0501, 0.0504])
    assert len(set(averages.names())) == 5
    paths = {snapshot_path(tmp_path, 64, width) for width in averages.widths}
    assert len(paths) == 3 and tmp_path / "000000000064-0.050.safetensors" in paths
