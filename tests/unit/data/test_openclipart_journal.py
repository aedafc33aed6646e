"""The journal of an Open Clip Art build, cut anywhere by a kill."""

import pytest

from hdm_lightning.datasets.openclipart import JOURNAL, Journal
from hdm_lightning.errors import UserError

OPTIONS = {"seed": 0}
OUTCOMES = {"animals/c\u00e4t.svg": "shard openclipart-00000.tar", "animals/dog.svg": "refused: duplicate"}


def test_a_journal_that_was_cut_goes_on_from_its_last_whole_line(tmp_path):
    Journal(tmp_path, OPTIONS).record(OUTCOMES)
    whole = (tmp_path / JOURNAL).read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 3
    for cut in range(len(whole) + 1):
        (tmp_path / JOURNAL).write_bytes(whole[:cut])
        journal = Journal(tmp_path, OPTIONS)
        kept = sum(end <= cut for end in ends)
        assert list(journal.outcomes.items()) == list(OUTCOMES.items())[: max(0, kept - 1)], cut
        journal.record(dict(list(OUTCOMES.items())[len(journal.outcomes) :]))
        assert (tmp_path / JOURNAL).read_bytes() == whole, cut


def test_other_options_and_foreign_shards_are_refused(tmp_path):
    Journal(tmp_path, OPTIONS)
    Journal(tmp_path, {"seed": 1})  # nothing was made by the others
    Journal(tmp_path, OPTIONS).record({"a.svg": "refused: empty"})
    with pytest.raises(UserError, match="other options"):
        Journal(tmp_path, {"seed": 1})
    (tmp_path / JOURNAL).unlink()
    (tmp_path / "x.tar").touch()
    with pytest.raises(UserError, match="already holds"):
        Journal(tmp_path, OPTIONS)
