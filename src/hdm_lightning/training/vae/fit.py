"""The one Lightning fit of an autoencoder's training: module, callbacks and trainer around the network."""

import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from hdm_lightning.autoencoding.perceptual import perceptual_distance
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.features import FeatureNetwork
from hdm_lightning.generation.feature_networks import load_feature_network
from hdm_lightning.training import hardware, processes, run_folder
from hdm_lightning.training.callbacks.averages import AverageWeights
from hdm_lightning.training.callbacks.checkpoints import SaveCheckpoints
from hdm_lightning.training.callbacks.finite_weights import RequireFiniteWeights
from hdm_lightning.training.callbacks.ledger import KeepLedger
from hdm_lightning.training.callbacks.progress import ShowProgress
from hdm_lightning.training.callbacks.signals import StopOnSignal, StoppedBySignal
from hdm_lightning.training.callbacks.vae_pictures import DrawReconstructions
from hdm_lightning.training.callbacks.vae_scalars import LogVaeScalars
from hdm_lightning.training.callbacks.vae_validation import ValidateAutoencoder
from hdm_lightning.training.handover import read_checkpoint
from hdm_lightning.training.monitoring.tensorboard import VAE_LAYOUT, stage_logger
from hdm_lightning.training.recovery.intact import newest_intact
from hdm_lightning.training.step_trainer import step_trainer
from hdm_lightning.training.vae.adversarial import AdversarialAutoencoderModule
from hdm_lightning.training.vae.checks import branch_settings
from hdm_lightning.training.vae.data import build_images
from hdm_lightning.training.vae.module import AutoencoderModule
from hdm_lightning.training.vae.objective import GeneratorObjective

if TYPE_CHECKING:
    from hdm_lightning.data.datamodule import ShardDataModule
    from hdm_lightning.training.vae.run import VaeRun


def fit_vae(run: "VaeRun") -> None:
    """Train to the end, from the run's own newest checkpoint if there is one, and mark the stage as done."""
    plan = run.plan
    checkpoints = run_folder.checkpoint_folder(run.run_dir, plan)
    resume_from = processes.decided_by_first(partial(newest_intact, checkpoints))
    steps_done = read_checkpoint(resume_from)["hdm"]["step"] if resume_from else 0
    data = build_images(run.settings, plan, consumed=steps_done * plan.settings.batch_size)
    module = build_module(run)
    save_every = plan.steps_for(plan.settings.save_every)
    guard = RequireFiniteWeights((save_every, plan.steps_for(plan.settings.validate_every)))
    save = SaveCheckpoints(checkpoints, save_every, run.settings.checkpoints, before=guard.look)
    ledger = KeepLedger(run.ledger, plan, save.every, run.settings.trainer.usd_per_device_hour)
    validation = build_validation(run, data)
    pictures = DrawReconstructions(
        data, run.averages, plan.folder(run.run_dir) / "samples", validation.every, run.settings.validation.pictures
    )
    trainer = vae_trainer(run, vae_callbacks(run, guard, validation, pictures, save, ledger), steps_done)
    begin = time.monotonic()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    except StoppedBySignal as stop:
        ledger.note("stop", trainer, module, reason=str(stop))
        raise
    save.save(trainer)
    ledger.note("end", trainer, module)
    if validation.latents is None:  # killed between the last checkpoint and the end
        module.to(trainer.strategy.root_device)  # the end of a fit moves it to the CPU
        validation.run(trainer, module)
    assert validation.latents is not None
    if trainer.is_global_zero:
        summary = {
            "stage": plan.name,
            "steps": trainer.global_step,
            "samples": module.samples_seen,
            "seconds_of_last_start": round(time.monotonic() - begin, 1),
            "measures": validation.measures,
            "latents": asdict(validation.latents),
        }
        run_folder.mark_stage_done(run.run_dir, plan, summary)
    processes.barrier()


def build_module(run: "VaeRun") -> AutoencoderModule:
    """The module that the settings ask for: with a discriminator where its weight is not 0."""
    settings = run.settings
    objective = GeneratorObjective(settings.loss, run.perceptual)
    branches = branch_settings(settings)
    if run.discriminator is None:
        return AutoencoderModule(run.network, run.plan, objective, branches, settings.seed, settings.patches)
    return AdversarialAutoencoderModule(
        run.network,
        run.plan,
        objective,
        branches,
        settings.seed,
        settings.patches,
        run.discriminator,
        settings.adversarial,
    )


def build_validation(run: "VaeRun", data: "ShardDataModule") -> ValidateAutoencoder:
    """The validation, with the distances that the settings name, or the perceptual one of the loss."""
    settings, every = run.settings, run.plan.steps_for(run.plan.settings.validate_every)
    device = next(run.network.parameters()).device
    name, perceptual = settings.validation.perceptual_network, run.perceptual
    if name is None:
        name = settings.loss.perceptual_network
    elif name != settings.loss.perceptual_network:
        perceptual = perceptual_distance(name, where="validation.perceptual_network").to(device)
    named = (name, perceptual) if name is not None and perceptual is not None else None
    return ValidateAutoencoder(data, run.averages, every, named, _feature_network(settings.validation.features, device))


def _feature_network(name: str | None, device: torch.device) -> FeatureNetwork | None:
    try:
        return None if name is None else load_feature_network(name, device)
    except UserError as error:
        raise UserError(error.what, where="validation.features", hint=error.hint) from error


def vae_callbacks(
    run: "VaeRun",
    guard: RequireFiniteWeights,
    validation: ValidateAutoencoder,
    pictures: DrawReconstructions,
    save: SaveCheckpoints,
    ledger: KeepLedger,
) -> list[Callback]:
    """The callbacks in the order in which they act after a step: the guard and averages first, the signal last."""
    settings, plan = run.settings, run.plan
    scalars = LogVaeScalars(settings.logger.every_steps)
    callbacks: list[Callback] = [
        guard,
        AverageWeights(run.averages, plan.settings.batch_size),
        scalars,
        validation,
        pictures,
        save,
        ledger,
    ]
    if settings.logger.progress_bar and processes.rank() == 0:
        callbacks.append(ShowProgress(plan, 0, ledger, scalars, loss="train/pixel"))
    return [*callbacks, StopOnSignal(save)]


def vae_trainer(run: "VaeRun", callbacks: list[Callback], first_step: int) -> Trainer:
    """Clipping and accumulation are the module's own with a discriminator."""
    settings, plan = run.settings, run.plan
    automatic = run.discriminator is None
    on_cuda = hardware.accelerator(settings.trainer) == "cuda"
    return step_trainer(
        settings.trainer,
        plan.steps,
        callbacks,
        stage_logger(plan.folder(run.run_dir), run.config_text, first_step * plan.settings.batch_size, VAE_LAYOUT),
        strategy=_strategy(),
        accumulate_grad_batches=plan.accumulation if automatic else 1,
        gradient_clip_val=(plan.settings.gradient_clip or None) if automatic else None,
        sync_batchnorm=on_cuda and processes.world_size() > 1,
    )


def _strategy() -> Any:
    return "auto" if processes.world_size() == 1 else DDPStrategy(gradient_as_bucket_view=True)
