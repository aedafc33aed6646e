"""Parts of a training step as calls to be timed: autoencoder, text encoder, network.

Shapes: B samples, C latent channels, h×w latent grid, N image tokens, L text tokens.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.benchmarks.live_memory import LiveMemory
from hdm_lightning.benchmarks.parts import random_autoencoder, random_network, random_text_encoder
from hdm_lightning.benchmarks.settings import CaseSettings
from hdm_lightning.benchmarks.timing import Call, wait_for
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUT
from hdm_lightning.models.counts import TRAINING_FACTOR
from hdm_lightning.models.routing import random_keep
from hdm_lightning.planning.autoencoder_cost import AutoencoderArchitecture
from hdm_lightning.planning.operations import Operations, operations
from hdm_lightning.planning.recipe import Recipe, StageRecipe
from hdm_lightning.planning.text_cost import TextArchitecture

PrepareNetwork = Callable[[XUT, bool, bool], None]
"""Applies (checkpointing, compile) to a network in place, as training does."""


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        name: what it is.
        call: does it once.
        samples: images or captions of one call.
        flops: operations of one call.
        model_flops: those of them that MFU counts.
        held: tensors that stay between calls.
        values: further figures, read after timing.
    """

    name: str
    call: Call
    samples: int
    flops: float
    model_flops: float
    held: Callable[[], Iterable[Tensor]]
    values: Callable[[], Mapping[str, Any]] = field(default=dict)


def autoencoder_case(settings: CaseSettings) -> Case:
    """Encoding or decoding a batch of images, without gradients.

    Raises:
        UserError: the mode is neither.
    """
    mode = _mode(settings, "encode", "decode")
    config, device = settings.parts.autoencoder, settings.torch_device
    autoencoder = random_autoencoder(config, dtype=settings.torch_dtype, max_pixels=settings.pixels).to(device)
    cost, side = AutoencoderArchitecture.from_config(config), settings.side_px
    if mode == "encode":
        image = torch.rand(settings.batch, 3, side, side, device=device) * 2 - 1
        call: Call = lambda: autoencoder.encode(image)  # noqa: E731
        flops = settings.batch * cost.encode_flops(side, side)
    else:
        latent = torch.randn(settings.batch, cost.latent_channels, *[side // cost.factor] * 2, device=device)
        call = lambda: autoencoder.decode(latent)  # noqa: E731
        flops = settings.batch * cost.decode_flops(side, side)
    return Case(f"vae {mode}", call, settings.batch, flops, flops, lambda: _tensors(autoencoder.model))


def text_case(settings: CaseSettings) -> Case:
    """Encoding a batch of captions that fill the context."""
    config, device = settings.parts.text, settings.torch_device
    encoder = random_text_encoder(config, dtype=settings.torch_dtype, max_tokens=settings.tokens).to(device)
    shape = (settings.batch, settings.context_length)
    tokens = torch.randint(0, int(config["vocab_size"]), shape, device=device)
    lengths = torch.full((settings.batch,), settings.context_length)
    flops = settings.batch * TextArchitecture.from_config(config).flops(settings.context_length)
    held = lambda: _tensors(encoder.model)  # noqa: E731
    return Case("text", lambda: encoder.encode(tokens, lengths), settings.batch, flops, flops, held)


def network_case(settings: CaseSettings, prepare: PrepareNetwork) -> Case:
    """The network on random latents: forward and backward pass with routing, or the forward pass alone.

    Args:
        settings: of the case.
        prepare: applies checkpointing and compilation as training does.

    Raises:
        UserError: the mode is neither.
    """
    mode = _mode(settings, "train", "forward")
    config, device, batch = settings.parts.network, settings.torch_device, settings.batch
    network = random_network(config).to(device)
    prepare(network, settings.checkpointing and mode == "train", settings.compile)
    side = settings.latent_side
    tokens = (side // config.patch_size) ** 2
    inputs = {
        "latent": torch.randn(batch, config.channels, side, side, device=device),
        "t": torch.rand(batch, device=device),
        "context": torch.randn(batch, settings.context_length, config.context_width, device=device),
        "context_lengths": torch.full((batch,), settings.context_length, device=device),
        "token_positions": torch.randn(batch, tokens, 2, device=device),
        "keep": random_keep(batch, tokens, settings.routing_rate, device=device) if settings.routing_rate else None,
    }
    count = counted_operations(settings)
    if mode == "forward":
        call: Call = lambda: _forward(network, inputs, settings)  # noqa: E731
        flops = model_flops = batch * count.forward
    else:
        call = lambda: _train(network, inputs, settings)  # noqa: E731
        flops, model_flops = batch * count.network, TRAINING_FACTOR * batch * count.forward
    return Case(f"xut {mode}", call, batch, flops, model_flops, lambda: _tensors(network))


def recipe_of(settings: CaseSettings) -> Recipe:
    """A case's settings as a recipe of one stage, for planning."""
    parts = settings.parts
    stage = StageRecipe(
        "bench",
        settings.side_px,
        samples=settings.batch,
        batch_size=settings.batch,
        micro_batch_size=settings.batch,
        routing_rate=settings.routing_rate,
        context_length=settings.context_length,
        checkpointing=settings.checkpointing,
    )
    return Recipe(
        parts.network,
        (stage,),
        TextArchitecture.from_config(parts.text),
        AutoencoderArchitecture.from_config(parts.autoencoder),
        compiled=settings.compile,
        mixed=settings.torch_dtype != torch.float32,
    )


def counted_operations(settings: CaseSettings) -> Operations:
    """Operations of one training sample of a case."""
    recipe = recipe_of(settings)
    return operations(recipe, recipe.stages[0])


def peak_bytes(case: Case, settings: CaseSettings, *, beside: Iterable[Case] = ()) -> int:
    """Most bytes alive on the device during one call; 0 where that cannot be seen (compiled code on a CPU).

    Args:
        case: the work.
        settings: of the case.
        beside: other cases in the process, whose tensors do not count.
    """
    device = settings.torch_device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        case.call()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - sum(held_bytes(other) for other in beside)
    if settings.compile:
        return 0
    memory = LiveMemory()
    memory.hold(*case.held())
    with memory:
        case.call()
    return memory.peak_bytes


def held_bytes(case: Case) -> int:
    """Bytes of the tensors that stay between a case's calls, each storage once."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in case.held()}
    return sum(storages.values())


def autocast(settings: CaseSettings) -> torch.autocast:
    """Autocast to the case's dtype; off for float32."""
    dtype = settings.torch_dtype
    return torch.autocast(settings.torch_device.type, dtype=dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def _forward(network: XUT, inputs: Mapping[str, Any], settings: CaseSettings) -> Tensor:
    with autocast(settings):
        return network(**inputs)


def _train(network: XUT, inputs: Mapping[str, Any], settings: CaseSettings) -> None:
    with autocast(settings):
        loss = network(**inputs).float().square().mean()
    loss.backward()
    network.zero_grad(set_to_none=True)


def _tensors(module: Any) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _mode(settings: CaseSettings, *known: str) -> str:
    if settings.mode not in ("", *known):
        raise UserError(
            f"{settings.mode!r} is not one of {', '.join(known)}", where="--mode", hint=f"--mode {known[0]}"
        )
    return settings.mode or known[0]
