"""Colours and turns of images as a viewer shows them, however the file says so; hostile ones are bounded."""

import io
import random
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from hdm_lightning.data.as_shown import exif_orientation
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.decode import decode, load_upright, upright_size
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.image_headers import prepared
from hdm_lightning.data.randomness import Draws
from hdm_lightning.datasets.source_images import ImageOptions, image_field

TURNS = {
    1: (),
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_270,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_90,),
}
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def exif(turn, order="<", kind=3, fill=0):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + {1: "B3x", 3: "H2x", 4: "I"}[kind], turn)
    entry = struct.pack(order + "HHI", 0x0112, kind, 1) + value
    other = struct.pack(order + "HHII", 0x0110, 2, 1, 0) * fill
    return mark + struct.pack(order + "IH", 8, 1 + fill) + other + entry + b"\0\0\0\0"


def xmp(turn, style):
    inner = {
        "attribute": f'<rdf:Description tiff:Orientation="{turn}"/>',
        "element": f"<tiff:Orientation>{turn}</tiff:Orientation>",
        "single": f"<rdf:Description tiff:Orientation = '{turn}'/>",
    }[style]
    return f"<x:xmpmeta><rdf:RDF>{inner}</rdf:RDF></x:xmpmeta>".encode()


def png(chunk_, behind):
    plain = io.BytesIO()
    Image.fromarray(PIXELS).save(plain, "PNG")
    data = plain.getvalue()
    at = len(data) - 12 if behind else 33
    return data[:at] + chunk_ + data[at:]


def raw_profile(payload, packed):
    text = b"\nexif\n" + str(len(payload)).encode().rjust(8) + b"\n" + payload.hex().encode() + b"\n"
    name = b"Raw profile type exif\0"
    return chunk(b"zTXt", name + b"\0" + zlib.compress(text)) if packed else chunk(b"tEXt", name + text)


def ways():
    """PNGs that say in each way how they are turned."""
    for turn in TURNS:
        for order in "<>":
            for kind in (1, 3, 4):
                for behind in (False, True):
                    yield turn, png(chunk(b"eXIf", exif(turn, order, kind, fill=turn)), behind)
        for packed in (False, True):
            for behind in (False, True):
                yield turn, png(raw_profile(b"Exif\0\0" + exif(turn), packed), behind)
        for style in ("attribute", "element", "single"):
            text = xmp(turn, style)
            for behind, body in ((False, b"\0\0\0\0" + text), (True, b"\1\0\0\0" + zlib.compress(text))):
                yield turn, png(chunk(b"iTXt", b"XML:com.adobe.xmp\0" + body), behind)


@pytest.mark.parametrize(("turn", "data"), list(ways()))
def test_turns_are_read_wherever_they_are_written(turn, data):
    expected = Image.fromarray(PIXELS)
    for step in TURNS[turn]:
        expected = expected.transpose(step)
    assert np.array_equal(np.asarray(load_upright(data)), np.asarray(expected))
    assert upright_size(data) == expected.size[::-1]
    pixels, _ = decode(data, lambda height, width: CropRules().choose(height, width, (6, 6), Draws(0)))
    assert pixels.shape == (3, 6, 6)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("way", ["exif", "xmp"])
def test_other_formats_are_turned_as_well(kit, kind, turn, way):
    block = Image.Exif()
    block[0x0112] = turn
    said = {"exif": block} if way == "exif" else {"xmp": xmp(turn, "attribute")}
    if kind == "TIFF" and way == "xmp":
        said = {"tiffinfo": {0x0112: turn}}
    image = Image.new("RGB", (32, 20), (250, 250, 250))
    image.paste((200, 0, 0), (0, 0, 16, 10))
    expected = image
    for step in TURNS[turn]:
        expected = expected.transpose(step)
    data = kit.encoded(image, kind, **said)
    assert upright_size(data) == expected.size[::-1]
    found = np.asarray(load_upright(data)).astype(int)
    assert np.abs(found - np.asarray(expected).astype(int)).mean() < 8


def profile(primaries, gamma):
    """A matrix profile of three primaries (XYZ, D50) and a gamma, written by hand."""

    def tag(name, body):
        return name, body + b"\0" * (-len(body) % 4)

    def fixed(values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"para\0\0\0\0" + struct.pack(">HH", 0, 0) + fixed([gamma])
    text = "x".encode("utf-16-be")
    words = b"mluc\0\0\0\0" + struct.pack(">II", 1, 12) + b"enUS" + struct.pack(">II", len(text), 28) + text
    tags = [tag(b"desc", words), tag(b"cprt", words), tag(b"wtpt", b"XYZ \0\0\0\0" + fixed((0.9642, 1, 0.8249)))]
    tags += [
        tag(b"%cXYZ" % letter, b"XYZ \0\0\0\0" + fixed(xyz)) for letter, xyz in zip(b"rgb", primaries, strict=True)
    ]
    tags += [tag(b"%cTRC" % letter, curve) for letter in b"rgb"]
    table, body, at = b"", b"", 132 + 12 * len(tags)
    for name, data in tags:
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(">I4xI", at + len(body), 0x04300000) + b"mntrRGB XYZ " + struct.pack(">6H", 2024, 1, 1, 0, 0, 0)
    head = head + b"acsp" + bytes(28) + fixed((0.9642, 1, 0.8249))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def shown(colour, primaries, gamma):
    """What a viewer shows in sRGB, by the definition of the spaces: independent of any library of colours."""
    light = np.array(primaries).T @ (np.array(colour) / 255.0) ** gamma
    linear = np.clip(np.linalg.solve(SRGB, light), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_those_of_the_profile(kit, kind, mode):
    draw = random.Random(f"{kind}{mode}")
    for _ in range(4):
        gamma, colour = draw.choice((1.8, 2.2, 2.6)), tuple(draw.randrange(40, 220) for _ in range(3))
        image = Image.new("RGB", (64, 64), colour)
        icc = profile(P3, gamma)
        quality = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95}}
        fits = kind in {"RGB": "JPEG PNG WEBP AVIF TIFF", "RGBA": "PNG WEBP AVIF", "P": "PNG TIFF"}[mode]
        image = (image.quantize(4) if mode == "P" else image.convert(mode)) if fits else image
        data = kit.encoded(image, kind, icc_profile=icc, **quality.get(kind, {}))
        pixels, _ = decode(data, lambda height, width: CropRules().choose(height, width, (16, 16), Draws(0)))
        expected = shown(image.convert("RGB").getpixel((0, 0)), P3, gamma)
        assert np.abs(pixels[:, 8, 8] - expected).max() < (7 if kind == "AVIF" else 3.5)
        if kind in ("JPEG", "PNG", "WEBP"):  # written anew: in sRGB, without a profile
            ((_, again),) = image_field(data, ImageOptions(encoding="webp", quality=100)).items()
            assert "icc_profile" not in Image.open(io.BytesIO(again)).info
            assert np.abs(np.asarray(load_upright(again))[8, 8] - expected).max() < 6


def test_profiles_that_are_srgb_damaged_or_of_another_space_leave_the_numbers(kit):
    image, draw = Image.fromarray(PIXELS), random.Random(4)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    others = [icc, ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes(), b"no profile", b"\0" * 200]
    others += [bytes(draw.randrange(256) for _ in range(draw.randrange(1, 600))) for _ in range(20)]
    for each in others:
        assert np.array_equal(np.asarray(load_upright(kit.encoded(image, icc_profile=each))), PIXELS)


def test_damaged_profiles_never_raise_anything_else(kit):
    draw, whole = random.Random(5), profile(P3, 2.2)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(draw.randrange(1, 9)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        load_upright(kit.encoded(Image.fromarray(PIXELS), icc_profile=bytes(damaged)))


def peak(action):
    """Bytes that Python's allocators held at most, and seconds."""
    begin = time.process_time()
    tracemalloc.start()
    try:
        action()
    except SampleFault:
        pass
    finally:
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return held, time.process_time() - begin


def heavy_exif(entries, payload):
    """A directory in which each entry names the whole block as its value."""
    body = b"".join(struct.pack("<HHII", number, 7, payload, 0) for number in range(entries))
    return (b"II*\0" + struct.pack("<IH", 8, entries) + body).ljust(payload, b"\0")


def hostile(kit):
    """Images that cost gigabytes or minutes with Pillow alone, by name."""
    jpeg = kit.encoded(Image.fromarray(PIXELS), "JPEG")

    def segments(marker, block, name):
        parts = [block[start : start + 65000] for start in range(0, len(block), 65000)]
        return b"".join(marker + struct.pack(">H", len(part) + len(name) + 2) + name + part for part in parts)

    yield "jpeg exif", jpeg[:2] + segments(b"\xff\xe1", heavy_exif(5000, 65000), b"Exif\0\0") + jpeg[2:]
    yield "jpeg exif in parts", jpeg[:2] + segments(b"\xff\xe1", heavy_exif(60000, 2_000_000), b"Exif\0\0") + jpeg[2:]
    yield "jpeg list of images", jpeg[:2] + segments(b"\xff\xe2", heavy_exif(5000, 65000), b"MPF\0") + jpeg[2:]
    yield "png exif", png(chunk(b"eXIf", heavy_exif(65535, 1_000_000)), False)
    yield "png text", png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(60_000_000))), False)
    yield "png profile", png(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(60_000_000))), False)
    yield "png raw profile", png(raw_profile(bytes(3_000_000), True), True)
    yield "tiff", heavy_exif(65535, 1_000_000)
    gif = kit.encoded(Image.fromarray(PIXELS), "GIF")
    start = gif.index(b"\x2c") if b"!" not in gif[:800] else gif.index(b"!")
    yield "gif comments", gif[:start] + b"!\xfe" + (b"\xff" + b"c" * 255) * 60_000 + b"\0" + gif[start:]
    progressive = kit.encoded(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    yield "jpeg scans", progressive[:-2] + scan * 400 + b"\xff\xd9"


def test_hostile_images_take_little_memory_and_time(kit):
    for name, data in hostile(kit):
        held, seconds = peak(lambda data=data: (upright_size(data), load_upright(data)))
        assert held < 6 * len(data) + 40_000_000, (name, held, len(data))
        assert seconds < 3, (name, seconds)


def test_of_a_jpeg_only_the_names_of_costly_blocks_are_changed(kit):
    """Not the same bytes in a comment, or after the image."""

    def block(marker, content):
        return marker + struct.pack(">H", len(content) + 2) + content

    own, jpeg = block(b"\xff\xe1", b"Exif\0\0" + exif(6)), kit.encoded(Image.fromarray(PIXELS), "JPEG")
    said = block(b"\xff\xfe", b"Exif\0\0 MPF\0")
    heavy = heavy_exif(5000, 65000)
    costly = [block(b"\xff\xe1", b"Exif\0\0" + exif(3)), block(b"\xff\xe2", b"MPF\0" + heavy)]
    renamed = [block(b"\xff\xe1", b"exif\0\0" + exif(3)), block(b"\xff\xe2", b"mpf\0" + heavy)]
    data, expected = (jpeg[:2] + said + own + b"".join(each) + jpeg[2:] + said for each in (costly, renamed))
    assert prepared(data, "JPEG").data == expected
    alone = jpeg[:2] + block(b"\xff\xe1", b"Exif\0\0" + heavy) + said + jpeg[2:]
    assert prepared(alone, "JPEG").data == alone.replace(b"Exif", b"exif", 1)


def test_the_directory_is_read_within_its_block():
    assert exif_orientation(exif(6)) == 6 and exif_orientation(b"Exif\0\0" + exif(8, ">")) == 8
    draw = random.Random(6)
    for _ in range(2000):
        damaged = bytearray(exif(draw.randrange(1, 9), draw.choice("<>")))
        for _ in range(draw.randrange(1, 5)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        exif_orientation(bytes(damaged[: draw.randrange(len(damaged) + 1)]))
