"""Text-encoder states on disk: the encoded captions of shards, computed once and looked up by token ids.

For each shard that was read, a folder has one piece, with the states of the captions that first occur there, end to
end; a single table covers all pieces. A caption's key is a hash of its token ids, so a caption that occurs in many
samples, or fits uncut into two context lengths, is stored only once.

Shapes: N captions, T tokens of all captions of a piece, B batch, L tokens, W width of the text encoder.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.json_files import parse_object, read_object
from hdm_lightning.whole_files import write_atomically, write_json

FORMAT_NAME, TABLE_NAME, PIECES_NAME = "text_states.json", "table.npy", "pieces.json"
STATES, FOUND = ".states.npy", ".found.npy"
COMMAND, KEY = "hdm-shards encode-captions", "data.text_states"

_DTYPES: dict[str, tuple[torch.dtype, type[np.generic]]] = {
    "float32": (torch.float32, np.float32),
    "float16": (torch.float16, np.float16),
    "bfloat16": (torch.bfloat16, np.uint16),  # numpy has no bfloat16
}

Table = NDArray[np.int64]
"""(5, N), sorted by key: first half of a caption's key, piece number, second half, first token in the piece, tokens."""


@dataclass(frozen=True)
class TextFormat:
    """The common format of the states in a folder.

    Attributes:
        text_encoder: fingerprint of the text encoder.
        width: W.
        dtype: `float32`, `float16` or `bfloat16`.
        context_lengths: lengths that captions were truncated to.
        name: name of the text encoder for messages; ignored when formats are compared.
    """

    text_encoder: str
    width: int
    dtype: str
    context_lengths: tuple[int, ...]
    name: str = field(compare=False)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "TextFormat":
        """Return the format from plain values. Raises ValueError, KeyError, TypeError: they do not describe one."""
        values = {each.name: plain[each.name] for each in fields(cls)}
        lengths = tuple(values["context_lengths"])
        numbers = (values["width"], *lengths)
        if values["dtype"] not in _DTYPES or not lengths or any(type(n) is not int or n < 1 for n in numbers):
            raise ValueError("its width, dtype or context lengths are invalid")
        return cls(str(values["text_encoder"]), values["width"], values["dtype"], lengths, str(values["name"]))

    def to_json(self) -> dict[str, Any]:
        """Return the format as plain values."""
        return {**asdict(self), "context_lengths": list(self.context_lengths)}

    @property
    def stored(self) -> type[np.generic]:
        """The numpy type of a stored number."""
        return _DTYPES[self.dtype][1]

    @property
    def tensor(self) -> torch.dtype:
        """The torch dtype of a state."""
        return _DTYPES[self.dtype][0]


def key_of(ids: Sequence[int]) -> tuple[int, int]:
    """Return the key of token ids: the two halves of their BLAKE2b hash, as signed 64-bit numbers."""
    digest = hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)


class TextStates:
    """The states in a folder, read on demand: only what a batch needs is loaded.

    Args:
        folder: output folder of `hdm-shards encode-captions`.

    Raises:
        UserError: the folder has no text states, or is not finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.format = read_format(self.folder, where=KEY)
        if not (self.folder / TABLE_NAME).is_file():
            what = f"the states in {folder} are not complete: there is no {TABLE_NAME}"
            raise UserError(what, where=KEY, hint=f"run the same `{COMMAND}` again; it resumes where it stopped")
        self._table: Table = mapped(self.folder / TABLE_NAME, np.int64, where=KEY)
        self._names = known_pieces(self.folder)
        self._pieces: dict[int, NDArray[Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return TextStates, (self.folder,)  # maps the files again

    def __len__(self) -> int:
        return int(self._table.shape[1])

    def check(self, context_length: int) -> None:
        """Check that captions were encoded at a context length. Raises UserError: they were not."""
        if context_length not in self.format.context_lengths:
            there = ", ".join(map(str, self.format.context_lengths))
            raise UserError(
                f"the stored states are of captions truncated to {there} tokens, not to {context_length}",
                where="data.context_length",
                hint=f"set it to {self.format.context_lengths[-1]}, or encode into another --out with "
                f"--context-length {there.replace(',', '')} {context_length}",
            )

    def context(self, tokens: Tensor, lengths: Tensor, weight: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the states (B,L,W) of a batch's captions in the stored dtype, zero for padding and masked samples.

        Args:
            tokens: int64 (B,L) on the CPU.
            lengths: int64 (B,), counts without padding.
            weight: float32 (B,), 0 for a masked sample, whose states need not exist.
            captions: texts of the captions, for messages.

        Raises:
            UserError: a caption was not encoded.
        """
        context = torch.zeros(*tokens.shape, self.format.width, dtype=self.format.tensor)
        rows = zip(context, tokens.tolist(), lengths.tolist(), weight.tolist(), captions, strict=True)
        for states, ids, length, counts, caption in rows:
            if counts:
                states[:length] = self._states(ids[:length], caption)
        return context

    def _states(self, ids: Sequence[int], caption: str) -> Tensor:
        first, second = key_of(ids)
        begin = int(np.searchsorted(self._table[0], first))
        end = int(np.searchsorted(self._table[0], first, side="right"))
        for piece, half, start, length in self._table[1:, begin:end].T.tolist():
            if half == second and length == len(ids):
                stored = np.array(self._piece(piece)[start : start + length])  # a copy, so that pages can be released
                if stored.shape == (length, self.format.width):
                    return torch.from_numpy(stored).view(self.format.tensor)
        raise UserError(
            f"the caption {caption[:80]!r} has no stored states",
            where=KEY,
            hint=f"also encode the captions of these shards, with the options of the `{COMMAND}` that wrote "
            f"{self.folder}, or set data.text_states=null",
        )

    def _piece(self, number: int) -> NDArray[Any]:
        if not 0 <= number < len(self._names):
            raise _damaged(self.folder / PIECES_NAME, f"it has no piece {number}", KEY)
        if number not in self._pieces:
            piece = self.folder / self._names[number]
            self._pieces[number] = mapped(piece, self.format.stored, where=KEY)
        return self._pieces[number]


def _damaged(path: Path, reason: str, where: str) -> UserError:
    hint = f"delete it and run the same `{COMMAND}` again"
    return UserError(f"stored states cannot be read from {path} ({reason})", where=where, hint=hint)


def mapped(path: Path, dtype: type[np.generic], *, where: str) -> NDArray[Any]:
    """Open the file of a matrix as a memory map. Raises UserError: it is damaged, or contains something else."""
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, TokenError) as error:
        raise _damaged(path, str(error).partition("\n")[0], where) from error
    if found.dtype != dtype or found.ndim != 2:
        raise _damaged(path, f"it contains {found.dtype} in {found.ndim} dimensions", where)
    return found


def captions_found(piece: Path) -> NDArray[np.int64]:
    """Return key (two numbers), start and length of each caption in a piece, int64 (N, 4).

    Raises:
        UserError: the file that lists them is damaged.
    """
    path = found_file(piece)
    found = mapped(path, np.int64, where=str(piece.parent))
    if found.shape[1] != 4:
        raise _damaged(path, f"it has {found.shape[1]} columns", str(piece.parent))
    return found


def read_format(folder: Path, *, where: str) -> TextFormat:
    """Read the format of a folder of states.

    Raises:
        UserError: the folder has no text states, or the format cannot be read.
    """
    try:
        return TextFormat.from_json(parse_object((folder / FORMAT_NAME).read_bytes()))
    except FileNotFoundError as error:
        hint = f"name the --out folder of `{COMMAND}`"
        raise UserError(f"there is no {FORMAT_NAME} in {folder}", where=where, hint=hint) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = f"delete the folder and rebuild it with `{COMMAND}`"
        raise UserError(f"{folder / FORMAT_NAME} cannot be read ({error})", where=where, hint=hint) from error


def found_file(piece: Path) -> Path:
    """Return the file that lists the captions of a piece; a piece without one is from a call that was killed."""
    return piece.with_name(piece.name.removesuffix(STATES) + FOUND)


def pieces_of(folder: Path) -> list[Path]:
    """Return the complete pieces of a folder."""
    return sorted(path for path in folder.glob(f"*{STATES}") if found_file(path).is_file())


def known_pieces(folder: Path) -> list[str]:
    """Return the names of the pieces by their numbers in the table; a piece keeps its number for good.

    Raises:
        UserError: the names cannot be read.
    """
    path, hint = folder / PIECES_NAME, f"delete the folder and rebuild it with `{COMMAND}`"
    names = read_object(path, hint=hint).get("pieces")
    if not isinstance(names, list) or not all(isinstance(each, str) and _is_name(each) for each in names):
        raise UserError("does not list text-state files", where=str(path), hint=hint)
    return names


def _is_name(text: str) -> bool:
    """Return whether a text is a valid file name that UTF-8 JSON can store."""
    return Path(text).name == text and text.encode(errors="ignore").decode() == text


def write_table(folder: Path) -> int:
    """Write the table over all pieces, and return the number of captions."""
    known = known_pieces(folder) if (folder / PIECES_NAME).is_file() else []
    there = dict.fromkeys(path.name for path in pieces_of(folder))
    names = list(dict.fromkeys([*known, *there]))
    parts = [np.zeros((0, 5), dtype=np.int64)]
    for number, name in enumerate(names):
        if name not in there:
            continue  # deleted because it was damaged
        found = captions_found(folder / name)
        parts.append(np.column_stack([found[:, 0], np.full(len(found), number), found[:, 1:]]))
    table = np.concatenate(parts)
    table = table[np.lexsort((table[:, 2], table[:, 0]))]
    same = np.zeros(len(table), dtype=bool)
    same[1:] = (table[1:, 0] == table[:-1, 0]) & (table[1:, 2] == table[:-1, 2])  # encoded by two processes at once
    table = np.ascontiguousarray(table[~same].T)
    # The names first: a reader that comes in between only knows more pieces than its table needs.
    write_json(folder / PIECES_NAME, {"pieces": names, "captions": table.shape[1]})
    write_atomically(folder / TABLE_NAME, lambda file: np.save(file, table))
    return int(table.shape[1])
