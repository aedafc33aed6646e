"""What is known of an Open Clip Art drawing before it is rendered, from its path, its size and its RDF."""

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MAX_FILE_BYTES = 600_000
_DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_PUBLIC_DOMAIN = ("http://web.resource.org/cc/publicdomain", "http://creativecommons.org/licenses/publicdomain")


@dataclass(frozen=True)
class Record:
    """A drawing's description, as it stands in its RDF.

    Attributes:
        path: relative POSIX path in the collection.
        title, description, author: texts, possibly empty.
        keywords: in their order, without empty ones.
    """

    path: str
    title: str
    description: str
    author: str
    keywords: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The first two folders of the path, as "animals/mammals"."""
        return "/".join(PurePosixPath(self.path).parent.parts[:2])

    @property
    def key(self) -> str:
        """The sample's key: the path without its ending, in a form that a shard can hold."""
        stem = PurePosixPath(self.path).with_suffix("").as_posix()
        return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in stem)


def read_record(folder: Path, path: str) -> Record | str:
    """Return a drawing's record, or the reason why it is left out, in a few words."""
    if reason := _refusal_by_path(path):
        return reason
    if (folder / path).stat().st_size > MAX_FILE_BYTES:
        return f"larger than {MAX_FILE_BYTES // 1000} kB"
    try:
        work = _find_work(folder / path)
    except ElementTree.ParseError:
        return "not well-formed"
    if work is None:
        return "without RDF"
    if not _is_public_domain(work):
        return "not tagged public domain"
    return _record(path, work)


def _refusal_by_path(path: str) -> str | None:
    pure = PurePosixPath(path)
    if path.startswith("computer/icons/"):
        return "icon theme"
    if path.startswith("shapes/stars/") and pure.name.startswith("star_"):
        return "generated star"
    if "gradients" in pure.parts or pure.name.startswith("gradient"):
        return "gradient"
    return None


def _find_work(file: Path) -> ElementTree.Element | None:
    """Return the first `cc:Work`, without parsing on after it."""
    for _, element in ElementTree.iterparse(file):
        if element.tag.endswith("}Work"):
            return element
    return None


def _is_public_domain(work: ElementTree.Element) -> bool:
    licences = [e.get(f"{_RDF}resource", "") for e in work if e.tag.endswith("}license")]
    return bool(licences) and all(licence.lower().rstrip("/") in _PUBLIC_DOMAIN for licence in licences)


def _record(path: str, work: ElementTree.Element) -> Record:
    subject = work.find(f"{_DUBLIN_CORE}subject")
    items = subject.iter(f"{_RDF}li") if subject is not None else ()
    creator = work.find(f"{_DUBLIN_CORE}creator")
    author = next(creator.iter(f"{_DUBLIN_CORE}title"), None) if creator is not None else None
    return Record(
        path,
        (work.findtext(f"{_DUBLIN_CORE}title") or "").strip(),
        (work.findtext(f"{_DUBLIN_CORE}description") or "").strip(),
        ((author.text if author is not None else "") or "").strip(),
        tuple(item.text.strip() for item in items if item.text and item.text.strip()),
    )
