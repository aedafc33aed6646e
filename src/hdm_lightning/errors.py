"""The one exception for what a user can mend: it names the place, what is wrong and the mend."""

from hdm_lightning.printable import in_one_line, printable


class UserError(ValueError):
    """A mistake in a configuration, a file or an argument, told on one screen without a stack trace.

    Its text has no control characters, whatever was found in a file of somebody else's.

    Args:
        what: what was found and what was expected, in one or two sentences.
        where: the configuration key, file or argument in question.
        mend: what to do about it, as an instruction.
    """

    def __init__(self, what: str, *, where: str | None = None, mend: str | None = None) -> None:
        self.what, self.where, self.mend = what, where, mend
        super().__init__(what, where, mend)

    def __str__(self) -> str:
        lines = [f"{in_one_line(self.where)}: {self.what}" if self.where else self.what]
        if self.mend:
            lines.append(f"  mend: {self.mend}")
        return printable("\n".join(lines))
