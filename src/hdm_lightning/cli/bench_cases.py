"""The cases of `hdm-bench` that need training or sampling: a training step, images, the network as training has it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hdm_lightning.cli.bench_step import TrainingStep
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.settings import SamplingSettings
from hdm_lightning.models import XUT
from hdm_lightning.profiling.cases import Case, Setup, autoencoder_case, network_case, tensors, text_case
from hdm_lightning.profiling.operations import Workload, forward_flops
from hdm_lightning.profiling.random_parts import random_network
from hdm_lightning.training.stages import StageSettings
from hdm_lightning.training.strategies.parallelize import prepare_network


def step_case(setup: Setup) -> Case:
    """A whole training step: encoders, network, backward pass, optimizer, average."""
    settings, batch, side = setup.settings, setup.settings.batch, setup.side_px
    step = TrainingStep(
        setup.parts.network,
        setup.parts.text,
        setup.parts.autoencoder,
        StageSettings(
            resolution=side,
            samples=1000 * batch,
            batch_size=batch,
            micro_batch_size=batch,
            learning_rate=1e-3,
            routing_rate=settings.routing_rate,
            context_length=settings.context_length,
            activation_checkpointing=settings.checkpointing,
        ),
        device=setup.device,
        dtype=setup.dtype,
        compiled=settings.compile,
        autoencoder_max_pixels=batch * side**2,
        text_max_tokens=batch * settings.context_length,
    )

    def sections() -> Mapping[str, Any]:
        seconds = step.clock.drain()
        return {"sections_share": {name: value / sum(seconds.values()) for name, value in seconds.items()}}

    encoders = setup.autoencoder_cost.encode_flops(side, side) + setup.text_cost.flops(settings.context_length)
    count = setup.operations
    return Case("step", step, batch, batch * (count.total + encoders), batch * count.model, step.tensors, sections)


def sample_case(setup: Setup) -> Case:
    """Images from prompts: text, guided solver steps, decoding."""
    settings, side, batch = setup.settings, setup.side_px, setup.settings.batch
    network = random_network(setup.parts.network).to(setup.device).eval()
    prepare(network, False, settings.compile)
    text, autoencoder = setup.text_encoder(), setup.autoencoder()
    tokenizer = _RandomTokens(int(setup.parts.text["vocab_size"]), settings.context_length)
    pipeline = HDMPipeline(network, autoencoder, text_encoder=text, tokenizer=tokenizer)
    pipeline.max_batch = batch
    pipeline.autocast = None if setup.dtype == torch.float32 else setup.dtype
    wanted = SamplingSettings(height=side, width=side, steps=settings.steps, guidance_scale=settings.guidance_scale)
    prompts, seeds, flops = [f"prompt {number}" for number in range(batch)], list(range(batch)), sampling_flops(setup)
    held = tensors(network, text.model, autoencoder.model)
    return Case(
        "sample", lambda: pipeline.draw(prompts, seeds, wanted), batch, batch * flops, batch * flops, lambda: held
    )


def sampling_flops(setup: Setup) -> int:
    """Operations of one image: text, solver steps (twice the network under guidance), decoding."""
    settings, branches = setup.settings, 1 if setup.settings.guidance_scale == 1.0 else 2
    work = Workload.of(setup.parts.network, setup.latent_side, setup.latent_side, settings.context_length)
    network = sum(forward_flops(setup.parts.network, work).values()) * settings.steps
    decode = setup.autoencoder_cost.decode_flops(setup.side_px, setup.side_px)
    return branches * (network + setup.text_cost.flops(settings.context_length)) + decode


def prepare(network: XUT, checkpointing: bool, compiled: bool) -> None:
    """Make a network ready as training does."""
    prepare_network(network, activation_checkpointing=checkpointing, compiled=compiled)


BUILDERS: Mapping[str, Callable[[Setup], Case]] = {
    "vae": autoencoder_case,
    "text": text_case,
    "xut": lambda setup: network_case(setup, prepare),
    "step": step_case,
    "sample": sample_case,
}
"""Sub-command to case."""


class _RandomTokens:
    """Stands for a tokenizer: every prompt fills the context."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.context_length = vocabulary, length

    def bind(self, context_length: int) -> "_RandomTokens":
        return self

    def __call__(self, caption: str) -> tuple[list[int], int]:
        generator = torch.Generator().manual_seed(len(caption))
        ids = torch.randint(0, self.vocabulary, (self.context_length,), generator=generator)
        return ids.tolist(), self.context_length
