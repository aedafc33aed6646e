"""The drawings of the Open Clip Art collection: their metadata from paths and RDF, which are used, and in which order.

They come from the installed Debian package, a folder, or a .deb file. A harmless selection leaves out sexual, violent
and hateful drawings, by words and by a list made by visual inspection. The order is random, or takes folders in turn;
it comes from hashes of the seed and a name, so leaving out a drawing does not move the others.
"""

import hashlib
import io
import os
import re
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from hdm_lightning.errors import UserError

INSTALLED = Path("/usr/share/openclipart/svg")
_INSIDE_DEB = PurePosixPath("usr/share/openclipart/svg")
_PACKAGE = "the Debian package openclipart-svg (0.18+dfsg-19)"
_HINT = (
    f"install {_PACKAGE} with `apt-get install openclipart-svg`, or fetch it with `apt-get download openclipart-svg` "
    "and pass the file as --deb, or pass a folder of its drawings as --source"
)


@contextmanager
def open_source(source: str | Path | None = None, deb: str | Path | None = None) -> Iterator[Path]:
    """Yield the folder of drawings: `source`, else the content of `deb` (unpacked temporarily), else the installed one.

    Raises:
        UserError: there is no such folder or file, or it contains no drawings.
    """
    if source is not None:
        yield _require_drawings(Path(source), "--source")
    elif deb is not None:
        with TemporaryDirectory(prefix="openclipart-") as folder:
            _unpack(Path(deb), Path(folder))
            yield _require_drawings(Path(folder) / _INSIDE_DEB, "--deb")
    else:
        yield _require_drawings(INSTALLED, str(INSTALLED))


def list_drawings(folder: Path) -> tuple[list[str], list[str]]:
    """Return the `.svg` files below a folder and those that are symbolic links: sorted relative POSIX paths."""
    files: list[str] = []
    links: list[str] = []
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            if path.suffix == ".svg":
                (links if path.is_symlink() else files).append(path.relative_to(folder).as_posix())
    return sorted(files), sorted(links)


def _require_drawings(folder: Path, where: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", where=where, hint=_HINT)
    if next(folder.rglob("*.svg"), None) is None:
        raise UserError(f"the folder {folder} contains no .svg files", where=where, hint=_HINT)
    return folder


def _unpack(deb: Path, folder: Path) -> None:
    """Unpack the drawings of a Debian package (an ar archive around a compressed tar) below `folder`."""
    if not deb.is_file():
        raise UserError(f"there is no file {deb}", where="--deb", hint=_HINT)
    for name, content in _ar_members(deb):
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                for member in tar.getmembers():
                    _write_member(tar, member, folder)
            return
    raise UserError(f"{deb} contains no data.tar", where="--deb", hint=_HINT)


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write a drawing, or a link in place of one, below `folder`.

    Done by hand, as the filters that make `extractall` safe need Python 3.11.4.
    """
    name = PurePosixPath(member.name)
    if ".." in name.parts or not name.is_relative_to(_INSIDE_DEB) or not (member.isfile() or member.issym()):
        return
    target = folder / name
    if not target.parent.resolve().is_relative_to(folder.resolve()):  # through a link unpacked earlier
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if member.issym():
        target.symlink_to(member.linkname)  # never followed: `list_drawings` separates links from drawings
    else:
        content = tar.extractfile(member)
        target.write_bytes(content.read() if content else b"")


def _ar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise UserError(f"{path} is not a Debian package", where="--deb", hint=_HINT)
        while len(header := file.read(60)) == 60:
            size = int(header[48:58])
            yield header[:16].decode().strip().rstrip("/"), file.read(size)
            file.seek(size % 2, os.SEEK_CUR)


MAX_FILE_BYTES = 600_000
_DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_PUBLIC_DOMAIN = ("http://web.resource.org/cc/publicdomain", "http://creativecommons.org/licenses/publicdomain")


@dataclass(frozen=True)
class Record:
    """A drawing's metadata, as in its RDF.

    Attributes:
        path: relative POSIX path in the collection.
        title, description, author: texts, possibly empty.
        keywords: in their original order, without empty ones.
    """

    path: str
    title: str
    description: str
    author: str
    keywords: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The first two folders of the path, such as "animals/mammals"."""
        return "/".join(PurePosixPath(self.path).parent.parts[:2])

    @property
    def key(self) -> str:
        """The sample's key: the path without its suffix, with "-" for characters that a key must not have."""
        stem = PurePosixPath(self.path).with_suffix("").as_posix()
        return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in stem)


def read_record(folder: Path, path: str) -> Record | str:
    """Return a drawing's record, or in a few words why it is left out."""
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
    """Return the first `cc:Work`, without parsing beyond it."""
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


EXCLUDED: dict[str, str] = {
    "animals/fantasy/mermaid_kurt_cagle_.svg": "bare body",
    "people/silhouette_female_1.svg": "bare body",
    "people/silhouette_female_2.svg": "bare body",
    "people/silhouette_male_1.svg": "bare body",
    "people/smilies/portrait_of_a_woman_guid_.svg": "bare body",
    "people/stylized_yoga_person_ger_04.svg": "bare body",
    "plants/human_humain_umano_sed_r.svg": "bare body",
    "recreation/religion/eris_nurbldoff_ksc_.svg": "bare body",
    "buildings/demolizione_costruzione_01.svg": "destruction",
    "people/smilies/crossbones_linda_kim_01.svg": "skull",
    "signs_and_symbols/crossbones_linda_kim_01.svg": "skull",
    "tools/insecticide_nicu_buculei_01.svg": "skull",
    "tools/insecticide_nicu_buculei_02.svg": "skull",
    "signs_and_symbols/flags/africa/swaziland.svg": "spears",
    "signs_and_symbols/flags/asia/saudi_arabia.svg": "sword",
    "signs_and_symbols/vancouver_city_badge_wes_01.svg": "axe",
    "unsorted/media_as_wmd_saint_.svg": "bomb",
    "unsorted/psycho_icecube_phentex_01.svg": "threat",
    "people/clothing/hats/pimp_hat_james_birkett_01.svg": "demeaning name",
    "unsorted/lauburu_aitor_avila_.svg": "could be taken for a sign of hate",
    "people/xbill_01.svg": "mocks a person",
    "people/my_lovely_baby_enrique_m_01.svg": "another owner's character",
    "recreation/toys/domo_kun_nicu_buculei_01.svg": "another owner's character",
    "recreation/toys/domo_kun_nicu_buculei_02.svg": "another owner's character",
}

# Beginnings of words in titles, descriptions, keywords and paths; a final dot stands for the end of the word.
# Broad on purpose: losing a harmless drawing is cheap. Some are Italian or French, like parts of the collection.
_SEXUAL = (
    "sex naked nude nudit breast bikini lingerie panties pantyhose collant stripper babe bra. bordel erotic porn",
    "penis vagina condom kamasutra playboy pinup fetish underwear",
)
_VIOLENT = (
    "gun gunshot pistol rifle revolver weapon sword dagger knife katana bomb bullet grenade missile cannon tank. ammo",
    "munition blood sangue kill murder dead death corpse skull bone skelet hanging gallow guillotine execut torture",
    "army soldier militar hummer war. warrior warship fighter battle ak47 uzi shotgun spear axe explos terror",
    "violen suicide attack shoot assassin devil demon satan hell. zombie grave tomb coffin cemetery crucif vampire",
    "poison toxic veleno pirate whip noose handcuff jail prison crossbow archer",
)
_HATEFUL = (
    "nazi swastik svastik hitler mussolini stalin fascis faschi reich kkk klan confedera racis supremac apartheid",
    "slave hate sunwheel communis soviet sickle lenin mao. bush. saddam guevara anarch politic propagand",
)
_UNHEALTHY = ("cigar smok tobacco drug cannabis marijuana hemp weed heroin cocaine syringe drunk",)
_WORDS = " ".join((*_SEXUAL, *_VIOLENT, *_HATEFUL, *_UNHEALTHY)).replace(".", r"(?![a-z])").split()
_PATTERN = re.compile(rf"(?<![a-z])(?:{'|'.join(_WORDS)})", re.IGNORECASE)
_FOLDERS = ("signs_and_symbols/flags/historic", "signs_and_symbols/flags/miscellany")


def refusal(record: Record) -> str | None:
    """Return why a drawing may not be harmless, or None."""
    if record.path in EXCLUDED:
        return f"left out on sight: {EXCLUDED[record.path]}"
    if record.path.startswith(_FOLDERS):
        return "in a folder that is left out whole"
    text = " ".join((record.title, record.description, *record.keywords, record.path)).replace("_", " ")
    found = _PATTERN.search(text)
    return f"word {found.group(0).lower()!r}" if found else None


def at_random(records: Iterable[Record], seed: int) -> list[Record]:
    """Return the records shuffled; the result depends on the seed and not on the order they had."""
    return sorted(records, key=lambda record: _draw_key(seed, record.path))


def folders_in_turn(records: Iterable[Record], seed: int) -> list[Record]:
    """Return the records in rounds; each has one record of every folder that has any left, folders in random order.

    A prefix of this order has as many drawings from small folders as from large ones, as long as they last.
    """
    folders: dict[str, list[Record]] = defaultdict(list)
    for record in at_random(records, seed):
        folders[record.folder].append(record)
    turns = (
        (turn, _draw_key(seed, f"{turn} {name}"), record)
        for name, group in folders.items()
        for turn, record in enumerate(group)
    )
    return [record for _, _, record in sorted(turns, key=lambda entry: entry[:2])]


def _draw_key(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()
