"""What a benchmark of a part runs, and how a setting is read from ``key=value``."""

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from hdm_lightning.benchmarks.parts import Size, size_of
from hdm_lightning.errors import UserError
from hdm_lightning.precision import default_dtype, dtype_name

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class CaseSettings:
    """Settings of one case.

    Attributes:
        size: a name in `parts.SIZES`.
        resolution: side of the images in pixels; 0 takes the size's own.
        batch: samples at once.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (float32 on a CPU, `half_dtype` on CUDA).
        compile: whether the network is compiled.
        checkpointing: whether its activations are recomputed.
        routing_rate: share of image tokens that skip the U.
        context_length: caption tokens.
        mode: of `xut` ``train`` or ``forward``, of `vae` ``encode`` or ``decode``.
        steps: solver steps of `sample`.
        guidance_scale: of `sample`; 1 is none.
        device: ``cpu``, ``cuda``, or ``auto``.
    """

    size: str = "xut_base"
    resolution: int = 0
    batch: int = 1
    dtype: str = "auto"
    compile: bool = False
    checkpointing: bool = False
    routing_rate: float = 0.5
    context_length: int = 256
    mode: str = ""
    steps: int = 20
    guidance_scale: float = 3.0
    device: str = "auto"

    @property
    def parts(self) -> Size:
        """Network and encoders of the size."""
        return size_of(self.size)

    @property
    def side_px(self) -> int:
        """Side of the images."""
        return self.resolution or self.parts.resolution

    @property
    def pixels(self) -> int:
        """Pixels of all images of the batch."""
        return self.batch * self.side_px**2

    @property
    def tokens(self) -> int:
        """Caption tokens of the batch."""
        return self.batch * self.context_length

    @property
    def latent_side(self) -> int:
        """Side of the latents."""
        return self.side_px // 2 ** (len(self.parts.autoencoder["block_out_channels"]) - 1)

    @property
    def torch_device(self) -> torch.device:
        """The device."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of autocast and of the encoders."""
        if self.dtype == "auto":
            return default_dtype(self.torch_device)
        return getattr(torch, self.dtype)

    def checked(self) -> "CaseSettings":
        """These settings, if they can be run.

        Raises:
            UserError: naming the argument and the hint.
        """
        unit = 2 ** (len(self.parts.autoencoder["block_out_channels"]) - 1) * self.parts.network.patch_size
        if self.side_px < unit or self.side_px % unit:
            nearest = max(1, round(self.side_px / unit)) * unit
            raise UserError(
                f"{self.side_px} is not a multiple of {unit}", where="--resolution", hint=f"e.g. --resolution {nearest}"
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UserError(
                f"{self.dtype!r} is no dtype for this", where="--dtype", hint="float32, bfloat16 or float16"
            )
        try:
            device = self.torch_device
        except RuntimeError as error:
            raise UserError(f"{self.device!r} is no device", where="--device", hint="auto, cpu or cuda") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("no CUDA device is visible", where="--device", hint="use --device cpu")
        for name in ("batch", "context_length", "steps"):
            if getattr(self, name) < 1:
                where = "--" + name.replace("_", "-").replace("-length", "")
                raise UserError(f"{getattr(self, name)} is less than 1", where=where, hint="give at least 1")
        if not 0 <= self.routing_rate < 1:
            raise UserError(f"{self.routing_rate} is outside 0 … 1", where="--routing-rate", hint="e.g. 0.5")
        return self

    def changed(self, change: str, *, where: str = "--against") -> "CaseSettings":
        """These settings with one ``key=value`` replaced.

        Raises:
            UserError: the key is unknown or the value of another kind.
        """
        key, equals, text = change.partition("=")
        key = key.strip().replace("-", "_")
        kinds = {field.name: type(field.default) for field in fields(CaseSettings)}
        if not equals or key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean '{close[0]}={text}'?" if close and equals else "give KEY=VALUE, KEY one of "
            hint += "" if close and equals else ", ".join(kinds)
            raise UserError(f"{change!r} changes no setting", where=where, hint=hint)
        try:
            return replace(self, **{key: _read(text.strip(), kinds[key])}).checked()
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{text!r} is no {kinds[key].__name__}", where=where, hint=f"e.g. {key}=…") from error

    def to_json(self) -> dict[str, Any]:
        """Plain values, with what `auto` came to."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **values,
            "resolution": self.side_px,
            "dtype": dtype_name(self.torch_dtype),
            "device": self.torch_device.type,
        }


def _read(text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ValueError(text)
        return text.lower() in _TRUE
    return kind(text)
