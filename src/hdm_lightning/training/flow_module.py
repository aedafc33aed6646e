"""The LightningModule of flow matching: encode, draw, call the network, call the loss, log."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hdm_lightning.data.batch import Batch
from hdm_lightning.diffusion import flow
from hdm_lightning.models import XUT
from hdm_lightning.training import randomness
from hdm_lightning.training.flow_step import (
    Conditioning,
    LossByTime,
    Network,
    crop_geometry,
    fed_tokens,
    flow_loss,
    routed,
)
from hdm_lightning.training.frozen import FrozenEncoders
from hdm_lightning.training.handover import keep_settings
from hdm_lightning.training.hardware import FLOAT16
from hdm_lightning.training.monitoring.clock import SectionClock
from hdm_lightning.training.optimization.clipping import ClippingModule
from hdm_lightning.training.optimization.optimizers import build_optimizer, build_rate_schedule
from hdm_lightning.training.settings import LoggerSettings, OptimizerSettings
from hdm_lightning.training.stages import StagePlan

VALIDATION = "validation"


class FlowMatchingModule(ClippingModule):
    """Trains an XUT by flow matching for one stage.

    Args:
        network: the XUT; the only thing that is trained and saved.
        encoders: frozen text encoder and autoencoder.
        plan: the stage.
        optimizer: kind and learning-rate rule.
        logger: how often scalars are written.
        seed: the run's seed.
        skipped: samples of the stage that rewinds have skipped, for the checkpoint.
        rewinds: rewinds of the stage so far, for the checkpoint.
        static_shapes: feed captions as padded, whatever their lengths: for a compiled network.

    Attributes:
        sample_losses: losses (B,) of the last micro-batch.
    """

    def __init__(
        self,
        network: XUT,
        encoders: FrozenEncoders,
        plan: StagePlan,
        optimizer: OptimizerSettings,
        logger: LoggerSettings,
        seed: int,
        *,
        skipped: int = 0,
        rewinds: int = 0,
        static_shapes: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.encoders = encoders
        self.plan = plan
        self.optimizer_settings = optimizer
        self.logger_settings = logger
        self.seed = seed
        self.token_px = encoders.autoencoder.factor * network.config.patch_size
        self.skipped, self.rewinds = skipped, rewinds
        self.static_shapes = static_shapes
        self.sample_losses: Tensor | None = None
        self.time_bins: LossByTime | None = None
        self.clock = SectionClock()

    def setup(self, stage: str) -> None:
        """Move the frozen encoders, which Lightning does not know, to the device."""
        self.encoders.to(self.device)
        self.clock.device = self.device
        self.time_bins = LossByTime(self.logger_settings.time_bins, self.device)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add the sample's random numbers on the CPU, so that no device has to be waited for."""
        return self.with_draws(batch, self.plan.name, self.plan.settings.batch_size, self.seed)

    def with_draws(self, batch: Batch, stage: str, strata: int, seed: int) -> dict[str, Any]:
        """The batch with `noise`, `uniform` (stratified over `strata` samples) and routing `scores`."""
        config, index = self.network.config, batch["index"]
        side_h, side_w = (size // self.encoders.autoencoder.factor for size in batch["image"].shape[-2:])
        tokens = (side_h // config.patch_size) * (side_w // config.patch_size)
        routing = stage != VALIDATION and self.plan.settings.routing_rate > 0
        draws = randomness.draw(seed, stage, index, (config.channels, side_h, side_w), tokens if routing else 0)
        stratum = randomness.strata(seed, stage, index, strata)
        uniform = flow.stratified_uniforms(draws.uniform, stratum, strata)
        extra = {"noise": draws.noise, "uniform": uniform}
        return {**batch, **extra, **({} if draws.scores is None else {"scores": draws.scores})}

    def conditioning(self, batch: dict[str, Any]) -> Conditioning:
        """Encode the captions and place the crops."""
        grid = (batch["image"].shape[-2] // self.token_px, batch["image"].shape[-1] // self.token_px)
        positions, aspect = crop_geometry(batch["crop"], grid, self.token_px, self.network.config)
        lengths = batch["lengths"]
        return Conditioning(self.encoders.context(self.fed_tokens(batch), lengths), lengths, positions, aspect)

    def fed_tokens(self, batch: dict[str, Any]) -> Tensor:
        """The batch's caption tokens (B, L) as they are fed."""
        return fed_tokens(batch["tokens"], batch["lengths"], static=self.static_shapes)

    def losses(self, batch: dict[str, Any], network: Network, t: Tensor) -> Tensor:
        """Loss (B,) at times t (B,) of a batch that has its draws."""
        with self.clock.section("vae"):
            latent = self.encoders.latents(batch["image"])
        with self.clock.section("text"):
            conditioning = self.conditioning(batch)
        keep = routed(batch.get("scores"), self.plan.settings.routing_rate)
        with self.clock.section("xut"):
            return flow_loss(network, latent, batch["noise"], t, conditioning, keep)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean loss over the micro-batch; holes count as zero, so that the mean's divisor never changes."""
        stage = self.plan.settings
        t = flow.logit_normal_times(batch["uniform"], stage.time_mean, stage.time_std)
        loss = self.losses(batch, self.network, t)
        weight = batch["weight"]
        assert self.time_bins is not None
        self.sample_losses = loss.detach()
        self.time_bins.add(self.sample_losses, t, weight)
        return (loss * weight).mean()

    def on_before_backward(self, loss: Tensor) -> None:
        """The backward pass counts as the network's time."""
        self.clock.start("xut")

    def on_after_backward(self) -> None:
        """End of the network's time."""
        self.clock.stop("xut")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clipping and the step itself count as the optimizer's time."""
        self.clock.start("optimizer")

    def on_train_start(self) -> None:
        """The wait for the first batch begins: callbacks have had their turn before the module."""
        self.clock.begin_wait()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End of the optimizer's time, where there was a step; callbacks have had their turn."""
        self.clock.stop("optimizer")
        self.clock.begin_wait()

    def configure_optimizers(self) -> Any:
        """The stage's optimizer with warm-up and cosine, one tick per step."""
        optimizer, schedule = self._optimizer_and_schedule()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _optimizer_and_schedule(self) -> tuple[Optimizer, LambdaLR]:
        stage = self.plan.settings
        fused = self.trainer.precision != FLOAT16
        optimizer = build_optimizer(self.network, stage, self.optimizer_settings, fused=fused)
        return optimizer, build_rate_schedule(optimizer, stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say where in the run this checkpoint stands, in plain values."""
        step = self.trainer.global_step
        checkpoint["hdm"] = {
            "stage": self.plan.name,
            "number": self.plan.number,
            "step": step,
            "batch_size": self.plan.settings.batch_size,
            "samples": step * self.plan.settings.batch_size,
            "seed": self.seed,
            "skipped": self.skipped,
            "rewinds": self.rewinds,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the settings of now, and recount Lightning's micro-batches.

        Their number a step depends on how many processes there are now.
        """
        keep_settings(checkpoint, self._optimizer_and_schedule())
        batches = checkpoint["hdm"]["step"] * self.plan.accumulation
        loop = checkpoint["loops"]["fit_loop"]
        counts = dict.fromkeys(("ready", "started", "processed", "completed"), batches)
        loop["epoch_loop.batch_progress"].update(total=dict(counts), current=dict(counts), is_last_batch=False)
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["hdm"]["step"]
