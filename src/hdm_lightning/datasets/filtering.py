"""Filter samples by rules: judge them shard by shard, compare them with each other, copy or mark the result.

Each judged shard adds a line to a journal, so an interrupted call resumes with the next one.
"""

import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.index import INDEX_NAME, Index
from hdm_lightning.data.index_report import no_samples
from hdm_lightning.data.parallel import ordered_map
from hdm_lightning.data.sample_plan import PlannedShard
from hdm_lightning.data.scanning import index_shards, note_scanned, scan_shard
from hdm_lightning.data.shard_record import ShardRecord
from hdm_lightning.data.verification import Problem, leave_out
from hdm_lightning.datasets.filter_rules import (
    COPY,
    COPY_OF_OTHERS,
    MEASURED,
    Filter,
    Judged,
    Rule,
    judged_shard,
    reasons_of,
)
from hdm_lightning.datasets.journal import Journal, write_rejected
from hdm_lightning.datasets.near_duplicates import better_copies
from hdm_lightning.datasets.shard_work import (
    alone_in,
    digest_of,
    require_apart,
    require_images,
    samples_of,
    shards_in,
)
from hdm_lightning.datasets.writer import write_shard
from hdm_lightning.errors import UserError, did_you_mean
from hdm_lightning.whole_files import remove_leftovers

JOURNAL = "filter.jsonl"
Progress = Callable[[str, int, int], None]


def _untold(what: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Judgement:
    """Which samples of a whole set stay.

    Attributes:
        shards: the judged shards.
        codes: codes per shard, as in `Judged`.
        reasons: meaning of the codes from 1 on.
        lacking: how many samples stay although they lack something, by what they lack.
    """

    shards: Sequence[PlannedShard]
    codes: Sequence[NDArray[np.uint8]]
    reasons: Sequence[str]
    lacking: Counter[str]

    @property
    def samples(self) -> int:
        """Number of samples judged."""
        return sum(map(len, self.codes))

    @property
    def left_out(self) -> dict[str, int]:
        """Number of samples left out, by reason, in the order of the rules."""
        counts = np.zeros(len(self.reasons) + 1, dtype=np.int64)
        for each in self.codes:
            counts += np.bincount(each, minlength=len(counts))
        return {reason: count for reason, count in zip(self.reasons, counts[1:].tolist(), strict=True) if count}

    def chosen(self) -> list[PlannedShard]:
        """Return the shards with only the samples that stay."""
        kept = [shard.only(codes == 0) for shard, codes in zip(self.shards, self.codes, strict=True)]
        return [shard for shard in kept if shard.samples]

    def problems(self) -> Iterator[Problem]:
        """Yield each sample left out, with its reason."""
        for shard, codes in zip(self.shards, self.codes, strict=True):
            for ordinal, code in zip(shard.table().ordinal[codes > 0].tolist(), codes[codes > 0].tolist(), strict=True):
                yield Problem(shard.record.name, self.reasons[code - 1], ordinal)


class FilteredSet:
    """The samples of a source that pass a filter.

    Args:
        place: folder, shard or pattern of indexed shards.
        wanted: the filter.
        against: shards whose images win over near copies in the source; they are only read.
        jobs: processes that read in parallel.

    Raises:
        UserError: the shards cannot be used.
    """

    def __init__(self, place: str, wanted: Filter, *, against: Sequence[str] = (), jobs: int = 1) -> None:
        self.place, self.filter, self.jobs = place, wanted, jobs
        found, others = shards_in(place), chain.from_iterable(map(shards_in, against))
        self.shards, self.others = ([shard for shard in each if shard.samples] for each in (found, others))
        if not self.shards:
            raise no_samples((shard.record for shard in found), place)
        if wanted.distance is not None:
            require_images((*self.shards, *self.others), "name shards of images", ", which have no perceptual hash")

    @property
    def made_of(self) -> str:
        """A hash of the shards and of everything that decides which of their samples stay."""
        return digest_of([*self.shards, *self.others], len(self.shards), self.filter)

    def judge(self, journal: Journal | None = None, progress: Progress = _untold) -> Judgement:
        """Decide which samples stay.

        Args:
            journal: where judged shards are noted; None notes nothing.
            progress: called with what is counted, the number done and the total.

        Raises:
            UserError: a rule is about a key that no sample has, or a shard cannot be read.
        """
        known = {} if journal is None else _known(journal)
        judged = self._judged(self.shards, self.filter, "shards", known, journal, progress)
        try:
            _require_keys(self.filter.rules, judged)
        except UserError:  # the same call with the right key must not be refused
            if journal is not None:
                journal.give_up()
            raise
        reasons = reasons_of(self.filter.rules)
        codes = [each.codes.copy() for each in judged]
        if self.filter.distance is not None:
            hashed = Filter(distance=self.filter.distance)
            others = self._judged(self.others, hashed, "shards of --against", known, journal, progress)
            _mark_copies(codes, judged, others, self.filter.distance, reasons)
        lacking: Counter[str] = Counter()
        for each in judged:
            lacking.update(each.lacking)
        return Judgement(self.shards, codes, reasons, lacking)

    def write(self, out: Path, progress: Progress = _untold) -> tuple[Index | None, Judgement]:
        """Write the samples that stay to shards of the same names; return their index, if any, and the judgement.

        Raises:
            UserError: the folder holds something else, or the disk is full.
        """
        require_apart(self.shards, self.place, out)
        other = "this folder holds other samples, or was filtered by other rules"
        journal = Journal(out / JOURNAL, {"made_of": self.made_of}, other=other)
        with alone_in(out, "filtering"):
            journal.begin()
            judgement = self.judge(journal, progress)
            index = self._copy(judgement, out, progress)
            if index is None:  # wider rules may keep some, and must not be refused here
                journal.give_up()
            return index, judgement

    def mark(self, progress: Progress = _untold) -> Judgement:
        """Judge, leave the samples that do not stay out of the index, and return the judgement.

        Raises:
            UserError: the source is not a local folder with one index.
        """
        folder = Path(self.place)
        if not (folder / INDEX_NAME).is_file():
            what = "only a local folder of shards can be marked"
            raise UserError(what, where=self.place, hint="name the folder that holds index.json, or use --out")
        judgement = self.judge(None, progress)
        if judgement.chosen():
            leave_out(folder, [*judgement.problems()])
        return judgement

    def _judged(
        self,
        shards: Sequence[PlannedShard],
        wanted: Filter,
        what: str,
        known: Mapping[str, Judged],
        journal: Journal | None,
        report: Progress,
    ) -> list[Judged]:
        noted = ((shard, known.get(_named(what, shard))) for shard in shards)
        found = {shard.url: each for shard, each in noted if each is not None and each.is_of(shard, wanted)}
        missing = [shard for shard in shards if shard.url not in found]
        made = ordered_map(partial(judged_shard, wanted), missing, processes=min(self.jobs, max(1, len(missing))))
        for shard, each in zip(missing, made, strict=True):
            found[shard.url] = each
            if journal is not None:
                journal.note(shard=_named(what, shard), **each.to_json())
            report(what, len(found), len(shards))
        return [found[shard.url] for shard in shards]

    def _copy(self, judgement: Judgement, out: Path, report: Progress) -> Index | None:
        for folder in {(out / shard.record.name).parent for shard in self.shards}:
            remove_leftovers(folder)
        write_rejected(out, ((f"{each.shard}#{each.ordinal}", each.reason) for each in judgement.problems()))
        chosen = judgement.chosen()
        missing = [shard for shard in chosen if not (out / shard.record.name).is_file()]
        copied = ordered_map(partial(_copied, out), missing, processes=min(self.jobs, max(1, len(missing))))
        for done, record in enumerate(copied, start=1 + len(chosen) - len(missing)):
            note_scanned(out, record)
            report("shards written", done, len(chosen))
        names = [shard.record.name for shard in chosen]
        return index_shards(out, new_only=True, names=names, jobs=self.jobs, times=False) if names else None


def _known(journal: Journal) -> dict[str, Judged]:
    """Return what an interrupted call noted."""
    known = {}
    for row in journal.rows:
        with suppress(KeyError, ValueError, TypeError):  # damaged
            known[row["shard"]] = Judged.from_json(row)
    return known


def _named(what: str, shard: PlannedShard) -> str:
    return f"{what}: {hashlib.sha256(f'{shard.url} {shard.record.sha256}'.encode()).hexdigest()[:32]}"


def _require_keys(rules: Sequence[Rule], judged: Sequence[Judged]) -> None:
    """Raise UserError if no sample has the key of a rule: it is more likely mistyped than missing."""
    for rule in rules:
        if judged and rule.key not in MEASURED and not any(each.having.get(rule.key) for each in judged):
            keys = [*dict.fromkeys(key for each in judged for key in each.keys), *MEASURED]
            what = f"no sample has {rule.key!r} with a value that can be compared"
            raise UserError(what, where="--min, --max, --is, --is-not", hint=did_you_mean(rule.key, keys))


def _mark_copies(
    codes: Sequence[NDArray[np.uint8]],
    judged: Sequence[Judged],
    others: Sequence[Judged],
    distance: int,
    reasons: Sequence[str],
) -> None:
    """Leave out the worse of near copies: other sets win over this one, then more pixels over fewer, then the earlier
    sample."""
    stay = np.concatenate([each == 0 for each in codes]) if codes else np.zeros(0, dtype=bool)
    usable = np.concatenate([each.codes == 0 for each in others]) if others else np.zeros(0, dtype=bool)
    hashes = np.concatenate([each.hashes for each in (*judged, *others)])[np.r_[stay, usable]]
    pixels = np.concatenate([each.pixels for each in (*judged, *others)])[np.r_[stay, usable]]
    own = np.arange(len(hashes)) < stay.sum()
    by_rank = np.lexsort((np.arange(len(hashes)), -pixels, own))
    order = np.empty(len(hashes), dtype=np.int64)
    order[by_rank] = np.arange(len(hashes))
    best = better_copies(hashes, order, distance)[own]
    own_rows = np.flatnonzero(stay)
    marks = np.zeros(len(stay), dtype=np.uint8)
    marks[own_rows[best >= 0]] = 1 + reasons.index(COPY)
    marks[own_rows[best >= stay.sum()]] = 1 + reasons.index(COPY_OF_OTHERS)
    for each, part in zip(codes, np.split(marks, np.cumsum([len(each) for each in codes])[:-1]), strict=True):
        each[part > 0] = part[part > 0]


def _copied(out: Path, shard: PlannedShard) -> ShardRecord:
    """Write the planned samples of a shard to a new one. Raises UserError if one of them cannot be read."""
    write_shard(out / shard.record.name, _members(shard), names_as_they_are=True)
    return scan_shard(out, shard.record.name)


def _members(shard: PlannedShard) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    for ordinal, sample in samples_of(shard):
        if isinstance(sample, str):  # rules about sizes alone do not read samples
            folder = shard.url.removesuffix(shard.record.name).rstrip("/") or "."
            hint = f"leave it out with `hdm-shards verify {shlex.quote(folder)} --decode --mark`"
            raise UserError(f"sample {ordinal} cannot be copied: {sample}", where=shard.url, hint=hint)
        yield sample.key, sample.members
