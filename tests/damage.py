"""Damage to files as disks do it, at a place that is read."""

import zipfile


def flip_a_bit(path, bit=2):
    """Flip a bit in the middle of a checkpoint's largest tensor: not in the padding between two, which no one reads."""
    with zipfile.ZipFile(path) as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        largest = max(tensors, key=lambda entry: entry.file_size)
        with archive.open(largest) as record:
            begin = record._orig_compress_start
    content = bytearray(path.read_bytes())
    content[begin + largest.file_size // 2] ^= 1 << bit
    path.write_bytes(content)
