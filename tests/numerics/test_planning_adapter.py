"""The forecast of a training of an adapter, against torch's counter, a step's tensors and a step's time."""

import time
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hdm_lightning import XUT, LoRA, LyCORIS, XUTConfig
from hdm_lightning.cli.plan_schedule import adapter_cost
from hdm_lightning.profiling.encoder_costs import TINY_AUTOENCODER, TINY_TEXT, EncoderConfigs
from hdm_lightning.profiling.forecast import forecast
from hdm_lightning.profiling.gpus import GPUS, Machine
from hdm_lightning.profiling.memory import device_memory
from hdm_lightning.profiling.operations import Workload, adapter_operations, network_operations
from hdm_lightning.profiling.planned_run import Recipe, StageRecipe
from saved_tensors import saved_storages

CONFIG = XUTConfig(
    channels=4, patch_size=1, width=64, mlp_width=192, heads=2, head_dim=32, context_width=32, depth=4, decoder_blocks=2
)
WIDE = replace(CONFIG, width=512, mlp_width=1536, heads=8, head_dim=64, depth=1)
KINDS = {
    "lora": (LoRA, {"rank": 4}),
    "loha": (LyCORIS, {"kind": "loha", "rank": 2}),
    "loha of full rank": (LyCORIS, {"kind": "loha", "rank": 9}),
    "lokr": (LyCORIS, {"kind": "lokr", "rank": 2}),
    "lokr of whole factors": (LyCORIS, {"kind": "lokr", "rank": 99}),
}
TARGETS = [["attention", "feed_forward"], ["attention"], ["feed_forward", "text_projection", "modulation"]]


def cost_of(kind, targets, config=CONFIG):
    cls, arguments = KINDS[kind]
    adapter = {"_target_": f"hdm_lightning.{cls.__name__}", "targets": targets, **arguments}
    return adapter_cost(adapter, config)


def adapted(kind, targets, config=CONFIG):
    cls, arguments = KINDS[kind]
    torch.manual_seed(0)
    return cls(targets=targets, **arguments)(XUT(config))


def loss_of(network, side=8, text=8):
    latents, context = torch.randn(1, 4, side, side), torch.randn(1, text, 32)
    return network(latents, torch.tensor([0.5]), context).square().mean()


@pytest.mark.parametrize("targets", TARGETS, ids=len)
@pytest.mark.parametrize("kind", [each for each in KINDS if each != "loha of full rank"])
def test_operations_are_those_of_the_counter(kind, targets):
    """Forward to the last one, backward within two hundredths; matrices multiplied once a micro-batch are not in it."""
    network, cost, work = adapted(kind, targets), cost_of(kind, targets), Workload.of(CONFIG, 8, 8, 8)
    with sdpa_kernel([SDPBackend.MATH]):
        with FlopCounterMode(display=False) as forward:
            loss = loss_of(network)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    counted = adapter_operations(CONFIG, work, cost, recompute=False, fused_attention=False)
    assert counted.forward == forward.get_total_flops()
    assert counted.backward == pytest.approx(backward.get_total_flops(), rel=0.02)
    assert cost.trained == sum(value.numel() for value in network.parameters() if value.requires_grad)


def recipe_of(cost, config, **changes):
    stage = StageRecipe("a", 128, 64, 1, 1, 0.0, 8)
    encoders = EncoderConfigs(TINY_TEXT, TINY_AUTOENCODER).architectures()
    return Recipe(config, (stage,), *encoders, mixed=False, compiled=False, adapter=cost, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_gradients_and_moments_are_those_of_a_step(kind):
    network, cost = adapted(kind, TARGETS[0]), cost_of(kind, TARGETS[0])
    optimizer = torch.optim.AdamW([value for value in network.parameters() if value.requires_grad])
    loss_of(network).backward()
    optimizer.step()
    memory = device_memory(recipe_of(cost, CONFIG, averages=2), recipe_of(cost, CONFIG).stages[0])
    assert memory.weights == sum(value.nbytes for value in network.parameters())
    assert memory.gradients == sum(value.grad.nbytes for value in network.parameters() if value.grad is not None)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert memory.optimizer == sum(value.nbytes for value in moments)
    assert memory.averages == 2 * memory.gradients


@pytest.mark.parametrize("targets", TARGETS[:2], ids=len)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_no_more_is_kept_for_the_backward_pass_than_the_forecast_has(kind, targets):
    def kept(network):
        with saved_storages(network) as found:
            loss = loss_of(network, side=16)
        assert loss.requires_grad
        return sum(storage.nbytes() for storage in found.values())

    share = kept(adapted(kind, targets)) / kept(XUT(CONFIG))
    assert 0.6 < share < 1.0


def test_a_forecast_bills_the_adapter_alone():
    cost, machine = cost_of("lora", TARGETS[0], WIDE), Machine(GPUS["5090"], 4)
    part, whole = (forecast(recipe_of(each, WIDE), machine) for each in (cost, None))
    assert part.stages[0].step.total < whole.stages[0].step.total
    share = cost.trained / recipe_of(None, WIDE).parameters
    assert part.storage.checkpoint_gb == pytest.approx(share * whole.storage.checkpoint_gb)
    assert part.stages[0].exchange_gb == pytest.approx(share * whole.stages[0].exchange_gb)


@pytest.mark.slow
def test_a_step_takes_less_time_than_one_of_all_weights_and_no_less_than_is_counted():
    """The least processor time on one thread of both in turn; what is beside the layers takes more than its products.

    The products themselves are compared with torch's counter above.
    """
    torch.set_num_threads(1)
    cost = cost_of("lora", TARGETS[0], WIDE)
    networks = {"part": adapted("lora", TARGETS[0], WIDE), "whole": XUT(WIDE)}
    least = dict.fromkeys(networks, float("inf"))
    for name in list(networks) * 5:
        networks[name].zero_grad()
        began = time.process_time()
        loss_of(networks[name], side=16).backward()
        least[name] = min(least[name], time.process_time() - began)
    work = Workload.of(WIDE, 16, 16, 8)
    counted = adapter_operations(WIDE, work, cost, recompute=False).network
    counted /= network_operations(WIDE, work, recompute=False).network
    assert 0.95 * counted < least["part"] / least["whole"] < 0.97
