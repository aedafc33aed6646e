"""Parts of a training step at their true sizes, with random weights, as calls to be timed; nothing is downloaded.

Shapes: B samples, C latent channels, h×w latent grid, N image tokens, L text tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
from hdm_lightning.profiling.system import chosen_device
from hdm_lightning.profiling.timing import Call, Timing, measurement, wait_for

_TINY = XUTConfig(
    width=64, mlp_width=192, heads=2, head_dim=32, context_width=32, depth=2, decoder_blocks=1, blocks_after=1
)


class Size(NamedTuple):
    """A network with the encoders it is trained with."""

    network: XUTConfig
    text: Mapping[str, Any]  # a transformers configuration
    autoencoder: Mapping[str, Any]  # a diffusers AutoencoderKL configuration
    resolution: int = 256  # of the images, where none is asked for


SIZES: Mapping[str, Size] = {
    "tiny": Size(_TINY, TINY_TEXT, TINY_AUTOENCODER, resolution=64),
    "xut_small": Size(XUTConfig.preset("xut_small"), GEMMA3_270M, SDXL_AUTOENCODER),
    "xut_base": Size(XUTConfig.preset("xut_base"), QWEN3_0_6B, SDXL_AUTOENCODER),
    "xut_large": Size(XUTConfig.preset("xut_large"), GEMMA3_1B, SDXL_AUTOENCODER),
}
"""The sizes of arXiv 2509.06068, table 1, with their text encoders, and one for quick runs."""


def size_of(name: str) -> Size:
    """The size of that name. Raises UserError: there is none."""
    if name not in SIZES:
        raise UserError(f"no size is called {name!r}", where="--size", hint=did_you_mean(name, SIZES))
    return SIZES[name]


def random_network(config: XUTConfig, *, seed: int = 0) -> XUT:
    """A network in which every part does its work: the zero-initialised outputs are filled as well."""
    with _seeded(seed):
        network = XUT(config)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return network


def random_text_encoder(
    config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, max_tokens: int = MAX_TOKENS
) -> TransformersTextEncoder:
    """A frozen language model of this configuration."""
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415 (seconds to import)

    with _seeded(0):
        model = AutoModel.from_config(AutoConfig.for_model(**config), dtype=dtype)
    return TransformersTextEncoder(model, max_tokens=max_tokens)


def random_autoencoder(
    config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, max_pixels: int = MAX_PIXELS
) -> KLAutoencoder:
    """A frozen autoencoder of this configuration, its latents not normalised."""
    from diffusers import AutoencoderKL  # noqa: PLC0415 (seconds to import)

    with _seeded(0):
        model: Any = AutoencoderKL(**config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    channels = int(config["latent_channels"])
    return KLAutoencoder(model, [0.0] * channels, [1.0] * channels, max_pixels=max_pixels)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of a seed inside, those of before again outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Setup:
    """Settings of one case, and what they come to."""

    settings: CaseSettings
    parts: Size
    device: torch.device
    dtype: torch.dtype  # of autocast and of the encoders
    side_px: int  # of the images
    latent_side: int

    @classmethod
    def of(cls, settings: CaseSettings) -> "Setup":
        """The settings, if they can be run. Raises UserError: naming the argument and the hint."""
        parts, device = size_of(settings.size), chosen_device(settings.device)
        factor = AutoencoderArchitecture.from_config(parts.autoencoder).factor
        unit, side = factor * parts.network.patch_size, settings.resolution or parts.resolution
        if side < unit or side % unit:
            hint = f"e.g. --resolution {max(1, round(side / unit)) * unit}"
            raise UserError(f"{side} is not a multiple of {unit}", where="--resolution", hint=hint)
        dtype = default_dtype(device) if settings.dtype == "auto" else getattr(torch, settings.dtype)
        return cls(settings, parts, device, dtype, side, side // factor)

    @property
    def work(self) -> Workload:
        """Tokens of one sample."""
        side, settings = self.latent_side, self.settings
        return Workload.of(self.parts.network, side, side, settings.context_length, rate=settings.routing_rate)

    @property
    def operations(self) -> Operations:
        """Of the network with one training sample."""
        return network_operations(self.parts.network, self.work, recompute=self.settings.checkpointing)

    @property
    def text_cost(self) -> TextArchitecture:
        """What the text encoder costs."""
        return TextArchitecture.from_config(self.parts.text)

    @property
    def autoencoder_cost(self) -> AutoencoderArchitecture:
        """What the autoencoder costs."""
        return AutoencoderArchitecture.from_config(self.parts.autoencoder)

    @property
    def autocast(self) -> torch.autocast:
        """Autocast to the dtype; off for float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def text_encoder(self) -> TransformersTextEncoder:
        """The text encoder, which takes all captions of the batch at once."""
        most = self.settings.batch * self.settings.context_length
        return random_text_encoder(self.parts.text, dtype=self.dtype, max_tokens=most).to(self.device)

    def autoencoder(self) -> KLAutoencoder:
        """The autoencoder, which takes all images of the batch at once."""
        most = self.settings.batch * self.side_px**2
        return random_autoencoder(self.parts.autoencoder, dtype=self.dtype, max_pixels=most).to(self.device)

    def mode(self, *known: str) -> str:
        """The mode, which is one of these; the first where none is given. Raises UserError: it is none of them."""
        mode = self.settings.mode or known[0]
        if mode not in known:
            raise UserError(f"there is no mode {mode!r}", where="--mode", hint=did_you_mean(mode, known))
        return mode

    def to_json(self) -> dict[str, Any]:
        """Plain values, with what `auto` came to."""
        came_to = {"resolution": self.side_px, "dtype": dtype_name(self.dtype), "device": self.device.type}
        return {**asdict(self.settings), **came_to}


@dataclass(frozen=True)
class Case:
    """Something to time."""

    name: str  # what it is
    call: Call  # does it once
    samples: int  # images or captions of one call
    flops: float  # operations of one call
    model_flops: float  # those of them that MFU counts
    held: Callable[[], Iterable[Tensor]]  # tensors that stay between calls
    values: Callable[[], Mapping[str, Any]] = field(default=dict)  # further figures, read after timing


def autoencoder_case(setup: Setup) -> Case:
    """Encoding or decoding a batch of images, without gradients. Raises UserError: the mode is neither."""
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
    """Encoding a batch of captions that fill the context."""
    batch, length, encoder = setup.settings.batch, setup.settings.context_length, setup.text_encoder()
    tokens = torch.randint(0, int(setup.parts.text["vocab_size"]), (batch, length), device=setup.device)
    lengths, flops = torch.full((batch,), length), batch * setup.text_cost.flops(length)
    return Case("text", lambda: encoder.encode(tokens, lengths), batch, flops, flops, lambda: tensors(encoder.model))


def network_case(setup: Setup, prepare: Callable[[XUT, bool, bool], None]) -> Case:
    """The network on random latents, made ready by `prepare` (network, checkpointing, compilation) as in training."""
    mode, config, settings = setup.mode("train", "forward"), setup.parts.network, setup.settings
    batch, device, work, side = settings.batch, setup.device, setup.work, setup.latent_side
    network = random_network(config).to(device)
    prepare(network, settings.checkpointing and mode == "train", settings.compile)
    inputs = {
        "latent": torch.randn(batch, config.channels, side, side, device=device),
        "t": torch.rand(batch, device=device),
        "context": torch.randn(batch, work.text, config.context_width, device=device),
        "context_lengths": torch.full((batch,), work.text, device=device),
        "token_positions": torch.randn(batch, work.image, 2, device=device),
        "keep": random_keep(batch, work.image, settings.routing_rate, device=device) if settings.routing_rate else None,
    }

    def forward() -> None:
        with torch.no_grad(), setup.autocast:
            network(**inputs)

    def train() -> None:
        with setup.autocast:
            loss = network(**inputs).float().square().mean()
        loss.backward()
        network.zero_grad(set_to_none=True)

    count = setup.operations
    if mode == "train":
        return Case("xut train", train, batch, batch * count.network, batch * count.model, lambda: tensors(network))
    flops = batch * count.forward
    return Case("xut forward", forward, batch, flops, flops, lambda: tensors(network))


def sampling_flops(setup: Setup) -> int:
    """Operations of one image: text, solver steps (twice the network under guidance), decoding."""
    settings, branches = setup.settings, 1 if setup.settings.guidance_scale == 1.0 else 2
    work = Workload.of(setup.parts.network, setup.latent_side, setup.latent_side, settings.context_length)
    network = sum(forward_flops(setup.parts.network, work).values()) * settings.steps
    decode = setup.autoencoder_cost.decode_flops(setup.side_px, setup.side_px)
    return branches * (network + setup.text_cost.flops(settings.context_length)) + decode


class RandomTokens:
    """Stands for a tokenizer: every prompt fills the context."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.context_length = vocabulary, length

    def bind(self, context_length: int) -> "RandomTokens":
        """The same: the length is fixed."""
        return self

    def __call__(self, caption: str) -> tuple[list[int], int]:
        """Random ids, the same for captions of one length."""
        generator = torch.Generator().manual_seed(len(caption))
        ids = torch.randint(0, self.vocabulary, (self.context_length,), generator=generator)
        return ids.tolist(), self.context_length


def measured(
    case: Case, timing: Timing, setup: Setup, *, label: str = "", beside: Iterable[Case] = ()
) -> dict[str, Any]:
    """What was timed of a case, with its peak memory, the tensors of cases `beside` it left out, and its rate."""
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
    """Most bytes alive on the device during one call; 0 where that cannot be seen (compiled code on a CPU)."""
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
    """Parameters and buffers."""
    return [each for module in modules for each in (*module.parameters(), *module.buffers())]


def _peak_flops(setup: Setup) -> float:
    """The data sheet's rate of a GPU that the table has; of a CPU what a large matrix product reaches."""
    if setup.device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name(setup.device))
        return 0.0 if gpu is None else gpu.peak_tflops * 1e12
    timing, _ = system.matmul(setup.device, setup.dtype, system.CPU_MATMUL, repeats=5)
    return 2 * system.CPU_MATMUL**3 / timing.best
