"""The validation loss: held-out samples, the same noise every time, a mean over all levels alike."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from caches import TOKENIZER, many
from torch import nn

from tinyldm.config import make_config
from tinyldm.data.cache import Cache
from tinyldm.data.loader import Loader, keep_back
from tinyldm.diffusion.process import make_process
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.objectives import Objective
from tinyldm.objectives.denoising import Denoising
from tinyldm.training.ema import EMA
from tinyldm.training.validation import Validation, held_out_batch

CPU = torch.device("cpu")


def denoising(**settings) -> Denoising:
    text = SimpleNamespace(modules=["text"], tokenize=lambda captions: torch.from_numpy(TOKENIZER.encode(captions)))
    net = DiT(DiTConfig(width=32, layers=1, heads=2, mlp_width=32))
    return Denoising(make_config(**settings), SimpleNamespace(net=net, text=text, process=make_process("flow")), ("net", "text"))


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
    cache, objective, seen = Cache(tmp_path), denoising(), []
    loader = Loader(cache, [TOKENIZER.fingerprint], batch_size=2, seed=0)
    loader.held_out = np.arange(2)

    def losses(batch, progress):
        seen.append(batch)
        return batch.t * scale + batch.eps.mean((1, 2, 3))

    scale, results = 1.0, []
    for micro in (1, 2):
        validate = Validation(held_out_batch(loader, objective, 3), micro, CPU, losses, objective.to_device)
        results += [validate(), validate()]
    assert results[0] == results[1] and results[0]["loss"] == pytest.approx(results[2]["loss"], rel=1e-6)
    scale = 2.0
    assert validate()["loss"] > results[0]["loss"]
    assert sorted(float(x) for x in torch.cat([batch.t for batch in seen[:2]])) == [0.25, 0.75]
    loader.held_out = np.arange(0)
    assert held_out_batch(loader, objective, 3) is None


def test_held_out_samples_keep_their_captions_and_are_noised_by_the_seed(tmp_path):
    many(tmp_path, 2)
    cache = Cache(tmp_path)
    loader = Loader(cache, [TOKENIZER.fingerprint], batch_size=2, seed=0)
    loader.held_out = np.arange(2)
    one, again, other = (held_out_batch(loader, denoising(caption_dropout=1.0), seed) for seed in (3, 3, 4))
    assert torch.equal(one.x0, torch.from_numpy(cache.latents([0, 1])[:, 0]).float()) and one.mixed is None
    assert torch.equal(one.tokens, torch.from_numpy(TOKENIZER.encode([cache.captions(i)[0][1] for i in (0, 1)])))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(one, again)) and not torch.equal(one.eps, other.eps)


def test_both_the_weights_and_their_averages_are_measured_and_an_objective_without_times_has_no_bins():
    class Batch(NamedTuple):
        x: torch.Tensor

    net = nn.Linear(1, 1, bias=False)
    ema = EMA({"net": net}, 0.5)
    with torch.no_grad():
        net.weight.fill_(3.0), ema.shadow["net.weight"].fill_(5.0)
    validate = Validation(Batch(torch.ones(4, 1)), 3, CPU, lambda batch, progress: net(batch.x).flatten(), lambda batch, device: batch)
    assert validate.measure(ema) == {"val_raw": 3.0, "val_ema": 5.0, "val_bins": None} and validate() == {"loss": 3.0}


def test_an_objective_may_have_no_validation(tmp_path):
    many(tmp_path, 12)
    loader = Loader(Cache(tmp_path), [TOKENIZER.fingerprint], batch_size=4, seed=0, hold_out=3)
    assert held_out_batch(loader, Objective(), 3) is None
