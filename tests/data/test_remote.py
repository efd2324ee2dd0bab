"""Sources behind a URL: the same samples as from a disk, over connections that break."""

import io
import json
import socket
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from archives import pairs, read, refusal, shards
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

from tinyldm.data import remote
from tinyldm.data.readers import Sample
from tinyldm.data.remote import RetryingFile, SourceLost


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


def caused(error, cause):
    error.__cause__ = cause
    return error


class Answer(Exception):
    """As the errors of HTTP libraries keep a status."""

    def __init__(self, status, key="status"):
        super().__init__(f"answered {status}\nin two lines")
        setattr(self, key, status)


OFFLINE = [TimeoutError(), ConnectionResetError("reset"), OSError(101, "Network is unreachable"), RuntimeError("no route"),
           Answer(503), Answer(429, "status_code"), Answer(504, "code"), Answer(SimpleNamespace(status_code=500), "response"),
           Answer({"ResponseMetadata": {"HTTPStatusCode": 503}}, "response"),
           Answer(0, "code"), LocalEntryNotFoundError("not in the cache"), OfflineModeIsEnabled("offline"),
           json.JSONDecodeError("Expecting value", "<html>", 0)]
BARRED = [Answer(403), Answer(401, "status_code"), Answer({"ResponseMetadata": {"HTTPStatusCode": 403}}, "response"),
          PermissionError("no"), Answer(SimpleNamespace(status_code=401), "response")]
GONE = [Answer(404), Answer(410), Answer(SimpleNamespace(status_code=404), "response"), EntryNotFoundError("no such entry"),
        Answer({"ResponseMetadata": {"HTTPStatusCode": 404}}, "response")]


def listed(memory, monkeypatch, error, spec="memory://set"):
    def fail(self, path, *args, **kwargs):
        raise error

    monkeypatch.setattr(MemoryFileSystem, "info", fail)
    shards(spec)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("errors, kind, expected", [
    (OFFLINE, SourceLost, "cannot be listed"), (BARRED, ValueError, "no right to read"),
    (GONE, ValueError, "there is no such file")],
    ids=["offline", "barred", "gone"])
def test_no_network_is_told_from_no_file_and_no_right(memory, monkeypatch, wrapped, errors, kind, expected):
    for error in errors:
        if wrapped and isinstance(error, ValueError):
            continue                        # a ValueError is about the name, not the network
        with pytest.raises(kind) as caught:
            listed(memory, monkeypatch, caused(FileNotFoundError("set"), error) if wrapped else error)
        assert str(caught.value).startswith("--data memory://set: ") and expected in str(caught.value)
        assert "\n" not in str(caught.value) and isinstance(caught.value, SourceLost) == (kind is SourceLost)


def test_mistakes_that_no_network_mends_are_no_losses(memory, monkeypatch):
    coded = FileNotFoundError("set")
    coded.code = 2                          # an error number of the system, not an HTTP status
    for error, expected in ((coded, "there is no such file"),
                            (caused(FileNotFoundError("set"), KeyError("set")), "there is no such file"),
                            (caused(FileNotFoundError("set"), ValueError("bad name")), "there is no such file"),
                            (NotImplementedError("no lists"), "cannot be listed .NotImplementedError: no lists"),
                            (ImportError("no module"), "cannot be listed .ImportError"),
                            (ValueError("bad\nname"), "^--data memory://set: bad name$"),
                            (ValueError("--data x: told"), "^--data x: told$")):
        with pytest.raises(ValueError, match=expected) as caught:
            listed(memory, monkeypatch, error)
        assert not isinstance(caught.value, OSError)


def test_a_server_that_refuses_to_connect_at_once_is_a_loss():
    with socket.socket() as deaf:           # the port is bound, but nobody listens
        deaf.bind(("127.0.0.1", 0))
        url = f"ftp://127.0.0.1:{deaf.getsockname()[1]}/a.tar"
        with pytest.raises(SourceLost, match=f"--data {url}: cannot be listed .ConnectionRefusedError"):
            shards(url)


def test_a_local_disk_that_fails_is_no_lost_network(tmp_path, monkeypatch):
    for error, expected in ((OSError(5, "Input/output error"), "cannot be listed (OSError: [Errno 5] Input/output error)"),
                            (UnicodeEncodeError("utf-8", "x", 0, 1, "no name"), f"--data {tmp_path}: 'utf-8' codec")):
        def fail(self, path, *args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(LocalFileSystem, "info", fail)
        assert expected in refusal(tmp_path)


class Flaky(MemoryFileSystem):
    """Fails at the positions in `faults`: with an exception, or by ending early (None)."""

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
                position = self.tell()
                if fs.faults and position + max(size, 1) > fs.faults[0][0]:
                    stop, fault = fs.faults[0]
                    if position >= stop:
                        fs.faults.pop(0)
                        if fault is not None:
                            raise fault
                        return b""
                    size = stop - position
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
                                   PermissionError("403"), Answer(404)])
def test_a_connection_that_breaks_is_taken_up_at_the_same_byte(flaky, fault, ranges):
    flaky.put("/x", DATA)
    Flaky.ranges = ranges
    flaky.faults += [(0, fault), (100, fault), (100, fault), (5000, fault)]
    with RetryingFile(flaky, "/x", len(DATA)) as stream:
        assert b"".join(iter(lambda: stream.read(777), b"")) == DATA
    assert flaky.waits == [1, 1, 2, 1] and len(flaky.opened) == 5


def test_a_connection_that_stays_broken_is_an_error_that_says_where(flaky):
    flaky.put("/x", DATA)
    flaky.faults += [(5000, ConnectionResetError("reset by peer"))] * 6
    with RetryingFile(flaky, "/x", len(DATA)) as stream, pytest.raises(SourceLost) as error:
        while stream.read(5000):
            pass
    assert str(error.value) == ("flaky:///x: stopped at byte 5000 of 10240 after 6 tries (ConnectionResetError: reset by "
                                "peer): check the network and run the same command again; finished shards are kept")
    assert flaky.waits == [1, 2, 4, 8, 16] and isinstance(error.value, OSError)


def test_an_end_before_the_end_is_a_break_only_where_the_size_is_known(flaky):
    flaky.put("/x", DATA)
    with pytest.raises(SourceLost, match="byte 10240 of 10241 after 2 tries .the connection ended early"):
        with RetryingFile(flaky, "/x", len(DATA) + 1, tries=2) as stream:
            while stream.read(99_999):
                pass
    assert RetryingFile(flaky, "/x", None).readall() == DATA


def test_a_file_that_is_gone_is_not_waited_for(flaky):
    flaky.put("/x", DATA)
    flaky.faults += [(0, FileNotFoundError("gone"))]
    with pytest.raises(FileNotFoundError):
        RetryingFile(flaky, "/x", len(DATA)).read(1)
    assert flaky.waits == []


def test_a_server_that_is_away_is_waited_for_though_its_file_system_says_not_found(flaky):
    flaky.put("/x", DATA)
    causes = {0: TimeoutError(), 9: Answer(503)}
    flaky.faults += [(position, caused(FileNotFoundError("/x"), cause)) for position, cause in causes.items()]
    assert RetryingFile(flaky, "/x", len(DATA)).readall() == DATA and flaky.waits == [1, 1]


def test_a_file_that_vanished_behind_a_url_is_a_lost_shard_and_a_missing_picture(flaky):
    flaky.put("/x.tar", pairs("a"))
    flaky.put("/f/a.png", DATA)
    flaky.faults += [(0, FileNotFoundError("gone"))] * 2
    with pytest.raises(SourceLost, match="flaky:///x.tar: cannot be read .FileNotFoundError: gone"):
        read("flaky://x.tar")
    assert [part.reason for part in read("flaky://f")] == ["picture file missing"]


def test_a_steady_file_seeks_like_any_file(flaky):
    flaky.put("/x", DATA)
    stream = io.BufferedReader(RetryingFile(flaky, "/x", len(DATA)), 64)
    for offset, whence, position in ((9000, 0, 9000), (-5, 1, 8998), (-3, 2, 10237), (0, 0, 0), (1, 2, 10241)):
        assert stream.seek(offset, whence) == position and stream.read(3) == DATA[position:position + 3]
    with pytest.raises((ValueError, OSError)):
        stream.seek(-1)
    with pytest.raises(OSError):
        RetryingFile(flaky, "/x", None).seek(0, 2)


def test_a_shard_is_read_over_breaks_and_its_loss_is_an_error(flaky):
    flaky.put("/x.tar", pairs(*map(str, range(50))))
    flaky.faults += [(1000, None), (20_000, ConnectionResetError()), (40_000, TimeoutError())]
    assert [part.key for part in read("flaky://x.tar")] == [str(i) for i in range(50)] and flaky.waits == [1, 1, 1]
    for name in ("x.tar", "x.tar.gz"):
        flaky.store[f"/{name}"] = flaky.store["/x.tar"]
        flaky.faults[:] = [(20_000, None)] * 6
        with pytest.raises(SourceLost, match=f"^flaky:///{name}: stopped at byte 20000 of"):
            read(f"flaky://{name}")
    flaky.put("/f/a.png", DATA)
    flaky.put("/x.npz", DATA)
    flaky.put("/t/metadata.csv", DATA)
    for spec, name in (("f", "f/a.png"), ("x.npz", "x.npz"), ("t", "t/metadata.csv")):
        flaky.faults[:] = [(0, None)] * 6
        with pytest.raises(SourceLost, match=f"^flaky:///{name}: stopped at byte"):
            read(f"flaky://{spec}")
