"""Names and texts of others as they may be printed: without what would steer the terminal.

A key in a shard, a tensor's name or an image's record can hold escape sequences, which set titles, clear the screen,
or write a line that looks like the command's own.
"""

import re

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 but tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of reading
    "\u2028\u2029"  # what else begins a line
    "\ud800-\udfff]"  # halves of pairs, as a file's name may hold, which cannot be printed at all
)


def printable(text: object) -> str:
    """A text of one or several lines, control characters as Python spells them: `\\x1b`."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def in_one_line(text: object) -> str:
    """A name, or what else is to be one line: `printable`, line feeds and tabs spelled as well."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")
