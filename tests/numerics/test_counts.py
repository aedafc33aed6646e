"""Counts against closed forms and torch's own: built parameters, its operation counter, its saved tensors."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.routing import random_keep
from hdm_lightning.profiling.memory import activation_bytes
from hdm_lightning.profiling.operations import (
    TRAINING_FACTOR,
    Workload,
    forward_flops,
    network_parts,
    parameter_count,
    training_flops,
)
from saved_tensors import saved_storages

CONFIG = XUTConfig(
    channels=3, width=64, mlp_width=160, heads=4, head_dim=16, context_width=24, depth=3, encoder_blocks=2,
    decoder_blocks=2, blocks_before=1, blocks_after=2,
)  # fmt: skip


def closed_form(config: XUTConfig, work: Workload) -> dict[str, tuple[int, int]]:
    """Parameters and forward operations of each part, from the paper's description alone."""
    d, m, patch = config.width, config.mlp_width, config.channels * config.patch_size**2
    attention = 4 * d * d + d + d + d // 2  # q, k, v and output, its bias, the norm's gain, frequencies
    plain = attention + d * 2 * m + 2 * m + m * d + d + d
    reads, joins = config.skips in ("mirrored", "last"), config.skips == "concatenation"
    adaptive = 2 * d + d * 4 * d + 4 * d + 4 * d * 3 * d + 3 * d

    def block(tokens: int, attentions: int) -> int:
        return attentions * (8 * tokens * d * d + 4 * tokens**2 * d) + 6 * tokens * d * m

    before, after, depth = config.blocks_before, config.blocks_after, config.depth
    inside = depth * (config.decoder_blocks - 1)
    first = plain + attention * reads + (2 * d * d + d) * joins
    first_flops = block(work.routed, 1 + reads) + 4 * work.routed * d * d * joins
    parts = {
        "patch_embedding": (patch * d + d, 2 * work.image * patch * d),
        "text_projection": (config.context_width * d + d, 2 * work.text * config.context_width * d),
        "time_embedding": (d * d + d, 2 * d * d),
        "aspect_embedding": (2 * d + d * d + d, 2 * (d + d * d)),
        "modulation": ((2 + reads) * adaptive, (2 + reads) * 2 * 16 * d * d),
        "blocks_before": (before * plain, before * block(work.full, 1)),
        "encoder": (depth * config.encoder_blocks * plain, depth * config.encoder_blocks * block(work.routed, 1)),
        "decoder": (depth * first + inside * plain, depth * first_flops + inside * block(work.routed, 1)),
        "blocks_after": (after * plain, after * block(work.full, 1)),
        "output_projection": (d * patch + patch, 2 * work.image * d * patch),
    }
    return {name: each for name, each in parts.items() if name != "aspect_embedding" or config.aspect_ratio}


@pytest.mark.parametrize(
    ("name", "total"), [("xut_small", 237_290_128), ("xut_base", 343_176_208), ("xut_large", 555_628_816)]
)
def test_parameters_of_the_published_sizes(name: str, total: int) -> None:
    config = XUTConfig.preset(name)
    assert parameter_count(config) == total
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in XUT(config).parameters()) == total


@pytest.mark.parametrize("skips", ["mirrored", "last", "none", "concatenation"])
@pytest.mark.parametrize("aspect_ratio", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_parts_in_closed_form(skips: str, aspect_ratio: bool, rate: float) -> None:
    config = XUTConfig.from_json(CONFIG.to_json() | {"aspect_ratio": aspect_ratio, "skips": skips})
    work = Workload.of(config, 16, 8, 10, rate=rate)
    parts, flops = network_parts(config), forward_flops(config, work)
    assert {name: (parts[name].parameters, flops[name]) for name in parts} == closed_form(config, work)
    assert training_flops(config, (16, 8), 10, rate) == 3 * sum(
        flops for _, flops in closed_form(config, work).values()
    )


@pytest.mark.parametrize("skips", ["mirrored", "none", "concatenation"])
def test_operations_of_each_part(skips: str) -> None:
    config = XUTConfig.from_json(CONFIG.to_json() | {"skips": skips})
    model, work = XUT(config), Workload.of(config, 16, 8, 10, rate=0.5)
    inputs = torch.randn(3, 3, 16, 8), torch.rand(3), torch.randn(3, 10, 24)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*inputs, keep=random_keep(3, 32, 0.5))
    by_module = {name: sum(kinds.values()) / 3 for name, kinds in counter.get_flop_counts().items()}
    flops = forward_flops(config, work)
    assert counter.get_total_flops() == 3 * sum(flops.values())
    blocks = {
        part: sum(n for name, n in by_module.items() if name.startswith(f"XUT.{part}.") and name.count(".") == dots)
        for part, dots in (("blocks_before", 2), ("encoder", 3), ("decoder", 3), ("blocks_after", 2))
    }
    assert blocks == {part: flops[part] for part in blocks}
    assert by_module["XUT.output_projection"] == flops["output_projection"]


@pytest.mark.parametrize("name", ["xut_small", "xut_base", "xut_large"])
def test_operations_of_the_published_sizes(name: str) -> None:
    """Of a wide image of 1024² pixels and half the tokens routed, on the meta device, where nothing is computed."""
    config, text = XUTConfig.preset(name), 256
    work = Workload.of(config, 96, 168, text, rate=0.5)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        keep = torch.empty(1, work.kept, dtype=torch.int64)
        latent, context = torch.empty(1, 4, 96, 168), torch.empty(1, text, config.context_width)
        XUT(config)(latent, torch.empty(1), context, keep=keep)
    assert counter.get_total_flops() == sum(forward_flops(config, work).values())


def test_a_training_step_takes_the_stated_multiple() -> None:
    model, work = XUT(CONFIG), Workload.of(CONFIG, 8, 8, 4)
    latent, t, context = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 4, 24)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(latent, t, context).sum().backward()
    forward = sum(forward_flops(CONFIG, work).values())
    assert counter.get_total_flops() == pytest.approx(TRAINING_FACTOR * 2 * forward, rel=0.01)


def saved_bytes(model: XUT, *inputs: Tensor, **options: Tensor | None) -> int:
    """Storages that a forward pass keeps for the backward pass, parameters not counted."""
    with saved_storages(model) as kept:
        output = model(*inputs, **options)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wiring", [{}, {"residual": "normed"}, {"skips": "none"}, {"skips": "concatenation"}])
def test_activation_memory_in_float32(rate: float, shared: bool, wiring: dict[str, str]) -> None:
    config = XUTConfig.from_json(CONFIG.to_json() | wiring)
    model, batch = XUT(config), 16
    inputs = torch.randn(batch, 3, 16, 16), torch.rand(batch), torch.randn(batch, 12, 24)
    keep = random_keep(batch, 64, rate) if rate else None
    positions = None if shared else torch.rand(batch, 64, 2)
    kept = saved_bytes(model, *inputs, keep=keep, token_positions=positions)
    formula = activation_bytes(
        config, Workload.of(config, 16, 16, 12, rate=rate), element_bytes=4, shared_positions=shared and not rate
    )
    assert batch * formula == pytest.approx(kept, rel=0.03)


def test_activation_memory_under_autocast() -> None:
    model, batch = XUT(CONFIG), 16
    inputs = torch.randn(batch, 3, 16, 16), torch.rand(batch), torch.randn(batch, 12, 24)
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_bytes(model, *inputs, token_positions=torch.rand(batch, 64, 2))
    weights = sum(2 * parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    formula = activation_bytes(CONFIG, Workload.of(CONFIG, 16, 16, 12), element_bytes=2)
    # The CPU's RMSNorm keeps a float32 copy of its input, which the fused one of an accelerator does not.
    norms = sum(3 if block.reads_memory else 2 for block in model.blocks()) * (64 + 12) * CONFIG.width * 2
    assert batch * (formula + norms) == pytest.approx(kept - weights, rel=0.03)


def test_activation_memory_with_recomputed_blocks() -> None:
    model, batch = XUT(CONFIG), 16
    inputs = torch.randn(batch, 3, 16, 16), torch.rand(batch), torch.randn(batch, 12, 24)
    plain = XUT(CONFIG)
    for block in model.blocks():
        forward = block.forward
        object.__setattr__(block, "forward", lambda *args, f=forward: checkpoint(f, *args, use_reentrant=False))
    options = {"token_positions": torch.rand(batch, 64, 2)}
    kept = saved_bytes(model, *inputs, **options)
    block, work = plain.decoder[0][0], Workload.of(CONFIG, 16, 16, 12)
    captured = {}
    block.register_forward_pre_hook(lambda _m, args: captured.update(args=args))
    plain(*inputs, **options)
    largest = saved_bytes(block, *(a.detach() if isinstance(a, Tensor) else a for a in captured["args"]))
    formula = activation_bytes(CONFIG, work, element_bytes=4, checkpointing=True)
    assert batch * formula == pytest.approx(kept + largest, rel=0.05)
    assert formula < 0.3 * activation_bytes(CONFIG, work, element_bytes=4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((9, 8, 4), "latent has size 9x8; expected multiples of the patch size 2"),
        ((0, 8, 4), "latent has size 0x8"),
        ((8, 8, -1), "text is -1"),
    ],
)
def test_bad_workloads_are_named(arguments: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Workload.of(CONFIG, *arguments)
