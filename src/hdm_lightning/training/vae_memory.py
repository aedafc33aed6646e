"""What a training step of an autoencoder keeps in memory, counted on the meta device before a weight is allocated.

Shapes: image (B,3,H,W); everything in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hdm_lightning.autoencoding.efficientnet_lite0 import EfficientNetLite0
from hdm_lightning.autoencoding.perceptual import lite0_distance
from hdm_lightning.autoencoding.reconstruction import Reconstruction
from hdm_lightning.models.discriminator import PatchDiscriminator
from hdm_lightning.training.vae_adversarial import frozen_call
from hdm_lightning.training.vae_network import AutoencoderNetwork, build_vae
from hdm_lightning.training.vae_objective import GeneratorObjective
from hdm_lightning.training.vae_settings import VaeTrainSettings

_FLOAT_BYTES = 4
# Weight, gradient and two moments of AdamW.
_COPIES_TRAINED = 4


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one device, in float32; the step's own temporaries and the allocator's slack come on top.

    Attributes:
        parameters: of the autoencoder.
        fixed_bytes: weights, gradients, moments and averages of both networks.
        activation_bytes: what the backward pass of one micro-batch needs, whichever network's is larger. Under
            bf16-mixed it is between this and half of it, since norms and activations keep float32.
    """

    parameters: int
    fixed_bytes: int
    activation_bytes: int

    @property
    def total_gb(self) -> float:
        """Both, in GB (10⁹ bytes)."""
        return (self.fixed_bytes + self.activation_bytes) / 1e9


def step_memory(settings: VaeTrainSettings, config: dict[str, Any]) -> StepMemory:
    """Count a plain step on whole images, with discriminator and perceptual network as configured.

    LPIPS networks are counted as if they were EfficientNet-Lite0, since their packages may be missing.

    Args:
        settings: of the run.
        config: fields of the AutoencoderKL.
    """
    with torch.device("meta"):
        network = AutoencoderNetwork(
            build_vae({key: value for key, value in config.items() if not key.startswith("_")}),
            train_encoder=settings.autoencoder.train_encoder,
        )
        adversarial = settings.adversarial
        judge = (
            PatchDiscriminator(adversarial.channels, adversarial.layers, adversarial.norm)  # type: ignore[arg-type]
            if adversarial.weight
            else None
        )
        named = settings.loss.perceptual_network
        lite0 = None if named is None else EfficientNetLite0().eval().requires_grad_(False)
        side = settings.stage.resolution
        image = torch.zeros(settings.stage.micro_batch_size, 3, side, side)
    distance = None if lite0 is None else partial(lite0_distance, lite0)
    objective = GeneratorObjective(settings.loss, distance)
    trained = [each for net in (network, judge) if net is not None for each in net.parameters() if each.requires_grad]
    every = [each for net in (network, judge) if net is not None for each in net.parameters()]
    averages = len(settings.ema.halflife_samples) * sum(p.numel() for p in network.parameters() if p.requires_grad)
    fixed = sum(p.numel() for p in every) + (_COPIES_TRAINED - 1) * sum(p.numel() for p in trained) + averages
    kept = [saved_bytes(lambda: _generator_loss(network, objective, judge, image), every)]
    if judge is not None:
        kept.append(saved_bytes(lambda: judge(image).sum() + judge(image.clone()).sum(), every))
    parameters = sum(p.numel() for p in network.parameters())
    return StepMemory(parameters, _FLOAT_BYTES * fixed, max(kept))


def saved_bytes(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Return the bytes of distinct storages that `forward` keeps for its backward pass, parameters left out."""
    known = {_key(parameter) for parameter in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if _key(tensor) not in known:
            kept[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()  # held until all is counted, so that no storage's place is used again
        total = sum(kept.values())
    del loss
    return total


def _generator_loss(
    network: AutoencoderNetwork, objective: GeneratorObjective, judge: nn.Module | None, image: Tensor
) -> Tensor:
    posterior = network.posterior(image)
    output = network.decode(posterior.sample(torch.zeros_like(posterior.mean)))
    terms = objective.terms(Reconstruction(output, image, posterior))
    loss = objective.total(terms).sum()
    return loss if judge is None else loss - frozen_call(judge, output).mean()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
