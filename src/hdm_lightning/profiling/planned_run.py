"""The run to plan, as plain values: network, encoders, data and stages."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from annotated_types import Gt

from hdm_lightning.data.caption_lengths import padded_lengths
from hdm_lightning.encoders.autoencoder import MAX_PIXELS
from hdm_lightning.encoders.text import MAX_TOKENS
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUTConfig
from hdm_lightning.profiling.encoder_costs import AutoencoderArchitecture, TextArchitecture
from hdm_lightning.profiling.operations import (
    BLOCKS,
    TRAINING_FACTOR,
    AdapterCost,
    Operations,
    Workload,
    adapter_operations,
    forward_flops,
    network_operations,
    network_parts,
    parameter_count,
)
from hdm_lightning.profiling.padding import even_lengths, padded_shares

WHOLE_IMAGE = 1.3
"""Approximate ratio of the area of a whole resized image to that of its square crop."""
LENGTHS = 64
"""Number of evenly spaced caption lengths that represent all captions."""
HEADERS = 3000
"""Approximate bytes of a stored latent besides its moments: headers, caption, record."""


@dataclass(frozen=True)
class StageRecipe:
    """One stage; sizes in pixels, progress in samples."""

    name: str
    resolution: int  # side of the square crop
    samples: int  # samples seen, all devices together
    batch_size: int  # samples per optimizer step, all devices together
    micro_batch_size: int  # samples per device and micro-batch
    routing_rate: float = 0.0  # share of image tokens that skip the U
    context_length: int = 256  # caption tokens
    # whether the blocks' activations are recomputed; `selective`: all but attention
    checkpointing: bool | Literal["selective"] = False
    warmup_samples: int = 0  # warm-up samples
    cached: bool = False  # whether it reads latents from disk, so no image is decoded or encoded
    text_stored: bool = False  # whether it reads text states from disk, so no caption is encoded
    accumulation: int = 1  # micro-batches per step on one device, grouped by caption length

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return -(-self.samples // self.batch_size)


@dataclass
class Dataset:
    """The training set, as far as it affects disks and decoders."""

    images: Annotated[int, Gt(0)] = 8_469_000  # number of distinct images
    image_kb: Annotated[float, Gt(0)] = 250.0  # mean size of an image file with its caption, 10^3 bytes
    image_mpx: Annotated[float, Gt(0)] = 2.0  # mean size of an image in megapixels
    latents: bool = False  # whether all stages read latents from disk (hdm-shards encode)
    # caption tokens: the mean, or evenly spaced quantiles from shortest to longest; None fills the context
    caption_tokens: Any = None

    def __post_init__(self) -> None:
        """Raise UserError if the caption lengths are neither a mean nor quantiles."""
        given = self.caption_tokens
        numbers = given if isinstance(given, list | tuple) else [given]
        fine = all(isinstance(each, int | float) and each >= 1 for each in numbers) and list(numbers) == sorted(numbers)
        if given is not None and not (fine and (numbers is not given or len(given) > 1)):
            hint = "use a mean of 1 or more, or ascending quantiles, e.g. [8,40,64,96,256]"
            raise UserError(f"is {given}", where="dataset.caption_tokens", hint=hint)


@dataclass(frozen=True)
class Recipe:
    """A whole schedule."""

    network: XUTConfig
    stages: tuple[StageRecipe, ...]
    text: TextArchitecture
    autoencoder: AutoencoderArchitecture
    dataset: Dataset = field(default_factory=Dataset)
    text_lengths: Any = "padded"  # lengths to pad captions to; see `data.caption_lengths`
    text_max_tokens: int = MAX_TOKENS  # tokens encoded at once, but at least one caption
    autoencoder_max_pixels: int = MAX_PIXELS  # pixels encoded at once, but at least one image
    averages: int = 1  # number of weight averages
    muon: bool = False  # whether Muon (one moment) trains the blocks' matrices and AdamW (two moments) the rest
    compiled: bool = True  # whether the network is compiled
    half_gradients: bool = False  # whether gradients are exchanged in bfloat16
    moment_bytes: float = 4.0  # bytes per element of a moment: 4, or slightly more than 1 with 8-bit moments
    sharded: bool = False  # whether weights, gradients, moments and averages are split over the devices (FSDP2)
    mixed: bool = True  # whether bfloat16 autocast is used with float32 weights; otherwise all is float32
    checkpoints_kept: int = 2  # per stage
    overlapped: bool = False  # whether a micro-batch is encoded while the network processes the previous one
    adapter: AdapterCost | None = None  # adapter trained beside the frozen network; None trains the whole network

    @property
    def parameters(self) -> int:
        """Number of parameters of the network and its adapter."""
        return parameter_count(self.network) + (self.adapter.trained if self.adapter else 0)

    @property
    def trained(self) -> int:
        """Number of parameters with gradients, moments and averages, which are saved."""
        return self.adapter.trained if self.adapter else self.parameters

    @property
    def moments(self) -> int:
        """Number of values in the optimizer's state."""
        if self.adapter is not None:
            blocks = sum(self.adapter.parameters.get(name, 0) for name in BLOCKS)
        else:
            parts = network_parts(self.network)
            blocks = sum(parts[name].parameters for name in BLOCKS)  # a block is nearly all matrices
        return 2 * self.trained - (blocks if self.muon else 0)

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation."""
        return 2 if self.mixed else 4

    def work(self, stage: StageRecipe) -> Workload:
        """Return the tokens of one sample of a stage.

        Raises:
            ValueError: the resolution is not a multiple of autoencoder factor × patch.
        """
        side, rest = divmod(stage.resolution, self.autoencoder.factor)
        if rest:
            raise ValueError(f"resolution is {stage.resolution}; expected a multiple of {self.autoencoder.factor}")
        return Workload.of(self.network, side, side, stage.context_length, rate=stage.routing_rate)

    def padded(self, stage: StageRecipe) -> list[tuple[float, StageRecipe]]:
        """Return shares of a stage's samples, each with a copy of the stage whose context is their padded length."""
        lengths = padded_lengths(self.text_lengths, stage.context_length, accelerated=True)
        if self.dataset.caption_tokens is None or not lengths:
            return [(1.0, stage)]
        shares = padded_shares(self.dataset.caption_tokens, lengths, stage.micro_batch_size, stage.accumulation)
        return [(share, replace(stage, context_length=length)) for length, share in shares.items()]

    def operations(self, stage: StageRecipe, *, fused_attention: bool = True) -> Operations:
        """Return the mean operations per sample of a stage, with padded captions."""
        parts = [(share, self._operations(each, fused_attention)) for share, each in self.padded(stage)]
        if len(parts) == 1:
            return parts[0][1]
        names = [entry.name for entry in fields(Operations)]
        return Operations(**{name: round(sum(share * getattr(one, name) for share, one in parts)) for name in names})

    def true_lengths(self, stage: StageRecipe) -> list[int]:
        """Return unpadded caption lengths of a stage, evenly spaced over their distribution."""
        captions = self.dataset.caption_tokens
        return [stage.context_length] if captions is None else even_lengths(captions, stage.context_length)

    def useful_flops(self, stage: StageRecipe) -> float:
        """Return the mean model FLOPs per sample in the network without padding, as counted by MFU."""
        works = [self.work(replace(stage, context_length=length)) for length in self.true_lengths(stage)]
        if self.adapter is not None:
            plain = [
                adapter_operations(self.network, work, self.adapter, recompute=False, fused_attention=False)
                for work in works
            ]
            return sum(each.network for each in plain) / len(plain)
        flops = (TRAINING_FACTOR * sum(forward_flops(self.network, work).values()) for work in works)
        return sum(flops) / len(works)

    def encoded_resolutions(self) -> list[int]:
        """Return the resolutions at which every image is encoded before training."""
        return sorted({stage.resolution for stage in self.stages if stage.cached})

    def _operations(self, stage: StageRecipe, fused_attention: bool) -> Operations:
        work, side = self.work(stage), stage.resolution
        how: dict[str, Any] = {"recompute": stage.checkpointing, "fused_attention": fused_attention}
        if self.adapter is None:
            network = network_operations(self.network, work, **how)
        else:
            network = adapter_operations(self.network, work, self.adapter, **how)
        encode = 0 if stage.cached else self.autoencoder.encode_flops(side, side)
        text = 0 if stage.text_stored else self.text.flops(stage.context_length)
        return replace(network, autoencoder=encode, text=text)

    def stored_lengths(self) -> list[int]:
        """Return the tokens of the captions to encode before training, per `LENGTHS` images.

        Each caption is encoded once per context length of the stages that read states, unless two truncate it alike.
        """
        contexts = sorted({stage.context_length for stage in self.stages if stage.text_stored})
        captions = self.dataset.caption_tokens
        cut = [[each] * LENGTHS if captions is None else even_lengths(captions, each, LENGTHS) for each in contexts]
        before = [[0] * LENGTHS, *cut]
        pairs = (zip(*each, strict=True) for each in zip(cut, before, strict=False))
        return [new for pair in pairs for new, old in pair if new != old]

    def state_kb(self, tokens: float) -> float:
        """Return the size of the stored states of `tokens` tokens, 10^3 bytes."""
        return tokens * self.text.width * self.element_bytes / 1e3

    def sample_kb(self, stage: StageRecipe) -> float:
        """Return the size read from disk per sample, 10^3 bytes."""
        image = self.latent_kb(stage.resolution) if stage.cached else self.dataset.image_kb
        lengths = self.true_lengths(stage)
        return image + (self.state_kb(sum(lengths) / len(lengths)) if stage.text_stored else 0)

    def latent_kb(self, resolution: int) -> float:
        """Return the size of a stored latent, with the means in half precision, 10^3 bytes."""
        return (2 * WHOLE_IMAGE * self.autoencoder.latent_values(resolution, resolution) + HEADERS) / 1e3

    def captions_at_once(self, stage: StageRecipe) -> int:
        """Return how many captions as long as a stage's context the text encoder processes at once."""
        return max(1, self.text_max_tokens // stage.context_length)

    def images_at_once(self, stage: StageRecipe) -> int:
        """Return how many images of a stage the autoencoder processes at once."""
        return max(1, self.autoencoder_max_pixels // stage.resolution**2)

    def with_samples(self, samples: Iterator[int]) -> "Recipe":
        """Return a copy with other sample counts for the stages."""
        stages = tuple(replace(stage, samples=count) for stage, count in zip(self.stages, samples, strict=True))
        return replace(self, stages=stages)
