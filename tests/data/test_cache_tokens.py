"""Token ids in a cache: of the right sample, of one caption among several, and written once per tokenizer."""

from collections import Counter

import numpy as np
import pytest
from caches import TOKENIZER, mixed

from tinyldm.data.cache import Cache, write_tokens
from tinyldm.text.tokenizer import Tokenizer


def text_of(row):
    """The number in the caption that a row of token ids encodes."""
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


def test_with_one_caption_per_sample_first_npy_and_kinds_npy_are_not_read(tmp_path):
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
    write_tokens(tmp_path, shorter)
    (tmp_path / f"shards/b/tokens-{shorter.fingerprint[:12]}.npy").unlink()
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
    write_tokens(tmp_path, TOKENIZER)                                   # an incomplete file is written again
    assert file.read_bytes() == content


def test_tokens_may_be_stored_outside_a_cache(tmp_path):
    whole = mixed(tmp_path / "cache")
    before = sorted((tmp_path / "cache").rglob("*"))
    write_tokens(tmp_path / "cache", TOKENIZER, tmp_path / "tokens")
    assert sorted((tmp_path / "cache").rglob("*")) == before
    outside = Cache(tmp_path / "cache", tmp_path / "tokens")
    samples, u = np.arange(len(whole)), np.linspace(0, 0.99, len(whole))
    write_tokens(tmp_path / "cache", TOKENIZER)
    assert (outside.tokens(samples, TOKENIZER.fingerprint, u, (0.5, 0.5)) == Cache(tmp_path / "cache").tokens(
        samples, TOKENIZER.fingerprint, u, (0.5, 0.5))).all()


def test_large_vocabularies_take_four_bytes_an_id(tmp_path):
    cache = mixed(tmp_path)
    large = Tokenizer(TOKENIZER.vocab | {f"filler{i}": i for i in range(len(TOKENIZER), 70_000)}, TOKENIZER.merges, 8)
    large.vocab["<|endoftext|>"], large.eos_token_id = 69_999, 69_999
    write_tokens(tmp_path, large)
    assert np.load(tmp_path / f"shards/a/tokens-{large.fingerprint[:12]}.npy").dtype == np.uint32
    tokens = cache.tokens(np.array([0, 3]), large.fingerprint, np.zeros(2), (1.0, 1.0))
    assert np.array_equal(tokens, large.encode([cache.captions(i)[0][1] for i in (0, 3)]))


def test_the_fingerprint_of_a_tokenizer_depends_on_everything_that_determines_its_ids():
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
