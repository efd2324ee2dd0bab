"""MMDiT by itself: what holds at initialisation, and positions, patches and times by closed forms. Its weights and outputs are compared
with diffusers' in tests/vendor_loaders/test_mmdit.py."""

import math

import pytest
import torch
from helpers import randomise
from parity import error

from tinyldm.model import network_config
from tinyldm.models.layers import Cond
from tinyldm.models.mmdit import MMDiT, MMDiTConfig, position_table

TINY = dict(in_channels=4, out_channels=4, width=64, layers=3, heads=4, context_dim=24, pooled_dim=10, max_positions=12, sample_size=8)


def build(wake: bool = True, **changes) -> MMDiT:
    """A tiny network, with random weights or with its initial ones."""
    torch.manual_seed(0)
    net = MMDiT(MMDiTConfig(**(TINY | changes)))
    return randomise(net) if wake else net


def inputs(b: int = 3, h: int = 8, w: int = 12):
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    return rand(b, 4, h, w), torch.rand(b, generator=g) * 1000, Cond(rand(b, 7, 24), pooled=rand(b, 10))


# ---------------------------------------------------------------- initialisation


@torch.no_grad()
def test_at_initialisation_the_output_is_zero_and_each_block_is_the_identity():
    net = build(wake=False, dual_layers=(0, 2), qk_norm=True)
    assert net(*inputs()).count_nonzero() == 0
    x, text, c = torch.randn(3, 24, 64), torch.randn(3, 7, 64), torch.randn(3, 64)
    for block in net.blocks:
        assert all(map(torch.equal, block(x, text, c), (x, text)))


def unused(name: str) -> bool:
    """The queries of the text in the last block, whose answers nobody reads. The published files contain them."""
    return name.startswith(("blocks.2.text.attn.to_q.", "blocks.2.text.attn.q_norm."))


@pytest.mark.parametrize("changes", [{}, dict(dual_layers=(0, 2), qk_norm=True)], ids=["plain", "dual, qk-norm"])
def test_gradients_reach_every_parameter_but_the_queries_of_the_last_text(changes):
    net = build(**changes)
    net(*inputs()).square().sum().backward()
    assert [name for name, p in net.named_parameters() if not p.grad.any()] == [name for name, _ in net.named_parameters() if unused(name)]


def test_a_fresh_network_wakes_up_within_four_steps():
    net, (x, t, cond) = build(wake=False, dual_layers=(0,), qk_norm=True), inputs()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        (net(x, t, cond) - x).square().mean().backward()
        optimizer.step()
    assert [name for name, p in net.named_parameters() if not p.grad.any() and not unused(name)] == []


# ---------------------------------------------------------------- positions, patches, times


def test_the_table_of_positions_is_that_of_the_formula():
    """Sines, then cosines of column / 10000^(i / (width / 4)), then of the row; a picture of `base` tokens is stretched to the table."""
    table = position_table(16, size=12, base=4)[0].view(12, 12, 16).double()
    for row, col, i in ((0, 0, 0), (5, 7, 0), (5, 7, 3), (11, 2, 1)):
        angle = lambda place, i=i: place / 3 / 10_000 ** (i / 4)
        expected = [math.sin(angle(col)), math.cos(angle(col)), math.sin(angle(row)), math.cos(angle(row))]
        assert table[row, col, [i, 4 + i, 8 + i, 12 + i]].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rows, cols, top, left", [(12, 12, 0, 0), (4, 6, 4, 3), (3, 7, 4, 2), (1, 12, 5, 0)])
def test_a_picture_lies_in_the_middle_of_the_table(rows, cols, top, left):
    net = build()
    net.positions.copy_(torch.arange(12 * 12.0)[None, :, None].expand(1, -1, 64))              # the number of each place
    found = net.central_positions(rows, cols)
    assert found.shape == (1, rows * cols, 64)
    assert found[0, :, 0].tolist() == [12.0 * (top + row) + left + col for row in range(rows) for col in range(cols)]


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_the_last_layer_s_numbers_are_rows_of_a_patch_then_columns_then_channels(patch):
    net = build(patch=patch, out_channels=3)
    net.patch_out.weight.zero_()
    net.patch_out.bias.copy_(torch.arange(3.0 * patch**2))
    y = net(*inputs(b=1, h=8, w=4))[0]                                                          # [3, 8, 4]
    for channel in range(3):
        for row in range(8):
            assert y[channel, row].tolist() == [3.0 * (patch * (row % patch) + col % patch) + channel for col in range(4)]


@torch.no_grad()
def test_each_token_is_put_back_where_it_was_taken_from():
    net = build(layers=1, sample_size=16)
    for linear in (net.blocks[0].image.modulation, net.blocks[0].text.modulation):
        linear.weight.zero_(), linear.bias.zero_()                                              # the block is the identity
    net.positions.zero_()
    x, t, cond = inputs(b=1, h=6, w=10)
    changed = x.clone()
    changed[:, :, 4, 7] += 1
    where = (net(changed, t, cond) - net(x, t, cond)).abs().sum((0, 1)) > 0
    assert where.nonzero().tolist() == [[row, col] for row in (4, 5) for col in (6, 7)]


@torch.no_grad()
def test_the_network_s_times_are_those_of_the_schedule_without_a_factor():
    net, (x, _, cond) = build(), inputs()
    heard = []
    net.time_in.linear_1.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    net(x, torch.tensor([0.0, 1.0, 1000.0]), cond)
    assert heard[0][:, 0].tolist() == pytest.approx([1.0, math.cos(1), math.cos(1000)], abs=1e-5)
    assert heard[0][:, 128].tolist() == pytest.approx([0.0, math.sin(1), math.sin(1000)], abs=1e-5)


# ---------------------------------------------------------------- for any weights


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(2, 2), (8, 8), (6, 16), (18, 4), (24, 24)])
def test_any_size_up_to_the_table_s_works(h, w):
    x, t, cond = inputs(h=h, w=w)
    y = build(out_channels=8)(x, t, cond)
    assert y.shape == (3, 8, h, w) and y.isfinite().all()


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    net, (x, t, cond) = build(dual_layers=(0,), qk_norm=True), inputs()
    alone = net(x[1:2], t[1:2], Cond(cond.context[1:2], pooled=cond.pooled[1:2]))
    assert error(alone, net(x, t, cond)[1:2]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("change", ["time", "text", "pooled"])
def test_the_output_depends_on(change):
    net, (x, t, cond) = build(), inputs()
    other = {"time": (x, t + 100, cond),
             "text": (x, t, Cond(cond.context + 1, pooled=cond.pooled)),
             "pooled": (x, t, Cond(cond.context, pooled=cond.pooled + 1))}[change]
    assert error(net(*other), net(x, t, cond)) > 1e-3


@torch.no_grad()
def test_skipped_blocks_are_the_identity_for_image_and_text():
    net, (x, t, cond) = build(), inputs()
    skipped = net(x, t, cond, skip_layers=(1,))
    assert error(skipped, net(x, t, cond)) > 1e-2
    for stream in (net.blocks[1].image, net.blocks[1].text):
        stream.modulation.weight.zero_(), stream.modulation.bias.zero_()
    assert error(skipped, net(x, t, cond)) < 1e-6
    assert torch.equal(net(x, t, cond, skip_layers=[]), net(x, t, cond))


@torch.no_grad()
def test_under_autocast_both_streams_are_float32_between_blocks():
    net, seen = build(qk_norm=True, dual_layers=(0,)), []
    for block in net.blocks:
        block.register_forward_hook(lambda block, args, out: seen.append((out[0].dtype, out[1].dtype)))
    exact = net(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(*inputs())
    assert set(seen) == {(torch.float32, torch.float32)} and 1e-4 < error(rounded.float(), exact) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("change, message", [
    (dict(h=7), "latent size 7x12 is not a multiple of the patch size 2: use 8x12"),
    (dict(h=26), "latent size 26x12 is larger than the network's table of positions: 24x24 is the largest"),
    (dict(w=26), "latent size 8x26 is larger than the network's table of positions: 24x24 is the largest"),
    (dict(context=torch.zeros(3, 7, 25)), "text features of width 25 for a network with context_dim 24"),
    (dict(pooled=None), "modulated by a pooled text feature of width 10, and there is none"),
    (dict(pooled=torch.zeros(3, 11)), "there is one of width 11: set MMDiTConfig.pooled_dim to it"),
    (dict(mask=torch.ones(3, 7)), "without a mask"),
])
def test_inputs_that_do_not_fit_are_refused_with_the_fix(change, message):
    x, t, cond = inputs(**{name: value for name, value in change.items() if name in "hw"})
    fields = dict(context=cond.context, mask=cond.mask, pooled=cond.pooled)
    cond = Cond(**fields | {name: value for name, value in change.items() if name not in "hw"})
    with pytest.raises(ValueError, match=message):
        build()(x, t, cond)


@pytest.mark.parametrize("change, message", [
    (dict(heads=5), "width 64 with 5 heads: the width must be a multiple of the heads"),
    (dict(width=6, heads=3), "and of 4 because positions"), (dict(dual_layers=(0, 3)), "the blocks 3: there are blocks 0 to 2"),
    (dict(sample_size=26), "latents of 26x26 are larger than the table of positions.*set max_positions to 13 or more"),
    (dict(layers=0), "layers=0 must be 1 or more"), (dict(patch=0), "patch=0"), (dict(pooled_dim=0), "pooled_dim=0"),
    (dict(max_positions=0), "max_positions=0"),
])
def test_a_config_that_makes_no_network_is_refused_with_the_fix(change, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(MMDiTConfig(**(TINY | change)))


def test_settings_without_the_size_that_other_parts_determine_make_a_config():
    assert network_config("mmdit", {"patch": 1, "max_positions": 16}).patch == 1
