"""The `final/` folder: a trained network, what it was trained with, and its autoencoder.

```
final/  model.safetensors   averaged weights        config.json   what the rest is
        model_raw.safetensors   last weights, if kept   vae/      diffusers AutoencoderKL     README.md   model card
```
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from hdm_lightning.encoders.base import ImageAutoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.generation.model_card import model_card
from hdm_lightning.generation.text_encoder_source import TextEncoderSource
from hdm_lightning.interop.mismatch import check_tensors
from hdm_lightning.interop.tensor_files import read_tensors
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.whole_files import replacing, write_json, write_text

BUNDLE_FORMAT = "hdm-lightning model 1"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
VAE_FOLDER = "vae"
Weights = Literal["ema", "raw"]
WEIGHT_FILES: Mapping[str, str] = {"ema": "model.safetensors", "raw": "model_raw.safetensors"}


@dataclass(frozen=True)
class Bundle:
    """A `final/` folder's description; weights are read by `load_model`.

    Args:
        folder: where it is.
        xut: the network's configuration.
        text_encoder: which text encoder it needs.
        latent_channels, latent_factor: of the autoencoder.
        training: free record of the training: steps, samples, resolution, commit.
        sampling: settings of `SamplingSettings` to start from, as the training run found them good.
    """

    folder: Path
    xut: XUTConfig
    text_encoder: TextEncoderSource
    latent_channels: int
    latent_factor: int
    training: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def vae_folder(self) -> Path:
        """Where the autoencoder is."""
        return self.folder / VAE_FOLDER

    def weights_file(self, weights: Weights = "ema") -> Path:
        """File of the averaged or the raw weights.

        Raises:
            UserError: if it is not there.
        """
        path = self.folder / WEIGHT_FILES[weights]
        if not path.is_file():
            raise UserError(f"there is no {path.name}", where=str(self.folder), hint="choose the other weights")
        return path

    def load_model(self, weights: Weights = "ema") -> XUT:
        """The network on the CPU, in evaluation mode, in float32 whatever the file has: autocast lowers it.

        Raises:
            UserError: if the weights are missing, cannot be read or do not fit the configuration.
        """
        path = self.weights_file(weights)
        tensors = read_tensors(path)
        with torch.device("meta"):
            model = XUT(self.xut)
        try:
            check_tensors(tensors, {name: value.shape for name, value in model.state_dict().items()})
        except ValueError as error:
            raise UserError(str(error), where=str(path)) from error
        model.load_state_dict(tensors, assign=True)
        return model.float().eval()


def save_bundle(
    folder: Path,
    model_state: Mapping[str, Tensor],
    *,
    xut: XUTConfig,
    text_encoder: TextEncoderSource,
    autoencoder: ImageAutoencoder,
    raw_state: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> Bundle:
    """Write a `final/` folder; config.json comes last, so that a folder with one is whole.

    Args:
        folder: made if missing; files of the same names are replaced.
        model_state: state dict of the network, averaged weights if there are such.
        xut: the network's configuration.
        text_encoder: which text encoder it was trained with.
        autoencoder: saved beside it, with its normalisation.
        raw_state: the last weights, if they are to be kept beside the averaged ones.
        training: free record of plain values.
        sampling: settings to start from, as in `SamplingSettings`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = text_encoder.kept()
    bundle = Bundle(folder, xut, source, autoencoder.channels, autoencoder.factor, training or {}, sampling or {})
    for kind, state in (("ema", model_state), ("raw", raw_state)):
        if state is not None:
            tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
            with replacing(folder / WEIGHT_FILES[kind]) as temporary:
                save_file(tensors, temporary)
    autoencoder.save(bundle.vae_folder)
    description = _description(bundle)
    card = model_card(description, keeps_raw=raw_state is not None)
    write_text(folder / CARD_FILE, card)
    write_json(folder / CONFIG_FILE, description)
    return bundle


def load_bundle(folder: Path) -> Bundle:
    """The description of a `final/` folder.

    Raises:
        UserError: if the folder is none, naming the key of config.json that is wrong.
    """
    path = folder / CONFIG_FILE
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path), hint="give a run's final/ folder") from error
    if not isinstance(written, dict) or written.get("format") != BUNDLE_FORMAT:
        raise UserError(f"is not of the format {BUNDLE_FORMAT!r}", where=str(path))
    try:
        return Bundle(
            folder=folder,
            xut=XUTConfig.from_json(written["xut"]),
            text_encoder=TextEncoderSource(**written["text_encoder"]).found_from(folder),
            latent_channels=written["latent"]["channels"],
            latent_factor=written["latent"]["factor"],
            training=written.get("training", {}),
            sampling=written.get("sampling", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"does not describe a model ({error})", where=str(path)) from error


def _description(bundle: Bundle) -> dict[str, Any]:
    return {
        "format": BUNDLE_FORMAT,
        "xut": bundle.xut.to_json(),
        "text_encoder": asdict(bundle.text_encoder),
        "latent": {"channels": bundle.latent_channels, "factor": bundle.latent_factor},
        "training": dict(bundle.training),
        "sampling": dict(bundle.sampling),
    }
