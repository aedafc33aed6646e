"""Any transformers model as a frozen text encoder: one hidden state per token, padding without influence.

Shapes: B batch, L tokens.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from annotated_types import Ge
from torch import Tensor, nn

from hdm_lightning.encoders.base import TextEncoder, place
from hdm_lightning.encoders.caches import CachedTextEncoder
from hdm_lightning.encoders.pretrained import (
    UNREADABLE,
    locate_model,
    read_transformer,
    read_transformer_config,
    readable,
    require_finite_model,
)
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError, first_line, sibling_key
from hdm_lightning.precision import parse_dtype

MAX_TOKENS = 65_536
"""256 captions of 256 tokens: 1.8 GiB in Qwen3-0.6B in bfloat16."""

MODEL_FILES = ["config.json", "*.safetensors|*.bin"]
MODEL_DOWNLOAD = ["*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja"]

# Where composite models keep the part that reads text.
TEXT_TOWERS = ("text_model", "language_model")

CAUSAL = ("qwen2", "qwen3", "gemma3_text")
"""Architectures that take a mask for each kind of layer, and none as the plain causal one."""

# Field of a model's configuration: its later blocks are cut off, so that its result is the output of the last block.
_CUT = "hidden_state_of_last_block"


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

    A causal language model gives its base model's final hidden state, its unidirectional attention kept; a
    bidirectional one its last hidden state; of an encoder–decoder only the encoder is used.

    Args:
        name: folder, hub name `OWNER/NAME`, or `package:NAME/FOLDER` for an installed Python package.
        dtype: dtype of the weights, the computation (also under autocast) and the result; `auto` follows
            the device that the encoder is moved to: bfloat16 on CUDA that has it, else float32.
        layer: which hidden state, numbered as in transformers: −1 the final one (after the final norm),
            −2 the output of the last block but one, k > 0 the output of block k (of the last block: after the
            final norm). Later blocks are dropped.
        max_tokens: of the captions encoded at once, together, padding included; one caption always is.
        cache_size: captions whose encodings are remembered in RAM; 0 remembers none.
        where: configuration key to name in errors.

    Raises:
        UserError: if the model cannot be had or read, or has no such layer.
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
        model: returns `last_hidden_state` from `input_ids` and `attention_mask`; `cut_after` chooses another state.
        tokenizer: of the model; None where tokens come from elsewhere.
        max_tokens: of the captions encoded at once, together, padding included; one caption always is.
        auto: whether `to` also casts the weights to what suits the device.
        fingerprint: gives the model's; None hashes the weights as they are in memory.
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
        self._fingerprint = fingerprint or partial(_weights_fingerprint, self.model)

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
        """See `fingerprint_of`; takes a second for each gigabyte of weights."""
        return self._fingerprint()

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

        Lengths on the CPU are looked at: captions are taken in order of length, so that a part carries little padding.
        Lengths on a device, which would have to be waited for, are not: captions are encoded as they are padded.
        """
        # A model that accelerate offloads fetches its weights to the tokens, wherever they lie now.
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
        """Compile each block by itself, for the shapes that come; blocks that are alike share a graph."""
        # The output of the last block of a model that was cut is read by a hook, anew at every call.
        blocks = list(_blocks(self.model) or ())
        for block in blocks[: -1 if getattr(self.model.config, _CUT, False) else None]:
            block.compile(dynamic=False)

    def _encode_as_padded(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Without a look at any value, in parts of as many rows each as there can be."""
        length = tokens.shape[1]
        mask = torch.arange(length, device=tokens.device) < lengths.unsqueeze(1)
        unmasked = no_masks(self.model.config, length)
        rows = max(1, self.max_tokens // length)
        hidden = [
            self._hidden(each, which.long() if unmasked is None else unmasked)
            for each, which in zip(tokens.split(rows), mask.split(rows), strict=True)
        ]
        return torch.cat(hidden).masked_fill(~mask.unsqueeze(-1), 0)

    def _parts(self, counts: list[int]) -> Iterator[list[int]]:
        """Rows to encode at once, the longest captions first."""
        order = sorted(range(len(counts)), key=counts.__getitem__, reverse=True)
        while order:
            size = max(1, self.max_tokens // counts[order[0]])
            yield order[:size]
            order = order[size:]

    def _hidden(self, tokens: Tensor, mask: Any) -> Tensor:
        """Hidden states of tokens (B,L); the mask is what transformers takes for one."""
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
    """Width of a text encoder's hidden states, from its configuration file alone.

    Raises:
        UserError: there is none, or transformers cannot read its configuration.
    """
    folder = locate_model(name, where=where, required=MODEL_FILES)
    try:
        width = int(read_transformer_config(folder).get_text_config().hidden_size)
    except (*UNREADABLE, AttributeError) as error:
        raise UserError(
            f"transformers cannot read the configuration of a text encoder from {folder} ({first_line(error)})",
            where=where,
            hint="give a folder written by save_pretrained, of an architecture that transformers knows",
        ) from error
    return width


def text_fingerprint(name: str, layer: int = -1, *, where: str = "text_encoder.name") -> str:
    """SHA-256, 32 hexadecimal digits, of the files of a text encoder's weights and of which hidden state is taken.

    Raises UserError: the model cannot be had.
    """
    folder = locate_model(name, where=where, required=MODEL_FILES, download=MODEL_DOWNLOAD)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = hashlib.sha256(f"layer {layer}\n".encode())
    for path in (folder / "config.json", *files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _weights_fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data.cast("B"))
    return digest.hexdigest()[:32]


def no_masks(config: Any, length: int) -> dict[str, None] | None:
    """In place of a mask for captions padded on the right to `length`, what makes a causal model use none.

    No token of a causal model sees what is behind it, so that padding there has no part in any other state. A mask
    would shut out the fastest kernel, and transformers would wait for the device to find out whether it masks anything.
    None for a model that needs one, or that is not known not to.
    """
    known = config.model_type in CAUSAL and config._attn_implementation == "sdpa"
    if not known or getattr(config, "use_bidirectional_attention", False):
        return None
    kinds = set(config.layer_types)
    if "sliding_attention" in kinds and length > config.sliding_window:
        return None
    return dict.fromkeys(kinds)


def read_text_model(name: str, dtype: torch.dtype, *, where: str) -> nn.Module:
    """The whole transformers model of a name, or the part of it that turns tokens into hidden states.

    Raises UserError: it cannot be had or read.
    """
    folder = locate_model(name, where=where, required=MODEL_FILES, download=MODEL_DOWNLOAD)
    model = _text_tower(_read_model(folder, dtype, where))
    require_finite_model(model, str(folder), where)
    return model


def cut_after(model: Any, layer: int, *, where: str = "text_encoder.name") -> nn.Module:
    """The model with the blocks after hidden state `layer` dropped, in place; unchanged if that was done before.

    `layer` counts as in `load_text_encoder`. Raises UserError: there is no such layer.
    """
    if layer == -1 or getattr(model.config, _CUT, False):
        return model
    depth = int(model.config.num_hidden_layers)
    kept = layer if layer > 0 else depth + 1 + layer
    blocks = _blocks(model)
    if not 1 <= kept <= depth or blocks is None:
        raise UserError(
            f"layer {layer} was asked for, and the model has {depth} blocks",
            where=sibling_key(where, "layer"),
            hint=f"choose −1 (final hidden state), −2 … −{depth}, or 1 … {depth}",
        )
    if kept < depth:
        del blocks[kept:]
        model.config.update({"num_hidden_layers": kept, _CUT: True})
        if getattr(model.config, "layer_types", None):  # of each block, in newer architectures
            model.config.layer_types = list(model.config.layer_types[:kept])
    return model


def _blocks(model: Any) -> Any:
    """The list of a transformers model's blocks, None if it has no such list."""
    depth = int(model.config.num_hidden_layers)
    return next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)


def _read_model(folder: Path, dtype: torch.dtype, where: str) -> nn.Module:
    hint = "give a folder written by save_pretrained, of an architecture that transformers knows"
    with readable("transformers cannot read a model", folder, where=where, hint=hint), _quiet_transformers():
        return read_transformer(folder, dtype=dtype)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bar, and no report of the output layer that is left out on purpose."""
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
    """The part of a transformers model that turns tokens into hidden states."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    for name in TEXT_TOWERS:
        if isinstance(tower := getattr(model, name, None), nn.Module):
            return tower
    return model
