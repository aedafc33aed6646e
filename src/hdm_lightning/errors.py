"""The one exception for mistakes that a user can fix: where, what is wrong, and a hint."""

import difflib
import importlib
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

from hdm_lightning.printable import in_one_line, printable

_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
"""torch's messages: a device has an exception class of its own, the host only a RuntimeError."""


class UserError(ValueError):
    """A mistake in a configuration, a file or an argument, reported on one screen without a stack trace.

    Its text has no control characters, even if it quotes a file from somebody else.

    Args:
        what: what was found and what was expected, in one or two sentences.
        where: the configuration key, file or argument in question.
        hint: what to do about it, as an instruction.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(what, where, hint)

    def hint_with(self, more: str) -> str:
        """Return the hint followed by `more`, which stands alone, without its "or", if there is no hint."""
        return f"{self.hint}; {more}" if self.hint else more.removeprefix("or ")

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """Keep all fields on the way out of a worker process: by default, only positional arguments survive."""
        return partial(type(self), self.what, where=self.where, hint=self.hint), ()

    def __str__(self) -> str:
        lines = [f"{in_one_line(self.where)}: {self.what}" if self.where else self.what]
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return printable("\n".join(lines))


def first_line(error: BaseException | str, longest: int = 200) -> str:
    """Return the first nonblank line of an error's message, or the name of its class if there is none."""
    said = (line.strip() for line in str(error).splitlines())
    return next((line for line in said if line), type(error).__name__)[:longest]


def memory_error(error: BaseException, *, where: str | None = None, hint: str) -> UserError | None:
    """Return the error to show for an exception that means host or device memory has run out, else None."""
    torch_s = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    if not (torch_s or isinstance(error, MemoryError)):
        return None
    return UserError(f"there is not enough memory ({in_one_line(first_line(error))})", where=where, hint=hint)


def import_optional(module: str, extra: str, *, where: str, instead: str = "") -> Any:
    """Import a module of an optional package.

    Args:
        module: its dotted name, such as `pyarrow.parquet`.
        extra: the extra of this package that installs it, `hdm-lightning[…]`.
        where: the configuration key, file or argument that needs it.
        instead: an alternative, added to the hint after "or".

    Raises:
        UserError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f"needs the package {module.partition('.')[0]} ({first_line(error)})"
        hint = f"pip install 'hdm-lightning[{extra}]'" + (f", or {instead}" if instead else "")
        raise UserError(what, where=where, hint=hint) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the closest known one, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{close[0]}'?" if close else "choose one of " + ", ".join(names)


def sibling_key(where: str, key: str) -> str:
    """Return the key beside another one, to name in an error: `vae.dtype` for `vae.name` and `dtype`."""
    return f"{where.rpartition('.')[0]}.{key}" if "." in where else where
