"""Samples that cannot be used: their reasons, their count, and the stop when there are too many."""

import json
import os
from collections import Counter
from pathlib import Path

from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import is_link_error, link_error, no_follow


class SampleFault(Exception):
    """One sample cannot be used; the message says why. The run continues with a masked sample in its place."""


class Quarantine:
    """A file with one line of JSON per bad sample: shard, key, ordinal in the shard, reason and position in the order.

    Several processes may write to the same file: each line is one short append. Each process writes a sample only
    once, even if it comes back in a later pass.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._seen: set[tuple[str, int]] = set()

    def add(self, *, shard: str, key: str, ordinal: int, reason: str, index: int) -> None:
        """Write one line, unless this process has already written this sample."""
        if self.path is None or (shard, ordinal) in self._seen:
            return
        self._seen.add((shard, ordinal))
        row = {"shard": shard, "key": key, "ordinal": ordinal, "reason": reason[:500], "index": index}
        line = (json.dumps(row) + "\n").encode()
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = no_follow(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise link_error(self.path) if is_link_error(error) else error from error
        try:
            end = os.fstat(handle).st_size
            cut = end > 0 and os.pread(handle, 1, end - 1) != b"\n"  # a full disk left half a line
            os.write(handle, b"\n" + line if cut else line)
        finally:
            os.close(handle)


class FaultMeter:
    """Counts masked samples and stops the run when their share of recent samples is too large.

    Args:
        largest_share: largest tolerated share of masked samples, in [0, 1].
        patience: number of samples before the first check. After `MEMORY` times as many, all counts are halved, so
            that a server that dies after millions of good samples is noticed as soon as one that dies early.
        quarantine: file that lists the bad samples, if any.
    """

    MEMORY = 20
    FIRST = 64
    """Number of first samples of which at least one must be good, whatever the share: a loss needs a sample."""

    def __init__(self, largest_share: float, patience: int, quarantine: str | None = None) -> None:
        self.largest_share, self.patience, self.quarantine = largest_share, patience, quarantine
        self.seen = 0
        self.reasons: Counter[str] = Counter()

    def count(self, reason: str | None) -> None:
        """Count one sample; `reason` is None for a good one.

        Raises:
            UserError: more than `largest_share` of the recent samples were bad.
        """
        if self.seen >= self.MEMORY * max(1, self.patience):
            self.seen //= 2
            self.reasons = Counter({kind: count // 2 for kind, count in self.reasons.items()})
        self.seen += 1
        if reason is not None:
            self.reasons[reason.partition(":")[0]] += 1
            if self.seen >= self.patience and self.bad > self.largest_share * self.seen:
                raise self._too_many()
            if self.seen == self.bad == min(self.FIRST, self.patience) and self.largest_share < 1:
                raise self._too_many()

    @property
    def bad(self) -> int:
        """Number of bad samples among those counted."""
        return self.reasons.total()

    def _too_many(self) -> UserError:
        commonest = ", ".join(f"{reason} ({count})" for reason, count in self.reasons.most_common(3))
        return UserError(
            f"{self.bad} of the last {self.seen} samples could not be used, more than {self.largest_share:.1%}: "
            f"{commonest}",
            where="data.max_bad_share",
            hint=self._hint(),
        )

    def _hint(self) -> str:
        see = f"see {self.quarantine}" if self.quarantine else "set data.quarantine=FILE to list the samples"
        if self.bad < self.seen:
            return (
                f"{see}, then run `hdm-shards verify --decode --mark` on the shards to leave the bad "
                "samples out, or raise data.max_bad_share"
            )
        if set(self.reasons) == {"no caption"}:
            return "give the images captions, or train without any: data.captions.allow_missing=true"
        if set(self.reasons) == {"replaced shard"}:
            return "the shards have changed since they were indexed: index them again, see `hdm-shards index --help`"
        return f"{see}, and check that the shards are present and intact: hdm-shards verify"
