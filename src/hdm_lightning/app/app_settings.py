"""The command-line settings of `hdm-app`; imports nothing slow, as its flags are made from them."""

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
        runs: folders of runs; all runs below them are listed.
        models: further models to sample from: run, pipeline folder, weights file or name on the Hub.
        loras: further LoRAs: run, PEFT folder or file.
        shards: sets of indexed shards to browse.
        out: folder for generated images.
        keep: number of models kept in memory.
        host: address to listen on; any but 127.0.0.1 is open to others and needs --auth.
        port: port to listen on; 0 picks a free one.
        auth: name and password that the page asks for; for a name alone, the terminal asks for the password.
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
    """Return name and password from NAME:PASSWORD, or from a name alone by asking for its password.

    Raises:
        UserError: either is empty.
    """
    if auth is None:
        return None
    name, colon, password = auth.partition(":")
    if name and not colon:
        password = ask(f"password for {name}: ")
    if not name or not password:
        raise UserError("has no name or no password", where="--auth", hint="use NAME:PASSWORD, or NAME to be asked")
    return name, password


def require_auth(settings: AppSettings) -> None:
    """Raise UserError if other machines may reach a page that asks for no password."""
    if settings.is_open and settings.auth is None:
        what = f"listening on {settings.host} lets other machines generate images, see runs and shards and mark samples"
        raise UserError(what, where="--host", hint="add --auth NAME, or leave out --host and use `ssh -L`")
