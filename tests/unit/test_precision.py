"""Precisions and strategies: what is refused, and that float16 steps under a gradient scaler are those without one."""

import copy

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from hdm_lightning.cli import evaluate
from hdm_lightning.errors import UserError
from hdm_lightning.generation.drawing import loading_choices
from hdm_lightning.generation.sampling_settings import DrawingMachine
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.precision import encoder_dtype
from hdm_lightning.profiling.bench_settings import CaseSettings
from hdm_lightning.profiling.cases import Setup
from hdm_lightning.training import hardware
from hdm_lightning.training.optimization.learning_rates import parameter_groups
from hdm_lightning.training.optimization.muon import MuonAdamW

CONFIG = XUTConfig(width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=1, blocks_after=1)
CLIP = 0.1


@pytest.mark.parametrize(
    ("precision", "hint"), [("16-mixed", "bf16-mixed"), ("bf16-true", "auto"), ("16-true", "auto"), ("odd", "auto")]
)
def test_precisions_that_do_not_train_are_refused_on_a_cpu(precision, hint):
    with pytest.raises(UserError) as caught:
        hardware.precision(precision, "cpu")
    assert caught.value.where == "trainer.precision"
    assert hint in caught.value.hint


@pytest.fixture
def card(monkeypatch):
    """Function of the compute capabilities of the CUDA devices that torch then finds."""

    def present(*capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        index = lambda device: device.index or 0 if device else 0  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[index(device)])

    return present


def test_auto_is_float16_where_a_gpu_only_emulates_bfloat16(card):
    for capability, name, encoders in (
        ((7, 0), "16-mixed", torch.float32),
        ((7, 5), "16-mixed", torch.float32),
        ((8, 0), "bf16-mixed", torch.bfloat16),
        ((12, 0), "bf16-mixed", torch.bfloat16),
    ):
        card(capability)
        assert hardware.precision("auto", "cuda") == name
        assert hardware.precision("16-mixed", "cuda") == "16-mixed"
        assert encoder_dtype("cuda") == encoders
        assert encoder_dtype("cpu") == torch.float32


@pytest.mark.parametrize(("name", "dtype"), [("cpu", "float32"), ("cuda", "float16"), ("cuda:1", "bfloat16")])
def test_commands_compute_in_what_the_device_is_fast_in(monkeypatch, tmp_path, card, name, dtype):
    """Drawing, evaluation and timing, on a machine with a T4 and an RTX 4090, where no option names a precision."""
    card((7, 5), (8, 9))
    assert loading_choices("m", DrawingMachine(), None, torch.device(name)) == {"precision": dtype}
    assert Setup.of(CaseSettings(device=name)).dtype == getattr(torch, dtype)
    requests = []
    target = "hdm_lightning.evaluation.evaluate_model.evaluate"
    monkeypatch.setattr(target, lambda request, options, *_: requests.append(options))
    with pytest.raises(TypeError):  # nothing was evaluated
        evaluate.main([str(tmp_path), "--device", name])
    assert requests[0].autocast == (None if dtype == "float32" else getattr(torch, dtype))
    assert requests[0].encoder_dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def optimizer_of(network, name, *, fused=True):
    kind = {"adamw": torch.optim.AdamW, "muon": MuonAdamW}[name]
    return kind([*parameter_groups(network, 0.5, 0.01, rule="mup")], betas=(0.9, 0.98), fused=fused)


def loss_of(network):
    draw = torch.Generator().manual_seed(1)
    latent, context = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 16, generator=draw)
    return (network(latent, torch.rand(2, generator=draw), context) - latent).square().mean()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_scaled_clipped_steps_equal_unscaled_ones(name):
    torch.manual_seed(0)
    network = XUT(CONFIG)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    other = copy.deepcopy(network)
    scaled = optimizer_of(network, name, fused=False)
    plain = optimizer_of(other, name)
    assert not getattr(scaled, "_step_supports_amp_scaling", False)  # else Lightning refuses to clip
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(3):
        scaler.scale(loss_of(network)).backward()
        scaler.unscale_(scaled)
        clipped = nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        scaler.step(scaled)
        scaler.update()
        loss_of(other).backward()
        assert clipped == pytest.approx(float(nn.utils.clip_grad_norm_(other.parameters(), CLIP)), rel=1e-4)
        plain.step()
        for optimizer in (scaled, plain):
            optimizer.zero_grad()
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_a_step_with_an_infinite_gradient_is_left_out():
    network = XUT(CONFIG)
    before = copy.deepcopy(network.state_dict())
    optimizer = optimizer_of(network, "adamw", fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(loss_of(network)).backward()
    next(network.parameters()).grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("optimizer", {"optimizer": {"_target_": "hdm_lightning.training.optimization.muon.MuonAdamW"}}),
        ("trainer.precision", {"trainer": {"precision": "16-mixed"}}),
        ("hardware.compress_gradients", {"hardware": {"compress_gradients": True}}),
    ],
)
def test_what_a_sharded_network_does_not_go_with_is_refused(where, changes):
    plain = {
        "trainer": {"strategy": "ddp", "precision": "32-true"},
        "optimizer": {"_target_": "torch.optim.AdamW"},
        "hardware": {"compress_gradients": False},
    }
    config = OmegaConf.merge(plain, changes)
    hardware.check_combination(config, of_vae=False)
    config.trainer.strategy = "fsdp2"
    with pytest.raises(UserError, match=r"trainer\.strategy=fsdp2") as caught:
        hardware.check_combination(config, of_vae=False)
    assert caught.value.where == where
    assert where in caught.value.hint and "trainer.strategy=ddp" in caught.value.hint


@pytest.mark.parametrize(
    ("cuda", "hip", "what", "hint"),
    [
        (None, None, "build of torch", "CUDA build"),
        ("13.0", None, "visible", "nvidia-smi"),
        (None, "6.4", "visible", "rocminfo"),
    ],
)
def test_a_card_that_is_not_found_is_laid_to_torch_or_to_the_driver(monkeypatch, cuda, hip, what, hint):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(UserError, match=what) as caught:
        hardware.accelerator("cuda")
    assert hint in caught.value.hint and "trainer=cpu" in caught.value.hint
    assert hardware.accelerator("auto") == "cpu"


@pytest.mark.parametrize("devices", [True, False, "two", 1.5])
def test_what_is_not_a_number_of_devices_is_refused(devices):
    with pytest.raises(UserError, match="is not a number of devices"):
        hardware.local_devices(devices, "cpu")
    assert [hardware.local_devices(number, "cpu") for number in ("auto", None, 0, 3)] == [1, 1, 1, 3]
