"""The LightningModule of an autoencoder with a discriminator: two optimizers on one reconstruction.

Shapes: images (B,3,H,W) in [-1, 1]; logits (B,1,h,w).

Both optimizers work on the same forward pass, hence on the same τ and the same posterior noise; the discriminator
judges the output as it was before the generator's step. Gradients are averaged over processes by this module, once per
optimizer step and just before clipping: DDP's own reducer expects one backward pass over all parameters.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hdm_lightning.autoencoding.branches import BranchSettings
from hdm_lightning.autoencoding.losses import adaptive_weight, batch_mean, discriminator_hinge, generator_adversarial
from hdm_lightning.autoencoding.reconstruction import Reconstruction
from hdm_lightning.training import processes
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.vae.module import AutoencoderModule
from hdm_lightning.training.vae.network import AutoencoderNetwork
from hdm_lightning.training.vae.objective import GeneratorObjective
from hdm_lightning.training.vae.optimizers import build_adamw, build_schedule
from hdm_lightning.training.vae.settings import AdversarialSettings, PatchSettings

GENERATOR, DISCRIMINATOR = 0, 1
"""Places of the two optimizers."""
EXCHANGED_NUMBERS = 8 * 2**20
"""Numbers of one exchange between processes: all gradients at once would be copied twice beside themselves."""


class AdversarialAutoencoderModule(AutoencoderModule):
    """Adds a PatchGAN with hinge loss and adaptive weight to the autoencoder's training.

    With an adaptive weight λ, accumulation over k micro-batches is not the same as one batch k times as large, since λ
    is a ratio of norms; several processes are, since the gradients that λ compares are averaged over them first.

    Args:
        network: the autoencoder.
        plan: length, batch and rates.
        objective: terms and weights of the reconstruction loss.
        branches: probabilities and transforms.
        seed: the run's seed.
        patches: how long to train on patches of what size before whole images.
        discriminator: image to logits.
        adversarial: weight, start and the discriminator's rates.
    """

    def __init__(
        self,
        network: AutoencoderNetwork,
        plan: StagePlan,
        objective: GeneratorObjective,
        branches: BranchSettings,
        seed: int,
        patches: PatchSettings,
        discriminator: nn.Module,
        adversarial: AdversarialSettings,
    ) -> None:
        super().__init__(network, plan, objective, branches, seed, patches)
        self.automatic_optimization = False
        self.discriminator = discriminator
        self.adversarial = adversarial
        self._micro_batches = 0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        """Add both networks' gradients of a micro-batch; step both optimizers after the last of a step."""
        active = self.trainer.global_step * self.plan.settings.batch_size >= self.adversarial.start_samples
        with self._own_synchronisation():
            result = self.reconstruct(batch)
            self.manual_backward(self.generator_loss(result, batch, active) / self.plan.accumulation)
            if active:
                self.manual_backward(self.discriminator_loss(result, batch["weight"]) / self.plan.accumulation)
        self.samples_seen += len(batch["weight"]) * processes.world_size()
        self._micro_batches += 1
        if self._micro_batches == self.plan.accumulation:
            self._micro_batches = 0
            self._step(active)

    def generator_loss(self, result: Reconstruction, batch: dict[str, Any], active: bool) -> Tensor:
        """Return reconstruction + KL + λ·weight·(−D(x̂)), the last one only where the discriminator is active."""
        terms, weight = self.objective.terms(result), batch["weight"]
        per_sample = self.objective.total(terms)
        loss = batch_mean(per_sample, weight)
        if active:
            terms["adversarial"] = generator_adversarial(frozen_call(self.discriminator, result.output))
            per_sample = per_sample + terms["adversarial"]
            adversarial = batch_mean(terms["adversarial"], weight)
            reconstruction = batch_mean(self.objective.reconstruction(terms), weight)
            balance = self._adaptive_weight(reconstruction, adversarial)
            terms["adaptive_weight"] = balance.reshape(1)
            loss = loss + balance * self.adversarial.weight * adversarial
        self.stop_on_non_finite(batch, per_sample)
        self.note({**terms, "loss": loss.reshape(1)})
        return loss

    def discriminator_loss(self, result: Reconstruction, weight: Tensor) -> Tensor:
        """Return the hinge loss of D(x) and D(x̂), detached from the autoencoder."""
        real, fake = self.discriminator(result.target.detach()), self.discriminator(result.output.detach())
        per_sample = discriminator_hinge(real, fake)
        self.note(
            {
                "discriminator": per_sample,
                "logits_real": real.flatten(1).mean(1),
                "logits_fake": fake.flatten(1).mean(1),
            }
        )
        return batch_mean(per_sample, weight)

    def _adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        if not self.adversarial.adaptive:
            return torch.ones((), device=reconstruction.device)
        last = self.network.last_layer()
        gradients = [
            processes.summed(torch.autograd.grad(loss, last, retain_graph=True)[0]) / processes.world_size()
            for loss in (reconstruction, adversarial)
        ]
        return adaptive_weight(gradients[0], gradients[1], self.adversarial.adaptive_largest)

    def _own_synchronisation(self) -> AbstractContextManager[None]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _step(self, active: bool) -> None:
        optimizers, schedules = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizers, list) and isinstance(schedules, list)
        self._clip(self.network, self.plan.settings.gradient_clip)
        optimizers[GENERATOR].step()
        self._finish_step(optimizers[GENERATOR], schedules[GENERATOR])
        if active:
            self._clip(self.discriminator, self.adversarial.gradient_clip)
            # Past Lightning's wrapper, which would count this as another step of the trainer.
            optimizers[DISCRIMINATOR].optimizer.step()
            self._finish_step(optimizers[DISCRIMINATOR], schedules[DISCRIMINATOR])

    def _finish_step(self, optimizer: LightningOptimizer, schedule: Any) -> None:
        optimizer.optimizer.zero_grad()
        schedule.step()

    def _clip(self, network: nn.Module, largest: float) -> None:
        parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
        average_gradients(parameters)
        if largest:
            torch.nn.utils.clip_grad_norm_(parameters, largest)

    def optimizers_and_schedules(self) -> list[tuple[Optimizer, LambdaLR]]:
        """An AdamW for each network, the autoencoder's first."""
        stage, adversarial = self.plan.settings, self.adversarial
        generator = build_adamw(self.network, stage.learning_rate, stage.betas, stage.weight_decay)
        discriminator = build_adamw(
            self.discriminator, adversarial.learning_rate, adversarial.betas, adversarial.weight_decay
        )
        judged = max(1, stage.samples - adversarial.start_samples)
        return [
            (generator, build_schedule(generator, stage, samples=stage.samples)),
            (discriminator, build_schedule(discriminator, stage, samples=judged)),
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As without a discriminator; Lightning counts micro-batches as steps here."""
        super().on_load_checkpoint(checkpoint)
        batches = checkpoint["hdm"]["step"] * self.plan.accumulation
        checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] = batches


def frozen_call(network: nn.Module, image: Tensor) -> Tensor:
    """Return network(image) with gradients to the image alone: none is left in the network's parameters."""
    frozen = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return functional_call(network, frozen, (image,))


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes; nothing to do in a single process."""
    if not processes.distributed():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for part in in_parts(gradients, EXCHANGED_NUMBERS):
        flat = processes.summed(torch.cat([gradient.flatten() for gradient in part])) / processes.world_size()
        for gradient, mean in zip(part, flat.split([each.numel() for each in part]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def in_parts(tensors: list[Tensor], largest: int) -> Iterator[list[Tensor]]:
    """Cut a list of tensors, in its order, into lists of at most `largest` numbers, or of a single larger tensor."""
    part: list[Tensor] = []
    for tensor in tensors:
        if part and sum(each.numel() for each in part) + tensor.numel() > largest:
            yield part
            part = []
        part.append(tensor)
    if part:
        yield part
