"""The page: its tabs, how it is served, and to whom."""

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from hdm_lightning.app.app_settings import AppSettings
from hdm_lightning.app.draw_tab import DrawTab
from hdm_lightning.app.own_origin import OwnOrigin
from hdm_lightning.app.plan_tab import PlanTab
from hdm_lightning.app.run_tab import RunTab
from hdm_lightning.app.shard_tab import ShardTab
from hdm_lightning.app.side_by_side import Studio
from hdm_lightning.errors import UserError

TITLE = "hdm-lightning"
LARGEST_UPLOAD = "64mb"
WAITING = 32
"""Most requests in the queue."""
SANS = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
CSS = """
.gradio-container {max-width: 1500px !important; margin: auto; width: 100%}
.gradio-container .main, .gradio-container .main > .wrap, .contain {min-width: 0; max-width: 100%}
.thumbnail-item {display: flex !important; flex-direction: column}
.thumbnail-item img {flex: 1 1 0; min-height: 0}
.thumbnail-item .caption-label {position: static !important; max-width: 100% !important; border: 0 !important}
.beside {align-self: flex-end; max-height: 46px}
.plain pre {font-size: 12px; line-height: 1.25; overflow-x: auto; font-family: var(--font-mono)}
footer {display: none !important}
"""


def build(settings: AppSettings, studio: Studio, served: Path) -> gr.Blocks:
    """Return the page, not yet served. `served` is the folder whose files it may fetch."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 24 * 3600), fill_width=True) as blocks:
        with gr.Tab("Generate", id="draw-tab"):
            DrawTab(studio, served).build(blocks)
        with gr.Tab("Runs", id="runs-tab") as runs:
            RunTab(settings.runs).build(runs)
        with gr.Tab("Shards", id="shards-tab"):
            ShardTab(settings.shards).build(blocks)
        with gr.Tab("Plan", id="plan-tab"):
            PlanTab().build()
    for function in blocks.fns.values():  # not for other programs: they have hdm-sample and others
        function.api_visibility = "private"
    return blocks.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


def own_port(host: str, port: int) -> int:
    """Return the port, or a free one if it is 0.

    Raises:
        UserError: the page cannot listen there.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
        try:
            trial.bind((host, port))
        except OSError as error:
            what = f"cannot listen here ({error.strerror or error})"
            hint = "use another --port; 0 picks a free one"
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                hint = "set --host to an address or name of this machine, or leave it out"
            raise UserError(what, where=f"{host} port {port}", hint=hint) from error
        return int(trial.getsockname()[1])


@contextmanager
def serving(settings: AppSettings, studio: Studio, auth: tuple[str, str] | None) -> Iterator[str]:
    """Serve the page inside the with statement; yield its address."""
    with tempfile.TemporaryDirectory(prefix="hdm-app-") as folder:
        # Gradio keeps files only here: everything in it can be fetched.
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_EXAMPLES_CACHE=f"{folder}/examples")
        os.environ.pop("GRADIO_ALLOWED_PATHS", None)
        blocks = build(settings, studio, Path(folder))
        hosts = () if settings.is_open else ("127.0.0.1", "localhost", "::1", settings.host)
        theme = gr.themes.Default(font=SANS, font_mono=MONO)
        middleware: Any = [Middleware(OwnOrigin, hosts=hosts)]
        _, address, _ = blocks.launch(
            server_name=f"[{settings.host}]" if ":" in settings.host else settings.host,
            server_port=own_port(settings.host, settings.port),
            auth=auth,
            app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None, "openapi_url": None},
            theme=theme,
            css=CSS,
            allowed_paths=[],
            max_file_size=LARGEST_UPLOAD,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            show_error=False,
            footer_links=[],
            pwa=False,
            quiet=True,
            inbrowser=False,
            prevent_thread_lock=True,
        )
        try:
            yield address
        finally:
            blocks.close(verbose=False)
