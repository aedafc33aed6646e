"""The loss of an autoencoder, alone and with a discriminator: terms, their balance, averaged gradients.

Shapes: images (B,3,H,W) in [-1, 1]; logits (B,1,h,w); every term (B,).
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.func import functional_call

from hdm_lightning.autoencoding import losses
from hdm_lightning.autoencoding.reconstruction import Reconstruction
from hdm_lightning.training.modules.autoencoder_network import AutoencoderNetwork
from hdm_lightning.training.modules.resumable_module import ResumableModule
from hdm_lightning.training.strategies import processes

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""Distance (B,) between two batches of images in [-1, 1], frozen and differentiable in both."""


@dataclass(frozen=True)
class GeneratorObjective:
    """The reconstruction terms and the KL divergence; `AdversarialSteps` adds the adversarial term.

    Args:
        pixel: kind of the pixel term, `l1`, `l2` or `huber`.
        pixel_weight, perceptual_weight, kl_weight: weight of the term, which is a mean per sample.
        perceptual: the perceptual distance; None, or a weight of 0, leaves it out.
    """

    pixel: str
    pixel_weight: float
    perceptual_weight: float
    kl_weight: float
    perceptual: PerceptualDistance | None = None

    def terms(self, result: Reconstruction) -> dict[str, Tensor]:
        """Return every term (B,), unweighted."""
        output, target, posterior = result.output, result.target, result.posterior
        terms = {
            "pixel": losses.pixel_loss(output, target, self.pixel),  # type: ignore[arg-type]
            "kl": losses.kl_divergence(posterior.mean, posterior.log_variance),
        }
        if self.perceptual is not None and self.perceptual_weight:
            terms["perceptual"] = self.perceptual(output, target)
        return terms

    def reconstruction(self, terms: dict[str, Tensor]) -> Tensor:
        """Return the weighted reconstruction loss (B,), without KL; the adaptive weight balances against it."""
        pixel = self.pixel_weight * terms["pixel"]
        return pixel + self.perceptual_weight * terms["perceptual"] if "perceptual" in terms else pixel

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Return reconstruction plus weighted KL (B,)."""
        return self.reconstruction(terms) + self.kl_weight * terms["kl"]


GENERATOR, DISCRIMINATOR = 0, 1
"""Indices of the two optimizers."""
EXCHANGED_NUMBERS = 8 * 2**20
"""Most gradient elements per all-reduce: reducing all gradients at once would need two more copies of them."""


@dataclass(frozen=True)
class AdversarialTerm:
    """Settings of the adversarial term.

    Attributes:
        weight: weight of the term; multiplied by the adaptive weight if that is on.
        adaptive: balance the term against the reconstruction at the decoder's last layer.
        largest: upper clamp of the adaptive weight.
        start_samples: samples to train before the discriminator and the term start.
        gradient_clip: largest gradient norm of the discriminator; 0 means no clipping.
    """

    weight: float
    adaptive: bool = True
    largest: float = 1e4
    start_samples: int = 0
    gradient_clip: float = 1.0

    def balance(self, reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
        """Return the adaptive weight () of two losses, from their gradients averaged over processes, or 1."""
        if not self.adaptive:
            return torch.ones((), device=reconstruction.device)
        gradients = [
            processes.averaged(torch.autograd.grad(loss, last_layer, retain_graph=True)[0])
            for loss in (reconstruction, adversarial)
        ]
        return losses.adaptive_weight(gradients[0], gradients[1], self.largest)


class AdversarialSteps(ResumableModule):
    """The training step of an autoencoder with a discriminator: two optimizers on one reconstruction.

    Both use the same forward pass, hence the same transform and the same posterior noise; the discriminator judges
    the output from before the generator's step. Gradients are averaged over processes here, once per optimizer step
    and just before clipping: DDP's own reducer expects one backward pass over all parameters.

    Attributes:
        network: the autoencoder.
        objective: terms of the loss, without the adversarial one.
        adversarial: settings of the adversarial term.
        gradient_clip: largest gradient norm of the autoencoder; 0 means no clipping.
    """

    network: AutoencoderNetwork
    objective: GeneratorObjective
    adversarial: AdversarialTerm
    gradient_clip: float
    _micro_batches = 0

    @abstractmethod
    def reconstruct(self, batch: dict[str, Any]) -> Reconstruction:
        """Run the autoencoder on a batch that contains its random draws."""

    @abstractmethod
    def log_terms(self, terms: Mapping[str, Tensor], loss: Tensor, weight: Tensor) -> None:
        """Log the terms (B,) and the loss ()."""

    def on_train_start(self) -> None:
        """Start with no micro-batch accumulated."""
        super().on_train_start()
        self._micro_batches = 0

    def adversarial_step(self, batch: dict[str, Any], discriminator: nn.Module) -> dict[str, Tensor]:
        """Accumulate both networks' gradients of a micro-batch; step both optimizers after a step's last one."""
        active = self.samples_trained >= self.adversarial.start_samples
        with self._own_synchronisation():
            with self.section("autoencoder"):
                result = self.reconstruct(batch)
            loss, per_sample = self._generator_loss(result, batch["weight"], discriminator if active else None)
            self.manual_backward(loss / self.accumulation)
            if active:
                judged = self._discriminator_loss(result, batch["weight"], discriminator)
                self.manual_backward(judged / self.accumulation)
        self.count_batch(len(per_sample))
        self._micro_batches += 1
        if self._micro_batches == self.accumulation:
            self._micro_batches = 0
            self._step(discriminator if active else None)
        return {"loss": loss.detach(), "sample_losses": per_sample.detach()}

    def _generator_loss(
        self, result: Reconstruction, weight: Tensor, discriminator: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        """Return reconstruction + KL + λ·weight·(−D(x̂)), the last term only with a discriminator, as () and (B,)."""
        terms = self.objective.terms(result)
        per_sample = self.objective.total(terms)
        loss = losses.batch_mean(per_sample, weight)
        if discriminator is not None:
            terms["adversarial"] = losses.generator_adversarial(frozen_call(discriminator, result.output))
            adversarial = losses.batch_mean(terms["adversarial"], weight)
            reconstruction = losses.batch_mean(self.objective.reconstruction(terms), weight)
            balance = self.adversarial.balance(reconstruction, adversarial, self.network.last_layer())
            terms["adaptive_weight"] = balance.reshape(1)
            loss = loss + balance * self.adversarial.weight * adversarial
            per_sample = per_sample + balance * self.adversarial.weight * terms["adversarial"]
        self.log_terms(terms, loss, weight)
        return loss, per_sample

    def _discriminator_loss(self, result: Reconstruction, weight: Tensor, discriminator: nn.Module) -> Tensor:
        """Return the hinge loss () of D(x) and D(x̂), detached from the autoencoder."""
        real, fake = discriminator(result.target.detach()), discriminator(result.output.detach())
        per_sample = losses.discriminator_hinge(real, fake)
        terms = {"discriminator": per_sample, "logits_real": real, "logits_fake": fake}
        self.log_step({f"train/{name}": term.detach().float().mean() for name, term in terms.items()}, len(weight))
        return losses.batch_mean(per_sample, weight)

    def _own_synchronisation(self) -> AbstractContextManager[None]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _step(self, discriminator: nn.Module | None) -> None:
        optimizers: Any = self.optimizers()
        clip_averaged(self.network, self.gradient_clip)
        optimizers[GENERATOR].step()
        self.count_step(self.trainer.global_step)
        self._finish_step(GENERATOR)
        if discriminator is not None:
            clip_averaged(discriminator, self.adversarial.gradient_clip)
            # Not through Lightning's wrapper, which would count this as another step of the trainer.
            optimizers[DISCRIMINATOR].optimizer.step()
            self._finish_step(DISCRIMINATOR)

    def _finish_step(self, which: int) -> None:
        self.trainer.optimizers[which].zero_grad()
        schedule = self.schedules[which]
        if schedule is not None:
            schedule.step()


def frozen_call(network: nn.Module, image: Tensor) -> Tensor:
    """Return network(image) with gradients flowing only to the image, not to the network's parameters."""
    frozen = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return functional_call(network, frozen, (image,))


def clip_averaged(network: nn.Module, largest: float) -> None:
    """Average the network's gradients over processes, then clip their norm to `largest`; 0 means no clipping."""
    parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
    average_gradients(parameters)
    if largest:
        torch.nn.utils.clip_grad_norm_(parameters, largest)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes; does nothing in a single process."""
    if not processes.distributed():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for part in in_parts(gradients, EXCHANGED_NUMBERS):
        flat = processes.averaged(torch.cat([gradient.flatten() for gradient in part]))
        for gradient, mean in zip(part, flat.split([each.numel() for each in part]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def in_parts(tensors: list[Tensor], largest: int) -> Iterator[list[Tensor]]:
    """Split a list of tensors, in order, into lists of at most `largest` elements, or of a single larger tensor."""
    part: list[Tensor] = []
    for tensor in tensors:
        if part and sum(each.numel() for each in part) + tensor.numel() > largest:
            yield part
            part = []
        part.append(tensor)
    if part:
        yield part
