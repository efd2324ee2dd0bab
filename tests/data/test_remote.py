"""Sources behind a URL: the same samples as from a disk, over connections that break, and from a hub that does."""

import io
import json
import os
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import fsspec
import huggingface_hub.constants
import numpy as np
import pytest
from archives import pairs, read, refusal, shards
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from tinyldm.data import remote
from tinyldm.data.readers import Sample
from tinyldm.data.remote import SourceLost, Steady


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_the_same_sources_are_read_from_a_url(memory):
    memory.pipe({"/set/a.png": b"A", "/set/a.txt": b"one", "/tars/0.tar": pairs("a"), "/tars/1.tar": pairs("b"),
                 "/rows/metadata.csv": b"file_name,text\nx.png,one\n", "/rows/x.png": b"X"})
    npz = io.BytesIO()
    np.savez(npz, images=np.zeros((2, 4, 4, 3), np.uint8), labels=[0, 1])
    memory.pipe("/a.npz", npz.getvalue())
    assert read("memory://set") == [Sample("a.png", b"A", {"txt": b"one"})]
    for spec in ("tars", "tars/*.tar", "tars/{0..1}.tar"):
        assert [part.key for part in read(f"memory://{spec}")] == ["a", "b"]
    assert read("memory://rows")[0].picture == b"X" and len(read("memory://a.npz")) == 2
    [shard] = shards("memory://tars/0.tar")
    assert shard.remote and shard.url == "memory:///tars/0.tar" and shards("memory://set")[0].remote
    memory.pipe("/tars/0.tar", pairs("a", "b"))
    assert shards("memory://tars/0.tar")[0].stamp != shard.stamp and shards("memory://tars/0.tar")[0].name == shard.name
    assert "memory://tars/7.tar: there is no such file" in refusal("memory://tars/{0,7}.tar")


def test_a_url_without_rights_is_refused_with_its_name(memory, monkeypatch):
    def denied(self, path, *args, **kwargs):
        raise PermissionError(13, "Forbidden", path)

    memory.pipe({"/set/a.png": b"A"})
    monkeypatch.setattr(MemoryFileSystem, "ls", denied)
    assert "--data memory://set: no right to read" in refusal("memory://set")


class Flaky(MemoryFileSystem):
    """Breaks at the bytes in `faults`: by an error, or by an end before the end."""

    protocol = "flaky"
    store, pseudo_dirs, faults, opened, ranges = {}, [""], [], [], True

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def put(self, path, content):
        self.store[path] = MemoryFile(self, path, content)

    def open(self, path, mode="rb", **kwargs):
        content, fs = self.store[self._strip_protocol(path)].getvalue(), self

        class Stream(io.BytesIO):
            def read(self, size=-1):
                place = self.tell()
                if fs.faults and place + max(size, 1) > fs.faults[0][0]:
                    stop, fault = fs.faults[0]
                    if place >= stop:
                        fs.faults.pop(0)
                        if fault is not None:
                            raise fault
                        return b""
                    size = stop - place
                return super().read(size)

            def seek(self, *args):
                if not fs.ranges:
                    raise ValueError("Cannot seek streaming HTTP file")
                return super().seek(*args)

        self.opened.append(path)
        return Stream(content)


@pytest.fixture
def flaky(monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    fs = Flaky()
    fs.waits = []
    monkeypatch.setattr(remote.time, "sleep", fs.waits.append)
    for value in (fs.store, fs.opened, fs.faults):
        value.clear()
    yield fs
    Flaky.ranges = True


DATA = bytes(range(256)) * 40


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", [ConnectionResetError("reset"), TimeoutError(), None, RuntimeError("client"),
                                   PermissionError("403")])
def test_a_connection_that_breaks_is_taken_up_at_the_same_byte(flaky, fault, ranges):
    flaky.put("/x", DATA)
    Flaky.ranges = ranges
    flaky.faults += [(0, fault), (100, fault), (100, fault), (5000, fault)]
    with Steady(flaky, "/x", len(DATA)) as stream:
        assert b"".join(iter(lambda: stream.read(777), b"")) == DATA
    assert flaky.waits == [1, 1, 2, 1] and len(flaky.opened) == 5


def test_a_connection_that_stays_broken_is_an_error_that_says_where(flaky):
    flaky.put("/x", DATA)
    flaky.faults += [(5000, ConnectionResetError("reset by peer"))] * 6
    with Steady(flaky, "/x", len(DATA)) as stream, pytest.raises(SourceLost) as error:
        while stream.read(5000):
            pass
    assert str(error.value) == ("flaky:///x: stopped at byte 5000 of 10240 after 6 tries (ConnectionResetError: reset by "
                                "peer): check the network and run the same command again; finished shards stay")
    assert flaky.waits == [1, 2, 4, 8, 16] and isinstance(error.value, OSError)


def test_an_end_before_the_end_is_a_break_only_where_the_size_is_known(flaky):
    flaky.put("/x", DATA)
    with pytest.raises(SourceLost, match="byte 10240 of 10241 after 2 tries .the connection ended early"):
        with Steady(flaky, "/x", len(DATA) + 1, tries=2) as stream:
            while stream.read(99_999):
                pass
    assert Steady(flaky, "/x", None).readall() == DATA


def test_a_file_that_is_gone_is_not_waited_for(flaky):
    flaky.put("/x", DATA)
    flaky.faults += [(0, FileNotFoundError("gone"))]
    with pytest.raises(FileNotFoundError):
        Steady(flaky, "/x", len(DATA)).read(1)
    assert flaky.waits == []


def test_a_steady_file_seeks_like_any_file(flaky):
    flaky.put("/x", DATA)
    stream = io.BufferedReader(Steady(flaky, "/x", len(DATA)), 64)
    for offset, whence, place in ((9000, 0, 9000), (-5, 1, 8998), (-3, 2, 10237), (0, 0, 0), (1, 2, 10241)):
        assert stream.seek(offset, whence) == place and stream.read(3) == DATA[place:place + 3]
    with pytest.raises((ValueError, OSError)):
        stream.seek(-1)
    with pytest.raises(OSError):
        Steady(flaky, "/x", None).seek(0, 2)


def test_a_shard_is_read_over_breaks_and_its_loss_is_an_error(flaky):
    flaky.put("/x.tar", pairs(*map(str, range(50))))
    flaky.faults += [(1000, None), (20_000, ConnectionResetError()), (40_000, TimeoutError())]
    assert [part.key for part in read("flaky://x.tar")] == [str(i) for i in range(50)] and flaky.waits == [1, 1, 1]
    for name in ("x.tar", "x.tar.gz"):
        flaky.store[f"/{name}"] = flaky.store["/x.tar"]
        flaky.faults[:] = [(20_000, None)] * 6
        with pytest.raises(SourceLost, match=f"flaky:///{name}: stopped at byte 20000 of"):
            read(f"flaky://{name}")
    flaky.put("/f/a.png", DATA)
    flaky.put("/x.npz", DATA)
    for spec in ("f", "x.npz"):
        flaky.faults[:] = [(0, None)] * 6
        with pytest.raises(SourceLost):
            read(f"flaky://{spec}")


# ---- the hub


class Hub(BaseHTTPRequestHandler):
    """Lists and serves the files of one data set; every second body breaks off half way."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server.hub
        path = self.path.split("?")[0]
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
    http.hub = SimpleNamespace(requests=0, files=files)
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


def test_shards_are_streamed_from_the_hub_over_breaks(hub):
    out = shards("hf://datasets/some/set/{0..1}.tar")
    assert [part.key for shard in out for part in shard.read()] == ["a", "b"] and hub.requests >= 4
    assert [shard.url for shard in out] == [f"hf://datasets/some/set/{i}.tar" for i in range(2)] and all(s.remote for s in out)
    assert [shard.name for shard in shards("hf://datasets/some/set/*.tar")] == [shard.name for shard in out]
    hub.files["1.tar"] = pairs("c")                   # of the same size
    after = shards("hf://datasets/some/set/*.tar")
    assert [old.stamp == new.stamp for old, new in zip(out, after)] == [True, False]


@pytest.mark.parametrize("spec, expected", [("some/set/{0..2}.tar", "some/set/2.tar: there is no such file"),
                                            ("some/other/0.tar", "there is no such file or folder")])
def test_what_the_hub_does_not_have_is_named(hub, spec, expected):
    assert expected in refusal(f"hf://datasets/{spec}")
