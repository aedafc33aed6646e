"""The folder of an `HDMPipeline`, as training writes it: reading and writing it, and reading its old layout.

```
model_index.json   components, settings and training record; written last, so a folder with one is complete
transformer/       config.json, diffusion_pytorch_model.safetensors: averaged weights; ….raw.safetensors: the last ones
vae/  scheduler/   as diffusers writes them           README.md   the model card
text_encoder/  tokenizer/   only if included in the model, which names them otherwise
```
In the old layout, config.json has all descriptions, next to model.safetensors, model_raw.safetensors and vae/.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch
from torch import Tensor

from hdm_lightning.encoders.pretrained import FINAL, TextEncoderSource, is_local_path
from hdm_lightning.encoders.vae_folder import VAE_FOLDER, WEIGHTS, is_autoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.interop.model_card import CARD, SAMPLES, model_card
from hdm_lightning.interop.tensor_files import check_tensors, read_tensors, require_finite, shards, write_tensors
from hdm_lightning.json_files import AGAIN, object_or_empty, read_object
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.whole_files import write_json, write_text

INDEX, CONFIG = "model_index.json", "config.json"
TRANSFORMER, SCHEDULER, TEXT_ENCODER, TOKENIZER = "transformer", "scheduler", "text_encoder", "tokenizer"
DOWNLOAD = ["*.json", "README.md", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja"]
"""Files to download from a repository: nothing that could be run."""
PIPELINE_CLASS = "HDMPipeline"
COMPONENTS = "hdm_lightning.generation.components"
"""The module of XUTTransformer and FlowScheduler, which read their folders."""
NETWORK_PREFIX = "network."
"""Prefix of the names of an XUT's tensors in transformer/, as in training checkpoints."""

Weights = Literal["ema", "raw"]
WEIGHT_KINDS: tuple[Weights, ...] = ("ema", "raw")
_STEMS: Mapping[str, str] = {"ema": f"{TRANSFORMER}/{WEIGHTS}", "raw": f"{TRANSFORMER}/{WEIGHTS}.raw"}
_OLD_STEMS: Mapping[str, str] = {"ema": "model", "raw": "model_raw"}
_SOLVING = ("solver", "shift")
_OF_A_RUN = ("config.yaml", "ledger.jsonl")
"""Files in every run's folder from its start."""


@dataclass(frozen=True)
class PipelineFolder:
    """The description of a model in a pipeline folder; `load_network` reads the weights.

    Args:
        folder: its path.
        xut: the network's configuration.
        text_encoder: text encoder that the network needs; None if not recorded.
        inside: whether the folder contains the text encoder, with its tokenizer.
        training: record of the training, any plain values: steps, samples, resolution, commit.
        sampling: default settings, keys of `SamplingSettings`, as recorded by the training run.
        old: whether it has the old layout.
    """

    folder: Path
    xut: XUTConfig
    text_encoder: TextEncoderSource | None
    inside: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    old: bool = False

    @property
    def vae(self) -> Path:
        """Folder of the autoencoder, if there is one."""
        return self.folder / VAE_FOLDER

    @property
    def tokenizer(self) -> str | None:
        """Name or folder of the tokenizer."""
        if self.inside:
            return str(self.folder / TOKENIZER)
        return self.text_encoder.name if self.text_encoder else None

    def weight_files(self, weights: str = "ema") -> tuple[Path, ...]:
        """Return the files of the averaged or the raw weights. Raises UserError: there are none."""
        file = self._file(weights)
        if not (found := shards(file)):
            raise UserError(f"there is no {file.name}", where=str(self.folder), hint="choose the other weights")
        return found

    def has(self, weights: str) -> bool:
        """Return whether the folder has the averaged or the raw weights."""
        return bool(shards(self._file(weights)))

    def _file(self, weights: str) -> Path:
        return self.folder / f"{(_OLD_STEMS if self.old else _STEMS)[weights]}.safetensors"

    def load_network(self, weights: str = "ema") -> XUT:
        """Load the network on the CPU, in evaluation mode, in the dtype of its file.

        Raises:
            UserError: the weights are missing, cannot be read or do not fit the configuration.
        """
        files = self.weight_files(weights)
        tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
        try:
            return network_from_tensors(self.xut, tensors).eval()
        except ValueError as error:
            raise UserError(str(error), where=str(files[0]), hint=AGAIN) from error


def network_from_tensors(config: XUTConfig, tensors: Mapping[str, Tensor]) -> XUT:
    """Build the network from tensors under our names, with or without `NETWORK_PREFIX`, in their dtype.

    Raises:
        ValueError: tensors are missing, unexpected, mis-shaped or not finite; the message lists them.
    """
    own = {name.removeprefix(NETWORK_PREFIX): tensor for name, tensor in tensors.items()}
    levels = config.depth * (config.encoder_blocks + config.decoder_blocks)
    blocks = config.blocks_before + levels + config.blocks_after
    if blocks > len(own):  # checked before a file's number of blocks is built
        raise ValueError(f"the configuration describes {blocks} blocks, but there are {len(own)} tensors")
    with torch.device("meta"):
        network = XUT(config)
    check_tensors(own, {name: value.shape for name, value in network.state_dict().items()})
    require_finite(own)
    network.load_state_dict(own, assign=True)
    return network


def is_pipeline_folder(folder: Path) -> bool:
    """Return whether a folder is that of a pipeline with an XUT, in the current or the old layout."""
    index, config = (object_or_empty(folder / name) for name in (INDEX, CONFIG))
    return index.get("_class_name") == PIPELINE_CLASS or "xut" in config


def refuse_unfinished(folder: Path, *, where: str) -> None:
    """Raise UserError for the folder of a run that has not written its model yet, or that trained an autoencoder."""
    if all((folder / name).is_file() for name in _OF_A_RUN) and not is_pipeline_folder(folder / FINAL):
        if is_autoencoder(folder / FINAL):
            hint = f"train one on it: hdm-train vae=folder vae.name={quote(str(folder / FINAL))}"
            what = f"the run {str(folder)!r} trained an autoencoder, not a network that generates images"
            raise UserError(what, where=where, hint=hint)
        hint = "run its training command again to finish it"
        raise UserError(f"the run {str(folder)!r} has not written its {FINAL}/ yet", where=where, hint=hint)


def holding(path: Path) -> tuple[Path, Weights] | None:
    """Return the pipeline folder that a weights file is in, and which weights it has; None for any other path."""
    for up, stems in ((path.parent, _OLD_STEMS), (path.parent.parent, _STEMS)):
        for kind in WEIGHT_KINDS:
            if path == up / f"{stems[kind]}.safetensors" and path.is_file() and is_pipeline_folder(up):
                return up, kind
    return None


def read_pipeline_folder(folder: Path) -> PipelineFolder:
    """Read the description in a pipeline folder, in the current or the old layout.

    Raises:
        UserError: it is not one; names the file that is wrong.
    """
    path = folder / (INDEX if (folder / INDEX).is_file() else CONFIG)
    written = read_object(path, hint="use a run's final/ folder")
    try:
        return _read_index(folder, written) if path.name == INDEX else _read_old(folder, written)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"does not describe a model ({error})", where=str(path), hint=AGAIN) from error


def _read_index(folder: Path, index: Mapping[str, Any]) -> PipelineFolder:
    if index.get("_class_name") != PIPELINE_CLASS:
        raise ValueError(f"_class_name is {index.get('_class_name')!r}, expected {PIPELINE_CLASS!r}")
    fields = read_object(folder / TRANSFORMER / CONFIG)
    xut = XUTConfig.from_json({key: value for key, value in fields.items() if not key.startswith("_")})
    inside = bool((index.get(TEXT_ENCODER) or [None])[0])
    name = str(folder / TEXT_ENCODER) if inside else index.get("text_encoder_name")
    written = {"name": name, "layer": index.get("text_encoder_layer"), "context_length": index.get("context_length")}
    source = TextEncoderSource.from_json(written) if name else None
    solving = object_or_empty(folder / SCHEDULER / "scheduler_config.json")
    sampling = {**(index.get("sampling") or {}), **{key: solving[key] for key in _SOLVING if key in solving}}
    training = dict(index.get("training") or {})
    return PipelineFolder(folder, xut, source.found_from(folder) if source else None, inside, training, sampling)


def _read_old(folder: Path, config: Mapping[str, Any]) -> PipelineFolder:
    text = config.get("text_encoder")
    return PipelineFolder(
        folder,
        XUTConfig.from_json(config["xut"]),
        TextEncoderSource.from_json(text).found_from(folder) if text else None,
        training=dict(config.get("training") or {}),
        sampling=dict(config.get("sampling") or {}),
        old=True,
    )


def write_pipeline_folder(
    folder: Path,
    weights: Mapping[Weights, Mapping[str, Tensor]],
    *,
    xut: XUTConfig,
    text_encoder: TextEncoderSource | None,
    write_vae: Callable[[Path], None] | None,
    write_text_encoder: Callable[[Path], Mapping[str, Sequence[str]]] | None = None,
    training: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write a pipeline folder; an existing model_index.json is removed first, and the new one is written last.

    Args:
        folder: created if missing; files of the same names are replaced.
        weights: state dicts of the network: averaged and, optionally, raw.
        xut: the network's configuration.
        text_encoder: text encoder that it was trained with.
        write_vae: writes the autoencoder to a folder; None for a network without one.
        write_text_encoder: writes the text encoder and its tokenizer into the folder, and returns library and class of
            both by their names in model_index.json; None only records the text encoder's name.
        training: record of the training, any plain values.
        sampling: default settings, keys of `SamplingSettings`.
    """
    (folder / INDEX).unlink(missing_ok=True)
    for kind, state in weights.items():
        tensors = {NETWORK_PREFIX + name: value for name, value in state.items()}
        write_tensors(folder / f"{_STEMS[kind]}.safetensors", tensors)
    diffusers = {"_diffusers_version": version("diffusers")}
    solving, others = split_sampling(sampling or {})
    write_json(folder / TRANSFORMER / CONFIG, {"_class_name": "XUTTransformer", **diffusers, **xut.to_json()})
    scheduler = {"_class_name": "FlowScheduler", **diffusers, "solver": "ab2", "shift": 1.0, **solving}
    write_json(folder / SCHEDULER / "scheduler_config.json", scheduler)
    if write_vae is not None:
        write_vae(folder / VAE_FOLDER)
    absent = [None, None]
    text = {TEXT_ENCODER: absent, TOKENIZER: absent} if write_text_encoder is None else write_text_encoder(folder)
    kept = text_encoder.kept() if text_encoder else None
    inside = write_text_encoder is not None
    _write_card(folder, xut, kept, training or {}, keeps_raw="raw" in weights, inside=inside)
    index = {
        "_class_name": PIPELINE_CLASS,
        **diffusers,
        "transformer": [COMPONENTS, "XUTTransformer"],
        "vae": absent if write_vae is None else ["diffusers", "AutoencoderKL"],
        "scheduler": [COMPONENTS, "FlowScheduler"],
        **text,
        "text_encoder_name": kept.name if kept and not (inside and is_local_path(kept.name)) else None,
        "text_encoder_layer": kept.layer if kept else -1,
        "context_length": kept.context_length if kept else 256,
        "sampling": others,
        "training": dict(training or {}),
    }
    write_json(folder / INDEX, index)


def split_sampling(sampling: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sampling settings that the scheduler has, solver and shift, and the others."""
    solving = {key: value for key, value in sampling.items() if key in _SOLVING}
    return solving, {key: value for key, value in sampling.items() if key not in solving}


def _write_card(
    folder: Path, xut: XUTConfig, text: TextEncoderSource | None, training: Mapping[str, Any], **kinds: bool
) -> None:
    """Write the card; `kinds` are `keeps_raw` and `inside` of `model_card`."""
    sampled = (folder / SAMPLES).is_file()
    card = model_card(xut.to_json(), asdict(text) if text else None, training, sampled=sampled, **kinds)
    write_text(folder / CARD, card)


def record_measures(folder: Path, measures: Mapping[str, Any]) -> None:
    """Record measures in a pipeline folder: in its model_index.json and in its card, which is rebuilt.

    Args:
        folder: a pipeline folder in the current layout.
        measures: name → `value`, and `low` and `high` of its interval.

    Raises:
        UserError: it is not such a folder.
        OSError: it cannot be written.
    """
    index, found = read_object(folder / INDEX), read_pipeline_folder(folder)
    training = {**found.training, "measures": {**found.training.get("measures", {}), **measures}}
    text = found.text_encoder.kept() if found.text_encoder else None
    _write_card(folder, found.xut, text, training, keeps_raw=found.has("raw"), inside=found.inside)
    write_json(folder / INDEX, {**index, "training": training})
