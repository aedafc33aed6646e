"""A stand-in for the hub on loopback: repositories in memory, made, written to and read by huggingface_hub itself."""

import base64
import hashlib
import json
import logging
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants, hf_api

COMMIT = "c" * 40


class Hub:
    """What it holds, and how it answers.

    Attributes:
        files: repository → path → content.
        messages: of all commits, in order.
        refuses: whether it lets nobody write.
        status: repository → what it answers instead of what it holds.
    """

    def __init__(self):
        self.files, self.messages, self.refuses, self.url = {}, [], False, ""
        self.status = {}


@contextmanager
def standing_in(folder):
    """Inside, the hub is this one, and its cache lies in `folder`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(folder),
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():
            patch.setattr(constants, name, value)
        patch.setattr(hf_api.api, "endpoint", hub.url)  # of the module's functions, made when it was imported
        patch.setenv("HF_TOKEN", "hf_stand_in")
        patch.setattr(logging, "raiseExceptions", False)  # a handler's stream may be that of a test that is over
        huggingface_hub.close_session()
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            huggingface_hub.close_session()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Quiet."""

    def _answer(self, value=None, *, status=200, body=None, headers=None):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, content in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        """Make a repository, say how files are to come, take a commit."""
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.endswith("/validate-yaml"):
            named = re.search(r"^base_model: (.*)$", json.loads(sent)["content"], re.MULTILINE)
            if named and not re.fullmatch(r"[\w.-]+/[\w.-]+", named[1]):
                errors = [{"message": f'"base_model" with value "{named[1]}" is not valid.'}]
                return self._answer({"errors": errors, "warnings": []}, status=400)
            return self._answer({"errors": [], "warnings": []})
        if self.hub.refuses:
            return self._answer({"error": "You have no right to write here"}, status=403)
        if self.path == "/api/repos/create":
            asked = json.loads(sent)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.hub.files.setdefault(name, {})
            return self._answer({"url": f"{self.hub.url}/{name}", "name": name})
        if "/preupload/" in self.path:
            files = [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(sent)["files"]]
            return self._answer({"files": files})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path.partition("?")[0])
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "header":
                self.hub.messages.append(line["value"]["summary"])
            else:
                content = base64.b64decode(line["value"]["content"])
                self.hub.files[found[1]][line["value"]["path"]] = content
        return self._answer(
            {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.url}/{found[1]}/commit/{COMMIT}"}
        )

    def _below(self, files, folder):
        """What lies in a folder of a repository, the top one for None; with all below it where that is asked."""
        prefix, found = f"{folder}/" if folder else "", {}
        for name, content in files.items():
            inside, deeper, _ = name.removeprefix(prefix).partition("/")
            if not name.startswith(prefix):
                continue
            if deeper:
                found[prefix + inside] = {"type": "directory", "path": prefix + inside, "oid": "0" * 40, "size": 0}
            if not deeper or "recursive=True" in self.path or "recursive=true" in self.path:
                found[name] = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
        return list(found.values())

    def do_GET(self):
        """Tell what a repository holds, give a file."""
        path = self.path.partition("?")[0]
        for name, status in self.hub.status.items():
            if f"/{name}/" in f"{path}/":
                headers = {"Location": "http://127.0.0.1:9/elsewhere"} if 300 <= status < 400 else {}
                headers |= {"X-Error-Code": "GatedRepo"} if status == 403 else {}
                return self._answer({"error": "no"}, status=status, headers=headers)
        listed = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(/revision/[^/]+)?", path)
        if listed and listed[1] in self.hub.files:
            siblings = [{"rfilename": name} for name in self.hub.files[listed[1]]]
            return self._answer({"id": listed[1], "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        tree = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/[^/]+(?:/(.+))?", path)
        if tree and tree[1] in self.hub.files:
            return self._answer(self._below(self.hub.files[tree[1]], tree[2]))
        file = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        content = self.hub.files.get(file[1], {}).get(file[2]) if file else None
        if content is None:
            missing = "RepoNotFound" if not file or file[1] not in self.hub.files else "EntryNotFound"
            return self._answer({"error": "no"}, status=404, headers={"X-Error-Code": missing})
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self._answer(body=content, headers=headers)

    do_HEAD = do_GET
