"""The flow-matching path, its times and its loss against closed forms."""

import pytest
import torch
from scipy import stats

from hdm_lightning.diffusion import flow


def test_path_runs_from_image_to_noise_at_the_target_velocity() -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    zeros, ones = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(flow.interpolate(x, noise, zeros), x, rtol=0, atol=0)
    torch.testing.assert_close(flow.interpolate(x, noise, ones), noise, rtol=0, atol=0)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = torch.stack([float(s) * e + (1 - float(s)) * i for s, e, i in zip(t, noise, x, strict=True)])
    torch.testing.assert_close(flow.interpolate(x, noise, t), expected)
    difference = (flow.interpolate(x, noise, t + 1e-6) - flow.interpolate(x, noise, t)) / 1e-6
    torch.testing.assert_close(difference, flow.velocity_target(x, noise), rtol=1e-6, atol=1e-8)


def test_one_euler_step_along_the_target_reaches_the_image() -> None:
    x, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    x_t = flow.interpolate(x, noise, t)
    torch.testing.assert_close(x_t - t.reshape(-1, 1, 1, 1) * flow.velocity_target(x, noise), x)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (0.8, 1.6)])
def test_logit_normal_times_have_the_quantiles_of_their_law(mean: float, std: float) -> None:
    uniform = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99], dtype=torch.float64)
    logit = torch.logit(flow.logit_normal_times(uniform, mean, std))
    torch.testing.assert_close(logit, torch.from_numpy(stats.norm(mean, std).ppf(uniform.numpy())))


def test_logit_normal_times_stay_inside_the_open_interval() -> None:
    for dtype in (torch.float32, torch.float64):
        t = flow.logit_normal_times(torch.tensor([0.0, 1.0], dtype=dtype))
        assert (t > 0).all() and (t < 1).all()


def test_each_stratum_gets_one_draw() -> None:
    u = torch.rand(64, generator=torch.Generator().manual_seed(2))
    spread = flow.stratified_uniforms(u, torch.arange(64).flip(0), 64)
    assert torch.equal((spread * 64).floor().long(), torch.arange(64).flip(0))
    torch.testing.assert_close(spread * 64 - torch.arange(64).flip(0), u, rtol=0, atol=1e-5)


def test_stratified_draws_cover_the_unit_interval_better_than_independent_ones() -> None:
    u = torch.rand(500, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    spread = flow.stratified_uniforms(u, torch.arange(32).expand(500, 32), 32)
    assert spread.mean(dim=1).std() < u.mean(dim=1).std() / 10
    assert abs(spread.mean() - 0.5) < 1e-3


def test_loss_is_the_mean_square_per_sample_in_float32() -> None:
    prediction = torch.full((2, 3, 4, 4), 300.0, dtype=torch.float16)
    target = torch.zeros(2, 3, 4, 4, dtype=torch.float16)
    target[1] = 299.0
    loss = flow.loss_per_sample(prediction, target)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [90000.0, 1.0]  # 90000 is beyond float16


def test_wrong_shapes_are_named() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"t: got shape \(3,\), expected .*\(2,\)"):
        flow.interpolate(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match="noise"):
        flow.velocity_target(x, x[:1])
    with pytest.raises(ValueError, match="prediction"):
        flow.loss_per_sample(x[:, :2], x)
