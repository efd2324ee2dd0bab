"""Shorter calls of a network while a picture is drawn: with which network and when, what is reused, and how far the picture moves."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FluxPipeline,
    FluxTransformer2DModel,
    apply_first_block_cache,
)
from helpers import later, mistake, randomise
from small_models import MODELS, drawn
from test_text_memo import dit_model

from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import SkipLayers, denoiser
from tinyldm.diffusion.process import Flow
from tinyldm.diffusion.samplers import ddim, dpmpp_2m, final, heun
from tinyldm.folders.rename import export_renamed
from tinyldm.model import repeated_blocks
from tinyldm.models.flux import Flux, FluxConfig
from tinyldm.models.layers import Cond
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.pipeline import draw, draw_settings
from tinyldm.shortcuts import (
    SHORTCUTS,
    DeepCache,
    FirstBlockCache,
    Shortcut,
    find_shortcut,
)
from tinyldm.vendor_loaders import flux

LEVELS = grid(Flow(), 12)


def flux_model():
    net = Flux(FluxConfig(in_channels=4, out_channels=4, width=32, heads=2, double_layers=2, single_layers=2, context_dim=32, pooled_dim=32,
                          rope_axes=(4, 6, 6)))
    return replace(dit_model(), net=randomise(net, 5))


MADE = {**MODELS, "dit": dit_model, "flux": flux_model}
KINDS = [("deep_cache", "unet"), *(("first_block_cache", name) for name in ("dit", "mmdit", "flux"))]
SAMPLED = [pytest.param(sampler, *kind, marks=later(3, i, j))
           for i, sampler in enumerate((ddim, dpmpp_2m, heun)) for j, kind in enumerate(KINDS)]
PLAIN = {"deep_cache": 1, "first_block_cache": 0.0}


def calm(net, scale: float = 0.3):
    """A network whose blocks answer nearly the same from step to step, as those of trained ones do."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "time" in name or "modulation" in name:
                p.mul_(scale)
    return net


def inputs(net, b: int = 2):
    g = torch.Generator().manual_seed(0)
    config = net.config
    rand = lambda *shape: torch.randn(*shape, generator=g)
    return rand(b, config.in_channels, 8, 8), Cond(rand(b, 5, config.context_dim), None,
                                                   rand(b, config.pooled_dim) if config.pooled_dim else None)


@torch.no_grad()
def sampled(name: str, model: str, value: float, sampler=ddim, net=None):
    """(the latents of a sampler, the shortcut with its counts)."""
    net = calm(MADE[model]().net) if net is None else net
    shortcut, (x, cond) = Shortcut(name, value, net), inputs(net)
    return final(sampler(shortcut.wrap(denoiser(net, cond, "flow"), net, LEVELS), x, LEVELS)), shortcut


@torch.no_grad()
def plain(model: str, sampler=ddim):
    net = calm(MADE[model]().net)
    x, cond = inputs(net)
    return final(sampler(denoiser(net, cond, "flow"), x, LEVELS))


@pytest.mark.parametrize("sampler, name, model", SAMPLED)
def test_where_every_call_is_full_the_picture_is_the_plain_sampler_s_to_the_last_bit(name, model, sampler):
    found, shortcut = sampled(name, model, PLAIN[name], sampler)
    assert torch.equal(found, plain(model, sampler))
    assert shortcut.short == 0 and shortcut.calls == (23 if sampler is heun else 12)


@pytest.mark.parametrize("sampler, name, model", SAMPLED)
def test_the_more_calls_are_short_the_larger_the_error_and_it_is_small_at_first(name, model, sampler):
    exact = plain(model, sampler)
    values = (1, 2, 4, 12) if name == "deep_cache" else (0.0, 0.09, 0.2, 0.9)
    results = [sampled(name, model, value, sampler) for value in values]
    errors = [((found - exact).norm() / exact.norm()).item() for found, _ in results]
    counts = [shortcut.short for _, shortcut in results]
    assert errors[0] == 0 and all(a < b for a, b in pairwise(errors)) and errors[1] < 0.05, errors
    assert counts[0] == 0 and all(a < b for a, b in pairwise(counts)), counts


@pytest.mark.parametrize("sampler, calls, short", [(ddim, 12, 6), (dpmpp_2m, 12, 6), (heun, 23, 12)])
def test_deep_cache_runs_the_whole_network_in_the_first_fifth_of_the_steps_and_then_in_every_third_call(sampler, calls, short):
    """Steps 0, 1, 2, then 5, 8 and 11. Heun has called the network five times before step 3, and 18 times after that."""
    _, shortcut = sampled("deep_cache", "unet", 3, sampler)
    assert (shortcut.calls, shortcut.short) == (calls, short)


@torch.no_grad()
def test_a_short_call_of_deep_cache_is_the_last_block_over_the_feature_map_of_the_full_one():
    net = randomise(UNet(UNetConfig(widths=(16, 32), depth=1, attention=(True, True), heads=(4, 4), context_dim=32, groups=8)), 1)
    (x, cond), other, below = inputs(net), torch.randn(2, 4, 8, 8), []
    watch = net.up[-1].resnets[-1].register_forward_pre_hook(lambda block, args: below.append(args[0][:, :-16]))
    net.tap, ran = DeepCache(net, 2), []
    for module in net.modules():
        module.register_forward_hook(lambda module, *_: ran.append(module))
    net.tap.begin(True, 5, 9)
    net(x, torch.full((2,), 500.0), cond)
    ran.clear()
    net.tap.begin(False, 6, 9)
    found = net(other, torch.full((2,), 450.0), cond)
    blocks = [module for module in ran if module in repeated_blocks(net)]
    assert blocks == [net.up[-1].resnets[-1], net.up[-1].attentions[-1]]
    assert not {*ran} & {level.resample for level in (*net.down, *net.up)}         # nor are feature maps resized for nobody
    watch.remove()
    emb, h = net.embed(torch.full((2,), 450.0), cond), net.conv_in(other)
    h = net.up[-1].attentions[-1](net.up[-1].resnets[-1](torch.cat([below[0], h], 1), emb), cond)
    assert torch.equal(found, net.conv_out(torch.nn.functional.silu(net.norm_out(h))))


@torch.no_grad()
def test_the_first_block_cache_answers_what_diffusers_does():
    """Call by call, on one network, without the last step that is full here and not there."""
    net, full = calm(flux_model().net), []
    theirs = FluxTransformer2DModel.from_config(flux.to_config(net.config)).eval()
    theirs.load_state_dict(export_renamed(net.state_dict(), flux.DIFFUSERS_RULES))
    apply_first_block_cache(theirs, FirstBlockCacheConfig(threshold=0.05))
    (x, cond), ids = inputs(net), FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
    net.tap = FirstBlockCache(net, 0.05)
    for i, t in enumerate((900.0, 880.0, 850.0, 600.0, 590.0)):
        noisy = x + i / 50
        net.tap.begin(i == 0, i, 99)
        found = net(noisy, torch.full((2,), t), cond)
        full.append(net.tap.full)
        with theirs.cache_context("one"):
            wanted = theirs(FluxPipeline._pack_latents(noisy, 2, 4, 8, 8), cond.context, cond.pooled, torch.full((2,), t / 1000), ids,
                            torch.zeros(5, 3)).sample
        torch.testing.assert_close(found, FluxPipeline._unpack_latents(wanted, 64, 64, 8), rtol=1e-4, atol=1e-5)
    assert len({*full}) == 2 and full[0], full


@pytest.mark.parametrize("model", ["dit", "mmdit", "flux"])
def test_short_calls_run_the_first_block_alone_and_never_in_the_first_and_the_last_step(model):
    net, runs = calm(MADE[model]().net), []
    blocks = repeated_blocks(net)
    for block in blocks:
        block.register_forward_hook(lambda block, *_: runs.append(blocks.index(block)))
    _, shortcut = sampled("first_block_cache", model, 0.9, net=net)
    assert shortcut.short == 10 and runs == [*range(4), *[0] * 10, *range(4)]


def test_conditions_have_a_state_of_their_own_and_one_that_was_not_called_begins_anew():
    """With an interval of guidance, the conditional half is called alone before and after it."""
    model = calm_model("dit")
    how = draw_settings(model, steps=12, shortcuts={"first_block_cache": 0.9})
    drawn_so = drawn(model, **how._replace(interval=(1.0, 3.0))._asdict())
    assert how.shortcut.calls == 12 and how.shortcut.short == 12 - 1 - 1 - 1 - 1    # the first of each of three spans, and the last
    assert drawn_so.shape == drawn(model).shape


def calm_model(name):
    model = MADE[name]()
    return replace(model, net=calm(model.net))


def test_a_single_block_and_blocks_that_add_nothing_are_always_run():
    from tinyldm.models.dit import DiT, DiTConfig
    for layers, wake in ((1, True), (3, False)):
        net = DiT(DiTConfig(width=32, layers=layers, heads=2, mlp_width=64, context_dim=32))
        _, shortcut = sampled("first_block_cache", "dit", 0.9, net=randomise(net, 1) if wake else net)
        assert shortcut.short == 0


def test_a_network_keeps_no_shortcut_after_a_picture_nor_after_an_error():
    model = MADE["unet"]()
    drawn(model, shortcut=Shortcut("deep_cache", 2, model.net))
    assert model.net.tap is None
    shortcut, (x, _) = Shortcut("deep_cache", 2, model.net), inputs(model.net)
    with pytest.raises(ZeroDivisionError):
        shortcut.wrap(lambda x, level: 1 / 0, model.net, LEVELS)(x, LEVELS[0])
    assert model.net.tap is None


@pytest.mark.parametrize("name, model, words", [
    ("deep_cache", "dit", "--deep-cache is for U-Nets: leave it out with this model, whose network is a DiT"),
    ("first_block_cache", "unet", "--first-block-cache is for transformers: leave it out with this model, whose network is a UNet")])
def test_a_shortcut_that_a_network_has_no_use_for_is_refused(name, model, words):
    with pytest.raises(ValueError, match=words):
        find_shortcut({name: 2}, MADE[model]().net)


def test_a_compiled_network_takes_no_shortcut():
    net = MADE["unet"]().net
    net._compiled_call_impl = net.forward
    with pytest.raises(ValueError, match="compile its blocks instead"):
        Shortcut("deep_cache", 2, net).wrap(None, net, LEVELS)


@pytest.mark.parametrize("words, message", [
    (["--deep-cache", "0"], "--deep-cache 0 must be 1 (run all) or more"),
    (["--first-block-cache", "nan"], "--first-block-cache nan must be at least 0 and below 1"),
    (["--deep-cache", "2", "--dry-run"], "--dry-run counts full calls of the network"),
    (["--quantize", "int8", "--dry-run"], "--dry-run plans with the weights as they are"),
])
def test_values_that_mean_nothing_are_refused_before_anything_is_loaded(words, message, capsys):
    assert message in mistake("sample", ["a fox", *words], capsys)


def test_every_shortcut_has_a_flag_of_its_name():
    from tinyldm.cli import Parser, add_drawing_flags
    parser = Parser()
    add_drawing_flags(parser)
    assert SHORTCUTS.keys() <= {action.dest for action in parser._actions}


def test_beside_guidance_that_leaves_out_the_first_block_those_calls_are_full():
    model = MADE["mmdit"]()
    skip = SkipLayers((0, 2), start=0.0, stop=1.0)
    settings = draw_settings(model, steps=8)._replace(skip=skip)
    plain = draw(model, ["a"], [0], settings)
    shortcut = Shortcut("first_block_cache", 0.0, model.net)
    assert (draw(model, ["a"], [0], settings._replace(shortcut=shortcut)) == plain).all() and not shortcut.short
