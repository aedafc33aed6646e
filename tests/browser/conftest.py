"""The page as its command serves it, and a real browser that reaches this machine and nothing else."""

import io
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shard_writer import ShardWriter
from shown_run import write_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HACK = "<img src=x onerror='hacked=1'>"
SCRIPT = "<script>hacked=1</script>"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@dataclass
class Served:
    """The page's address and folders, and what else calls it without a browser."""

    address: str
    folder: Path
    log: Path
    opener: urllib.request.OpenerDirector = field(default_factory=urllib.request.build_opener)

    def get(self, path, **headers):
        """Status and body of an answer."""
        try:
            with self.opener.open(urllib.request.Request(self.address + path, headers=headers), timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def post(self, path, content, **headers):
        """Status and body of the answer to JSON."""
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.address + path, json.dumps(content).encode(), headers)
        try:
            with self.opener.open(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def call(self, name, values):
        """What a function of the page gives a program that calls it as the page's own scripts do."""
        config = json.loads(self.get("config")[1])
        number = next(each["id"] for each in config["dependencies"] if each["api_name"] == name)
        session = uuid.uuid4().hex
        status, body = self.post(
            "gradio_api/queue/join", {"data": values, "fn_index": number, "session_hash": session, "event_data": None}
        )
        if status != 200:
            return {"success": False, "output": {"error": body.decode()}}
        with self.opener.open(f"{self.address}gradio_api/queue/data?session_hash={session}", timeout=120) as stream:
            for line in stream:
                if line.startswith(b"data:"):
                    event = json.loads(line[5:])
                    if event["msg"] in ("process_completed", "unexpected_error", "queue_full"):
                        return event
        raise AssertionError("no answer")


def serve(folder, *options):
    """Start the command in a folder; yields its page, and ends it."""
    log = folder / "app.log"
    command = [sys.executable, "-m", "hdm_lightning.app.serve", "--port", "0", "--device", "cpu", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_ALLOWED_PATHS": "/etc", "GRADIO_SHARE": "True"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        line = process.stdout.readline()
        assert line.startswith("hdm-app: http://"), log.read_text()
        yield Served(line.split()[1], folder, log)
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="session")
def hostile_shards(tmp_path_factory):
    """Captions and a key that would run in the browser if they were taken for HTML."""
    folder = tmp_path_factory.mktemp("hostile")
    with ShardWriter(folder) as writer:
        for number, (key, caption) in enumerate([("plain", HACK), (HACK, "a star"), ("other", SCRIPT)]):
            file = io.BytesIO()
            Image.fromarray(np.full((40, 40, 3), 60 * number, dtype=np.uint8)).save(file, "PNG")
            writer.write(key, {"png": file.getvalue(), "txt": caption})
    return folder


@pytest.fixture(scope="session")
def served(tmp_path_factory, tiny_text_encoder, tiny_autoencoder, tiny_shards, hostile_shards):
    folder = tmp_path_factory.mktemp("app")
    for seed, name in enumerate(("one", "two")):
        write_run(folder / "runs" / name, tiny_text_encoder, tiny_autoencoder, seed=seed)
    write_run(folder / "runs" / HACK, tiny_text_encoder, tiny_autoencoder, finished=False, tag=HACK)
    for name, source in (("shards", tiny_shards), ("hostile", hostile_shards)):
        shutil.copytree(source, folder / name)
    (folder / "secret.txt").write_text("open-sesame")
    yield from serve(folder, "--shards", "shards", "hostile")


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert program, f"none of {', '.join(BROWSERS)} is installed"
    nowhere = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", nowhere])
        yield running
        running.close()


@pytest.fixture
def page(served, browser):
    """The page, loaded; at the end nothing was asked of elsewhere, and no script failed or was somebody else's."""
    opened = browser.new_page(viewport={"width": 1400, "height": 1000})
    elsewhere, failed, logged = [], [], len(served.log.read_text())
    own = (served.address, "data:", "blob:")
    opened.on("request", lambda request: None if request.url.startswith(own) else elsewhere.append(request.url))
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.goto(served.address)
    opened.wait_for_function("document.querySelector('#models')?.innerText.includes('runs/one')")
    opened.wait_for_function("document.querySelector('#steps input').value == '3'")  # the model's own settings are in
    yield opened
    assert opened.evaluate("window.hacked") is None
    assert (elsewhere, failed) == ([], [])
    opened.close()
    assert "Traceback" not in served.log.read_text()[logged:]


@pytest.fixture(scope="session")
def browser_serve():
    """`serve`, for pages of a test's own."""
    return serve
