"""Finished work on shards is found again by their contents: nothing is encoded twice because a folder was moved, copied or touched."""

import json
import os
import shutil

import numpy as np
import pytest
from preparing import contents, numbered, picture, run, settings, shard

from tinyldm.config import change
from tinyldm.data.cache import Cache
from tinyldm.data.order import Order


def tars(folder, count=3):
    folder.mkdir(parents=True)
    for i in range(count):
        shard(folder / f"s-{i}.tar", numbered(5 * i, 5) | {f"bad{i}": {"png": b"junk", "txt": b"x"}})


def pictures(folder, count=7):
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(picture(i))
        (folder / f"{i}.txt").write_text(f"picture {i}")


def rename_files(old, new):
    old.rename(new)
    for file in new.iterdir():
        file.rename(file.with_name("t" + file.name))


MOVES = {"moved": os.rename, "copied, with new times": lambda old, new: shutil.copytree(old, new, copy_function=shutil.copyfile),
         "moved and renamed": rename_files}


@pytest.mark.parametrize("how", MOVES)
def test_moved_shards_are_not_encoded_again(tmp_path, encoded, how, capsys):
    tars(tmp_path / "old")
    first = run(settings(tmp_path, "old", max_skip=0.5), tmp_path / "cache")
    order = [first.captions(i) for i in Order(first.ranges, 4, seed=3).batch(2)]
    old_shards = list((tmp_path / "cache" / "shards").iterdir())
    MOVES[how](tmp_path / "old", tmp_path / "new")
    encoded.clear()
    cache = run(settings(tmp_path, "new", max_skip=0.5), tmp_path / "cache")
    assert not encoded and len(cache) == 15
    assert [cache.captions(i) for i in Order(cache.ranges, 4, seed=3).batch(2)] == order       # the same samples at every step
    assert "also holds 3 that --data does not name" in capsys.readouterr().out
    for folder in old_shards:                                   # as the message allows
        shutil.rmtree(folder)
    run(settings(tmp_path, "new", max_skip=0.5), tmp_path / "fresh")
    assert len(encoded) == 3 and contents(tmp_path / "cache") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("table", [False, True])
def test_a_moved_folder_of_pictures_is_not_encoded_again(tmp_path, encoded, table):
    pictures(tmp_path / "old")
    if table:
        (tmp_path / "old" / "metadata.jsonl").write_text("".join(
            json.dumps({"file_name": f"{i}.png", "text": f"row {i}"}) + "\n" for i in range(7)))
    run(settings(tmp_path, "old"), tmp_path / "cache")
    shutil.copytree(tmp_path / "old", tmp_path / "new", copy_function=shutil.copyfile)
    encoded.clear()
    cache = run(settings(tmp_path, "new"), tmp_path / "cache")
    assert not encoded and cache.captions(6) == [(0, "row 6" if table else "picture 6")]
    file = tmp_path / "new" / ("metadata.jsonl" if table else "3.txt")
    file.write_text(file.read_text().replace("3", "8", 1) if not table else file.read_text().replace("row 3", "row 8"))
    cache = run(settings(tmp_path, "new"), tmp_path / "cache")
    assert len(encoded) == 1 and cache.captions(3)[0][1].endswith("8")


@pytest.mark.parametrize("damage", ["not finished", b"\xff\xfe"])
def test_other_shards_that_cannot_be_read_do_not_stop_the_job(tmp_path, encoded, damage):
    """Another process may be replacing them, or the power was cut."""
    tars(tmp_path / "old", 1)
    run(settings(tmp_path, "old", max_skip=0.5), tmp_path / "cache")
    other = tmp_path / "cache" / "shards" / "other"
    other.mkdir()
    (other / "shard.json").write_bytes(damage.encode() if isinstance(damage, str) else damage)
    (tmp_path / "cache" / "shards" / "gone").mkdir()
    (tmp_path / "old").rename(tmp_path / "new")
    encoded.clear()
    assert len(run(settings(tmp_path, "new", max_skip=0.5), tmp_path / "cache")) == 5 and not encoded


def test_one_changed_byte_in_the_middle_of_a_copy_is_noticed(tmp_path, encoded):
    """Name, size, time, beginning and end of the shard are the same."""
    tars(tmp_path / "old", 1)
    run(settings(tmp_path, "old", max_skip=0.5), tmp_path / "cache")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    file = tmp_path / "new" / "s-0.tar"
    times, data = file.stat(), file.read_bytes()
    assert data.count(b"picture 2") == 1
    file.write_bytes(data.replace(b"picture 2", b"picture 9"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    encoded.clear()
    cache = run(settings(tmp_path, "new", max_skip=0.5), tmp_path / "cache")
    assert encoded == ["s-0.tar"] and cache.captions(2) == [(0, "picture 9")]


def test_a_shard_that_was_only_touched_is_not_encoded_again(tmp_path, encoded):
    tars(tmp_path / "s")
    run(settings(tmp_path, "s", max_skip=0.5), tmp_path / "cache")
    before = contents(tmp_path / "cache" / "shards")
    os.utime(tmp_path / "s" / "s-1.tar", ns=(10**18, 10**18))
    encoded.clear()
    run(settings(tmp_path, "s", max_skip=0.5), tmp_path / "cache")
    after = contents(tmp_path / "cache" / "shards")
    assert not encoded and before.keys() == after.keys()
    assert [name.rpartition("/")[2] for name in before if before[name] != after[name]] == ["shard.json"]      # the new time
    run(settings(tmp_path, "s", max_skip=0.5), tmp_path / "cache")
    assert contents(tmp_path / "cache" / "shards") == after


@pytest.mark.parametrize("changes", [{"flip": True}, {"max_caption": 9}])
def test_work_with_other_settings_is_not_found(tmp_path, encoded, changes):
    tars(tmp_path / "old", 1)
    run(settings(tmp_path, "old", max_skip=0.5), tmp_path / "other")
    run(settings(tmp_path, "old", max_skip=0.5, **changes), tmp_path / "cache")
    shutil.copytree(tmp_path / "other" / "shards", tmp_path / "cache" / "shards", dirs_exist_ok=True)     # of a job that still ran
    (tmp_path / "old").rename(tmp_path / "new")
    encoded.clear()
    run(settings(tmp_path, "new", max_skip=0.5, **changes), tmp_path / "cache")
    assert encoded == ["s-0.tar"]


def test_a_damaged_finished_shard_is_not_passed_on(tmp_path, encoded):
    tars(tmp_path / "old", 2)
    run(settings(tmp_path, "old", max_skip=0.5), tmp_path / "cache")
    file = next((tmp_path / "cache" / "shards").glob("s-0-*/latents-*.npy"))
    file.write_bytes(file.read_bytes()[:-2])
    (tmp_path / "old").rename(tmp_path / "new")
    encoded.clear()
    assert len(run(settings(tmp_path, "new", max_skip=0.5), tmp_path / "cache")) == 10 and encoded == ["s-0.tar"]


@pytest.mark.parametrize("linked", [True, False])
def test_the_old_shards_stay_whole_for_whoever_reads_them(tmp_path, monkeypatch, linked):
    tars(tmp_path / "old", 2)
    cache = run(settings(tmp_path, "old", max_skip=0.5), tmp_path / "cache")
    if not linked:                                              # exFAT and some network disks know no hard links

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    before = contents(tmp_path / "cache" / "shards")
    (tmp_path / "old").rename(tmp_path / "new")
    new = run(settings(tmp_path, "new", max_skip=0.5), tmp_path / "cache")
    assert contents(tmp_path / "cache" / "shards").items() >= before.items()
    assert np.array_equal(cache.latents(np.arange(10)), new.latents(np.arange(10)))
    assert {file.stat().st_nlink for file in (tmp_path / "cache" / "shards").glob("*/latents-*.npy")} == {2 if linked else 1}


def test_a_cache_from_before_contents_were_noted_stays_valid(tmp_path, encoded):
    tars(tmp_path / "s")
    config = settings(tmp_path, "s", max_skip=0.5)
    digest = run(config, tmp_path / "cache").digest
    for file in (tmp_path / "cache" / "shards").glob("*/shard.json"):
        facts = json.loads(file.read_text())
        assert len(facts.pop("content")) == 64
        file.write_text(json.dumps(facts, sort_keys=True))
    before, _ = contents(tmp_path / "cache"), encoded.clear()
    assert run(config, tmp_path / "cache").digest == digest and not encoded and contents(tmp_path / "cache") == before
    (tmp_path / "s").rename(tmp_path / "t")                     # but it cannot be found by its contents
    run(settings(tmp_path, "t", max_skip=0.5), tmp_path / "cache")
    assert len(encoded) == 3


def test_shards_at_a_url_are_not_fetched_to_be_compared(tmp_path, encoded):
    import fsspec
    files = fsspec.filesystem("memory")
    files.pipe("/moved/s.tar", shard(tmp_path / "s.tar", numbered(0, 3)).read_bytes())
    run(change(settings(tmp_path), data=["memory://moved/s.tar"]), tmp_path / "cache")
    [file] = (tmp_path / "cache" / "shards").glob("*/shard.json")
    assert json.loads(file.read_text())["content"] == ""
    assert len(Cache(tmp_path / "cache")) == 3
