"""Captions to padded token ids, in whichever process needs them."""

from typing import Any

from hdm_lightning.encoders.pretrained import UNREADABLE, read_tokenizer
from hdm_lightning.encoders.sources import locate_model
from hdm_lightning.errors import UserError

TOKENISER_FILES = ["tokenizer_config.json|tokenizer.json|vocab.txt|*.model"]
# Captions of small sets come back; of large sets a few are kept, in memory that does not grow.
REMEMBERED = 20_000
TOKENISER_DOWNLOAD = ["*.json", "*.txt", "*.model", "*.jinja"]


class Tokenizer:
    """A caption's token ids, truncated and padded on the right to a fixed context length.

    Cheap to construct and to pickle: the vocabulary is read on first use in each process, so data workers may
    receive it as an argument.

    Args:
        name_or_path: as for `load_text_encoder`.
        context_length: length of every row, at least 1.
        where: configuration key to name in errors.
    """

    def __init__(self, name_or_path: str, context_length: int, *, where: str = "text_encoder.name") -> None:
        if context_length < 1:
            raise ValueError(f"context_length: got {context_length}, expected at least 1")
        self.name_or_path = name_or_path
        self.context_length = context_length
        self.where = where
        self._loaded: Any = None
        self._remembered: dict[str, tuple[list[int], int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None, "_remembered": {}}

    def __call__(self, caption: str) -> tuple[list[int], int]:
        """Tokenize one caption.

        Returns:
            `context_length` ids, and how many of them count: at least 1, as a caption without any token
            becomes one padding token.

        Raises:
            UserError: if the tokenizer's files cannot be had.
        """
        known = self._remembered.get(caption)
        if known is None:
            known = self._tokenize(caption)
            if len(self._remembered) < REMEMBERED:
                self._remembered[caption] = known
        return known

    def _tokenize(self, caption: str) -> tuple[list[int], int]:
        tokenizer = self._tokenizer()
        ids = tokenizer(caption, truncation=True, max_length=self.context_length)["input_ids"]
        length = max(1, len(ids))
        return ids + [self._padding_id()] * (self.context_length - len(ids)), length

    def load(self) -> "Tokenizer":
        """Read the vocabulary now, so that a missing one is told before training starts."""
        self._tokenizer()
        return self

    def _tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = _load(self.name_or_path, self.where)
        return self._loaded

    def _padding_id(self) -> int:
        tokenizer = self._tokenizer()
        for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0


def _load(name_or_path: str, where: str) -> Any:
    folder = locate_model(name_or_path, where=where, required=TOKENISER_FILES, download=TOKENISER_DOWNLOAD)
    try:
        return read_tokenizer(folder)
    except UNREADABLE as error:
        raise UserError(
            f"transformers cannot read a tokenizer from {folder} ({error})",
            where=where,
            hint="give a folder with tokenizer.json and tokenizer_config.json",
        ) from error
