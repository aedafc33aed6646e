"""The LightningModule of an autoencoder without discriminator: draw a branch, reconstruct, weigh the terms.

Shapes: image uint8 (B,3,H,W); noise (B,C,H/f,W/f).
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hdm_lightning.autoencoding.branches import BranchSettings, draw_branch
from hdm_lightning.autoencoding.losses import batch_mean
from hdm_lightning.autoencoding.patches import draw_patch
from hdm_lightning.autoencoding.reconstruction import Reconstruction, reconstruct
from hdm_lightning.autoencoding.transforms import apply_to_pair
from hdm_lightning.errors import UserError
from hdm_lightning.training import processes
from hdm_lightning.training.hardware import FLOAT16
from hdm_lightning.training.modules import draws
from hdm_lightning.training.optimization.clipping import ClippingModule
from hdm_lightning.training.optimization.moments import keep_settings
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.vae.network import AutoencoderNetwork
from hdm_lightning.training.vae.objective import GeneratorObjective
from hdm_lightning.training.vae.optimizers import build_adamw, build_schedule
from hdm_lightning.training.vae.settings import PatchSettings

NOISE_PURPOSE = "vae posterior"


class AutoencoderModule(ClippingModule):
    """Trains an AutoencoderKL on the branches of EQ-VAE (arXiv 2502.09509).

    The branch and τ of an optimizer step depend on (seed, samples seen before it), the posterior noise of a sample on
    (seed, its index): a step is the same on any number of ranks and in any number of micro-batches.

    Args:
        network: the autoencoder; the only thing that is trained and saved.
        plan: length, batch and rates.
        objective: terms and weights of the loss.
        branches: probabilities and transforms.
        seed: the run's seed.
        patches: how long to train on patches of what size before whole images.
    """

    def __init__(
        self,
        network: AutoencoderNetwork,
        plan: StagePlan,
        objective: GeneratorObjective,
        branches: BranchSettings,
        seed: int,
        patches: PatchSettings,
    ) -> None:
        super().__init__()
        self.patches = patches
        self.network = network
        self.plan = plan
        self.objective = objective
        self.branches = branches
        self.seed = seed
        self.samples_seen = 0
        self._noted: dict[str, tuple[Tensor, int]] = {}

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add each sample's posterior noise on the CPU, so that it is the same on every kind of device."""
        height, width = (size // self.network.factor for size in batch["image"].shape[-2:])
        shape = (self.network.channels, height, width)
        return {**batch, "noise": draws.draw(self.seed, NOISE_PURPOSE, batch["index"], shape, 0).noise}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean loss over the micro-batch; holes count as zero, so that the mean's divisor never changes."""
        terms = self.objective.terms(self.reconstruct(batch))
        per_sample = self.objective.total(terms)
        self.note({**terms, "loss": per_sample})
        self.stop_on_non_finite(batch, per_sample)
        self.samples_seen += len(batch["weight"]) * processes.world_size()
        return batch_mean(per_sample, batch["weight"])

    def reconstruct(self, batch: dict[str, Any]) -> Reconstruction:
        """Run the branch that this step draws."""
        image, noise = self.patch(signed(batch["image"]), batch["noise"])
        height, width = noise.shape[-2:]
        draw = draw_branch(self.branches, height, width, seed=self.seed, samples_seen=self.samples_before_step)
        return reconstruct(self.network, image, draw, noise)

    @property
    def samples_before_step(self) -> int:
        """Samples seen before the present optimizer step, whose micro-batches share their draws."""
        return self.samples_seen - self.samples_seen % self.plan.settings.batch_size

    def patch(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the patch of images and noise that this step trains on: early on a part, then the whole."""
        seen = self.samples_before_step
        if seen >= self.patches.samples:
            return image, noise
        size = self.patches.size_px // self.network.factor
        box = draw_patch(noise.shape[-2], noise.shape[-1], size, seed=self.seed, samples_seen=seen)
        return apply_to_pair(box, image, noise)

    def note(self, terms: dict[str, Tensor]) -> None:
        """Add the micro-batch's terms to the running means that are logged and reset every so often."""
        for name, term in terms.items():
            total, count = self._noted.get(name, (torch.zeros((), device=term.device), 0))
            self._noted[name] = (total + term.detach().float().mean(), count + 1)

    def drain_terms(self) -> dict[str, float]:
        """Return the means of the terms since the last call, as this process saw them."""
        noted, self._noted = self._noted, {}
        return {name: float(total) / count for name, (total, count) in noted.items()}

    def stop_on_non_finite(self, batch: dict[str, Any], per_sample: Tensor) -> None:
        """Raise `UserError` naming the samples whose loss is not a number; one device wait a step."""
        finite = torch.isfinite(per_sample)
        if bool(finite.all()):
            return
        bad = [key for key, good in zip(batch["keys"], finite.tolist(), strict=True) if not good]
        raise UserError(
            f"the loss is not finite at optimizer step {self.trainer.global_step + 1}; samples: {', '.join(bad[:8])}",
            where="stage",
            hint="lower stage.learning_rate or stage.gradient_clip, or look at the named samples; "
            "the last checkpoint is intact and resume=auto continues from it",
        )

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine, one tick per step."""
        pairs = self.optimizers_and_schedules()
        return [optimizer for optimizer, _ in pairs], [
            {"scheduler": schedule, "interval": "step"} for _, schedule in pairs
        ]

    def optimizers_and_schedules(self) -> list[tuple[Optimizer, LambdaLR]]:
        """Every optimizer with its schedule, as the settings of now have it."""
        stage = self.plan.settings
        optimizer = build_adamw(
            self.network,
            stage.learning_rate,
            stage.betas,
            stage.weight_decay,
            fused=self.trainer.precision != FLOAT16,
        )
        return [(optimizer, build_schedule(optimizer, stage, samples=stage.samples))]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say where in the run this checkpoint stands, in plain values."""
        step = self.trainer.global_step
        checkpoint["hdm"] = {"step": step, "samples": self.samples_seen, "seed": self.seed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the settings of now, and recount Lightning's micro-batches.

        Their number a step depends on how many processes there are now.
        """
        keep_settings(checkpoint, *self.optimizers_and_schedules())
        step = checkpoint["hdm"]["step"]
        self.samples_seen = checkpoint["hdm"]["samples"]
        batches = step * self.plan.accumulation
        loop = checkpoint["loops"]["fit_loop"]
        counts = dict.fromkeys(("ready", "started", "processed", "completed"), batches)
        loop["epoch_loop.batch_progress"].update(total=dict(counts), current=dict(counts), is_last_batch=False)
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step


def signed(image: Tensor) -> Tensor:
    """Return uint8 images (B,3,H,W) as float32 in [-1, 1]."""
    return image.float() / 127.5 - 1.0
