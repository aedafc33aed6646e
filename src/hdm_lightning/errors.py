"""The one exception for what a user can mend: it names the place, what is wrong and the mend."""


class UserError(ValueError):
    """A mistake in a configuration, a file or an argument, told on one screen without a stack trace.

    Args:
        what: what was found and what was expected, in one or two sentences.
        where: the configuration key, file or argument in question.
        mend: what to do about it, as an instruction.
    """

    def __init__(self, what: str, *, where: str | None = None, mend: str | None = None) -> None:
        self.what, self.where, self.mend = what, where, mend
        super().__init__(what, where, mend)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.mend:
            lines.append(f"  mend: {self.mend}")
        return "\n".join(lines)
