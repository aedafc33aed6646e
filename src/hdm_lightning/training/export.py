"""The end of a run: its `final/` folder, ready for hdm-sample and hdm-convert."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm_lightning.encoders.sources import TextEncoderSource
from hdm_lightning.generation.final_folder import save_final
from hdm_lightning.training import processes, run_folder
from hdm_lightning.training.handover import averaged_weights, network_weights, read_checkpoint
from hdm_lightning.training.text_whitening import folded

if TYPE_CHECKING:
    from hdm_lightning.training.run import Run


def export_final(run: "Run", checkpoint_path: Path) -> None:
    """Write the averaged and the raw weights of the last stage's checkpoint with all that drawing needs."""
    if processes.rank() == 0:
        checkpoint = read_checkpoint(checkpoint_path)
        last = run.plans[-1].settings
        raw = folded(network_weights(checkpoint), run.whitening)
        averaged = folded(averaged_weights(checkpoint, 0), run.whitening) if run.averages.shadows else raw
        save_final(
            run.run_dir / run_folder.FINAL,
            averaged,
            xut=run.network.config,
            text_encoder=TextEncoderSource(
                run.settings.text_encoder.name, run.settings.text_encoder.layer, last.context_length
            ),
            autoencoder=run.encoders.autoencoder,
            raw_state=raw if run.averages.shadows else None,
            training=_record(run),
            sampling={
                "height": last.resolution,
                "width": last.resolution,
                "steps": run.settings.callbacks.pictures.steps,
                "guidance_scale": run.settings.callbacks.pictures.guidance_scale,
                "shift": run.settings.callbacks.pictures.shift,
            },
        )
    processes.barrier()


def _record(run: "Run") -> dict[str, Any]:
    """What the model card says about the training."""
    stages = [json.loads((plan.folder(run.run_dir) / run_folder.DONE).read_text()) for plan in run.plans]
    environment = json.loads((run.run_dir / run_folder.ENVIRONMENT).read_text())
    return {
        "name": run.settings.name,
        "seed": run.settings.seed,
        "samples": sum(stage["samples"] for stage in stages),
        "seconds": round(run.ledger.seconds_spent(), 1),
        "stages": stages,
        "resolution": run.plans[-1].settings.resolution,
        "commit": environment["commit"],
        "hdm_lightning": environment["hdm_lightning"],
    }
