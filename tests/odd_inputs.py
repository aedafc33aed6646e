"""Inputs of all kinds that people and attackers have, whole and damaged; each follows from a generator alone."""

import io
import json
import os
import tarfile

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "JPEG2000", "PPM", "ICO", "TGA")
MODES = ("RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16", "F")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift-jis", "koi8-r")
LETTERS = "ab Z9,.|$%&-_'\"<\\\x1b[31m\x00\t\né́ñ日本語🦊👩‍👩‍👧\u200b\u202e\u2028\ud800שלום"
NAMES = (
    *("a", "A", "a.b", "2024.05.01 x", ".hid", "..", "../up", "/abs", "C:\\x", "d/e", "./f", "x" * 99),
    *("y" * 180, "é", "é", "日本", "\x1b[2J", "tab\there", "line\nfeed", "", " ", "%s", "a=b"),
)


def some_text(draw):
    text = "".join(draw.choice(LETTERS) for _ in range(draw.choice((0, 1, 5, 40, 400))))
    return text * 2000 if draw.random() < 0.02 else text


def some_caption(draw):
    return some_text(draw).encode(draw.choice(ENCODINGS), draw.choice(("replace", "ignore")))


def some_value(draw, depth=0):
    kinds = ["text", "number", "none", "nan", "large", "list", "object"]
    match draw.choice(kinds[: 5 if depth > 2 else 7]):
        case "text":
            return some_text(draw)
        case "number":
            return draw.choice((0, -1, 1.5, True))
        case "none":
            return None
        case "nan":
            return draw.choice((float("nan"), float("inf")))
        case "large":
            return 10 ** draw.choice((20, 400, 4000))
        case "list":
            return [some_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(("caption", "captions", "text", "weight", "source", "x")): some_value(draw, depth + 1)}


def some_record(draw):
    record = {draw.choice(("caption", "captions", "source", "key")): some_value(draw) for _ in range(3)}
    data = json.dumps(draw.choice((record, [record], "x", 3))).encode()
    match draw.randrange(8):
        case 0:
            return data[: draw.randrange(len(data) + 1)]
        case 1:
            return b"[" * draw.choice((100, 100_000))
        case 2:
            return data.decode().encode(draw.choice(ENCODINGS), "replace")
        case 3:
            return data + b"\n" + data
    return data


def some_image(draw):
    """An image of any kind, whole or damaged; mostly whole."""
    width, height = draw.choice(((16, 12), (1, 1), (3, 40), (20, 20)))
    pixels = np.random.default_rng(draw.randrange(1 << 30)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, options = Image.fromarray(pixels), {}
    if draw.random() < 0.5:
        image = (
            image.convert("L").convert(mode) if (mode := draw.choice(MODES)) in ("I;16", "F") else image.convert(mode)
        )
    if draw.random() < 0.3:
        options["icc_profile"] = bytes(draw.randrange(256) for _ in range(draw.choice((4, 140, 400))))
    if draw.random() < 0.3:
        options["exif"] = b"Exif\0\0" + bytes(draw.randrange(256) for _ in range(draw.choice((4, 40))))
    buffer = io.BytesIO()
    try:
        image.save(buffer, draw.choice(FORMATS), **options)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        SyntaxError,
    ):  # such a mode, or such an EXIF block, does not fit the format
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
    return damaged(draw, buffer.getvalue()) if draw.random() < 0.4 else buffer.getvalue()


def noise(draw, count):
    return bytes(draw.randrange(256) for _ in range(count))


def flipped(draw, data):
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 5, 50)) if data else 0):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def damaged(draw, data):
    at = draw.randrange(len(data) + 1)
    return draw.choice(
        (
            lambda: data[:at],
            lambda: flipped(draw, data),
            lambda: flipped(draw, data),
            lambda: data[:at] + bytes(draw.choice((4, 512, 1024))) + data[at + draw.choice((4, 512, 1024)) :],
            lambda: data[:at] + noise(draw, draw.choice((1, 512, 700))) + data[at:],
            lambda: data + data,
            lambda: noise(draw, 600),
            lambda: b"",
            lambda: data + b"trailing" * 30,
        )
    )()


def some_members(draw):
    """Names and contents of an archive: samples, most of them good, in an order that is mostly good."""
    entries = []
    for number in range(draw.randrange(1, 9)):
        odd = draw.random() < 0.3
        stem = f"{number:03d}" if not odd else draw.choice(NAMES) + draw.choice(("", str(number)))
        extension = draw.choice(("png", "jpg", "PNG", "webp", "tif", "jpeg", "image.jpg", "cls", ""))
        entries.append((f"{stem}.{extension}", some_image(draw)))
        if draw.random() < 0.9:
            entries.append((f"{stem}.{draw.choice(('txt', 'txt', 'TXT', 'caption.txt'))}", some_caption(draw)))
        if draw.random() < 0.4:
            entries.append((f"{stem}.json", some_record(draw)))
    if draw.random() < 0.15:
        draw.shuffle(entries)
    return entries


def some_archive(draw):
    """The bytes of an archive, and the names of its members where nothing was damaged."""
    buffer, names = io.BytesIO(), []
    form = draw.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for name, data in some_members(draw):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), draw.choice((0, 1.5))
            if draw.random() < 0.05:
                member.type, member.size, member.linkname = (
                    draw.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)),
                    0,
                    "000.png",
                )
            try:
                archive.addfile(member, io.BytesIO(data))
            except (ValueError, UnicodeError):  # a name that this format cannot hold
                continue
            names += [name] * member.isreg()
    data = buffer.getvalue()
    match draw.randrange(10):
        case 0 | 1 | 2:
            return damaged(draw, data), None
        case 3:
            return hostile_header(draw) + data, None
        case 4:  # joined by `cat`
            return data + some_archive(draw)[0], None
    return data, names


def hostile_header(draw):
    """A header of a type, size and content that nobody would write."""
    content = draw.choice(
        (b"9" * 5000 + b" path=x\n", b"1 " * 5000, b"7 a=b\n" * 5000, b"\0" * 2000, b"12 path=../x\n")
    )
    header = tarfile.TarInfo(draw.choice(NAMES) or "x")
    header.type, header.size = draw.choice((b"x", b"L", b"g", b"K", b"S", b"5", b"0", b"V")), len(content)
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))[:512]
    if draw.random() < 0.5:
        block[124:136] = draw.choice(
            (b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"-1\0\0\0\0\0\0\0\0\0\0")
        )
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def some_folder(draw, root):
    """Files of all kinds below a folder; returns their names."""
    names = set()
    for number in range(draw.randrange(1, 14)):
        prefix = draw.choice(("", "", "sub/", "10_red fox/", "0_off/", "a.b/", ".hidden/"))
        stem = prefix + (f"{number:03d}" if draw.random() < 0.6 else f"{draw.choice(NAMES)}{number}".replace("/", "_"))
        extension = draw.choice((".png", ".JPG", ".webp", "", ".tif", ".jfif", ".zip", ".heic"))
        beside = draw.choice(("stem", "stem", "name", "none"))
        files = {stem + extension: some_image(draw)}
        if beside != "none":
            base = stem if beside == "stem" else stem + extension
            files[base + draw.choice((".txt", ".TXT", ".caption"))] = some_caption(draw)
            if draw.random() < 0.4:
                files[base + draw.choice((".json", ".JSON"))] = some_record(draw)
        for name, data in files.items():
            name = os.fsdecode(name.encode("utf-8", "replace").replace(b"\0", b"0"))
            if draw.random() < 0.05:
                name = os.fsdecode(os.fsencode(name) + b"\xff")
            path = root / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            except OSError:  # too long
                continue
            names.add(name)
    return names
