"""Text-encoder states on disk: what a text encoder gives of captions, computed once, found again by their token ids.

A folder holds, for each shard that was read, the states of the captions that it was the first to have, end to end; and
one table over all of them. A caption's key is a hash of its token ids, so that the same caption in many samples takes
up room once, and so does one that two context lengths leave whole.

Shapes: N captions, T tokens of all captions of a piece, B batch, L token places, W width of the text encoder.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import write_atomically, write_json

FORMAT_NAME, KEYS_NAME, ROWS_NAME = "text_states.json", "keys.npy", "rows.npy"
STATES, FOUND = ".states.npy", ".found.npy"
COMMAND = "hdm-shards encode-captions"

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_AS_STORED: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
}  # numpy has no bfloat16

Rows = NDArray[np.int64]
"""(N, 4): both halves of a key, first token in the piece, tokens; in the table a piece's number in place of a half."""


@dataclass(frozen=True)
class TextFormat:
    """What the states of a folder have in common.

    Attributes:
        text_encoder: fingerprint of what gave them.
        width: W.
        dtype: `float32`, `float16` or `bfloat16`.
        context_lengths: that captions were cut to.
        name: what the text encoder was called, for messages; formats that differ in it alone are equal.
    """

    text_encoder: str
    width: int
    dtype: str
    context_lengths: tuple[int, ...]
    name: str = field(compare=False)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "TextFormat":
        """The format that plain values describe. Raises ValueError, KeyError, TypeError: they are none."""
        values = {each.name: plain[each.name] for each in fields(cls)}
        lengths = tuple(values["context_lengths"])
        numbers = (values["width"], *lengths)
        if values["dtype"] not in _DTYPES or not lengths or any(type(n) is not int or n < 1 for n in numbers):
            raise ValueError("a width, a dtype or a context length cannot be what is written")
        return cls(str(values["text_encoder"]), values["width"], values["dtype"], lengths, str(values["name"]))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "context_lengths": list(self.context_lengths)}

    @property
    def stored(self) -> type[np.generic]:
        """How numpy keeps a number."""
        return _AS_STORED[self.dtype]

    @property
    def tensor(self) -> torch.dtype:
        """What a number is."""
        return _DTYPES[self.dtype]


def key_of(ids: Sequence[int]) -> tuple[int, int]:
    """Two signed 64-bit numbers that stand for token ids: halves of their BLAKE2b hash."""
    digest = hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)


class TextStates:
    """The states of a folder, read where they are needed: only what a batch asks for gets into memory.

    Args:
        folder: that `hdm-shards encode-captions` made.
        where: configuration key to name in errors.

    Raises:
        UserError: it is none, or is not finished.
    """

    def __init__(self, folder: str | Path, *, where: str = "data.text_states") -> None:
        self.folder, self.where = Path(folder), where
        self.format = read_format(self.folder, where=where)
        for name in (KEYS_NAME, ROWS_NAME):
            if not (self.folder / name).is_file():
                what = f"the states in {folder} are not complete: there is no {name}"
                raise UserError(what, where=where, hint=f"start `{COMMAND}` again as before; it goes on where it was")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "where": self.where, "format": self.format}  # maps are opened anew

    def __len__(self) -> int:
        return len(self._keys)

    def check(self, context_length: int) -> None:
        """Check that captions of a context length were encoded.

        Raises:
            UserError: they were not.
        """
        if context_length not in self.format.context_lengths:
            there = ", ".join(map(str, self.format.context_lengths))
            raise UserError(
                f"the stored states are of captions cut to {there} tokens, not to {context_length}",
                where="data.context_length",
                hint=f"set it to {self.format.context_lengths[-1]}, or encode into another --out with "
                f"--context-length {there.replace(',', '')} {context_length}",
            )

    def context(self, tokens: Tensor, lengths: Tensor, weight: Tensor, captions: Sequence[str]) -> Tensor:
        """The states (B,L,W) of a batch's captions in the dtype they are stored in, zero behind each and where masked.

        Args:
            tokens: int64 (B,L) on the CPU.
            lengths: int64 (B,), true counts.
            weight: float32 (B,), 0 for a masked sample, whose caption need not be there.
            captions: for messages.

        Raises:
            UserError: a caption is not among those that were encoded.
        """
        context = torch.zeros(*tokens.shape, self.format.width, dtype=self.format.tensor)
        for row, (ids, length, counts) in enumerate(
            zip(tokens.tolist(), lengths.tolist(), weight.tolist(), strict=True)
        ):
            if counts:
                context[row, :length] = self._states(ids[:length], captions[row])
        return context

    def _states(self, ids: Sequence[int], caption: str) -> Tensor:
        first, second = key_of(ids)
        begin = int(np.searchsorted(self._keys, first))
        end = int(np.searchsorted(self._keys, first, side="right"))
        for piece, half, start, length in self._rows[begin:end].tolist():
            if half == second and length == len(ids):
                stored = np.array(self._piece(piece)[start : start + length])  # a copy: pages may go again
                if stored.shape == (length, self.format.width):
                    return torch.from_numpy(stored).view(self.format.tensor)
        raise UserError(
            f"the caption {caption[:80]!r} has no stored states",
            where=self.where,
            hint=f"encode the captions of these shards, too: {COMMAND} SHARDS --out {self.folder} …; "
            "or set data.text_states=null",
        )

    @cached_property
    def _keys(self) -> Rows:
        return self._map(self.folder / KEYS_NAME, np.int64, 1)

    @cached_property
    def _rows(self) -> Rows:
        return self._map(self.folder / ROWS_NAME, np.int64, 2)

    @cached_property
    def _pieces(self) -> dict[int, NDArray[Any]]:
        return {}

    @cached_property
    def _names(self) -> list[Path]:
        return pieces_of(self.folder)

    def _piece(self, number: int) -> NDArray[Any]:
        if number not in self._pieces:
            self._pieces[number] = self._map(self._names[number], self.format.stored, 2)
        return self._pieces[number]

    def _map(self, path: Path, dtype: type[np.generic], dimensions: int) -> NDArray[Any]:
        try:
            found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise self._damaged(path, str(error)) from error
        if found.dtype != dtype or found.ndim != dimensions:
            raise self._damaged(path, f"it holds {found.dtype} in {found.ndim} dimensions")
        return found

    def _damaged(self, path: Path, reason: str) -> UserError:
        hint = f"delete it and start `{COMMAND}` again as before"
        return UserError(f"stored states cannot be read from {path} ({reason})", where=self.where, hint=hint)


def read_format(folder: Path, *, where: str) -> TextFormat:
    """What a folder of states says of itself.

    Raises:
        UserError: it is none.
    """
    try:
        return TextFormat.from_json(json.loads((folder / FORMAT_NAME).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        hint = f"name the folder that `{COMMAND}` was given as --out"
        raise UserError(f"there is no {FORMAT_NAME} in {folder}", where=where, hint=hint) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = f"delete the folder and make it again with `{COMMAND}`"
        raise UserError(f"{folder / FORMAT_NAME} cannot be read ({error})", where=where, hint=hint) from error


def pieces_of(folder: Path) -> list[Path]:
    """The files of states, in the order in which the table numbers them."""
    return sorted(folder.rglob(f"*{STATES}"))


def write_table(folder: Path, form: TextFormat) -> int:
    """Write the table over all pieces; returns how many captions there are."""
    known: list[Rows] = []
    for number, path in enumerate(pieces_of(folder)):
        whole = path.with_name(path.name.removesuffix(STATES) + FOUND)
        if not whole.is_file():  # of a call that was killed
            continue
        found: Rows = np.load(whole, allow_pickle=False)
        known.append(np.column_stack([found[:, 0], np.full(len(found), number), found[:, 1:]]))
    table = np.concatenate(known) if known else np.zeros((0, 5), dtype=np.int64)
    table = table[np.lexsort((table[:, 2], table[:, 0]))]
    same = np.zeros(len(table), dtype=bool)
    same[1:] = (table[1:, 0] == table[:-1, 0]) & (table[1:, 2] == table[:-1, 2])  # of two processes at once
    table = table[~same]
    (folder / KEYS_NAME).unlink(missing_ok=True)  # written last: without it the table counts as unfinished
    write_atomically(folder / ROWS_NAME, lambda file: np.save(file, np.ascontiguousarray(table[:, 1:])))
    write_atomically(folder / KEYS_NAME, lambda file: np.save(file, np.ascontiguousarray(table[:, 0])))
    write_json(folder / FORMAT_NAME, {**form.to_json(), "captions": len(table)})
    return len(table)
