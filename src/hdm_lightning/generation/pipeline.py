"""A trained network with its encoders as one object: prompts and seeds in, pictures out.

Shapes: B pictures, H×W pixels, C latent channels, h×w latent, N image tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hdm_lightning.diffusion import flow, sampling, times
from hdm_lightning.diffusion.guidance import Guide, guided
from hdm_lightning.encoders.base import ImageAutoencoder, TextEncoder
from hdm_lightning.encoders.padding import cut_to, pad_to_multiple, padded_size
from hdm_lightning.encoders.tokenizer import CaptionTokenizer
from hdm_lightning.generation.branches import Branch, View, velocities
from hdm_lightning.generation.encoded_text import EncodedText, encode_texts
from hdm_lightning.generation.fitting import check_request, require_fit
from hdm_lightning.generation.settings import SamplingSettings
from hdm_lightning.models import XUT
from hdm_lightning.models.positions import token_positions


class TextToImage:
    """Draws pictures with a trained network.

    A picture depends on its prompt, its seed and the settings alone, not on what else is drawn with it: noise and
    routing come from a generator of its own, on the CPU, so that they are the same on every device.

    Args:
        model: the network, on the device to draw on; its weights are read at each call, so that a training run may
            keep one object.
        text_encoder: of the network's context width.
        tokenizer: of the text encoder, with the context length to use.
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
        tokenizer: CaptionTokenizer,
        autoencoder: ImageAutoencoder,
        *,
        max_batch: int = 8,
        autocast: torch.dtype | None = None,
    ) -> None:
        require_fit("text_encoder", "vectors", text_encoder.width, model.config.context_width)
        require_fit("autoencoder", "latent channels", autoencoder.channels, model.config.channels)
        self.model = model
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.autoencoder = autoencoder
        self.max_batch = max_batch
        self.autocast = autocast

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.model.parameters()).device

    @property
    def size_multiple(self) -> int:
        """Heights and widths must be multiples of this, or are padded to them: autoencoder factor × patch."""
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
        check_request(prompts, seeds, settings, images, self.size_multiple)
        batches = range(0, len(prompts), self.max_batch)
        drawn = []
        for number, start in enumerate(batches):
            part = slice(start, start + self.max_batch)
            tell = _offset(progress, number * settings.steps, len(batches) * settings.steps)
            given = None if images is None else images[part]
            latent = self._draw(prompts[part], seeds[part], settings, given, tell)
            pictures = cut_to(self.autoencoder.decode(latent), settings.height, settings.width)
            drawn.append(to_uint8(pictures).cpu())
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
        size = self._latent_size(settings)
        shape = (self.model.config.channels, *size)
        x = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)
        start = 1.0
        if images is not None:
            start = settings.strength
            x = flow.interpolate(self._clean(images, settings), x, x.new_full(x.shape[:1], start))
        grid = times.shifted_grid(settings.steps, settings.shift, start=start)
        view = View(self.model, self._positions(size, settings), generators, self.autocast)
        return sampling.SOLVERS[settings.solver](self._velocity(prompts, settings, view), x, grid, progress)

    def _clean(self, images: Tensor, settings: SamplingSettings) -> Tensor:
        """Normalised latents (B, C, h, w) of the pictures to start from."""
        padded = pad_to_multiple(images, self.size_multiple, settings.on_indivisible)
        return self.autoencoder.encode(padded.to(self.device).float() / 127.5 - 1.0)

    def _velocity(self, prompts: Sequence[str], settings: SamplingSettings, view: View) -> sampling.Velocity:
        """The guided velocity: the prompts' branch, and those that it is guided away from."""
        text = self._encode(prompts)
        guides = []
        if settings.guidance_scale != 1.0:
            negative = self._encode([settings.negative_prompt] * len(prompts))
            branch = Branch(view, negative, settings.unconditional_rate)
            guides.append(Guide(branch, settings.guidance_scale, settings.guidance_interval))
        if settings.routing_scale != 1.0:
            guides.append(Guide(Branch(view, text, settings.weak_rate), settings.routing_scale))
        return guided(Branch(view, text, settings.conditional_rate), guides, velocities)

    def _encode(self, texts: Sequence[str]) -> EncodedText:
        return encode_texts(texts, self.text_encoder, self.tokenizer, self.device)

    def _latent_size(self, settings: SamplingSettings) -> tuple[int, int]:
        """Height and width of the latent, that of a padded picture where the settings' size does not fit."""
        height, width = padded_size(settings.height, settings.width, self.size_multiple)
        return height // self.autoencoder.factor, width // self.autoencoder.factor

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


def to_uint8(image: Tensor) -> Tensor:
    """Images in [−1, 1] to uint8."""
    return ((image.float() + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)


def _offset(progress: sampling.Progress | None, done_before: int, total: int) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, _steps: progress(done_before + done, total)
