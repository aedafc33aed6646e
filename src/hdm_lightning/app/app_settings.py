"""What `hdm-app` can be asked on the command line; light, as flags are made of it."""

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Interval

from hdm_lightning.errors import UserError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class AppSettings:
    """What the page shows, and to whom.

    Attributes:
        runs: folders of runs; what lies below them is listed.
        models: further models to draw with: run, pipeline's folder, weights file or hub name.
        loras: further LoRAs: run, peft folder or file.
        shards: sets of indexed shards to look through.
        out: folder for what is drawn.
        keep: models that stay in memory.
        host: address to listen at; any but 127.0.0.1 is open to others and needs --auth.
        port: port to listen at; 0 takes one that is free.
        auth: name and password that the page asks for; of a name alone the password is asked in the terminal.
    """

    runs: tuple[Path, ...] = (Path("runs"),)
    models: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    out: Path = Path("samples")
    keep: Annotated[int, Ge(1)] = 2
    host: str = LOOPBACK
    port: Annotated[int, Interval(ge=0, le=65535)] = 7860
    auth: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether other machines may reach the page."""
        try:
            return not ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"


def credentials(auth: str | None, ask: Callable[[str], str]) -> tuple[str, str] | None:
    """Name and password of NAME:PASSWORD, or of a name alone, whose password is asked for.

    Raises:
        UserError: either is empty.
    """
    if auth is None:
        return None
    name, colon, password = auth.partition(":")
    if name and not colon:
        password = ask(f"password for {name}: ")
    if not name or not password:
        raise UserError("has no name or no password", where="--auth", hint="give NAME:PASSWORD, or NAME to be asked")
    return name, password


def require_auth(settings: AppSettings) -> None:
    """Raise UserError where other machines may reach a page that asks for no password."""
    if settings.is_open and settings.auth is None:
        what = f"listening at {settings.host} lets other machines draw, read runs and shards, and mark samples"
        raise UserError(what, where="--host", hint="add --auth NAME, or leave --host out and use `ssh -L`")
