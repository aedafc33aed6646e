"""A trained network with its encoders as one object: prompts and seeds in, pictures out.

Shapes: B pictures, H×W pixels, C latent channels, h×w latent, N image tokens, L text tokens.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hdm_lightning.diffusion import flow, sampling, times
from hdm_lightning.diffusion.guidance import Guide, guided
from hdm_lightning.encoders.base import ImageAutoencoder, TextEncoder
from hdm_lightning.encoders.tokeniser import Tokeniser
from hdm_lightning.errors import UserError
from hdm_lightning.generation.settings import SamplingSettings
from hdm_lightning.models import XUT
from hdm_lightning.models.positions import token_positions
from hdm_lightning.models.routing import keep_from_scores

MAX_SEED = 2**63 - 1


class TextToImage:
    """Draws pictures with a trained network.

    A picture depends on its prompt, its seed and the settings alone, not on what else is drawn with it: noise and
    routing come from a generator of its own, on the CPU, so that they are the same on every device.

    Args:
        model: the network, on the device to draw on; its weights are read at each call, so that a training run may
            keep one object.
        text_encoder: of the network's context width.
        tokeniser: of the text encoder, with the context length to use.
        autoencoder: with the network's latent channels.
        max_batch: pictures drawn at once.
        autocast: lower precision to compute the network in; None keeps that of the weights.

    Raises:
        UserError: if text encoder or autoencoder do not fit the network.
    """

    def __init__(
        self,
        model: XUT,
        text_encoder: TextEncoder,
        tokeniser: Tokeniser,
        autoencoder: ImageAutoencoder,
        *,
        max_batch: int = 8,
        autocast: torch.dtype | None = None,
    ) -> None:
        require_fit("text_encoder", "vectors", text_encoder.width, model.config.context_width)
        require_fit("autoencoder", "latent channels", autoencoder.channels, model.config.channels)
        self.model = model
        self.text_encoder = text_encoder
        self.tokeniser = tokeniser
        self.autoencoder = autoencoder
        self.max_batch = max_batch
        self.autocast = autocast

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.model.parameters()).device

    @property
    def size_multiple(self) -> int:
        """Heights and widths must be multiples of this: autoencoder factor × patch."""
        return self.autoencoder.factor * self.model.config.patch_size

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
        *,
        images: Tensor | None = None,
        progress: sampling.Progress | None = None,
    ) -> Tensor:
        """Draw one picture for each prompt and seed.

        Args:
            prompts: B prompts.
            seeds: B seeds, 0 … 2⁶³ − 1.
            settings: shared by all.
            images: uint8 (B, 3, H, W) to start from instead of pure noise, mixed with noise at
                `settings.strength`.
            progress: called after each solver step with (steps done, steps in all) over all pictures.

        Returns:
            uint8 (B, 3, H, W) on the CPU.

        Raises:
            ValueError: if an argument does not fit the others or the network.
        """
        self._check(prompts, seeds, settings, images)
        batches = range(0, len(prompts), self.max_batch)
        drawn = []
        for number, start in enumerate(batches):
            part = slice(start, start + self.max_batch)
            tell = _offset(progress, number * settings.steps, len(batches) * settings.steps)
            given = None if images is None else images[part]
            latent = self._draw(prompts[part], seeds[part], settings, given, tell)
            drawn.append(to_uint8(self.autoencoder.decode(latent)).cpu())
        return torch.cat(drawn)

    @torch.no_grad()
    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
        images: Tensor | None,
        progress: sampling.Progress | None,
    ) -> Tensor:
        """Normalised latents (B, C, h, w) of at most `max_batch` pictures."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (
            self.model.config.channels,
            settings.height // self.autoencoder.factor,
            settings.width // self.autoencoder.factor,
        )
        x = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)
        start = 1.0
        if images is not None:
            start = settings.strength
            clean = self.autoencoder.encode(images.to(self.device).float() / 127.5 - 1.0)
            x = flow.interpolate(clean, x, x.new_full(x.shape[:1], start))
        grid = times.shifted_grid(settings.steps, settings.shift, start=start)
        velocity = self._velocity(prompts, settings, generators, shape[1:])
        return sampling.SOLVERS[settings.solver](velocity, x, grid, progress)

    def _velocity(
        self,
        prompts: Sequence[str],
        settings: SamplingSettings,
        generators: Sequence[torch.Generator],
        latent_size: tuple[int, int],
    ) -> sampling.Velocity:
        """The guided velocity: the prompts' branch, and those that it is guided away from."""
        positions = self._positions(latent_size, settings)
        text = self._encode(prompts)
        main = self._branch(text, positions, settings.conditional_rate, generators)
        guides = []
        if settings.guidance_scale != 1.0:
            negative = self._encode([settings.negative_prompt] * len(prompts))
            branch = self._branch(negative, positions, settings.unconditional_rate, generators)
            guides.append(Guide(branch, settings.guidance_scale, settings.guidance_interval))
        if settings.routing_scale != 1.0:
            branch = self._branch(text, positions, settings.weak_rate, generators)
            guides.append(Guide(branch, settings.routing_scale))
        return guided(main, guides)

    def _branch(
        self,
        text: tuple[Tensor, Tensor | None],
        positions: Tensor,
        rate: float,
        generators: Sequence[torch.Generator],
    ) -> sampling.Velocity:
        """The network's velocity for one text and one routing rate; rate 0 is the dense network."""
        context, context_lengths = text
        tokens = positions.shape[1]

        def velocity(x: Tensor, t: float) -> Tensor:
            keep = None
            if rate > 0.0:
                scores = torch.stack([torch.rand(tokens, generator=g) for g in generators])
                keep = keep_from_scores(scores, rate).to(x.device)
            with self._precision():
                predicted = self.model(
                    x,
                    x.new_full(x.shape[:1], t),
                    context,
                    context_lengths=context_lengths,
                    token_positions=positions,
                    keep=keep,
                )
            return predicted.to(x.dtype)

        return velocity

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Context (B, L, width) cut to the longest text; lengths (B,), or None where all are that long."""
        ids, counts = zip(*map(self.tokeniser, texts), strict=True)
        longest = max(counts)
        lengths = torch.tensor(counts, device=self.device)
        tokens = torch.tensor([row[:longest] for row in ids], device=self.device)
        context = self.text_encoder.encode(tokens, lengths).float()
        return context, None if min(counts) == longest else lengths

    def _positions(self, latent_size: tuple[int, int], settings: SamplingSettings) -> Tensor:
        """Token positions (1, N, 2) as the camera sees them."""
        height, width = (side // self.model.config.patch_size for side in latent_size)
        return token_positions(
            height,
            width,
            convention=self.model.config.positions,
            shift=(settings.y_shift, settings.x_shift),
            zoom=settings.zoom,
            device=self.device,
        )

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def _check(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings, images: Tensor | None
    ) -> None:
        if not prompts or len(prompts) != len(seeds):
            raise ValueError(f"seeds: got {len(seeds)} for {len(prompts)} prompts, expected one each")
        if not all(0 <= seed <= MAX_SEED for seed in seeds):
            raise ValueError(f"seeds: got {list(seeds)}, expected 0 … 2⁶³ − 1")
        for name in ("height", "width"):
            if getattr(settings, name) % self.size_multiple:
                raise ValueError(f"{name}: got {getattr(settings, name)}, expected a multiple of {self.size_multiple}")
        if images is not None:
            expected = (len(prompts), 3, settings.height, settings.width)
            if tuple(images.shape) != expected or images.dtype != torch.uint8:
                got = f"{images.dtype} {tuple(images.shape)}"
                raise ValueError(f"images: got {got}, expected uint8 {expected}")


def require_fit(where: str, what: str, got: int, expected: int) -> None:
    """Raise UserError if an encoder does not fit the network."""
    if got != expected:
        raise UserError(
            f"gives {got} {what}, while the network was made for {expected}",
            where=where,
            mend="use the one the network was trained with",
        )


def to_uint8(image: Tensor) -> Tensor:
    """Images in [−1, 1] to uint8."""
    return ((image.float() + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)


def _offset(progress: sampling.Progress | None, done_before: int, total: int) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, _steps: progress(done_before + done, total)
