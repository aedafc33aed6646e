"""Build shards from a list of items in parallel; an interrupted build resumes where it stopped.

Shard i holds the samples made from the n items from i·n on, so shards do not depend on each other. A journal has one
line per finished shard; shards that it does not list, or whose source files have changed since, are built again.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from annotated_types import Len

from hdm_lightning.data.captions import CaptionRules, is_blank
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.index import INDEX_NAME, load_index
from hdm_lightning.data.parallel import available_cores, ordered_map, progress_bar
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.datasets.journal import REJECTED, Journal, write_rejected
from hdm_lightning.datasets.shard_work import building_in
from hdm_lightning.datasets.writer import Field, write_shard
from hdm_lightning.errors import UserError
from hdm_lightning.json_files import typed
from hdm_lightning.printable import in_one_line
from hdm_lightning.whole_files import make_folder

JOURNAL = "build.jsonl"
MOST_KINDS = 10
RETIRED = ("items", "max_repeats")
"""Keys in journals of earlier versions, which are ignored."""
OWN_NAME = re.compile(r"[\w-]{1,80}-\d{5,20}\.tar")
"""File names of the shards that a build writes."""


class Item(NamedTuple):
    """Something that becomes a sample, such as an image file.

    `repeat` is how often it was listed before, `texts` are the files with its captions and its record, `mask` is the
    file that marks which of its pixels count, and `state` changes when any of its files does.
    """

    name: str
    repeat: int = 0
    texts: tuple[str, ...] = ()
    state: str = ""
    mask: str | None = None


class Made(NamedTuple):
    """The result for an item: the fields of its sample, and (name, reason) of files that were left out of it."""

    fields: dict[str, Field]
    unused: Sequence[tuple[str, str]] = ()


Make = Callable[[Item], Made]
"""Makes a sample from an item; raises `SampleFault` to reject it. Must be picklable."""


class _Shard(NamedTuple):
    name: str
    first: int
    items: list[Item]

    @property
    def digest(self) -> str:
        """A hash that changes with the items and their files."""
        content = "\n".join(f"{self.first}\t{item.name}\t{item.repeat}\t{item.state}" for item in self.items)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


Pair = Annotated[list[str], Len(2, 2)]
"""A name and a reason."""


class Row(NamedTuple):
    """A finished shard in the journal: its numbers of samples, images and captions, and the files it does not use."""

    digest: str
    samples: int
    images: int
    captions: int
    rejected: list[Pair]
    unused: list[Pair]


@dataclass(frozen=True)
class Report:
    """The result of a build.

    Attributes:
        samples, images, captions: numbers written; an image may make several samples.
        rejected: (name, reason) of each image that could not be used.
        unused: (name, reason) of each other file.
    """

    samples: int
    images: int
    captions: int
    rejected: list[tuple[str, str]]
    unused: list[tuple[str, str]]

    def told(self, out: Path) -> str:
        """Return a one-line summary."""
        text = f"{self.images} images, {self.captions} captions, {len(self.unused)} files of other kinds"
        if self.unused:
            text += ": " + _kinds(self.unused)
        if self.samples != self.images:
            text = f"{self.samples} samples of {text}"
        if self.rejected:
            text += f"; {len(self.rejected)} images rejected"
        if self.rejected or self.unused:
            text += f" ({out / REJECTED} lists each with its reason)"
        return f"{text}: {out}"


def _kinds(unused: Sequence[tuple[str, str]]) -> str:
    """Return the most common kinds of unused files with their counts."""
    kinds = Counter(
        reason.partition(" beside ")[0].removeprefix("not an image: ").removeprefix("a ") for _, reason in unused
    )
    told = [f"{count} {in_one_line(kind)}" for kind, count in kinds.most_common(MOST_KINDS)]
    more = kinds.total() - sum(count for _, count in kinds.most_common(MOST_KINDS))
    return ", ".join(told + ([f"{more} more"] if more else []))


def _nothing_to_build(folder: Path, unused: Sequence[tuple[str, str]]) -> UserError:
    """Return the error for a folder without images."""
    what = "contains no images" + (f", only {_kinds(unused)}" if unused else "")
    links = any("--follow-links" in reason for _, reason in unused)
    return UserError(what, where=str(folder), hint="add --follow-links" if links else "name another folder")


def build_shards(
    out: Path,
    items: Sequence[Item],
    make: Make,
    *,
    options: dict[str, Any],
    unused: Sequence[tuple[str, str]] = (),
    samples_per_shard: int = 1000,
    processes: int | None = None,
    prefix: str = "shard",
    anew: bool = False,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Write shards, their index and `rejected.tsv`, which has one line per unused file.

    Args:
        out: created if missing; a build with the same options in it is resumed, or updated to changed files.
        items: in order; the key of a sample is its position in this list.
        make: makes a sample from an item.
        options: everything that affects the content, to detect a folder that holds another build.
        unused: (name, reason) of files that are not items.
        samples_per_shard: items per shard; a shard with rejected ones is smaller.
        processes: None means one per core.
        prefix: start of the shards' names.
        anew: rebuild all shards.
        say: called with one line on what an earlier build left and what will be done.

    Raises:
        UserError: there are no items, none can be used, or the folder holds another build.
    """
    if samples_per_shard < 1:
        raise UserError(f"is {samples_per_shard}", where="--samples-per-shard", hint="use 1 or more")
    if not items:
        raise _nothing_to_build(Path(str(options.get("folder", out))), unused)
    with building_in(out / JOURNAL):
        journal = ShardJournal(out, {**options, "samples_per_shard": samples_per_shard})
        found = journal.shards
        shards = list(_shards(items, samples_per_shard, prefix))
        rows = {} if anew else {shard.name: found[shard.name] for shard in shards if _is_done(out, shard, found)}
        missing = [shard for shard in shards if shard.name not in rows]
        gone = found.keys() - {shard.name for shard in shards}
        if found and say is not None:
            say(_what_was_found(len(rows), [found.get(shard.name) for shard in missing], len(gone)))
        if missing or gone:
            (out / INDEX_NAME).unlink(missing_ok=True)  # it describes shards that are about to change
        journal.remove(gone)
        with progress_bar("shards", len(shards)) as show:
            made = ordered_map(partial(_write, out, make), missing, processes=processes)
            for shard, row in zip(missing, made, strict=True):
                rows[shard.name] = row
                journal.note(shard=shard.name, **row._asdict())
                show(len(rows))
        return finish(out, rows, unused, processes or available_cores())


def _is_done(out: Path, shard: _Shard, found: Mapping[str, Row]) -> bool:
    row = found.get(shard.name)
    if row is None or row.digest != shard.digest or row.samples + len(row.rejected) != len(shard.items):
        return False
    return not row.samples or (out / shard.name).is_file()


def _what_was_found(kept: int, missing: Sequence[Row | None], gone: int) -> str:
    """Describe what an earlier build left: shards kept, earlier rows of those to build, shards no longer wanted."""
    if not missing and not gone:
        return f"already built from these files, {kept} shards: nothing to do (--anew rebuilds them)"
    older = sum(row is not None and not row.digest for row in missing)
    to_come = sum(row is None for row in missing)
    changed = len(missing) - older - to_come
    told = [f"{kept} shards are kept"]
    told += [f"{changed} are rebuilt because files have changed"] if changed else []
    told += [f"{older} are rebuilt because an earlier version wrote them"] if older else []
    told += [f"{to_come} are still missing"] if to_come else []
    told += [f"{gone} are removed"] if gone else []
    return f"built before: {', '.join(told)} (--anew rebuilds all of them)"


def finish(out: Path, rows: dict[str, Row], unused: Sequence[tuple[str, str]], jobs: int) -> Report:
    """Write `rejected.tsv` and the index. Raises UserError if no sample was written."""
    rejected = sorted({(name, reason) for row in rows.values() for name, reason in row.rejected})
    left = sorted({*unused, *((name, reason) for row in rows.values() for name, reason in row.unused)})
    write_rejected(out, ((name, " ".join(reason.split())) for name, reason in rejected + left))
    samples, images, captions = (
        sum(getattr(row, name) for row in rows.values()) for name in ("samples", "images", "captions")
    )
    if not samples:
        (out / JOURNAL).unlink(missing_ok=True)  # other options may use more, and must not be refused here
        hint = f"see {out / REJECTED} for the reasons"
        raise UserError(
            f"all {len(rejected)} files were rejected, the first with: {rejected[0][1]}", where=str(out), hint=hint
        )
    if not _is_indexed(out, {name for name, row in rows.items() if row.samples}):
        index_shards(out, jobs=jobs, times=False)
    _require_whole(out, rows)
    return Report(samples, images, captions, rejected, left)


def _require_whole(out: Path, rows: Mapping[str, Row]) -> None:
    """Raise UserError if a finished shard no longer has the samples that were written into it."""
    for shard in load_index(out).shards:
        row = rows.get(shard.name)
        if row is not None and shard.count != row.samples:  # the count includes those left out by `verify --mark`
            what = f"has {shard.count} samples, but {row.samples} were written: it has been damaged or replaced since"
            hint = "delete it and run the same command to rebuild it"
            raise UserError(what, where=str(out / shard.name), hint=hint)


def _is_indexed(out: Path, names: set[str]) -> bool:
    """Return whether the folder's index, which may be damaged, lists exactly these shards."""
    try:
        return (out / INDEX_NAME).is_file() and {shard.name for shard in load_index(out).shards} == names
    except UserError:
        return False


def _shards(items: Sequence[Item], samples_per_shard: int, prefix: str) -> Iterator[_Shard]:
    for number, first in enumerate(range(0, len(items), samples_per_shard)):
        yield _Shard(f"{prefix}-{number:05d}.tar", first, list(items[first : first + samples_per_shard]))


def _write(out: Path, make: Make, shard: _Shard) -> Row:
    made = ((item, partial(make, item)) for item in shard.items)
    return write_made(out / shard.name, shard.first, made)._replace(digest=shard.digest)


def write_made(path: Path, first: int, made: Iterable[tuple[Item, Callable[[], Made]]]) -> Row:
    """Write one shard, its samples numbered from `first` on; return its journal row, without a digest.

    Args:
        made: items, each with a function that makes its sample or raises `SampleFault` or OSError to reject it.
    """
    samples: dict[str, dict[str, Field]] = {}
    rejected: list[Pair] = []
    unused: list[Pair] = []
    images = captions = 0
    for number, (item, make) in enumerate(made, start=first):
        try:
            fields, left = make()
        except SampleFault as fault:
            rejected.append([item.name, str(fault)])
            continue
        except OSError as fault:
            rejected.append([item.name, f"cannot be read ({fault.strerror or fault})"])
            continue
        samples[f"{number:08d}"] = fields
        unused += [[name, reason] for name, reason in left]
        images += item.repeat == 0
        captions += item.repeat == 0 and has_caption(fields)
    if samples:
        write_shard(path, samples)
    else:
        path.unlink(missing_ok=True)
    return Row("", len(samples), images, captions, rejected, unused)


def has_caption(fields: Mapping[str, Field]) -> bool:
    """Return whether the text or the record of a sample contains a caption."""
    record = fields.get("json")
    in_record = isinstance(record, Mapping) and any(record.get(name) for name in CaptionRules.fields)
    return not is_blank(str(fields.get("txt", ""))) or in_record


class ShardJournal(Journal):
    """The journal of a build; creating it begins the build. `shards` has the rows of finished shards by name."""

    def __init__(self, out: Path, header: dict[str, Any]) -> None:
        make_folder(out)
        added = {name: header[name] for name in ("follow_links",) if name in header}
        super().__init__(
            out / JOURNAL,
            header,
            other="the folder holds a build from another folder or with other options",
            present=lambda found: added | {key: found[key] for key in found if key not in RETIRED},
        )
        self.begin()
        self.shards: dict[str, Row] = {}
        for entry in self.rows:
            name = str(entry.pop("shard", ""))
            if not OWN_NAME.fullmatch(name):  # not written by a build, and names are used to delete files
                continue
            if entry.get("gone"):
                self.shards.pop(name, None)
            else:
                self.shards[name] = typed(Row, entry) or Row("", 0, 0, 0, [], [])

    def remove(self, names: Iterable[str]) -> None:
        """Delete shards that are no longer wanted."""
        for name in names:
            self.path.with_name(name).unlink(missing_ok=True)
            self.note(shard=name, gone=True)
