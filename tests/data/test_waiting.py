"""Processes that have nothing left to encode and wait for the others."""

import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, ROOT
from preparing import CPU, VAE, contents, numbered, run, settings, shard

from tinyldm.data import prepare
from tinyldm.data.cache import Cache

HOLD = """
import sys, time
from pathlib import Path
from tinyldm.files import Claims
claims = Claims(Path(sys.argv[1]))
for name in sys.argv[2:]:
    assert claims.take(name)
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """A function that starts another process, which takes shards and encodes none of them."""
    started = []

    def take(*names: str) -> subprocess.Popen:
        words = [sys.executable, "-c", HOLD, str(tmp_path / "cache" / "claims"), *names]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)})
        started.append(process)
        assert process.stdout.readline() == "taken\n"
        return process

    yield take
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def naps(monkeypatch):
    """A list of what is done instead of sleeping, time after time; it may not be longer asleep than that. Also counts calls."""
    naps, counts = [], {}

    def sleep(seconds):
        assert seconds == prepare.POLL
        naps.pop(0)()

    def counted(name):
        real, counts[name] = getattr(prepare, name), 0

        def call(*arguments, **options):
            counts[name] += 1
            return real(*arguments, **options)
        monkeypatch.setattr(prepare, name, call)

    monkeypatch.setattr(prepare.time, "sleep", sleep)
    for name in ("list_shards", "find_shards", "fingerprint", "by_content", "read_shard"):
        counted(name)
    return naps, counts


def three_shards(tmp_path):
    """-> the config, and the names of the shards as another process claims them."""
    for i in range(3):
        shard(tmp_path / f"s-{i}.tar", numbered(3 * i, 3))
    config = settings(tmp_path, "s-*")
    return config, [found.name for _, shards in prepare.find_shards(config.data, 0) for found in shards]


def test_a_waiting_process_lists_and_hashes_once_and_takes_over_the_shards_of_one_that_died(tmp_path, naps, other, encoded):
    config, names = three_shards(tmp_path)
    run(config, tmp_path / "alone")
    (tmp_path / "cache").mkdir()
    process, (naps, counts), waited = other(names[1]), naps, []

    def died():
        process.kill()
        process.wait()

    naps += [*[lambda: waited.append(dict(counts))] * 5, died]
    counts.update(dict.fromkeys(counts, 0))
    encoded.clear()
    report = prepare.prepare(config, tmp_path / "cache", VAE, CPU, wait=True)
    assert report.kept == 9 and not naps and encoded == ["s-0.tar", "s-2.tar", "s-1.tar"]
    assert {name: counts[name] for name in ("list_shards", "find_shards", "fingerprint", "by_content")} == dict.fromkeys(
        ("list_shards", "find_shards", "fingerprint", "by_content"), 1)
    assert {after["read_shard"] - before["read_shard"] for before, after in zip(waited, waited[1:])} == {1}     # of the missing shard
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")


def test_a_waiting_process_goes_on_once_another_has_finished(tmp_path, naps, other, encoded):
    config, names = three_shards(tmp_path)
    run(config, tmp_path / "alone")
    (tmp_path / "cache").mkdir()
    other(names[0], names[1])
    naps, _ = naps

    def finish(name):
        return lambda: (tmp_path / "alone" / "shards" / name).rename(tmp_path / "cache" / "shards" / name)

    naps += [finish(names[1]), lambda: None, finish(names[0])]
    encoded.clear()
    assert prepare.prepare(config, tmp_path / "cache", VAE, CPU, wait=True).kept == 9
    assert encoded == ["s-2.tar"] and not naps and len(Cache(tmp_path / "cache")) == 9


def test_a_source_that_cannot_be_listed_any_more_does_not_end_a_process_that_waits(tmp_path, naps, other, monkeypatch):
    config, names = three_shards(tmp_path)
    (tmp_path / "cache").mkdir()
    process, (naps, _) = other(names[2]), naps

    def away(*_, **options):
        raise prepare.SourceLost("429 Too Many Requests")

    naps += [lambda: monkeypatch.setattr(prepare, "list_shards", away), lambda: None, lambda: (process.kill(), process.wait())]
    assert prepare.prepare(config, tmp_path / "cache", VAE, CPU, wait=True).kept == 9


def test_a_shard_that_was_lost_is_an_error_only_after_the_others_are_done(tmp_path, naps, other, encoded, monkeypatch):
    config, names = three_shards(tmp_path)
    (tmp_path / "cache").mkdir()
    process, (naps, _), real = other(names[2]), naps, prepare.encode_shard

    def flaky(it, *rest):
        if "s-0" in it.url:
            raise prepare.SourceLost(f"{it.url}: stopped at byte 10")
        return real(it, *rest)

    monkeypatch.setattr(prepare, "encode_shard", flaky)
    naps += [lambda: None, lambda: (process.kill(), process.wait())]
    with pytest.raises(ValueError, match="1 of 3 shards could not be read, the others are encoded: .*s-0.tar: stopped"):
        prepare.prepare(config, tmp_path / "cache", VAE, CPU, wait=True)
    assert encoded == ["s-1.tar", "s-2.tar"] and not naps


def test_a_signal_ends_the_waiting(tmp_path, naps, other):
    config, names = three_shards(tmp_path)
    (tmp_path / "cache").mkdir()
    other(*names)
    naps, calls = naps[0], []
    naps += [lambda: None] * 2

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(config, tmp_path / "cache", VAE, CPU, check=check, wait=True)
    assert not naps and not (tmp_path / "cache" / "index.json").exists()


def test_a_process_that_does_not_wait_leaves_the_rest_to_the_others(tmp_path, naps, other, encoded):
    config, names = three_shards(tmp_path)
    (tmp_path / "cache").mkdir()
    other(names[0])
    assert prepare.prepare(config, tmp_path / "cache", VAE, CPU) is None
    assert encoded == ["s-1.tar", "s-2.tar"] and not (tmp_path / "cache" / "index.json").exists()
