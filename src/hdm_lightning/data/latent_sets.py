"""Latents on disk instead of images: the format of a set, and how a latent is stored and cropped.

The whole image, resized so that its short side is the set's resolution, is encoded once; a shifted crop is then cut
from the latent grid. The long side, rounded to the nearest pixel, is cut to whole cells at its right or lower end; the
crop numbers still refer to the resized image before that.

Shapes: M moments, C latent channels, f pixels per cell, h×w cells of a grid.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hdm_lightning.data.crops import Crop, CropRules, Shape, covering_size
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.randomness import Draws
from hdm_lightning.data.sample_table import LATENT
from hdm_lightning.errors import UserError

MEAN, STD = MOMENTS = ("mean", "std")
Moments = NDArray[np.float16]
"""float16 (M,C,h,w): mean and, if M is 2, standard deviation of the posterior, not normalized."""


@dataclass(frozen=True)
class LatentFormat:
    """The common format of the samples in a set of latents.

    Attributes:
        resolution: short side in pixels of the encoded images.
        factor: pixels per latent cell along one side.
        channels: number of latent channels.
        autoencoder: fingerprint of the autoencoder.
        name: name of the autoencoder for messages; ignored when formats are compared.
        moments: M: 1 for the mean, which is all that training uses, 2 for mean and standard deviation.
    """

    resolution: int
    factor: int
    channels: int
    autoencoder: str
    name: str = field(compare=False)
    moments: int = 2

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "LatentFormat":
        """Return the format from plain values. Raises ValueError, KeyError, TypeError: they do not describe one."""
        values = {each.name: plain[each.name] for each in fields(cls)}
        for name in ("resolution", "factor", "channels", "moments"):
            if type(values[name]) is not int or values[name] < 1 or (name == "moments" and values[name] > 2):
                raise ValueError(f"{name} cannot be {values[name]!r}")
        return cls(**{**values, "autoencoder": str(values["autoencoder"]), "name": str(values["name"])})

    def to_json(self) -> dict[str, Any]:
        """Return the format as plain values."""
        return asdict(self)

    def whole(self, height: int, width: int) -> Crop:
        """Return the encoded part of an original of this upright size: all whole cells of the resized image."""
        full_height, full_width = covering_size(height, width, self.resolution, self.resolution)
        height, width = (side // self.factor * self.factor for side in (full_height, full_width))
        return Crop(0, 0, full_height, full_width, height, width)

    def grid(self, height: int, width: int) -> Shape:
        """Return rows and columns of the latent grid of an image of this size in pixels."""
        return height // self.factor, width // self.factor

    def cut(self, members: Mapping[str, bytes], rules: CropRules, shape: Shape, draws: Draws) -> tuple[Moments, Crop]:
        """Return the moments of a crop of a stored sample, as a view, and the crop.

        Raises:
            SampleFault: there is no latent, it does not have this format, or the rules reject its original.
        """
        (height, width), moments = unpack_latent(members.get(LATENT, b""))
        if moments is None:
            raise SampleFault("no latent: the image could not be encoded")
        crop = rules.choose(height, width, shape, draws, grid=self.factor)
        whole = self.whole(height, width)
        wanted = (self.moments, self.channels, *self.grid(whole.height, whole.width))
        if moments.shape != wanted:
            raise SampleFault(f"damaged latent: its shape is {moments.shape}, expected {wanted}")
        (top, left), (rows, columns) = self.grid(crop.top, crop.left), self.grid(crop.height, crop.width)
        return moments[:, :, top : top + rows, left : left + columns], crop

    def masked(self, shape: Shape) -> Moments:
        """Return zeros as the placeholder for a crop of this shape in pixels."""
        return np.zeros((self.moments, self.channels, *self.grid(*shape)), dtype=np.float16)

    def check(self, crop: CropRules, resolution: int) -> None:
        """Check that a stream can be cropped from these latents. Raises UserError: it cannot; names the key."""
        if resolution != self.resolution:
            raise UserError(
                f"these are latents of images at {self.resolution} px, but the stream needs {resolution} px",
                where="data.resolution",
                hint="name the --out folder of `hdm-shards encode`, with a set at that resolution",
            )
        if crop.flip:
            raise UserError(
                "a latent cannot be mirrored: it is not the latent of the mirrored image",
                where="data.crop.flip",
                hint="set data.crop.flip=false, or train on the images",
            )
        if crop.buckets is not None:
            raise UserError(
                "latents are of images resized for square crops, not for the shapes of buckets",
                where="data.crop.buckets",
                hint="set data.crop.buckets=null, or train on the images",
            )


def pack_latent(height: int, width: int, moments: NDArray[np.floating[Any]] | None) -> bytes:
    """Pack a sample's member: the upright size of its original, and any moments (M,C,h,w) in half precision."""
    tensors: dict[str, NDArray[Any]] = {"original_size": np.array([height, width], dtype=np.int32)}
    if moments is not None:
        half = moments.astype(np.float16)
        tensors |= {name: np.ascontiguousarray(each) for name, each in zip(MOMENTS, half, strict=False)}
    return save(tensors)


def unpack_latent(data: bytes) -> tuple[Shape, Moments | None]:
    """Return height and width of the original, and the moments, None if it could not be encoded.

    Raises:
        SampleFault: the bytes are not such a member.
    """
    if not data:
        raise SampleFault("no latent")
    try:
        tensors = load(data)
        height, width = tensors["original_size"].tolist()
        moments = np.stack([tensors[name] for name in MOMENTS if name in tensors]) if MEAN in tensors else None
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise SampleFault(f"damaged latent: {error}") from error
    if moments is not None and (moments.dtype != np.float16 or min(height, width) < 1):
        raise SampleFault(f"damaged latent: {moments.dtype}, of an image of {width}x{height} pixels")
    return (height, width), moments
