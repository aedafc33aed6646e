"""The branches that guidance combines: the network's predictions for each encoded text and routing rate.

Shapes: B images or prompts, L text tokens, D width of the text encoder, C latent channels, h×w latent, N image tokens,
K kept tokens.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hdm_lightning.encoders.base import TextEncoder
from hdm_lightning.encoders.tokenizer import CaptionTokenizer
from hdm_lightning.generation.sampling_settings import check_seeds
from hdm_lightning.models.routing import keep_from_scores


@dataclass(frozen=True)
class EncodedText:
    """Encoded prompts: context float32 (B, L, D), cut to the longest; `lengths` int64 (B,), None if all L count."""

    context: Tensor
    lengths: Tensor | None

    @property
    def counts(self) -> Tensor:
        """Number of tokens that count, (B,)."""
        batch, length = self.context.shape[:2]
        return torch.full((batch,), length, device=self.context.device) if self.lengths is None else self.lengths


def cut_prompts(prompts: Sequence[str], tokenizer: CaptionTokenizer) -> list[str]:
    """Return a message for each prompt that is too long for the network: how much of it is cut."""
    told = []
    for prompt in dict.fromkeys(prompts):
        count, text = tokenizer.left_out(prompt) if hasattr(tokenizer, "left_out") else (0, "")
        if count:
            what = f"{prompt[:40]!r}… is longer than the {tokenizer.context_length} tokens that the model reads"
            told.append(f"{what}: the last {count} are cut" + (f", {text[-60:]!r}" if text else ""))
    return told


def encode_texts(
    texts: Sequence[str], text_encoder: TextEncoder, tokenizer: CaptionTokenizer, device: torch.device
) -> EncodedText:
    """Encode prompts on a device."""
    ids, counts = zip(*map(tokenizer, texts), strict=True)
    longest = max(counts)
    lengths = torch.tensor(counts, device=device)
    tokens = torch.tensor([row[:longest] for row in ids], device=device)
    context = text_encoder.encode(tokens, lengths).float()
    return EncodedText(context, None if min(counts) == longest else lengths)


def joined(texts: Sequence[EncodedText]) -> EncodedText:
    """Join several batches of prompts into one, (ΣB, max L, D), padding the shorter ones with masked tokens."""
    longest = max(text.context.shape[1] for text in texts)
    context = torch.cat([F.pad(text.context, (0, 0, 0, longest - text.context.shape[1])) for text in texts])
    if all(text.lengths is None and text.context.shape[1] == longest for text in texts):
        return EncodedText(context, None)
    return EncodedText(context, torch.cat([text.counts for text in texts]))


def computing_in(autocast: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context that autocasts to a lower precision; None leaves the precision as it is."""
    return contextlib.nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)


@dataclass(frozen=True)
class View:
    """What all branches of a batch of images share.

    Attributes:
        model: the network, or a callable with its signature.
        positions: (1, N, 2) of the image tokens.
        generators: one per image, for its routing.
        autocast: lower precision to compute in, or None.
    """

    model: Callable[..., Tensor]
    positions: Tensor
    generators: Sequence[torch.Generator]
    autocast: torch.dtype | None

    def keep(self, rate: float) -> Tensor | None:
        """Draw the image tokens (B, K) that pass through the U; None at rate 0, where all do."""
        if rate == 0.0:
            return None
        tokens = self.positions.shape[1]
        scores = torch.stack(
            [torch.rand(tokens, generator=generator, device=generator.device).cpu() for generator in self.generators]
        )
        return keep_from_scores(scores, rate).to(self.positions.device)


@dataclass(frozen=True, eq=False)
class Branch:
    """The velocity for B prompts at one rate of tokens that skip the U, as a `diffusion.sampling.Velocity`."""

    view: View
    text: EncodedText
    rate: float

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Return the velocity (B, C, h, w) of this branch alone."""
        return velocities([self], x, t)[0]


def velocities(branches: Sequence[Branch], x: Tensor, t: float) -> list[Tensor]:
    """Return the velocities (B, C, h, w) of branches at one state and time, with one network pass per routing rate.

    Routing is drawn branch by branch and padding is masked, so apart from rounding the result equals that of a pass
    for each branch.
    """
    keeps = [branch.view.keep(branch.rate) for branch in branches]
    found: dict[int, Tensor] = {}
    for rate in dict.fromkeys(branch.rate for branch in branches):
        group = [number for number, branch in enumerate(branches) if branch.rate == rate]
        kept = [keep for number in group if (keep := keeps[number]) is not None]
        together = _one_pass([branches[number] for number in group], torch.cat(kept) if kept else None, x, t)
        found |= dict(zip(group, together.chunk(len(group)), strict=True))
    return [found[number] for number in range(len(branches))]


def _one_pass(branches: Sequence[Branch], keep: Tensor | None, x: Tensor, t: float) -> Tensor:
    """Return the velocities (branches·B, C, h, w) of branches with the same routing rate."""
    view, text = branches[0].view, joined([branch.text for branch in branches])
    repeated = x.float().repeat(len(branches), 1, 1, 1)
    with computing_in(view.autocast, x.device):
        predicted = view.model(
            repeated,
            repeated.new_full(repeated.shape[:1], t),
            text.context,
            context_lengths=text.lengths,
            token_positions=view.positions,
            keep=keep,
        )
    return predicted.to(x.dtype)


def generators_of(
    count: int,
    each: int,
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> list[torch.Generator]:
    """Return a generator for each of `count` images, of which `each` in a row have the same prompt."""
    if generator is not None:
        return [generator] * count if isinstance(generator, torch.Generator) else list(generator)
    if seed is None:
        seed = int(torch.randint(2**62, (1,)))
    seeds = list(seed) if isinstance(seed, Sequence) else [int(seed) + number % each for number in range(count)]
    check_seeds(seeds)
    return [torch.Generator().manual_seed(int(one)) for one in seeds]
