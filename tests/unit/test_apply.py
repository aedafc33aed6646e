"""Recomputed blocks: the same names, the same gradients, and back again."""

import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.profiling.live_memory import LiveMemory
from hdm_lightning.training.strategies.parallelize import checkpoint_blocks
from toy_run import shaken_network

CONFIG = XUTConfig(width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=2, decoder_blocks=2)


def filled_network() -> XUT:
    return shaken_network(CONFIG)


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


class Attentions(TorchDispatchMode):
    """Counts how often attention is computed, backward passes aside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "scaled_dot_product" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


def bytes_kept(network: XUT) -> int:
    draw = torch.Generator().manual_seed(1)
    latent, context = torch.randn(2, 4, 16, 16, generator=draw), torch.randn(2, 5, 16, generator=draw)
    with LiveMemory() as memory:
        velocity = network(latent, torch.rand(2, generator=draw), context)
        kept = memory.bytes
    del velocity
    return kept


def test_selective_recomputation_keeps_attention_alone() -> None:
    plain = filled_network()
    expected, attentions, kept = gradients(plain), {}, {}
    for way in (False, "selective", True):
        network = copy.deepcopy(plain)
        checkpoint_blocks(network, way)
        with Attentions() as counted:
            found = gradients(network)
        attentions[way], kept[way] = counted.count, bytes_kept(network)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    once = attentions[False]
    assert attentions == {False: once, "selective": once, True: 2 * once} and once == 1 + 2 + 2 * 3 + 3
    assert kept[True] < kept["selective"] < 0.25 * kept[False]
