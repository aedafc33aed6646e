"""One process of an autoencoder's training: build the parts, fit, measure, export."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from hdm_lightning.autoencoding.perceptual import perceptual_distance
from hdm_lightning.evaluation.autoencoder_latents import LatentReport
from hdm_lightning.models.discriminator import PatchDiscriminator
from hdm_lightning.training import hardware, processes, run_folder
from hdm_lightning.training.averaging.averages import WeightAverages
from hdm_lightning.training.callbacks.ledger import Ledger
from hdm_lightning.training.callbacks.vae_validation import averaged
from hdm_lightning.training.handover import hand_over, read_checkpoint
from hdm_lightning.training.launching.process_body import describe_run, run_process
from hdm_lightning.training.randomness import sub_seed
from hdm_lightning.training.recovery.intact import intact_end
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.vae.checks import keeps_normalisation, plan_vae, vae_settings_from
from hdm_lightning.training.vae.export import export_vae
from hdm_lightning.training.vae.fit import fit_vae
from hdm_lightning.training.vae.network import AutoencoderNetwork, build_vae, load_vae
from hdm_lightning.training.vae.objective import PerceptualDistance
from hdm_lightning.training.vae.settings import (
    AdversarialSettings,
    VaeLossSettings,
    VaeSourceSettings,
    VaeTrainSettings,
)


@dataclass
class VaeRun:
    """What the parts of a run have in common.

    Attributes:
        settings: the run's settings.
        config_text: the resolved configuration as YAML.
        run_dir: the run's folder.
        plan: steps, batch and rates.
        network: the autoencoder.
        averages: its weight averages.
        discriminator: the discriminator, or None.
        perceptual: the frozen perceptual distance, or None.
        ledger: the run's ledger.
    """

    settings: VaeTrainSettings
    config_text: str
    run_dir: Path
    plan: StagePlan
    network: AutoencoderNetwork
    averages: WeightAverages
    discriminator: nn.Module | None
    perceptual: PerceptualDistance | None
    ledger: Ledger


def build_network(source: VaeSourceSettings) -> AutoencoderNetwork:
    """The autoencoder to train: read from its folder, or new with random weights."""
    if source.config is not None:
        vae = build_vae(source.config, initial_log_variance=source.initial_log_variance)
    else:
        assert source.source is not None
        vae = load_vae(source.source)
    return AutoencoderNetwork(vae, train_encoder=source.train_encoder)


def prepare_network(network: AutoencoderNetwork, settings: VaeTrainSettings) -> AutoencoderNetwork:
    """Lay the kernels out for the device, recompute activations and compile, in this order, as configured."""
    network.vae.to(memory_format=torch.channels_last)
    if settings.stage.activation_checkpointing:
        network.vae.enable_gradient_checkpointing()
    if settings.trainer.compile:
        encoder, decoder = network.vae.encoder, network.vae.decoder
        # Blocks and not halves: the adaptive weight asks for the last layer's gradient twice, which must stay eager.
        for block in (*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks):
            block.compile(dynamic=True)  # sizes change with the drawn scale
    return network


def build_discriminator(settings: AdversarialSettings) -> PatchDiscriminator | None:
    """The discriminator, or None where the adversarial weight is 0."""
    if not settings.weight:
        return None
    return PatchDiscriminator(settings.channels, settings.layers, settings.norm)  # type: ignore[arg-type]


def build_perceptual(settings: VaeLossSettings, device: torch.device) -> PerceptualDistance | None:
    """The frozen perceptual distance on the device, or None."""
    if settings.perceptual_network is None:
        return None
    return perceptual_distance(settings.perceptual_network).to(device)


def build_vae_run(settings: VaeTrainSettings) -> VaeRun:
    """Build every part, the same in every process."""
    torch.manual_seed(sub_seed(settings.seed, "vae weights"))
    network = prepare_network(build_network(settings.autoencoder), settings)
    kind = hardware.accelerator(settings.trainer)
    if kind == "cuda":
        network.to(torch.device("cuda", torch.cuda.current_device()))
    run_dir = Path(settings.run_dir)
    return VaeRun(
        settings=settings,
        config_text=OmegaConf.to_yaml(OmegaConf.structured(settings)),
        run_dir=run_dir,
        plan=plan_vae(settings, processes.world_size()),
        network=network,
        averages=WeightAverages(network, settings.ema.halflife_samples, settings.ema.ramp),
        discriminator=build_discriminator(settings.adversarial),
        perceptual=build_perceptual(settings.loss, next(network.parameters()).device),
        ledger=Ledger(run_dir / run_folder.LEDGER, writes=processes.rank() == 0),
    )


def work(config: dict[str, Any]) -> int:
    """One process of a run, from its plain settings; returns the exit status."""
    settings = vae_settings_from(config)

    def body() -> None:
        run_folder.check_resume(Path(settings.run_dir), settings.resume)  # again: another start may just have ended
        run = build_vae_run(settings)
        while (end := processes.decided_by_first(partial(intact_end, run.run_dir, run.plan))) is None:
            describe_run(run.run_dir, run.config_text)
            fit_vae(run)
        finish_vae(run, end)

    return run_process(settings.trainer, Path(settings.run_dir), body)


def finish_vae(run: VaeRun, end: Path) -> None:
    """Write `final/` from the last checkpoint and the measures taken there; the first process works."""
    if processes.rank() == 0:
        hand_over(read_checkpoint(end), run.network, run.averages)
        done = json.loads((run.plan.folder(run.run_dir) / run_folder.DONE).read_text())
        export_vae(
            run.run_dir / run_folder.FINAL,
            averaged(run.network, run.averages),
            LatentReport(**done["latents"]),
            done["measures"],
            _record(run, done),
            name=run.settings.name,
            averaged=bool(run.averages.shadows),
            keep_normalisation=keeps_normalisation(run.settings),
        )
    processes.barrier()


def _record(run: VaeRun, done: dict[str, Any]) -> dict[str, Any]:
    """What the model card says about the training."""
    environment = json.loads((run.run_dir / run_folder.ENVIRONMENT).read_text())
    settings = run.settings
    return {
        "name": settings.name,
        "seed": settings.seed,
        "start": settings.autoencoder.source or "from scratch",
        "samples": done["samples"],
        "resolution": settings.stage.resolution,
        "measured_on": "held-out images" if settings.data.get("validation") else "images of the training set",
        "loss": asdict(settings.loss),
        "equivariance": asdict(settings.equivariance),
        "adversarial": asdict(settings.adversarial) if settings.adversarial.weight else None,
        "seconds": round(run.ledger.seconds_spent(), 1),
        "commit": environment["commit"],
        "hdm_lightning": environment["hdm_lightning"],
    }
