"""FLUX.1's transformer by itself: what holds at initialisation, and packing, positions and conditions by closed forms. Its weights and
outputs are compared with diffusers' in tests/vendor_loaders/test_flux.py."""

import cmath
from dataclasses import replace

import pytest
import torch
from helpers import randomise

from tinyldm.models.flux import Flux, FluxConfig, clipped, rotate_pairs, rotations, usual_axes
from tinyldm.models.layers import Cond

TINY = FluxConfig(in_channels=4, out_channels=4, width=64, heads=2, double_layers=2, single_layers=3, context_dim=24, pooled_dim=10,
                  rope_axes=(8, 12, 12))


def build(wake: bool = True, **changes) -> Flux:
    """A tiny network, with random weights or with its initial ones."""
    torch.manual_seed(0)
    net = Flux(replace(TINY, **changes))
    return randomise(net) if wake else net


def inputs(b: int = 3, h: int = 8, w: int = 12):
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    x, t, context, pooled = rand(b, 4, h, w), torch.rand(b, generator=g) * 1000, rand(b, 7, 24), rand(b, 10)
    return x, t, Cond(context, pooled=pooled, extra={"guidance": torch.full((b,), 3.5)})


# ---------------------------------------------------------------- initialisation


@torch.no_grad()
def test_at_initialisation_the_output_is_zero_and_each_block_is_the_identity():
    net = build(wake=False, guidance=True)
    assert net(*inputs()).count_nonzero() == 0
    x, text, c = torch.randn(3, 24, 64), torch.randn(3, 7, 64), torch.randn(3, 64)
    rope = rotations(7, 4, 6, TINY.rope_axes, torch.device("cpu"))
    for block in net.double_blocks:
        assert all(map(torch.equal, block(x, text, c, rope), (x, text)))
    both = torch.cat([text, x], dim=1)
    assert all(torch.equal(block(both, c, rope), both) for block in net.single_blocks)


@pytest.mark.parametrize("guidance", [False, True])
def test_gradients_reach_every_parameter(guidance):
    net = build(guidance=guidance)
    net(*inputs()).square().sum().backward()
    assert [name for name, p in net.named_parameters() if not p.grad.any()] == []


def test_a_fresh_network_wakes_up_within_four_steps():
    net, (x, t, cond) = build(wake=False, guidance=True), inputs()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        (net(x, t, cond) - x).square().mean().backward()
        optimizer.step()
    assert [name for name, p in net.named_parameters() if not p.grad.any()] == []


def test_the_published_networks_have_11_9_billion_parameters():
    for guidance, count in ((True, 11_901_408_320), (False, 11_891_178_560)):
        with torch.device("meta"):
            assert sum(p.numel() for p in Flux(FluxConfig(guidance=guidance)).parameters()) == count


# ---------------------------------------------------------------- packing and positions


@torch.no_grad()
def test_a_token_holds_four_pixels_of_each_channel_the_channel_slowest_going_in_and_coming_out():
    """By einops in black-forest-labs/flux: b c (h ph) (w pw) -> b (h w) (c ph pw)."""
    net, (x, t, cond) = build(), inputs(b=1)
    given, made = [], []
    net.patch_in.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    net.patch_out.register_forward_hook(lambda module, args, out: made.append(out))
    y = net(x, t, cond)
    for row, col, channel, down, right in ((0, 0, 0, 0, 0), (1, 4, 2, 0, 1), (3, 5, 3, 1, 0)):
        token, place = row * 6 + col, channel * 4 + down * 2 + right
        assert given[0][0, token, place] == x[0, channel, 2 * row + down, 2 * col + right]
        assert made[0][0, token, place] == y[0, channel, 2 * row + down, 2 * col + right]


def test_angles_are_those_of_the_formula_the_text_is_at_the_origin_and_the_first_axis_turns_nothing():
    rope = rotations(3, 5, 7, (8, 12, 12), torch.device("cpu"))[:, 0]                # [3 + 35, 16, 2]
    assert rope.shape == (38, 16, 2)
    still = torch.tensor([1.0, 0.0])
    assert (rope[:3] == still).all() and (rope[:, :4] == still).all()
    for row, col, i in ((0, 0, 2), (4, 1, 0), (2, 6, 5), (3, 5, 1)):
        down, right = rope[3 + row * 7 + col, 4 + i], rope[3 + row * 7 + col, 10 + i]
        for found, place in ((down, row), (right, col)):
            turn = cmath.exp(1j * place / 10_000 ** (2 * i / 12))
            assert found.tolist() == pytest.approx([turn.real, turn.imag], abs=1e-7)


def test_neighbouring_channels_are_a_pair():
    x, rope = torch.randn(2, 38, 3, 32), rotations(3, 5, 7, (8, 12, 12), torch.device("cpu"))
    found = rotate_pairs(x, rope)
    for token, head, i in ((0, 0, 0), (20, 1, 5), (37, 2, 15)):
        a, b = x[1, token, head, 2 * i : 2 * i + 2].tolist()
        turned = complex(a, b) * complex(*rope[token, 0, i].tolist())
        assert found[1, token, head, 2 * i : 2 * i + 2].tolist() == pytest.approx([turned.real, turned.imag], abs=1e-6)


def test_the_compiler_s_rotation_is_the_same(monkeypatch):
    x, rope = torch.randn(2, 38, 3, 32), rotations(3, 5, 7, (8, 12, 12), torch.device("cpu"))
    expected = rotate_pairs(x, rope), rotate_pairs(x.bfloat16(), rope)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for found, wanted in zip((rotate_pairs(x, rope), rotate_pairs(x.bfloat16(), rope)), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        assert found.dtype == wanted.dtype == torch.float32


def test_positions_far_out_are_exact_to_float32():
    """float32 frequencies would be wrong by 1e-5 at the positions of a picture of 4096 pixels."""
    rope = rotations(0, 1, 256, (8, 12, 12), torch.device("cpu"))[255, 0, 10:]
    turns = [cmath.exp(1j * 255 / 10_000 ** (2 * i / 12)) for i in range(6)]
    assert rope.flatten().tolist() == pytest.approx([part for turn in turns for part in (turn.real, turn.imag)], abs=1e-7)


@torch.no_grad()
def test_tokens_of_the_text_may_be_in_any_order_and_those_of_the_picture_may_not():
    net, (x, t, cond) = build(), inputs()
    y, order = net(x, t, cond), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(net(x, t, replace(cond, context=cond.context[:, order])), y, rtol=1e-4, atol=1e-5)
    assert (net(x.roll(2, 3), t, cond).roll(-2, 3) - y).abs().max() > 0.01


# ---------------------------------------------------------------- conditions


@torch.no_grad()
@pytest.mark.parametrize("changed", ["context", "pooled", "t", "guidance"])
def test_every_condition_counts_and_each_sample_has_its_own(changed):
    net, (x, t, cond) = build(guidance=True), inputs()
    second = torch.tensor([0.0, 1.0, 0.0])
    extra = {"guidance": cond.extra["guidance"] + second} if changed == "guidance" else cond.extra
    pooled = cond.pooled + second[:, None] if changed == "pooled" else cond.pooled
    context = cond.context + second[:, None, None] if changed == "context" else cond.context
    away = net(x, t + second * 100 if changed == "t" else t, Cond(context, pooled=pooled, extra=extra)) - net(x, t, cond)
    assert away[1].abs().max() > 1e-3 and away[[0, 2]].abs().max() < 1e-5


@torch.no_grad()
def test_the_guidance_scale_is_embedded_as_a_thousand_times_itself():
    net, (x, t, cond) = build(guidance=True), inputs()
    given = []
    net.guidance_in.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    net(x, t, cond)
    assert given[0].tolist() == [3500.0] * 3


@torch.no_grad()
def test_a_network_without_guidance_ignores_the_scale():
    net, (x, t, cond) = build(), inputs()
    assert torch.equal(net(x, t, cond), net(x, t, replace(cond, extra={})))


@pytest.mark.parametrize("change, said", [
    (lambda x, t, cond: (x[:, :, :7], t, cond), "latent size 7x12 is not a multiple of the patch size 2: use 8x12"),
    (lambda x, t, cond: (x[..., :5], t, cond), "use 8x4"),
    (lambda x, t, cond: (x, t, Cond(torch.ones(3, 7, 20), pooled=cond.pooled, extra=cond.extra)), "width 20 .* context_dim 24"),
    (lambda x, t, cond: (x, t, Cond(cond.context, extra=cond.extra)), "width 10, and there is none: pass Cond"),
    (lambda x, t, cond: (x, t, Cond(cond.context, pooled=torch.ones(3, 12), extra=cond.extra)), "width 12: set FluxConfig.pooled_dim to it"),
    (lambda x, t, cond: (x, t, Cond(cond.context, pooled=cond.pooled)), 'extra={"guidance": ...}'),
    (lambda x, t, cond: (x, t, replace(cond, mask=torch.ones(3, 7, dtype=torch.bool))), "without a mask")])
def test_inputs_that_do_not_fit_are_refused_with_the_fix(change, said):
    with pytest.raises(ValueError, match=said) as caught:
        build(guidance=True)(*change(*inputs()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, said", [
    (dict(width=65), "not divisible by 2 heads"), (dict(heads=4), r"rope_axes=.* width / heads = 16: use \(4, 6, 6\)"),
    (dict(rope_axes=(8, 24)), "three even numbers"), (dict(rope_axes=(6, 13, 13)), "three even numbers"),
    (dict(width=10), "even size, 6 or more"),
    (dict(single_layers=0), "single_layers=0"), (dict(rope_axes=(0, 16, 16)), "rope_axes")])
def test_impossible_configs_are_refused_with_the_fix(changes, said):
    with pytest.raises(ValueError, match=said):
        replace(TINY, **changes)


def test_the_usual_axes_of_a_published_head_are_the_published_ones_and_those_of_others_fit():
    assert usual_axes(128) == FluxConfig().rope_axes
    for head in range(6, 130, 2):
        replace(TINY, width=2 * head, rope_axes=usual_axes(head))


# ---------------------------------------------------------------- precision


def test_in_float16_the_residual_stream_is_cut_at_the_largest_number_and_elsewhere_nothing_is():
    x = torch.tensor([1.0, float("inf"), float("-inf"), 65504.0])
    assert clipped(x.half()).tolist() == [1.0, 65504.0, -65504.0, 65504.0]
    assert torch.equal(clipped(x), x) and torch.equal(clipped(x.bfloat16()), x.bfloat16())


@torch.no_grad()
def test_in_float16_a_stream_that_overflows_still_gives_numbers():
    net, (x, t, cond) = build(), inputs()
    net.double_blocks[0].text.mlp[2].bias.fill_(60000.0)
    net.single_blocks[0].out.bias.fill_(-60000.0)
    half = Cond(cond.context.half(), pooled=cond.pooled.half())
    for module in (net.double_blocks[0].text.modulation, net.single_blocks[0].modulation):
        module.bias[-64:] = 3.0                                        # the gates
    assert net.half()(x.half(), t, half).isfinite().all()


def test_under_autocast_the_residual_stream_stays_float32():
    net, (x, t, cond) = build(), inputs()
    seen = []
    for block in (*net.double_blocks, *net.single_blocks):
        block.register_forward_hook(lambda module, args, out: seen.extend(out if isinstance(out, tuple) else (out,)))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, t, cond)
    assert {each.dtype for each in seen} == {torch.float32} and y.dtype == torch.bfloat16
    assert ((y.float() - net(x, t, cond)).norm() / y.norm()) < 0.05
