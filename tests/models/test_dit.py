"""The diffusion transformer: what holds at initialisation, and what holds for any weights."""

import pytest
import torch
from parity import error

from tinyldm.models.dit import DiT, DiTConfig, axial_rope
from tinyldm.models.layers import Cond, rotate

TINY = dict(width=64, layers=3, heads=4, mlp_width=128, context_dim=24, time_dim=32)


def build(wake: bool = True, **changes) -> DiT:
    """A tiny network. wake: replace zero-initialised parameters by random ones."""
    torch.manual_seed(0)
    net = DiT(DiTConfig(**(TINY | changes)))
    if wake:
        with torch.no_grad():
            for p in net.parameters():
                if p.count_nonzero() == 0:
                    p.normal_(0.0, 0.2)
    return net


def inputs(b: int = 3, h: int = 8, w: int = 12, pooled: bool = False):
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    cond = Cond(rand(b, 7, 24), None, rand(b, 10) if pooled else None)
    return rand(b, 4, h, w), torch.rand(b, generator=g) * 1000, cond


def test_the_default_config_has_279m_parameters():
    with torch.device("meta"):
        net = DiT(DiTConfig())
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(279e6, rel=0.005)


def test_training_on_an_image_of_32x32_latents_takes_394_gflop():
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        DiT(DiTConfig())(torch.empty(1, 4, 32, 32), torch.empty(1), Cond(torch.empty(1, 77, 768)))
    assert 3 * counter.get_total_flops() == pytest.approx(394e9, rel=0.005)


@torch.no_grad()
def test_the_output_is_zero_at_initialisation():
    assert build(wake=False)(*inputs()).count_nonzero() == 0


@torch.no_grad()
def test_each_block_is_the_identity_at_initialisation():
    net = build(wake=False)
    x, context = torch.randn(3, 24, 64), torch.randn(3, 7, 64)
    modulation = net.modulation(torch.randn(3, 64)).unflatten(1, (6, 1, -1))
    rope = axial_rope(4, 6, 16, 100.0, x.device)
    for block in net.blocks:
        assert torch.equal(block(x, context, None, modulation, rope), x)


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(2, 2), (8, 8), (6, 16), (18, 4)])
def test_any_size_that_the_patch_divides_works(h, w):
    x, t, cond = inputs(h=h, w=w)
    y = build(out_channels=8)(x, t, cond)
    assert y.shape == (3, 8, h, w) and torch.isfinite(y).all()


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 4])
def test_other_patch_sizes_work(patch):
    assert build(patch=patch)(*inputs()).shape == (3, 4, 8, 12)


@pytest.mark.parametrize("pooled_dim", [None, 10])
def test_gradients_reach_every_parameter(pooled_dim):
    net = build(pooled_dim=pooled_dim)
    net(*inputs(pooled=True)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    for table in (net.final_table, *(block.table for block in net.blocks)):
        assert (table.grad.abs().sum((1, 2)) > 0).all()                       # each shift, scale and gate


def test_a_fresh_network_wakes_up_within_three_steps():
    net, (x, t, cond) = build(wake=False), inputs()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (net(x, t, cond) - x).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    net, (x, t, cond) = build(), inputs()
    alone = net(x[1:2], t[1:2], Cond(cond.context[1:2]))
    assert error(alone, net(x, t, cond)[1:2]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("change", ["time", "text", "pooled"])
def test_the_output_depends_on(change):
    net, (x, t, cond) = build(pooled_dim=10), inputs(pooled=True)
    other = {"time": (x, t + 100, cond),
             "text": (x, t, Cond(cond.context + 1, None, cond.pooled)),
             "pooled": (x, t, Cond(cond.context, None, cond.pooled + 1))}[change]
    assert error(net(*other), net(x, t, cond)) > 1e-3


@torch.no_grad()
def test_masked_tokens_might_as_well_not_be_there():
    net, (x, t, cond) = build(), inputs()
    mask = torch.ones(3, 7, dtype=torch.bool)
    assert error(net(x, t, Cond(cond.context, mask)), net(x, t, cond)) < 1e-6
    mask[:, 5:] = False
    masked = net(x, t, Cond(cond.context, mask))
    assert error(masked, net(x, t, Cond(cond.context[:, :5]))) < 1e-6
    noisy = cond.context.clone()
    noisy[:, 5:] += 10
    assert torch.equal(masked, net(x, t, Cond(noisy, mask)))
    assert error(net(x, t, Cond(noisy)), net(x, t, cond)) > 1e-3


@torch.no_grad()
def test_rope_scores_depend_on_relative_rows_and_columns_only():
    torch.manual_seed(0)
    rows, cols = 5, 7
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)    # the same query and key at every position
    cos, sin = axial_rope(rows, cols, 32, 100.0, q.device)
    n = rows * cols
    scores = rotate(q.expand(1, 1, n, 32), cos, sin)[0, 0] @ rotate(k.expand(1, 1, n, 32), cos, sin)[0, 0].T
    scores = scores.unflatten(0, (rows, cols)).unflatten(2, (rows, cols))      # [row, col, row', col']
    torch.testing.assert_close(scores[1:, 2:, 1:, 2:], scores[:-1, :-2, :-1, :-2], rtol=1e-5, atol=1e-5)
    assert (scores[1:, :, 0, 0] - scores[:-1, :, 0, 0]).abs().min() > 1e-4     # and they do depend on both
    assert (scores[:, 1:, 0, 0] - scores[:, :-1, 0, 0]).abs().min() > 1e-4


@torch.no_grad()
def test_rope_keeps_lengths():
    x = torch.randn(2, 3, 20, 32)
    torch.testing.assert_close(rotate(x, *axial_rope(4, 5, 32, 100.0, x.device)).norm(dim=-1), x.norm(dim=-1))


@torch.no_grad()
def test_without_blocks_a_patch_sees_only_itself():
    net, (x, t, cond) = build(layers=0), inputs()
    other = x.clone()
    other[:, :, 2:4, 6:8] += torch.randn(3, 4, 2, 2)
    moved = (net(other, t, cond) != net(x, t, cond)).any(1)                    # [b, h, w]
    assert moved[:, 2:4, 6:8].all() and moved.sum() == 3 * 4


@torch.no_grad()
def test_places_matter_through_rope_alone():
    net, (x, t, cond) = build(), inputs()
    rolled = net(x.roll(2, dims=3), t, cond).roll(-2, dims=3)
    assert error(rolled, net(x, t, cond)) > 1e-3


def test_the_state_holds_parameters_only():
    net = build()
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}


@torch.no_grad()
def test_bf16_autocast_stays_close_to_float32():
    net, batch = build(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        low = net(*batch)
    assert error(low.float(), net(*batch)) < 0.03


@torch.no_grad()
def test_wholly_bf16_weights_work():
    x, t, cond = inputs()
    y = build().bfloat16()(x.bfloat16(), t, Cond(cond.context.bfloat16()))
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()


def test_errors_say_what_to_do():
    x, t, cond = inputs(h=9)
    with pytest.raises(ValueError, match="9x12 is not a multiple of the patch size 2: use 8x12"):
        build()(x, t, cond)
    x, t, cond = inputs()
    with pytest.raises(ValueError, match="context_dim"):
        build(context_dim=32)(x, t, cond)
    with pytest.raises(ValueError, match="pooled text feature of width 10, and there is none"):
        build(pooled_dim=10)(x, t, cond)
    with pytest.raises(ValueError, match="multiple of 16"):
        build(width=40)


@pytest.mark.parametrize("rounded, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_the_residual_stream_under_autocast_is_float32_unless_it_is_to_be_rounded(rounded, dtype):
    net, seen = build(rounded_residual=rounded), []
    for block in net.blocks:
        block.register_forward_hook(lambda block, inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        answer = net(*inputs())
    assert seen == [dtype] * 3
    plain = build()(*inputs())
    assert error(answer.float(), plain) < (0.03 if rounded else 0.02)
    torch.testing.assert_close(build(rounded_residual=rounded)(*inputs()), plain, rtol=0, atol=0)     # without autocast: no difference
