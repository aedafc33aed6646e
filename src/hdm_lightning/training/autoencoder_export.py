"""Export of a trained autoencoder: `final/`, a diffusers folder with latent statistics and a model card."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hdm_lightning.encoders.pretrained import is_local_path
from hdm_lightning.interop.model_card import in_fence, plain_text
from hdm_lightning.metrics.latents import LatentReport
from hdm_lightning.training import run_folder
from hdm_lightning.training.autoencoder_checks import keeps_normalisation
from hdm_lightning.training.model_record import run_record
from hdm_lightning.training.modules.autoencoder_network import save_vae
from hdm_lightning.training.run_recipe import Run, group
from hdm_lightning.whole_files import write_json, write_text

MEASURES_FILE = "measures.json"
_MEASURED = "(z - mean) / std with `latents_mean`, `latents_std` of config.json"
_KEPT = "as in config.json, unchanged from the source of the frozen encoder"

_CARD = """---
library_name: diffusers
{front}tags: [autoencoder, latent-diffusion]
---

# {name}

An AutoencoderKL (diffusers) trained with hdm-lightning{equivariance}.

| | |
|---|---|
| latents | {channels} channels, 1/{factor} of the image's side |
| normalization | {normalisation} |
| weights | {weights} |
| parameters | {parameters:,} |

## Use

```
hdm-train vae=folder vae.name={folder_word}
```

```python
from diffusers import AutoencoderKL
vae = AutoencoderKL.from_pretrained("{folder}")
```

## Measures on {images} {measured_on}

| measure | value |
|---|---|
{measures}

## Training

```json
{training}
```
"""


def export_autoencoder(run: Run, folder: Path, *, averaged: bool, public: str | None = None) -> None:
    """Write the run's autoencoder, with the weights that it now has, as a diffusers folder with measures and a card.

    Args:
        run: the run, whose stage has ended.
        folder: created if missing.
        averaged: whether the weights are averages over training.
        public: name of the autoencoder on the hub, if it goes there: the card then has no path of this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network: Any = run.network
    done = run_folder.read_done(run.run_dir, run.plans[0])
    latents, training = LatentReport(**done["latents"]), _record(run, done, public=public is not None)
    kept = keeps_normalisation(group(run.config, run.recipe, "autoencoder"))
    save_vae(network.vae, folder, None if kept else (latents.mean, [max(value, 1e-6) for value in latents.std]))
    report = {"measures": done["measures"], "images": latents.images, "training": training}
    write_json(folder / MEASURES_FILE, report)
    share, license = training["equivariance"]["equivariant"], training["license"]
    card = _CARD.format(
        front=f"license: {license}\n" if license else "",
        name=plain_text(str(run.config.name)),
        equivariance=f" and EQ-VAE regularization (arXiv 2502.09509) in {share:.0%} of the steps" if share else "",
        channels=network.channels,
        factor=network.factor,
        normalisation=_KEPT if kept else _MEASURED,
        weights="averaged over training" if averaged else "of the last step",
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        folder=public or folder,
        folder_word=shlex.quote(public or str(folder)),
        images=latents.images,
        measured_on=training["measured_on"],
        measures="\n".join(f"| {key} | {value:.4g} |" for key, value in sorted(done["measures"].items())),
        training=in_fence(training),
    )
    write_text(folder / "README.md", card)


def _record(run: Run, done: dict[str, Any], *, public: bool) -> dict[str, Any]:
    """Return the training's record for the card; a `public` one has no paths of this machine."""
    groups = {
        name: group(run.config, run.recipe, name) for name in ("autoencoder", "loss", "equivariance", "adversarial")
    }
    source = groups["autoencoder"].source or "from scratch"
    return {
        **run_record(run),
        "start": Path(source).name if public and is_local_path(source) else source,
        "samples": done["samples"],
        "resolution": run.plans[0].settings.resolution,
        "measured_on": "held-out images" if run.config.data.get("validation") else "images of the training set",
        "loss": asdict(groups["loss"]),
        "equivariance": asdict(groups["equivariance"]),
        "adversarial": asdict(groups["adversarial"]) if groups["adversarial"].weight else None,
    }
