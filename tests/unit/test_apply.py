"""Recomputed blocks and compilation: the same names, the same gradients, and back again."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.training.settings import StageSettings, TrainerSettings
from hdm_lightning.training.strategies.parallelize import checkpoint_blocks, prepare_network

CONFIG = XUTConfig(width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=2, decoder_blocks=2)
STAGE = StageSettings(resolution=16, samples=800, batch_size=8, micro_batch_size=8, learning_rate=0.5)
TRAINER = TrainerSettings(accelerator="cpu", precision="32-true")


def filled_network() -> XUT:
    torch.manual_seed(0)
    network = XUT(CONFIG)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def gradients(network: XUT) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    latent, context = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 16, generator=draw)
    keep, lengths = torch.tensor([[0, 5, 9], [1, 2, 14]]), torch.tensor([5, 2])
    velocity = network(latent, torch.rand(2, generator=draw), context, context_lengths=lengths, keep=keep)
    parameters = list(network.parameters())
    return list(torch.autograd.grad(velocity.square().sum(), parameters))


def saved_tensors(network: XUT) -> int:
    count = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 5, 16))
    return count


def test_recomputed_blocks_give_the_same_gradients_under_the_same_names() -> None:
    plain = filled_network()
    network = copy.deepcopy(plain)
    checkpoint_blocks(network, True)
    assert list(network.state_dict()) == list(plain.state_dict())
    for found, expected in zip(gradients(network), gradients(plain), strict=True):
        assert torch.equal(found, expected)
    assert saved_tensors(network) < 0.3 * saved_tensors(plain)
    checkpoint_blocks(network, False)
    assert saved_tensors(network) == saved_tensors(plain)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_network_keeps_names_and_gradients(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    plain = filled_network()
    network = copy.deepcopy(plain)
    prepare_network(network, replace(STAGE, activation_checkpointing=recompute), replace(TRAINER, compile=True))
    assert list(network.state_dict()) == list(plain.state_dict())
    for found, expected in zip(gradients(network), gradients(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert graphs.frame_count == 1
