"""Prompts as the network reads them: hidden states of the text encoder, and how many of each row count.

Shapes: B prompts, L text tokens, D width of the text encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hdm_lightning.encoders.base import TextEncoder
from hdm_lightning.encoders.tokenizer import CaptionTokenizer


@dataclass(frozen=True)
class EncodedText:
    """Encoded prompts.

    Attributes:
        context: float32 (B, L, D), cut to the longest prompt.
        lengths: int64 (B,) tokens that count, or None where all L do.
    """

    context: Tensor
    lengths: Tensor | None


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
    """Several batches of prompts as one, (ΣB, max L, D); the shorter ones padded with tokens that do not count."""
    longest = max(text.context.shape[1] for text in texts)
    context = torch.cat([F.pad(text.context, (0, 0, 0, longest - text.context.shape[1])) for text in texts])
    if all(text.lengths is None and text.context.shape[1] == longest for text in texts):
        return EncodedText(context, None)
    return EncodedText(context, torch.cat([_lengths(text) for text in texts]))


def _lengths(text: EncodedText) -> Tensor:
    if text.lengths is not None:
        return text.lengths
    batch, length = text.context.shape[:2]
    return torch.full((batch,), length, device=text.context.device)
