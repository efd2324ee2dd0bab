"""Folders of pictures as sources: captions in files or in a table, and stamps that change only with the files."""

import csv
import json
import os
import pickle

import pytest
from archives import fill, pairs, read, refusal, shards

from tinyldm.data import file_sources, readers
from tinyldm.data.readers import Sample, Skip, captions


def test_a_folder_is_read_with_the_captions_beside_the_pictures(tmp_path):
    fill(tmp_path, a_png="A", a_txt="one", sub__b_JPG="B", sub__b_json='{"prompt": "two"}', sub__a_png="C", c_webp="D",
         c_TXT="four", n_md="", lone_txt="x", _hidden_png="H", _git__x_png="X")
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
    assert [part[:2] for part in read(tmp_path)[:2]] == [("a.jpg", "duplicate key"), ("a.png", "duplicate key")]
    assert len(read(tmp_path)) == 3


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


def test_shard_names_are_unique_and_valid_on_every_system(tmp_path):
    fill(tmp_path, x__a_tar=pairs("a"), y__a_tar=pairs("b"), y__A_tar=pairs("c"), **{"y__ü <|>?_tar": pairs("d")})
    names = [shard.name for spec in ("x/*.tar", "y") for shard in shards(tmp_path / spec)]
    assert len({name.lower() for name in names}) == 4 and all(name.isascii() for name in names)
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names)


def test_files_that_vanish_or_are_too_large_are_skipped(tmp_path, monkeypatch):
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
    sample, missing = read(tmp_path / "set")
    assert sample == Sample("a.png", b"A", {"txt": b"one"}) and missing[:2] == ("b.png", "picture file missing")
    stamp = shards(tmp_path / "set")[0].stamp
    fill(tmp_path, blobs__1="BB")
    assert shards(tmp_path / "set")[0].stamp != stamp


def test_a_shard_can_be_sent_to_another_process(tmp_path):
    fill(tmp_path, a_png="A", x__a_tar=pairs("a"))
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


def test_the_files_of_a_folder_are_gone_through_once_however_many_tables_it_has(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(file_sources, "composed", lambda name: seen.append(name) or name)
    for folder in "abcd":
        fill(tmp_path / folder, b_png="B", sub__a_png="A")
        table(tmp_path / folder / "metadata.csv", ROWS)
    assert len(read(tmp_path)) == 8 and len(seen) == len(set(seen)) == 12


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


def test_pictures_outside_the_folders_of_metadata_are_read_with_what_is_beside_them(tmp_path):
    fill(tmp_path, A__a_png="A", A__a_txt="one", C__x_png="X", C__y_png="Y", C__y_txt="not this", C__sub__z_png="Z",
         Cc__d_png="D", r_png="R", C__metadata_csv="file_name,text\nx.png,two\n", E__e_png="E",
         E__metadata_jsonl='{"file_name": "e.png", "text": "five"}')
    assert [(part.picture, captions(part)) for part in read(tmp_path)] == [
        (b"X", [(0, "two")]), (b"E", [(0, "five")]), (b"A", [(0, "one")]), (b"D", []), (b"R", [])]


@pytest.mark.parametrize("below", ["", "train"])
def test_two_metadata_files_in_one_folder_are_refused(tmp_path, below):
    fill(tmp_path / below, a_png="A", metadata_csv="file_name,text\na.png,one\n", metadata_jsonl='{"file_name": "a.png"}')
    text = refusal(tmp_path)
    assert f"{(tmp_path / below).as_posix()} holds metadata.jsonl and metadata.csv" in text and text.endswith("delete one")


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(5, "Input/output error")])
def test_a_picture_that_cannot_be_read_is_skipped_alone(tmp_path, monkeypatch, error):
    fill(tmp_path, a_png="A", b_png="B")

    def fail(fs, path, size):
        if path.endswith("a.png"):
            raise error
        return open(path, "rb")

    monkeypatch.setattr(readers, "open_file", fail)
    assert [part[:2] for part in read(tmp_path)] == [("a.png", "unreadable"), ("b.png", b"B")]
