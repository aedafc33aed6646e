"""The LightningModule of text-to-image flow matching: encode, draw, call the network, call the loss, log.

Shapes: B batch, C latent channels, H x W image in pixels, f autoencoder factor, N image tokens.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from hdm_lightning.diffusion import flow
from hdm_lightning.encoders.base import ImageAutoencoder, TextEncoder
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.compiled_blocks import uncompiled
from hdm_lightning.models.positions import PositionConvention
from hdm_lightning.models.routing import keep_from_scores
from hdm_lightning.training.modules import flow_step
from hdm_lightning.training.modules.draws import draw, strata
from hdm_lightning.training.modules.flow_step import Conditioning, Encoded, FrozenEncoders, Network, SideStream
from hdm_lightning.training.modules.frozen_weights import leave_out_frozen, put_back_frozen
from hdm_lightning.training.modules.resumable_module import (
    OptimizerFactory,
    ResumableModule,
    SchedulerFactory,
    WeightedMean,
)
from hdm_lightning.training.optimization.learning_rates import ParameterGroup, Rule, parameter_groups
from hdm_lightning.training.strategies.processes import averaged

VALIDATION = "validation"
"""Replaces the stage's name in the random draws of a validation."""


class FlowModule(ResumableModule):
    """Trains a network to predict the velocity from noise to the latents of captioned images (arXiv 2210.02747).

    Works in any `lightning.Trainer` on the batches of a `ShardDataModule`. Logs `train/loss`, `lr` and `val/loss`.
    `training_step` returns `loss`, `sample_losses` (B,) and `times` (B,), for callbacks. A sample's noise, time and
    routing depend only on (seed, stage, its index); times are stratified over the samples of an optimizer step. In
    validation, a sample always has the same noise and time, whatever the stage and seed, and nothing is routed.
    Batches may contain images or latents from disk (`hdm-shards encode`), which must come from the same autoencoder,
    and text states of the captions (`hdm-shards encode-captions`), which must come from the same text encoder. If
    images have a fourth channel (`data.alpha=mask`), a sample's loss is the mean weighted by it.

    Args:
        network: an `XUT`, or any module with the same call; the only part that is trained and saved. Parameters
            without gradients, such as the base of a `LoRA`, are not saved; only their checksum is.
        text_encoder: frozen, see `load_text_encoder`.
        autoencoder: frozen, see `load_autoencoder`.
        learning_rate: base learning rate; each parameter's rate follows from `rule`.
        routing_rate: share of the image tokens that skip the U (TREAD, arXiv 2501.04765), in [0, 1).
        weight_decay: weight decay of the parameters that `rule` decays.
        betas: moment decays of the default optimizer.
        optimizer: takes the parameter groups (see `parameter_groups`); None for AdamW, fused except under float16.
        lr_scheduler: takes the optimizer and is stepped once per optimizer step; None for a constant rate.
        rule: how rates follow from the base rate, see `training.optimization.learning_rates`; `constant` for a
            network that is not an XUT.
        time_mean: mean of the logit-normal time; above 0 trains more near noise.
        time_std: standard deviation of the logit-normal time.
        seed, stage: determine every random draw of the training.
        validation_seed: determines the noise and times of the validation.
        patch_size: side of an image token in latent cells; None takes it from `network.config`.
        positions: convention of the token positions; None takes it from `network.config`.
        overlap_encoders: encode a training batch on its own CUDA stream, while the device is still busy with the
            previous one. Needs the encoders' memory on top of the network's; has no effect on a CPU.

    Raises:
        UserError: a value is out of range, or the patch size is unknown.
    """

    def __init__(
        self,
        network: nn.Module,
        text_encoder: TextEncoder,
        autoencoder: ImageAutoencoder,
        *,
        learning_rate: float,
        routing_rate: float = 0.5,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        rule: Rule = "mup",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        seed: int = 0,
        stage: str = "train",
        validation_seed: int = 0,
        patch_size: int | None = None,
        positions: PositionConvention | None = None,
        overlap_encoders: bool = False,
    ) -> None:
        super().__init__(seed=seed, stage=stage)
        self.save_hyperparameters(ignore=["network", "text_encoder", "autoencoder", "optimizer", "lr_scheduler"])
        config = getattr(network, "config", None)
        if isinstance(config, XUTConfig):
            self.save_hyperparameters({"network_config": config.to_json()})
        _check_ranges(learning_rate=learning_rate, routing_rate=routing_rate, time_std=time_std)
        self.network = network
        self.encoders = FrozenEncoders(text_encoder, autoencoder)
        self.patch_size = _patch_size(config, patch_size)
        self.positions: PositionConvention = positions or getattr(config, "positions", None) or "area"
        self.learning_rate, self.weight_decay, self.rule = learning_rate, weight_decay, rule
        self.routing_rate, self.time_mean, self.time_std = routing_rate, time_mean, time_std
        self.validation_seed = validation_seed
        self.optimizer_factory = optimizer or partial(AdamW, betas=(betas[0], betas[1]))
        self.scheduler_factory = lr_scheduler
        self.validation_loss = WeightedMean()
        self.overlap_encoders = overlap_encoders
        self.side_stream: SideStream | None = None

    @property
    def text_encoder(self) -> TextEncoder:
        """The frozen text encoder, which is not part of the module's weights."""
        return self.encoders.text

    @property
    def autoencoder(self) -> ImageAutoencoder:
        """The frozen autoencoder, which is not part of the module's weights."""
        return self.encoders.autoencoder

    def setup(self, stage: str) -> None:
        """Move the frozen encoders, which are hidden from Lightning, to the device."""
        super().setup(stage)
        device = self.trainer.strategy.root_device
        self.encoders.to(device)
        self.side_stream = SideStream(device) if self.overlap_encoders else None

    def teardown(self, stage: str) -> None:
        """Drop the stream, which cannot be copied."""
        super().teardown(stage)
        self.side_stream = None

    # Steps

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add each sample's random numbers and caption length on the CPU, which avoids waiting for a device."""
        drawn = self.with_draws(batch, validation=not self.trainer.training)
        drawn["caption_tokens"] = batch["lengths"].tolist()
        if self.device.type != "cuda":
            return drawn
        return flow_step.pinned({**drawn, **self.encoders.cached_context(batch)})

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the device; with `overlap_encoders`, also encode a training batch ahead of its step."""
        move = partial(super().transfer_batch_to_device, batch, device, dataloader_idx)
        if self.side_stream is None or not self.trainer.training:
            return move()
        return self.encoded_ahead(self.side_stream, move, self.trainer.precision_plugin.train_step_context())

    def encoded_ahead(
        self, stream: SideStream, move: Callable[[], dict[str, Any]], autocast: AbstractContextManager[Any]
    ) -> dict[str, Any]:
        """Return a batch on the device with the encoders' output as `encoded`, computed on a stream of its own.

        The host gets here while the device is still busy with the previous step, since nothing in a step waits for it.
        So the next batch is encoded ahead without being fetched ahead, and the position in the data stays exact.

        Args:
            stream: stream to copy and encode on; the current stream waits for its results.
            move: copies the batch to the device.
            autocast: autocast context of a training step.
        """
        with stream.put(), autocast:
            batch = move()
            encoded = self.encoded(batch)
        given = (value for value in batch.values() if torch.is_tensor(value))
        stream.take_over([*given, *encoded.tensors()])
        return {**batch, "encoded": encoded}

    def with_draws(self, batch: Mapping[str, Any], *, validation: bool = False) -> dict[str, Any]:
        """Return the batch with `noise` (B,C,H/f,W/f), stratified `uniform` (B,) and, with routing, `scores` (B,N)."""
        self.encoders.require_same(batch)
        index, (rows, columns) = batch["index"], flow_step.latent_grid(batch, self.autoencoder.factor)
        if validation:
            seed, stage, tokens = self.validation_seed, VALIDATION, 0
            together = batch.get("set_size") or self.samples_per_step
        else:
            self.note_rows(len(index))
            seed, stage, together = self.seed, self.stage, self.samples_per_step
            tokens = (rows // self.patch_size) * (columns // self.patch_size) if self.routing_rate else 0
        drawn = draw(seed, stage, index, (self.autoencoder.channels, rows, columns), tokens)
        uniform = flow.stratified_uniforms(drawn.uniform, strata(seed, stage, index, together), together)
        scores = {} if drawn.scores is None else {"scores": drawn.scores}
        return {**batch, "noise": drawn.noise, "uniform": uniform, **scores}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return the mean loss of a micro-batch; a masked sample adds zero, so the mean's divisor never changes."""
        t = flow.logit_normal_times(batch["uniform"], self.time_mean, self.time_std)
        losses = self.losses(batch, self.network, t)
        loss = (losses * batch["weight"]).mean()
        self.count_batch(len(losses))
        metrics: dict[str, Tensor | float] = {"train/loss": averaged(loss.detach()), "lr": self.current_learning_rate}
        self.log_step(metrics, len(losses), shown=["train/loss"])
        return {"loss": loss, "sample_losses": losses.detach(), "times": t}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return the losses of a validation batch; `val/loss` is their mean over processes, without masked samples."""
        losses = self.validation_losses(batch)
        self.validation_loss.update(losses, batch["weight"])
        self.log("val/loss", self.validation_loss, on_epoch=True, prog_bar=True, batch_size=len(losses))
        return {"sample_losses": losses}

    @torch.no_grad()
    def validation_losses(self, batch: dict[str, Any], network: Network | None = None) -> Tensor:
        """Return the loss (B,) of each sample of a validation batch, for the module's network or another one.

        The network runs in eager mode even if it is compiled: batches with another shape and mode than in training
        would need their own graphs, which take longer to compile than all validations of a training.

        Args:
            batch: a batch on the module's device; its random draws are added if missing.
            network: a network with the same call as `self.network`, such as one of `WeightAverages`.
        """
        if "noise" not in batch:
            drawn = self.with_draws({**batch, "index": batch["index"].cpu()}, validation=True)
            batch = {key: value.to(self.device) if torch.is_tensor(value) else value for key, value in drawn.items()}
        t = flow.logit_normal_times(batch["uniform"])  # the same in every stage, whatever its training times
        with uncompiled():
            return self.losses(batch, network or self.network, t)

    def losses(self, batch: dict[str, Any], network: Network, t: Tensor) -> Tensor:
        """Return the loss (B,) at times t (B,) of a batch with its draws, encoding it if it is not encoded yet."""
        encoded: Encoded = batch["encoded"] if "encoded" in batch else self.encoded(batch)
        scores = batch.get("scores")
        keep = None if scores is None else keep_from_scores(scores, self.routing_rate)
        with self.section("network"):
            weight = flow_step.loss_weight(batch, self.autoencoder.factor)
            return flow_step.flow_loss(network, encoded.latent, batch["noise"], t, encoded.conditioning, keep, weight)

    def encoded(self, batch: Mapping[str, Any]) -> Encoded:
        """Encode a batch on the device."""
        with self.section("encode_images"):
            latent = self.encoders.latents_of_batch(batch)
        with self.section("encode_text"):
            return Encoded(latent, self.conditioning(batch))

    def conditioning(self, batch: Mapping[str, Any]) -> Conditioning:
        """Encode the captions and compute the positions of the crops."""
        token_px, lengths = self.patch_size * self.autoencoder.factor, batch["lengths"]
        rows, columns = flow_step.latent_grid(batch, self.autoencoder.factor)
        grid = (rows // self.patch_size, columns // self.patch_size)
        positions, aspect = flow_step.crop_geometry(batch["crop"], grid, token_px, self.positions)
        context = self.encoders.context_of_batch(batch, self.fed_tokens(batch))
        return Conditioning(context, None if batch.get("text_is_full") else lengths, positions, aspect)

    def fed_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the caption tokens (B,L) to feed to the text encoder; on a CPU this reads their lengths."""
        on_cpu = batch["tokens"].device.type == "cpu"
        return flow_step.fed_tokens(
            batch["tokens"], batch["lengths"], static=on_cpu and flow_step.is_compiled(self.network)
        )

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the position, and leave out the network's frozen weights."""
        super().on_save_checkpoint(checkpoint)
        leave_out_frozen(checkpoint, self.network)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the weights that were left out, and the position.

        Raises:
            UserError: the network's frozen weights differ from those in the training.
        """
        put_back_frozen(checkpoint, self.network)
        super().on_load_checkpoint(checkpoint)

    # Optimizer

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the network's parameters in groups with the learning rate and weight decay of the rule.

        Raises:
            UserError: the rule is unknown, or does not fit the network.
        """
        try:
            return parameter_groups(self.network, self.learning_rate, self.weight_decay, rule=self.rule)
        except ValueError as error:
            hint = "use rule='constant', which fits every network"
            raise UserError(str(error), where="rule", hint=hint) from error

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "FlowModule":
        """Load a module from a checkpoint, without running any code that the file might contain.

        Args:
            checkpoint_path: the file.
            args: further arguments of `LightningModule.load_from_checkpoint`.
            kwargs: `text_encoder` and `autoencoder`; `network` if it is not an XUT; others replace saved ones.

        Raises:
            UserError: the checkpoint's network is not an XUT, and no `network` was passed.
        """
        kwargs.setdefault("weights_only", True)
        kwargs.setdefault("map_location", "cpu")
        if "network" not in kwargs:
            kwargs["network"] = _saved_network(Path(checkpoint_path))
        module: FlowModule = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return module


def _saved_network(path: Path) -> XUT:
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    config = saved.get("hyper_parameters", {}).get("network_config")
    if config is None:
        what = "the checkpoint does not describe its network, which is not an XUT"
        raise UserError(what, where=str(path), hint="pass it: load_from_checkpoint(path, network=…)")
    return XUT(XUTConfig.from_json(config))


def _patch_size(config: Any, wanted: int | None) -> int:
    size = wanted or getattr(config, "patch_size", None)
    if size is None:
        what = "the network has no config with a patch size"
        raise UserError(what, where="patch_size", hint="pass it to the module, in latent cells")
    return int(size)


def _check_ranges(*, learning_rate: float, routing_rate: float, time_std: float) -> None:
    for where, value in (("learning_rate", learning_rate), ("time_std", time_std)):
        if not value > 0:
            raise UserError(f"{value} is not positive", where=where, hint="set a positive value")
    if not 0 <= routing_rate < 1:
        raise UserError(f"{routing_rate} is not in [0, 1)", where="routing_rate", hint="set a share, e.g. 0.5")
