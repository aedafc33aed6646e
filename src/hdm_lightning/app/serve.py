"""hdm-app: a web page to generate images, look through runs and shards, and plan."""

# ruff: noqa: PLC0415 (gradio and torch take seconds to import, and --help must be fast)
import getpass
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

from hdm_lightning.app.app_settings import AppSettings, credentials, require_auth
from hdm_lightning.cli.arguments import Flags, Parser
from hdm_lightning.cli.command import require_folder, run_command
from hdm_lightning.errors import import_optional
from hdm_lightning.generation.sampling_settings import DrawingMachine

_DESCRIPTION = """A web page on this machine: generate images with the models of your runs, several side by side; look
through runs and shards, and leave out bad samples; plan trainings.

It listens on 127.0.0.1, shows only the folders named here, and fetches nothing from elsewhere."""
_EXAMPLES = """examples:
  hdm-app
  hdm-app --runs runs multirun --shards data/openclipart-mini --loras style.safetensors
  hdm-app --host 0.0.0.0 --auth me
"""
_SETTINGS = Flags(
    AppSettings, {"models": "--models MODEL", "loras": "--loras LORA", "shards": "--shards FOLDER|PATTERN"}
)
_MACHINE = Flags(DrawingMachine)
_OF_MACHINE = ["device", "precision", "batch", "compile"]


def parser() -> Parser:
    """Return the parser of the command's arguments."""
    command = Parser(prog="hdm-app", description=_DESCRIPTION, epilog=_EXAMPLES)
    _SETTINGS.add(command)
    _MACHINE.add(command.add_argument_group("image generation"), only=_OF_MACHINE)
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until it is interrupted; return the exit status."""
    return run_command(lambda: _serve(argv))


def _serve(argv: Sequence[str] | None) -> None:
    given = parser().parse_args(argv)
    settings, machine = _SETTINGS.read(given), _MACHINE.read(given)
    require_auth(settings)
    require_folder(settings.out, "--out")
    from hdm_lightning.app.shelf import require_folders, require_models

    if hasattr(given, "runs"):
        require_folders(settings.runs, "--runs")
    require_models(settings.models, "--models")
    require_models(settings.loras, "--loras")
    auth = credentials(settings.auth, getpass.getpass)
    _require_gradio()
    print("hdm-app: starting", file=sys.stderr, flush=True)
    from hdm_lightning.app.page import serving
    from hdm_lightning.app.shard_search import ShardSet
    from hdm_lightning.app.side_by_side import Studio
    from hdm_lightning.profiling.system import chosen_device

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    studio = Studio(settings, machine, chosen_device(machine.device or "auto"))
    for place in settings.shards:
        ShardSet(place)  # refuses what cannot be shown
    if settings.is_open:
        what = f"warning: {settings.host} lets other machines connect, and the password and all else go unencrypted"
        print(f"{what}: put a proxy with TLS in front of it on any network but your own", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # and delete the served files, as after Ctrl-C
    with serving(settings, studio, auth) as address:
        print(f"hdm-app: {address} (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(3600)


def _require_gradio() -> None:
    """Raise UserError if the extra is missing; keep gradio from phoning home, whatever the environment says."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    import_optional("gradio", "app", where="hdm-app")


if __name__ == "__main__":
    raise SystemExit(main())
