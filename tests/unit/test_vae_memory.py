"""The memory that a step is said to take, against what a real step's tensors take."""

import pytest
import torch

from hdm_lightning.autoencoding.losses import generator_adversarial
from hdm_lightning.autoencoding.perceptual import perceptual_distance
from hdm_lightning.benchmarks.live_memory import LiveMemory
from hdm_lightning.models.discriminator import PatchDiscriminator
from hdm_lightning.training.vae_adversarial import frozen_call
from hdm_lightning.training.vae_checks import vae_settings_from
from hdm_lightning.training.vae_memory import saved_bytes, step_memory
from hdm_lightning.training.vae_network import AutoencoderNetwork, build_vae

CONFIG = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 8,
}


def settings(**groups):
    stage = {"resolution": 64, "samples": 1, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1.0}
    return vae_settings_from(
        {
            "name": "x",
            "run_dir": "x",
            "data": {"train": "x"},
            "stage": stage,
            "ema": {"halflife_samples": [1]},
            **groups,
        }
    )


def test_saved_bytes_of_a_product():
    first, second = (torch.nn.Parameter(torch.ones(5, 7)), torch.ones(5, 7, requires_grad=True))
    factor = (second * 2).detach()
    assert saved_bytes(lambda: (first * factor).sum(), [first]) == 4 * 35
    assert saved_bytes(lambda: (first * factor + first * factor).sum(), [first]) == 4 * 35


@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
def test_a_step_takes_what_is_said_and_little_more(adversarial):
    groups = {"loss": {"perceptual_network": "efficientnet_lite0"}}
    if adversarial:
        groups["adversarial"] = {"weight": 0.5, "channels": 32}
    said = step_memory(settings(**groups), CONFIG)
    network = AutoencoderNetwork(build_vae(CONFIG))
    judge = PatchDiscriminator(32, 3, "group") if adversarial else None
    trained = sum(p.numel() for net in (network, judge) if net is not None for p in net.parameters())
    assert said.parameters == sum(p.numel() for p in network.parameters())
    assert said.fixed_bytes == 4 * (4 * trained + said.parameters)

    distance, image = perceptual_distance("efficientnet_lite0"), torch.rand(2, 3, 64, 64)
    with LiveMemory() as memory:
        output = network.decode(network.posterior(image).mean)
        loss = (output - image).abs().mean() + distance(output, image).mean()
        if judge is not None:
            loss = loss + generator_adversarial(frozen_call(judge, output)).mean()
        held = memory.bytes
        loss.backward()
    # The count leaves out the output itself and small results; a backward pass needs a few maps of its own.
    assert said.activation_bytes == pytest.approx(held, rel=0.1)
    assert memory.peak_bytes < 1.5 * said.activation_bytes + 4 * trained


def test_a_frozen_encoder_needs_less():
    whole = step_memory(settings(), CONFIG)
    frozen = step_memory(settings(autoencoder={"train_encoder": False}), CONFIG)
    assert frozen.parameters == whole.parameters
    assert frozen.fixed_bytes < whole.fixed_bytes and frozen.activation_bytes < whole.activation_bytes
