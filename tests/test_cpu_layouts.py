"""Weights that are laid out once for a CPU: the same answers, for inputs of any size, and one copy of each weight."""

import pytest
import torch
from helpers import randomise
from small_models import MODELS, unet_model
from torch import nn

from tinyldm import cpu_layouts
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.pipeline import draw, draw_settings

NETS = {"unet": lambda: MODELS["unet"]().net, "mmdit": lambda: MODELS["mmdit"]().net,
        "dit": lambda: randomise(DiT(DiTConfig(patch=2, width=32, layers=2, heads=2, mlp_width=64, context_dim=32, time_dim=8)), 1)}
native = pytest.mark.skipif(not cpu_layouts.packable(torch.bfloat16), reason="this CPU or build of torch has no packed bfloat16 weights")


def answers(net, dtype):
    """For batches and pictures of several sizes, the first of them the smallest."""
    generator, config = torch.Generator().manual_seed(0), net.config
    for batch, side in ((1, 8), (3, 8), (2, 16)):
        x = torch.randn(batch, config.in_channels, side, side, generator=generator).to(dtype)
        pooled = torch.randn(batch, config.pooled_dim, generator=generator).to(dtype) if config.pooled_dim else None
        context = torch.randn(batch, 5, config.context_dim, generator=generator).to(dtype)
        yield net(x, torch.full((batch,), 300.0), Cond(context, pooled=pooled))


@native
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_weights_give_the_same_answers_for_inputs_of_every_size(name, dtype):
    net, vae = NETS[name]().to(dtype), unet_model().vae
    with torch.inference_mode():
        expected = list(answers(net.to(memory_format=torch.channels_last), dtype))
        cpu_layouts.lay_out(net, vae)
        found = list(answers(net, dtype))
    for one, other in zip(found, expected):
        # In bfloat16 every product gives the same bits; the first layer's input is in another order in memory, and so norms round differently.
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=(2e-2 if dtype == torch.bfloat16 else 1e-5) * float(other.abs().max()))


@native
@pytest.mark.parametrize("layer, shape", [(nn.Linear(40, 24), (2, 7, 40)), (nn.Linear(16, 8, bias=False), (3, 16)),
                                          (nn.Conv2d(8, 16, 3, padding=1), (2, 8, 6, 10)), (nn.Conv2d(8, 8, 3, stride=2, padding=1), (2, 8, 6, 10)),
                                          (nn.Conv2d(4, 12, 2, stride=2), (1, 4, 8, 8)), (nn.Conv2d(8, 4, 1), (1, 8, 5, 5))])
def test_a_packed_layer_gives_the_same_bits_in_bfloat16(layer, shape):
    layer = layer.bfloat16()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        packed = cpu_layouts.PACKED[type(layer), torch.bfloat16](layer, x)
        for inputs in (x, x[:1], torch.cat([x, x, x])):
            assert torch.equal(packed(inputs), layer(inputs))


@native
def test_there_is_one_copy_of_every_weight_and_its_dtype_can_still_be_asked_for():
    net = NETS["unet"]().bfloat16()
    cpu_layouts.lay_out(net, unet_model().vae)
    with torch.inference_mode():
        list(answers(net, torch.bfloat16))
    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    assert layers and not sum(layer.weight.numel() for layer in layers)
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}


def test_where_torch_lacks_the_functions_nothing_changes(monkeypatch):
    model = unet_model()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    before = {name: p.clone() for name, p in model.net.state_dict().items()}
    cpu_layouts.lay_out(model.net, model.vae)
    draw(model, ["a"], [0], draw_settings(model))
    assert all(torch.equal(before[name], p) for name, p in model.net.state_dict().items())


@native
def test_a_model_draws_the_same_pictures_after_it():
    """Also in the second picture, and in a batch of another size."""
    model, laid_out = unet_model(), unet_model()
    cpu_layouts.lay_out(laid_out.net, laid_out.vae)
    settings = draw_settings(model)
    for prompts, seeds in ((["a"], [0]), (["a", "b", "c"], [1, 2, 3])):
        one, other = (draw(each, prompts, seeds, settings).astype(int) for each in (model, laid_out))
        assert abs(one - other).max() <= 1
