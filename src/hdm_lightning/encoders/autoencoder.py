"""A diffusers AutoencoderKL as a frozen autoencoder with normalized latents.

Image sizes not divisible by its factor are refused or padded as requested, never silently cropped.

Shapes: B batch, H×W image pixels, C latent channels, f spatial factor, h = H/f, w = W/f.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from hdm_lightning.encoders.base import ImageAutoencoder, place
from hdm_lightning.encoders.caches import CachedAutoencoder
from hdm_lightning.encoders.vae_folder import (
    WEIGHTS_FILE,
    AutoencoderKL,
    channels_of,
    encoder_fingerprint,
    factor_of,
    folder_fingerprint,
    infer_config,
    locate_autoencoder,
    read_autoencoder,
    read_config,
    write_autoencoder,
)
from hdm_lightning.errors import UserError, sibling_key
from hdm_lightning.precision import parse_dtype

OnIndivisible = Literal["refuse", "pad"]

MAX_PIXELS = 5_500_000
"""Five 1024 x 1024 images; SDXL's autoencoder needs about 6.5 GiB to encode them in bfloat16, twice that in float32."""


def load_autoencoder(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    max_pixels: Annotated[int, Ge(1)] = MAX_PIXELS,
    cache_size: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    where: str = "vae.name",
) -> ImageAutoencoder:
    """Load a frozen AutoencoderKL with the normalization of its latents, on the CPU.

    Args:
        name: folder of an AutoencoderKL; a run, its `final/`, or any folder with an autoencoder in `vae/`; hub name
            `OWNER/NAME` or `OWNER/NAME/vae`; or `package:NAME/FOLDER`.
        dtype: dtype of the weights and of the computation, also under autocast; inputs and outputs are float32.
            `auto` follows the device that the autoencoder is moved to: bfloat16 on CUDA that has it, else float32.
        max_pixels: total pixels of the images encoded or decoded at once; a larger image goes alone.
        cache_size: number of images whose latents are cached in RAM, on a CPU alone; 0 turns the cache off.
        mean, std: per latent channel; None uses `latents_mean`/`latents_std` of the model's config.json,
            else its `scaling_factor`/`shift_factor`.
        where: configuration key to name in errors.

    Raises:
        UserError: the model is not available or cannot be read, or its normalization is unknown.
    """
    chosen = parse_dtype(dtype, where=sibling_key(where, "dtype"))
    folder = locate_autoencoder(name, where=where)
    written = read_config(folder, where=where)
    model = read_autoencoder(folder, chosen or torch.float32, where=where)
    channels = channels_of(model.config)
    mean, std = latent_statistics(written, channels, mean, std, where=str(folder / "config.json"), key=where)
    loaded = KLAutoencoder(model, mean, std, max_pixels=max_pixels, source=folder, auto=chosen is None)
    return CachedAutoencoder(loaded, cache_size) if cache_size else loaded


def autoencoder_from_tensors(
    tensors: Mapping[str, Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    config: Mapping[str, Any] | None = None,
) -> "KLAutoencoder":
    """Build a frozen autoencoder in float32 from tensors, as in single-file checkpoints.

    Args:
        tensors: names as in a diffusers AutoencoderKL, without prefix.
        mean, std: normalization per latent channel.
        config: its config.json, if the file has one; None infers the architecture from the tensors.

    Raises:
        ValueError: the tensors are not those of an AutoencoderKL.
    """
    import diffusers  # noqa: PLC0415  (seconds to import)

    written = infer_config(tensors) if config is None else dict(config)
    with torch.device("meta"):
        model = diffusers.AutoencoderKL.from_config(written)
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"tensors: not those of an AutoencoderKL ({str(error)[:300]})") from error
    return KLAutoencoder(model, mean, std)


class KLAutoencoder:
    """A frozen diffusers AutoencoderKL behind the `ImageAutoencoder` protocol; see `load_autoencoder`.

    Args:
        model: an AutoencoderKL, any number of latent channels; the normalization is written to its configuration.
        mean, std: per latent channel, each of length C.
        max_pixels: total pixels of the images encoded or decoded at once; a larger image goes alone.
        source: folder the weights came from; `save` copies its weights file, which may have a higher precision.
        auto: whether `to` also casts the weights to the dtype that suits the device.
    """

    def __init__(
        self,
        model: AutoencoderKL,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        max_pixels: int = MAX_PIXELS,
        source: Path | None = None,
        auto: bool = False,
    ) -> None:
        if max_pixels < 1:
            raise ValueError(f"max_pixels: got {max_pixels}, expected at least 1")
        self.model = model.eval().requires_grad_(False)
        self.channels = channels_of(model.config)
        self.factor = factor_of(model.config)
        self.max_pixels = max_pixels
        self.source = source
        self._auto = auto
        self._layout = torch.preserve_format  # of activations
        self.mean = torch.tensor(mean, dtype=torch.float32, device="cpu").reshape(1, -1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device="cpu").reshape(1, -1, 1, 1)
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value.shape[1] != self.channels:
                raise ValueError(f"{name}: got {value.shape[1]} values, expected {self.channels}")
        # diffusers applies a scaling factor on top of mean and std.
        statistics = {"latents_mean": self.mean.flatten().tolist(), "latents_std": self.std.flatten().tolist()}
        self.model.register_to_config(**statistics, scaling_factor=1.0, shift_factor=None)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and computation."""
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str) -> Self:
        """Move weights and normalization to a device; on CUDA to channels last, for fast convolutions."""
        place(self.model, device, auto=self._auto)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        self.lay_out(torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format)
        return self

    def lay_out(self, layout: torch.memory_format) -> None:
        """Set the memory format of weights and activations; outputs are always contiguous."""
        self._layout = torch.preserve_format if layout == torch.contiguous_format else layout
        self.model.to(memory_format=layout)

    def compile_blocks(self) -> None:
        """Compile each block of the encoder separately, for each input shape."""
        encoder = self.model.encoder
        for block in (*encoder.down_blocks, encoder.mid_block):
            block.compile(dynamic=False)

    @torch.no_grad()
    def encode(self, image: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Encode images (B, 3, H, W) in [−1, 1] to normalized latents (B, C, h, w), float32."""
        return self.from_moments(self.moments(image), noise=noise)

    @torch.no_grad()
    def moments(self, image: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [−1, 1] to mean and std (B, 2, C, h, w), float32, not normalized."""
        if image.dim() != 4 or image.shape[1] != 3 or any(side % self.factor for side in image.shape[2:]):
            expected = f"(B, 3, H, W) with H and W divisible by {self.factor}"
            raise ValueError(f"image: got shape {tuple(image.shape)}, expected {expected}")
        return torch.cat([self._posterior(part) for part in self._parts(image, 1)])

    def from_moments(self, moments: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Turn moments (B, 2, C, h, w) into normalized latents (B, C, h, w), float32; with noise they are samples."""
        latent = moments[:, 0].float()
        if noise is not None:
            if noise.shape != latent.shape:
                raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected {tuple(latent.shape)}")
            latent = latent + moments[:, 1].float() * noise.to(latent)
        # diffusers pipelines move only the model.
        return ((latent - self.mean.to(latent.device)) / self.std.to(latent.device)).contiguous()

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decode normalized latents (B, C, h, w) to images (B, 3, H, W), clipped to [−1, 1]."""
        if latent.dim() != 4 or latent.shape[1] != self.channels:
            raise ValueError(f"latent: got shape {tuple(latent.shape)}, expected (B, {self.channels}, h, w)")
        raw = latent.float() * self.std.to(latent.device) + self.mean.to(latent.device)
        with torch.autocast(latent.device.type, enabled=False):
            parts = (part.to(self.dtype, memory_format=self._layout) for part in self._parts(raw, self.factor))
            images = [self.model.decode(part).sample.float() for part in parts]
        return torch.cat(images).clamp(-1.0, 1.0).contiguous()

    def reconstruct(self, image: Tensor, *, on_indivisible: OnIndivisible = "refuse") -> Tensor:
        """Encode and decode images (B, 3, H, W) in [−1, 1], keeping their size.

        Sides not divisible by the factor are refused (ValueError), or padded by mirroring the edges and cropped back.
        """
        padded = pad_to_multiple(image, self.factor, on_indivisible)
        return cut_to(self.decode(self.encode(padded)), *image.shape[-2:])

    def save(self, folder: Path) -> None:
        """Write a diffusers folder with the normalization in its config.json, for `load_autoencoder` and diffusers."""
        weights = None if self.source is None else self.source / WEIGHTS_FILE
        self.model.to(memory_format=torch.contiguous_format)  # safetensors requires it
        write_autoencoder(self.model, folder, weights if weights is not None and weights.is_file() else None)
        self.model.to(memory_format=self._layout)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the encoder half, from its weights file if there is one, so independent of the dtype in use."""
        # Weights that `auto` cast to bfloat16 and back have lost digits.
        if self.source is None or (self.dtype == torch.float32 and not self._auto):
            return encoder_fingerprint(self.model)
        return folder_fingerprint(self.source, where=str(self.source))

    def _posterior(self, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            posterior = self.model.encode(image.to(self.dtype, memory_format=self._layout)).latent_dist
        return torch.stack([posterior.mean.float(), posterior.std.float()], dim=1)

    def _parts(self, batch: Tensor, scale: int) -> Iterator[Tensor]:
        """Split a batch into parts of at most `max_pixels`; `scale` is image pixels per cell along one side."""
        pixels = scale**2 * batch.shape[2] * batch.shape[3]
        return iter(batch.split(max(1, self.max_pixels // pixels)))


def latent_statistics(
    written: Mapping[str, Any],
    channels: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    where: str,
    key: str = "name",
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel: as passed, else from an AutoencoderKL's configuration.

    A scaling factor next to per-channel statistics is not applied: it is for samplers that expect another
    variance, while flow matching needs unit variance. Alone, it means z' = (z − shift)·scale.

    Args:
        written: the fields of that configuration.
        channels: latent channels.
        mean, std: override the configuration.
        where: the configuration's file, to name in errors.
        key: configuration key of the autoencoder's name; `mean` and `std` are its siblings.

    Raises:
        UserError: they are missing or wrong.
    """
    if mean is not None or std is not None:
        return _pair({"mean": mean, "std": std}, channels, partial(sibling_key, key))
    stated = {name: written.get(name) for name in ("latents_mean", "latents_std")}
    if any(each is not None for each in stated.values()):
        return _pair(stated, channels, lambda name: where)
    if written.get("scaling_factor") is None:
        what = "states no normalization of the latents (latents_mean and latents_std, or scaling_factor)"
        hint = f"add them to the file, or set {sibling_key(key, 'mean')} and {sibling_key(key, 'std')}"
        raise UserError(what, where=where, hint=hint)
    shift, scale = (_numbers([written.get(name) or 0.0], name, where)[0] for name in ("shift_factor", "scaling_factor"))
    if scale <= 0:
        raise UserError(f"scaling_factor: is {scale}", where=where, hint="set a value above 0")
    return [shift] * channels, [1.0 / scale] * channels


def _pair(values: Mapping[str, Any], channels: int, place: Callable[[str], str]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation, checked; `place` maps the name of each to the file or key to name in errors.

    Raises UserError: one is missing, or is not `channels` numbers.
    """
    for name, other in zip(values, reversed(list(values)), strict=True):
        if values[name] is None:
            hint = f"set both: {channels} numbers each, one per channel"
            raise UserError(f"{name}: is missing, while {other} is set", where=place(name), hint=hint)
    mean, std = (_numbers(value, name, place(name)) for name, value in values.items())
    for name, found, wrong in zip(values, (mean, std), (False, min(std, default=0.0) <= 0), strict=True):
        if len(found) != channels or wrong:
            what = f"{name}: got {found}, expected {channels} numbers" + ", each above 0" * wrong
            raise UserError(what, where=place(name), hint=_ONE_A_CHANNEL)
    return mean, std


_ONE_A_CHANNEL = "set one number per channel of the latents"


def _numbers(values: Any, name: str, where: str) -> list[float]:
    """Return the values of a key as floats. Raises UserError: they are not a list of finite numbers."""
    try:
        if any(isinstance(each, bool | str) for each in values):
            raise ValueError
        found = [float(each) for each in values]
    except (TypeError, ValueError, OverflowError):
        found = [float("nan")]
    if not all(map(isfinite, found)):
        what = f"{name}: expected finite numbers, got {str(values)[:80]}"
        raise UserError(what, where=where, hint=_ONE_A_CHANNEL)
    return found


def padded_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Return the smallest size that contains an image and whose sides are multiples of `multiple`."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def pad_to_multiple(image: Tensor, multiple: int, on_indivisible: OnIndivisible) -> Tensor:
    """Pad images (B, 3, H, W) of any dtype on the right and below until their sides are multiples of `multiple`.

    The padding mirrors the image; if a side is too short for that, its last row or column is repeated. `cut_to` undoes
    it. Raises ValueError: a side is not a multiple, and `on_indivisible` is "refuse".
    """
    height, width = image.shape[-2:]
    padded_height, padded_width = padded_size(height, width, multiple)
    if (padded_height, padded_width) == (height, width):
        return image
    if on_indivisible != "pad":
        raise ValueError(
            f"image: got {width}x{height} pixels, expected multiples of {multiple}; "
            "on_indivisible='pad' mirrors the edges and crops them off again"
        )
    down, right = padded_height - height, padded_width - width
    mode = "reflect" if down < height and right < width else "replicate"
    # torch cannot mirror integer images; float32 represents every uint8 exactly.
    return F.pad(image.float(), (0, right, 0, down), mode=mode).to(image.dtype)


def cut_to(image: Tensor, height: int, width: int) -> Tensor:
    """Crop images to the upper left (…, height, width), which undoes `pad_to_multiple`."""
    return image[..., :height, :width]
