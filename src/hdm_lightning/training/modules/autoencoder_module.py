"""The LightningModule of an autoencoder, with or without a discriminator.

Shapes: image uint8 (B,3,H,W); noise (B,C,H/f,W/f), f the autoencoder's factor.

The training step with a discriminator is in `training.modules.adversarial`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hdm_lightning.autoencoding.branches import BranchSettings, draw_branch, draw_patch
from hdm_lightning.autoencoding.losses import batch_mean
from hdm_lightning.autoencoding.reconstruction import Reconstruction, reconstruct
from hdm_lightning.autoencoding.transforms import measured_transforms
from hdm_lightning.errors import UserError
from hdm_lightning.metrics.autoencoder_quality import psnr, relative_error
from hdm_lightning.training.modules.adversarial import (
    AdversarialSteps,
    AdversarialTerm,
    GeneratorObjective,
    PerceptualDistance,
)
from hdm_lightning.training.modules.autoencoder_network import AutoencoderNetwork, build_vae
from hdm_lightning.training.modules.draws import draw
from hdm_lightning.training.modules.resumable_module import (
    FLOAT16,
    OptimizerFactory,
    SchedulerFactory,
    WeightedMean,
    scheduled,
)
from hdm_lightning.training.strategies.processes import averaged

NOISE_PURPOSE = "vae posterior"
MEASURES = ("psnr", "equivariance_rotation", "equivariance_scale")


class AutoencoderModule(AdversarialSteps):
    """Trains an AutoencoderKL on the branches of EQ-VAE (arXiv 2502.09509), with or without a PatchGAN.

    Works in any `lightning.Trainer` on the images of a `ShardDataModule`; captions are not used. Logs `train/loss`,
    `train/reconstruction`, the terms of the loss, `lr`, and in validation `val/psnr` (dB) and the encoder's relative
    errors `val/equivariance_rotation` and `val/equivariance_scale`. `training_step` returns `loss` and `sample_losses`
    (B,). The branch and transform of an optimizer step depend on (seed, samples trained before it), the posterior noise
    of a sample on (seed, its index), so a step does not depend on the number of processes or micro-batches. The
    exception is the adaptive weight, a ratio of norms: with it, accumulation is not the same as a larger batch.

    Args:
        autoencoder: the diffusers AutoencoderKL to train and save, or an `AutoencoderNetwork` around one.
        perceptual: frozen distance (B,) between two batches of images in [-1, 1], or None.
        discriminator: maps image (B,3,H,W) to logits, or None. With one, this module steps the optimizers itself: pass
            `accumulation` and `gradient_clip` here and not to the trainer.
        learning_rate: learning rate of the autoencoder.
        weight_decay: weight decay of the autoencoder's matrices and kernels.
        betas: moment decays of the default optimizer.
        optimizer, lr_scheduler: as for `FlowModule`.
        pixel: kind of the pixel term, `l1`, `l2` or `huber`.
        pixel_weight, perceptual_weight, kl_weight: weight of the term, which is a mean.
        equivariant, downscaled, scale_numerators, scale_denominator, quarter_turns, anisotropic, antialias, flips: see
            `autoencoding.branches.BranchSettings`.
        patch_px, patch_samples: train on patches of this side for this many samples first.
        adversarial_weight, adaptive, adaptive_largest, adversarial_start_samples: see `AdversarialTerm`.
        discriminator_learning_rate, discriminator_weight_decay, discriminator_betas, discriminator_lr_scheduler,
            discriminator_gradient_clip: setting of the discriminator's optimizer.
        accumulation: micro-batches per optimizer step, with a discriminator.
        gradient_clip: largest gradient norm of the autoencoder, with a discriminator; 0 means no clipping.
        seed: seed of every random draw of the training.
        stage: name of this training in its checkpoints.

    Raises:
        UserError: a value is out of range, or incompatible with the others.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        perceptual: PerceptualDistance | None = None,
        discriminator: nn.Module | None = None,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.5, 0.9),
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        pixel: str = "l1",
        pixel_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        kl_weight: float = 1e-6,
        equivariant: float = 0.5,
        downscaled: float = 0.125,
        scale_numerators: Sequence[int] = tuple(range(8, 32)),
        scale_denominator: int = 32,
        quarter_turns: Sequence[int] = (1, 2, 3),
        anisotropic: bool = False,
        antialias: bool = False,
        flips: bool = False,
        patch_px: int = 0,
        patch_samples: int = 0,
        adversarial_weight: float = 0.5,
        adaptive: bool = True,
        adaptive_largest: float = 1e4,
        adversarial_start_samples: int = 0,
        discriminator_learning_rate: float = 1e-4,
        discriminator_weight_decay: float = 0.0,
        discriminator_betas: tuple[float, float] = (0.5, 0.9),
        discriminator_lr_scheduler: SchedulerFactory | None = None,
        discriminator_gradient_clip: float = 1.0,
        accumulation: int = 1,
        gradient_clip: float = 0.0,
        seed: int = 0,
        stage: str = "train",
    ) -> None:
        super().__init__(seed=seed, stage=stage)
        objects = ["autoencoder", "perceptual", "discriminator", "optimizer", "lr_scheduler"]
        self.save_hyperparameters(ignore=[*objects, "discriminator_lr_scheduler"])
        plain = isinstance(autoencoder, AutoencoderNetwork)
        self.network = autoencoder if plain else AutoencoderNetwork(autoencoder)  # type: ignore[assignment]
        self.save_hyperparameters({"network_config": _plain_config(self.network)})
        self.discriminator = discriminator
        self.automatic_optimization = discriminator is None
        self._perceptual = perceptual
        self.objective = GeneratorObjective(pixel, pixel_weight, perceptual_weight, kl_weight, perceptual)
        self.branches = _branches(
            equivariant=equivariant,
            downscaled=downscaled,
            scale_numerators=tuple(scale_numerators),
            scale_denominator=scale_denominator,
            quarter_turns=tuple(quarter_turns),
            anisotropic=anisotropic,
            antialias=antialias,
            flips=flips,
        )
        self.patch_px, self.patch_samples = patch_px, patch_samples
        self.adversarial = AdversarialTerm(
            adversarial_weight, adaptive, adaptive_largest, adversarial_start_samples, discriminator_gradient_clip
        )
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.gradient_clip, self._accumulation = gradient_clip, accumulation
        self.optimizer_factory = optimizer or partial(AdamW, betas=(betas[0], betas[1]))
        self.scheduler_factory = lr_scheduler
        self._of_discriminator = (discriminator_learning_rate, discriminator_weight_decay, discriminator_betas)
        self.discriminator_scheduler_factory = discriminator_lr_scheduler
        self.measures = nn.ModuleDict({name: WeightedMean() for name in MEASURES})

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on each process."""
        return self.trainer.accumulate_grad_batches if self.discriminator is None else self._accumulation

    def configure_callbacks(self) -> list[Callback]:
        """Check the trainer's settings, in the first hook that has the trainer; returns no callbacks.

        Raises:
            UserError: the trainer's accumulation, clipping or precision is incompatible with the module.
        """
        trainer = self.trainer
        if self.discriminator is None:
            if self._accumulation != 1 or self.gradient_clip:
                what = "without a discriminator the trainer accumulates and clips"
                hint = "use Trainer(accumulate_grad_batches=…, gradient_clip_val=…)"
                raise UserError(what, where="accumulation, gradient_clip", hint=hint)
        elif trainer.accumulate_grad_batches != 1 or trainer.gradient_clip_val or trainer.precision == FLOAT16:
            what = (
                "with a discriminator there are two optimizers, which this module accumulates, clips and steps itself"
            )
            hint = "use AutoencoderModule(accumulation=…, gradient_clip=…, discriminator_gradient_clip=…), not float16"
            where = "Trainer(accumulate_grad_batches, gradient_clip_val, precision)"
            raise UserError(what, where=where, hint=hint)
        return []

    def setup(self, stage: str) -> None:
        """Move the frozen distance, which is hidden from Lightning, to the device."""
        super().setup(stage)
        move = getattr(self._perceptual, "to", None)
        if move is not None:
            move(self.trainer.strategy.root_device)

    # Steps

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add each sample's posterior noise, drawn on the CPU so that it is the same on every kind of device."""
        if not self.trainer.training:
            return batch
        self.note_rows(len(batch["index"]))
        rows, columns = (size // self.network.factor for size in batch["image"].shape[-2:])
        shape = (self.network.channels, rows, columns)
        return {**batch, "noise": draw(self.seed, NOISE_PURPOSE, batch["index"], shape, 0).noise}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of a micro-batch; a masked sample adds zero, so the mean's divisor never changes."""
        if self.discriminator is not None:
            return self.adversarial_step(batch, self.discriminator)
        with self.section("autoencoder"):
            result = self.reconstruct(batch)
        terms = self.objective.terms(result)
        per_sample = self.objective.total(terms)
        loss = batch_mean(per_sample, batch["weight"])
        self.count_batch(len(per_sample))
        self.log_terms(terms, loss, batch["weight"])
        return {"loss": loss, "sample_losses": per_sample.detach()}

    def reconstruct(self, batch: dict[str, Any]) -> Reconstruction:
        """Run the branch drawn for this step."""
        image, noise = self._patch(signed(batch["image"]), batch["noise"])
        rows, columns = noise.shape[-2:]
        branch = draw_branch(self.branches, rows, columns, seed=self.seed, samples_seen=self.samples_trained)
        return reconstruct(self.network, image, branch, noise)

    def _patch(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the part of images and noise that this step trains on: a patch at first, then the whole."""
        seen = self.samples_trained
        if seen >= self.patch_samples:
            return image, noise
        size = self.patch_px // self.network.factor
        box = draw_patch(noise.shape[-2], noise.shape[-1], size, seed=self.seed, samples_seen=seen)
        return box(image, self.network.factor), box(noise)

    def log_terms(self, terms: Mapping[str, Tensor], loss: Tensor, weight: Tensor) -> None:
        """Log the terms (B,) and the loss () of a micro-batch."""
        reconstruction = batch_mean(self.objective.reconstruction(dict(terms)), weight)
        both = averaged(torch.stack([loss, reconstruction]).detach())
        metrics: dict[str, Tensor | float] = {"train/loss": both[0], "train/reconstruction": both[1]}
        metrics["lr"] = self.current_learning_rate
        metrics |= {f"train/{name}": term.detach().float().mean() for name, term in terms.items()}
        self.log_step(metrics, len(weight), shown=["train/loss", "train/reconstruction"])

    # Validation

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measure the reconstruction from the posterior's mean, and the encoder's equivariance errors."""
        image, weight = signed(batch["image"]), batch["weight"]
        mean = self.network.posterior(image).mean
        values = {"psnr": psnr(self.network.decode(mean), image)}
        transforms = measured_transforms(mean.shape[-1])
        for name in ("rotation", "scale"):
            errors = [
                relative_error(move(mean, 1), self.network.posterior(move(image, self.network.factor)).mean)
                for move in transforms[name].values()
            ]
            if errors:
                values[f"equivariance_{name}"] = torch.stack(errors).mean(0)
        for name, value in values.items():
            metric = self.measures[name]
            assert isinstance(metric, WeightedMean)
            metric.update(value, weight)
            self.log(f"val/{name}", metric, on_epoch=True, batch_size=len(weight), prog_bar=name == "psnr")

    # Optimizers

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the autoencoder's trained parameters in groups; only matrices and kernels are decayed."""
        return adamw_groups(self.network, self.learning_rate, self.weight_decay)

    def optimizers_and_schedules(self) -> list[tuple[Optimizer, LRScheduler | None]]:
        """Return the optimizer of the autoencoder and, with a discriminator, its AdamW; each with its schedule."""
        pairs = super().optimizers_and_schedules()
        if self.discriminator is not None:
            rate, decay, betas = self._of_discriminator
            groups = adamw_groups(self.discriminator, rate, decay)
            optimizer = AdamW(groups, lr=rate, betas=(betas[0], betas[1]), fused=True)
            pairs.append(scheduled(optimizer, self.discriminator_scheduler_factory))
        return pairs

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "AutoencoderModule":
        """Load a module from a checkpoint, without running any code that the file might contain.

        Args:
            checkpoint_path: the file.
            args: further arguments of `LightningModule.load_from_checkpoint`.
            kwargs: `discriminator` if the training had one, otherwise its weights are dropped; `autoencoder` to replace
                the saved AutoencoderKL; others replace saved hyperparameters.

        Raises:
            RuntimeError: the names or shapes of the weights differ from those of the module.
        """
        kwargs.setdefault("weights_only", True)
        kwargs.setdefault("map_location", "cpu")
        saved = torch.load(Path(checkpoint_path), map_location="cpu", weights_only=True, mmap=True)
        if "autoencoder" not in kwargs:
            kwargs["autoencoder"] = build_vae(saved["hyper_parameters"]["network_config"])
        strict, alone = kwargs.pop("strict", True), kwargs.get("discriminator") is None
        if alone:
            kwargs |= {"accumulation": 1, "gradient_clip": 0.0}
        kwargs["strict"] = strict and not alone
        module: AutoencoderModule = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        if strict and alone:  # only the discriminator's weights may be left over
            own = {name: value for name, value in saved["state_dict"].items() if not name.startswith("discriminator.")}
            module.load_state_dict(own)
        return module


def adamw_groups(network: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters as a group with weight decay (matrices and kernels) and one without."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    rest = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [(decayed, weight_decay), (rest, 0.0)]
    return [{"params": each, "lr": rate, "weight_decay": decay} for each, decay in groups if each]


def signed(image: Tensor) -> Tensor:
    """Return uint8 images (B,3,H,W) as float32 in [-1, 1]."""
    return image.float() / 127.5 - 1.0


def _branches(**settings: Any) -> BranchSettings:
    try:
        return BranchSettings(**settings)
    except ValueError as error:
        key, _, what = str(error).partition(": ")
        raise UserError(what, where=key, hint="see autoencoding.branches.BranchSettings") from error


def _plain_config(network: AutoencoderNetwork) -> dict[str, Any]:
    """Return the configuration of the AutoencoderKL as plain containers."""
    fields = {key: value for key, value in dict(network.vae.config).items() if not key.startswith("_")}
    return {key: list(value) if isinstance(value, list | tuple) else value for key, value in fields.items()}
