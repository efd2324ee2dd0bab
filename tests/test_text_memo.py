"""What depends on the text alone is computed once per picture: the same picture to the last bit, and nothing passes to the next."""

from dataclasses import replace

import pytest
import torch
from helpers import PROMPT, randomise
from small_models import MODELS, drawn, unet_model

from tinyldm import pipeline
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.pipeline import draw, draw_settings


def dit_model():
    model = unet_model()                        # a DiT has no size of its own
    net = randomise(DiT(DiTConfig(width=32, layers=4, heads=2, mlp_width=64, context_dim=32)), 5)
    return replace(model, net=net, defaults=model.defaults | {"resolution": 16})


MADE = {**MODELS, "dit": dit_model}
forget = lambda net, cond: cond


def text_layers(net):
    """The layers that see only the text."""
    return [layer for name, layer in net.named_modules() if name.endswith(("cross_attention.to_k", "cross_attention.to_v", "cross.to_k",
                                                                           "cross.to_v", "context_in.0"))]


def count(net) -> list[int]:
    """The number of conditions in each call of a layer that sees only the text."""
    calls = []
    for layer in text_layers(net):
        layer.register_forward_hook(lambda layer, inputs, out: calls.append(len(out)))
    return calls


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("options", [{}, {"interval": (0.3, 3.0)}, {"cfg": 1.0}], ids=["guided", "interval", "unguided"])
def test_a_picture_is_the_same_to_the_last_bit_where_keys_and_values_are_remembered(name, options, monkeypatch):
    model = MADE[name]()
    remembered = drawn(model, **options)
    monkeypatch.setattr(pipeline, "remembering", forget)
    assert (remembered == drawn(model, **options)).all()


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_layers_of_the_text_work_once_for_each_batch_of_conditions_and_not_in_every_step(name):
    model = MADE[name]()
    calls, layers = count(model.net), len(text_layers(model.net))
    drawn(model)
    assert calls == [4] * layers                            # two prompts and two negative ones, of three steps
    calls.clear()
    drawn(model, interval=(0.3, 3.0), sampling=draw_settings(model, sampler="heun").sampling)
    assert sorted(calls) == [2] * layers + [4] * layers     # and the prompts alone, where there is no guidance


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_the_next_prompt_and_changed_weights_find_nothing_remembered(name):
    model = MADE[name]()
    picture = lambda prompt: draw(model, [prompt], [3], draw_settings(model))
    first, second = picture(PROMPT), picture("a small green triangle")
    assert (first != second).any() and (second == picture("a small green triangle")).all() and (first == picture(PROMPT)).all()
    with torch.no_grad():
        text_layers(model.net)[0].weight.mul_(-1)
    changed = picture(PROMPT)
    assert (changed != first).any()
    model.net = type(model.net)(model.net.config).requires_grad_(False).eval()
    assert (picture(PROMPT) != changed).any()


@torch.no_grad()
def test_a_network_fills_a_memo_in_the_first_call_and_answers_from_it_in_the_next():
    model = dit_model()
    x, cond = torch.randn(2, 4, 8, 8), Cond(torch.randn(2, 5, 32), torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    told = replace(cond, memo={})
    for t in (900.0, 20.0):
        assert torch.equal(model.net(x, torch.full((2,), t), told), model.net(x, torch.full((2,), t), cond))
    assert len(told.memo) == 1 + len(model.net.blocks) and cond.memo is None
    assert told.cat(told).memo is None and all(part.memo is None for part in told.tensor_split(2))


@pytest.mark.parametrize("of", ["network", "blocks"])
def test_a_network_that_is_compiled_or_whose_blocks_are_is_given_no_memo(of):
    model, conds = dit_model(), []
    plain = model.net._call_impl
    model.net.forward = lambda x, t, cond: conds.append(cond) or torch.zeros_like(x)
    (model.net if of == "network" else model.net.blocks[1])._compiled_call_impl = plain
    drawn(model)
    assert len(conds) == 3 and all(cond.memo is None for cond in conds)
