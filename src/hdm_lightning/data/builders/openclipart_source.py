"""Finds the drawings of the Open Clip Art collection: the installed Debian package, a folder, or a .deb file."""

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from hdm_lightning.errors import UserError

INSTALLED = Path("/usr/share/openclipart/svg")
_INSIDE_DEB = PurePosixPath("usr/share/openclipart/svg")
_PACKAGE = "the Debian package openclipart-svg (0.18+dfsg-19)"
_MEND = (
    f"install {_PACKAGE} with `apt-get install openclipart-svg`, or fetch it with `apt-get download openclipart-svg` "
    "and pass the file as --deb, or pass a folder of its drawings as --source"
)


@contextmanager
def open_source(source: str | Path | None = None, deb: str | Path | None = None) -> Iterator[Path]:
    """Yield the folder of drawings: `source`, else what `deb` holds (unpacked for the time), else the installed one.

    Raises:
        UserError: when there is no such folder or file, or it holds no drawing.
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
        raise UserError(f"there is no folder {folder}", where=where, hint=_MEND)
    if next(folder.rglob("*.svg"), None) is None:
        raise UserError(f"the folder {folder} holds no .svg file", where=where, hint=_MEND)
    return folder


def _unpack(deb: Path, folder: Path) -> None:
    """Unpack the drawings of a Debian package (an ar archive around a compressed tar) below `folder`."""
    if not deb.is_file():
        raise UserError(f"there is no file {deb}", where="--deb", hint=_MEND)
    for name, content in _ar_members(deb):
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                for member in tar.getmembers():
                    _write_member(tar, member, folder)
            return
    raise UserError(f"{deb} holds no data.tar", where="--deb", hint=_MEND)


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write a drawing, or the link that stands for one, below `folder`.

    By hand, as the filters that make `extractall` safe came with Python 3.11.4.
    """
    name = PurePosixPath(member.name)
    if ".." in name.parts or not name.is_relative_to(_INSIDE_DEB) or not (member.isfile() or member.issym()):
        return
    target = folder / name
    if not target.parent.resolve().is_relative_to(folder.resolve()):  # through a link that came before
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if member.issym():
        target.symlink_to(member.linkname)  # never followed: `list_drawings` tells links from drawings
    else:
        content = tar.extractfile(member)
        target.write_bytes(content.read() if content else b"")


def _ar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise UserError(f"{path} is not a Debian package", where="--deb", hint=_MEND)
        while len(header := file.read(60)) == 60:
            size = int(header[48:58])
            yield header[:16].decode().strip().rstrip("/"), file.read(size)
            file.seek(size % 2, os.SEEK_CUR)
