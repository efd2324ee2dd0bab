"""Caches read by position: with few open files, by many threads, and without memory per sample."""

import json
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from caches import SQUARE, TOKENIZER, caption, many, mixed, shard
from helpers import ROOT

from tinyldm.data import positional
from tinyldm.data.cache import Cache


def test_more_shards_than_open_files_are_read_correctly(tmp_path):
    many(tmp_path, 40)
    cache = Cache(tmp_path)
    cache._files.limit = 8
    samples = np.random.default_rng(0).permutation(120)
    assert np.array_equal(cache.latents(samples)[:, 0, 0, 0, 0].astype(int), 10 * samples)
    tokens = cache.tokens(samples, TOKENIZER.fingerprint, np.zeros(120), (1.0,))
    assert np.array_equal(tokens, TOKENIZER.encode([f"a red square {i} é" for i in samples]))
    assert cache.captions(119) == caption(119)
    assert len(cache._files.open) <= 8


def test_reading_keeps_within_the_systems_limit_of_open_files(tmp_path):
    resource = pytest.importorskip("resource")
    many(tmp_path, 60, rows=1)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    program = (f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (48, {most}))\n"
               f"import numpy as np; from pathlib import Path; from tinyldm.data.cache import Cache\n"
               f"print(int(Cache(Path({str(tmp_path)!r})).latents(np.arange(60)).astype(float)[:, 0, 0, 0, 0].sum()))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == str(10 * 59 * 30), done.stderr


def test_without_preadv_files_are_read_with_seek(tmp_path, monkeypatch):
    for name in ("preadv", "posix_fadvise"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setitem(sys.modules, "resource", None)
    cache = mixed(tmp_path)
    assert positional._open_file_limit() == 128
    assert cache.latents(np.array([5, 1, 4]))[:, 0, 0, 0, 0].tolist() == [50, 0, 40]


def test_threads_read_the_same_as_one(tmp_path):
    many(tmp_path, 12)
    cache = Cache(tmp_path)
    cache._files.limit = 2
    orders = [np.random.default_rng(i).permutation(36) for i in range(60)]
    with ThreadPoolExecutor(6) as pool:
        for order, got in zip(orders, pool.map(cache.latents, orders)):
            assert np.array_equal(got[:, 0, 0, 0, 0].astype(int), 10 * order)


def test_opening_uses_no_memory_per_sample(tmp_path):
    """With a million samples in sparse files, opening and reading allocate far less than one byte per sample."""
    folder = shard(tmp_path, "x", [(SQUARE, 0, [caption(0)])])
    n = 1_000_000
    facts = json.loads((folder / "shard.json").read_text())
    facts |= {"groups": [{"size": [4, 4], "count": n}], "captions": n}
    (folder / "shard.json").write_text(json.dumps(facts))
    for name, size in {"latents-4x4": 96 * n, "ends": 8 * n, "first": 8 * (n + 1), "kinds": n, "captions": 0}.items():
        os.truncate(folder / f"{name}.npy", 4096 + size)
    index = {"settings": {}, "sources": [{"spec": "s", "shards": [facts | {"text_bytes": 0, "kinds": 1}]}]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    tracemalloc.start()
    cache = Cache(tmp_path)
    assert cache.latents(np.arange(0, n, n // 100)).shape == (100, 1, 3, 4, 4) and len(cache) == n
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250_000
