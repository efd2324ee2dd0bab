"""Shards read sample by sample: what comes out, what is skipped with which reason, and what is an error."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from tinyldm.data import readers, tarshard
from tinyldm.data.readers import Damaged, Sample, Skip, captions, read_npz, read_tar

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
FS = LocalFileSystem()


def tar(*files, format=tarfile.USTAR_FORMAT):
    """An archive of (name, content) or of ready headers."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                archive.addfile(file, io.BytesIO(bytes(file.size)) if file.isreg() else None)
            else:
                member = tarfile.TarInfo(file[0])
                member.size = len(file[1])
                archive.addfile(member, io.BytesIO(file[1]))
    return out.getvalue()


def header(name, **fields):
    member = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(member, key, value)
    return member


@pytest.fixture
def read(tmp_path):
    def read(data, name="a.tar"):
        (tmp_path / name).write_bytes(data)
        return list(read_tar(FS, str(tmp_path / name), len(data)))
    return read


def npz(file, **arrays):
    np.savez(file, **arrays)
    return list(read_npz(FS, str(file), file.stat().st_size))


def skips(out):
    return [(part.key, part.reason) for part in out if isinstance(part, Skip)]


def keys(out):
    return [part.key for part in out if isinstance(part, Sample)]


PAIR = [("a.png", b"A"), ("a.txt", b"one")]
TWO = [*PAIR, ("b.png", b"B"), ("b.txt", b"two")]


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
    place = data.index(b"a.png\0") + 512
    data[place:place] = b"xyz".ljust(9).ljust(512, b"\0")
    assert read(bytes(data)) == [Sample("a", b"xyz      ", {"txt": b"one"})]


def test_other_fields_of_a_gnu_header_are_no_part_of_the_name(read):
    data = bytearray(tar(*PAIR, format=tarfile.GNU_FORMAT))
    data[345:357] = b"14700000000\0"                         # the time of access
    data[148:156] = b"%06o\0 " % (sum(data[:512]) - sum(data[148:156]) + 256)
    assert read(bytes(data)) == [Sample("a", b"A", {"txt": b"one"})]


def test_a_size_in_binary_is_read(read):
    data = bytearray(tar(*PAIR))
    data[124:136] = b"\x80" + (1).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:512]) - sum(data[148:156]) + 256)
    assert read(bytes(data)) == [Sample("a", b"A", {"txt": b"one"})]


def test_names_that_are_not_utf_8_stay_apart(read):
    data = tar(("aX.png", b"A"), ("aY.txt", b"one")).replace(b"aX", b"a\xfe").replace(b"aY", b"a\xff")
    data = bytearray(data)
    for start in (0, 1024):
        data[start + 148:start + 156] = b"%06o\0 " % (sum(data[start:start + 512]) - sum(data[start + 148:start + 156]) + 256)
    assert read(bytes(data)) == [Sample("a\\xfe", b"A", {}), Skip("a\\xff", "no picture")]


def test_only_regular_files_count(read):
    links = [header("a.json", type=tarfile.SYMTYPE, linkname="/etc/passwd", size=700),
        header("c.png", type=tarfile.LNKTYPE, linkname="a.png"),
             header("dir.png", type=tarfile.DIRTYPE), header("e.png", type=tarfile.CHRTYPE),
                 header("f.png", type=tarfile.FIFOTYPE)]
    assert read(tar(*PAIR, *links)) == read(tar(*reversed(links), *PAIR)) == [Sample("a", b"A", {"txt": b"one"})]


@pytest.mark.parametrize("more", [0, 1])
def test_sparse_files_are_passed_over(read, more):
    sparse = bytearray(tar(header("s.png", size=700))[:512])
    sparse[156:157], sparse[257:265], sparse[482] = b"S", b"ustar  \0", more
    sparse[148:156] = b"%06o\0 " % (sum(sparse) - sum(sparse[148:156]) + 256)
    extra = bytes(504) + b"\1" + bytes(7) + bytes(512) if more else b""
    assert read(bytes(sparse) + extra + b"x" * 700 + bytes(324) + tar(*PAIR)) == [Sample("a", b"A", {"txt": b"one"})]
    pax = tar(header("s.png", size=5, pax_headers={"GNU.sparse.major": "1"}), *PAIR, format=tarfile.PAX_FORMAT)
    assert read(pax) == [Sample("a", b"A", {"txt": b"one"})]


@pytest.mark.parametrize("name", ["/a.png", "../a.png", "x/../a.png", "x/..", "..\\a.png", "x\\..\\a.png", "C:/a.png",
    "c:a.png",
                                  "\\a.png"])
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
    assert read(tar(*PAIR, extra, *TWO[2:])) == [Skip("a", "duplicate key"), Sample("b", b"B", {"txt": b"two"})]


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


# ---- damage


@pytest.mark.parametrize("pack", [lambda data: data, lambda data: gzip.compress(data, 0)], ids=["tar", "tar.gz"])
@pytest.mark.parametrize("cut", [512, 513, 1024, 1500, 2000, 2048, 2200, 2560, 2600, 3072, 3500, 3585])
def test_a_cut_archive_keeps_what_came_before(read, pack, cut):
    extra = len(pack(b"")) if pack(b"") else 0
    out = read(pack(tar(*TWO))[:cut + (extra - 8 if extra else 0)])
    whole = [Sample("a", b"A", {"txt": b"one"}), Sample("b", b"B", {"txt": b"two"})]
    assert skips(out)[-1][1] == "archive cut short" and len(skips(out)) == 1
    got = [part for part in out if isinstance(part, Sample)]
    full = whole[:1] if cut >= (1024 * 3 if extra else 2048) else []             # of a gzip, the last one is in doubt
    assert got[:len(full)] == full and all(sample.picture == other.picture for sample, other in zip(got, whole))


def test_a_sample_that_the_cut_runs_through_is_dropped(read):
    out = read(tar(*TWO)[:3 * 1024 + 513])                   # within b.txt
    assert keys(out) == ["a"] and skips(out) == [("b.txt", "archive cut short")]


def test_an_archive_without_its_end_mark_is_said_to_be_cut(read):
    assert skips(read(tar(*TWO)[:4096])) == [("b", "archive cut short")]
    assert skips(read(tar(*PAIR) + tar(*TWO[2:])[:2048])) == [("b", "archive cut short")]
    assert skips(read(tar(*TWO)[:4096 + 512])) == [] and keys(read(tar(*TWO)[:4096])) == ["a", "b"]


def test_members_after_a_damaged_header_are_found_and_the_damage_is_counted_once_per_place(read):
    data = bytearray(tar(*TWO, ("c.png", b"C" * 3000), ("c.txt", b"three"), ("d.png", b"D")))
    data[1024], data[4096] = 1, 1                             # a.txt, c.png
    out = read(bytes(data))
    assert keys(out) == ["a", "b", "d"] and out[0] == Skip("a", "archive damaged", "no header at byte 1024")
    assert [reason for _, reason in skips(out)] == ["archive damaged", "archive damaged", "no picture"]


def test_a_long_name_is_not_given_to_another_file_where_its_own_header_is_damaged(read):
    name = "n" * 200
    data = bytearray(tar((f"{name}.png", b"N"), *PAIR, format=tarfile.GNU_FORMAT))
    data[1024] ^= 1
    assert keys(read(bytes(data))) == ["a"]


def test_archives_in_a_row_are_read_as_one(read):
    assert keys(read(tar(*PAIR) + tar(*TWO[2:]))) == ["a", "b"]
    assert keys(read(gzip.compress(tar(*PAIR)) + gzip.compress(tar(*TWO[2:])) + bytes(100))) == ["a", "b"]


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff" * 5000, bytes(30000), gzip.compress(b""),
    gzip.compress(b"text" * 500)])
def test_what_is_no_tar_archive_is_an_error_that_names_it(read, data):
    with pytest.raises(ValueError, match=r"a\.tar is not a tar archive"):
        read(data)


def test_an_archive_without_members_is_empty_and_no_error(read):
    assert read(tar()) == [] and read(tar(("read.me", b"x"))) == []


def test_a_wrong_checksum_or_a_wrong_stream_is_raised_after_the_samples(tmp_path):
    for place, byte in ((-8, 1), (-4, 1), (40, 0xff)):
        data = bytearray(gzip.compress(tar(*TWO), mtime=0))
        data[place] ^= byte
        (tmp_path / "a.tgz").write_bytes(data)
        stream, count = read_tar(FS, str(tmp_path / "a.tgz"), None), 0
        with pytest.raises(Damaged, match=r"a\.tgz: the compressed data are damaged"):
            for _ in stream:
                count += 1
        assert count == (1 if place < 0 else 0)               # the last sample waits for what may follow


def test_a_gzip_that_goes_wrong_before_it_ends_early_is_refused_whole(read):
    data = bytearray(tar(*TWO))
    data[1024] ^= 1
    assert keys(read(gzip.compress(data))) == ["a", "b"]      # packed like this, says its checksum
    with pytest.raises(Damaged, match="compressed data are damaged"):
        read(gzip.compress(data, 0)[:3000])


def test_bytes_behind_a_gzip_that_passed_its_checksum_are_counted_only(read):
    out = read(gzip.compress(tar(*TWO)) + b"trailing")
    assert keys(out) == ["a", "b"] and [reason for _, reason in skips(out)] == ["archive damaged"]


@pytest.mark.parametrize("size", [b"77777777777\0", b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"0000000001x\0"])
def test_hostile_sizes_neither_hang_nor_fill_the_memory(read, size):
    data = bytearray(tar(*TWO))
    data[2048 + 124:2048 + 136] = size
    data[2048 + 148:2048 + 156] = b"%06o\0 " % (sum(data[2048:2560]) - sum(data[2048 + 148:2048 + 156]) + 256)
    out = read(bytes(data))
    huge = size[:1] in b"7\x80"
    assert keys(out) == ["a"] and skips(out) == ([("b.png", "archive cut short")] if huge else [
        ("a", "archive damaged"), ("b", "no picture")])


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_an_extended_header_of_gigabytes_is_damage(read, kind):
    data = bytearray(tar(*TWO))
    data[2048 + 124:2048 + 136], data[2048 + 156:2048 + 157] = b"10000000000\0", kind
    data[2048 + 148:2048 + 156] = b"%06o\0 " % (sum(data[2048:2560]) - sum(data[2048 + 148:2048 + 156]) + 256)
    assert skips(read(bytes(data))) == [("a", "archive damaged"), ("b", "no picture")]


def test_memory_does_not_grow_with_the_archive(tmp_path):
    import tracemalloc
    (tmp_path / "a.tar").write_bytes(tar(*((f"{i}.png", bytes(100_000)) for i in range(100))))
    tracemalloc.start()
    assert sum(1 for _ in read_tar(FS, str(tmp_path / "a.tar"), None)) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000                                   # of 10 MB; the buffer alone takes one


def test_real_shards_are_what_tarfile_reads():
    for name, count in (("photos256-000.tar", 400), ("tinyimagenet64-004.tar.gz", 4000)):
        if not (DATA / name).exists():
            pytest.skip(f"{DATA / name} is not there")
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


# ---- npz


IMAGES = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)


def test_npz_captions_may_be_one_or_several_for_each_picture(tmp_path):
    out = npz(tmp_path / "a.npz", images=IMAGES, captions=np.array(["a", "é", "c"]))
    assert [sample.fields for sample in out] == [{"text": "a"}, {"text": "é"}, {"text": "c"}]
    assert all(np.array_equal(sample.picture, image) for sample, image in zip(out, IMAGES))
    assert len({sample.key for sample in out}) == 3
    out = npz(tmp_path / "a.npz", images=IMAGES, captions=np.array([["a", "b"]] * 3).astype("S"), labels=np.arange(3))
    assert captions(out[2]) == [(0, "a"), (0, "b")]


def test_npz_labels_become_captions(tmp_path):
    labels, names = np.array([2, 0, 1], np.uint8), np.array(["cat", "Owl", "tree"])
    for given in (names, names.astype("S")):
        out = npz(tmp_path / "a.npz", images=IMAGES, labels=labels, class_names=given)
        assert [sample.fields["text"] for sample in out] == ["a photo of a tree", "a photo of a cat", "a photo of an Owl"]
    assert npz(tmp_path / "a.npz", images=IMAGES, labels=labels)[0].fields == {"text": "class 2"}


def test_grey_npz_pictures_get_three_channels(tmp_path):
    out = npz(tmp_path / "a.npz", images=IMAGES[..., 0], labels=np.arange(3))
    assert out[1].picture.shape == (4, 5, 3) and out[1].picture.dtype == np.uint8
    assert (out[1].picture == IMAGES[1, ..., :1]).all()


LABELS = np.arange(3)


@pytest.mark.parametrize("arrays, expected", [
    (dict(labels=LABELS), "has no images: save images as uint8"),
    (dict(images=IMAGES / 255, labels=LABELS), "images of float64 [3, 4, 5, 3]: save images as uint8"),
    (dict(images=IMAGES[0, 0], labels=LABELS), "images of uint8 [5, 3]"),
    (dict(images=IMAGES.transpose(0, 3, 1, 2), labels=LABELS), "images of uint8 [3, 3, 4, 5]"),
    (dict(images=IMAGES), "neither captions (strings) nor labels"),
    (dict(images=IMAGES, labels=LABELS[:2]), "labels has the shape [2]: save one of them for each of the 3"),
    (dict(images=IMAGES, captions=np.array("a")), "captions has the shape []"),
    (dict(images=IMAGES, captions=LABELS), "captions are int64 [3]: save np.array(captions, dtype=str)"),
    (dict(images=IMAGES, captions=np.array(["a"] * 3, dtype=object)), "dtype=str"),
    (dict(images=IMAGES, labels=LABELS / 2), "labels are float64"),
    (dict(images=IMAGES, labels=LABELS - 1, class_names=np.array(["a", "b"])), "labels go from -1 to 1, but there are 2"),
    (dict(images=IMAGES, labels=LABELS, class_names=np.array(["a", "b"])), "labels go from 0 to 2, but there are 2"),
])
def test_arrays_that_do_not_fit_are_errors_with_the_fix(tmp_path, arrays, expected):
    with pytest.raises(ValueError) as error:
        npz(tmp_path / "a.npz", **arrays)
    assert expected in str(error.value) and str(tmp_path / "a.npz") in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(50)])
def test_a_file_that_is_no_npz_is_an_error(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is not a readable"):
        list(read_npz(FS, str(tmp_path / "a.npz"), None))


def test_a_damaged_npz_is_an_error(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[80] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npz is not a readable"):
        list(read_npz(FS, str(tmp_path / "a.npz"), None))
    assert struct.unpack("<I", bytes(data[:4]))[0] == 0x04034b50
