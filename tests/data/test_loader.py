"""The loader: batches depend only on seed and step, for any number of processes, with prefetching or without."""

import gc
import json
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import combinations, small_text

from tinyldm.data.cache import Cache, ShardWriter, write_index, write_tokens
from tinyldm.data.loader import Loader, prefetch
from tinyldm.text.tokenizer import Tokenizer

TOKENIZER = small_text()[0]
SHORTER = Tokenizer(TOKENIZER.vocab, TOKENIZER.merges, 8)
N = 50


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (2, 2)], ids=["plain", "views", "parts"])
def cache(request, tmp_path_factory):
    views, parts = request.param
    folder = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    for name, count in (("a", 30), ("b", 20)):
        shard = folder / "shards" / name
        shard.mkdir(parents=True)
        writer = ShardWriter(shard)
        writer.add(rng.standard_normal((count, views, parts, 4, 4, 4)).astype(np.float16),
                   [[(0, f"a red square {name} {i}"), (1, f"a blue circle {name} {i}")] for i in range(count)])
        (shard / "shard.json").write_text(json.dumps(writer.close() | {"name": name, "kept": count}))
    write_index(folder, {}, [{"spec": "one", "shards": ["a"]}, {"spec": "two", "shards": ["b"]}])
    write_tokens(folder, TOKENIZER)
    write_tokens(folder, SHORTER)
    return Cache(folder)


def loader(cache, **options):
    return Loader(cache, [TOKENIZER.fingerprint], **{"batch_size": 10, "seed": 1, "caption_weights": (1.0, 1.0)} | options)


def same(one, two):
    return (np.array_equal(one.samples, two.samples) and torch.equal(one.latents, two.latents)
            and torch.equal(one.tokens, two.tokens))


def joined(batches):
    batches = list(batches)
    return type(batches[0])(np.concatenate([b.samples for b in batches]), torch.cat([b.latents for b in batches]),
                            torch.cat([b.tokens for b in batches]))


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_batch_is_what_the_cache_holds(cache):
    batch = loader(cache).batch(3)
    assert batch.latents.dtype == torch.float32 and batch.latents.shape == (10, 4, 4, 4) and batch.latents.is_contiguous()
    assert batch.tokens.dtype == torch.int64 and batch.tokens.shape == (10, 16) and batch.samples.dtype == np.int64
    views, parts = cache.shape[:2]
    for i, sample in enumerate(batch.samples):
        stored = [torch.from_numpy(cache.latents(np.array([sample]), np.array([v]))[0]).float() for v in range(views)]
        if parts == 1:
            assert any(torch.equal(batch.latents[i], view[0]) for view in stored)
        texts = [text for _, text in cache.captions(int(sample))]
        assert batch.tokens[i].tolist() in TOKENIZER.encode(texts).tolist()


def test_several_tokenizers_give_their_ids_of_the_same_caption_side_by_side(cache):
    options = {"batch_size": N, "seed": 1, "caption_weights": (1.0, 1.0)}
    one, both = (Loader(cache, fingerprints, **options) for fingerprints in (
        [TOKENIZER.fingerprint], [SHORTER.fingerprint, TOKENIZER.fingerprint]))
    chosen = set()
    for step in range(3):
        alone, batch = one.batch(step), both.batch(step)
        assert batch.tokens.shape == (N, 8 + 16) and torch.equal(batch.tokens[:, 8:], alone.tokens)
        for sample, row in zip(batch.samples, batch.tokens):
            captions = cache.captions(int(sample))
            [kind] = [kind for kind, text in captions if TOKENIZER.encode([text])[0].tolist() == row[8:].tolist()]
            assert SHORTER.encode([captions[kind][1]])[0].tolist() == row[:8].tolist()
            chosen.add(kind)
    assert chosen == {0, 1}


def test_one_fingerprint_that_is_not_in_a_list_is_refused(cache):
    for wrong in (TOKENIZER.fingerprint, []):
        with pytest.raises(TypeError, match="pass a list"):
            Loader(cache, wrong, batch_size=10, seed=0, caption_weights=(1.0, 1.0))


def test_views_and_captions_are_all_drawn(cache):
    run = joined(map(loader(cache).batch, range(60)))
    kinds = (run.tokens[:, 1:] == torch.from_numpy(TOKENIZER.encode(["a blue circle"]))[0, 2]).any(1).float().mean()
    assert 0.4 < kinds < 0.6
    views, parts = cache.shape[:2]
    if parts == 1:
        first = torch.from_numpy(cache.latents(run.samples)[:, 0]).float()
        fraction = (run.latents == first).all(dim=(1, 2, 3)).float().mean()
        assert fraction == 1 if views == 1 else 0.4 < fraction < 0.6


def test_noise_is_drawn_by_the_standard_deviation(cache):
    if cache.shape[1] == 1:
        pytest.skip("no standard deviations in this cache")
    run = joined(map(loader(cache).batch, range(40)))
    noises = []
    for view in (0, 1):
        stored = torch.from_numpy(cache.latents(run.samples, np.full(400, view))).float()
        noises.append((run.latents - stored[:, 0]) / stored[:, 1])
    largest = torch.stack([noise.abs().amax(dim=(1, 2, 3)) for noise in noises])
    noise = torch.where((largest[0] < largest[1])[:, None, None, None], *noises)        # the other view gives larger values
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.05
    assert len(torch.unique((noise[:, 0, 0, 0] * 100).round())) > 100


@pytest.mark.parametrize("world", [2, 3, 10])
def test_any_number_of_processes_sees_the_same_global_batch(cache, world):
    whole = [loader(cache).batch(step) for step in range(4)]
    for step, batch in enumerate(whole):
        parts = [loader(cache, rank=rank, world=world).batch(step) for rank in range(world)]
        assert same(joined(parts), batch)
        assert [len(part.samples) for part in parts] == [len(a) for a in np.array_split(np.arange(10), world)]


def test_starting_anywhere_gives_the_same_batches_as_running_there(cache):
    ahead = list(prefetch(loader(cache).batch, 0, 12))
    assert len(ahead) == 12
    for step, batch in zip(range(7, 12), prefetch(loader(cache).batch, 7, 12)):
        assert same(batch, ahead[step]) and same(loader(cache).batch(step), batch)
    assert not same(loader(cache, seed=2).batch(0), ahead[0])
    assert list(prefetch(loader(cache).batch, 5, 5)) == []


def test_two_steps_and_two_seeds_draw_differently(cache):
    """Compares the kinds of captions at the positions of a batch."""
    blue = TOKENIZER.encode(["a blue circle"])[0, 2]
    one, two = loader(cache, batch_size=N), loader(cache, batch_size=N, seed=2)
    kinds = [(batch.tokens[:, 2] == blue) for batch in (one.batch(0), one.batch(1), two.batch(0))]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert 10 < (kinds[i] != kinds[j]).sum() < 40


def test_weights_mix_the_sources(cache):
    run = joined(map(loader(cache, weights=[Fraction(1), Fraction(4)]).batch, range(10)))
    assert (run.samples >= 30).sum() == 80


def test_an_error_in_the_thread_reaches_the_caller_after_the_results_before_it():
    def make(position):
        if position == 3:
            raise OSError("disk gone")
        return position

    seen = []
    with pytest.raises(OSError, match="disk gone"):
        for result in prefetch(make, 0, 10):
            seen.append(result)
    assert seen == [0, 1, 2] and not threads()


@pytest.mark.parametrize("stop, depth", combinations(2, [None, 10**9], [1, 4]))
def test_leaving_early_ends_the_thread(depth, stop):
    numbers = lambda: prefetch(lambda position: position, 7, stop, depth)
    run = numbers()
    assert next(run) == 7 and len(threads()) == 1
    run.close()
    assert not threads()
    for _ in numbers():
        break
    gc.collect()
    assert not threads()
    with pytest.raises(KeyboardInterrupt):
        run = numbers()
        for _ in run:
            run.throw(KeyboardInterrupt)
    assert not threads()
    list(prefetch(lambda position: position, 0, 3))
    assert not threads()


def test_no_more_than_depth_results_wait():
    made, enough = [], threading.Event()

    def counts(position):
        made.append(position)
        if len(made) == 5:
            enough.set()
        return position

    run = prefetch(counts, 0, 100, depth=3)
    assert next(run) == 0
    assert enough.wait(10)                                  # one result returned, three in the queue, one that the thread holds
    threading.Event().wait(0.05)
    assert made == [0, 1, 2, 3, 4]
    run.close()


@pytest.mark.parametrize("options, message", [
    ({"rank": 2, "world": 2}, "ranks run from 0 to 1"), ({"rank": -1, "world": 2}, "ranks run"),
    ({"world": 11}, "--batch-size 11"),
    ({"caption_weights": (1.0,)}, "2 kinds"), ({"weights": [Fraction(1)]}, "for 2 sources")])
def test_impossible_options_are_refused_at_once(cache, options, message):
    with pytest.raises(ValueError, match=message):
        loader(cache, **options)


def test_a_tokenizer_without_tokens_in_the_cache_is_refused_at_once(cache):
    with pytest.raises(ValueError, match="not encoded by this tokenizer"):
        Loader(cache, ["0" * 64], batch_size=10, seed=0, caption_weights=(1.0, 1.0))


def test_without_depth_each_result_is_made_when_it_is_asked_for_and_there_is_no_thread():
    made = []
    run = prefetch(lambda position: made.append(position) or position, 7, depth=0)
    assert [next(run), next(run)] == [7, 8] and made == [7, 8] and not threads()
    run.close()
    assert list(prefetch(lambda position: position, 3, 6, depth=0)) == [3, 4, 5]
