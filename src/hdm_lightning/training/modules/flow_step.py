"""The parts of a flow-matching step: encode a batch, also ahead of its step, and compute the loss of the network.

B batch, C latent channels, H x W image in pixels or latent grid, N image tokens, K kept tokens, L caption tokens.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.diffusion import flow
from hdm_lightning.encoders.base import ImageAutoencoder, TextEncoder, fingerprint_of, posteriors_of
from hdm_lightning.encoders.caches import CachedTextEncoder
from hdm_lightning.errors import UserError
from hdm_lightning.models.positions import PositionConvention, token_positions


class FrozenEncoders:
    """The text encoder and autoencoder of a training; not a module, so never trained, averaged or saved."""

    def __init__(self, text: TextEncoder, autoencoder: ImageAutoencoder) -> None:
        self.text = text
        self.autoencoder = autoencoder

    def to(self, device: torch.device) -> None:
        """Move both encoders to a device."""
        self.text.to(device)
        self.autoencoder.to(device)

    @torch.no_grad()
    def latents(self, image: Tensor) -> Tensor:
        """Return the normalized latents, in float32, of uint8 images (B,3,H,W)."""
        return self.autoencoder.encode(image.float().div_(127.5).sub_(1.0)).float()

    @torch.no_grad()
    def latents_of_batch(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the normalized latents, in float32, of a batch's images or its latents from disk."""
        if "latent" in batch:
            return posteriors_of(self.autoencoder).from_moments(batch["latent"]).float()
        return self.latents(batch["image"][:, :3])

    def require_same(self, batch: Mapping[str, Any]) -> None:
        """Check that a batch's latents and text states from disk come from this autoencoder and text encoder.

        Raises:
            UserError: they come from another one.
        """
        of_text = batch.get("text_encoder")
        if of_text is not None and of_text != fingerprint_of(self.text):
            raise other_text_encoder(of_text, fingerprint_of(self.text))
        of_batch = batch.get("autoencoder")
        if of_batch is not None and of_batch != posteriors_of(self.autoencoder).fingerprint:
            raise other_autoencoder(of_batch, posteriors_of(self.autoencoder).fingerprint)

    @torch.no_grad()
    def context(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return the context (B,L,width), in float32, of caption tokens (B,L)."""
        return self.text.encode(tokens, lengths).float()

    @torch.no_grad()
    def cached_context(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the `context` of a batch on the CPU if the text encoder keeps captions in RAM, else nothing.

        Its lookups read the tokens, for which the host would have to wait once they are on a device. Only captions
        that it does not have yet are encoded on the device and waited for.
        """
        if "context" in batch or not isinstance(self.text, CachedTextEncoder):
            return {}
        return {"context": self.text.encode(batch["tokens"], batch["lengths"])}

    def context_of_batch(self, batch: Mapping[str, Any], tokens: Tensor) -> Tensor:
        """Return the context, in float32, of a batch's caption tokens (B,L), or of its text states from disk."""
        if "context" in batch:
            return batch["context"][:, : tokens.shape[1]].float()
        return self.context(tokens, batch["lengths"])


def other_autoencoder(of_latents: str, of_run: str, *, named: str = "") -> UserError:
    """Return the error for latents from disk that do not come from the run's autoencoder."""
    return UserError(
        f"the latents of the training or validation set are from another autoencoder{named and f', {named}'} "
        f"({of_latents[:12]}), not this run's ({of_run[:12]})",
        where="vae.name",
        hint="set the autoencoder that `hdm-shards encode` used as --vae, or encode the images with this one",
    )


def other_text_encoder(of_states: str, of_run: str, *, named: str = "") -> UserError:
    """Return the error for text states from disk that do not come from the run's text encoder."""
    return UserError(
        f"the stored text states are from another text encoder or layer{named and f', {named}'} ({of_states[:12]}), "
        f"not this run's ({of_run[:12]})",
        where="data.text_states",
        hint="encode the captions with this one into another folder, or set data.text_states=null",
    )


def latent_grid(batch: Mapping[str, Any], factor: int) -> tuple[int, int]:
    """Return the rows and columns of latent cells of a batch, from its images or its latents from disk."""
    if "latent" in batch:
        rows, columns = batch["latent"].shape[-2:]
    else:
        rows, columns = (size // factor for size in batch["image"].shape[-2:])
    return rows, columns


def loss_weight(batch: Mapping[str, Any], factor: int) -> Tensor | None:
    """Return the loss weight of each latent cell (B,1,h,w), in [0, 1], from the images' fourth channel, if any."""
    image = batch.get("image")
    if image is None or image.shape[1] == 3:
        return None
    return torch.nn.functional.avg_pool2d(image[:, 3:].float(), factor) / 255.0


Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Conditioning:
    """The network's inputs besides the noisy latent and the time.

    Attributes:
        context: (B, L, width) encoded captions.
        context_lengths: (B,) true caption lengths; None if all captions fill the context.
        positions: (B, N, 2) token positions as (y, x).
        log_aspect_ratio: (B,) log(width / height) of the full image.
    """

    context: Tensor
    context_lengths: Tensor | None
    positions: Tensor
    log_aspect_ratio: Tensor


@dataclass(frozen=True)
class Encoded:
    """A batch encoded by the frozen encoders.

    Attributes:
        latent: (B, C, h, w) normalized, float32.
        conditioning: the encoded captions and the geometry of the crops.
    """

    latent: Tensor
    conditioning: Conditioning

    def tensors(self) -> list[Tensor]:
        """Return all its tensors."""
        given = self.conditioning
        parts = (self.latent, given.context, given.context_lengths, given.positions, given.log_aspect_ratio)
        return [each for each in parts if each is not None]


def pinned(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with its tensors in page-locked memory, which is copied to a device without blocking the host."""
    return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}


class SideStream:
    """A CUDA stream next to the current one; on any other device, work runs at once and in order.

    Work on it does not wait for work already queued on the current stream. It must only read tensors that were created
    on it or do not change. Its results may be used on the current stream after `take_over`.

    Args:
        device: device of both streams; work queued so far on the current one, such as copies of weights, comes first.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def put(self) -> AbstractContextManager[object]:
        """Return a context in which the device's work is queued on this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """Let the current stream use these tensors of this stream from now on; it waits for them, the host does not."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)  # otherwise this stream could reuse its memory too early


def is_compiled(network: Callable[..., Tensor]) -> bool:
    """Return whether a network or its blocks are compiled; batches should then keep one shape."""
    whole = getattr(network, "_compiled_call_impl", None) is not None  # after `network.compile()`
    parts: Any = getattr(network, "modules", tuple)()  # also finds an XUT inside another network
    return whole or any(getattr(each, "has_compiled_blocks", False) for each in parts)


def fed_tokens(tokens: Tensor, lengths: Tensor, *, static: bool) -> Tensor:
    """Return caption tokens (B,L) as padded or, on a CPU, cut to the longest of the lengths (B,).

    Args:
        tokens: (B,L) padded.
        lengths: (B,).
        static: whether all batches must have the same shape, as compiled graphs need.
    """
    if static or tokens.device.type != "cpu":  # on an accelerator, reading the lengths would wait for the device
        return tokens
    return tokens[:, : int(lengths.max())]


def crop_geometry(
    crop: Tensor, grid: tuple[int, int], token_px: int, convention: PositionConvention
) -> tuple[Tensor, Tensor]:
    """Return the token positions (B,N,2) and log aspect ratios (B,) of crops.

    Args:
        crop: (B, 4) in pixels as (top, left, full H, full W).
        grid: token rows and columns of the crop.
        token_px: side of a token in pixels (autoencoder factor times patch size).
        convention: convention of the positions.
    """
    positions = token_positions(*grid, crop=crop / token_px, convention=convention)
    return positions, torch.log(crop[:, 3] / crop[:, 2])


def flow_loss(
    network: Network,
    latent: Tensor,
    noise: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    keep: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Return the loss (B,) of the network's velocity at time t against noise − latent (arXiv 2210.02747).

    `weight` (B,1,h,w) is the weight of each latent cell; None weights all alike.
    """
    velocity = network(
        flow.interpolate(latent, noise, t),
        t,
        conditioning.context,
        context_lengths=conditioning.context_lengths,
        token_positions=conditioning.positions,
        log_aspect_ratio=conditioning.log_aspect_ratio,
        keep=keep,
    )
    return flow.loss_per_sample(velocity, flow.velocity_target(latent, noise), weight)
