from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tinyldm.models import layers
from tinyldm.models.layers import Attention, Cond, dot_product_attention


def cond(b: int, **extra) -> Cond:
    return Cond(torch.randn(b, 7, 12), torch.ones(b, 7, dtype=torch.bool), torch.randn(b, 5), extra)


def test_conditions_are_joined_along_the_batch_with_all_their_parts():
    a, b = cond(2, sizes=torch.randn(2, 6), scale=torch.randn(2)), cond(3, scale=torch.randn(3), sizes=torch.randn(3, 6))
    joined = a.cat(b)
    for name in ("context", "mask", "pooled"):
        assert torch.equal(getattr(joined, name), torch.cat([getattr(a, name), getattr(b, name)]))
    assert {name: value.shape for name, value in joined.extra.items()} == {"sizes": (5, 6), "scale": (5,)}
    assert torch.equal(joined.extra["scale"], torch.cat([a.extra["scale"], b.extra["scale"]]))


def test_a_condition_of_text_alone_stays_one():
    joined = Cond(torch.zeros(1, 7, 12)).cat(Cond(torch.ones(1, 7, 12)))
    assert joined.context.shape == (2, 7, 12)
    assert joined.mask is None and joined.pooled is None and joined.extra == {}


@pytest.mark.parametrize("extra", [{}, {"size": torch.arange(10).view(5, 2), "scale": torch.rand(5)}])
def test_a_condition_is_cut_along_the_batch_as_a_tensor_is_and_joins_again(extra):
    whole = cond(5, **extra)
    parts = whole.tensor_split(3)
    assert [len(part.context) for part in parts] == [2, 2, 1] == [len(part) for part in whole.mask.tensor_split(3)]
    joined = parts[0].cat(parts[1]).cat(parts[2])
    assert all(torch.equal(getattr(joined, name), getattr(whole, name)) for name in ("context", "mask", "pooled"))
    assert joined.extra.keys() == extra.keys() and all(torch.equal(joined.extra[name], value) for name, value in extra.items())
    assert all(part.context.untyped_storage().data_ptr() == whole.context.untyped_storage().data_ptr() for part in parts)
    bare = Cond(torch.zeros(5, 7, 12)).tensor_split(2)
    assert [len(part.context) for part in bare] == [3, 2] and all(part.mask is part.pooled is None for part in bare)


def test_conditions_with_different_extras_cannot_be_joined():
    with pytest.raises(ValueError, match=r"extra \['scale'\] and \['sizes'\] cannot be joined: give both the same names"):
        cond(1, scale=torch.ones(1)).cat(cond(1, sizes=torch.ones(1, 6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_numbers_weighs_tokens(dtype):
    torch.manual_seed(0)
    attention, x, context = Attention(16, 2, context_dim=8).to(dtype), torch.randn(1, 3, 16, dtype=dtype), torch.randn(1, 4, 8, dtype=dtype)
    weigh = lambda context, *weights: attention(x, context, torch.tensor([weights]))
    close = partial(torch.testing.assert_close, **dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=0.02, atol=0.01))
    close(weigh(context, 1.0, 1.0, 0.0, 1.0), weigh(context, True, True, False, True))
    twice = torch.cat([context, context[:, :1]], 1)             # the first token again: half of it in each place is all of it
    close(weigh(twice, 0.5, 1.0, 1.0, 1.0, 0.5), weigh(context, True, True, True, True))
    close(weigh(twice, 0.25, 0.5, 0.5, 0.5, 0.25), weigh(context, True, True, True, True))


@pytest.mark.parametrize("given", ["nothing", "mask", "weights", "causal"])
def test_plain_products_in_training_are_the_kernel_s_answer_and_gradients(given, monkeypatch):
    monkeypatch.setattr(layers, "_plain", True)
    rng = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(2, 3, n, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    q, k, v = draw(5), draw(5), draw(5)
    mask = {"mask": torch.tensor([[True, True, False, True, False]]), "weights": torch.randn(1, 5, generator=rng, dtype=torch.float64)}.get(given)
    plain = dot_product_attention(q, k, v, mask, causal=given == "causal")
    kernel = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=given == "causal")
    assert type(plain.grad_fn) is not type(kernel.grad_fn)
    direction = torch.randn(plain.shape, generator=rng, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * direction).sum(), (q, k, v)) for out in (plain, kernel)]
    for one, two in zip((plain, *gradients[0]), (kernel, *gradients[1])):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(dot_product_attention(q, k, v, mask, causal=given == "causal"), kernel)
