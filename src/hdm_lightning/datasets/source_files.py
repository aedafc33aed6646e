"""The files in a folder of images: images, the captions and records next to them, and everything else by kind.

Every file below the folder is found once. Images without a known extension are recognized by their content; captions by
their image's name, whatever the case of the extension and the Unicode form of the name.
"""

import hashlib
import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.image_headers import HEAD_BYTES, foreign_kind, image_kind
from hdm_lightning.datasets.build import Item
from hdm_lightning.errors import UserError
from hdm_lightning.regular_files import open_regular

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif", ".tif", ".tiff", ".jfif", ".jpe", ".jp2")
CLUTTER = ("thumbs.db", "desktop.ini", "@eadir", "__macosx")
"""Names, in lower case, that operating systems add to folders of images; such folders are not searched."""

MASK = ".mask.png"
"""End of the name of an image's mask, in any case, in place of the image's extension or after it."""

FOLLOW = "not followed (--follow-links uses what it points to)"


@dataclass
class SourceFolder:
    """The content of a folder.

    Attributes:
        images: sorted by name; the names of their files are relative to the folder.
        unused: (name, reason) of each file that is neither an image nor belongs to one.
    """

    images: list[Item] = field(default_factory=list)
    unused: list[tuple[str, str]] = field(default_factory=list)


class _File(NamedTuple):
    name: str
    state: tuple[int, int, int]


def look_into(
    folder: Path, extensions: Sequence[str], *, follow_links: bool = False, out: Path | None = None
) -> SourceFolder:
    """Find all files below a folder.

    Args:
        folder: with images.
        extensions: extensions of captions, without dots; the first found is used, and a record (`json`) with it.
        follow_links: also use what links out of the folder point to.
        out: the folder for the shards, which is not searched.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError("there is no such folder", where=str(folder), hint="name the folder that holds the images")
    found, images = SourceFolder(), []
    texts: dict[str, _File] = {}
    masks: dict[str, _File] = {}
    barred: dict[str, str] = {}  # masks that exist but cannot be used
    for file, reason in _files(folder, follow_links, out):
        suffix = file.name[len(_stem(file.name)) :].lower()
        if reason:
            found.unused.append((file.name, reason))
            if file.name.lower().endswith(MASK):
                masks[file.name], barred[file.name] = file, reason
        elif file.name.lower().endswith(MASK):
            masks[file.name] = file
        elif suffix in EXTENSIONS:
            images.append(file)
        elif suffix[1:] in (*extensions, "json"):
            texts[file.name] = file
        elif (kind := _kind(folder / file.name)) is None:
            images.append(file)
        else:
            found.unused.append((file.name, kind))
    used = _with_texts(sorted(images), texts, masks, barred, (*extensions, "json"), found)
    found.unused += [(name, "a caption or record without an image") for name in texts.keys() - used]
    found.unused += [(name, "a mask without an image") for name in masks.keys() - used - barred.keys()]
    found.unused.sort()
    return found


def _with_texts(
    images: list[_File],
    texts: dict[str, _File],
    masks: dict[str, _File],
    barred: dict[str, str],
    extensions: Sequence[str],
    found: SourceFolder,
) -> set[str]:
    """Put the images with their captions into `found`; return the names of all texts and masks that belong to one.

    Images whose mask cannot be used are left out: without it, training would learn what it hides.
    """
    by_name: dict[str, list[str]] = defaultdict(list)
    for name in sorted([*texts, *masks]):
        by_name[_folded(name)].append(name)
    exact = {stem for image in images for stem in _stems(image.name)}
    seen: set[str] = set()
    for image in images:
        each = (_file_of(image.name, f".{extension}", by_name, exact) for extension in extensions)
        beside = [name for name in each if name is not None]
        captions = [name for name in beside if not name.lower().endswith(".json")]
        chosen = tuple(captions[:1] + [name for name in beside if name not in captions])
        for name in set(captions[1:]) - seen:
            found.unused.append((name, f"another caption beside {captions[0]}, which is used"))
        mask = _file_of(image.name, MASK, by_name, exact)
        seen.update(beside, () if mask is None else (mask,))
        if mask is not None and mask in barred:
            reason = f"an image whose mask cannot be used ({barred[mask]})"
            found.unused.append((image.name, reason))
            found.unused += [(name, f"a caption or record of {reason}") for name in chosen]
            continue
        states = [image, *(texts[name] for name in chosen), *(() if mask is None else (masks[mask],))]
        found.images.append(Item(image.name, 0, chosen, _digest(states), mask))
    return seen


def _file_of(image: str, ending: str, by_name: dict[str, list[str]], exact: set[str]) -> str | None:
    """Return the file with an ending that belongs to an image: with exactly its name, or else in another spelling."""
    for stem in _stems(image):
        there = {name: name[: -len(ending)] for name in by_name.get(_folded(stem + ending), ())}
        own = [name for name, start in there.items() if start == stem]
        # A file that has exactly another image's name does not belong to this one.
        others = [name for name, start in there.items() if start not in exact]
        if own or others:
            return (own or others)[0]
    return None


def _stems(image: str) -> tuple[str, str]:
    """Return the names that a text of an image may have before its extension: `a` or `a.jpg`."""
    return _stem(image), image


def _stem(name: str) -> str:
    head, _, tail = name.rpartition(".")
    return name if not head or head.endswith("/") or "/" in tail else head


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _digest(files: Sequence[_File]) -> str:
    return hashlib.sha256(repr(files).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _files(folder: Path, follow_links: bool, out: Path | None) -> Iterator[tuple[_File, str]]:
    """Yield each file below a folder and why it cannot be used, if so; a folder left out is yielded as one file."""
    root = os.path.realpath(folder)
    waiting, known, left_out = [""], {root}, None if out is None else os.path.realpath(out)
    while waiting:
        prefix = waiting.pop()
        try:
            entries = sorted(os.scandir(folder / prefix), key=lambda entry: entry.name)
        except OSError as error:
            yield _File(prefix, (0, 0, 0)), f"a folder that cannot be read ({error.strerror})"
            continue
        for entry in entries:
            name = prefix + entry.name
            mode, file, reason = _judged(entry, name, root, follow_links)
            if reason or not stat.S_ISDIR(mode):
                yield file, reason
            elif (place := os.path.realpath(entry.path)) == left_out:
                continue
            elif place in known:
                yield file, "a link to a folder that is already included"
            else:
                known.add(place)
                waiting.append(f"{name}/")


def _judged(entry: "os.DirEntry[str]", name: str, root: str, follow_links: bool) -> tuple[int, _File, str]:
    """Return the mode of a file or folder, its name and state, and why it is left out, if so."""
    try:
        state = entry.stat()
    except OSError:
        return 0, _File(name, (0, 0, 0)), "a link that leads nowhere" if entry.is_symlink() else "cannot be read"
    mode, file = state.st_mode, _File(name, (state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    reason = ""
    if entry.name.startswith(".") or entry.name.lower() in CLUTTER:
        reason = "hidden, or written by the system"
    elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        reason = "a device, pipe or socket"
    elif entry.is_symlink() and not follow_links and not _is_below(os.path.realpath(entry.path), root):
        reason = f"a link out of the folder, {FOLLOW}"
    return mode, file, reason


def _is_below(path: str, root: str) -> bool:
    return path == root.rstrip("/") or path.startswith(root.rstrip("/") + "/")


def _kind(path: Path) -> str | None:
    """Return the kind of a file that is not an image, None for an image."""
    try:
        head = read_file(path, HEAD_BYTES, whole=False)
    except (OSError, SampleFault) as error:
        return f"cannot be read ({error})"
    if image_kind(head) is not None:
        return None
    suffix = path.suffix.lower() or "no extension"
    known = foreign_kind(head)
    return f"not an image: {suffix}" + (f", {known}" if known else "")


def read_file(path: Path, limit: int, *, whole: bool = True) -> bytes:
    """Return the content of a regular file, or its first bytes.

    Raises:
        SampleFault: it is longer than the limit although the whole is wanted.
        OSError: it cannot be read, or is not a regular file.
    """
    with open(path, "rb", opener=open_regular) as file:
        size = os.fstat(file.fileno()).st_size
        if whole and size > limit:
            raise SampleFault(f"file too large: {size} bytes")
        return file.read(limit)
