"""How every command ends: a mistake the user can fix is told on one screen, with exit status 2."""

import os
import sys
from collections.abc import Callable

from hdm_lightning.errors import UserError

TRACEBACK_VARIABLE = "HDM_TRACEBACK"
USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130


def run_command(function: Callable[[], int | None]) -> int:
    """Run a command's body and turn how it ends into an exit status.

    Args:
        function: the body; returns an exit status, or None for 0.

    Returns:
        The body's status; 2 for a `UserError`, printed to stderr without a stack trace unless the environment
        has HDM_TRACEBACK=1; 130 when interrupted from the keyboard. Any other exception is a defect and passes.
    """
    try:
        return function() or 0
    except UserError as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS
