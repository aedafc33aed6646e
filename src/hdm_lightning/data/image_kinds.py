"""What a file is, by its first bytes: an image that is read here, or something else, by its name."""

from hdm_lightning.data.faults import SampleFault

HEAD_BYTES = 512
"""Of a file, enough for `image_kind` and `foreign_kind`."""

READ = "JPEG, PNG, WebP, GIF, BMP, AVIF, TIFF, JPEG 2000 or PPM"
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_STARTS = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    **dict.fromkeys((b"P4\n", b"P5\n", b"P6\n", b"P4 ", b"P5 ", b"P6 "), "PPM"),
}
_FOREIGN = {
    b"\x1f\x8b": "gzip (gunzip < FILE > NEW unpacks it)",
    b"\x28\xb5\x2f\xfd": "Zstandard (zstd -d < FILE > NEW unpacks it)",
    b"BZh": "bzip2 (bunzip2 < FILE > NEW unpacks it)",
    b"\xfd7zXZ\0": "xz (xz -d < FILE > NEW unpacks it)",
    b"PK\x03\x04": "a ZIP archive (unzip unpacks it)",
    b"PK\x05\x06": "an empty ZIP archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"%PDF": "a PDF",
    b"8BPS": "a Photoshop file",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\0\0\x01\0": "an icon (ICO)",
    b"PAR1": "Parquet",
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file)",
    b"\0\x05\x16\x07": "macOS's notes on another file (AppleDouble)",
    b"\0\x05\x16\0": "macOS's notes on another file (AppleDouble)",
}
_TEXT = {
    b"<!doctype html": "a page of HTML",
    b"<html": "a page of HTML",
    b"<svg": "SVG",
    b"<?xml": "XML or SVG",
}


def image_kind(data: bytes) -> str | None:
    """Pillow's name of the format, or None for what is not read here."""
    for start, kind in _STARTS.items():
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return "AVIF" if _brands(data) & _AVIF_BRANDS else None


def format_of(data: bytes) -> str:
    """Pillow's name of the format, by the first bytes.

    Raises:
        SampleFault: it is none that is read here.
    """
    kind = image_kind(data)
    if kind is None:
        known = foreign_kind(data)
        raise SampleFault(f"undecodable image: {f'this is {known}' if known else 'another format'}, not {READ}")
    return kind


def foreign_kind(data: bytes) -> str | None:
    """In words, what a file is that is no image; None where nobody knows."""
    if not data:
        return "an empty file"
    for start, name in _FOREIGN.items():
        if data.startswith(start):
            return name
    if _brands(data) & _HEIF_BRANDS:
        return "HEIC (convert it to JPEG)"
    text = data[:HEAD_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((name for start, name in _TEXT.items() if text.startswith(start)), None)


def _brands(data: bytes) -> set[bytes]:
    """The brands of a file of the ISO family: the major one, and those it is compatible with."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), HEAD_BYTES)
    return {data[8:12]} | {data[start : start + 4] for start in range(16, end - 3, 4)}
