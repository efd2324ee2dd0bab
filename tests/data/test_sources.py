"""What is typed behind --data, the shards it stands for, and file systems that fail."""

import csv
import io
import json
import os
import pickle
import tarfile
import threading
from fractions import Fraction
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import fsspec
import huggingface_hub.constants
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.registry import _registry, known_implementations

from tinyldm.data import remote, toyworld
from tinyldm.data.readers import Sample, Skip, captions
from tinyldm.data.remote import SourceLost, Steady
from tinyldm.data.sources import Source, braces, list_shards, parse_sources


def shards(spec, chunk=2048, **kwargs):
    return list_shards(Source(str(spec), None), **{"resolution": 16, "scenes": 5, "seed": 1, "chunk": chunk} | kwargs)


def read(spec, **kwargs):
    return [part for shard in shards(spec, **kwargs) for part in shard.read()]


def refusal(spec):
    with pytest.raises(ValueError) as error:
        shards(spec)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def tar(*names):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in names:
            for end, content in ((".png", b"picture " + name.encode()), (".txt", name.encode())):
                member = tarfile.TarInfo(name + end)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def fill(folder, **files):
    for name, content in files.items():
        file = folder / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# ---- what was typed


@pytest.mark.parametrize("word, spec, weight", [
    ("A:0.7", "A", "7/10"), ("A:3", "A", "3"), ("A:.1", "A", "1/10"), ("A:1e-2", "A", "1/100"), ("A", "A", None),
    ("A:", "A:", None),
    ("C:\\data\\x", "C:\\data\\x", None), ("C:\\data:0.5", "C:\\data", "1/2"), ("C:/data/x.tar", "C:/data/x.tar", None),
    ("http://host:8080/x.tar", "http://host:8080/x.tar", None), ("http://host:8080/x.tar:2", "http://host:8080/x.tar", "2"),
    ("http://host:8080", "http://host:8080", None), ("ftp://me:pw@host:21", "ftp://me:pw@host:21", None),
    ("http://[::1]:80", "http://[::1]:80", None), ("http://host:8080:0.5", "http://host:8080", "1/2"),
    ("http://host:8080:2", "http://host:8080", "2"),
    ("s3://bucket:0.5", "s3://bucket", "1/2"), ("hf://datasets/a/b@main/*.tar:0.25", "hf://datasets/a/b@main/*.tar", "1/4"),
    ("x-{000..045}.tar:1", "x-{000..045}.tar", "1"), ("a:b", "a:b", None), ("a:1:2", "a:1", "2"),
    ("toyworld:1", "toyworld", "1")])
def test_a_weight_is_a_number_behind_the_last_colon(word, spec, weight):
    assert parse_sources([word]) == [Source(spec, None if weight is None else Fraction(weight))]


def test_weights_are_kept_exactly_and_in_order():
    assert parse_sources(["B:0.1", "A:0.9"]) == [Source("B", Fraction(1, 10)), Source("A", Fraction(9, 10))]


def test_a_path_that_exists_is_a_path_colon_and_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a:0.5").mkdir()
    assert parse_sources(["a:0.5", "~/a:0.5"]) == [Source("a:0.5", None), Source("~/a:0.5", None)]
    assert parse_sources(["a:0.5:2"]) == [Source("a:0.5", Fraction(2))]


@pytest.mark.parametrize("words, expected", [
    (["A:0"], "above 0"), (["A:-1"], "above 0"), (["A:nan"], "above 0"), (["A:-inf"], "above 0"), ([":1"], "without a source"),
    ([""], "what is read"), (["A:1", "B"], "--data B has no weight"), (["A:1", "A:2"], "named twice"),
    (["A", "A"], "named twice")])
def test_weights_that_make_no_sense_are_refused(words, expected):
    with pytest.raises(ValueError, match=expected):
        parse_sources(words)


@pytest.mark.parametrize("pattern, paths", [
    ("a", ["a"]), ("x-{008..011}.tar", ["x-008.tar", "x-009.tar", "x-010.tar", "x-011.tar"]), ("{9..11}", ["9", "10", "11"]),
    ("{0..2}", ["0", "1", "2"]), ("{00..1}", ["00", "01"]), ("{2..0}", ["2", "1", "0"]),
    ("{a,b}/{c,d}", ["a/c", "a/d", "b/c", "b/d"]),
    ("{a,b{1,2}}", ["a", "b1", "b2"]), ("s3://b/{a,}x", ["s3://b/ax", "s3://b/x"]), ("{a}", ["{a}"]), ("{}", ["{}"]),
    ("{1..2", ["{1..2"]),
    ("{a}{b,c}", ["{a}b", "{a}c"]), ("{x,{1..2}}.tar", ["x.tar", "1.tar", "2.tar"])])
def test_braces_stand_for_what_they_do_in_a_shell(pattern, paths):
    assert braces(pattern) == paths


@pytest.mark.parametrize("pattern", ["{0..99999999999}", "{0..9999}{0..9999}"])
def test_braces_for_millions_of_paths_are_refused(pattern):
    with pytest.raises(ValueError, match="stands? for more than 100000 paths"):
        braces(pattern)


# ---- toyworld


def test_toyworld_comes_in_shards_that_say_how_they_were_drawn():
    out = shards("toyworld", chunk=2)
    assert [shard.name for shard in out] == ["toyworld-000000", "toyworld-000002", "toyworld-000004"]
    samples = [sample for shard in out for sample in shard.read()]
    assert len(samples) == 5 and not any(shard.remote for shard in out)
    for number, sample in enumerate(samples):
        drawn = toyworld.sample(number, 16, 1)
        assert np.array_equal(sample.picture, drawn.image) and captions(sample) == [(0, drawn.caption)]
    others = [shards("toyworld", chunk=2, **change) for change in ({"resolution": 32}, {"seed": 2}, {"scenes": 6})]
    stamps = [shard.stamp for shard in out]
    assert [[a == b.stamp for a, b in zip(stamps, other)] for other in others] == [[False] * 3, [False] * 3,
        [True, True, False]]
    with pytest.raises(ValueError, match="0 scenes"):
        shards("toyworld", scenes=0)


# ---- folders


def test_a_folder_is_read_with_the_captions_beside_the_pictures(tmp_path):
    fill(tmp_path, a_png="A", a_txt="one", sub__b_JPG="B", sub__b_json='{"prompt": "two"}', sub__a_png="C", c_webp="D",
        c_TXT="four",
         n_md="", lone_txt="x", _hidden_png="H", _git__x_png="X")
    out = read(tmp_path)
    assert [(part.key, part.picture, captions(part)) for part in out] == [
        ("a.png", b"A", [(0, "one")]), ("c.webp", b"D", [(0, "four")]), ("sub/a.png", b"C", []),
        ("sub/b.JPG", b"B", [(0, "two")])]


@pytest.mark.parametrize("end", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "TIFF"])
def test_pictures_of_each_kind_are_found(tmp_path, end):
    (tmp_path / f"a.{end}").write_bytes(b"A")
    assert [part.key for part in read(tmp_path)] == [f"a.{end}"]


def test_two_pictures_of_one_name_are_ambiguous(tmp_path):
    fill(tmp_path, a_png="A", a_jpg="B", a_txt="one", b_png="B", b_txt="two")
    assert read(tmp_path)[:2] == [Skip("a.jpg", "duplicate key"), Skip("a.png", "duplicate key")] and len(read(tmp_path)) == 3


def test_a_folder_s_chunks_keep_their_names_and_change_their_stamps_with_their_files_alone(tmp_path):
    for number in range(5):
        fill(tmp_path, **{f"{number}_png": str(number), f"{number}_txt": "a"})
    before = shards(tmp_path, chunk=2)
    assert [[sample.key for sample in shard.read()] for shard in before] == [["0.png", "1.png"], ["2.png", "3.png"], ["4.png"]]
    assert [shard.stamp for shard in shards(tmp_path, chunk=2)] == [shard.stamp for shard in before]

    def changed():
        after = shards(tmp_path, chunk=2)
        assert [shard.name for shard in before] == [shard.name for shard in after][:3]
        return [old.stamp != new.stamp for old, new in zip(before, after)]

    fill(tmp_path, **{"2_txt": "bb"})
    assert changed() == [False, True, False]
    fill(tmp_path, **{"5_png": "x"})
    assert changed() == [False, True, True]
    os.utime(tmp_path / "0.png", ns=(10 ** 18, 10 ** 18))
    assert changed() == [True, True, True]
    fill(tmp_path, **{"6_png": "x"})
    assert changed() == [True, True, True] and len(shards(tmp_path, chunk=2)) == 4


def test_names_are_unique_and_safe_on_every_system(tmp_path):
    fill(tmp_path, x__a_tar=tar("a"), y__a_tar=tar("b"), y__A_tar=tar("c"), **{"y__ü <|>?_tar": tar("d")})
    names = [shard.name for spec in ("x/*.tar", "y") for shard in shards(tmp_path / spec)]
    assert len({name.lower() for name in names}) == 4 and all(name.isascii() for name in names)
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names)


def test_files_that_vanish_or_are_too_large_are_skipped(tmp_path, monkeypatch):
    from tinyldm.data import readers
    fill(tmp_path, a_png="A", b_png="BB", c_png="C")
    monkeypatch.setattr(readers, "LIMIT", 1)
    [shard] = shards(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "c.png").unlink()
    (tmp_path / "c.png").mkdir()
    assert [part[:2] for part in shard.read()] == [("a.png", "picture file missing"), ("b.png", "too large"),
        ("c.png", "unreadable")]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_to_files_are_followed_and_their_targets_stamped(tmp_path):
    fill(tmp_path, blobs__1="A", set__a_txt="one")
    (tmp_path / "set/a.png").symlink_to("../blobs/1")
    (tmp_path / "set/b.png").symlink_to("../blobs/none")
    assert read(tmp_path / "set") == [Sample("a.png", b"A", {"txt": b"one"})]
    stamp = shards(tmp_path / "set")[0].stamp
    fill(tmp_path, blobs__1="BB")
    assert shards(tmp_path / "set")[0].stamp != stamp


def test_a_shard_can_be_sent_to_another_process(tmp_path):
    fill(tmp_path, a_png="A", x__a_tar=tar("a"))
    for shard in shards(tmp_path / "x") + shards("toyworld"):
        assert len(list(pickle.loads(pickle.dumps(shard)).read())) == len(list(shard.read())) > 0


# ---- metadata


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


ROWS = [{"file_name": "b.png", "text": 'a "quoted",\nbroken line', "alt": "é"},
    {"file_name": "sub/a.png", "text": "two", "alt": ""}]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("below", ["", "train"])
def test_rows_of_a_metadata_file_are_samples_with_its_columns(tmp_path, name, below):
    fill(tmp_path / below, b_png="B", sub__a_png="A", c_png="C", b_txt="not this")
    table(tmp_path / below / name, ROWS)
    out = read(tmp_path)
    assert [(part.picture, part.fields) for part in out] == [(b"B", ROWS[0]), (b"A", ROWS[1])]
    assert captions(out[0], ["alt", "text"]) == [(0, "é"), (1, 'a "quoted",\nbroken line')] and captions(out[1], ["alt"]) == []
    assert len({part.key for part in out}) == 2 and "b.png" in out[0].key
    assert [len(list(shard.read())) for shard in shards(tmp_path, chunk=1)] == [1, 1]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_rows_that_lead_elsewhere_or_nowhere_are_skipped(tmp_path, name):
    fill(tmp_path, x_png="X", set__a_png="A")
    paths = ["../x.png", str(tmp_path / "x.png"), "C:\\x.png", "..\\x.png", "none.png", "./a.png"]
    table(tmp_path / "set" / name, [{"file_name": path} for path in paths])
    assert [part.reason if isinstance(part, Skip) else part.picture for part in read(tmp_path / "set")] == [
        "unsafe name"] * 4 + ["picture file missing", b"A"]


def test_broken_lines_of_a_jsonl_are_skipped_alone(tmp_path):
    fill(tmp_path, a_png="A")
    table(tmp_path / "metadata.jsonl", ["\n", "{broken\n", "[1]\n", "[" * 100_000 + "\n", '{"no": 1}\n', '{"file_name": 3}\n',
                                        ROWS[0] | {"file_name": "a.png"}, '{"file_name": "\\ud800.png"}\n'])
    reasons = [part.reason if isinstance(part, Skip) else part.picture for part in read(tmp_path)]
    assert reasons == ["unreadable"] * 5 + [b"A", "picture file missing"]


def test_rows_of_a_csv_that_do_not_fit_its_head_are_skipped(tmp_path):
    fill(tmp_path, a_png="A", b_png="B")
    lines = [b"file_name,text", b"", b"a.png,one,more", b"a.png", b"a.png," + b"x" * 200_000, b"a.png,\xff", b'b.png,"two',
        b"a.png,x"]
    (tmp_path / "metadata.csv").write_bytes(b"\n".join(lines))
    out = read(tmp_path)
    assert [isinstance(part, Skip) for part in out] == [True, True, False, False, False]
    assert len(out[2].fields["text"]) == 200_000
    with pytest.raises(ValueError, match="caption is not UTF-8"):
        captions(out[3])


def test_a_row_s_stamp_changes_with_its_picture_and_its_columns_alone(tmp_path):
    fill(tmp_path, b_png="B", sub__a_png="A")
    table(tmp_path / "metadata.jsonl", ROWS)
    before = [shard.stamp for shard in shards(tmp_path, chunk=1)]
    table(tmp_path / "metadata.jsonl", [ROWS[0], ROWS[1] | {"text": "new"}, ROWS[0]])
    after = [shard.stamp for shard in shards(tmp_path, chunk=1)]
    assert before[0] == after[0] and before[1] != after[1] and len(after) == 3
    fill(tmp_path, b_png="BB")
    assert shards(tmp_path, chunk=1)[0].stamp != before[0]


def test_metadata_without_file_names_is_an_error(tmp_path):
    fill(tmp_path, a_png="A", metadata_csv="image,text\na.png,one\n")
    assert "metadata.csv has no column file_name" in refusal(tmp_path)


# ---- shards


def test_tars_are_found_by_path_folder_glob_and_braces(tmp_path):
    fill(tmp_path, x__000_tar=tar("a"), x__001_tar=tar("b"), x__002_tgz=tar("c"), x__n_md="")
    for spec, found in (("x/000.tar", "a"), ("x", "abc"), ("x/*", "abc"), ("x/00?.tar", "ab"), ("x/[!1]*1.tar", "b"),
                        ("x/{001,000}.tar", "ba"), ("x/{000..001}.tar", "ab"), ("{x/*.tar,x/000.tar}", "ab"), ("*", "abc")):
        assert "".join(part.key for part in read(tmp_path / spec)) == found, spec
    before = shards(tmp_path / "x")
    fill(tmp_path, x__0000_tar=tar("d"))
    (tmp_path / "x/000.tar").write_bytes(tar("a", "more"))
    after = {shard.name: shard.stamp for shard in shards(tmp_path / "x")}
    assert [after[shard.name] == shard.stamp for shard in before] == [False, True, True] and len(after) == 4
    assert all(str(tmp_path / "x") in shard.url and not shard.remote for shard in before)


def test_a_path_that_exists_as_typed_is_no_pattern(tmp_path):
    fill(tmp_path, **{"a[1]*__a_tar": tar("a"), "{b,c}_tar": tar("b")})
    assert [part.key for spec in ("a[1]*", "a[1]*/a.tar", "{b,c}.tar") for part in read(tmp_path / spec)] == ["a", "a", "b"]


def test_a_logo_beside_shards_is_no_folder_of_pictures_but_captions_are(tmp_path):
    fill(tmp_path, a_tar=tar("a"), logo_png="x")
    assert [part.key for part in read(tmp_path)] == ["a"]
    fill(tmp_path, logo_txt="x")
    assert "holds pictures and tar shards" in refusal(tmp_path)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    fill(tmp_path, x__a_tar=tar("a"))
    assert [part.key for spec in ("~/x", "~/x/*.tar", "~/x/{a,a}.tar") for part in read(spec)] == ["a"] * 3


def test_an_npz_is_one_shard(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=[0, 1])
    assert [captions(part) for part in read(tmp_path / "a.npz")] == [[(0, "class 0")], [(0, "class 1")]]


@pytest.mark.parametrize("spec, expected", [
    ("none", "there is no such file or folder; what is read: toyworld"),
    ("x/{000..002}.tar", "x/001.tar: there is no such file"),
    ("x/*.npz", "no shard or folder matches"), ("a.parquet", "parquet files are not read; what is read: toyworld"),
    ("p", "parquet files, which are not read; what is read"), ("n.md", "is not a file that is read; what is read"),
    ("e", "holds 0 files, but no picture"), ("m", "holds 1 files, but no picture")])
def test_what_cannot_be_read_is_refused_with_what_can(tmp_path, spec, expected):
    fill(tmp_path, x__000_tar=tar("a"), x__002_tar=tar("a"), a_parquet="", p__a_parquet="", n_md="", m__n_md="")
    (tmp_path / "e").mkdir()
    assert expected in refusal(tmp_path / spec)


@pytest.mark.parametrize("way", ["ls", "find"])
def test_a_folder_without_rights_is_refused_with_its_name(tmp_path, monkeypatch, way):
    fill(tmp_path, a_png="A")

    def denied(self, path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(LocalFileSystem, way, denied)
    text = refusal(tmp_path)
    assert "no right to read" in text and str(tmp_path) in text


def test_a_url_without_rights_is_refused_with_its_name(memory, monkeypatch):
    def denied(self, path, *args, **kwargs):
        raise PermissionError(13, "Forbidden", path)

    memory.pipe({"/set/a.png": b"A"})
    monkeypatch.setattr(MemoryFileSystem, "ls", denied)
    assert "--data memory://set: no right to read" in refusal("memory://set")


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_folder_below_without_rights_is_refused_too(tmp_path):
    fill(tmp_path, a_png="A", sub__b_png="B")
    (tmp_path / "sub").chmod(0)
    try:
        assert "no right to read" in refusal(tmp_path)
    finally:
        (tmp_path / "sub").chmod(0o700)


@pytest.mark.parametrize("spec, expected", [("nosuch://a/b.tar", "Protocol not known: nosuch"),
    ("missing://a/b.tar", "is not installed")])
def test_protocols_that_cannot_be_opened_are_named(spec, expected, monkeypatch):
    monkeypatch.setitem(known_implementations, "missing", {"class": "no.such.module", "err": "Install missingfs"})
    assert expected in refusal(spec)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(known_implementations, "s3", {"class": "no.such.module", "err": "Install s3fs to access S3"})
    monkeypatch.delitem(_registry, "s3", raising=False)
    assert refusal("s3://bucket/a.tar").endswith("pip install s3fs")


# ---- connections


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_the_same_sources_are_read_from_a_url(memory):
    memory.pipe({"/set/a.png": b"A", "/set/a.txt": b"one", "/tars/0.tar": tar("a"), "/tars/1.tar": tar("b"),
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
    memory.pipe("/tars/0.tar", tar("a", "b"))
    assert shards("memory://tars/0.tar")[0].stamp != shard.stamp and shards("memory://tars/0.tar")[0].name == shard.name
    assert "memory://tars/7.tar: there is no such file" in refusal("memory://tars/{0,7}.tar")


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
    flaky.put("/x.tar", tar(*map(str, range(50))))
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
    http.hub = SimpleNamespace(requests=0, files={"README.md": b"x", "0.tar": tar("a"), "1.tar": tar("b"), "set/a.png": b"A"})
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
    hub.files["1.tar"] = tar("c")                   # of the same size
    after = shards("hf://datasets/some/set/*.tar")
    assert [old.stamp == new.stamp for old, new in zip(out, after)] == [True, False]


@pytest.mark.parametrize("spec, expected", [("some/set/{0..2}.tar", "some/set/2.tar: there is no such file"),
                                            ("some/other/0.tar", "there is no such file or folder")])
def test_what_the_hub_does_not_have_is_named(hub, spec, expected):
    assert expected in refusal(f"hf://datasets/{spec}")
