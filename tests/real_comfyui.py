"""A real ComfyUI on loopback, without a window: started with this project's nodes, asked over its own API."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[1] / "integrations" / "comfyui"
FOLDER, PYTHON = "COMFYUI", "COMFYUI_PYTHON"
"""Environment variables: ComfyUI's folder, and a Python with its requirements and hdm-lightning (default: this one)."""
UNSET = f"""{FOLDER} is not set: the tests of this tier need ComfyUI itself. Get it, install its requirements, and run
  {FOLDER}=/path/to/ComfyUI make test-comfyui
{PYTHON}=/path/to/python names another Python than this one to run it with; hdm-lightning must be installed there."""
STARTING_S, DRAWING_S = 300, 300

TORCHVISION = '''"""A stand-in for torchvision, which not every torch has: names import, nothing computes."""

import importlib.abc
import importlib.machinery
import sys

__version__ = "0.0.0"


class Missing(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def named(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Missing(name, (), {"__init__": lambda self, *arguments, **named: None})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("torchvision.") else None

    def exec_module(self, module):
        module.__getattr__ = named


sys.meta_path.insert(0, Finder())
from torchvision import io, models, ops, transforms
from torchvision.transforms import functional, v2
'''


class WorkflowError(Exception):
    """What ComfyUI says of a workflow that it refuses or cannot finish."""


class ComfyUI:
    """A server with a folder of its own for models, input and output.

    Args:
        source: ComfyUI's folder.
        python: that runs it.
        folder: made; `models/`, `input/`, `output/`, `custom_nodes/` lie in it.
    """

    def __init__(self, source: Path, python: str, folder: Path) -> None:
        self.folder, self.log = folder, folder / "comfyui.log"
        for name in ("models/hdm", "models/loras", "models/text_encoders", "input", "output", "custom_nodes", "user"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copytree(PACK, folder / "custom_nodes" / "hdm-lightning", dirs_exist_ok=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if not _has_torchvision(python):
            (folder / "stub" / "torchvision").mkdir(parents=True, exist_ok=True)
            (folder / "stub" / "torchvision" / "__init__.py").write_text(TORCHVISION)
            before = os.environ.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder / "stub"), before)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        host, port = self.address.split(":")
        options = ["--cpu", "--listen", host, "--port", port, "--base-directory", str(folder), "--disable-api-nodes"]
        command = [python, "main.py", *options, "--database-url", f"sqlite:///{folder / 'comfyui.db'}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=source, env=environment, stdout=log, stderr=log)
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + STARTING_S
        while time.monotonic() < until and self.process.poll() is None:
            try:
                self.get("system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def get(self, path: str) -> Any:
        """What stands at a path of its API."""
        with urllib.request.urlopen(f"http://{self.address}/{path}", timeout=30) as answer:
            return json.load(answer)

    def run(self, workflow: dict[str, Any], **extra: Any) -> dict[str, Any]:
        """Run a workflow in API form to its end; the outputs of its nodes. Raises WorkflowError."""
        body = json.dumps({"prompt": workflow, "extra_data": extra}).encode()
        request = urllib.request.Request(f"http://{self.address}/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise WorkflowError(error.read().decode()) from error
        until = time.monotonic() + DRAWING_S
        while time.monotonic() < until:
            done = self.get(f"history/{number}").get(number)
            if done is not None:
                return _outputs(done)
            time.sleep(0.1)
        raise WorkflowError(f"not done in {DRAWING_S} s:\n{self.log.read_text(errors='replace')[-2000:]}")

    def pictures(self, outputs: dict[str, Any]) -> list[Path]:
        """The files of the pictures that were saved."""
        saved = [image for node in outputs.values() for image in node.get("images", [])]
        return [self.folder / "output" / each["subfolder"] / each["filename"] for each in saved]


def _outputs(done: dict[str, Any]) -> dict[str, Any]:
    status = done["status"]
    if status["status_str"] != "success":
        errors = [told for kind, told in status["messages"] if kind == "execution_error"]
        raise WorkflowError("\n".join(f"{each['node_type']}: {each['exception_message']}" for each in errors))
    return done["outputs"]


def _has_torchvision(python: str) -> bool:
    return subprocess.run([python, "-c", "import torchvision"], capture_output=True, check=False).returncode == 0


def started(folder: Path) -> ComfyUI:
    """The ComfyUI that the environment names, with this folder. Raises LookupError: it names none."""
    source = os.environ.get(FOLDER)
    if not source:
        raise LookupError(UNSET)
    if not (Path(source) / "main.py").is_file():
        raise LookupError(f"{FOLDER}={source} holds no main.py: give the folder of ComfyUI's repository")
    return ComfyUI(Path(source).resolve(), os.environ.get(PYTHON, sys.executable), folder)
