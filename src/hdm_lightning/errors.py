"""The one exception for what a user can fix: it names the place, what is wrong and the hint."""


def sibling_key(where: str, key: str) -> str:
    """The key beside another one, to name in an error: `vae.dtype` for `vae.name` and `dtype`."""
    return f"{where.rpartition('.')[0]}.{key}" if "." in where else where


class UserError(ValueError):
    """A mistake in a configuration, a file or an argument, told on one screen without a stack trace.

    Args:
        what: what was found and what was expected, in one or two sentences.
        where: the configuration key, file or argument in question.
        hint: what to do about it, as an instruction.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(what, where, hint)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)
