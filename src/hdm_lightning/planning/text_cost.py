"""What a frozen text encoder costs: parameters, operations, memory traffic and peak memory in closed form.

Shapes: L tokens, D width, Q and K query and key widths, M hidden width of the feed-forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PLAIN_FEED_FORWARD = frozenset(
    {"bert", "mpnet", "roberta", "xlm-roberta", "distilbert", "albert", "gpt2", "clip_text_model"}
)
"""Architectures whose feed-forward has one inner matrix instead of a gated pair."""


@dataclass(frozen=True)
class TextArchitecture:
    """The sizes of a transformer language model.

    Attributes:
        layers: blocks.
        width: D.
        heads, key_value_heads, head_dim: of the attention.
        hidden: M.
        vocabulary: rows of the embedding.
        gated: whether the feed-forward is a gated pair (three matrices) or plain (two).
    """

    layers: int
    width: int
    heads: int
    key_value_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    gated: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TextArchitecture":
        """From a transformers ``config.json``, that of a composite model included.

        Raises:
            ValueError: a size is missing.
        """
        config = config.get("text_config") or config
        missing = [key for key in ("hidden_size", "num_hidden_layers", "num_attention_heads") if key not in config]
        if missing:
            raise ValueError(f"config lacks {', '.join(missing)}; expected a transformers text model's config.json")
        width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return cls(
            layers=int(config["num_hidden_layers"]),
            width=width,
            heads=heads,
            key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or width // heads),
            hidden=int(config.get("intermediate_size") or 4 * width),
            vocabulary=int(config.get("vocab_size") or 0),
            gated=config.get("model_type") not in PLAIN_FEED_FORWARD,
        )

    @property
    def parameters(self) -> int:
        """Matrices only; norms and biases are below a thousandth."""
        return self.vocabulary * self.width + self.layers * self._matrices

    @property
    def _attention_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def _key_width(self) -> int:
        return self.key_value_heads * self.head_dim

    @property
    def _matrices(self) -> int:
        attention = self.width * (2 * self._attention_width + 2 * self._key_width)
        return attention + (3 if self.gated else 2) * self.width * self.hidden

    def flops(self, tokens: int) -> int:
        """Operations for one caption of ``tokens`` tokens; attention counted in full, masked or not."""
        return self.layers * (2 * tokens * self._matrices + 4 * tokens**2 * self._attention_width)

    def traffic_bytes(self, tokens: int, element_bytes: int = 2) -> int:
        """Bytes that the operations between matrix products move: two norms, two sums, the rotation, the gate."""
        elements = (4 + 6) * self.width + 4 * (self._attention_width + self._key_width) + 3 * self.hidden
        return self.layers * tokens * elements * element_bytes

    def peak_bytes(self, tokens: int, element_bytes: int = 2) -> int:
        """Most bytes of one caption alive at once without gradients.

        That is in the feed-forward (both halves and their product) or while the queries are rotated (the rotated
        ones, their two terms and what these are made of), beside the residual and its norm.
        """
        feed_forward = 3 * self.hidden + 3 * self.width
        attention = 2 * self.width + 5 * self._attention_width + 2 * self._key_width
        return tokens * max(feed_forward, attention) * element_bytes
