"""Captions of near lengths side by side: micro-batches of an optimizer step that are padded to few lengths, not to one.

Which samples a step is made of stays as it is; only which of its micro-batches a sample falls into follows from the
length of its caption.
"""

from collections.abc import Sequence
from typing import Literal

from hdm_lightning.errors import UserError

TextLengths = Literal["auto", "padded", "bucketed"] | Sequence[int]

LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Token places that captions are padded to; every one may cost a compiled network a graph for each kind of block."""

SORTED_BYTES = 512 << 20
"""Pixels that wait to be sorted; as many again wait to be given out."""


def padded_lengths(wanted: TextLengths, context_length: int, *, accelerated: bool) -> tuple[int, ...]:
    """The lengths that captions are padded to, rising up to the context length; none where all have that length.

    Args:
        wanted: `padded` for the context length alone; `bucketed` for `LENGTHS`, or lengths of one's own; `auto` for
            `bucketed` on an accelerator and `padded` on a CPU, whose results so stay bit for bit what they were.
        context_length: token places of a caption, at most.
        accelerated: whether the training runs on an accelerator.

    Raises:
        UserError: another word, or a length below 1.
    """
    if isinstance(wanted, str):
        if wanted not in ("auto", "padded", "bucketed"):
            hint = "choose auto, padded or bucketed, or list lengths, e.g. [64,128]"
            raise UserError(f"is {wanted!r}", where="data.text_lengths", hint=hint)
        if wanted == "padded" or (wanted == "auto" and not accelerated):
            return ()
        wanted = LENGTHS
    if not all(isinstance(each, int) and each >= 1 for each in wanted):
        raise UserError(f"is {list(wanted)}", where="data.text_lengths", hint="give whole numbers of 1 or more")
    return (*sorted({each for each in wanted if each < context_length}), context_length)


def batches_sorted_together(accumulation: int, batch_bytes: int) -> int:
    """How many of the micro-batches of a step are made of one sorted group: a divisor of `accumulation`.

    Args:
        accumulation: micro-batches of a step on one rank.
        batch_bytes: pixels of a micro-batch.
    """
    affordable = (each for each in range(accumulation, 1, -1) if each * batch_bytes <= SORTED_BYTES)
    return next((each for each in affordable if accumulation % each == 0), 1)
