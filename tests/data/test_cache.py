"""Caches of latents: what is written is what is read, by position, under few open files, and broken ones are refused."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import small_text

from tinyldm.data import positional
from tinyldm.data.cache import Cache, ShardWriter, write_index, write_tokens
from tinyldm.tokenizer import Tokenizer

SQUARE, WIDE = (4, 4), (2, 6)
TOKENIZER = small_text()[0]


def latents(first, count, size=SQUARE, views=1, parts=1):
    """Sample i, view v, part p is filled with 10 i + v + p / 2, but for a ramp."""
    out = np.zeros((count, views, parts, 3, *size), np.float16)
    out += (10 * np.arange(first, first + count)).reshape(-1, 1, 1, 1, 1, 1)
    out += np.arange(views).reshape(1, -1, 1, 1, 1, 1) + np.arange(parts).reshape(1, 1, -1, 1, 1, 1) / 2
    return out + np.arange(size[1], dtype=np.float16) / 16


def caption(i, kind=0):
    return [(kind, f"a red square {i} é")]


def shard(folder, name, pieces, **shape):
    """pieces: (size, first number, captions of each sample), in order of arrival."""
    folder = folder / "shards" / name
    folder.mkdir(parents=True)
    writer = ShardWriter(folder)
    for size, first, captions in pieces:
        writer.add(latents(first, len(captions), size, **shape), captions)
    facts = writer.close()
    kept = sum(group["count"] for group in facts["groups"])
    facts |= {"name": name, "url": f"x/{name}.tar", "stamp": "s", "read": kept + 1, "kept": kept, "skipped": {"broken": 1},
              "filtered": {}, "stats": {"mean": [0.0]}}
    (folder / "shard.json").write_text(json.dumps(facts))
    return folder


def mixed(folder):
    """Two sources, two sizes, one to three captions each; flat numbers as in the table of the test below."""
    pieces = [(SQUARE, 0, [caption(0), caption(1)]), (WIDE, 2, [caption(2)]), (SQUARE, 3, [caption(3)])]
    shard(folder, "a", pieces, views=2, parts=2)
    shard(folder, "b", [(SQUARE, 4, [caption(4) + caption(40, 1), caption(5, 1)])], views=2, parts=2)
    shard(folder, "none", [])
    shard(folder, "c", [(WIDE, 6, [caption(6), caption(7) + caption(70) + caption(700, 1)])], views=2, parts=2)
    write_index(folder, {"size": 64}, [{"spec": "one", "shards": ["a", "b"]}, {"spec": "two", "shards": ["none", "c"]}])
    return Cache(folder)


IN_ORDER = [2, 0, 1, 3, 4, 5, 6, 7]                     # what was written as number i is read as number IN_ORDER.index(i)


def test_samples_are_numbered_by_source_size_shard_and_row(tmp_path):
    cache = mixed(tmp_path)
    assert len(cache) == 8 and cache.sources == ["one", "two"] and cache.settings == {"size": 64} and cache.shape == (2, 2, 3)
    assert cache.ranges == [{WIDE: range(0, 1), SQUARE: range(1, 6)}, {WIDE: range(6, 8)}] and cache.sizes == [WIDE, SQUARE]
    assert cache.kinds == 2
    for number, written in enumerate(IN_ORDER):
        size = WIDE if written in (2, 6, 7) else SQUARE
        for view in (0, 1):
            got = cache.latents(np.array([number]), np.array([view]))
            assert got.dtype == np.float16 and np.array_equal(got, latents(written, 1, size, 2, 2)[:, view])
        assert cache.captions(number)[0][1] == f"a red square {written} é"
    assert cache.captions(4) == caption(4) + caption(40, 1)
    assert cache.captions(5) == caption(5, 1)
    assert cache.captions(7) == caption(7) + caption(70) + caption(700, 1)
    assert [text.split()[3] for text in cache.all_captions()] == ["2", "0", "1", "3", "4", "40", "5", "6", "7", "70", "700"]


def test_a_size_of_a_source_is_one_range_whatever_shards_it_is_in(tmp_path):
    for i, name in enumerate("ab"):
        shard(tmp_path, name, [(SQUARE, 4 * i, [caption(0)] * 2), (WIDE, 4 * i + 2, [caption(0)] * 2)])
    write_index(tmp_path, {}, [{"spec": "s", "shards": ["a", "b"]}])
    cache = Cache(tmp_path)
    assert cache.ranges == [{WIDE: range(0, 4), SQUARE: range(4, 8)}]
    assert np.array_equal(cache.latents(np.arange(4)), latents(0, 8, WIDE)[[2, 3, 6, 7], 0])
    assert np.array_equal(cache.latents(np.arange(4, 8)), latents(0, 8)[[0, 1, 4, 5], 0])


def test_batches_come_back_in_the_order_asked_for(tmp_path):
    cache = mixed(tmp_path)
    samples, views = np.array([5, 1, 3, 1, 4, 2]), np.array([0, 1, 0, 0, 1, 1])
    written = latents(0, 8, SQUARE, 2, 2)[np.array(IN_ORDER)[samples], views]
    assert np.array_equal(cache.latents(samples, views), written)
    assert np.array_equal(cache.latents(samples), latents(0, 8, SQUARE, 2, 2)[np.array(IN_ORDER)[samples], 0])


def test_the_arrays_open_in_numpy_and_begin_on_a_page(tmp_path):
    cache = mixed(tmp_path)
    array = np.load(tmp_path / "shards/a/latents-4x4.npy", mmap_mode="r")
    assert array.dtype == np.float16 and np.array_equal(array, latents(0, 4, SQUARE, 2, 2)[[0, 1, 3]]) and array.offset == 4096
    write_tokens(tmp_path, TOKENIZER)
    tokens = np.load(tmp_path / f"shards/a/tokens-{TOKENIZER.fingerprint[:12]}.npy", mmap_mode="r")
    assert tokens.dtype == np.uint16 and np.array_equal(tokens, TOKENIZER.encode([f"a red square {i} é" for i in (2, 0, 1, 3)]))
    assert np.load(tmp_path / "shards/c/first.npy").tolist() == [0, 1, 4]
    assert np.load(tmp_path / "shards/c/kinds.npy").tolist() == [0, 0, 0, 1]
    assert len(cache) == 8


def test_the_bytes_do_not_depend_on_batches_or_which_size_came_first(tmp_path):
    one = shard(tmp_path / "1", "x", [(SQUARE, 0, [caption(0), caption(1)]), (WIDE, 2, [caption(2)])])
    two = shard(tmp_path / "2", "x", [(WIDE, 2, [caption(2)]), (SQUARE, 0, [caption(0)]), (SQUARE, 1, [caption(1)])])
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir()) and len(files) == 7
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    for folder in (tmp_path / "1", tmp_path / "2"):
        write_index(folder, {}, [{"spec": "s", "shards": ["x"]}])
    assert (tmp_path / "1/index.json").read_bytes() == (tmp_path / "2/index.json").read_bytes()


def test_captions_of_any_kind_survive(tmp_path):
    texts = ["", "zwei\nZeilen", "画", "\ud800 half", "😀"]
    shard(tmp_path, "x", [(SQUARE, 0, [[(0, text)] for text in texts]), (SQUARE, 5, [[(3, ""), (200, "é" * 5000)]])])
    write_index(tmp_path, {}, [{"spec": "s", "shards": ["x"]}])
    cache = Cache(tmp_path)
    assert [cache.captions(i) for i in range(5)] == [[(0, text.replace("\ud800", "?"))] for text in texts]
    assert cache.captions(5) == [(3, ""), (200, "é" * 5000)] and cache.kinds == 201
    assert len(list(cache.all_captions())) == 7


def test_a_shard_of_empty_captions_is_a_shard(tmp_path):
    shard(tmp_path, "x", [(SQUARE, 0, [[(0, "")], [(0, "")]])])
    write_index(tmp_path, {}, [{"spec": "s", "shards": ["x"]}])
    assert Cache(tmp_path).captions(1) == [(0, "")] and list(Cache(tmp_path).all_captions()) == ["", ""]


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add(latents(0, 1), [caption(0)])
    with pytest.raises(ValueError, match="one shape"):
        writer.add(latents(0, 1, views=2), [caption(0)])
    with pytest.raises(ValueError, match="no caption"):
        writer.add(latents(0, 2), [caption(0), []])
    for wrong in (latents(0, 1).astype(np.float32), latents(0, 1)[0], latents(0, 2)):
        with pytest.raises(ValueError, match="float16"):
            writer.add(wrong, [caption(0)])
    assert writer.close() == {"groups": [{"size": [4, 4], "count": 1}], "captions": 1, "shape": [1, 1, 3]}


def test_the_index_says_what_was_read_kept_and_skipped(tmp_path):
    mixed(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text("utf-8"))
    first = index["sources"][0]["shards"][0]
    assert first["name"] == "a" and first["read"] == 5 and first["kept"] == 4 and first["skipped"] == {"broken": 1}
    assert first["stats"] == {"mean": [0.0]} and first["stamp"] == "s" and first["captions"] == 4
    assert index["sources"][1]["shards"][0]["groups"] == []


def test_a_cache_that_is_not_whole_is_refused_with_the_file_and_the_fix(tmp_path):
    with pytest.raises(ValueError, match="no index.json.*prepare.py"):
        Cache(tmp_path)
    mixed(tmp_path)
    for name in ("latents-4x4.npy", "captions.npy", "ends.npy", "first.npy", "kinds.npy"):
        file = tmp_path / "shards/b" / name
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=f"{name} has .* should have .*prepare.py"):
            Cache(tmp_path)
        file.unlink()
        with pytest.raises(ValueError, match=f"{name} is missing.*prepare.py"):
            Cache(tmp_path)
        file.write_bytes(content)
    Cache(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Cache(tmp_path)


def test_an_index_is_not_written_over_broken_shards(tmp_path):
    folder = shard(tmp_path, "x", [(SQUARE, 0, [caption(0)])])
    other = shard(tmp_path, "y", [(SQUARE, 0, [caption(0)])], views=2)
    shard(tmp_path, "z", [])
    with pytest.raises(ValueError, match="shard y holds latents of"):
        write_index(tmp_path, {}, [{"spec": "s", "shards": ["z", "x", "y"]}])
    with pytest.raises(ValueError, match="named twice"):
        write_index(tmp_path, {}, [{"spec": "s", "shards": ["x"]}, {"spec": "t", "shards": ["x"]}])
    with pytest.raises(ValueError, match="gone is not whole"):
        write_index(tmp_path, {}, [{"spec": "s", "shards": ["gone"]}])
    os.truncate(other / "latents-4x4.npy", 5000)
    with pytest.raises(ValueError, match="should have"):
        write_index(tmp_path, {}, [{"spec": "s", "shards": ["y"]}])
    (folder / "shard.json").write_text("{")
    with pytest.raises(ValueError, match="x is not whole"):
        write_index(tmp_path, {}, [{"spec": "s", "shards": ["x"]}])
    assert not (tmp_path / "index.json").exists()
    write_index(tmp_path, {}, [{"spec": "s", "shards": ["z"]}])
    with pytest.raises(ValueError, match="holds no samples"):
        Cache(tmp_path)


def test_questions_outside_the_cache_are_refused(tmp_path):
    cache = mixed(tmp_path)
    for number in (-1, 8):
        with pytest.raises(IndexError):
            cache.latents(np.array([number]))
        with pytest.raises(IndexError):
            cache.captions(number)
    with pytest.raises(ValueError, match="of 2 sizes"):
        cache.latents(np.array([0, 1]))


def test_a_file_that_shrinks_later_is_an_error_not_rubbish(tmp_path):
    cache = mixed(tmp_path)
    os.truncate(tmp_path / "shards/a/latents-4x4.npy", 4096 + 100)
    with pytest.raises(ValueError, match="ends before"):
        cache.latents(np.array([1]))


def text_of(row):
    """Which numbered caption a row of token ids is."""
    symbols = {number: symbol for symbol, number in TOKENIZER.vocab.items()}
    words = "".join(symbols[int(i)] for i in row if int(i) not in (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id))
    return int("".join(letter for letter in words if letter.isdigit()))


def test_tokens_are_those_of_the_sample_asked_for(tmp_path):
    cache = mixed(tmp_path)
    write_tokens(tmp_path, TOKENIZER)
    samples = np.array([5, 0, 3, 6, 1])
    tokens = cache.tokens(samples, TOKENIZER.fingerprint, np.zeros(5), [1.0, 1.0])
    assert tokens.dtype == np.int64 and np.array_equal(tokens, TOKENIZER.encode([cache.captions(i)[0][1] for i in samples]))


@pytest.mark.parametrize("weights, want", [
    ((1, 1), {4: 500, 40: 500, 7: 250, 70: 250, 700: 500}), ((3, 1), {4: 750, 40: 250, 7: 375, 70: 375, 700: 250}),
    ((1, 0), {4: 1000, 7: 500, 70: 500}), ((0, 1), {40: 1000, 700: 1000})])
def test_a_kind_of_caption_comes_in_proportion_to_its_weight(tmp_path, weights, want):
    cache = mixed(tmp_path)
    write_tokens(tmp_path, TOKENIZER)
    uniform = (np.arange(1000) + 0.5) / 1000
    seen = Counter()
    for number in (4, 7):
        rows = cache.tokens(np.full(1000, number), TOKENIZER.fingerprint, uniform, weights)
        texts, counts = np.unique(rows, axis=0, return_counts=True)
        seen.update({text_of(row): int(count) for row, count in zip(texts, counts)})
    assert seen == want
    lowest = cache.tokens(np.array([4, 7]), TOKENIZER.fingerprint, np.zeros(2), weights)
    assert [text_of(row) for row in lowest] == [min(n for n in want if str(n)[0] == first) for first in "47"]


def test_a_sample_with_only_captions_of_weight_0_takes_any(tmp_path):
    cache = mixed(tmp_path)
    write_tokens(tmp_path, TOKENIZER)
    rows = cache.tokens(np.array([5, 4, 6, 7]), TOKENIZER.fingerprint, np.full(4, 0.9999999), (1.0, 0.0))
    assert [text_of(row) for row in rows] == [5, 4, 6, 70]


def test_where_each_sample_has_one_caption_nothing_is_looked_up(tmp_path):
    cache = mixed(tmp_path)
    write_tokens(tmp_path, TOKENIZER)
    for name in ("first.npy", "kinds.npy"):
        (tmp_path / "shards/a" / name).unlink()
    assert text_of(cache.tokens(np.array([3]), TOKENIZER.fingerprint, np.zeros(1), (1.0, 1.0))[0]) == 3


def test_weights_must_cover_the_kinds(tmp_path):
    cache = mixed(tmp_path)
    for weights in ((1.0,), (0.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="caption weights"):
            cache.check_weights(weights)
    cache.check_weights((0.0, 2.0, 5.0))


def test_tokens_are_added_once_and_per_tokenizer(tmp_path):
    cache = mixed(tmp_path)
    with pytest.raises(ValueError, match="prepare.py"):
        cache.tokens(np.array([0]), TOKENIZER.fingerprint, np.zeros(1), (1.0, 1.0))
    write_tokens(tmp_path, TOKENIZER)
    file = tmp_path / f"shards/a/tokens-{TOKENIZER.fingerprint[:12]}.npy"
    before, content = file.stat().st_mtime_ns, file.read_bytes()
    write_tokens(tmp_path, TOKENIZER)
    assert file.stat().st_mtime_ns == before
    shorter = Tokenizer(TOKENIZER.vocab, TOKENIZER.merges, 8)
    write_tokens(tmp_path, shorter, [tmp_path / "shards/a"])
    with pytest.raises(ValueError, match="shards.b.tokens.*missing.*not encoded"):
        cache.check_tokens(shorter.fingerprint)
    write_tokens(tmp_path, shorter)
    assert cache.tokens(np.array([0]), shorter.fingerprint, np.zeros(1), (1.0, 1.0)).shape == (1, 8)
    file.write_bytes(content[:-2])
    with pytest.raises(ValueError, match="should have.*run prepare.py"):
        Cache(tmp_path).check_tokens(TOKENIZER.fingerprint)
    file.write_bytes(content[:50])
    with pytest.raises(ValueError, match="cannot be read.*run prepare.py"):
        Cache(tmp_path).check_tokens(TOKENIZER.fingerprint)
    write_tokens(tmp_path, TOKENIZER)                                   # what is not whole is made again
    assert file.read_bytes() == content


def test_large_vocabularies_take_four_bytes_an_id(tmp_path):
    cache = mixed(tmp_path)
    large = Tokenizer(TOKENIZER.vocab | {f"filler{i}": i for i in range(len(TOKENIZER), 70_000)}, TOKENIZER.merges, 8)
    large.vocab["<|endoftext|>"], large.eos_token_id = 69_999, 69_999
    write_tokens(tmp_path, large)
    assert np.load(tmp_path / f"shards/a/tokens-{large.fingerprint[:12]}.npy").dtype == np.uint32
    tokens = cache.tokens(np.array([0, 3]), large.fingerprint, np.zeros(2), (1.0, 1.0))
    assert np.array_equal(tokens, large.encode([cache.captions(i)[0][1] for i in (0, 3)]))


def test_the_fingerprint_of_a_tokenizer_is_of_all_that_decides_its_ids():
    one = Tokenizer(TOKENIZER.vocab, TOKENIZER.merges, 16)
    again = Tokenizer(dict(reversed(TOKENIZER.vocab.items())), list(TOKENIZER.merges), 16)
    swapped = dict(TOKENIZER.vocab)
    swapped["a"], swapped["b"] = swapped["b"], swapped["a"]
    others = [Tokenizer(TOKENIZER.vocab, TOKENIZER.merges, 17), Tokenizer(TOKENIZER.vocab, TOKENIZER.merges[:-1], 16),
              Tokenizer(TOKENIZER.vocab, TOKENIZER.merges, 16, "!</w>"), Tokenizer(swapped, TOKENIZER.merges, 16)]
    assert again.fingerprint == one.fingerprint and len(one.fingerprint) == 64
    assert len({tokenizer.fingerprint for tokenizer in [one, *others]}) == 5


def test_a_saved_tokenizer_keeps_its_fingerprint(tmp_path):
    TOKENIZER.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == TOKENIZER.fingerprint


def many(folder, shards, rows=3):
    for i in range(shards):
        shard(folder, f"{i:04d}", [(SQUARE, i * rows, [caption(i * rows + j) for j in range(rows)])])
    write_index(folder, {}, [{"spec": "s", "shards": [f"{i:04d}" for i in range(shards)]}])
    write_tokens(folder, TOKENIZER)


def test_more_shards_than_files_may_be_open_read_alike(tmp_path):
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
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == str(10 * 59 * 30), done.stderr


def test_without_reading_by_position_files_are_sought(tmp_path, monkeypatch):
    for name in ("preadv", "posix_fadvise"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setitem(sys.modules, "resource", None)
    cache = mixed(tmp_path)
    assert positional._handles() == 128
    assert cache.latents(np.array([5, 1, 4]))[:, 0, 0, 0, 0].tolist() == [50, 0, 40]


def test_threads_read_the_same_as_one(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    many(tmp_path, 12)
    cache = Cache(tmp_path)
    cache._files.limit = 2
    orders = [np.random.default_rng(i).permutation(36) for i in range(60)]
    with ThreadPoolExecutor(6) as pool:
        for order, got in zip(orders, pool.map(cache.latents, orders)):
            assert np.array_equal(got[:, 0, 0, 0, 0].astype(int), 10 * order)


def test_opening_holds_nothing_per_sample(tmp_path):
    """A million samples, as files that are mostly holes: what opening and reading allocate is far below a byte for each."""
    import tracemalloc
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
