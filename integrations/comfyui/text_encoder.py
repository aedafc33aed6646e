"""A transformers text encoder as ComfyUI's CLIP, which reads prompts like hdm-sample.

Shapes: L tokens, D width.
"""

import copy
import logging
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from hdm_lightning.encoders.base import TextEncoder
from hdm_lightning.encoders.tokenizer import CaptionTokenizer
from hdm_lightning.errors import UserError

from .model import Held, patcher_of

TOKENS = "hdm"
"""Key of the tokens: one list of (id, weight) for each prompt."""


class TextClip(comfy.sd.CLIP):
    """CLIP for CLIPTextEncode and similar nodes.

    A prompt is plain text: parentheses do not weight it, and a prompt longer than the model's context is cut, which is
    logged.
    """

    def __init__(self, encoder: TextEncoder, tokenizer: CaptionTokenizer) -> None:
        super().__init__(no_init=True)
        self.encoder, self.caption_tokenizer = encoder, tokenizer
        self.cond_stage_model = Held(encoder.model)
        self.patcher = patcher_of(
            self.cond_stage_model,
            comfy.model_management.text_encoder_device(),
            comfy.model_management.text_encoder_offload_device(),
        )
        self.tokenizer, self.tokenizer_options, self.layer_idx = tokenizer, {}, None
        self.use_clip_schedule, self.apply_hooks_to_conds = False, None

    def clone(self) -> "TextClip":
        """Return a copy with patches of its own."""
        other = copy.copy(self)
        other.patcher = self.patcher.clone()
        return other

    def clip_layer(self, layer_idx: int) -> None:
        """Raise UserError: the model records the layer it was trained with."""
        what = "the model was trained with one hidden state of its text encoder, and records which"
        raise UserError(what, where="clip", hint="remove the node that sets the layer")

    def tokenize(self, text: str, return_word_ids: bool = False, **_later: Any) -> dict[str, Any]:
        """Return a prompt's tokens, cut to the model's context."""
        if notice := self.cut_off(text):
            logging.warning(f"hdm-lightning: {notice}")
        ids, count = self.caption_tokenizer(text)
        return {TOKENS: [[(number, 1.0) for number in ids[:count]]]}

    def cut_off(self, text: str) -> str | None:
        """Return a message about how much of a prompt exceeds the model's context; None if it fits."""
        context, tokenizer = self.caption_tokenizer.context_length, self.caption_tokenizer.tokenizer.transformers
        found = len(tokenizer(text)["input_ids"])
        if found <= context:
            return None
        return f"{text[:40]!r}… has {found} tokens, but the model reads {context}: the last {found - context} are cut"

    def encode_from_tokens(self, tokens: dict[str, Any], return_pooled: Any = False, return_dict: bool = False) -> Any:
        """Return the states (1, L, D) of the tokens."""
        if TOKENS not in tokens:
            raise UserError("tokens are from another CLIP", where="clip", hint="use the CLIP of HDM Load Model")
        states = self._states([number for number, *_ in tokens[TOKENS][0]])
        if return_dict:
            return {"cond": states, "pooled_output": None}
        return (states, None) if return_pooled else states

    def encode_from_tokens_scheduled(
        self, tokens: dict[str, Any], unprojected: bool = False, add_dict: dict[str, Any] | None = None, **_later: Any
    ) -> list[Any]:
        """Return a conditioning with one entry."""
        return [[self.encode_from_tokens(tokens), {"pooled_output": None, **(add_dict or {})}]]

    def encode(self, text: str) -> Tensor:
        """Return the states (1, L, D) of a prompt."""
        return self.encode_from_tokens(self.tokenize(text))

    def load_model(self) -> Any:
        """Move the text encoder to its device."""
        comfy.model_management.load_model_gpu(self.patcher)
        return self.patcher

    def _states(self, ids: list[int]) -> Tensor:
        self.load_model()
        device = self.patcher.load_device
        tokens, lengths = torch.tensor([ids], device=device), torch.tensor([len(ids)], device=device)
        states = self.encoder.encode(tokens, lengths).float()
        return states.to(comfy.model_management.intermediate_device())
