"""The cases of `hdm-bench` that need more than one room: a training step, sampling, the network as training has it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hdm_lightning.benchmarks.cases import Case, autoencoder_case, counted_operations, network_case, text_case
from hdm_lightning.benchmarks.parts import random_autoencoder, random_network, random_text_encoder
from hdm_lightning.benchmarks.settings import CaseSettings
from hdm_lightning.cli.bench_step import TrainingStep
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.settings import SamplingSettings
from hdm_lightning.models import XUT
from hdm_lightning.models.counts import Workload, forward_flops
from hdm_lightning.planning.autoencoder_cost import AutoencoderArchitecture
from hdm_lightning.planning.text_cost import TextArchitecture
from hdm_lightning.training.stages import StageSettings
from hdm_lightning.training.strategies.parallelize import prepare_network


def stage_of(settings: CaseSettings) -> StageSettings:
    """A case as a stage of one micro-batch a step."""
    return StageSettings(
        resolution=settings.side_px,
        samples=1000 * settings.batch,
        batch_size=settings.batch,
        micro_batch_size=settings.batch,
        learning_rate=1e-3,
        routing_rate=settings.routing_rate,
        context_length=settings.context_length,
        activation_checkpointing=settings.checkpointing,
    )


def step_case(settings: CaseSettings) -> Case:
    """A whole training step: encoders, network, backward pass, optimizer, average."""
    parts, count = settings.parts, counted_operations(settings)
    step = TrainingStep(
        parts.network,
        parts.text,
        parts.autoencoder,
        stage_of(settings),
        device=settings.torch_device,
        dtype=settings.torch_dtype,
        compiled=settings.compile,
        autoencoder_max_pixels=settings.pixels,
        text_max_tokens=settings.tokens,
    )

    def sections() -> Mapping[str, Any]:
        seconds = step.clock.drain()
        return {"sections_share": {name: value / sum(seconds.values()) for name, value in seconds.items()}}

    batch = settings.batch
    return Case("step", step, batch, batch * count.total, batch * count.model, step.tensors, sections)


def sample_case(settings: CaseSettings) -> Case:
    """Pictures from prompts: text, guided solver steps, decoding."""
    parts, device, dtype = settings.parts, settings.torch_device, settings.torch_dtype
    network = random_network(parts.network).to(device).eval()
    prepare_network(
        network,
        activation_checkpointing=stage_of(settings).activation_checkpointing,
        compiled=settings.compile,
    )
    text = random_text_encoder(parts.text, dtype=dtype, max_tokens=settings.tokens).to(device)
    autoencoder = random_autoencoder(parts.autoencoder, dtype=dtype, max_pixels=settings.pixels).to(device)
    pipeline = HDMPipeline(
        network,
        autoencoder,
        text_encoder=text,
        tokenizer=_RandomTokens(int(parts.text["vocab_size"]), settings.context_length),
    )
    pipeline.max_batch = settings.batch
    pipeline.autocast = None if dtype == torch.float32 else dtype
    wanted = SamplingSettings(
        height=settings.side_px, width=settings.side_px, steps=settings.steps, guidance_scale=settings.guidance_scale
    )
    prompts, seeds = [f"prompt {number}" for number in range(settings.batch)], list(range(settings.batch))
    flops = settings.batch * sampling_flops(settings)
    held = [*network.parameters(), *text.model.parameters(), *autoencoder.model.parameters()]
    return Case("sample", lambda: pipeline.draw(prompts, seeds, wanted), settings.batch, flops, flops, lambda: held)


def sampling_flops(settings: CaseSettings) -> int:
    """Operations of one picture: text, solver steps (twice the network under guidance), decoding."""
    parts, branches = settings.parts, 1 if settings.guidance_scale == 1.0 else 2
    work = Workload.of(parts.network, settings.latent_side, settings.latent_side, settings.context_length)
    network = forward_flops(parts.network, work).total * settings.steps
    text = TextArchitecture.from_config(parts.text).flops(settings.context_length)
    decode = AutoencoderArchitecture.from_config(parts.autoencoder).decode_flops(settings.side_px, settings.side_px)
    return branches * (network + text) + decode


def _prepare(network: XUT, checkpointing: bool, compiled: bool) -> None:
    prepare_network(network, activation_checkpointing=checkpointing, compiled=compiled)


BUILDERS: Mapping[str, Callable[[CaseSettings], Case]] = {
    "vae": autoencoder_case,
    "text": text_case,
    "xut": lambda settings: network_case(settings, _prepare),
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
