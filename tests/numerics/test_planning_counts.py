"""Forecast operations and bytes against torch's own counters, and against what a real training step keeps alive."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hdm_lightning.cli.bench_training import TrainingStep
from hdm_lightning.models import XUTConfig
from hdm_lightning.models.compiled_blocks import compile_blocks
from hdm_lightning.models.routing import random_keep
from hdm_lightning.profiling.cases import random_autoencoder, random_network, random_text_encoder
from hdm_lightning.profiling.encoder_costs import (
    MINILM_L6,
    QWEN3_0_6B,
    SDXL_AUTOENCODER,
    TINY_AUTOENCODER,
    TINY_TEXT,
    AutoencoderArchitecture,
    EncoderConfigs,
    TextArchitecture,
)
from hdm_lightning.profiling.live_memory import LiveMemory
from hdm_lightning.profiling.memory import COMPILED_SHARE, activation_bytes, device_memory
from hdm_lightning.profiling.planned_run import Recipe, StageRecipe
from hdm_lightning.training.modules.flow_step import FrozenEncoders
from hdm_lightning.training.stages import StageSettings
from saved_tensors import saved_storages

CPU = torch.device("cpu")
SMALL = XUTConfig(width=128, mlp_width=384, heads=4, head_dim=32, context_width=32, depth=2, decoder_blocks=2)
ATEN = torch.ops.aten


def heads_of(query, shape):
    """Shared keys and values are read by every head of the query; the counter of torch 2.9 takes no fewer."""
    return (*query[:2], *shape[2:])


FLASH_ON_CPU = {  # torch's own formulas, for the CPU's kernels, which its counter passes over
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, heads_of(q, k), heads_of(q, v)
    ),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, heads_of(q, k), heads_of(q, v)
    ),
}


def recipe_and_stage(**changes):
    values = {"resolution": 128, "micro_batch_size": 4, "routing_rate": 0.5, "context_length": 24, **changes}
    batch = values["micro_batch_size"]
    recompute = values.pop("checkpointing", False)
    stage = StageRecipe("a", samples=100, batch_size=batch, checkpointing=recompute, **values)
    recipe = Recipe(
        SMALL,
        (stage,),
        *EncoderConfigs(TINY_TEXT, TINY_AUTOENCODER).architectures(),
        autoencoder_max_pixels=2 * values["resolution"] ** 2,
        compiled=False,
        mixed=False,
    )
    settings = StageSettings(
        samples=100, batch_size=batch, learning_rate=1e-3, activation_checkpointing=recompute, **values
    )
    kind = {"device": CPU, "dtype": torch.float32, "autoencoder_max_pixels": recipe.autoencoder_max_pixels}
    step = TrainingStep(SMALL, TINY_TEXT, TINY_AUTOENCODER, settings, **kind)
    return recipe, stage, step


@pytest.mark.parametrize("config", [SDXL_AUTOENCODER, TINY_AUTOENCODER, {**TINY_AUTOENCODER, "use_quant_conv": False}])
def test_autoencoder_operations_and_parameters(config):
    from diffusers import AutoencoderKL

    cost = AutoencoderArchitecture.from_config(config)
    with torch.device("meta"):
        model = AutoencoderKL(**config)
        with FlopCounterMode(display=False) as encode, torch.no_grad():
            model.encode(torch.empty(1, 3, 128, 192))
        with FlopCounterMode(display=False) as decode, torch.no_grad():
            model.decode(torch.empty(1, 4, 16, 24))
    assert cost.encode_flops(128, 192) == encode.get_total_flops()
    assert cost.decode_flops(128, 192) == decode.get_total_flops()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert cost.parameters == matrices
    if config is SDXL_AUTOENCODER:
        assert cost.parameters == pytest.approx(83_653_863, rel=1e-3)


def test_text_encoder_parameters_at_true_size():
    from transformers import AutoConfig, AutoModel

    for config, expected in ((QWEN3_0_6B, 596_049_920), (MINILM_L6, 22_713_216)):
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.for_model(**config))
        assert sum(parameter.numel() for parameter in model.parameters()) == expected
        assert TextArchitecture.from_config(config).parameters == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("config", [TINY_TEXT, {**MINILM_L6, "num_hidden_layers": 2, "vocab_size": 99}])
def test_text_encoder_operations(config):
    encoder = random_text_encoder(config)
    tokens = torch.randint(0, 99, (2, 16))
    with FlopCounterMode(display=False, custom_mapping=FLASH_ON_CPU) as counter:
        encoder.encode(tokens, torch.tensor([16, 16]))
    pooler = 2 * 2 * 384**2 if config["model_type"] == "bert" else 0  # of BERT's first token, not used here
    assert counter.get_total_flops() == 2 * TextArchitecture.from_config(config).flops(16) + pooler


@pytest.mark.parametrize(
    "changes", [{}, {"checkpointing": True}, {"checkpointing": "selective"}, {"routing_rate": 0.0, "resolution": 64}]
)
@pytest.mark.parametrize("fused", [True, False])
def test_operations_of_a_whole_training_step(changes, fused):
    recipe, stage, step = recipe_and_stage(**changes)
    backend = SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH
    with FlopCounterMode(display=False, custom_mapping=FLASH_ON_CPU) as counter, sdpa_kernel(backend):
        step()
    forecast = stage.micro_batch_size * recipe.operations(stage, fused_attention=fused).total
    assert forecast == pytest.approx(counter.get_total_flops(), rel=1e-6)


def measured_peak(step):
    step()  # the optimizer's moments come with the first step
    memory = LiveMemory()
    memory.hold(*step.tensors())
    before = memory.bytes
    with memory:
        step()
    assert memory.bytes == before
    return memory.peak_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"resolution": 256, "micro_batch_size": 6},
        {"resolution": 256, "micro_batch_size": 6, "routing_rate": 0.0},
        {"resolution": 256, "micro_batch_size": 10, "checkpointing": True},
        {"resolution": 256, "micro_batch_size": 10, "checkpointing": "selective"},
        {"resolution": 256, "micro_batch_size": 10, "checkpointing": True, "routing_rate": 0.0},
        {"resolution": 64, "micro_batch_size": 1},  # gradients, not activations, make the peak
    ],
)
def test_memory_forecast_is_within_a_tenth_of_the_peak(changes):
    recipe, stage, step = recipe_and_stage(**changes)
    assert device_memory(recipe, stage).total == pytest.approx(measured_peak(step), rel=0.1)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_those_that_the_optimizer_keeps(name):
    settings = StageSettings(32, samples=9, batch_size=1, micro_batch_size=1, learning_rate=1e-3, context_length=4)
    kind = {"device": CPU, "dtype": torch.float32, "muon": name == "muon"}
    step = TrainingStep(SMALL, TINY_TEXT, TINY_AUTOENCODER, settings, **kind)
    step()
    kept = [value for state in step.optimizer.state.values() for value in state.values() if value.numel() > 1]
    recipe, stage, _ = recipe_and_stage()
    recipe = replace(recipe, muon=name == "muon")
    measured = sum(value.numel() for value in kept)
    assert recipe.moments == pytest.approx(measured, rel=0.01)
    assert device_memory(recipe, stage).optimizer == 4 * recipe.moments


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_memory_of_encoding_images(device):
    from diffusers import AutoencoderKL

    config = SDXL_AUTOENCODER if device == "meta" else TINY_AUTOENCODER
    with torch.device(device):
        model = AutoencoderKL(**config)
        image = torch.zeros(2, 3, 256, 192)
        with LiveMemory() as memory, torch.no_grad():
            model.encode(image)
    forecast = 2 * AutoencoderArchitecture.from_config(config).encode_peak_bytes(256, 192, element_bytes=4)
    assert forecast == pytest.approx(memory.peak_bytes, rel=0.1)


@pytest.mark.parametrize("side", [64, 128, 256])
def test_memory_of_encoding_a_micro_batch_in_parts(side):
    limit, count = 70_000, 20
    encoders = FrozenEncoders(None, random_autoencoder(TINY_AUTOENCODER, max_pixels=limit))
    image = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    with LiveMemory() as memory:
        encoders.latents(image)
    stage = StageRecipe("a", side, samples=count, batch_size=count, micro_batch_size=count, context_length=1)
    encoders = EncoderConfigs(TINY_TEXT, TINY_AUTOENCODER).architectures()
    recipe = Recipe(SMALL, (stage,), *encoders, autoencoder_max_pixels=limit, mixed=False)
    assert device_memory(recipe, stage).encoding == pytest.approx(memory.peak_bytes, rel=0.1)


def test_memory_of_encoding_text():
    encoder = random_text_encoder({**TINY_TEXT, "hidden_size": 128, "intermediate_size": 384, "head_dim": 64})
    with LiveMemory() as memory:
        encoder.model(input_ids=torch.zeros(4, 64, dtype=torch.long), use_cache=False)
    cost = TextArchitecture.from_config(encoder.model.config.to_dict())
    assert 4 * cost.peak_bytes(64, 4) == pytest.approx(memory.peak_bytes, rel=0.1)


@pytest.mark.slow
def test_share_of_activations_that_compiled_graphs_keep(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    config = replace(SMALL, depth=1, decoder_blocks=2, blocks_after=2, mlp_width=384)
    network = random_network(config)
    eager = {batch: saved_bytes(network, batch) for batch in (2, 4)}
    compile_blocks(network)
    kept = {batch: saved_bytes(network, batch) for batch in (2, 4)}
    share = (kept[4] - kept[2]) / (eager[4] - eager[2])
    assert COMPILED_SHARE - 0.1 < share < COMPILED_SHARE  # the rest is what the backward pass works with


def saved_bytes(network, batch):
    """Bytes that the forward pass keeps for the backward pass, weights left out."""
    inputs = {"token_positions": torch.randn(batch, 256, 2), "keep": random_keep(batch, 256, 0.5)}
    lengths = torch.full((batch,), 24)
    with saved_storages(network) as kept, torch.autocast("cpu", torch.bfloat16):
        out = network(
            torch.randn(batch, 4, 32, 32),
            torch.rand(batch),
            torch.randn(batch, 24, 32),
            context_lengths=lengths,
            **inputs,
        )
    assert out.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_live_memory_follows_storages_not_views():
    memory = LiveMemory()
    kept = torch.ones(1000)
    memory.hold(kept)
    with memory:
        first = kept + 1
        view = first.view(10, 100)[2:4]
        second = first * 2
        del second
    assert (memory.bytes, memory.peak_bytes) == (8000, 12000)
    del first
    assert memory.bytes == 8000  # the view keeps the storage
    del view
    assert memory.bytes == 4000


def test_activation_formula_is_what_planning_uses():
    recipe, stage, _ = recipe_and_stage()
    two, three = (device_memory(recipe, replace(stage, micro_batch_size=n, batch_size=n)) for n in (2, 3))
    kept = activation_bytes(SMALL, recipe.work(stage), element_bytes=4)
    gradients = recipe.work(stage).full * 2 * SMALL.mlp_width * 4
    assert three.activations - two.activations == kept + gradients
