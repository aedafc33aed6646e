"""Build shards from the Open Clip Art collection: public-domain drawings with titles, keywords and descriptions.

The build goes through the drawings in a fixed order, so the same source, options and seed give the same shards; an
interrupted build resumes after its last whole shard.
"""

import argparse
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hdm_lightning.argument_types import whole_number
from hdm_lightning.data.parallel import ordered_map, progress_bar
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.datasets.journal import holds_nothing
from hdm_lightning.datasets.openclipart_captions import describe
from hdm_lightning.datasets.openclipart_drawing import Miniatures, Unusable, encode_webp, render
from hdm_lightning.datasets.openclipart_source import (
    Record,
    at_random,
    folders_in_turn,
    list_drawings,
    open_source,
    read_record,
    refusal,
)
from hdm_lightning.datasets.shard_work import building_in
from hdm_lightning.datasets.writer import Field, require_no_shards, write_shard
from hdm_lightning.errors import UserError, import_optional
from hdm_lightning.whole_files import no_follow

PREFIX = "openclipart"
JOURNAL = "drawings.tsv"


@dataclass(frozen=True)
class OpenClipArtOptions:
    """The content of a build.

    Attributes:
        resolution: length of `side` in pixels.
        side: the side that has this length, "long" or "short".
        quality: WebP quality, 1 to 100.
        count: stop after this many images; None takes all.
        seed: seed of the order.
        folders_in_turn: take the folders in turn, so that a small count is varied; otherwise all at random.
        harmless: leave out drawings that are sexual, violent or hateful by a word list or by visual inspection.
        named: only drawings whose author gave them a title and keywords.
        max_image_bytes: leave out images that encode to more; None takes all.
        samples_per_shard: samples in each shard but the last.
    """

    resolution: int = 256
    side: Literal["long", "short"] = "long"
    quality: int = 90
    count: int | None = None
    seed: int = 0
    folders_in_turn: bool = False
    harmless: bool = False
    named: bool = False
    max_image_bytes: int | None = None
    samples_per_shard: int = 500

    def __post_init__(self) -> None:
        limits = {"resolution": (16, 4096), "quality": (1, 100), "samples_per_shard": (1, 10**6)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(
                    f"is {getattr(self, name)}; expected {low} to {high}",
                    where=f"--{name.replace('_', '-')}",
                    hint="choose a number in this range",
                )


def build_openclipart(
    folder: str | Path,
    options: OpenClipArtOptions | None = None,
    *,
    source: str | Path | None = None,
    deb: str | Path | None = None,
    processes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Counter[str]:
    """Write shards, their index and `drawings.tsv` (one line per drawing: its shard, or why it was refused).

    Args:
        folder: created if missing; an interrupted build in it with the same options resumes.
        options: the content of the build.
        source, deb: a folder of drawings, or the file of the Debian package; with neither, the installed package.
        processes: workers that render; None means one per core.
        progress: called with the number of images so far.

    Returns:
        Number of drawings kept ("kept") and refused, by reason.

    Raises:
        UserError: there are no drawings, an option is out of range, the folder holds another build, or another call
            is building in it.
    """
    options, folder = options or OpenClipArtOptions(), Path(folder)
    with open_source(source, deb) as drawings, building_in(folder / JOURNAL):
        build = _Build(folder, options, Journal(folder, asdict(options)), progress)
        records = build.select(drawings)
        build.draw(records, drawings, processes)
        index_shards(folder, times=False)
    return build.tally()


class Journal:
    """One line per drawing, kept or refused, from which an interrupted build of a folder resumes.

    Lines are `path<TAB>outcome`, where the outcome is `shard NAME` or `refused: REASON`. They are appended once the
    shard that they belong to is complete, so the journal never runs ahead of the shards.

    Raises:
        UserError: the folder holds a build with other options, or shards without a journal.
    """

    def __init__(self, folder: Path, options: Mapping[str, object]) -> None:
        self.path = folder / JOURNAL
        self.outcomes: dict[str, str] = {}
        header = f"# {json.dumps(dict(options), sort_keys=True)}"
        lines = self._whole_lines()
        claimed = len(lines) == 1 and lines[0] != header and holds_nothing(folder, self.path.name)
        if not lines or claimed:
            require_no_shards(folder)
            self.path.unlink(missing_ok=True)
            self._append([header])
            return
        if lines[0] != header:
            raise UserError(
                f"the folder holds a build with other options: {lines[0]}",
                where=str(self.path),
                hint="name another folder, or delete this one",
            )
        self.outcomes = dict(line.split("\t", 1) for line in lines[1:])

    def shards(self) -> list[str]:
        """Return the names of the shards written so far, in their order."""
        kept = (outcome.split(" ", 1)[1] for outcome in self.outcomes.values() if outcome.startswith("shard "))
        return list(dict.fromkeys(kept))

    def record(self, outcomes: Mapping[str, str]) -> None:
        """Append outcomes by path."""
        self.outcomes.update(outcomes)
        self._append([f"{path}\t{outcome}" for path, outcome in outcomes.items()])

    def _whole_lines(self) -> list[str]:
        """Return the complete lines of the file; cut off an incomplete one that a killed build left."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self.path, len(whole))
        return whole.decode().splitlines()

    def _append(self, lines: list[str]) -> None:
        with open(self.path, "a", encoding="utf-8", opener=no_follow) as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


class _Build:
    """A build in progress: the images seen so far, and the shard being filled."""

    def __init__(
        self,
        folder: Path,
        options: OpenClipArtOptions,
        journal: Journal,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.folder, self.options, self.journal, self.progress = folder, options, journal, progress
        self.shards = journal.shards()
        self.seen = Miniatures()
        for name in self.shards:
            for webp in _images(folder / name):
                self.seen.add(webp)
        self.samples: dict[str, dict[str, Field]] = {}
        self.outcomes: dict[str, str] = {}

    @property
    def full(self) -> bool:
        return self.options.count is not None and len(self.seen) >= self.options.count

    def select(self, drawings: Path) -> list[Record]:
        """Return the drawings to render, in order; note in the journal why the others are refused."""
        files, links = list_drawings(drawings)
        refused = dict.fromkeys(links, "symbolic link")
        kept = []
        for path, found in zip(files, ordered_map(partial(read_record, drawings), files, processes=1), strict=True):
            reason = found if isinstance(found, str) else self._refusal(found)
            if reason:
                refused[path] = reason
            elif isinstance(found, Record):
                kept.append(found)
        if not self.journal.outcomes:
            self.journal.record({path: f"refused: {reason}" for path, reason in sorted(refused.items())})
        order = folders_in_turn if self.options.folders_in_turn else at_random
        return order(kept, self.options.seed)

    def draw(self, records: list[Record], drawings: Path, processes: int | None) -> None:
        """Render the drawings that are not in the journal yet, until there are enough."""
        waiting = [record for record in records if record.path not in self.journal.outcomes and not self.full]
        drawn = ordered_map(partial(_draw, drawings, self.options), waiting, processes=processes)
        for record, result in zip(waiting, drawn, strict=False):
            if self.full:
                break
            self._take(record, result)
        self._close_shard()

    def tally(self) -> Counter[str]:
        outcomes = self.journal.outcomes.values()
        return Counter(o.removeprefix("refused: ") if o.startswith("refused") else "kept" for o in outcomes)

    def _refusal(self, record: Record) -> str | None:
        words = describe(record)
        if not words.captions:
            return "no caption"
        if self.options.named and not words.named:
            return "no title and keywords of its own"
        return refusal(record) if self.options.harmless else None

    def _take(self, record: Record, result: dict[str, Any] | str) -> None:
        if isinstance(result, str):
            self.outcomes[record.path] = f"refused: {result}"
            return
        if not self.seen.add(result["webp"]):
            self.outcomes[record.path] = "refused: duplicate"
            return
        self.samples[record.key] = result
        self.outcomes[record.path] = f"shard {self._shard_name()}"
        if self.progress is not None:
            self.progress(len(self.seen))
        if len(self.samples) == self.options.samples_per_shard:
            self._close_shard()

    def _shard_name(self) -> str:
        return f"{PREFIX}-{len(self.shards):05d}.tar"

    def _close_shard(self) -> None:
        if self.samples:
            write_shard(self.folder / self._shard_name(), self.samples)
            self.shards.append(self._shard_name())
        self.journal.record(self.outcomes)
        self.samples, self.outcomes = {}, {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build openclipart`."""
    default = OpenClipArtOptions()
    parser.add_argument("--out", required=True, help="folder for the shards and their index")
    parser.add_argument("--source", help="folder of drawings (default: where the Debian package puts them)")
    parser.add_argument("--deb", help="file of the Debian package openclipart-svg, unpacked temporarily")
    parser.add_argument("--resolution", type=int, default=default.resolution, help="in pixels (default %(default)s)")
    parser.add_argument("--side", choices=("long", "short"), default=default.side, help="side of that length")
    parser.add_argument("--quality", type=int, default=default.quality, help="WebP quality (default %(default)s)")
    parser.add_argument("--count", type=whole_number(1), help="stop after this many images")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of the order")
    parser.add_argument("--folders-in-turn", action="store_true", help="take folders in turn, to vary a small count")
    parser.add_argument("--harmless", action="store_true", help="leave out sexual, violent and hateful drawings")
    parser.add_argument("--named", action="store_true", help="only drawings with a title and keywords by their author")
    parser.add_argument("--max-image-bytes", type=whole_number(1), help="leave out images that encode to more")
    parser.add_argument("--samples-per-shard", type=int, default=default.samples_per_shard)
    parser.add_argument("--processes", type=whole_number(1), help="default: one per core")


def run(args: argparse.Namespace) -> int:
    """Build from the arguments and print how many drawings were kept and refused, by reason."""
    import_optional("resvg_py", "builders", where="hdm-shards build openclipart")  # renders the drawings
    names = OpenClipArtOptions.__dataclass_fields__
    options = OpenClipArtOptions(**{name: value for name, value in vars(args).items() if name in names})
    with progress_bar("drawings", args.count) as progress:
        tally = build_openclipart(
            args.out,
            options,
            source=args.source,
            deb=args.deb,
            processes=args.processes,
            progress=progress,
        )
    for reason, number in tally.most_common():
        print(f"{number:6d}  {reason}")
    return 0


def _draw(drawings: Path, options: OpenClipArtOptions, record: Record) -> dict[str, Any] | str:
    """Return the fields of a drawing's sample, or why it cannot be used."""
    try:
        image = render(drawings / record.path, options.resolution, short_side=options.side == "short")
    except Unusable as reason:
        return str(reason)
    webp = encode_webp(image, options.quality)
    if options.max_image_bytes is not None and len(webp) > options.max_image_bytes:
        return f"encodes to more than {options.max_image_bytes} bytes"
    words = describe(record)
    facts = {
        "captions": list(words.captions),
        "title": words.title,
        "keywords": list(words.keywords),
        "author": record.author,
        "licence": "public domain",
        "source": f"openclipart 0.18: {record.path}",
        "width": image.width,
        "height": image.height,
    }
    return {"webp": webp, "txt": words.captions[0], "json": facts}


def _images(shard: Path) -> Iterator[bytes]:
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".webp") and (file := tar.extractfile(member)) is not None:
                yield file.read()
