"""The diffusers folder of an AutoencoderKL: find, read, check and write its configuration and its weights.

Shapes: image (B,3,f·H,f·W); latent (B,C,H,W).
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hdm_lightning.encoders.base import hash_of
from hdm_lightning.encoders.pretrained import (
    FINAL,
    RUNS,
    UNREADABLE,
    forget_places,
    locate_model,
    readable,
    require_finite_model,
)
from hdm_lightning.errors import UserError, first_line
from hdm_lightning.json_files import read_object
from hdm_lightning.whole_files import move_in, replacing

VAE_FOLDER = "vae"
AUTOENCODER_FILES = ["config.json", "*.safetensors|*.bin"]
# Repositories also hold half-precision variants and single files of other layouts.
AUTOENCODER_DOWNLOAD = ["config.json", "diffusion_pytorch_model.safetensors"]
WEIGHTS = "diffusion_pytorch_model"
WEIGHTS_FILE = f"{WEIGHTS}.safetensors"

AutoencoderKL = Any
"""A diffusers AutoencoderKL, whose classes carry no types and take seconds to import."""

INSIDE = (VAE_FOLDER, FINAL, f"{FINAL}/{VAE_FOLDER}")
"""Subfolders of a pipeline's and a run's folder that may contain an autoencoder."""

_CELLS = 4
_WIDEST = 65_536
"""Maximum number of channels that is accepted from a file."""
# Cannot be inferred from the tensors; the same in every Stable Diffusion autoencoder.
_NORM_GROUPS = 32
_HINT = "use a folder written by AutoencoderKL.save_pretrained"


def locate_autoencoder(name: str, *, where: str, made_by: str | None = None) -> Path:
    """Return the folder of an AutoencoderKL, downloading it at most once; see `encoders.pretrained.locate_model`.

    `name` is its folder; a run, its `final/`, or any folder with an autoencoder in `vae/`; a hub name; or
    `package:NAME/FOLDER`. `made_by` is the command that trains it, for the hint if its run does not exist.
    Raises UserError: there is none.
    """
    path = Path(name).expanduser()
    if path.name == FINAL and not path.is_dir():
        raise _no_run(path, name, where, made_by)
    inside = [path / place for place in INSIDE if is_autoencoder(path / place)]
    found = str(inside[0]) if inside and not is_autoencoder(path) else name
    return locate_model(found, where=where, required=AUTOENCODER_FILES, download=AUTOENCODER_DOWNLOAD)


def is_autoencoder(folder: Path) -> bool:
    """Return whether a folder has the configuration of an AutoencoderKL."""
    try:
        read_config(folder, where="")
    except UserError:
        return False
    return True


def _no_run(path: Path, name: str, where: str, made_by: str | None) -> UserError:
    """Return the error for a run of hdm-train-vae that does not exist or is not finished."""
    run = path.parent
    if run.is_dir():
        hint = "run the same hdm-train-vae command again to finish it"
        return UserError(f"the run {str(run)!r} has not written its {FINAL}/ yet", where=where, hint=hint)
    named = f"name={shlex.quote(run.name)}" if str(run.parent) == RUNS else f"run_dir={shlex.quote(str(run))}"
    command = made_by if made_by and named in made_by.split() else f"hdm-train-vae data.train=SHARDS {named}"
    return UserError(f"there is no folder {name!r}", where=where, hint=f"train it: {command}")


def read_config(folder: Path, *, where: str) -> dict[str, Any]:
    """Read the configuration of a folder's AutoencoderKL. Raises UserError: not JSON, or of another model."""
    file = folder / "config.json"
    written = read_object(file, hint=_HINT)
    kind, widths = written.get("_class_name", "AutoencoderKL"), written.get("block_out_channels")
    if kind != "AutoencoderKL" or widths is None:
        raise UserError(f"is not an AutoencoderKL ({file} says {kind})", where=where, hint=_HINT)
    sizes = [*widths, written.get("latent_channels", 4)] if isinstance(widths, list) else []
    if len(sizes) < 2 or not all(type(size) is int and 0 < size <= _WIDEST for size in sizes):
        what = f"has block_out_channels {widths} and latent_channels {written.get('latent_channels')}"
        raise UserError(what, where=str(file), hint=_HINT)
    return written


def factor_of(config: Mapping[str, Any]) -> int:
    """Return the image pixels per latent cell along one side, from an AutoencoderKL's configuration."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def channels_of(config: Mapping[str, Any]) -> int:
    """Return the latent channels from an AutoencoderKL's configuration; 4 if not stated, as in diffusers."""
    return int(config.get("latent_channels", 4))


def read_autoencoder(folder: Path, dtype: torch.dtype, *, where: str) -> AutoencoderKL:
    """Load the AutoencoderKL of a folder with a config.json and weights.

    Raises UserError: these do not fit each other, weights are missing, or it does not take RGB images.
    """
    from diffusers import AutoencoderKL  # noqa: PLC0415 (seconds to import)

    read_config(folder, where=where)
    with readable("diffusers cannot read an AutoencoderKL", folder, where=where, hint=_HINT):
        model, loading = AutoencoderKL.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=any(folder.glob(f"{WEIGHTS}*.safetensors")),
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    if missing := loading["missing_keys"]:  # diffusers only warns and leaves them random
        what = f"{folder} lacks {len(missing)} weights, {missing[0]} among them"
        raise UserError(what, where=where, hint=_HINT)
    check_shapes(model, where=where)
    require_finite_model(model, str(folder), where)
    return model


def write_autoencoder(model: AutoencoderKL, folder: Path, weights: Path | None = None) -> None:
    """Write a diffusers folder, each file atomically and with the umask's permissions, config.json last.

    `weights` is a file to copy instead of writing the model's own weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / WEIGHTS_FILE
    if weights is not None and not (target.exists() and target.samefile(weights)):
        with replacing(target) as temporary:
            shutil.copyfile(weights, temporary)
    with TemporaryDirectory(dir=folder, prefix=".") as inside:
        if weights is None:
            model.save_pretrained(inside, safe_serialization=True)
        else:
            model.save_config(inside)
        forget_places(Path(inside))
        move_in(Path(inside), folder, last="config.json")


def check_shapes(model: AutoencoderKL, *, where: str) -> None:
    """Run an AutoencoderKL of this configuration on the meta device to check its shapes; nothing is computed.

    Raises UserError: it cannot encode RGB images, or returns another size.
    """
    from diffusers import AutoencoderKL  # noqa: PLC0415 (seconds to import)

    factor = factor_of(model.config)
    side = factor * _CELLS
    hint = (
        "make down_block_types, up_block_types and block_out_channels equally long, "
        "with 3 in_channels and out_channels and at least one latent channel"
    )
    try:
        with torch.device("meta"):
            empty = AutoencoderKL.from_config(model.config)
            latent = empty.encode(torch.empty(1, 3, side, side)).latent_dist.mode()
            shape = tuple(empty.decode(latent).sample.shape)
    except UNREADABLE as error:
        raise UserError(f"cannot encode an image ({first_line(error)})", where=where, hint=hint) from error
    if shape != (1, 3, side, side):
        what = f"returns {shape} for an image of {(1, 3, side, side)}"
        raise UserError(what, where=where, hint=hint)
    if tuple(latent.shape[1:]) != (channels_of(model.config), _CELLS, _CELLS):
        what = f"has a latent of {tuple(latent.shape[1:])} for an image of {_CELLS} × {_CELLS} cells of {factor} px"
        raise UserError(what, where=where, hint=hint)


_OF_THE_ENCODER = (
    "in_channels",
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "latent_channels",
    "norm_num_groups",
    "mid_block_add_attention",
    "use_quant_conv",
)


def folder_fingerprint(folder: Path, *, where: str) -> str:
    """Return the `encoder_fingerprint` of a folder's AutoencoderKL, reading only its encoder half.

    Raises UserError: its configuration or that half is incomplete; see `read_autoencoder`.
    """
    from diffusers import AutoencoderKL  # noqa: PLC0415 (seconds to import)

    written, file = read_config(folder, where=where), folder / WEIGHTS_FILE
    if file.is_file() and not file.with_name(f"{file.name}.index.json").exists():
        reading = "diffusers cannot read an AutoencoderKL"
        with readable(reading, folder, where=where, hint=_HINT), safe_open(file, framework="pt") as stored:
            with torch.device("meta"):
                empty = AutoencoderKL.from_config(written)
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in list(stored.keys())}
            if all(shapes.get(name) == tuple(tensor.shape) for name, tensor in _encoder_half(empty)):
                check_shapes(empty, where=where)
                return _fingerprint(empty, stored.get_tensor)
    return encoder_fingerprint(read_autoencoder(folder, torch.float32, where=where))  # old names, shards, .bin


def encoder_fingerprint(model: AutoencoderKL) -> str:
    """Return the SHA-256, 32 hexadecimal digits, of all that posteriors depend on: the encoder's shape and weights.

    Neither the decoder nor the normalization of the latents counts. Weights are hashed in float32, so a file in half
    precision and the model loaded from it agree.
    """
    return _fingerprint(model, model.state_dict().__getitem__)


def _fingerprint(model: AutoencoderKL, tensor_of: Callable[[str], Tensor]) -> str:
    """Return the fingerprint of a model's configuration with the tensors that `tensor_of` returns by name."""
    shape = {name: model.config.get(name) for name in _OF_THE_ENCODER}
    tensors = ((name, tensor_of(name)) for name, _ in _encoder_half(model))
    return hash_of(tensors, json.dumps(shape, sort_keys=True))


def _encoder_half(model: AutoencoderKL) -> list[tuple[str, Tensor]]:
    tensors = sorted(model.state_dict().items(), key=itemgetter(0))
    return [(name, tensor) for name, tensor in tensors if name.startswith(("encoder.", "quant_conv."))]


def infer_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the constructor arguments of an AutoencoderKL from its tensors, for files without a config.json.

    Raises ValueError: a tensor that every AutoencoderKL has, or that its shape is inferred from, is missing.
    """
    ends = [f"{half}.{end}.weight" for end in ("conv_out", "conv_in") for half in ("encoder", "decoder")]
    if lacking := [name for name in ends if name not in tensors]:
        raise ValueError(f"tensors: no {lacking[0]}, expected an AutoencoderKL")
    levels = _count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    tell = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(levels)]
    missing = [name for name in tell if name not in tensors]
    if missing:
        raise ValueError(f"tensors: no {missing[0]}; this kind of AutoencoderKL needs its config.json")
    widths = [tensors[name].shape[0] for name in tell]
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(widths),
        "layers_per_block": _count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": min(_NORM_GROUPS, widths[0]),
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": any(".mid_block.attentions." in name for name in tensors),
    }


def _count(names: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in names)
    return len({match.group(1) for match in found if match})
