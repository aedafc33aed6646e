"""What libraries say about themselves is kept off the screen; warnings and errors stay."""

import logging
import warnings

LOGGERS = ("lightning.pytorch", "lightning.fabric", "torch.distributed.launcher.api", "torch.distributed.elastic")


def quiet_libraries() -> None:
    """Lower the level of chatty loggers and pass over warnings that a user of a command cannot hint."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("lightning", "torch"):
        warnings.filterwarnings("ignore", category=UserWarning, module=module)
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
