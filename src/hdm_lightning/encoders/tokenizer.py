"""Captions to padded token ids, in any process."""

from typing import Any, Self

from hdm_lightning.encoders.pretrained import locate_model, read_tokenizer, readable

TOKENIZER_FILES = ["tokenizer_config.json|tokenizer.json|vocab.txt|*.model"]
TOKENIZER_DOWNLOAD = ["*.json", "*.txt", "*.model", "*.jinja"]
REMEMBERED = 20_000
"""Captions cached: all of a small set, a few of a large one, in bounded memory."""
LONGEST_REMEMBERED = 2_000
"""Characters of the longest caption cached."""


class Tokenizer:
    """A text encoder's vocabulary; `bind` makes it a function of a caption.

    Cheap to construct and to pickle: each process reads the vocabulary on first use.

    Args:
        name: as for `load_text_encoder`.
        loaded: the transformers tokenizer, if already loaded.
        where: configuration key to name in errors.
    """

    def __init__(self, name: str, *, loaded: Any = None, where: str = "text_encoder.name") -> None:
        self.name = name
        self.where = where
        self._loaded = loaded

    def __getstate__(self) -> dict[str, Any]:
        # Without a name it could not be read again.
        return {**self.__dict__, "_loaded": None} if self.name else self.__dict__

    @property
    def transformers(self) -> Any:
        """The transformers tokenizer. Raises UserError: its files are not available."""
        if self._loaded is None:
            folder = locate_model(self.name, where=self.where, required=TOKENIZER_FILES, download=TOKENIZER_DOWNLOAD)
            hint = "use a folder with tokenizer.json and tokenizer_config.json"
            with readable("transformers cannot read a tokenizer", folder, where=self.where, hint=hint):
                self._loaded = read_tokenizer(folder)
        return self._loaded

    def load(self) -> Self:
        """Read the vocabulary now, so a missing one is reported before training starts."""
        assert self.transformers is not None
        return self

    def bind(self, context_length: int) -> "CaptionTokenizer":
        """Return a function from a caption to `context_length` token ids."""
        return CaptionTokenizer(self, context_length)


class CaptionTokenizer:
    """Maps a caption to `context_length` token ids (at least 1), truncated or padded on the right; can be pickled."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        if context_length < 1:
            raise ValueError(f"context_length: got {context_length}, expected at least 1")
        self.tokenizer = tokenizer
        self.context_length = context_length
        self._remembered: dict[str, tuple[list[int], int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_remembered": {}}

    def __call__(self, caption: str) -> tuple[list[int], int]:
        """Tokenize one caption.

        Returns:
            `context_length` ids, and how many of them count: at least 1, as a caption without any token
            becomes one padding token.

        Raises:
            UserError: the tokenizer's files are not available.
        """
        known = self._remembered.get(caption)
        if known is None:
            known = self._tokenize(caption)
            if len(self._remembered) < REMEMBERED and len(caption) <= LONGEST_REMEMBERED:
                self._remembered[caption] = known
        return known

    def left_out(self, caption: str) -> tuple[int, str]:
        """Return how many tokens of a caption do not fit, and their text."""
        if self(caption)[1] < self.context_length:
            return 0, ""
        tokenizer = self.tokenizer.transformers
        whole = tokenizer(_characters(caption), truncation=False, verbose=False)["input_ids"]
        beyond = len(whole) - self.context_length
        if beyond <= 0:
            return 0, ""
        return beyond, str(tokenizer.decode(whole[-beyond:], skip_special_tokens=True)).strip()

    def _tokenize(self, caption: str) -> tuple[list[int], int]:
        tokenizer = self.tokenizer.transformers
        caption = _characters(caption)
        ids = tokenizer(caption, truncation=True, max_length=self.context_length)["input_ids"]
        padding = next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        return ids + [padding] * (self.context_length - len(ids)), max(1, len(ids))


def _characters(caption: str) -> str:
    """Replace lone surrogates, which JSON can escape but which are not characters."""
    return caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
