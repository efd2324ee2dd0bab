"""The validation loss: held-out samples, the same noise every time, a mean over all levels alike."""

import numpy as np
import pytest
import torch
from caches import TOKENIZER, many

from tinyldm.data.cache import Cache
from tinyldm.data.loader import Loader, keep_back
from tinyldm.training.validation import Validation

CPU = torch.device("cpu")


def test_what_is_held_out_is_never_drawn(tmp_path):
    many(tmp_path, 12)
    cache = Cache(tmp_path)
    loader = Loader(cache, [TOKENIZER.fingerprint], batch_size=4, seed=0, hold_out=3)
    drawn = {int(i) for step in range(len(cache)) for i in loader.batch(step).samples}
    assert 0 < len(loader.held_out) <= 3 and drawn == set(range(len(cache))) - set(loader.held_out.tolist())


def test_a_tenth_at_most_is_held_out_from_the_largest_part():
    ranges = [{(4, 4): range(0, 30)}, {(4, 4): range(30, 35), (2, 8): range(35, 75)}]
    left, held = keep_back(ranges, 100)
    assert held.tolist() == [71, 72, 73, 74]
    assert left == [{(4, 4): range(0, 30)}, {(4, 4): range(30, 35), (2, 8): range(35, 71)}] and ranges[1][2, 8] == range(35, 75)
    left, held = keep_back([{(4, 4): range(0, 5)}], 100)
    assert left == [{(4, 4): range(0, 5)}] and not len(held)


def test_only_the_network_makes_a_difference(tmp_path):
    many(tmp_path, 2)
    cache = Cache(tmp_path)
    held, seen = np.arange(2), []

    def losses(x0, eps, t, mixed, tokens):
        seen.append((x0, eps, t, tokens))
        return t * scale + eps.mean((1, 2, 3))

    scale, results = 1.0, []
    for micro in (1, 2):
        validate = Validation(cache, held, TOKENIZER.fingerprint, 3, micro, CPU, losses)
        results += [validate(), validate()]
    assert results[0] == results[1] and results[0]["loss"] == pytest.approx(results[2]["loss"], rel=1e-6)
    scale = 2.0
    assert validate()["loss"] > results[0]["loss"]
    assert sorted(float(x) for x in torch.cat([t for _, _, t, _ in seen[:2]])) == [0.25, 0.75]
    assert Validation(cache, held[:0], TOKENIZER.fingerprint, 3, 1, CPU, losses)() == {}
