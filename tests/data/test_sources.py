"""Parsing --data, and listing the shards of a source."""

import os
from fractions import Fraction

import numpy as np
import pytest
from archives import fill, pairs, read, refusal, shards
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry, known_implementations

from tinyldm.data import toyworld
from tinyldm.data.file_sources import braces
from tinyldm.data.readers import captions
from tinyldm.data.sources import Source, parse_sources

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
def test_braces_expand_as_in_a_shell(pattern, paths):
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


def test_toyworld_is_drawn_without_a_subject_where_its_name_says_so():
    out = shards("toyworld-without-fox", scenes=300)
    assert [shard.name for shard in out] == ["toyworld-without-fox-000000"] and out[0].stamp != shards("toyworld", scenes=300)[0].stamp
    words = {word for sample in out[0].read() for word in captions(sample)[0][1].replace(",", " ").split()}
    assert words & toyworld.SUBJECTS.keys() == toyworld.SUBJECTS.keys() - {"fox"}
    assert parse_sources(["toyworld-without-fox:0.3", "toyworld:0.7"])[0].spec == "toyworld-without-fox"
    with pytest.raises(ValueError, match="unknown subject in --data toyworld-without-foxes.*did you mean 'fox'"):
        shards("toyworld-without-foxes")


# ---- shards


def test_tars_are_found_by_path_folder_glob_and_braces(tmp_path):
    fill(tmp_path, x__000_tar=pairs("a"), x__001_tar=pairs("b"), x__002_tgz=pairs("c"), x__n_md="")
    for spec, found in (("x/000.tar", "a"), ("x", "abc"), ("x/*", "abc"), ("x/00?.tar", "ab"), ("x/[!1]*1.tar", "b"),
                        ("x/{001,000}.tar", "ba"), ("x/{000..001}.tar", "ab"), ("{x/*.tar,x/000.tar}", "ab"), ("*", "abc")):
        assert "".join(part.key for part in read(tmp_path / spec)) == found, spec
    before = shards(tmp_path / "x")
    fill(tmp_path, x__0000_tar=pairs("d"))
    (tmp_path / "x/000.tar").write_bytes(pairs("a", "more"))
    after = {shard.name: shard.stamp for shard in shards(tmp_path / "x")}
    assert [after[shard.name] == shard.stamp for shard in before] == [False, True, True] and len(after) == 4
    assert all(str(tmp_path / "x") in shard.url and not shard.remote for shard in before)


def test_a_path_that_exists_as_typed_is_no_pattern(tmp_path):
    fill(tmp_path, **{"a[1]*__a_tar": pairs("a"), "{b,c}_tar": pairs("b")})
    assert [part.key for spec in ("a[1]*", "a[1]*/a.tar", "{b,c}.tar") for part in read(tmp_path / spec)] == ["a", "a", "b"]


def test_a_logo_beside_shards_is_no_folder_of_pictures_but_captions_are(tmp_path):
    fill(tmp_path, a_tar=pairs("a"), logo_png="x")
    assert [part.key for part in read(tmp_path)] == ["a"]
    fill(tmp_path, logo_txt="x")
    assert "holds pictures and tar shards" in refusal(tmp_path)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    fill(tmp_path, x__a_tar=pairs("a"))
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
def test_sources_that_cannot_be_read_are_refused_with_a_list_of_those_that_can(tmp_path, spec, expected):
    fill(tmp_path, x__000_tar=pairs("a"), x__002_tar=pairs("a"), a_parquet="", p__a_parquet="", n_md="", m__n_md="")
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
