"""Seeded damage to files and to values in JSON, as disks, downloads, editors and other programs do it."""

import random

NUMBERS = (0, -1, 1, 2, 3.5, 10**30, 10**400, -(10**9), 1e308, float("nan"), float("inf"), True, False)
TEXTS = ("", "x", "64", "../..", "/", "\x1b[2J\u202e", "\ud83d", "a\x00b", "x" * 3000)
ODD = (None, *NUMBERS, *TEXTS, [], [1], [[]], ["a", None], [0] * 50, {}, {"a": 1}, {"": {}})
"""Values that a key may have in somebody's file."""


def bytes_of(content: bytes, lot: random.Random) -> bytes:
    """The content with one or several things wrong: bits, bytes, parts cut, doubled, zeroed, swapped or put in."""
    broken = bytearray(content)
    for _ in range(lot.choice((1, 1, 2, 5))):
        size = len(broken) or 1
        begin = lot.randrange(min(size, lot.choice((16, 200, size))))
        length = min(lot.choice((1, 2, 8, 64, 1000)), size - begin)
        kind = lot.randrange(8)
        if kind == 0 and broken:
            broken[begin] ^= 1 << lot.randrange(8)
        elif kind == 1 and broken:
            broken[begin] = lot.randrange(256)
        elif kind == 2:
            del broken[begin:]
        elif kind == 3:
            broken[begin : begin + length] = bytes(length)
        elif kind == 4:
            broken[begin : begin + length] = lot.randbytes(length)
        elif kind == 5:
            broken[begin:begin] = broken[begin : begin + length]
        elif kind == 6:
            del broken[begin : begin + length]
        else:
            broken += lot.randbytes(length)
    return bytes(broken)


def value_of(value, lot: random.Random):
    """A value of JSON with one thing in it replaced, removed, added or renamed."""
    if isinstance(value, dict) and value and lot.random() < 0.9:
        key = lot.choice(list(value))
        kind = lot.random()
        if kind < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        if kind < 0.15:
            return {**value, lot.choice(("x", "", "_target_", "__class__", key + "s")): lot.choice(ODD)}
        return {**value, key: value_of(value[key], lot)}
    if isinstance(value, list) and value and lot.random() < 0.5:
        place = lot.randrange(len(value))
        return [*value[:place], value_of(value[place], lot), *value[place + 1 :]]
    return lot.choice(ODD)


def text_of(lot: random.Random, most: int) -> str:
    """Letters of any script and what means something to shells, YAML and Hydra."""
    scripts = [(0x20, 0x7E), (0x20, 0x7E), (0xA0, 0x17F), (0x5D0, 0x64A), (0x4E00, 0x4FFF), (0x1F300, 0x1F5FF)]
    scripts.append((0, 0x1F))
    return "".join(chr(lot.randint(*lot.choice(scripts))) for _ in range(lot.randint(0, most)))
