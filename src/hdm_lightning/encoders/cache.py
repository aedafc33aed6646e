"""A text encoder that remembers: small sets show the same captions again and again.

Shapes: B batch, L tokens.
"""

from collections import OrderedDict
from typing import Self

import torch
from torch import Tensor

from hdm_lightning.encoders.base import TextEncoder


class CachedTextEncoder:
    """Wraps a text encoder with a least-recently-used cache in RAM, keyed by a caption's token ids.

    Encodings are kept in the encoder's dtype and without padding: length × width numbers a caption.

    Args:
        encoder: what encodes captions not seen lately.
        size: captions remembered, at least 1.
    """

    def __init__(self, encoder: TextEncoder, size: int) -> None:
        if size < 1:
            raise ValueError(f"size: got {size}, expected at least 1")
        self.encoder = encoder
        self.size = size
        self.hits = 0
        self.misses = 0
        self._encodings: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    @property
    def width(self) -> int:
        """Size of one token's vector."""
        return self.encoder.width

    def to(self, device: torch.device | str) -> Self:
        """Move the encoder; the cache stays in RAM."""
        self.encoder.to(device)
        return self

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Encode captions; see `TextEncoder.encode`. Reads tokens and lengths on the host."""
        counts: list[int] = lengths.tolist()
        keys = [tuple(row[:count]) for row, count in zip(tokens.tolist(), counts, strict=True)]
        found = [self._encodings.get(key) for key in keys]
        missing = [row for row, encoding in enumerate(found) if encoding is None]
        if missing:
            fresh = self.encoder.encode(tokens[missing], lengths[missing]).cpu()
            for row, encoding in zip(missing, fresh, strict=True):
                found[row] = encoding[: counts[row]].clone()
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        return self._assemble(keys, found, tokens)

    def _assemble(self, keys: list[tuple[int, ...]], found: list[Tensor | None], tokens: Tensor) -> Tensor:
        encodings = [encoding for encoding in found if encoding is not None]
        dtype = encodings[0].dtype if encodings else torch.float32
        context = torch.zeros(*tokens.shape, self.width, dtype=dtype)
        for row, (key, encoding) in enumerate(zip(keys, encodings, strict=True)):
            context[row, : len(key)] = encoding
            self._remember(key, encoding)
        return context.to(tokens.device)

    def _remember(self, key: tuple[int, ...], encoding: Tensor) -> None:
        self._encodings[key] = encoding
        self._encodings.move_to_end(key)
        if len(self._encodings) > self.size:
            self._encodings.popitem(last=False)
