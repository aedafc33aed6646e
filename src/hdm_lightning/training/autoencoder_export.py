"""Export of a trained autoencoder: `final/`, a diffusers folder with latent statistics and a model card."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdm_lightning.interop.model_card import in_fence, plain_text
from hdm_lightning.metrics.latents import LatentReport
from hdm_lightning.training.modules.autoencoder_network import AutoencoderNetwork, save_vae
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


def export_autoencoder(
    folder: Path,
    network: AutoencoderNetwork,
    latents: LatentReport,
    measures: Mapping[str, float],
    training: Mapping[str, Any],
    *,
    name: str,
    averaged: bool,
    keep_normalisation: bool = False,
    found_as: str | None = None,
) -> None:
    """Write the diffusers folder, its measures as JSON and its card.

    Args:
        folder: created if missing.
        network: the autoencoder with the weights to export.
        latents: statistics of these weights' latents.
        measures: measured values by name, for the card and the JSON file.
        training: plain values about the training, for the card.
        name: heading of the card.
        averaged: whether the weights are averages over training.
        keep_normalisation: keep the config's normalization, for models trained with it, instead of writing these
            statistics.
        found_as: name of the autoencoder in the card; None uses the folder's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    statistics = (latents.mean, [max(value, 1e-6) for value in latents.std])
    save_vae(network.vae, folder, None if keep_normalisation else statistics)
    report = {"measures": dict(measures), "images": latents.images, "training": dict(training)}
    write_json(folder / MEASURES_FILE, report)
    share = training.get("equivariance", {}).get("equivariant", 0)
    license = training.get("license")
    card = _CARD.format(
        front=f"license: {license}\n" if license else "",
        name=plain_text(name),
        equivariance=f" and EQ-VAE regularization (arXiv 2502.09509) in {share:.0%} of the steps" if share else "",
        channels=network.channels,
        factor=network.factor,
        normalisation=_KEPT if keep_normalisation else _MEASURED,
        weights="averaged over training" if averaged else "of the last step",
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        folder=found_as or folder,
        folder_word=shlex.quote(found_as or str(folder)),
        images=latents.images,
        measured_on=training.get("measured_on", "images"),
        measures="\n".join(f"| {key} | {value:.4g} |" for key, value in sorted(measures.items())),
        training=in_fence(dict(training)),
    )
    write_text(folder / "README.md", card)
