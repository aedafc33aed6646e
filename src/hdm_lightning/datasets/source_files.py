"""What lies in a folder of images: images, the captions and records beside them, and all the rest by what it is.

Every file below the folder is found once. Images are known by their content where the name does not tell; captions by
their image's name, whatever the case of the extension and the form in which the name is written.
"""

import hashlib
import os
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.image_headers import HEAD_BYTES, foreign_kind, image_kind
from hdm_lightning.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif", ".tif", ".tiff", ".jfif", ".jpe", ".jp2")
CLUTTER = ("thumbs.db", "desktop.ini", "@eadir", "__macosx")
"""Names that systems write beside images, in lower case; what lies in such folders is none of the user's."""

MASK = ".mask.png"
"""What the name of an image's mask has, in any case, in the place of the image's extension or behind it."""

FOLLOW = "not followed (--follow-links takes what it leads to)"


class SourceImage(NamedTuple):
    """An image, the files with its captions and its record, and its mask, all relative to the folder.

    `state` changes when one of them does.
    """

    name: str
    texts: tuple[str, ...]
    state: str
    mask: str | None = None


@dataclass
class SourceFolder:
    """What a folder holds.

    Attributes:
        images: sorted by name.
        unused: (name, reason) of each file that is neither an image nor belongs to one.
    """

    images: list[SourceImage] = field(default_factory=list)
    unused: list[tuple[str, str]] = field(default_factory=list)


class _File(NamedTuple):
    name: str
    state: tuple[int, int, int]


def look_into(
    folder: Path, extensions: Sequence[str], *, follow_links: bool = False, out: Path | None = None
) -> SourceFolder:
    """All files below a folder.

    Args:
        folder: with images.
        extensions: of captions, the first found counts, without dots; a record (`json`) counts beside it.
        follow_links: take what links to places outside the folder lead to.
        out: a folder that is not looked into, as it gets the shards.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError("there is no such folder", where=str(folder), hint="name the folder that holds the images")
    found, images = SourceFolder(), []
    texts: dict[str, _File] = {}
    masks: dict[str, _File] = {}
    barred: dict[str, str] = {}  # masks that are there but cannot be used
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
    used = _with_texts(sorted(images), texts, masks, (*extensions, "json"), found)
    _leave_out_barred(found, barred)
    found.unused += [(name, "a caption or record without an image") for name in texts.keys() - used]
    found.unused += [(name, "a mask without an image") for name in masks.keys() - used - barred.keys()]
    found.unused.sort()
    return found


def _with_texts(
    images: list[_File],
    texts: dict[str, _File],
    masks: dict[str, _File],
    extensions: Sequence[str],
    found: SourceFolder,
) -> set[str]:
    """Put the images with their captions into `found`; returns the names of all texts and masks that belong to one."""
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
            found.unused.append((name, f"another caption beside {captions[0]}, which counts"))
        mask = _file_of(image.name, MASK, by_name, exact)
        seen.update(beside, () if mask is None else (mask,))
        states = [image, *(texts[name] for name in chosen), *(() if mask is None else (masks[mask],))]
        found.images.append(SourceImage(image.name, chosen, _digest(states), mask))
    return seen


def _leave_out_barred(found: SourceFolder, barred: dict[str, str]) -> None:
    """Name the images whose mask cannot be used: without it, what it hides would be learned."""
    for image in (each for each in found.images if each.mask in barred):
        reason = f"an image whose mask cannot be used ({barred[str(image.mask)]})"
        found.unused.append((image.name, reason))
        found.unused += [(name, f"a caption or record of {reason}") for name in image.texts]
    found.images = [image for image in found.images if image.mask not in barred]


def _file_of(image: str, ending: str, by_name: dict[str, list[str]], exact: set[str]) -> str | None:
    """The file with an ending that belongs to an image: of its very name, or else of one written otherwise."""
    for stem in _stems(image):
        there = {name: name[: -len(ending)] for name in by_name.get(_folded(stem + ending), ())}
        own = [name for name, start in there.items() if start == stem]
        # What is exactly another image's is not this one's.
        others = [name for name, start in there.items() if start not in exact]
        if own or others:
            return (own or others)[0]
    return None


def _stems(image: str) -> tuple[str, str]:
    """What a text of an image may be called before its extension: `a` or `a.jpg`."""
    return _stem(image), image


def _stem(name: str) -> str:
    head, _, tail = name.rpartition(".")
    return name if not head or head.endswith("/") or "/" in tail else head


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _digest(files: Sequence[_File]) -> str:
    return hashlib.sha256(repr(files).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _files(folder: Path, follow_links: bool, out: Path | None) -> Iterator[tuple[_File, str]]:
    """Each file below a folder, and why it cannot be used, if so; folders that are left out come as one."""
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
                yield file, "a link to a folder that is taken already"
            else:
                known.add(place)
                waiting.append(f"{name}/")


def _judged(entry: "os.DirEntry[str]", name: str, root: str, follow_links: bool) -> tuple[int, _File, str]:
    """The mode of a file or folder, what it is, and why it is left out, if so."""
    try:
        state = entry.stat()
    except OSError:
        return 0, _File(name, (0, 0, 0)), "a link that leads nowhere" if entry.is_symlink() else "cannot be read"
    mode, file = state.st_mode, _File(name, (state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    reason = ""
    if entry.name.startswith(".") or entry.name.lower() in CLUTTER:
        reason = "hidden, or written by the system"
    elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        reason = "no file but a device, pipe or socket"
    elif entry.is_symlink() and not follow_links and not _is_below(os.path.realpath(entry.path), root):
        reason = f"a link out of the folder, {FOLLOW}"
    return mode, file, reason


def _is_below(path: str, root: str) -> bool:
    return path == root.rstrip("/") or path.startswith(root.rstrip("/") + "/")


def _kind(path: Path) -> str | None:
    """What a file is that is no image, None for an image."""
    try:
        head = read_file(path, HEAD_BYTES, whole=False)
    except (OSError, SampleFault) as error:
        return f"cannot be read ({error})"
    if image_kind(head) is not None:
        return None
    suffix = path.suffix.lower() or "no extension"
    known = foreign_kind(head)
    return f"no image: {suffix}" + (f", {known}" if known else "")


def read_file(path: Path, limit: int, *, whole: bool = True) -> bytes:
    """A regular file, or its first bytes.

    Raises:
        SampleFault: it is none, or longer than the limit where the whole is wanted.
        OSError: it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer would hold us up
    with open(handle, "rb") as file:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise SampleFault("not a regular file")
        if whole and state.st_size > limit:
            raise SampleFault(f"file too large: {state.st_size} bytes")
        return file.read(limit)


def kinds_of(unused: Sequence[tuple[str, str]]) -> Counter[str]:
    """How many files there are of each kind."""
    return Counter(
        reason.partition(" beside ")[0].removeprefix("no image: ").removeprefix("a ") for _, reason in unused
    )
