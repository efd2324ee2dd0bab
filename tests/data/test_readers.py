"""Reading shards: the files of a sample, what is skipped for which reason, and the captions of a sample."""

import gzip
import json
import tarfile

import pytest
from archives import DATA, FS, PAIR, TWO, header, keys, reseal, skips, tar

from tinyldm.data import readers, tarshard
from tinyldm.data.readers import Sample, Skip, caption_keys, captions, read_tar

# ---- tar


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress], ids=["tar", "tar.gz"])
def test_consecutive_members_with_one_key_are_a_sample(read, pack):
    out = read(pack(tar(("x/a.b.JPG", b"A"), ("x/a.b.txt", b"one"), ("x/a.b.json", b"{}"), ("c.png", b"C"))))
    assert out == [Sample("x/a.b", b"A", {"txt": b"one", "json": b"{}"}), Sample("c", b"C", {})]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.png", "ü/" * 30 + "b.png", "d/" * 45 + "c" * 90 + ".png", "./a/b.png"])
def test_names_of_every_layout_are_those_that_were_written(read, format, name):
    archive = tar((name, b"x" * 600), (name[:-4] + ".txt", b"one"), ("z.png", b"Z"), format=format)
    assert read(archive) == [Sample(name[:-4], b"x" * 600, {"txt": b"one"}), Sample("z", b"Z", {})]


def test_names_too_long_for_ustar_come_whole_from_gnu_and_pax(read):
    name = "d" * 400 + "é"
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert keys(read(tar((name + "1.png", b"A"), (name + "1.txt", b"1"), (name + "2.png", b"B"), format=format))) == [
            name + "1", name + "2"]


def test_a_pax_size_counts_more_than_the_header_s(read):
    member = header("a.png", size=0, pax_headers={"size": "9"})
    data = bytearray(tar(member, *PAIR[1:], format=tarfile.PAX_FORMAT))
    start = data.index(b"a.png\0") + 512
    data[start:start] = b"xyz".ljust(9).ljust(512, b"\0")
    assert read(bytes(data)) == [Sample("a", b"xyz      ", {"txt": b"one"})]


def test_other_fields_of_a_gnu_header_are_no_part_of_the_name(read):
    data = bytearray(tar(*PAIR, format=tarfile.GNU_FORMAT))
    data[345:357] = b"14700000000\0"                         # the time of access
    reseal(data)
    assert read(bytes(data)) == [Sample("a", b"A", {"txt": b"one"})]


def test_a_size_in_binary_is_read(read):
    data = bytearray(tar(*PAIR))
    data[124:136] = b"\x80" + (1).to_bytes(11, "big")
    reseal(data)
    assert read(bytes(data)) == [Sample("a", b"A", {"txt": b"one"})]


def test_names_that_are_not_utf_8_stay_apart(read):
    data = tar(("aX.png", b"A"), ("aY.txt", b"one")).replace(b"aX", b"a\xfe").replace(b"aY", b"a\xff")
    data = bytearray(data)
    for start in (0, 1024):
        reseal(data, start)
    assert read(bytes(data)) == [Sample("a\\xfe", b"A", {}), Skip("a\\xff", "no picture")]


def test_only_regular_files_count(read):
    links = [header("a.json", type=tarfile.SYMTYPE, linkname="/etc/passwd", size=700),
             header("c.png", type=tarfile.LNKTYPE, linkname="a.png"), header("dir.png", type=tarfile.DIRTYPE),
             header("e.png", type=tarfile.CHRTYPE), header("f.png", type=tarfile.FIFOTYPE)]
    assert read(tar(*PAIR, *links)) == read(tar(*reversed(links), *PAIR)) == [Sample("a", b"A", {"txt": b"one"})]


@pytest.mark.parametrize("more", [0, 1])
def test_sparse_files_are_passed_over(read, more):
    sparse = bytearray(tar(header("s.png", size=700))[:512])
    sparse[156:157], sparse[257:265], sparse[482] = b"S", b"ustar  \0", more
    reseal(sparse)
    extra = bytes(504) + b"\1" + bytes(7) + bytes(512) if more else b""
    assert read(bytes(sparse) + extra + b"x" * 700 + bytes(324) + tar(*PAIR)) == [Sample("a", b"A", {"txt": b"one"})]
    pax = tar(header("s.png", size=5, pax_headers={"GNU.sparse.major": "1"}), *PAIR, format=tarfile.PAX_FORMAT)
    assert read(pax) == [Sample("a", b"A", {"txt": b"one"})]


@pytest.mark.parametrize("name", ["/a.png", "../a.png", "x/../a.png", "x/..", "..\\a.png", "x\\..\\a.png", "C:/a.png",
                                  "c:a.png", "\\a.png"])
def test_names_that_lead_elsewhere_are_skipped_and_never_paired(read, name):
    out = read(tar((name, b"A"), (name[:-4] + ".txt", b"one") if "." in name[-4:] and name != "x/.." else ("n.md", b""), *PAIR))
    assert skips(out)[0] == (name, "unsafe name") and {reason for _, reason in skips(out)} == {"unsafe name"}
    assert [part for part in out if isinstance(part, Sample)] == [Sample("a", b"A", {"txt": b"one"})]


@pytest.mark.parametrize("name", ["..a.b/c.png", "x..png", "a/b...c.png", "ab:c.png"])
def test_dots_and_colons_elsewhere_in_a_name_are_harmless(read, name):
    out = read(tar((name, b"A")))
    assert skips(out) == [] and (name.startswith(".") or keys(out) == [name[:-4]])


@pytest.mark.parametrize("name", ["._a.txt", ".a.png", "__MACOSX/._a.png", ".git/a.png", "notes.md", "a.cls"])
def test_hidden_and_other_files_are_passed_over(read, name):
    assert read(tar(PAIR[0], (name, b"x"), PAIR[1])) == [Sample("a", b"A", {"txt": b"one"})]


def test_a_key_that_comes_again_is_skipped(read):
    out = read(tar(*TWO, ("a.png", b"C"), ("a.txt", b"three"), ("c.png", b"D")))
    assert keys(out) == ["a", "b", "c"] and skips(out) == [("a", "duplicate key")] and out[0].picture == b"A"


@pytest.mark.parametrize("extra", [("a.jpg", b"B"), ("a.txt", b"two"), ("a.TXT", b"two"), ("a.PNG", b"A")])
def test_two_of_a_kind_in_one_sample_are_ambiguous(read, extra):
    skip, sample = read(tar(*PAIR, extra, *TWO[2:]))
    assert skip[:2] == ("a", "duplicate key") and extra[0] in skip.detail and sample == Sample("b", b"B", {"txt": b"two"})


def test_captions_far_from_their_picture_are_not_paired(read):
    out = read(tar(TWO[0], TWO[2], TWO[1], TWO[3]))
    assert out == [Sample("a", b"A", {}), Sample("b", b"B", {}), Skip("a", "duplicate key"), Skip("b", "duplicate key")]


@pytest.mark.parametrize("end", ["txt", "json"])
def test_a_caption_without_a_picture_is_skipped(read, end):
    assert read(tar((f"n.{end}", b"{}"), ("m.md", b""), *PAIR)) == [Skip("n", "no picture"), Sample("a", b"A", {"txt": b"one"})]


def test_a_member_that_is_too_large_is_passed_over(read, monkeypatch):
    for module in (tarshard, readers):
        monkeypatch.setattr(module, "LIMIT", 1000)
    out = read(tar(("a.png", bytes(1001)), ("a.txt", b"one"), ("b.png", bytes(1000)), ("b.txt", b"two")))
    assert out == [Skip("a", "too large"), Sample("b", bytes(1000), {"txt": b"two"})]


def test_real_shards_are_what_tarfile_reads():
    for name, count in (("photos256-000.tar", 400), ("tinyimagenet64-004.tar.gz", 4000)):
        if not (DATA / name).exists():
            pytest.skip(f"{DATA / name} does not exist")
        out = list(read_tar(FS, str(DATA / name), None))
        with tarfile.open(DATA / name) as archive:
            expected = {member.name: archive.extractfile(member).read() for member in archive}
        assert len(out) == count and 3 * count == len(expected)
        assert all(sample.picture == expected[f"{sample.key}.jpg"] for sample in out)
        assert all(sample.fields[end] == expected[f"{sample.key}.{end}"] for sample in out for end in ("txt", "json"))


# ---- captions


def sample(**fields):
    return Sample("k", b"", {key: value.encode() if key in ("txt", "json") and isinstance(value, str) else value
                             for key, value in fields.items()})


def test_without_keys_the_first_of_txt_prompt_caption_text_is_the_caption():
    row = {"text": "d", "caption": "c", "prompt": "b"}
    assert captions(sample(txt="a", json=json.dumps(row))) == [(0, "a")]
    for key in ("prompt", "caption", "text"):
        assert captions(sample(json=json.dumps(row))) == captions(sample(**row)) == [(0, row[key])]
        assert captions(sample(txt=" \n", json=json.dumps(row))) == [(0, row[key])]
        del row[key]
    assert captions(sample(**row)) == captions(sample(json="{}")) == captions(sample()) == []


def test_keys_are_looked_up_each_and_keep_their_number():
    one = sample(txt=" a\n", json=json.dumps({"long": ["b ", "", 3, "c"], "n": 5, "none": None, "txt": "wrong"}))
    assert captions(one, ["long", "txt"]) == [(0, "b"), (0, "c"), (1, "a")]
    assert captions(one, ["n", "none", "other", "txt"]) == [(3, "a")] and captions(one, ["other"]) == []
    assert captions(sample(json='{"txt": "wrong", "a": "b"}'), ["txt", "a"]) == [(1, "b")]
    assert captions(sample(text="x", alt=["y", "z"]), ["alt", "text"]) == [(0, "y"), (0, "z"), (1, "x")]


def test_a_byte_order_mark_is_no_part_of_a_caption():
    assert captions(sample(txt=b"\xef\xbb\xbfa fox")) == [(0, "a fox")]
    assert captions(sample(json=b'\xef\xbb\xbf{"text": "a fox"}')) == [(0, "a fox")]


@pytest.mark.parametrize("bad", [sample(txt=b"\xff\xfea"), sample(json=r'{"text": "a \ud800"}'), sample(text="a \udcff"),
                                 sample(text=["a", "b \udfff"])])
def test_a_caption_that_is_no_text_is_an_error(bad):
    with pytest.raises(ValueError, match="^caption is not UTF-8$"):
        captions(bad)


def test_a_surrogate_pair_and_a_bad_value_that_is_not_asked_for_are_fine():
    assert captions(sample(json=r'{"text": "\ud83e\udd8a", "other": "\ud800"}')) == [(0, "\N{FOX FACE}")]


@pytest.mark.parametrize("bad", ["{", "", "[1]", '"a"', b'{"text": "\xff"}', "[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_a_json_that_cannot_be_read_is_an_error_only_where_it_is_needed(bad):
    with pytest.raises(ValueError, match="^json is not readable$"):
        captions(sample(json=bad))
    with pytest.raises(ValueError, match="^json is not readable$"):
        captions(sample(txt="a", json=bad), ["prompt"])
    assert captions(sample(txt="a", json=bad)) == captions(sample(txt="a", json=bad), ["txt"]) == [(0, "a")]
    assert caption_keys(sample(txt="a", json=bad)) == ["txt"] and caption_keys(sample(json=bad)) == []


def test_the_keys_that_can_be_asked_for_are_those_that_hold_text():
    row = {"long": ["b", 3], "n": 5, "none": None, "txt": "wrong", "empty": [], "numbers": [1], "deep": {"a": "b"}, "alt": ""}
    assert caption_keys(sample(txt="a", json=json.dumps(row))) == ["alt", "long", "txt"]
    assert caption_keys(sample(json=json.dumps(row))) == ["alt", "long"]
    assert caption_keys(sample(text="x", alt=["y"], txt=b"\xff")) == ["alt", "text", "txt"]
    assert caption_keys(Sample("k", b"", {"": "1", "a\nb": "x", "\udcff": "x", "a b": "x"})) == ["a b"]
    assert caption_keys(sample()) == []
