"""Encode the captions of shards to text-encoder states on disk, each distinct one once; see `data.text_states`.

Shards are encoded one by one, each piece written whole or not at all, so an interrupted call resumes where it stopped.

Shapes: N captions, L token positions, T tokens of a piece, W width of the text encoder.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.faults import Quarantine, SampleFault
from hdm_lightning.data.sample_plan import PlannedShard
from hdm_lightning.data.sample_table import RawSample
from hdm_lightning.data.samples import Tokenize
from hdm_lightning.data.text_states import (
    FORMAT_NAME,
    STATES,
    TextFormat,
    captions_found,
    found_file,
    key_of,
    pieces_of,
    write_table,
)
from hdm_lightning.datasets.journal import holds_nothing
from hdm_lightning.datasets.shard_work import alone_in, is_begun, samples_of, shards_in, worked_off
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import remove_leftovers, replacing, write_atomically, write_json

FAULTS_NAME = "faults.jsonl"

EncodeText = Callable[[Tensor, Tensor], Tensor]
"""Tokens (B,L) and lengths (B,) on the CPU to states (B,L,W) on any device."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class StateOptions:
    """How the states of captions are made.

    Attributes:
        start: makes the encoder for a device, given by name; must be picklable if there are several devices.
        tokenize: one tokenizer per context length; must be picklable if there are several devices.
        max_tokens: most tokens encoded at once, padding included; a single longer caption is encoded alone.
        captions: where captions are found, as in training.
        devices: `cuda:0`, `cpu`, …: one process each; a device may be listed more than once.
    """

    start: Callable[[str], EncodeText]
    tokenize: Sequence[Tokenize]
    max_tokens: int
    captions: CaptionRules = field(default_factory=CaptionRules)
    devices: tuple[str, ...] = ("cpu",)


class EncodedCaptions:
    """The states of all captions of a source.

    Args:
        place: folder, shard or pattern of indexed shards, of images or latents.
        folder: where the states are written.
        form: format of the states.
        options: how they are made.

    Raises:
        UserError: the shards cannot be used, or the folder holds something else.
    """

    def __init__(self, place: str, folder: Path, form: TextFormat, options: StateOptions) -> None:
        self.folder, self.format, self.options = folder, form, options
        self.shards = shards_in(place)
        self._require_no_others()

    @property
    def samples(self) -> int:
        """Number of samples in the source."""
        return sum(shard.samples for shard in self.shards)

    def missing(self) -> list[PlannedShard]:
        """Return the shards whose captions are not encoded yet."""
        rules, whole = self.options.captions, set(pieces_of(self.folder))
        return [each for each in self.shards if _piece_file(self.folder, each, rules) not in whole]

    def make(self, progress: Callable[[int], None] = lambda done: None) -> int:
        """Encode what is missing and write the table; return the number of distinct captions.

        Args:
            progress: called with the number of samples whose captions are done.

        Raises:
            UserError: the disk is full, the text encoder returns non-finite numbers, a process died, or another call
                has started to write other states here.
        """
        with alone_in(self.folder, "encoding"):
            self._require_no_others()  # another call may have started some meanwhile
            write_json(self.folder / FORMAT_NAME, self.format.to_json())
            remove_leftovers(self.folder)
            missing = self.missing()
            done = self.samples - sum(shard.samples for shard in missing)
            start = partial(_CaptionEncoder, self.folder, self.format, self.options)
            for samples in worked_off(missing, self.options.devices, start, hint="lower --max-tokens"):
                done += samples
                progress(done)
            return write_table(self.folder)

    def _require_no_others(self) -> None:
        """Raise UserError if the folder holds anything but these states."""
        holds = "states of another text encoder, or made with other options"
        begun = is_begun(self.folder / FORMAT_NAME, lambda found: TextFormat.from_json(found) == self.format, holds)
        if not begun and self.folder.is_dir() and not holds_nothing(self.folder, FORMAT_NAME):
            hint = "name an empty folder, or a new one"
            raise UserError("this folder holds something else", where=str(self.folder), hint=hint)


def _piece_file(folder: Path, shard: PlannedShard, rules: CaptionRules) -> Path:
    """Return the file for a shard's states, named by the shard's content and the fields searched for captions."""
    looked_for = (shard.record.name, shard.record.sha256, shard.samples, rules.fields)
    digest = hashlib.sha256(repr(looked_for).encode()).hexdigest()[:12]
    return folder / f"{Path(shard.record.name).with_suffix('').name}-{digest}{STATES}"


class _CaptionEncoder:
    """Encodes the captions of whole shards on one device; one per process."""

    def __init__(self, folder: Path, form: TextFormat, options: StateOptions, device: str) -> None:
        self.folder, self.format, self.options = folder, form, options
        self._encode_text = options.start(device)
        self._faults = Quarantine(str(folder / FAULTS_NAME))
        self._known: set[tuple[int, int]] = set()
        for path in pieces_of(folder):
            self._known.update(map(tuple, captions_found(path)[:, :2].tolist()))

    def __call__(self, shard: PlannedShard) -> int:
        """Encode and write the captions of a shard that no earlier shard had; return the shard's number of samples."""
        new = self._new(shard)
        lengths = [len(ids) for ids in new.values()]
        starts = np.cumsum([0, *lengths])
        path = _piece_file(self.folder, shard, self.options.captions)
        with replacing(path) as temporary:
            self._write(list(new.values()), starts.tolist(), temporary)
        found = np.array(
            [(*key, start, length) for key, start, length in zip(new, starts[:-1], lengths, strict=True)],
            dtype=np.int64,
        ).reshape(-1, 4)
        # Written last: it marks the shard as done.
        write_atomically(found_file(path), lambda file: np.save(file, found))
        self._known.update(new)
        return shard.samples

    def _new(self, shard: PlannedShard) -> dict[tuple[int, int], Ids]:
        """Return token ids by key of the shard's captions, and the empty one, that no earlier shard had."""
        new: dict[tuple[int, int], Ids] = {}
        for caption in ("", *self._captions(shard)):
            for tokenize in self.options.tokenize:
                ids, length = tokenize(caption)
                key = key_of(ids[:length])
                if key not in self._known:
                    new.setdefault(key, tuple(ids[:length]))
        return new

    def _captions(self, shard: PlannedShard) -> Iterator[str]:
        for ordinal, found in samples_of(shard):
            key = found.key if isinstance(found, RawSample) else f"#{ordinal}"
            try:
                if isinstance(found, str):
                    raise SampleFault(found)
                yield from (each.text for each in self.options.captions.of_every_place(found.members))
            except SampleFault as fault:
                self._faults.add(shard=shard.url, key=key, ordinal=ordinal, reason=str(fault), index=ordinal)

    def _write(self, captions: Sequence[Ids], starts: Sequence[int], path: Path) -> None:
        """Write the states of captions to a file, each at its start; similar lengths are batched."""
        shape = (starts[-1], self.format.width)
        if not shape[0]:
            with path.open("wb") as file:
                np.save(file, np.zeros(shape, dtype=self.format.stored))
            return
        states = np.lib.format.open_memmap(path, mode="w+", dtype=self.format.stored, shape=shape)
        for numbers in _parts([len(ids) for ids in captions], self.options.max_tokens):
            lengths = torch.tensor([len(captions[number]) for number in numbers])
            tokens = torch.zeros(len(numbers), int(lengths.max()), dtype=torch.int64)
            for row, number in enumerate(numbers):
                tokens[row, : len(captions[number])] = torch.tensor(captions[number])
            encoded = self._encode_text(tokens, lengths).to("cpu", self.format.tensor)
            if not torch.isfinite(encoded).all():
                what = "the text encoder returns numbers that are not finite or too large for half precision"
                raise UserError(what, where="--dtype", hint="use bfloat16 or float32")
            plain = encoded.view(torch.uint16) if self.format.tensor == torch.bfloat16 else encoded
            for row, number in enumerate(numbers):
                length = len(captions[number])
                states[starts[number] : starts[number] + length] = plain[row, :length].numpy()
        states.flush()


def _parts(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of captions to encode at once, longest first, so that there is little padding."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    while order:
        size = max(1, max_tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]
