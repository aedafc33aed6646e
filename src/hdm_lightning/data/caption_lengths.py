"""Batching captions by length: the micro-batches of an optimizer step are padded to a few lengths instead of one.

The samples of a step stay the same; the caption length only decides which of its micro-batches a sample goes into.
"""

from collections.abc import Sequence
from typing import Literal

from hdm_lightning.errors import UserError

TextLengths = Literal["auto", "padded", "bucketed"] | Sequence[int]

LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Token counts that captions are padded to; each may cost a compiled network one more graph per kind of block."""

SORTED_BYTES = 512 << 20
"""Bytes of pixels buffered for sorting; as many again wait to be yielded."""


def padded_lengths(wanted: TextLengths, context_length: int, *, accelerated: bool) -> tuple[int, ...]:
    """Return the lengths that captions are padded to, ascending to the context length; empty if that is the only one.

    Args:
        wanted: `padded` for the context length alone; `bucketed` for `LENGTHS`, or a list of lengths; `auto` for
            `bucketed` on an accelerator and `padded` on a CPU, where results stay bit-identical that way.
        context_length, accelerated: of the training.

    Raises:
        UserError: the word is unknown, or a length is below 1.
    """
    if isinstance(wanted, str):
        if wanted not in ("auto", "padded", "bucketed"):
            hint = "choose auto, padded or bucketed, or list lengths, e.g. [64,128]"
            raise UserError(f"is {wanted!r}", where="data.text_lengths", hint=hint)
        if wanted == "padded" or (wanted == "auto" and not accelerated):
            return ()
        wanted = LENGTHS
    if not all(isinstance(each, int) and each >= 1 for each in wanted):
        raise UserError(f"is {list(wanted)}", where="data.text_lengths", hint="list whole numbers of 1 or more")
    return (*sorted({each for each in wanted if each < context_length}), context_length)


def batches_sorted_together(accumulation: int, batch_bytes: int) -> int:
    """Return how many of a step's `accumulation` micro-batches on a rank are made from one sorted group: a divisor.

    Each micro-batch has `batch_bytes` bytes of pixels or latents.
    """
    affordable = (each for each in range(accumulation, 1, -1) if each * batch_bytes <= SORTED_BYTES)
    return next((each for each in affordable if accumulation % each == 0), 1)
