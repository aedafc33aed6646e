"""A training step of an autoencoder on empty images, for `profiling.live_memory` to rehearse.

Shapes: image (B,3,H,W).
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers  # noqa: F401 (a rehearsal may not be the first to import it)
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from hdm_lightning.autoencoding.efficientnet_lite0 import EfficientNetLite0
from hdm_lightning.autoencoding.losses import adaptive_weight, discriminator_hinge, generator_adversarial
from hdm_lightning.autoencoding.perceptual import lite0_distance
from hdm_lightning.autoencoding.reconstruction import Reconstruction
from hdm_lightning.training.autoencoder_run import build_discriminator
from hdm_lightning.training.modules.adversarial import GeneratorObjective, frozen_call
from hdm_lightning.training.modules.autoencoder_module import adamw_groups
from hdm_lightning.training.modules.autoencoder_network import AutoencoderNetwork, build_vae


@dataclass(frozen=True)
class StepSettings:
    """What of a training says how much memory its steps take."""

    groups: Mapping[str, Any]  # the plain groups of `hdm-train-vae` by name, see `training.autoencoder_checks`
    stage: Any  # sizes and recomputation
    averages: int = 1  # weight averages kept


class AutoencoderStep:
    """Plain steps on whole images, with discriminator and perceptual network as configured.

    LPIPS networks are taken for EfficientNet-Lite0, since their packages may be missing.

    Args:
        settings: of the run.
        config: fields of the AutoencoderKL.
        mixed: bfloat16 autocast, as on a GPU; else float32.
    """

    def __init__(self, settings: StepSettings, config: dict[str, Any], *, mixed: bool) -> None:
        self.settings, self.mixed = settings, mixed
        fields = {key: value for key, value in config.items() if not key.startswith("_")}
        network = AutoencoderNetwork(build_vae(fields), train_encoder=settings.groups["autoencoder"].train_encoder)
        if settings.stage.activation_checkpointing:
            network.vae.enable_gradient_checkpointing()
        for parameter in network.parameters():
            if parameter.dim() == 4:  # as in training; an empty tensor's module cannot be converted as a whole
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.network = network.train()
        self.discriminator = build_discriminator(settings.groups["adversarial"])
        named = settings.groups["loss"].perceptual_network
        perceptual = None if named is None else EfficientNetLite0().eval().requires_grad_(False)
        self.objective = GeneratorObjective(
            settings.groups["loss"], None if perceptual is None else partial(lite0_distance, perceptual)
        )
        trained = [network for network in (self.network, self.discriminator) if network is not None]
        self.networks: list[nn.Module] = [*trained, *([] if perceptual is None else [perceptual])]
        self.trained = [each for network in trained for each in network.parameters() if each.requires_grad]
        self.optimizers: list[Optimizer] = [AdamW(adamw_groups(network, 1e-4, 0.0), fused=True) for network in trained]
        averaged = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.averages = [each.detach().clone() for _ in range(settings.averages) for each in averaged]

    def __call__(self, micro_batches: int) -> None:
        """One optimizer step."""
        for _ in range(micro_batches):
            self._micro_batch()
        for optimizer in self.optimizers:
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def _micro_batch(self) -> None:
        side = self.settings.stage.resolution
        image = torch.zeros(self.settings.stage.micro_batch_size, 3, side, side)
        with self._precision():
            posterior = self.network.posterior(image)
            output = self.network.decode(posterior.sample(torch.zeros_like(posterior.mean)))
            loss = self._generator_loss(Reconstruction(output, image, posterior))
        loss.backward()
        if self.discriminator is not None:
            with self._precision():
                hinge = discriminator_hinge(self.discriminator(image), self.discriminator(output.detach())).mean()
            hinge.backward()

    def _generator_loss(self, result: Reconstruction) -> Tensor:
        terms = self.objective.terms(result)
        loss = self.objective.total(terms).mean()
        if self.discriminator is None:
            return loss
        adversarial = generator_adversarial(frozen_call(self.discriminator, result.output)).mean()
        reconstruction, last = self.objective.reconstruction(terms).mean(), self.network.last_layer()
        gradients = [torch.autograd.grad(one, last, retain_graph=True)[0] for one in (reconstruction, adversarial)]
        balance = adaptive_weight(gradients[0], gradients[1], self.settings.groups["adversarial"].adaptive_largest)
        return loss + balance * self.settings.groups["adversarial"].weight * adversarial

    def _precision(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.mixed else nullcontext()
