"""Parts of a training step at full size with random weights, as calls to time; nothing is downloaded.

Shapes: B samples, C latent channels, h×w latent grid, N image tokens, L text tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hdm_lightning.data.caption_lengths import padded_lengths
from hdm_lightning.encoders.autoencoder import MAX_PIXELS, KLAutoencoder
from hdm_lightning.encoders.text import MAX_TOKENS, TransformersTextEncoder
from hdm_lightning.errors import UserError, did_you_mean
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.routing import random_keep
from hdm_lightning.precision import default_dtype, dtype_name
from hdm_lightning.profiling import system
from hdm_lightning.profiling.bench_settings import CaseSettings
from hdm_lightning.profiling.encoder_costs import (
    GEMMA3_1B,
    GEMMA3_270M,
    QWEN3_0_6B,
    SDXL_AUTOENCODER,
    TINY_AUTOENCODER,
    TINY_TEXT,
    AutoencoderArchitecture,
    TextArchitecture,
)
from hdm_lightning.profiling.gpus import find_gpu
from hdm_lightning.profiling.live_memory import LiveMemory
from hdm_lightning.profiling.operations import Operations, Workload, forward_flops, network_operations
from hdm_lightning.profiling.padding import even_lengths
from hdm_lightning.profiling.system import chosen_device
from hdm_lightning.profiling.timing import Call, Timing, measurement, wait_for

_TINY = XUTConfig(
    width=64, mlp_width=192, heads=2, head_dim=32, context_width=32, depth=2, decoder_blocks=1, blocks_after=1
)


class Size(NamedTuple):
    """A network and the encoders that it is trained with."""

    network: XUTConfig
    text: Mapping[str, Any]  # a transformers configuration
    autoencoder: Mapping[str, Any]  # a diffusers AutoencoderKL configuration
    resolution: int = 256  # default side of the images


SIZES: Mapping[str, Size] = {
    "tiny": Size(_TINY, TINY_TEXT, TINY_AUTOENCODER, resolution=64),
    "xut_small": Size(XUTConfig.preset("xut_small"), GEMMA3_270M, SDXL_AUTOENCODER),
    "xut_base": Size(XUTConfig.preset("xut_base"), QWEN3_0_6B, SDXL_AUTOENCODER),
    "xut_large": Size(XUTConfig.preset("xut_large"), GEMMA3_1B, SDXL_AUTOENCODER),
}
"""The sizes of arXiv 2509.06068, table 1, with their text encoders, and one for quick runs."""


def size_of(name: str) -> Size:
    """Return a size by name. Raises UserError: it does not exist."""
    if name not in SIZES:
        raise UserError(f"there is no size {name!r}", where="--size", hint=did_you_mean(name, SIZES))
    return SIZES[name]


def random_network(config: XUTConfig, *, seed: int = 0) -> XUT:
    """Return a network without zero-initialized layers, so that every part has an effect."""
    with _seeded(seed):
        network = XUT(config)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return network


def random_text_encoder(
    config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, max_tokens: int = MAX_TOKENS
) -> TransformersTextEncoder:
    """Return a frozen language model with this configuration."""
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415 (seconds to import)

    with _seeded(0):
        model = AutoModel.from_config(AutoConfig.for_model(**config), dtype=dtype)
    return TransformersTextEncoder(model, max_tokens=max_tokens)


def random_autoencoder(
    config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, max_pixels: int = MAX_PIXELS
) -> KLAutoencoder:
    """Return a frozen autoencoder with this configuration, without latent normalization."""
    from diffusers import AutoencoderKL  # noqa: PLC0415 (seconds to import)

    with _seeded(0):
        model: Any = AutoencoderKL(**config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    channels = int(config["latent_channels"])
    return KLAutoencoder(model, [0.0] * channels, [1.0] * channels, max_pixels=max_pixels)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the random numbers within a block, and restore their state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Captions(NamedTuple):
    """The captions of a micro-batch."""

    lengths: tuple[int, ...]  # tokens of each, without padding
    padded: int  # tokens of each, with padding


@dataclass(frozen=True)
class Setup:
    """Settings of one case, and values derived from them."""

    settings: CaseSettings
    parts: Size
    device: torch.device
    dtype: torch.dtype  # of autocast and of the encoders
    side_px: int  # of the images
    latent_side: int

    @classmethod
    def of(cls, settings: CaseSettings) -> "Setup":
        """Resolve and check the settings. Raises UserError: names the argument."""
        parts, device = size_of(settings.size), chosen_device(settings.device)
        factor = AutoencoderArchitecture.from_config(parts.autoencoder).factor
        unit, side = factor * parts.network.patch_size, settings.resolution or parts.resolution
        if side < unit or side % unit:
            hint = f"e.g. --resolution {max(1, round(side / unit)) * unit}"
            raise UserError(f"{side} is not a multiple of {unit}", where="--resolution", hint=hint)
        dtype = default_dtype(device) if settings.dtype == "auto" else getattr(torch, settings.dtype)
        return cls(settings, parts, device, dtype, side, side // factor)

    def work(self, text: int) -> Workload:
        """Return the tokens of one sample with `text` caption tokens."""
        side, rate = self.latent_side, self.settings.routing_rate
        return Workload.of(self.parts.network, side, side, text, rate=rate)

    def operations(self, text: int) -> Operations:
        """Return the network's operations for one training sample with `text` caption tokens."""
        return network_operations(self.parts.network, self.work(text), recompute=self.settings.checkpointing)

    @cached_property
    def micro_batches(self) -> tuple[Captions, ...]:
        """The captions of each micro-batch of a call, grouped as in training on a GPU."""
        settings, count = self.settings, self.settings.accumulation
        if not settings.caption_tokens:
            return (Captions((settings.context_length,) * settings.batch, settings.context_length),) * count
        lengths = even_lengths(settings.caption_tokens, settings.context_length, settings.batch * count)[::-1]
        rising = padded_lengths("bucketed", settings.context_length, accelerated=True)
        groups = [tuple(lengths[first : first + settings.batch]) for first in range(0, len(lengths), settings.batch)]
        return tuple(Captions(group, next(each for each in rising if each >= group[0])) for group in groups)

    def model_flops(self, text: int) -> int:
        """Return the operations that MFU counts for one training sample with `text` caption tokens."""
        return self.operations(text).model

    @property
    def samples(self) -> int:
        """Samples per call."""
        return self.settings.batch * self.settings.accumulation

    def fed(self, flops: Callable[[int], int]) -> int:
        """Return the operations of a call, given those of a sample by its padded tokens."""
        return sum(len(each.lengths) * flops(each.padded) for each in self.micro_batches)

    def useful(self, flops: Callable[[int], int]) -> int:
        """Return the operations of a call without padding."""
        return sum(flops(length) for each in self.micro_batches for length in each.lengths)

    @property
    def text_cost(self) -> TextArchitecture:
        """Cost model of the text encoder."""
        return TextArchitecture.from_config(self.parts.text)

    @property
    def autoencoder_cost(self) -> AutoencoderArchitecture:
        """Cost model of the autoencoder."""
        return AutoencoderArchitecture.from_config(self.parts.autoencoder)

    @property
    def autocast(self) -> torch.autocast:
        """Autocast to the dtype; off for float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def text_encoder(self) -> TransformersTextEncoder:
        """Return the text encoder, which encodes all captions of a batch at once."""
        most = self.settings.batch * self.settings.context_length
        return random_text_encoder(self.parts.text, dtype=self.dtype, max_tokens=most).to(self.device)

    def autoencoder(self) -> KLAutoencoder:
        """Return the autoencoder, which encodes all images of a batch at once."""
        most = self.settings.batch * self.side_px**2
        return random_autoencoder(self.parts.autoencoder, dtype=self.dtype, max_pixels=most).to(self.device)

    def mode(self, *known: str) -> str:
        """Return the mode, by default the first of these. Raises UserError: it is not one of them."""
        mode = self.settings.mode or known[0]
        if mode not in known:
            raise UserError(f"there is no mode {mode!r}", where="--mode", hint=did_you_mean(mode, known))
        return mode

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with `auto` resolved."""
        came_to = {"resolution": self.side_px, "dtype": dtype_name(self.dtype), "device": self.device.type}
        return {**asdict(self.settings), **came_to}


@dataclass(frozen=True)
class Case:
    """A call to time."""

    name: str  # name in reports
    call: Call  # runs it once
    samples: int  # images or captions per call
    flops: float  # operations per call
    model_flops: float  # those that MFU counts, without padding
    held: Callable[[], Iterable[Tensor]]  # tensors kept between calls
    values: Callable[[], Mapping[str, Any]] = field(default=dict)  # further figures, read after timing


def autoencoder_case(setup: Setup) -> Case:
    """Return the case of encoding or decoding images, without gradients. Raises UserError: unknown mode."""
    mode, batch, side, cells = setup.mode("encode", "decode"), setup.settings.batch, setup.side_px, setup.latent_side
    autoencoder, cost = setup.autoencoder(), setup.autoencoder_cost
    pixels, latent = (batch, 3, side, side), (batch, cost.latent_channels, cells, cells)
    given = torch.rand(pixels if mode == "encode" else latent, device=setup.device) * 2 - 1
    call, count = (
        (autoencoder.encode, cost.encode_flops) if mode == "encode" else (autoencoder.decode, cost.decode_flops)
    )
    flops = batch * count(side, side)
    return Case(f"vae {mode}", lambda: call(given), batch, flops, flops, lambda: tensors(autoencoder.model))


def text_case(setup: Setup) -> Case:
    """Return the case of encoding captions."""
    encoder, vocabulary = setup.text_encoder(), int(setup.parts.text["vocab_size"])
    given = [
        (torch.randint(0, vocabulary, (len(lengths), padded), device=setup.device), torch.tensor(lengths))
        for lengths, padded in setup.micro_batches
    ]

    def call() -> None:
        for tokens, lengths in given:
            encoder.encode(tokens, lengths)

    fed, useful = setup.fed(setup.text_cost.flops), setup.useful(setup.text_cost.flops)
    return Case("text", call, setup.samples, fed, useful, lambda: tensors(encoder.model))


def network_case(setup: Setup, prepare: Callable[..., None]) -> Case:
    """Return the case of the network on random latents; `prepare` is `training.strategies.prepare_network`."""
    mode, settings = setup.mode("train", "forward"), setup.settings
    network = random_network(setup.parts.network).to(setup.device)
    recomputed = settings.checkpointing and mode == "train"
    prepare(network, activation_checkpointing=recomputed, compiled=settings.compile)
    given = [_network_inputs(setup, each) for each in setup.micro_batches]

    def forward() -> None:
        for inputs in given:
            with torch.no_grad(), setup.autocast:
                network(**inputs)

    def train() -> None:
        for inputs in given:
            with setup.autocast:
                loss = network(**inputs).float().square().mean()
            loss.backward()
        network.zero_grad(set_to_none=True)

    if mode == "train":
        fed, useful = setup.fed(lambda text: setup.operations(text).network), setup.useful(setup.model_flops)
        return Case("xut train", train, setup.samples, fed, useful, lambda: tensors(network))

    def flops(text: int) -> int:
        return setup.operations(text).forward

    return Case("xut forward", forward, setup.samples, setup.fed(flops), setup.useful(flops), lambda: tensors(network))


def _network_inputs(setup: Setup, captions: Captions) -> dict[str, Tensor | None]:
    """Return a random micro-batch for the network."""
    config, device, side, rate = setup.parts.network, setup.device, setup.latent_side, setup.settings.routing_rate
    work, batch = setup.work(captions.padded), len(captions.lengths)
    return {
        "latent": torch.randn(batch, config.channels, side, side, device=device),
        "t": torch.rand(batch, device=device),
        "context": torch.randn(batch, work.text, config.context_width, device=device),
        "context_lengths": torch.tensor(captions.lengths, device=device),
        "token_positions": torch.randn(batch, work.image, 2, device=device),
        "keep": random_keep(batch, work.image, rate, device=device) if rate else None,
    }


def sampling_flops(setup: Setup) -> int:
    """Return the operations per image: text encoder, solver steps (twice the network with guidance), decoding."""
    settings, branches = setup.settings, 1 if setup.settings.guidance_scale == 1.0 else 2
    work = Workload.of(setup.parts.network, setup.latent_side, setup.latent_side, settings.context_length)
    network = sum(forward_flops(setup.parts.network, work).values()) * settings.steps
    decode = setup.autoencoder_cost.decode_flops(setup.side_px, setup.side_px)
    return branches * (network + setup.text_cost.flops(settings.context_length)) + decode


class RandomTokens:
    """Stand-in for a tokenizer: every prompt fills the context."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.context_length = vocabulary, length

    def bind(self, context_length: int) -> "RandomTokens":
        """Return self: the length is fixed."""
        return self

    def __call__(self, caption: str) -> tuple[list[int], int]:
        """Return random ids, the same for captions of equal length."""
        generator = torch.Generator().manual_seed(len(caption))
        ids = torch.randint(0, self.vocabulary, (self.context_length,), generator=generator)
        return ids.tolist(), self.context_length


def measured(
    case: Case, timing: Timing, setup: Setup, *, label: str = "", beside: Iterable[Case] = ()
) -> dict[str, Any]:
    """Return a case's timing, rate and peak memory, without the tensors held by the cases `beside` it."""
    return measurement(
        f"{case.name}, {label}" if label else case.name,
        timing,
        samples=case.samples,
        flops=case.flops,
        model_flops=case.model_flops,
        peak_flops=_peak_flops(setup),
        peak_bytes=peak_bytes(case, setup.device, compiled=setup.settings.compile, beside=beside),
        **case.values(),
    )


def peak_bytes(case: Case, device: torch.device, *, compiled: bool = False, beside: Iterable[Case] = ()) -> int:
    """Return the peak bytes on the device during one call; 0 if not measurable (compiled code on a CPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        case.call()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - sum(_held_bytes(other) for other in beside)
    if compiled:
        return 0
    memory = LiveMemory()
    memory.hold(*case.held())
    with memory:
        case.call()
    return memory.peak_bytes


def _held_bytes(case: Case) -> int:
    memory = LiveMemory()
    memory.hold(*case.held())
    return memory.bytes


def tensors(*modules: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers."""
    return [each for module in modules for each in (*module.parameters(), *module.buffers())]


def _peak_flops(setup: Setup) -> float:
    """Return the data-sheet rate of a GPU (0 if not in the table), or the rate of a large matrix product on a CPU."""
    if setup.device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name(setup.device))
        return 0.0 if gpu is None else gpu.peak_tflops * 1e12
    timing, _ = system.matmul(setup.device, setup.dtype, system.CPU_MATMUL, repeats=5)
    return 2 * system.CPU_MATMUL**3 / timing.best
