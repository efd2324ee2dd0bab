"""The job that encodes a data set, when pictures, shards, disks, networks or the job itself fail."""

import errno
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import ENVIRONMENT, ROOT
from preparing import CPU, VAE, Overflowing, colour, contents, latent, numbered, picture, run, settings, shard

from tinyldm.config import Config, change, make_config
from tinyldm.data import prepare
from tinyldm.data.cache import Cache
from tinyldm.data.encoding import Encoder
from tinyldm.pictures.pixels import to_pixels


def spoilt(tmp_path) -> Config:
    """A shard of 40 with two that cannot be used and three that the filters drop."""
    samples = numbered(0, 40)
    samples["000003"]["png"] = b"no picture"
    samples["000007"] = {"png": picture(7), "txt": b"   "}
    samples["000009"]["txt"] = b"x" * 50
    samples["000010"]["txt"] = b"x"
    samples["000011"]["png"] = picture(11, (9, 30))
    shard(tmp_path / "s.tar", samples)
    return settings(tmp_path, "s.tar", min_caption=2, max_caption=20, min_side=10)


@pytest.mark.parametrize("damage", [b"", b'{"stamp": ', b"null", b"\xff\xfe"])
def test_a_shard_whose_shard_json_is_damaged_is_encoded_again(tmp_path, damage):
    for i in range(2):
        shard(tmp_path / f"s{i}.tar", numbered(10 * i, 5))
    run(settings(tmp_path, "s*.tar"), tmp_path / "cache")
    before = contents(tmp_path / "cache" / "shards")
    file = next(tmp_path.glob("cache/shards/s0-*")) / "shard.json"
    file.write_bytes(damage)
    assert len(run(settings(tmp_path, "s*.tar"), tmp_path / "cache")) == 10
    assert contents(tmp_path / "cache" / "shards") == before


def test_what_is_left_out_is_counted_and_named_with_its_reason(tmp_path):
    report = prepare.prepare(spoilt(tmp_path), tmp_path / "cache", VAE, CPU)
    assert (report.read, report.kept) == (40, 35)
    assert report.skipped == Counter({"unreadable": 1, "no caption": 1})
    assert report.filtered == Counter({"caption too short or too long": 2, "too small": 1})
    rows = [json.loads(line) for line in (tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("000003", "unreadable"), ("000007", "no caption"), ("000009", "caption too short or too long"),
        ("000010", "caption too short or too long"), ("000011", "too small")]
    assert all(row["shard"].startswith("s-") for row in rows)
    assert "2 (5.00%)" in str(report) and "35 kept" in str(report)
    assert not any(f"picture {i}" in list(Cache(tmp_path / "cache").all_captions()) for i in (3, 7, 9, 10, 11))


def test_too_many_unusable_samples_stop_the_job_without_a_cache_that_looks_finished(tmp_path, encoded):
    config = change(spoilt(tmp_path), max_skip=0.04)
    with pytest.raises(ValueError, match="2 of 40 samples .* --max-skip 0.04 .*1 unreadable"):
        prepare.prepare(config, tmp_path / "cache", VAE, CPU)
    assert not (tmp_path / "cache" / "index.json").exists()
    config = change(config, max_skip=0.05)
    assert prepare.prepare(config, tmp_path / "cache", VAE, CPU) and encoded == ["s.tar"]    # encoded shards were kept


def test_the_first_thousand_samples_are_enough_to_stop(tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(prepare, "FEW", 4)
    for i in range(3):
        shard(tmp_path / f"s-{i}.tar", {str(k): {"png": b"junk", "txt": b"x"} for k in range(4)} if i == 0 else numbered(i, 40))
    with pytest.raises(ValueError, match="4 of 4 samples"):
        prepare.prepare(settings(tmp_path, "s-*"), tmp_path / "cache", VAE, CPU)
    assert encoded == ["s-0.tar"]


def test_a_source_without_one_usable_picture_says_what_is_wrong(tmp_path):
    shard(tmp_path / "s.tar", {"a": {"png": picture(1)}, "b": {"png": b"junk", "txt": b"words"}})
    with pytest.raises(ValueError, match="not one usable picture.*no caption.*unreadable|not one usable picture.*unreadable.*no caption"):
        prepare.prepare(settings(tmp_path, "s.tar", max_skip=1.0), tmp_path / "cache", VAE, CPU)
    with pytest.raises(ValueError, match="not one usable picture"):
        prepare.some_pictures(settings(tmp_path, "s.tar"), 4)


def test_a_gzipped_shard_with_a_wrong_checksum_is_dropped_whole(tmp_path):
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar.gz", numbered(120 * i, 120))
    data = bytearray((tmp_path / "s-0.tar.gz").read_bytes())
    data[-6] ^= 1                                                       # in the CRC; all bytes of the samples are correct
    (tmp_path / "s-0.tar.gz").write_bytes(data)
    report = prepare.prepare(settings(tmp_path, "s-*", max_skip=0.5), tmp_path / "cache", VAE, CPU)
    assert report.kept == 120 and report.skipped == Counter({"archive damaged": 119})   # the last was not yet yielded
    assert list(Cache(tmp_path / "cache").all_captions()) == [f"picture {i}" for i in range(120, 240)]
    damaged, = tmp_path.glob("cache/shards/s-0*")
    assert {file.name for file in damaged.iterdir()} == {"shard.json", "skipped.jsonl"}


def test_truncated_archives_count_as_shards_because_their_lost_samples_are_unknown(tmp_path):
    for i in range(4):
        shard(tmp_path / f"s-{i}.tar", numbered(40 * i, 40))
    data = (tmp_path / "s-3.tar").read_bytes()
    (tmp_path / "s-3.tar").write_bytes(data[:2000])
    with pytest.raises(ValueError, match="1 of 4 shards .* --max-skip 0.05 .*1 archive cut short"):
        prepare.prepare(settings(tmp_path, "s-*"), tmp_path / "cache", VAE, CPU)
    report = prepare.prepare(settings(tmp_path, "s-*", max_skip=0.25), tmp_path / "cache", VAE, CPU)
    assert report.broken == 1 and report.skipped == Counter({"archive cut short": 1}) and "1 of the shards are" in str(report)


def test_a_file_that_is_no_archive_loses_only_its_own_shard(tmp_path, capsys):
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar", numbered(10 * i, 10))
    (tmp_path / "s-0.tar").write_bytes(b"junk" * 500)
    config = settings(tmp_path, "s-*", max_skip=0.5)
    report = prepare.prepare(config, tmp_path / "cache", VAE, CPU)
    assert report.kept == 10 and report.skipped == Counter({"archive damaged": 1})
    assert "s-0.tar is not a tar archive" in capsys.readouterr().out
    assert len(prepare.some_pictures(config, 4)[0]) == 4
    with pytest.raises(ValueError, match="not one usable picture.*s-0.tar is not a tar archive"):
        prepare.some_pictures(settings(tmp_path, "s-0.tar"), 4)


def test_latents_that_are_not_finite_are_encoded_again_in_float32_or_dropped(tmp_path):
    shard(tmp_path / "s.tar", numbered(0, 10))
    in_bf16 = Overflowing(lambda pixels: torch.full((len(pixels),), torch.is_autocast_enabled("cpu")))
    cache = run(settings(tmp_path, "s.tar", dtype="bf16"), tmp_path / "one", in_bf16)
    assert len(cache) == 10
    assert all(torch.allclose(torch.from_numpy(cache.latents(np.array([i])))[0, 0].float(), latent(i), atol=2e-3) for i in range(10))
    bad = [3, 4]
    always = Overflowing(lambda pixels: torch.stack([(pixels[:, :, 0, 0] - to_pixels(np.full((1, 1, 1, 3), colour(i), np.uint8))
                                                      [:, :, 0, 0]).abs().amax(1) < 1e-3 for i in bad]).any(0))
    report = prepare.prepare(settings(tmp_path, "s.tar", max_skip=0.2), tmp_path / "two", always, CPU)
    assert report.skipped == Counter({"latents not finite": 2})
    assert list(Cache(tmp_path / "two").all_captions()) == [f"picture {i}" for i in range(10) if i not in bad]


def test_processes_at_the_same_time_share_the_shards(tmp_path, encoded, monkeypatch):
    for i in range(4):
        shard(tmp_path / f"s-{i}.tar", numbered(3 * i, 3))
    config, folder = settings(tmp_path, "s-*"), tmp_path / "cache"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(prepare.Claims, "take", lambda self, name: name[:2] != "s-" or name[2] in "02")     # another has the odd ones
    assert prepare.prepare(config, folder, VAE, CPU) is None and not (folder / "index.json").exists()
    assert encoded == ["s-0.tar", "s-2.tar"]
    monkeypatch.setattr(prepare.Claims, "take", lambda self, name: True)
    monkeypatch.setenv("RANK", "1")
    (folder / "shards").rename(tmp_path / "aside")
    (folder / "shards").mkdir()
    encoded.clear()
    assert prepare.prepare(config, folder, VAE, CPU)
    assert encoded == ["s-1.tar", "s-3.tar", "s-0.tar", "s-2.tar"]                          # the rank's own shards come first


def test_a_shard_whose_connection_fails_is_the_only_one_lost(tmp_path, monkeypatch):
    for i in range(3):
        shard(tmp_path / f"s-{i}.tar", numbered(3 * i, 3))
    real, broken = prepare.encode_shard, [True]

    def flaky(it, *rest):
        if "s-1" in it.url and broken:
            raise prepare.SourceLost(f"{it.url}: stopped at byte 10")
        return real(it, *rest)

    monkeypatch.setattr(prepare, "encode_shard", flaky)
    with pytest.raises(ValueError, match="1 of 3 shards could not be read.*s-1.tar: stopped at byte 10"):
        prepare.prepare(settings(tmp_path, "s-*"), tmp_path / "cache", VAE, CPU)
    broken.clear()
    assert len(run(settings(tmp_path, "s-*"), tmp_path / "cache")) == 9


def test_a_full_disk_leaves_finished_shards_and_nothing_half_written(tmp_path, monkeypatch):
    for i in range(2):
        shard(tmp_path / f"s-{i}.tar", numbered(3 * i, 3))
    real = Encoder.flush

    def full(self, batch):
        if "picture 3" in batch[0].captions[0][1]:
            raise OSError(28, "No space left on device")
        real(self, batch)

    monkeypatch.setattr(Encoder, "flush", full)
    with pytest.raises(OSError, match="no room left for .*run the same command again"):
        prepare.prepare(settings(tmp_path, "s-*"), tmp_path / "cache", VAE, CPU)
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 1 and not (tmp_path / "cache" / "index.json").exists()
    monkeypatch.setattr(Encoder, "flush", real)
    assert len(run(settings(tmp_path, "s-*"), tmp_path / "cache")) == 6


def test_a_finished_cache_serves_while_its_remote_source_is_away(tmp_path, monkeypatch, capsys):
    import fsspec
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/s.tar", shard(tmp_path / "s.tar", numbered(0, 3)).read_bytes())
    config = make_config(data=["memory://bucket/s.tar"], resolution=8, dtype="fp32")
    run(config, tmp_path / "cache")

    real = prepare.list_shards

    def away(source, **options):
        if "://" in source.spec:
            raise prepare.SourceLost("no network")
        return real(source, **options)

    monkeypatch.setattr(prepare, "list_shards", away)
    assert len(run(config, tmp_path / "cache")) == 3 and "no network" in capsys.readouterr().out
    with pytest.raises(ValueError, match="flip false in the cache, true in this run"):
        run(change(config, flip=True), tmp_path / "cache")
    with pytest.raises(OSError, match="no network"):
        prepare.prepare(config, tmp_path / "other", VAE, CPU)
    both = change(config, data=[*config.data.sources, str(tmp_path / "s.tar")])
    with pytest.raises(OSError, match="no network"):                    # a new source that cannot be reached
        prepare.prepare(change(config, data=["memory://bucket/other.tar"]), tmp_path / "cache", VAE, CPU)
    monkeypatch.undo()
    run(both, tmp_path / "both")
    shard(tmp_path / "s.tar", numbered(20, 4))                          # a local source is still checked for changes
    monkeypatch.setattr(prepare, "list_shards", away)
    assert list(run(both, tmp_path / "both").all_captions()) == [f"picture {i}" for i in (0, 1, 2, 20, 21, 22, 23)]


# ---------------------------------------------------------------- killed

DRIVER = """
import os, random, sys
import preparing as support
support.torch.set_num_threads(1)
source, folder, kills = support.Path(sys.argv[1]), support.Path(sys.argv[2]), int(sys.argv[3])

def go():
    support.prepare.prepare(support.settings(source, "s-*", max_skip=0.5), folder, support.VAE, support.CPU)

def die_at(count):
    left = [count]
    def hook(event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(folder) in str(args[0]):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
    sys.addaudithook(hook)

died = 0
for kill in range(kills):
    if not (child := os.fork()):
        die_at(random.Random(kill).randrange(40))
        go()
        os._exit(0)
    died += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if (folder / "index.json").exists():
        support.Cache(folder)                            # a cache with an index must be complete
        break
go()
print(died)
"""


TWO = """
import os, sys
import preparing as support
support.torch.set_num_threads(1)
source, folder = support.Path(sys.argv[1]), support.Path(sys.argv[2])
begin, go = os.pipe()
children = []
for rank in range(3):
    if not (child := os.fork()):
        os.close(go)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3"}
        os.read(begin, 1)                                # all begin at the same moment, when the pipe is closed
        support.prepare.prepare(support.settings(source, "s-*", **eval(sys.argv[3])), folder, support.VAE, support.CPU, True)
        os._exit(0)
    children.append(child)
os.close(go)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to begin at the same moment")
@pytest.mark.slow
def test_processes_that_begin_at_the_same_moment_make_one_cache(tmp_path):
    for i in range(6):
        shard(tmp_path / f"s-{i}.tar", numbered(7 * i, 7))
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    run(settings(tmp_path, "s-*"), tmp_path / "one")
    for turn, changes in enumerate([{}, {}, {"flip": True}, {}]):      # new, unchanged, then rebuilt twice
        words = [sys.executable, "-c", TWO, str(tmp_path), str(tmp_path / "many"), repr(changes)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert Cache(tmp_path / "many").shape[0] == (2 if changes else 1)
    sizes = [{name: len(data) for name, data in contents(tmp_path / folder).items() if not name.endswith(".json")}
             for folder in ("one", "many")]
    assert sizes[0] == sizes[1] and sum(".npy" in name for name in sizes[0]) == 6 * 6       # the same, up to float rounding


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to be killed often")
@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_job_killed_at_any_file_operation_ends_with_the_same_bytes(tmp_path, kills):
    for i in range(6):
        shard(tmp_path / f"s-{i}.tar", numbered(7 * i, 7) | {"x": {"png": b"junk", "txt": b"x"}})
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    for name, times in (("whole", 0), ("killed", kills)):
        words = [sys.executable, "-c", DRIVER, str(tmp_path), str(tmp_path / name), str(times)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[-1]) >= min(times, 5)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_on_a_disk_without_locks_one_process_encodes_and_several_are_refused_before_they_do(tmp_path, encoded, monkeypatch):
    def refuse(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    config = spoilt(tmp_path)
    run(config, tmp_path / "locked")
    encoded.clear()
    monkeypatch.setattr(pytest.importorskip("fcntl"), "lockf", refuse)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OSError, match="by which 2 processes share the work"):
        run(config, tmp_path / "cache")
    assert not encoded
    monkeypatch.delenv("WORLD_SIZE")
    run(config, tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(tmp_path / "locked")
