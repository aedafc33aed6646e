"""Make untrusted names and texts safe to print: escape the characters that control a terminal.

A key in a shard, a tensor's name or an image's record can contain escape sequences that set titles, clear the screen,
or print a line that looks like the command's own.
"""

import re

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 except tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional controls
    "\u2028\u2029"  # line and paragraph separators
    "\ud800-\udfff]"  # lone surrogates, which file names may contain and nothing can print
)


def printable(text: object) -> str:
    """Return a text of one or more lines with control characters escaped as in Python: `\\x1b`."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def in_one_line(text: object) -> str:
    """Return a text that must stay on one line: `printable`, with line feeds and tabs escaped too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")
