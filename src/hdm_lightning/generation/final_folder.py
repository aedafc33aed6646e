"""The `final/` folder of a training: its network, described and with its autoencoder, as a pipeline's folder."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.encoders.base import ImageAutoencoder
from hdm_lightning.encoders.sources import TextEncoderSource
from hdm_lightning.encoders.text import cut_after, read_text_model
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.interop.pipeline_folder import (
    TEXT_ENCODER,
    TOKENIZER,
    PipelineFolder,
    Weights,
    read_pipeline_folder,
    write_pipeline_folder,
)
from hdm_lightning.models import XUTConfig
from hdm_lightning.whole_files import move_in


def save_final(
    folder: Path,
    averaged_state: Mapping[str, Tensor],
    *,
    xut: XUTConfig,
    text_encoder: TextEncoderSource,
    autoencoder: ImageAutoencoder,
    raw_state: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    include_text_encoder: bool = False,
) -> PipelineFolder:
    """Write a `final/` folder; model_index.json comes last, so that a folder with one is whole.

    Args:
        folder: made if missing; files of the same names are replaced.
        averaged_state: state dict of the network, averaged weights if there are such.
        xut: the network's configuration.
        text_encoder: which text encoder it was trained with.
        autoencoder: saved beside it, with its normalisation.
        raw_state: the last weights, if they are to be kept beside the averaged ones.
        training: free record of plain values.
        sampling: settings to start from, as in `SamplingSettings`.
        include_text_encoder: whether the text encoder lies in the folder, too; otherwise it is found by its name.
    """
    weights: dict[Weights, Mapping[str, Tensor]] = {"ema": averaged_state}
    if raw_state is not None:
        weights["raw"] = raw_state
    write_pipeline_folder(
        folder,
        weights,
        xut=xut,
        text_encoder=text_encoder,
        write_vae=autoencoder.save,
        write_text_encoder=(lambda place: _write_text_encoder(place, text_encoder)) if include_text_encoder else None,
        training=training,
        sampling=sampling,
    )
    return read_pipeline_folder(folder)


def _write_text_encoder(folder: Path, source: TextEncoderSource) -> dict[str, list[str]]:
    """Write the text encoder, without the blocks that it does not need, and its tokenizer, each to its subfolder.

    Returns:
        Library and class of each.
    """
    model: Any = cut_after(read_text_model(source.name, torch.float32, where="text_encoder"), source.layer)
    parts = {TEXT_ENCODER: model, TOKENIZER: Tokenizer(source.name, where="text_encoder").transformers}
    for name, part in parts.items():
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".") as inside:
            part.save_pretrained(inside)
            move_in(Path(inside), folder / name, last="config.json")
    return {name: ["transformers", type(part).__name__] for name, part in parts.items()}
