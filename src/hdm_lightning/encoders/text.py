"""Any transformers model as a frozen text encoder: one hidden state per token, unaffected by padding.

Shapes: B batch, L tokens.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Annotated, Any, Self

import torch
from annotated_types import Ge
from torch import Tensor, nn

from hdm_lightning.encoders.base import TextEncoder, hash_of, place
from hdm_lightning.encoders.caches import CachedTextEncoder
from hdm_lightning.encoders.pretrained import (
    locate_model,
    read_transformer,
    read_transformer_config,
    readable,
    require_finite_model,
)
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError, sibling_key
from hdm_lightning.precision import parse_dtype

MAX_TOKENS = 65_536
"""256 captions of 256 tokens: 1.8 GiB in Qwen3-0.6B in bfloat16."""

MODEL_FILES = ["config.json", "*.safetensors|*.bin"]
MODEL_DOWNLOAD = ["*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja"]

# Attributes of composite models that hold the text part.
TEXT_TOWERS = ("text_model", "language_model")

CAUSAL = ("qwen2", "qwen3", "gemma3_text")
"""Architectures that take a mask for each kind of layer, where None means the plain causal mask."""
BIDIRECTIONAL = ("bert",)
"""Architectures that take a mask (B,1,1,L) as it is; transformers reads one of (B,L) on the host."""

# Field of a model's configuration: later blocks were dropped, so the result is the raw output of the last block left.
_CUT = "hidden_state_of_last_block"
_HINT = "use a folder written by save_pretrained, of an architecture that transformers knows"


def load_text_encoder(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    layer: int = -1,
    max_tokens: Annotated[int, Ge(1)] = MAX_TOKENS,
    cache_size: int = 0,
    where: str = "text_encoder.name",
) -> TextEncoder:
    """Load a frozen text encoder, with its tokenizer, on the CPU.

    Causal and bidirectional models return the last hidden state of the base model, with their own kind of attention;
    of an encoder–decoder only the encoder is used.

    Args:
        name: folder, hub name `OWNER/NAME`, or `package:NAME/FOLDER` for an installed Python package.
        dtype: dtype of the weights, the computation (also under autocast) and the result; `auto` follows
            the device that the encoder is moved to: bfloat16 on CUDA that has it, else float32.
        layer: index of the hidden state, as in transformers: −1 is the final one (after the final norm),
            −2 the output of the second to last block, k > 0 the output of block k (of the last block: after the
            final norm). Later blocks are dropped.
        max_tokens: total tokens of the captions encoded at once, padding included; a longer caption goes alone.
        cache_size: number of captions whose encodings are cached in RAM; 0 turns the cache off.
        where: configuration key to name in errors.

    Raises:
        UserError: the model is not available or cannot be read, or has no such layer.
    """
    chosen = parse_dtype(dtype, where=sibling_key(where, "dtype"))
    model = cut_after(read_text_model(name, chosen or torch.float32, where=where), layer, where=where)
    tokenizer = Tokenizer(name, where=where)
    own = partial(text_fingerprint, name, layer, where=where)
    encoder = TransformersTextEncoder(model, tokenizer, max_tokens=max_tokens, auto=chosen is None, fingerprint=own)
    return CachedTextEncoder(encoder, cache_size) if cache_size else encoder


class TransformersTextEncoder:
    """A frozen transformers model behind the `TextEncoder` protocol; see `load_text_encoder`.

    Args:
        model: returns `last_hidden_state` from `input_ids` and `attention_mask`; `cut_after` selects another state.
        tokenizer: the model's tokenizer; None if tokens come from elsewhere.
        max_tokens: total tokens of the captions encoded at once, padding included; a longer caption goes alone.
        auto: whether `to` also casts the weights to the dtype that suits the device.
        fingerprint: computes the model's fingerprint; None hashes the weights in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        auto: bool = False,
        fingerprint: Callable[[], str] | None = None,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
        self.model: Any = model.eval().requires_grad_(False)
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._auto = auto
        self._own_fingerprint = fingerprint

    @property
    def width(self) -> int:
        """Size of one token's vector."""
        return int(self.model.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and result."""
        return next(self.model.parameters()).dtype

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint_of`; takes a second per gigabyte of weights."""
        own = self._own_fingerprint
        return hash_of(sorted(self.model.state_dict().items())) if own is None else own()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        if self._tokenizer is None:
            raise AttributeError("this text encoder was built without a tokenizer")
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def to(self, device: torch.device | str) -> Self:
        """Move the weights to a device."""
        place(self.model, device, auto=self._auto)
        return self

    @torch.no_grad()
    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Encode captions; see `TextEncoder.encode`.

        With lengths on the CPU, captions are sorted by length, so each part has little padding. Lengths on a device
        are not read, as the host would have to wait for them: captions are encoded as they are padded.
        """
        # A model that accelerate offloads moves its weights to the tokens' device.
        offloaded = hasattr(self.model, "_hf_hook")
        device = tokens.device if offloaded else next(self.model.parameters()).device
        if lengths.device.type != "cpu":
            return self._encode_as_padded(tokens.to(device), lengths.to(device)).to(tokens.device)
        counts = _checked_counts(tokens, lengths)
        context = torch.zeros(*tokens.shape, self.width, dtype=self.dtype, device=tokens.device)
        for rows in self._parts(counts):
            longest = counts[rows[0]]
            count = torch.tensor([counts[row] for row in rows], device=device)
            mask = torch.arange(longest, device=device) < count[:, None]
            hidden = self._hidden(tokens[rows, :longest].to(device), mask.long()) * mask[..., None]
            context[rows, :longest] = hidden.to(context)
        return context

    def compile_blocks(self) -> None:
        """Compile each block separately, for each input shape; identical blocks share a graph."""
        # In a model that was cut, a new hook at every call reads the output of the last block.
        blocks = list(_blocks(self.model) or ())
        for block in blocks[: -1 if getattr(self.model.config, _CUT, False) else None]:
            block.compile(dynamic=False)

    def _encode_as_padded(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Encode without reading any value on the host, in parts of as many rows as `max_tokens` allows."""
        length = tokens.shape[1]
        mask = torch.arange(length, device=tokens.device) < lengths.unsqueeze(1)
        unmasked, as_it_is = no_masks(self.model.config, length), takes_ready_mask(self.model.config)
        given = mask[:, None, None] if as_it_is else mask.long()
        rows = max(1, self.max_tokens // length)
        hidden = [
            self._hidden(each, which if unmasked is None else unmasked)
            for each, which in zip(tokens.split(rows), given.split(rows), strict=True)
        ]
        return torch.cat(hidden).masked_fill(~mask.unsqueeze(-1), 0)

    def _parts(self, counts: list[int]) -> Iterator[list[int]]:
        """Yield the rows to encode at once, the longest captions first."""
        order = sorted(range(len(counts)), key=counts.__getitem__, reverse=True)
        while order:
            size = max(1, self.max_tokens // counts[order[0]])
            yield order[:size]
            order = order[size:]

    def _hidden(self, tokens: Tensor, mask: Any) -> Tensor:
        """Return the hidden states of tokens (B,L); `mask` is passed to transformers as `attention_mask`."""
        arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "return_dict": True}
        if getattr(self.model.config, "use_cache", False):
            arguments["use_cache"] = False
        with torch.autocast(tokens.device.type, enabled=False):
            if not getattr(self.model.config, _CUT, False):
                return self.model(**arguments).last_hidden_state
            outputs: list[Any] = []
            last = _blocks(self.model)[-1]
            handle = last.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
            try:
                self.model(**arguments)
            finally:
                handle.remove()
        return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def text_width(name: str, *, where: str = "text_encoder.name") -> int:
    """Return the width of a text encoder's hidden states, from its configuration file alone.

    Raises:
        UserError: there is no such model, or transformers cannot read its configuration.
    """
    folder = locate_model(name, where=where, required=MODEL_FILES)
    reading = "transformers cannot read the configuration of a text encoder"
    with readable(reading, folder, where=where, hint=_HINT):
        return int(read_transformer_config(folder).get_text_config().hidden_size)


def text_fingerprint(name: str, layer: int = -1, *, where: str = "text_encoder.name") -> str:
    """Return the SHA-256, 32 hexadecimal digits, of a text encoder's configuration, weights files and layer.

    Raises UserError: the model is not available.
    """
    folder = locate_model(name, where=where, required=MODEL_FILES, download=MODEL_DOWNLOAD)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = hashlib.sha256(f"layer {layer}\n".encode())
    for path in (folder / "config.json", *files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def no_masks(config: Any, length: int) -> dict[str, None] | None:
    """Return the `attention_mask` that makes a causal model use no mask for captions padded on the right to `length`.

    No token of a causal model sees later ones, so padding on the right affects no other state. A mask would rule out
    the fastest kernel, and transformers would wait for the device to find out whether it masks anything.
    None for a model that needs a mask, or is not known to do without.
    """
    known = config.model_type in CAUSAL and config._attn_implementation == "sdpa"
    if not known or getattr(config, "use_bidirectional_attention", False):
        return None
    kinds = set(config.layer_types)
    if "sliding_attention" in kinds and length > config.sliding_window:
        return None
    return dict.fromkeys(kinds)


def takes_ready_mask(config: Any) -> bool:
    """Return whether a bidirectional model is known to use a boolean mask (B,1,1,L) without reading it on the host."""
    known = config.model_type in BIDIRECTIONAL and config._attn_implementation == "sdpa"
    return known and not getattr(config, "is_decoder", False)


def read_text_model(name: str, dtype: torch.dtype, *, where: str) -> nn.Module:
    """Load a transformers model, or the part of it that turns tokens into hidden states.

    Raises UserError: it is not available or cannot be read.
    """
    folder = locate_model(name, where=where, required=MODEL_FILES, download=MODEL_DOWNLOAD)
    with readable("transformers cannot read a model", folder, where=where, hint=_HINT), _quiet_transformers():
        model = _text_tower(read_transformer(folder, dtype=dtype))
    require_finite_model(model, str(folder), where)
    return model


def cut_after(model: Any, layer: int, *, where: str = "text_encoder.name") -> nn.Module:
    """Drop the blocks after hidden state `layer` in place, unless that was done before, and return the model.

    `layer` counts as in `load_text_encoder`. Raises UserError: there is no such layer.
    """
    if layer == -1 or getattr(model.config, _CUT, False):
        return model
    depth = int(model.config.num_hidden_layers)
    kept = layer if layer > 0 else depth + 1 + layer
    blocks = _blocks(model)
    if not 1 <= kept <= depth or blocks is None:
        raise UserError(
            f"layer {layer} was requested, but the model has {depth} blocks",
            where=sibling_key(where, "layer"),
            hint=f"choose −1 (final hidden state), −2 … −{depth}, or 1 … {depth}",
        )
    if kept < depth:
        del blocks[kept:]
        model.config.update({"num_hidden_layers": kept, _CUT: True})
        if getattr(model.config, "layer_types", None):  # one per block, in newer architectures
            model.config.layer_types = list(model.config.layer_types[:kept])
    return model


def _blocks(model: Any) -> Any:
    """Return the list of a transformers model's blocks, or None if it has no such list."""
    depth = int(model.config.num_hidden_layers)
    return next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the progress bar, and the report about the output layer, which is left out on purpose."""
    from transformers.utils import logging  # noqa: PLC0415

    bar_was_on, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar_was_on:
            logging.enable_progress_bar()


def _checked_counts(tokens: Tensor, lengths: Tensor) -> list[int]:
    if tokens.dim() != 2 or lengths.shape != tokens.shape[:1]:
        shapes = f"{tuple(tokens.shape)}, {tuple(lengths.shape)}"
        raise ValueError(f"tokens, lengths: got shapes {shapes}, expected (B, L), (B,)")
    counts: list[int] = lengths.tolist()
    if counts and not 1 <= min(counts) <= max(counts) <= tokens.shape[1]:
        raise ValueError(f"lengths: got {min(counts)} … {max(counts)}, expected 1 … {tokens.shape[1]}")
    return counts


def _text_tower(model: Any) -> nn.Module:
    """Return the part of a transformers model that turns tokens into hidden states."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    for name in TEXT_TOWERS:
        if isinstance(tower := getattr(model, name, None), nn.Module):
            return tower
    return model
