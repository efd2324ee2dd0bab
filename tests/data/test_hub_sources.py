"""Shards from a hub that drops connections, refuses access, fails or cannot be reached."""

import json
import os
import socket
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from archives import pairs, refusal, shards

from tinyldm.data import remote
from tinyldm.data.remote import SourceLost


class Hub(BaseHTTPRequestHandler):
    """Lists and serves the files of one data set; every second response body ends half way."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server.hub
        path = self.path.split("?")[0]
        if hub.refusal:
            status, code = hub.refusal
            return self.reply(b"{}", status, {"X-Error-Code": code} if code else {})
        if path.startswith("/api/datasets/some/set/tree/main"):
            below = path.removeprefix("/api/datasets/some/set/tree/main").strip("/")
            return self.reply(json.dumps([{"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()}
                                          for name, content in hub.files.items() if os.path.dirname(name) == below]).encode())
        if path.startswith("/api/datasets/some/set"):
            return self.reply(json.dumps({"id": "some/set", "sha": "0" * 40, "siblings": []}).encode())
        content = hub.files.get(path.removeprefix("/datasets/some/set/resolve/main/"))
        if content is None:
            return self.reply(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        first, last = (self.headers["Range"] or f"bytes=0-{len(content) - 1}").removeprefix("bytes=").split("-")
        body = content[int(first):int(last) + 1]
        hub.requests += 1
        self.reply(body, 206, {"Content-Range": f"bytes {first}-{last}/{len(content)}"}, broken=hub.requests % 2)

    def reply(self, body, status=200, headers=(), broken=False):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if broken else body)
        self.close_connection = bool(broken)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    http = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    files = {"README.md": b"x", "0.tar": pairs("a"), "1.tar": pairs("b"), "set/a.png": b"A"}
    http.hub = SimpleNamespace(requests=0, files=files, refusal=None)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in vars(constants).copy().items():
        if isinstance(value, str) and value.startswith(constants.ENDPOINT) and name != "ENDPOINT":
            monkeypatch.setattr(constants, name, value.replace(constants.ENDPOINT, f"http://127.0.0.1:{http.server_port}"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{http.server_port}")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    huggingface_hub.close_session()
    yield http.hub
    http.shutdown()
    http.server_close()
    huggingface_hub.close_session()
    huggingface_hub.HfFileSystem.clear_instance_cache()


def test_shards_are_streamed_from_the_hub_over_broken_connections(hub):
    out = shards("hf://datasets/some/set/{0..1}.tar")
    assert [part.key for shard in out for part in shard.read()] == ["a", "b"] and hub.requests >= 4
    assert [shard.url for shard in out] == [f"hf://datasets/some/set/{i}.tar" for i in range(2)] and all(s.remote for s in out)
    assert [shard.name for shard in shards("hf://datasets/some/set/*.tar")] == [shard.name for shard in out]
    hub.files["1.tar"] = pairs("c")                   # of the same size
    after = shards("hf://datasets/some/set/*.tar")
    assert [old.stamp == new.stamp for old, new in zip(out, after)] == [True, False]


@pytest.mark.parametrize("spec, expected", [("some/set/{0..2}.tar", "some/set/2.tar: there is no such file"),
                                            ("some/other/0.tar", "there is no such file or folder")])
def test_files_that_are_not_on_the_hub_are_named(hub, spec, expected):
    assert expected in refusal(f"hf://datasets/{spec}")


SPECS = ["hf://datasets/some/set/0.tar", "hf://datasets/some/set/*.tar", "hf://datasets/some/set"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("status, code, expected", [
    (401, "RepoNotFound", "no right to read it: log in or set HF_TOKEN"), (401, "", "HF_TOKEN"), (403, "", "HF_TOKEN"),
    (403, "GatedRepo", "HF_TOKEN"), (404, "RepoNotFound", "there is no such file"), (404, "RevisionNotFound", "no such file")])
def test_refusals_of_the_hub_are_errors_with_the_fix(hub, spec, status, code, expected):
    hub.refusal = status, code
    assert expected in refusal(spec)


@pytest.mark.parametrize("spec", SPECS)
def test_a_hub_that_fails_or_cannot_be_reached_is_source_lost(hub, spec, monkeypatch):
    hub.refusal = 500, ""
    with pytest.raises(SourceLost, match="cannot be listed"):
        shards(spec)
    hub.refusal = None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(SourceLost, match="cannot be listed .OfflineMode"):
        shards(spec)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    assert shards(spec)
    with socket.socket() as deaf:           # the port is bound, but nobody listens
        deaf.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        huggingface_hub.HfFileSystem.clear_instance_cache()
        with pytest.raises(SourceLost, match="cannot be listed .Connect"):
            shards(spec)
