"""What files with one key make up: which picture, which caption; plain dots and WebDataset's extensions; Unicode's two forms of a name.

Every case is read from a tar and from a folder.
"""

import json
import re
import tarfile
import tracemalloc
from unicodedata import normalize

import pytest
from archives import FS, encode, fill, keys, noise, refusal, shards, skips, tar
from archives import read as read_source
from helpers import ROOT
from PIL import Image
from preparing import run, settings

from tinyldm.data import naming, readers, tarshard
from tinyldm.data.decoding import ENDINGS
from tinyldm.data.prepare import add_up, read_sources
from tinyldm.data.readers import Sample, Skip, captions, read_tar

NFC, NFD = normalize("NFC", "café"), normalize("NFD", "café")
assert NFC != NFD


def files_of(names: str) -> list[tuple[str, bytes]]:
    """Files that contain their own names; a .json has its name as its text."""
    return [(name, b'{"text": "%s"}' % name.encode() if name.endswith("json") else name.encode()) for name in names.split()]


def found(out) -> list[str]:
    """"PICTURE: CAPTION" of each sample and "KEY! REASON" of everything else, sorted."""
    parts = []
    for part in out:
        text = [caption for _, caption in captions(part)] if isinstance(part, Sample) else []
        parts.append(f"{part.key}! {part.reason}" if isinstance(part, Skip) else f"{part.picture.decode()}: {' '.join(text)}".strip())
    return sorted(parts)


# The table of docs/data.md, and more: what a key has -> what is read. `-` in place of a caption: it has none.
TABLE = [
    ("0.jpg 0.txt", ["0.jpg: 0.txt"]),
    ("0.jpg 0.json", ["0.jpg: 0.json"]),
    ("0.jpg 0.json 0.txt", ["0.jpg: 0.txt"]),
    ("0.jpg 0.caption 0.txt", ["0.jpg: 0.txt"]),
    ("0.caption 0.jpg 0.json", ["0.jpg: 0.caption"]),
    ("0.cap 0.caption 0.jpg 0.tags", ["0.jpg: 0.caption"]),
    ("0.jpg 0.tags 0.text", ["0.jpg: 0.text"]),
    ("0.jpg 0.TXT 0.txt", ["0! duplicate key"]),
    ("0.jpg 0.jpg.txt", ["0.jpg: 0.jpg.txt"]),                                      # kohya's scripts and gallery-dl name captions so
    ("0.jpg 0.jpg.txt 0.txt", ["0.jpg: 0.txt"]),
    ("0.jpg 0.jpg.json", ["0.jpg: 0.jpg.json"]),
    # WebDataset's extensions
    ("000.jpg 000.json 000.seg.png 000.txt", ["000.jpg: 000.txt"]),
    ("000.depth.tiff 000.jpg 000.json 000.seg.png", ["000.jpg: 000.json"]),
    ("000.cls 000.jpg 000.mask.0.png 000.mask.1.png 000.txt", ["000.jpg: 000.txt"]),
    ("000.jpg 000.0.png 000.txt", ["000.0.png:", "000.jpg: 000.txt"]),              # 0 may as well be a part of the name
    ("000.image.jpg 000.mask.png 000.txt", ["000.image.jpg: 000.txt"]),
    ("000.image.jpg 000.image.txt 000.mask.png", ["000.image.jpg: 000.image.txt", "000.mask.png:"]),
    ("000.depth.png 000.json 000.rgb.png", ["000.rgb.png: 000.json"]),
    ("000.image.png 000.jpg 000.txt", ["000.jpg: 000.txt"]),
    ("000.caption.txt 000.jpg", ["000.jpg: 000.caption.txt"]),
    ("000.caption.txt 000.jpg 000.json", ["000.jpg: 000.caption.txt"]),
    ("000.caption.txt 000.jpg 000.txt", ["000.jpg: 000.txt"]),
    ("000.jpg 000.long.txt 000.short.txt", ["000.jpg:"]),                           # --caption-key long
    ("000.jpg 000.meta.json", ["000.jpg: 000.meta.json"]),
    ("000.jpg 000.boxes.json 000.meta.json", ["000.jpg:"]),
    ("000.jpg 000.seg.json 000.seg.png 000.txt", ["000.jpg: 000.txt", "000.seg.png: 000.seg.json"]),
    ("000.depth.png 000.seg.png 000.txt", ["000! no picture", "000.depth.png:", "000.seg.png:"]),
    ("a.jpg a.seg.json a.seg.png a.txt", ["a.jpg: a.txt", "a.seg.png: a.seg.json"]),
    ("000.depth.tiff 000.jpg 000.seg.png 000.txt", ["000.jpg: 000.txt"]),
    ("000.jpg 000.png", ["000! duplicate key"]),
    ("000.jpg 000.png 000.txt", ["000! duplicate key"]),
    ("000.image.jpg 000.image.png 000.txt", ["000! duplicate key"]),
    ("d.1/000.jpg d.1/000.seg.png d.1/000.txt", ["d.1/000.jpg: d.1/000.txt"]),
    ("v1.2.jpg v1.2.seg.png v1.2.txt", ["v1.2.jpg: v1.2.txt"]),
    # plain dots
    ("a.b.jpg a.b.txt", ["a.b.jpg: a.b.txt"]),
    ("a.b.jpg a.b.json a.b.txt a.c.jpg a.c.txt", ["a.b.jpg: a.b.txt", "a.c.jpg: a.c.txt"]),
    ("a.b.jpg a.b.txt a.jpg a.txt", ["a.b.jpg: a.b.txt", "a.jpg: a.txt"]),
    ("a.3.5.jpg a.3.5.txt a.3.6.jpg a.3.6.txt a.3.7.jpg", ["a.3.5.jpg: a.3.5.txt", "a.3.6.jpg: a.3.6.txt", "a.3.7.jpg:"]),
    ("a.3.jpg a.jpg a.txt", ["a.3.jpg:", "a.jpg: a.txt"]),
    ("a.b.jpg a.c.jpg", ["a.b.jpg:", "a.c.jpg:"]),
    ("a.b.jpg.txt a.b.jpg", ["a.b.jpg: a.b.jpg.txt"]),
    # formats
    ("0.heic 0.txt", ["0! picture format not read (.heic)"]),
    ("0.heic 0.jpg", ["0.jpg:"]),
    ("0.avif 0.jpg", ["0.jpg:"]),
    ("0.heic 0.jpg 0.txt", ["0.jpg: 0.txt"]),
    ("000.jpg 000.raw.dng 000.txt", ["000.jpg: 000.txt"]),
    ("a.b.PSD a.b.txt", ["a.b! picture format not read (.psd)"]),
    ("0.jfif 0.jpg 0.txt", ["0.jpg: 0.txt"]),
]


@pytest.mark.parametrize("names, expected", TABLE, ids=[names for names, _ in TABLE])
def test_what_a_key_has_decides_its_picture_and_its_caption_in_a_tar(read, names, expected):
    assert found(read(tar(*files_of(names)))) == expected
    assert found(read(tar(*reversed(files_of(names)), ("z.png", b"z.png")))) == [*expected, "z.png:"]


@pytest.mark.parametrize("names, expected", TABLE, ids=[names for names, _ in TABLE])
def test_what_a_key_has_decides_its_picture_and_its_caption_in_a_folder(tmp_path, names, expected):
    for name, content in [*files_of(names), ("z.png", b"z.png")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    out = found(read_source(tmp_path))
    # a folder's Skips have the names of their files, one for each picture
    assert [entry for entry in out if "!" not in entry] == [*[entry for entry in expected if "!" not in entry], "z.png:"]
    reasons = {entry.partition("! ")[2] for entry in expected} - {""}
    assert {entry.partition("! ")[2] for entry in out} - {""} == reasons


def test_named_captions_are_keys_and_no_json_is_parsed_for_them(read):
    [sample] = read(tar(("0.jpg", b"J"), ("0.json", b"[1, 2]"), ("0.long.txt", b"a long one"), ("0.short.caption", b"short")))
    assert captions(sample, ["short", "long"]) == [(0, "short"), (1, "a long one")]
    assert readers.caption_keys(sample) == ["long", "short"]
    [sample] = read(tar(("0.jpg", b"J"), ("0.json", b'{"long": "json", "json": "inner"}'), ("0.long.txt", b"file")))
    assert captions(sample, ["long", "json"]) == [(0, "file"), (1, "inner")]
    [sample] = read(tar(("0.jpg", b"J"), ("0.json", b"{}"), ("0.json.txt", b"x"), ("0.txt.txt", b"y"), ("0.txt", b"z")))
    assert sample.fields == {"json": b"{}", "txt": b"z"}
    [sample] = read(tar(("0.jpg", b"J"), ("0.json.txt", b"x"), ("0.txt.txt", b"y")))
    assert sample.fields == {}
    [sample] = read(tar(("0.jpg", b"J"), ("0.long.txt", b"x"), ("0.boxes.json", b"[1, 2]")))
    assert sample.fields == {"long": b"x"} and captions(sample, ["short"]) == []


def test_a_caption_whose_picture_is_not_clear_is_explained(read, tmp_path):
    files = [("000.depth.png", b"D"), ("000.seg.png", b"S"), ("000.txt", b"one")]
    [skip] = [part for part in read(tar(*files)) if isinstance(part, Skip)]
    assert skip == Skip("000", "no picture", "its picture would be 000.* or 000.image.*, not 000.depth.png, 000.seg.png")
    for name, content in files:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.tar").unlink()
    assert read_source(tmp_path)[-1] == skip._replace(key="000.txt")


def test_files_that_exclude_each_other_are_named(read):
    assert read(tar(("0.jpg", b"J"), ("0.png", b"P"), ("0.txt", b"t"), ("0.TXT", b"T"))) == [
        Skip("0", "duplicate key", "only one of these can count: 0.jpg, 0.png, 0.txt, 0.TXT")]


# ---- streams


def test_samples_of_plain_dots_are_complete_as_soon_as_the_next_begins():
    def members():
        for number in "abc":
            yield from [readers.Member(f"shot.{number}.jpg", b"J"), readers.Member(f"shot.{number}.txt", b"T")]
            read.append(number)

    read = []
    assert [(sample.key, list(read)) for sample in readers.pair(members())] == [("shot.a", ["a"]), ("shot.b", ["a", "b"]),
                                                                            ("shot.c", ["a", "b", "c"])]


@pytest.mark.parametrize("many", [2, 3, 8, 10_000])
def test_how_many_members_are_held_does_not_decide_what_a_sample_is(read, monkeypatch, many):
    """The first picture is the main one, those with captions of their own are samples, the others its companions."""
    monkeypatch.setattr(readers, "MANY", many)
    masks = [(f"shot.a{i}.jpg", b"M") for i in range(40)]
    own = files_of("shot.b.jpg shot.b.txt")
    for files in ([("shot.jpg", b"J"), *masks], [("shot.image.jpg", b"J"), *masks],
                  [("shot.jpg", b"J"), *masks[:20], *own, *masks[20:]]):
        out = read(tar(*files, ("zoo.jpg", b"Z")))
        assert sorted(map(str, out)) == sorted(map(str, [
            Sample("shot", b"J", {}), Sample("zoo", b"Z", {})] + [Sample("shot.b", *(own[0][1], {"txt": own[1][1]}))] * (own[0] in files)))
    late = [("shot.jpg", b"J"), *masks, ("shot.txt", b"T")]                 # its caption
    assert read(tar(*late)) == [Sample("shot", b"J", {"txt": b"T"})]
    alone = read(tar(*masks))                                               # without a main picture, each is one
    assert sorted(alone) == sorted(Sample(name[:-4], b"M", {}) for name, _ in masks)


def test_memory_does_not_grow_with_the_companions_of_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MANY", 8)
    (tmp_path / "a.tar").write_bytes(tar(("shot.jpg", b"J"), *((f"shot.p{i}.png", bytes(100_000)) for i in range(100))))
    tracemalloc.start()
    assert list(read_tar(FS, str(tmp_path / "a.tar"), None)) == [Sample("shot", b"J", {})]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_memory_does_not_grow_with_an_archive_whose_names_all_begin_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MANY", 8)
    (tmp_path / "a.tar").write_bytes(tar(*((f"shot.p{i}.png", bytes(100_000)) for i in range(100))))
    tracemalloc.start()
    assert len({part.key for part in read_tar(FS, str(tmp_path / "a.tar"), None) if isinstance(part, Sample)}) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize("part, end, key", [(".1", ".jpg", ".1"), (".a", ". b.jpg", ".a"), (".a", ".jpg", "")])
def test_a_name_of_half_a_million_dots_does_not_hold_up_the_job(part, end, key):
    """In a time that grows with the square of their number, this would take an hour."""
    dots = 500_000
    name = naming.split("x" + part * dots + end)
    assert len(name.key) == 1 + len(key) * dots + len(end.removesuffix(".jpg")) and name.stem + ".jpg" == name.path


def test_a_cut_within_a_mask_drops_the_sample_and_keeps_the_one_before(read):
    files = [(f"{i}.{end}", end.encode()) for i in range(2) for end in ("jpg", "txt", "seg.png")]
    out = read(tar(*files)[:5 * 1024 + 512])                     # the header of 1.seg.png is whole
    assert keys(out) == ["0"] and skips(out) == [("1.seg.png", "archive cut short")]


def test_a_lost_picture_never_makes_its_mask_the_picture(read):
    assert found(read(tar(("000.seg.png", b"000.seg.png"), ("000.txt", b"one"), *pairs_of("001")))) == [
        "000! no picture", "000.seg.png:", "001.jpg: 001.txt"]


def pairs_of(*stems):
    return [file for stem in stems for file in files_of(f"{stem}.jpg {stem}.txt")]


def test_a_part_that_is_too_large_costs_its_sample_and_a_mask_costs_nothing(read, monkeypatch):
    for module in (readers, tarshard):
        monkeypatch.setattr(module, "LIMIT", 100)
    out = read(tar(("0.jpg", b"J"), ("0.seg.png", bytes(101)), ("0.txt", b"t"), ("1.jpg", b"J"), ("1.long.txt", bytes(101))))
    assert keys(out) == ["0"] and skips(out) == [("1", "too large")]


# ---- Unicode


@pytest.mark.parametrize("one, two", [(NFC, NFD), (NFD, NFC)])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_in_two_normal_forms_is_one_key(read, tmp_path, one, two, format):
    files = [(f"{one}/{one}.jpg", b"J"), (f"{two}/{two}.txt", b"a fox"), (f"{one}/{two}.json", b"{}")]
    [sample] = read(tar(*files, format=format))
    assert (sample.key, sample.picture, captions(sample)) == (f"{one}/{one}", b"J", [(0, "a fox")])
    for name, content in files:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    [sample] = read_source(tmp_path / "set")
    assert (sample.key, sample.picture, captions(sample)) == (f"{one}/{one}.jpg", b"J", [(0, "a fox")])


def test_two_files_that_differ_only_in_their_form_stay_two(read, tmp_path):
    files = [(f"{name}.{end}", f"{number} {end}".encode()) for number, name in enumerate((NFC, NFD)) for end in ("jpg", "txt")]
    expected = ["0 jpg: 0 txt", "1 jpg: 1 txt"]
    assert found(read(tar(*files, format=tarfile.PAX_FORMAT))) == expected
    assert found(read(tar(files[0], files[2], files[1], files[3], format=tarfile.PAX_FORMAT))) == expected
    for name, content in files:
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    assert found(read_source(tmp_path / "set")) == expected
    (tmp_path / "set" / files[1][0]).unlink()
    assert found(read_source(tmp_path / "set")) == ["0 jpg:", "1 jpg: 1 txt"], "a caption is never lent to another picture"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_table_names_files_in_either_form(tmp_path, name):
    rows = {"metadata.jsonl": '{"file_name": "%s/%s.jpg", "text": "x"}\n', "metadata.csv": "%s/%s.jpg,x\n"}[name]
    head = "file_name,text\n" if name.endswith("csv") else ""
    for folder, written in ((NFC, NFD), (NFD, NFC)):
        root = tmp_path / str(folder == NFC)
        fill(root / folder, **{f"{folder}_jpg": "J"})
        (root / name).write_text(head + rows % (written, written), encoding="utf-8")
        assert [part.picture for part in read_source(root)] == [b"J"]
    both = tmp_path / "both"
    fill(both, **{f"{NFC}_jpg": "C", f"{NFD}_jpg": "D"})
    text = "".join(rows.replace("%s/%s", form) for form in (NFD, NFC))
    (both / name).write_text(head + text, encoding="utf-8")
    assert [part.picture for part in read_source(both)] == [b"D", b"C"], "an exact name comes first"


# ---- formats


def test_every_ending_that_pillow_registers_for_a_format_is_known():
    Image.init()
    for ending, form in Image.EXTENSION.items():
        if form in ENDINGS:
            assert naming.split(f"a{ending}").kind == "picture", ending
        if form in ("PDF", "EPS", "MPEG"):
            assert ending[1:] not in {end for ends in ENDINGS.values() for end in ends}


@pytest.mark.parametrize("ending", sorted(end for ends in ENDINGS.values() for end in ends))
def test_pictures_of_every_ending_are_found_in_folders_and_tars(read, tmp_path, ending):
    assert keys(read(tar((f"a.{ending}", b"A"), ("a.txt", b"one")), name="b.bin")) == ["a"]
    (tmp_path / "b.bin").unlink()
    fill(tmp_path, **{f"a_{ending.upper()}": "A", "a_txt": "one"})
    assert [part.fields for part in read_source(tmp_path)] == [{"txt": b"one"}]


def test_a_folder_of_formats_that_are_not_read_says_so(tmp_path):
    fill(tmp_path, a_heic="x", a_txt="one", b_JXL="x")
    formats = "picture format not read (.heic), picture format not read (.jxl)"
    assert f"holds 3 files, but no picture and no shard: {formats}: convert them" in refusal(tmp_path)


def test_pictures_that_are_not_read_come_last_and_leave_the_stamps_of_the_others_alone(tmp_path):
    fill(tmp_path, b_png="B", b_txt="one", c_png="C", c_txt="two")
    before = [shard.stamp for shard in shards(tmp_path, chunk=1)]
    fill(tmp_path, a_heic="x", a_txt="x", b_psd="x", b_caption="x", d__e_svg="x", b_seg_png="mask")
    after = shards(tmp_path, chunk=1)
    assert [shard.stamp for shard in after][:2] == before and len(after) == 4
    assert [part[:2] for shard in after[2:] for part in shard.read()] == [
        ("a.heic", "picture format not read (.heic)"), ("d/e.svg", "picture format not read (.svg)")]


def test_rows_of_a_table_name_formats_that_are_not_read(tmp_path):
    fill(tmp_path, a_heic="x", a_jpg="J", metadata_csv="file_name,text\na.heic,one\na.jpg,two\n")
    assert [part.reason if isinstance(part, Skip) else part.picture for part in read_source(tmp_path)] == [
        "picture format not read (.heic)", b"J"]


def test_every_row_of_the_table_in_the_docs_is_a_case_of_these_tests():
    text = (ROOT / "docs" / "data.md").read_text("utf-8").partition("## Which files make up a sample")[2]
    rows = [line.split("|")[1] for line in text.partition("## ")[0].splitlines() if line.startswith("| `")]
    tried = [set(re.sub(r"\b000\b", "0", names).split()) for names, _ in TABLE]
    assert len(rows) > 12 and not [row for row in rows if set(re.findall(r"`([^`]+)`", row)) not in tried]


def test_the_summary_and_the_log_of_a_cache_count_pictures_that_are_not_read_by_their_format(tmp_path, capsys):
    fill(tmp_path / "set", a_heic="x", a_txt="one", b_HEIC="x", c_jxl="x", d_png=encode(noise(16, 16, 3)), d_caption="a fox")
    cache = run(settings(tmp_path, data=[str(tmp_path / "set")], resolution=16, max_skip=1.0), tmp_path / "cache")
    assert list(cache.all_captions()) == ["a fox"]
    rows = [json.loads(line) for line in (tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("a.heic", "picture format not read (.heic)"), ("b.HEIC", "picture format not read (.heic)"),
        ("c.jxl", "picture format not read (.jxl)")]
    report = str(add_up(shard for source in read_sources(tmp_path / "cache") for shard in source["shards"]))
    assert "skipped: 3 (75.00%): 2 picture format not read (.heic), 1 picture format not read (.jxl)" in report
