"""What the page gives to whom asks without a browser: nothing but what it was started with."""

import json
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hdm_lightning.errors import UserError

SECRET = "open-sesame"


def refused(event):
    """What the page said to a call that it did not do."""
    assert event["success"] is False, event
    text = json.dumps(event["output"])
    assert "Traceback" not in text and SECRET not in text
    return text


@pytest.mark.parametrize(
    "name", ["../secret.txt", "/etc", "/etc/passwd", "runs/../secret.txt", "runs/one/../two", ".", 3]
)
def test_runs_beyond_the_list_are_refused(served, name):
    assert "not offered by this page" in refused(served.call("run", [name]))


def test_no_name_at_all_shows_nothing(served):
    answer = served.call("run", [""])
    assert answer["success"] and all(each == {"__type__": "update"} for each in answer["output"]["data"])


@pytest.mark.parametrize("place", ["../shards", "/etc", "shards/../hostile", "runs", "https://127.0.0.1:1/{0..1}.tar"])
def test_sets_beyond_the_list_are_refused(served, place):
    assert "not offered by this page" in refused(served.call("search", [place, ""]))
    assert "not offered by this page" in refused(served.call("unmark", [place, "shard-00000.tar", 0]))


@pytest.mark.parametrize("model", ["../one", "/etc/passwd", "runs/one/final", "runs/one/../one", "OWNER/NAME"])
def test_models_beyond_the_list_are_refused(served, model):
    config = json.loads(served.get("config")[1])
    inputs = next(each["inputs"] for each in config["dependencies"] if each["api_name"] == "draw")
    parts = {part["id"]: part["props"] for part in config["components"]}
    values = [parts[number].get("value") for number in inputs]
    models = next(place for place, number in enumerate(inputs) if parts[number].get("elem_id") == "models")
    prompt = next(place for place, number in enumerate(inputs) if parts[number].get("elem_id") == "prompt")
    values[models], values[prompt] = [model], "a star"
    assert "not offered by this page" in refused(served.call("draw", values))


@pytest.mark.parametrize(
    "path",
    [
        "secret.txt",
        "/etc/passwd",
        "../../../../../../etc/passwd",
        "runs/one/config.yaml",
        "shards/index.json",
        "app.log",
        "%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x",
        ".gradio",
    ],
)
def test_files_are_not_served(served, path):
    for name in (path, f"{served.folder}/{path}"):
        for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", "gradio_api/proxy="):
            status, body = served.get(route + urllib.parse.quote(name, safe="/%:"))
            assert status >= 400 and b"root:" not in body and SECRET.encode() not in body


@pytest.mark.parametrize("path", ["/etc/passwd", "secret.txt", "runs/one/samples.png", "../secret.txt"])
def test_a_picture_that_was_not_uploaded_is_not_read(served, path):
    for place in (path, f"{served.folder}/{path}"):
        given = {"path": place, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
        assert "carries" not in refused(served.call("from_picture", [given]))


def test_an_address_in_the_place_of_a_picture_is_not_fetched(served):
    asked = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.png"
        for given in ({"path": url}, {"path": "a.png", "url": url}, {"path": url, "url": url}):
            refused(served.call("from_picture", [{**given, "meta": {"_type": "gradio.FileData"}}]))
        server.shutdown()
    assert asked == []


def test_other_pages_may_not_call(served):
    own = served.address.rstrip("/")
    assert served.get("config", Origin=own)[0] == 200
    for headers in ({"Origin": "http://elsewhere.example"}, {"Origin": "null"}, {"Host": "elsewhere.example"}):
        assert served.get("config", **headers)[0] == 403
        assert (
            served.post("gradio_api/queue/join", {"data": [], "fn_index": 0, "session_hash": "x"}, **headers)[0] == 403
        )
        assert served.post("gradio_api/upload", {}, **headers)[0] == 403


def test_nothing_is_offered_to_other_programs(served):
    assert json.loads(served.get("gradio_api/info")[1]) == {"named_endpoints": {}, "unnamed_endpoints": {}}
    for path in ("docs", "redoc", "openapi.json", "monitoring/summary", "gradio_api/mcp/sse", "gradio_api/runs"):
        assert served.get(path)[0] >= 400
    for route in ("gradio_api/run/draw", "gradio_api/api/draw", "run/draw", "api/draw"):
        assert served.post(route, {"data": []})[0] >= 400


def test_the_page_names_nothing_of_elsewhere(served):
    config = json.loads(served.get("config")[1])
    assert config["analytics_enabled"] is False and not config.get("is_space")
    _, body = served.get("")
    assert b"fonts.googleapis.com" not in body and b"cdnjs" not in body
    assert b"hdm-app: http://127.0.0.1:" not in body


@pytest.fixture(scope="module")
def locked(tmp_path_factory, browser_serve):
    yield from browser_serve(tmp_path_factory.mktemp("locked"), "--auth", "me:open sesame")


def test_a_password_opens_the_page_and_nothing_else_does(locked):
    for path in ("config", "gradio_api/info", "gradio_api/file=app.log", "gradio_api/queue/data?session_hash=x"):
        assert locked.get(path)[0] in (401, 403)
    assert locked.post("gradio_api/queue/join", {"data": [], "fn_index": 0, "session_hash": "x"})[0] == 401
    assert locked.post("gradio_api/upload", {})[0] in (401, 422)
    locked.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    for password, status in (("open", 400), ("open sesame", 200)):
        form = urllib.parse.urlencode({"username": "me", "password": password}).encode()
        request = urllib.request.Request(locked.address + "login", form)
        try:
            with locked.opener.open(request) as answer:
                assert answer.status == status
        except urllib.error.HTTPError as error:
            assert error.code == status
    assert locked.get("config")[0] == 200


@pytest.mark.parametrize(("host", "hint"), [("192.0.2.1", "--host"), ("nonsense.invalid", "--host")])
def test_a_host_that_is_not_of_this_machine_is_told_so(host, hint):
    from hdm_lightning.app.page import own_port

    with pytest.raises(UserError) as caught:
        own_port(host, 0)
    assert hint in caught.value.hint and host in caught.value.where


def test_a_port_that_is_taken_is_told_so_and_ipv6_can_be_listened_at():
    from hdm_lightning.app.page import own_port

    assert own_port("::1", 0) > 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=str(taken.getsockname()[1])) as caught:
            own_port("127.0.0.1", taken.getsockname()[1])
    assert "--port" in caught.value.hint
