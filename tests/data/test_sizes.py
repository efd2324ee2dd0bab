"""What a network can be told about where its pictures come from: their size as they were found, the crop, and the size they have now."""

import json

import numpy as np
import pytest
import torch
from archives import encode, noise
from caches import SQUARE, TOKENIZER, caption, latents, many
from preparing import run, settings

from tinyldm.data.cache import Cache, ShardWriter, write_index, write_tokens
from tinyldm.data.decoding import Framing, decode_with_sizes
from tinyldm.data.loader import Loader

BUCKETS = ((24, 40), (32, 32), (40, 24))


@pytest.mark.parametrize("size, framing, wanted", [         # sizes: height, width
    ((60, 100), Framing(32), [60, 100, 0, 11, 32, 32]),     # scaled to 32 x 53.3, of which 21.3 columns are cut off
    ((100, 60), Framing(32), [100, 60, 11, 0, 32, 32]),
    ((60, 100), Framing(32, BUCKETS), [60, 100, 0, 0, 24, 40]),
    ((60, 110), Framing(32, BUCKETS), [60, 110, 0, 2, 24, 40]),      # scaled to 24 x 44
    ((100, 62), Framing(32, BUCKETS), [100, 62, 0, 0, 40, 24]),      # scaled to 40 x 24.8: 0.4 columns are none
    ((16, 8), Framing(32), [16, 8, 16, 0, 32, 32]),         # enlarged to 64 x 32
    ((32, 32), Framing(32), [32, 32, 0, 0, 32, 32]),
])
def test_sizes_are_those_of_the_picture_as_found_of_the_crop_in_the_scaled_one_and_of_the_result(size, framing, wanted):
    picture = noise(*size, 3)
    for data in (picture, encode(picture), encode(picture, "JPEG")):
        found = decode_with_sizes(data, framing)
        assert found.sizes() == wanted and found.sizes(mirrored=True) == wanted


# ---------------------------------------------------------------- in a cache


def prepared(tmp_path, **changes):
    """Pictures of 21 x 16, 16 x 21 and 40 x 16 (height x width), which become 16 x 16, with mirrored views."""
    (tmp_path / "d").mkdir()
    for i, size in enumerate([(21, 16), (16, 21), (40, 16)]):
        (tmp_path / "d" / f"{i}.png").write_bytes(encode(noise(*size, 3)))
        (tmp_path / "d" / f"{i}.txt").write_text(f"{i}")
    return run(settings(tmp_path, "d", **{"resolution": 16, "flip": True} | changes), tmp_path / "cache")


WANTED = {"0": [[21, 16, 2, 0, 16, 16]] * 2, "1": [[16, 21, 0, 2, 16, 16], [16, 21, 0, 3, 16, 16]], "2": [[40, 16, 12, 0, 16, 16]] * 2}


def test_a_cache_holds_the_sizes_of_each_picture_and_of_its_mirror_image(tmp_path):
    cache = prepared(tmp_path)
    for opened in (cache, Cache(tmp_path / "cache")):
        assert opened.has_sizes
        for i in range(3):
            assert opened.picture_sizes(np.array([i, i]), np.array([0, 1])).tolist() == WANTED[opened.captions(i)[0][1]]


def test_with_buckets_the_sizes_stay_beside_their_pictures(tmp_path):
    cache = prepared(tmp_path, buckets=4.0, network="dit", dit={"patch": 2}, flip=False)
    found = {cache.captions(i)[0][1]: cache.picture_sizes(np.array([i]))[0].tolist() for i in range(3)}
    for i in range(3):
        rows, columns = cache.latents(np.array([i])).shape[-2:]
        assert found[cache.captions(i)[0][1]][4:] == [2 * rows, 2 * columns]        # of this autoencoder a latent is 2 pixels wide
    assert [found[name][:2] for name in "012"] == [[21, 16], [16, 21], [40, 16]] and found["2"][2:] == [5, 0, 20, 12]     # of 30 x 12


def test_a_loader_tells_the_sizes_of_the_views_that_it_draws_to_each_process_its_own(tmp_path):
    cache = prepared(tmp_path)
    write_tokens(tmp_path / "cache", TOKENIZER)
    make = lambda **options: Loader(cache, [TOKENIZER.fingerprint], batch_size=6, seed=0, **options)
    assert make().batch(0).sizes is None
    seen = set()
    for step in range(8):
        batch = make(sizes=True).batch(step)
        assert batch.sizes.dtype == torch.float32 and batch.sizes.shape == (6, 6)
        for sample, latent, sizes in zip(batch.samples, batch.latents, batch.sizes.tolist()):
            view, = (view for view in (0, 1) if (cache.latents(np.array([sample]), np.array([view]))[0, 0] == latent.numpy()).all())
            assert sizes == WANTED[cache.captions(sample)[0][1]][view]
            seen.add((int(sample), view))
        parts = [make(sizes=True, rank=rank, world=4).batch(step).sizes for rank in range(4)]
        assert torch.equal(torch.cat(parts), batch.sizes)
    assert len(seen) == 6


def test_held_out_pictures_have_the_sizes_of_their_first_view(tmp_path):
    cache = prepared(tmp_path)
    write_tokens(tmp_path / "cache", TOKENIZER)
    loader = Loader(cache, [TOKENIZER.fingerprint], batch_size=1, seed=0, sizes=True)
    assert loader.held_out_batch() is None
    loader.held_out = np.arange(3)
    assert loader.held_out_batch().sizes.tolist() == [WANTED[cache.captions(i)[0][1]][0] for i in range(3)]


def test_a_cache_without_sizes_trains_what_is_not_told_them_and_nothing_else(tmp_path):
    many(tmp_path, 2)
    index = json.loads((tmp_path / "index.json").read_text())
    assert not any("sizes" in shard for source in index["sources"] for shard in source["shards"]), "an old index stays as it is"
    cache = Cache(tmp_path)
    assert not cache.has_sizes and Loader(cache, [TOKENIZER.fingerprint], batch_size=2, seed=0).batch(0).sizes is None
    for refused in (lambda: Loader(cache, [TOKENIZER.fingerprint], batch_size=2, seed=0, sizes=True),
                    lambda: cache.picture_sizes(np.array([0]))):
        with pytest.raises(ValueError, match=rf"{tmp_path} was made before .*: delete {tmp_path} and run prepare.py .*again"):
            refused()


def written(folder, name, sizes):
    (folder / "shards" / name).mkdir(parents=True)
    writer = ShardWriter(folder / "shards" / name)
    if sizes is not Ellipsis:
        writer.add(latents(0, 1, SQUARE), [caption(0)], sizes)
    (folder / "shards" / name / "shard.json").write_text(json.dumps(writer.close() | {"name": name}))


def test_one_shard_without_sizes_is_enough_and_an_empty_one_is_none(tmp_path):
    for name, sizes in (("a", [[[1, 2, 3, 4, 5, 6]]]), ("empty", ...), ("old", None)):
        written(tmp_path, name, sizes)
    write_index(tmp_path, {}, [{"spec": "s", "shards": ["a", "empty"]}])
    assert Cache(tmp_path).picture_sizes(np.array([0])).tolist() == [[1, 2, 3, 4, 5, 6]]
    write_index(tmp_path, {}, [{"spec": "s", "shards": ["a", "empty", "old"]}])
    assert not Cache(tmp_path).has_sizes


def test_a_cut_off_file_of_sizes_is_noticed(tmp_path):
    written(tmp_path, "a", [[[1, 2, 3, 4, 5, 6]]])
    write_index(tmp_path, {}, [{"spec": "s", "shards": ["a"]}])
    file = tmp_path / "shards" / "a" / "sizes.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"sizes\.npy has 4,116 bytes and should have 4,120"):
        Cache(tmp_path)
