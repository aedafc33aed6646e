"""Build shards from a folder laid out for kohya's trainers: `10_name/` holds images to be seen ten times.

Captions are next to the images. Their parts, whatever their separators, are rewritten in the grammar of
`data.captions`: `kept ||| tag $$ tag %% tag $$ tag`. Captions in a `.json` stay as they are.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hdm_lightning.argument_types import whole_number
from hdm_lightning.data.captions import TagGrammar
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.datasets import folder as plain_folder
from hdm_lightning.datasets.build import Item, Made, Report, has_caption
from hdm_lightning.datasets.source_files import SourceFolder
from hdm_lightning.datasets.source_images import caption_fields
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

_REPEATS = re.compile(r"^(\d+)_(.*)$")
_CANONICAL = TagGrammar()
MOST_FOLDERS = 20


@dataclass(frozen=True)
class KohyaOptions:
    """How a kohya folder is read.

    Attributes:
        kept, group, tag: separators in the source captions. A caption with `tag` but neither `kept` nor `group` is a
            list of tags.
        keep_tokens: number of leading tags of such a list that are always kept, in front.
        apply_repeats: write a sample as often as its folder says.
        max_repeats: a folder that asks for more is refused, as its number may be a date.
    """

    kept: str = "|||"
    group: str = "%%"
    tag: str = "$$"
    keep_tokens: int = 0
    apply_repeats: bool = True
    max_repeats: int = 1000


def build_kohya(folder: str | Path, out: str | Path, options: KohyaOptions | None = None, **how: Any) -> Report:
    """Write shards of all images below a folder; those without a caption get their folder's name as the caption.

    Args:
        folder, out: folder of images, and folder for the shards.
        options: how captions and repeats are read.
        how: as for `build_folder`; `allow_missing` keeps images that have no caption and whose folder has no name.

    Raises:
        UserError: there are no images, none can be used, a folder asks for too many repeats, or `out` holds another
            build.
    """
    return plain_folder.build_folder(folder, out, layout=_layout(options or KohyaOptions()), **how)


def _layout(options: KohyaOptions) -> plain_folder.Layout:
    # The bound on repeats only refuses: it does not affect the content.
    shaping = {name: value for name, value in asdict(options).items() if name != "max_repeats"}
    return plain_folder.Layout(("caption", "txt"), partial(_texts, options), partial(_items, options), shaping)


def _items(options: KohyaOptions, found: SourceFolder, say: Callable[[str], None] | None) -> list[Item]:
    """Return the images as often as their folders ask for; report the numbers, and refuse too large ones."""
    by_folder: dict[str, list[Item]] = {}
    for image in found.images:
        by_folder.setdefault(str(Path(image.name).parent), []).append(image)
    asked = {name: repeats_and_class(f"{name}/x")[0] if options.apply_repeats else 1 for name in by_folder}
    for name, repeats in asked.items():
        if repeats > options.max_repeats:
            what = f"the folder {name!r} asks for {repeats} copies of each of its {len(by_folder[name])} images"
            hint = f"rename it, or add --ignore-repeats, or --max-repeats {repeats} if it is intended"
            raise UserError(what, where="--max-repeats", hint=hint)
    if say is not None:
        for name in list(by_folder)[:MOST_FOLDERS]:
            say(f"  {in_one_line(name)}: {len(by_folder[name])} images x {asked[name]}")
        if len(by_folder) > MOST_FOLDERS:
            say(f"  and {len(by_folder) - MOST_FOLDERS} more folders")
    off = [image for name, images in by_folder.items() if not asked[name] for image in images]
    files = [name for image in off for name in (image.name, *image.texts, image.mask) if name is not None]
    found.unused += [(name, "its folder asks for 0 repeats") for name in files]
    return [
        image._replace(repeat=repeat)
        for name, images in by_folder.items()
        for image in images
        for repeat in range(asked[name])
    ]


def repeats_and_class(name: str) -> tuple[int, str]:
    """Return how often an image is to be seen, and its class, from the innermost folder named like `10_name`."""
    for part in reversed(Path(name).parent.parts):
        match = _REPEATS.match(part)
        if match:
            return int(match[1]), match[2].replace("_", " ").strip()
    return 1, ""


def canonical_caption(text: str, options: KohyaOptions) -> str:
    """Return a caption with this project's separators; one without any separator stays as it is."""
    grammar = TagGrammar(kept=options.kept, group=options.group, tag=options.tag)
    if not grammar.is_used_in(text):
        return text
    kept, groups = grammar.parse(text)
    if not kept and groups and options.keep_tokens and options.kept not in text:
        front, groups = groups[0][: options.keep_tokens], [groups[0][options.keep_tokens :], *groups[1:]]
        kept = _CANONICAL.join.join(front)
    tags = f" {_CANONICAL.group} ".join(f" {_CANONICAL.tag} ".join(group) for group in groups if group)
    # Even a lone kept part keeps its separator, so that its commas are not taken for tag separators.
    return f"{kept} {_CANONICAL.kept} {tags}".strip() if kept else tags


def _texts(options: KohyaOptions, root: Path, item: Item, allow_missing: bool) -> Made:
    repeats, shown = repeats_and_class(item.name)
    record = {"source": item.name, "repeats": repeats, "repeat": item.repeat}
    made = caption_fields(root, item.texts, record, allow_missing=True)
    text = canonical_caption(str(made.fields.get("txt", "")), options)
    if not has_caption({**made.fields, "txt": text}):
        text = canonical_caption(shown, options)
        if not text and not allow_missing:
            raise SampleFault("no caption")
    return made._replace(fields={**made.fields, "txt": text}) if text or "txt" in made.fields else made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build kohya`."""
    plain_folder.add_arguments(parser)
    parser.add_argument("--kept-separator", default="|||", help="after the part that is kept (default '%(default)s')")
    parser.add_argument("--group-separator", default="%%", help="between groups of tags (default '%(default)s')")
    parser.add_argument("--tag-separator", default="$$", help="between tags (default '%(default)s'; often ',')")
    parser.add_argument(
        "--keep-tokens", type=whole_number(0), default=0, help="leading tags to keep if no part is marked as kept"
    )
    parser.add_argument("--ignore-repeats", action="store_true", help="write each image once")
    parser.add_argument(
        "--max-repeats",
        type=whole_number(1),
        default=1000,
        help="refuse folders that ask for more (default %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Build from the arguments and print a summary."""
    options = KohyaOptions(
        arguments.kept_separator,
        arguments.group_separator,
        arguments.tag_separator,
        arguments.keep_tokens,
        not arguments.ignore_repeats,
        arguments.max_repeats,
    )
    return plain_folder.run(arguments, _layout(options))
