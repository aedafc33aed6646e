"""A whole training step as hdm-train runs it, on random images and captions, for timing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.benchmarks.parts import random_autoencoder, random_network, random_text_encoder
from hdm_lightning.encoders.autoencoder import MAX_PIXELS
from hdm_lightning.encoders.text import MAX_TOKENS
from hdm_lightning.models import XUTConfig
from hdm_lightning.training.apply import prepare_network
from hdm_lightning.training.averaging.averages import WeightAverages
from hdm_lightning.training.flow_module import FlowMatchingModule
from hdm_lightning.training.frozen import FrozenEncoders
from hdm_lightning.training.optimization.optimizers import build_optimizer
from hdm_lightning.training.settings import LoggerSettings, OptimizerSettings, StageSettings, TrainerSettings
from hdm_lightning.training.stages import StagePlan

SEED = 0


class TrainingStep:
    """One micro-batch through encoders, network, backward pass, clipping, optimizer and averages at each call.

    Args:
        network: the network's shape.
        text: a transformers configuration of the text encoder.
        autoencoder: a diffusers configuration of the autoencoder.
        stage: resolution, micro-batch, routing, context, checkpointing.
        device: where.
        dtype: of autocast and of the encoders; float32 means no autocast.
        compiled: whether the network is compiled.
        text_max_tokens, autoencoder_max_pixels: as in the recipe.
        averages: weight averages kept.
        optimizer: AdamW with the usual settings where none is given.
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
        optimizer: OptimizerSettings | None = None,
    ) -> None:
        self.stage, self.device, self.dtype = stage, device, dtype
        optimizer = optimizer or OptimizerSettings()
        self.network = random_network(network, seed=SEED).to(device)
        prepare_network(self.network, stage, TrainerSettings(compile=compiled))
        self.encoders = FrozenEncoders(
            random_text_encoder(text, dtype=dtype, max_tokens=text_max_tokens),
            random_autoencoder(autoencoder, dtype=dtype, max_pixels=autoencoder_max_pixels),
        )
        plan = StagePlan(1, "bench", stage, 1, 1, max(1, stage.samples // stage.batch_size), 0)
        self.module = FlowMatchingModule(
            self.network, self.encoders, plan, optimizer, LoggerSettings(), SEED, static_shapes=compiled
        )
        self.module.to(device)
        self.module.setup("fit")
        self.optimizer = build_optimizer(self.network, stage, optimizer)
        self.averages = WeightAverages(self.network, [500_000] * averages)
        self.batch = self._random_batch(int(text["vocab_size"]))

    def __call__(self) -> Tensor:
        """Take one optimizer step; returns the loss."""
        draws = self.module.on_before_batch_transfer(self.batch, 0)
        batch = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in draws.items()}
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.module.training_step(batch, 0)
        del batch, draws
        self.module.on_before_backward(loss)
        loss.backward()
        self.module.on_after_backward()
        self.module.on_before_optimizer_step(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.stage.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averages.update(self.stage.micro_batch_size)
        self.module.on_train_batch_end(None, self.batch, 0)
        return loss.detach()

    def tensors(self) -> list[Tensor]:
        """What stays from step to step: weights, averages, encoders, the optimizer's moments, the last losses."""
        modules = (self.network, self.encoders.text.model, self.encoders.autoencoder.model)  # type: ignore[attr-defined]
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        shadows = [tensor for shadow in self.averages.shadows for tensor in shadow]
        kept = [self.module.sample_losses, *state]
        return [*held, *shadows, *(value for value in kept if isinstance(value, Tensor))]

    def _random_batch(self, vocabulary: int) -> dict[str, Any]:
        """A batch as the loader yields it, on the CPU, every caption as long as the context."""
        generator = torch.Generator().manual_seed(SEED)
        count, side, length = self.stage.micro_batch_size, self.stage.resolution, self.stage.context_length
        return {
            "image": torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator),
            "crop": torch.tensor([[0.0, 0.0, side, side]]).repeat(count, 1),
            "tokens": torch.randint(0, vocabulary, (count, length), generator=generator),
            "lengths": torch.full((count,), length),
            "index": torch.arange(count),
            "weight": torch.ones(count),
            "keys": [f"random/{number}" for number in range(count)],
            "captions": [""] * count,
        }
