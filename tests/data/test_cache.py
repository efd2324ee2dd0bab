"""Caches of latents: samples are read as they were written, and damaged caches are refused."""

import json
import os

import numpy as np
import pytest
from caches import IN_ORDER, SQUARE, TOKENIZER, WIDE, caption, latents, mixed, shard

from tinyldm.data.cache import Cache, ShardWriter, write_index, write_tokens


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


def test_a_size_of_a_source_is_one_range_across_shards(tmp_path):
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


def test_pictures_come_back_beside_their_latents_mirrored_where_the_view_is(tmp_path):
    random = np.random.default_rng(0)
    square, wide = (random.integers(0, 256, (count, 3 * h, 3 * w, 3), np.uint8) for count, (h, w) in ((3, SQUARE), (2, WIDE)))
    folder = tmp_path / "shards" / "x"
    folder.mkdir(parents=True)
    writer = ShardWriter(folder)
    for size, first, pictures in ((SQUARE, 0, square[:2]), (WIDE, 2, wide), (SQUARE, 4, square[2:])):
        writer.add(latents(first, len(pictures), size, 2), [caption(0)] * len(pictures), None, pictures)
    facts = writer.close() | {"name": "x", "url": "x", "stamp": "s", "read": 5, "kept": 5, "skipped": {}, "filtered": {}, "stats": {}}
    (folder / "shard.json").write_text(json.dumps(facts))
    write_index(tmp_path, {}, [{"spec": "s", "shards": ["x"]}])
    cache = Cache(tmp_path)
    assert cache.pictures == 3 and np.array_equal(cache.read_pictures(np.arange(2)), wide)
    found = cache.read_pictures(np.array([4, 2, 3]), np.array([0, 1, 1]))
    assert np.array_equal(found, np.stack([square[2], square[0, :, ::-1], square[1, :, ::-1]]))
    (folder / "pictures-4x4.npy").write_bytes(b"short")
    with pytest.raises(ValueError, match="pictures-4x4.npy has 5 bytes"):
        Cache(tmp_path)
    with pytest.raises(ValueError, match="make it again with --keep-pictures"):
        mixed(tmp_path / "without").read_pictures(np.arange(1))


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


def test_the_writer_refuses_arrays_that_do_not_fit(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add(latents(0, 1), [caption(0)])
    with pytest.raises(ValueError, match="one shape"):
        writer.add(latents(0, 1, views=2), [caption(0)])
    with pytest.raises(ValueError, match="no caption"):
        writer.add(latents(0, 2), [caption(0), []])
    for wrong in (latents(0, 1).astype(np.float32), latents(0, 1)[0], latents(0, 2)):
        with pytest.raises(ValueError, match="float16"):
            writer.add(wrong, [caption(0)])
    assert writer.close() == {"groups": [{"size": [4, 4], "count": 1}], "captions": 1, "shape": [1, 1, 3], "sizes": False}


def test_the_index_says_what_was_read_kept_and_skipped(tmp_path):
    mixed(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text("utf-8"))
    first = index["sources"][0]["shards"][0]
    assert first["name"] == "a" and first["read"] == 5 and first["kept"] == 4 and first["skipped"] == {"broken": 1}
    assert first["stats"] == {"mean": [0.0]} and first["stamp"] == "s" and first["captions"] == 4
    assert index["sources"][1]["shards"][0]["groups"] == []


def test_an_incomplete_cache_is_refused_with_the_file_and_the_fix(tmp_path):
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
    with pytest.raises(ValueError, match="gone is incomplete"):
        write_index(tmp_path, {}, [{"spec": "s", "shards": ["gone"]}])
    os.truncate(other / "latents-4x4.npy", 5000)
    with pytest.raises(ValueError, match="should have"):
        write_index(tmp_path, {}, [{"spec": "s", "shards": ["y"]}])
    (folder / "shard.json").write_text("{")
    with pytest.raises(ValueError, match="x is incomplete"):
        write_index(tmp_path, {}, [{"spec": "s", "shards": ["x"]}])
    assert not (tmp_path / "index.json").exists()
    write_index(tmp_path, {}, [{"spec": "s", "shards": ["z"]}])
    with pytest.raises(ValueError, match="holds no samples"):
        Cache(tmp_path)


def test_numbers_outside_the_cache_are_refused(tmp_path):
    cache = mixed(tmp_path)
    for number in (-1, 8):
        with pytest.raises(IndexError):
            cache.latents(np.array([number]))
        with pytest.raises(IndexError):
            cache.captions(number)
    with pytest.raises(ValueError, match="of 2 sizes"):
        cache.latents(np.array([0, 1]))


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path):
    cache = mixed(tmp_path)
    os.truncate(tmp_path / "shards/a/latents-4x4.npy", 4096 + 100)
    with pytest.raises(ValueError, match="ends before"):
        cache.latents(np.array([1]))
