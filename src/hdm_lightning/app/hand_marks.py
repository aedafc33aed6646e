"""Leave out samples that a person found bad, in the index of their set, as `hdm-shards verify --mark` does."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

from hdm_lightning.app.shard_search import is_markable
from hdm_lightning.data.index import INDEX_NAME, load_index, write_index
from hdm_lightning.data.verification import Problem, leave_out
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

BY_HAND = "marked by hand"
LONGEST_REASON = 200
_WRITING = Lock()


def mark(place: str, shard: str, ordinal: int, key: str, reason: str) -> int:
    """Leave a sample out of a set, which changes the order of the others; return the number of remaining samples.

    Raises:
        UserError: the set is not a local folder, the sample is missing or already left out, or there is no reason.
    """
    _require_markable(place)
    words = " ".join(reason.split())[:LONGEST_REASON]
    if not words:
        raise UserError("is empty", where="reason", hint="say in a word or two what is wrong with the sample")
    with _WRITING:
        record = next((each for each in load_index(place).shards if each.name == shard), None)
        if record is None or not 0 <= ordinal < record.count or ordinal in record.skip:
            raise UserError(f"sample {ordinal} is missing or already left out", where=shard, hint="search again")
        return leave_out(place, [Problem(shard, in_one_line(f"{BY_HAND}: {words}"), ordinal, key)]).samples


def unmark(place: str, shard: str, ordinal: int) -> int:
    """Restore a sample that was left out by hand; return the number of samples.

    Raises:
        UserError: it was not left out by hand.
    """
    _require_markable(place)
    with _WRITING:
        index = load_index(place)
        record = next((each for each in index.shards if each.name == shard), None)
        if record is None or not record.skip.get(ordinal, "").startswith(BY_HAND):
            what = f"sample {ordinal} was not left out by hand"
            raise UserError(what, where=shard, hint="run `hdm-shards index` to remove all marks")
        skip = {each: why for each, why in record.skip.items() if each != ordinal}
        restored = replace(record, skip=skip, samples=record.samples + 1)
        shards = tuple(restored if each is record else each for each in index.shards)
        write_index(replace(index, shards=shards), Path(place) / INDEX_NAME)
        return sum(each.samples for each in shards)


def left_out(place: str, most: int = 500) -> Sequence[tuple[str, int, str]]:
    """Return shard, ordinal and reason of the samples left out, those marked by hand first."""
    found = [(record.name, *each) for record in load_index(place).shards for each in record.skip.items()]
    return sorted(found, key=lambda each: not each[2].startswith(BY_HAND))[:most]


def _require_markable(place: str) -> None:
    if not is_markable(place):
        what = "is not a local folder, so its index cannot be written"
        raise UserError(what, where=place, hint="mark samples in a local copy of the set")
