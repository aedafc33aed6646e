"""The recipe of `hdm-train-vae`: check, build, train and export an autoencoder."""

import shlex
from copy import deepcopy
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig
from torch import nn

from hdm_lightning.autoencoding.branches import BranchSettings
from hdm_lightning.autoencoding.perceptual import perceptual_distance
from hdm_lightning.errors import UserError
from hdm_lightning.generation.feature_networks import load_feature_network
from hdm_lightning.models.discriminator import PatchDiscriminator
from hdm_lightning.training import autoencoder_checks, run_folder
from hdm_lightning.training.announcements import shown_source
from hdm_lightning.training.autoencoder_checks import (
    Adversarial,
    AutoencoderLoss,
    AutoencoderSource,
    AutoencoderValidation,
    Patches,
)
from hdm_lightning.training.autoencoder_export import export_autoencoder
from hdm_lightning.training.callbacks.autoencoder_report import AutoencoderReport
from hdm_lightning.training.checkpoint_io import read_checkpoint
from hdm_lightning.training.composition import parse, plain
from hdm_lightning.training.hub_upload import Hub, upload
from hdm_lightning.training.loggers import VAE_LAYOUT, Layout
from hdm_lightning.training.model_record import trained_weights
from hdm_lightning.training.modules.adversarial import PerceptualDistance
from hdm_lightning.training.modules.autoencoder_network import AutoencoderNetwork, build_vae, load_vae
from hdm_lightning.training.modules.draws import sub_seed
from hdm_lightning.training.run_log import say
from hdm_lightning.training.run_recipe import COMMON, Recipe, Run, group
from hdm_lightning.training.stages import AutoencoderStageSettings, Guard, Hardware, StagePlan, plans_of
from hdm_lightning.training.strategies import processes

LOSS_NETWORK = "loss.perceptual_network"


class AutoencoderRecipe(Recipe):
    """Training of an autoencoder in one stage, named `vae` and configured under `stage`."""

    groups: ClassVar[dict[str, type[Any]]] = {
        "autoencoder": AutoencoderSource,
        "patches": Patches,
        "loss": AutoencoderLoss,
        "equivariance": BranchSettings,
        "adversarial": Adversarial,
        "validation": AutoencoderValidation,
        "guard": Guard,
        "hardware": Hardware,
        "hub": Hub,
    }
    others = COMMON
    of_vae = True

    def plans(self, config: DictConfig, world_size: int) -> list[StagePlan]:
        """Return the one stage."""
        return plans_of({"stage": parse(AutoencoderStageSettings, plain(config, "stage"), "stage")}, world_size)

    def stage_values(self, config: DictConfig, plan: StagePlan) -> dict[str, Any]:
        """With a discriminator, let the module accumulate and clip, and start the discriminator's schedule later."""
        start, weight = plain(config, "adversarial.start_samples"), plain(config, "adversarial.weight")
        own: dict[str, Any] = {
            "context_length": 1,
            "adversarial_samples": max(1, plan.settings.samples - int(start)),
        }
        if weight:
            own["of_trainer"] = {"accumulation": 1, "clip": None}
            own["of_module"] = {"accumulation": plan.accumulation, "clip": plan.settings.gradient_clip}
        return own

    def check(self, config: DictConfig, plans: list[StagePlan]) -> None:
        """See `autoencoder_checks`."""
        autoencoder_checks.check(config, self, plans[0])

    # Building

    def build(self, run: Run) -> nn.Module:
        """Build the autoencoder, the discriminator and the perceptual distance."""
        config = run.config
        torch.manual_seed(sub_seed(int(config.seed), "vae weights"))
        network = prepare_network(
            build_network(group(config, self, "autoencoder")),
            recompute=run.plans[0].settings.activation_checkpointing,
            compiled=bool(plain(config, "hardware.compile")),
        )
        adversarial = group(config, self, "adversarial")
        run.parts["discriminator"] = build_discriminator(adversarial)
        run.parts["perceptual"] = shared_distance(group(config, self, "loss").perceptual_network, LOSS_NETWORK)
        return network

    def begin(self, run: Run) -> None:
        """Load the weights that the networks were built with, also after a rewind to the beginning."""
        networks = [each for each in (run.network, run.parts["discriminator"]) if each is not None]
        if "fresh" in run.parts:
            for network, weights in zip(networks, run.parts["fresh"], strict=True):
                network.load_state_dict(weights)
        elif group(run.config, self, "guard").rewinds:
            run.parts["fresh"] = [deepcopy(network.state_dict()) for network in networks]

    def module_arguments(self, run: Run, plan: StagePlan) -> dict[str, Any]:
        """Return the networks."""
        return {"autoencoder": run.network, **{name: run.parts[name] for name in ("perceptual", "discriminator")}}

    def data_arguments(self, run: Run) -> dict[str, Any]:
        """Return no tokenizer: captions are not used."""
        return {"tokenizer": None}

    def layout(self, config: DictConfig) -> Layout:
        """Return the TensorBoard page of an autoencoder's training."""
        return VAE_LAYOUT

    def missing_callbacks(self, config: DictConfig, made: list[Callback]) -> list[Callback]:
        """Return the report of measures, which the model card and the normalization need."""
        if any(isinstance(each, AutoencoderReport) for each in made):
            return []
        return [autoencoder_report(plain(config, "validation.perceptual_network"), None, None)]

    def trainer_arguments(self, config: DictConfig) -> dict[str, Any]:
        """Synchronize batch statistics over all devices, if a network has any."""
        together = config.trainer.accelerator == "cuda" and processes.world_size() > 1
        return {"sync_batchnorm": True} if together and "sync_batchnorm" not in config.trainer else {}

    # The end

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        """Return the measures of the last validation and the moments of the latents."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        report = next(each for each in callbacks if isinstance(each, AutoencoderReport))
        if report.latents is None:
            raise UserError(
                "the training is over, and its last checkpoint is from an earlier version, which stored no measures",
                where="run_dir",
                hint="delete that checkpoint to repeat the end of the training, or start another run under a new name=",
            )
        return {"measures": report.measures, "latents": asdict(report.latents)}

    def kind(self, run: Run) -> str:
        """Return what is trained."""
        return "autoencoder"

    def outcome(self, summary: dict[str, Any]) -> str:
        """Return the PSNR of the reconstructions."""
        psnr = summary["measures"].get("reconstruction/psnr_db")
        return "" if psnr is None else f"PSNR {psnr:.1f} dB"

    def next_command(self, run: Run, folder: str) -> str:
        """Return the command that trains a network on the autoencoder's latents."""
        train = run.config.data.get("train")
        data = f" data.train={shlex.quote(shown_source(train))}" if isinstance(train, str) else ""
        return f"hdm-train vae=folder vae.name={shlex.quote(f'{folder}/{run_folder.FINAL}')}{data}"

    def export(self, run: Run, checkpoint: Path) -> None:
        """Write the first average, or the raw weights if there is none, as a diffusers folder."""
        raw, averaged = trained_weights(read_checkpoint(checkpoint))
        run.network.load_state_dict(averaged or raw)
        export_autoencoder(run, run.run_dir / run_folder.FINAL, averaged=averaged is not None)
        hub = group(run.config, self, "hub")
        if hub.push is None:
            return
        with TemporaryDirectory(dir=run.run_dir, prefix=".upload-") as folder:
            export_autoencoder(run, Path(folder), averaged=averaged is not None, public=hub.push)
            say(f"{run.config.name} is on the hub: {upload(Path(folder), hub, f'{run.config.name}: final')}")


def build_network(source: AutoencoderSource) -> AutoencoderNetwork:
    """Return the autoencoder to train, loaded from its folder or new with random weights."""
    if source.config is not None:
        vae = build_vae(source.config, initial_log_variance=source.initial_log_variance)
    else:
        assert source.source is not None
        vae = load_vae(source.source)
    return AutoencoderNetwork(vae, train_encoder=source.train_encoder)


def prepare_network(network: AutoencoderNetwork, *, recompute: bool, compiled: bool) -> AutoencoderNetwork:
    """Set the memory layout, activation checkpointing and compilation, in this order, as requested."""
    network.vae.to(memory_format=torch.channels_last)
    if recompute:
        network.vae.enable_gradient_checkpointing()
    if compiled:
        encoder, decoder = network.vae.encoder, network.vae.decoder
        # Blocks, not whole halves: the adaptive weight takes the last layer's gradient twice, so it must stay eager.
        for block in (*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks):
            block.compile(dynamic=True)  # sizes change with the drawn scale
    return network


def build_discriminator(settings: Adversarial) -> PatchDiscriminator | None:
    """Return the discriminator, or None if the adversarial weight is 0."""
    if not settings.weight:
        return None
    return PatchDiscriminator(settings.channels, settings.layers, settings.norm)


@lru_cache(maxsize=2)
def shared_distance(name: str | None, where: str) -> PerceptualDistance | None:
    """Return the frozen perceptual distance that a key names, one instance for all callers; None for no name."""
    return None if name is None else perceptual_distance(name, where=where)


def autoencoder_report(
    perceptual_network: str | None = None, loss_network: str | None = None, features: str | None = None
) -> AutoencoderReport:
    """Return the callback that measures the autoencoder in every validation.

    Args:
        perceptual_network: distance to report; None reports the one of the loss.
        loss_network: distance of the loss, or None.
        features: feature network for the kernel and Fréchet distances of the reconstructions, or None.

    Raises:
        UserError: the feature network is unknown or not available.
    """
    name = perceptual_network or loss_network
    distance = shared_distance(name, "validation.perceptual_network" if perceptual_network else LOSS_NETWORK)
    try:
        network = None if features is None else load_feature_network(features, torch.device("cpu"))
    except UserError as error:
        raise UserError(error.what, where="validation.features", hint=error.hint) from error
    return AutoencoderReport((name, distance) if name is not None and distance is not None else None, network)
