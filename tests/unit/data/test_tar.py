"""Reading tar archives, against the standard library and webdataset."""

import io
import tarfile
from itertools import pairwise

import pytest

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.tar import is_unsafe, members, split_name


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_agree_with_the_standard_library(tmp_path, kit, form):
    long = "folder/" * 20 + "name.txt"
    names = ["a.txt", "b/c.d.png", "x" * 90 + ".json", "empty.txt"]
    names += [] if form == tarfile.USTAR_FORMAT else [long, "ünïcode-" + "é" * 120 + ".txt", "z" * 300 + ".txt"]
    path = kit.write_tar(tmp_path / "a.tar", [(name, b"x" * (7 * n)) for n, name in enumerate(names)], format=form)
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        expected = [(entry.name, entry.offset_data, entry.size) for entry in archive.getmembers()]
    found = list(members(kit.reader_of(data), 0, len(data)))
    assert [(member.name, member.data, member.size) for member in found] == expected
    assert found[0].start == 0 and all(one.end == other.start for one, other in pairwise(found))


def test_folders_links_and_float_times_do_not_disturb(tmp_path, kit):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as archive:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in ("d/1.txt", "d/2.txt"):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 3, 1234.5678
            archive.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("d/3.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    data = path.read_bytes()
    found = list(members(kit.reader_of(data), 0, len(data)))
    assert [(member.name, data[member.data : member.data + 3]) for member in found] == [
        ("d/1.txt", b"abc"),
        ("d/2.txt", b"abc"),
    ]


def test_large_sizes_are_read_in_base_256():
    from hdm_lightning.data.tar import _number

    assert _number(b"\x80" + (10**11).to_bytes(11, "big")) == 10**11
    assert _number(b"00000000017\0") == 15
    for field in (b"9bad       \0", b"\xff" * 12):
        with pytest.raises(SampleFault, match="damaged"):
            _number(field)


@pytest.mark.parametrize(
    "name", ["a.jpg", "a/b.jpg", "a/b.c/d.e.jpg", "noextension", ".hidden", "./k.TXT", "a b.png", "x..y"]
)
def test_keys_are_those_of_webdataset(name):
    from webdataset.tariterators import base_plus_ext

    prefix, suffix = base_plus_ext(name)
    assert split_name(name) == (None if not prefix else (prefix, suffix.lower()))


def test_unsafe_names():
    bad = ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg", "a/.."]
    good = ["a.jpg", "a..b.jpg", "a/b.jpg", "..a/b.jpg"]
    assert all(is_unsafe(name) for name in bad) and not any(is_unsafe(name) for name in good)
