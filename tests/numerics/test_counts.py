"""Counts in closed form against torch's own: built parameters, its operation counter, its saved tensors."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.counts import TRAINING_FACTOR, Parts, Workload, forward_flops, parameter_counts
from hdm_lightning.models.memory import activation_bytes
from hdm_lightning.models.routing import random_keep

CONFIG = XUTConfig(
    channels=3, width=64, mlp_width=160, heads=4, head_dim=16, context_width=24, depth=3, encoder_blocks=2,
    decoder_blocks=2, blocks_before=1, blocks_after=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "total"), [("xut_small", 237_290_128), ("xut_base", 343_176_208), ("xut_large", 555_628_816)]
)
def test_parameters_of_the_published_sizes(name: str, total: int) -> None:
    config = XUTConfig.preset(name)
    assert parameter_counts(config).total == total
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in XUT(config).parameters()) == total


@pytest.mark.parametrize("aspect_ratio", [True, False])
def test_parameters_of_each_part(aspect_ratio: bool) -> None:
    config = XUTConfig.from_json(CONFIG.to_json() | {"aspect_ratio": aspect_ratio})
    with torch.device("meta"):
        model = XUT(config)
    parts = {
        "embedding": ("patch_embedding", "text_projection"),
        "conditioning": ("time_embedding", "aspect_embedding", "modulation"),
        "blocks_before": ("blocks_before",),
        "encoder": ("encoder",),
        "decoder": ("decoder",),
        "blocks_after": ("blocks_after",),
        "output": ("output_projection",),
    }
    counted = {
        part: sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in modules)
        for part, modules in parts.items()
    }
    assert parameter_counts(config) == Parts(**counted)


def test_operations_of_each_part() -> None:
    model, work = XUT(CONFIG), Workload.of(CONFIG, 16, 8, 10, rate=0.5)
    inputs = torch.randn(3, 3, 16, 8), torch.rand(3), torch.randn(3, 10, 24)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*inputs, keep=random_keep(3, 32, 0.5))
    by_module = {name: sum(kinds.values()) / 3 for name, kinds in counter.get_flop_counts().items()}
    flops = forward_flops(CONFIG, work)
    assert counter.get_total_flops() == 3 * flops.total
    blocks = {
        part: sum(n for name, n in by_module.items() if name.startswith(f"XUT.{part}.") and name.count(".") == dots)
        for part, dots in (("blocks_before", 2), ("encoder", 3), ("decoder", 3), ("blocks_after", 2))
    }
    assert blocks == {part: getattr(flops, part) for part in blocks}
    assert by_module["XUT.output_projection"] == flops.output


@pytest.mark.parametrize("name", ["xut_small", "xut_base", "xut_large"])
def test_operations_of_the_published_sizes(name: str) -> None:
    """Of a wide image of 1024² pixels and half the tokens routed, on the meta device, where nothing is computed."""
    config, text = XUTConfig.preset(name), 256
    work = Workload.of(config, 96, 168, text, rate=0.5)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        keep = torch.empty(1, work.kept, dtype=torch.int64)
        latent, context = torch.empty(1, 4, 96, 168), torch.empty(1, text, config.context_width)
        XUT(config)(latent, torch.empty(1), context, keep=keep)
    assert counter.get_total_flops() == forward_flops(config, work).total


def test_a_training_step_takes_the_stated_multiple() -> None:
    model, work = XUT(CONFIG), Workload.of(CONFIG, 8, 8, 4)
    latent, t, context = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 4, 24)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(latent, t, context).sum().backward()
    assert counter.get_total_flops() == pytest.approx(TRAINING_FACTOR * 2 * forward_flops(CONFIG, work).total, rel=0.01)


def saved_bytes(model: XUT, *inputs: Tensor, **options: Tensor | None) -> int:
    """Storages that a forward pass keeps for the backward pass, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs, **options)
    kept = sum(storage.nbytes() for storage in storages.values())
    del output
    return kept


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("residual", ["input", "normed"])
def test_activation_memory_in_float32(rate: float, shared: bool, residual: str) -> None:
    config = XUTConfig.from_json(CONFIG.to_json() | {"residual": residual})
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
