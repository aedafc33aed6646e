"""A trained network with its encoders as a diffusers pipeline: prompts and seeds in, images out.

Shapes: B images, H×W pixels, C latent channels, h×w latent, N image tokens.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from hdm_lightning.diffusion import flow, sampling
from hdm_lightning.diffusion.guidance import Guide, Guided
from hdm_lightning.encoders.autoencoder import KLAutoencoder, cut_to, latent_statistics, pad_to_multiple, padded_size
from hdm_lightning.encoders.base import ImageAutoencoder, TextEncoder
from hdm_lightning.encoders.text import TransformersTextEncoder, cut_after
from hdm_lightning.encoders.tokenizer import CaptionTokenizer, Tokenizer
from hdm_lightning.errors import UserError
from hdm_lightning.generation.components import FlowScheduler, XUTTransformer, model_of
from hdm_lightning.generation.guided_branches import (
    Branch,
    EncodedText,
    View,
    cut_prompts,
    encode_texts,
    generators_of,
    velocities,
)
from hdm_lightning.generation.image_files import OUTPUT_TYPES, converted, start_images, start_size, to_uint8, upright
from hdm_lightning.generation.pipeline_adapters import AdapterLoading
from hdm_lightning.generation.sampling_settings import SamplingSettings, check_request, check_seeds, require_fit
from hdm_lightning.generation.stored_pipeline import StoredPipeline
from hdm_lightning.models import XUT
from hdm_lightning.models.positions import token_positions
from hdm_lightning.precision import solver_dtype

Progress = Callable[[int, int], None]
"""Called after each solver step with (steps done, total steps)."""

StepCallback = Callable[["HDMPipeline", int, float, dict[str, Any]], dict[str, Any] | None]
"""As in diffusers: (pipeline, step from 0, time, {"latents": …}) -> tensors to continue with, by name, or None."""


class HDMPipeline(StoredPipeline, AdapterLoading):
    """Generates images from prompts with a trained network.

    An image depends only on its prompt, seed and settings, not on the rest of its batch: noise and routing come from
    a generator of its own on the CPU, so they are the same on every device.

    Saved, loaded, moved and offloaded like any diffusers pipeline. During training, the network itself and the
    run's own encoders can be passed in place of the diffusers components; weights are read at each call, so a run can
    keep one pipeline object. `load_lora_weights` and `set_adapters` add LoRAs to the network.

    Args:
        transformer: an `XUTTransformer`, an XUT, or any callable with its signature and `config`.
        vae: a diffusers AutoencoderKL or an `ImageAutoencoder` with the network's latent channels.
        scheduler: solver and time grid.
        text_encoder: a transformers model or a `TextEncoder` of the network's context width.
        tokenizer: a transformers tokenizer or a `Tokenizer`; None uses the one of a `TextEncoder`.
        text_encoder_name: name to load the text encoder from if it is not in the pipeline's folder.
        text_encoder_layer: index of the hidden state to use; later blocks are dropped.
        context_length: maximum number of tokens of a prompt.
        sampling: default settings, keys of `SamplingSettings`, as recorded by the training run.
        training: record of the training.

    Attributes:
        max_batch: images per batch of `draw`.
        autocast: lower precision to run the network in; None uses the precision of its weights.

    Raises:
        UserError: text encoder or autoencoder does not fit the network.
    """

    model_cpu_offload_seq: Any = "text_encoder->transformer->vae"
    _optional_components = ["scheduler", "text_encoder", "tokenizer"]  # noqa: RUF012  (as diffusers declares it)

    def __init__(
        self,
        transformer: nn.Module | Callable[..., Tensor],
        vae: nn.Module | ImageAutoencoder,
        scheduler: FlowScheduler | None = None,
        text_encoder: nn.Module | TextEncoder | None = None,
        tokenizer: Any = None,
        *,
        text_encoder_name: str | None = None,
        text_encoder_layer: int = -1,
        context_length: int = 256,
        sampling: dict | None = None,
        training: dict | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(scheduler, FlowScheduler | None):
            raise TypeError(f"scheduler: got {type(scheduler).__name__}, expected FlowScheduler or None")
        if isinstance(transformer, XUT):
            transformer = XUTTransformer.around(transformer)
        if isinstance(text_encoder, PreTrainedModel):
            text_encoder = cut_after(text_encoder, text_encoder_layer)
        elif tokenizer is None:
            tokenizer = getattr(text_encoder, "tokenizer", None)
        self.register_modules(
            transformer=transformer,
            vae=model_of(vae),
            scheduler=scheduler or FlowScheduler(),
            text_encoder=model_of(text_encoder),
            tokenizer=tokenizer,
        )
        self.register_to_config(
            text_encoder_name=text_encoder_name,
            text_encoder_layer=text_encoder_layer,
            context_length=context_length,
            sampling=sampling or {},
            training=training or {},
        )
        self.max_batch = 8
        self.autocast: torch.dtype | None = None
        # Each model with the encoder that wraps it, which is rebuilt when the model is replaced.
        self._wrapped: dict[str, tuple[Any, Any]] = {
            "vae": (self.vae, None if vae is self.vae else vae),
            "text_encoder": (self.text_encoder, None if text_encoder is self.text_encoder else text_encoder),
        }
        config = self.transformer.config
        require_fit("autoencoder", "latent channels", self.autoencoder.channels, config.channels)
        if self.text_encoder is not None:
            require_fit("text_encoder", "context dimensions", self.encoder.width, config.context_width)

    @property
    def device(self) -> torch.device:
        """Device of the network's weights."""
        return next(iter(self.transformer.parameters())).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights."""
        return next(iter(self.transformer.parameters())).dtype

    @property
    def network(self) -> Any:
        """The XUT itself, or the model that was passed in its place."""
        return self.transformer.network if isinstance(self.transformer, XUTTransformer) else self.transformer

    @property
    def autoencoder(self) -> ImageAutoencoder:
        """The autoencoder, wrapped to use normalized latents."""
        return self._wrapper("vae", self._wrapped_vae)

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder, wrapped to map tokens to states. Raises UserError: there is none."""
        if self.text_encoder is None:
            name = self.config.text_encoder_name or "the one the network was trained with"
            raise UserError("has no text encoder", where="pipeline", hint=f"pass text_encoder= ({name})")
        return self._wrapper("text_encoder", self._wrapped_text_encoder)

    @property
    def caption_tokenizer(self) -> CaptionTokenizer:
        """Maps a prompt to at most `context_length` token ids."""
        return self._wrapper("tokenizer", lambda: self._own_tokenizer().bind(self.config.context_length))

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Default settings, keys of `SamplingSettings`, with the scheduler's solver and shift."""
        scheduler = self.scheduler.config
        return {**self.config.sampling, "solver": scheduler.solver, "shift": scheduler.shift}

    @property
    def size_multiple(self) -> int:
        """Autoencoder factor × patch: heights and widths must be multiples of it, or are padded to one."""
        return self.autoencoder.factor * self.transformer.config.patch_size

    def _wrapper(self, part: str, make: Callable[[], Any]) -> Any:
        model = getattr(self, part)
        known, wrapper = self._wrapped.get(part, (None, None))
        if wrapper is None or known is not model:
            wrapper = make()
            self._wrapped[part] = (model, wrapper)
        return wrapper

    def _wrapped_vae(self) -> ImageAutoencoder:
        if not isinstance(self.vae, ModelMixin):
            return self.vae
        statistics = latent_statistics(self.vae.config, int(self.vae.config.latent_channels), where="vae")
        return KLAutoencoder(self.vae, *statistics)

    def _wrapped_text_encoder(self) -> TextEncoder:
        if not isinstance(self.text_encoder, PreTrainedModel):
            return self.text_encoder
        return TransformersTextEncoder(self.text_encoder, None if self.tokenizer is None else self._own_tokenizer())

    def _own_tokenizer(self) -> Tokenizer:
        return self.tokenizer if hasattr(self.tokenizer, "bind") else Tokenizer("", loaded=self.tokenizer)

    def with_network(self, network: nn.Module | Callable[..., Tensor]) -> "HDMPipeline":
        """Return a copy of the pipeline with another network, which must take the same latents and texts."""
        same = {key: value for key, value in self.components.items() if key in ("scheduler", "tokenizer")}
        encoder = None if self.text_encoder is None else self.encoder
        other = HDMPipeline(network, self.autoencoder, text_encoder=encoder, **same, **self.parameters)
        other.max_batch, other.autocast = self.max_batch, self.autocast
        return other

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        *,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image: Image.Image | Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> Any:
        """Generate images in a single batch.

        Args:
            prompt: one prompt or several.
            height, width: in pixels; default: the size of `image`, else the model's own.
            num_inference_steps, guidance_scale, negative_prompt: see `SamplingSettings`.
            num_images_per_prompt: images of the same prompt are adjacent in the result.
            seed: seed of each prompt's first image, incremented for the others; or one seed per image. None draws one
                from torch's global generator.
            generator: instead of seeds: one generator per image, or one that all images share in turn.
            image: start image, mixed with noise at time `strength`: PIL, scaled and cropped to the size; or
                uint8 (1 or B, 3, H, W).
            output_type: "pil"; "pt", (B, 3, H, W) in [0, 1]; "np", (B, H, W, 3) in [0, 1]; or "latent", normalized
                latents (B, C, h, w).
            return_dict: whether to return an object with `images` instead of a tuple.
            callback_on_step_end: called after each step; may inspect the latents and replace them.
            callback_on_step_end_tensor_inputs: tensors that the callback gets: "latents" or none.
            settings: other fields of `SamplingSettings`: `solver`, `shift`, `guidance_interval`, `routing_scale`,
                `x_shift`, `y_shift`, `zoom`, `strength`, …

        Raises:
            ValueError: an argument is unknown, or does not fit the others or the network.
        """
        settings |= {"height": height, "width": width, "steps": num_inference_steps}
        settings |= {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
        if isinstance(image, Image.Image):
            image = upright(image)
        given = {key: value for key, value in settings.items() if value is not None}
        chosen = SamplingSettings.from_json({**self.sampling_defaults, **start_size(image), **given})
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for told in cut_prompts([*prompts, chosen.negative_prompt], self.caption_tokenizer):
            warnings.warn(told, stacklevel=3)
        prompts = [each for each in prompts for _ in range(num_images_per_prompt)]
        generators = generators_of(len(prompts), num_images_per_prompt, seed, generator)
        images = start_images(image, chosen, len(prompts))
        check_request(prompts, len(generators), chosen, images, self.size_multiple)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: got {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")
        grid = self._scheduler(chosen).grid(chosen.steps, start=1.0 if images is None else chosen.strength).tolist()

        with self.progress_bar(total=chosen.steps) as bar:

            def on_step(done: int, x: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return x
                shown = {"latents": x.float()} if "latents" in callback_on_step_end_tensor_inputs else {}
                return _resumed(x, (callback_on_step_end(self, done - 1, grid[done - 1], shown) or {}).get("latents"))

            latent = self._latents(prompts, generators, chosen, images, on_step)
        drawn: Any = latent if output_type == "latent" else converted(self._decoded(latent, chosen), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=drawn) if return_dict else (drawn,)

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
        *,
        images: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Generate one image per prompt and seed, in batches of `max_batch`.

        Args:
            prompts: B prompts.
            seeds: B seeds, 0 … 2⁶³ − 1.
            settings: shared by all images.
            images: start images, uint8 (B, 3, H, W), mixed with noise at time `settings.strength`.
            progress: called after each solver step with (steps done, total steps) over all batches.

        Returns:
            uint8 (B, 3, H, W) on the CPU.

        Raises:
            ValueError: an argument does not fit the others or the network.
        """
        check_request(prompts, len(seeds), settings, images, self.size_multiple)
        check_seeds(seeds)
        starts = range(0, len(prompts), self.max_batch)
        drawn = []
        for number, start in enumerate(starts):
            part = slice(start, start + self.max_batch)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            given = None if images is None else images[part]

            def on_step(done: int, x: Tensor, before: int = number * settings.steps) -> Tensor:
                if progress is not None:
                    progress(before + done, len(starts) * settings.steps)
                return x

            latent = self._latents(prompts[part], generators, settings, given, on_step)
            drawn.append(to_uint8(self._decoded(latent, settings)).cpu())
        self.maybe_free_model_hooks()
        return torch.cat(drawn)

    def _latents(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        settings: SamplingSettings,
        images: Tensor | None,
        on_step: sampling.OnStep,
    ) -> Tensor:
        """Sample normalized latents (B, C, h, w)."""
        device = self._execution_device
        height, width = padded_size(settings.height, settings.width, self.size_multiple)
        size = (height // self.autoencoder.factor, width // self.autoencoder.factor)
        shape = (self.transformer.config.channels, *size)
        noise = [torch.randn(shape, generator=one, device=one.device).to(device) for one in generators]
        x = torch.stack(noise).to(solver_dtype(device))
        scheduler = self._scheduler(settings)
        grid = scheduler.grid(settings.steps, start=1.0 if images is None else settings.strength)
        if images is not None:
            start = x.new_full(x.shape[:1], float(grid[0]))
            x = flow.interpolate(self._clean(images, settings, device).to(x), x, start)
        view = View(self.transformer, self._positions(size, settings), generators, self.autocast)
        return scheduler.solve(self._velocity(prompts, settings, view), x, grid, on_step).float()

    def _scheduler(self, settings: SamplingSettings) -> FlowScheduler:
        """Return the pipeline's scheduler with the solver and shift of the settings."""
        return self.scheduler.from_config(self.scheduler.config, solver=settings.solver, shift=settings.shift)

    def _clean(self, images: Tensor, settings: SamplingSettings, device: torch.device) -> Tensor:
        """Encode the start images to normalized latents (B, C, h, w)."""
        padded = pad_to_multiple(images, self.size_multiple, settings.on_indivisible)
        return self.autoencoder.encode(padded.to(device).float() / 127.5 - 1.0)

    def _decoded(self, latent: Tensor, settings: SamplingSettings) -> Tensor:
        """Decode to images (B, 3, H, W) in [−1, 1]. Raises UserError: the latents are not finite."""
        if not latent.isfinite().all():
            hint = (
                "try float32 (--precision, torch_dtype= in Python) or less guidance (--guidance, guidance_scale=); "
                "else the weights are damaged or untrained"
            )
            raise UserError("contain NaN or infinity, so there is no image", where="latents", hint=hint)
        return cut_to(self.autoencoder.decode(latent), settings.height, settings.width)

    def _velocity(self, prompts: Sequence[str], settings: SamplingSettings, view: View) -> sampling.Velocity:
        """Build the guided velocity from the prompts' branch and the branches to guide away from."""
        text = self._encode(prompts)
        guides = []
        if settings.guidance_scale != 1.0:
            negative = self._encode([settings.negative_prompt] * len(prompts))
            branch = Branch(view, negative, settings.unconditional_rate)
            guides.append(Guide(branch, settings.guidance_scale, settings.guidance_interval))
        if settings.routing_scale != 1.0:
            guides.append(Guide(Branch(view, text, settings.weak_rate), settings.routing_scale))
        return Guided(Branch(view, text, settings.conditional_rate), tuple(guides), velocities)

    def _encode(self, texts: Sequence[str]) -> EncodedText:
        return encode_texts(texts, self.encoder, self.caption_tokenizer, self._execution_device)

    def _positions(self, latent_size: tuple[int, int], settings: SamplingSettings) -> Tensor:
        """Return token positions (1, N, 2) with the camera settings applied."""
        config = self.transformer.config
        return token_positions(
            latent_size[0] // config.patch_size,
            latent_size[1] // config.patch_size,
            convention=config.positions,
            shift=(settings.y_shift, settings.x_shift),
            zoom=settings.zoom,
            device=self._execution_device,
        )


def _resumed(x: Tensor, given: Tensor | None) -> Tensor:
    """The solver's state, or what a callback that was shown it in float32 puts in its place."""
    if given is None or torch.equal(given.to(x.device, torch.float32), x.float()):
        return x
    return given.to(x)
