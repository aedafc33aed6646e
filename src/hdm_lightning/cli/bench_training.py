"""The cases of `hdm-bench` that need training or sampling: an hdm-train step, images, the network."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.diffusion.flow import logit_normal_times
from hdm_lightning.encoders.autoencoder import MAX_PIXELS
from hdm_lightning.encoders.text import MAX_TOKENS
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.models import XUTConfig
from hdm_lightning.profiling.cases import (
    Captions,
    Case,
    RandomTokens,
    Setup,
    autoencoder_case,
    network_case,
    random_autoencoder,
    random_network,
    random_text_encoder,
    sampling_flops,
    tensors,
    text_case,
)
from hdm_lightning.training.averaging.averages import ParameterAverages
from hdm_lightning.training.callbacks.throughput import SectionClock
from hdm_lightning.training.modules.draws import draw
from hdm_lightning.training.modules.flow_module import FlowModule
from hdm_lightning.training.modules.flow_step import SideStream, latent_grid, pinned
from hdm_lightning.training.optimization.muon import MuonAdamW
from hdm_lightning.training.stages import StageSettings
from hdm_lightning.training.strategies.parallelize import prepare_network

SEED = 0
SECTIONS = {"encode_images": "vae", "encode_text": "text", "network": "xut"}
"""Sections of a step, and their names in reports."""


def step_case(setup: Setup) -> Case:
    """Return the case of a whole training step: encoders, network, backward pass, optimizer, average."""
    settings, batch, side = setup.settings, setup.settings.batch, setup.side_px
    step = TrainingStep(
        setup.parts.network,
        setup.parts.text,
        setup.parts.autoencoder,
        StageSettings(
            resolution=side,
            samples=1000 * setup.samples,
            batch_size=setup.samples,
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
        captions=setup.micro_batches,
        latents=settings.latents,
        overlapped=settings.overlap,
    )

    def sections() -> Mapping[str, Any]:
        seconds = step.clock.drain()
        return {"sections_share": {name: value / sum(seconds.values()) for name, value in seconds.items()}}

    encode = 0 if settings.latents else setup.autoencoder_cost.encode_flops(side, side)
    fed = setup.fed(lambda text: setup.operations(text).total + encode + setup.text_cost.flops(text))
    return Case("step", step, setup.samples, fed, setup.useful(setup.model_flops), step.tensors, sections)


def sample_case(setup: Setup) -> Case:
    """Return the case of sampling from prompts: text encoder, guided solver steps, decoding."""
    settings, side, batch = setup.settings, setup.side_px, setup.settings.batch
    network = random_network(setup.parts.network).to(setup.device).eval()
    prepare_network(network, compiled=settings.compile)
    text, autoencoder = setup.text_encoder(), setup.autoencoder()
    tokenizer = RandomTokens(int(setup.parts.text["vocab_size"]), settings.context_length)
    pipeline = HDMPipeline(network, autoencoder, text_encoder=text, tokenizer=tokenizer)
    pipeline.max_batch = batch
    pipeline.autocast = None if setup.dtype == torch.float32 else setup.dtype
    wanted = SamplingSettings(height=side, width=side, steps=settings.steps, guidance_scale=settings.guidance_scale)
    prompts, seeds, flops = [f"prompt {number}" for number in range(batch)], list(range(batch)), sampling_flops(setup)
    held = tensors(network, text.model, autoencoder.model)
    return Case(
        "sample", lambda: pipeline.draw(prompts, seeds, wanted), batch, batch * flops, batch * flops, lambda: held
    )


BUILDERS: Mapping[str, Callable[[Setup], Case]] = {
    "vae": autoencoder_case,
    "text": text_case,
    "xut": lambda setup: network_case(setup, prepare_network),
    "step": step_case,
    "sample": sample_case,
}
"""Subcommand to case."""


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch on the device, copied as in training: without making the host wait."""
    held = pinned(batch) if device.type == "cuda" else batch
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in held.items()
    }


class TrainingStep:
    """An optimizer step per call: micro-batches through encoders, network and backward pass, then clip and average.

    Args:
        network, text, autoencoder: configurations of the XUT, of transformers and of diffusers.
        stage: resolution, micro-batch, routing, context, checkpointing.
        device: device to run on.
        dtype: of autocast and of the encoders; float32 means no autocast.
        compiled, text_max_tokens, autoencoder_max_pixels, averages, muon: as in `profiling.planned_run.Recipe`.
        captions: of each micro-batch; None means one micro-batch whose captions fill the context.
        latents: whether batches hold latents from disk instead of images.
        overlapped: whether a micro-batch is encoded while the network processes the previous one.
    """

    def __init__(
        self,
        network: XUTConfig,
        text: Mapping[str, Any],
        autoencoder: Mapping[str, Any],
        stage: StageSettings,
        *,
        device: torch.device,
        dtype: torch.dtype,
        compiled: bool = False,
        text_max_tokens: int = MAX_TOKENS,
        autoencoder_max_pixels: int = MAX_PIXELS,
        averages: int = 1,
        muon: bool = False,
        captions: Sequence[Captions] | None = None,
        latents: bool = False,
        overlapped: bool = False,
    ) -> None:
        self.stage, self.device, self.dtype, self.latents = stage, device, dtype, latents
        self.network = random_network(network, seed=SEED).to(device)
        prepare_network(self.network, activation_checkpointing=stage.activation_checkpointing, compiled=compiled)
        self.module = FlowModule(
            self.network,
            random_text_encoder(text, dtype=dtype, max_tokens=text_max_tokens),
            random_autoencoder(autoencoder, dtype=dtype, max_pixels=autoencoder_max_pixels),
            learning_rate=stage.learning_rate,
            routing_rate=stage.routing_rate,
            weight_decay=stage.weight_decay,
        )
        self.module.to(device)
        self.clock = SectionClock()
        self.module.section = lambda name: self.clock.section(SECTIONS[name])  # type: ignore[method-assign]
        self.module.encoders.to(device)
        self.module.side_stream = SideStream(device) if overlapped else None
        groups: list[Any] = [*self.module.parameter_groups()]
        self.optimizer = MuonAdamW(groups) if muon else torch.optim.AdamW(groups, betas=stage.betas, fused=True)
        self.loss: Tensor | None = None
        self.averages = ParameterAverages(self.network, [500_000] * averages)
        given = captions or [Captions((stage.context_length,) * stage.micro_batch_size, stage.context_length)]
        self.batches = [self._random_batch(int(text["vocab_size"]), number, each) for number, each in enumerate(given)]

    def __call__(self) -> Tensor:
        """Take one optimizer step and return the loss."""
        losses = [self._micro_batch(batch) for batch in self.batches]
        with self.clock.section("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.stage.gradient_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.averages.update(self.stage.micro_batch_size * len(self.batches))
        self.loss = torch.stack(losses).mean()
        return self.loss

    def _micro_batch(self, batch: dict[str, Any]) -> Tensor:
        drawn, stream = self._with_draws(batch), self.module.side_stream
        move = partial(on_device, drawn, self.device)
        batch = move() if stream is None else self.module.encoded_ahead(stream, move, self._autocast())
        with self._autocast():
            losses = self.module.losses(batch, self.network, logit_normal_times(batch["uniform"]))
            loss = (losses * batch["weight"]).mean() / len(self.batches)
        del batch, drawn
        with self.clock.section("backward"):
            loss.backward()
        return loss.detach() * len(self.batches)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _with_draws(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with the random numbers that training draws on the CPU."""
        rows, columns = latent_grid(batch, self.module.autoencoder.factor)
        patch = self.module.patch_size
        tokens = (rows // patch) * (columns // patch) if self.stage.routing_rate else 0
        drawn = draw(SEED, "bench", batch["index"], (self.module.autoencoder.channels, rows, columns), tokens)
        scores = {} if drawn.scores is None else {"scores": drawn.scores}
        return {**batch, "noise": drawn.noise, "uniform": drawn.uniform, **scores}

    def tensors(self) -> list[Tensor]:
        """Return the tensors kept between steps: weights, averages, encoders, optimizer moments, the last loss."""
        encoders = (self.module.text_encoder.model, self.module.autoencoder.model)  # type: ignore[attr-defined]
        shadows = [tensor for shadow in self.averages.shadows for tensor in shadow]
        kept = [self.loss, *(value for entry in self.optimizer.state.values() for value in entry.values())]
        return [*tensors(self.network, *encoders), *shadows, *(each for each in kept if isinstance(each, Tensor))]

    def _random_batch(self, vocabulary: int, number: int, captions: Captions) -> dict[str, Any]:
        """Return a batch as the loader yields it, on the CPU."""
        generator = torch.Generator().manual_seed(SEED + number)
        count, side = self.stage.micro_batch_size, self.stage.resolution
        return {
            **self._random_images(count, side, generator),
            "crop": torch.tensor([[0.0, 0.0, side, side]]).repeat(count, 1),
            "tokens": torch.randint(0, vocabulary, (count, captions.padded), generator=generator),
            "lengths": torch.tensor(captions.lengths),
            "index": torch.arange(number * count, (number + 1) * count),
            "weight": torch.ones(count),
            "keys": [f"random/{number}" for number in range(count)],
            "captions": [""] * count,
        }

    def _random_images(self, count: int, side: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return images (B,3,H,W), or the means of their latents (B,1,C,H/f,W/f)."""
        if not self.latents:
            return {"image": torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)}
        autoencoder = self.module.autoencoder
        shape = (count, 1, autoencoder.channels, side // autoencoder.factor, side // autoencoder.factor)
        return {"latent": torch.randn(shape, generator=generator).half()}
