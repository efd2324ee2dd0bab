"""What is made of a conditional and an unconditional guess: closed forms, and the arithmetic of diffusers' guiders."""

import math
from itertools import combinations, islice

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeZeroStarGuidance,
)
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import (
    MIXES,
    Denoised,
    beside,
    cfg,
    denoiser,
    denoiser_with_variance,
    projected,
    zero_star,
)
from tinyldm.diffusion.prediction import to_output, to_x0
from tinyldm.diffusion.process import Flow, Level
from tinyldm.diffusion.samplers import euler
from tinyldm.models.layers import Cond
from tinyldm.pipeline import DrawSettings, guide

LEVEL, FIRST = Level(600.0, 0.4, 0.6), Level(1000.0, 0.0, 1.0)
G = torch.Generator().manual_seed(0)
X, CONDITIONAL, UNCONDITIONAL = (torch.randn(3, 2, 4, 4, generator=G) for _ in range(3))


def net(x, t, cond):
    return torch.tanh(x * cond.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000)


# ---- adaptive projected guidance


@pytest.mark.parametrize("eta, cap, momentum", [(0.0, 1e9, 0.0), (1.0, 1e9, 0.0), (0.3, 0.5, 0.0), (0.0, 0.2, -0.5), (0.5, 0.2, 0.75)])
def test_projected_guidance_is_diffusers_over_several_steps(eta, cap, momentum):
    theirs = AdaptiveProjectedGuidance(4.0 - 1, adaptive_projected_guidance_momentum=momentum, eta=eta, use_original_formulation=True,
                                       adaptive_projected_guidance_rescale=cap * math.sqrt(X[0].numel()))
    theirs.momentum_buffer = MomentumBuffer(momentum)           # as its prepare_inputs does in the first step
    ours = projected(4.0, "v", None, momentum, cap, eta)
    for step in range(3):
        conditional, unconditional = CONDITIONAL + step, UNCONDITIONAL * (1 + step)
        wanted = theirs.forward(conditional, unconditional).pred
        torch.testing.assert_close(ours(conditional, unconditional, X, LEVEL), wanted, rtol=1e-5, atol=1e-5)


def test_with_all_of_the_parallel_part_no_cap_and_no_past_it_is_plain_guidance():
    mix = projected(4.0, "v", None, momentum=0.0, cap=math.inf, eta=1.0)
    torch.testing.assert_close(mix(CONDITIONAL, UNCONDITIONAL, X, LEVEL), CONDITIONAL + 3 * (CONDITIONAL - UNCONDITIONAL))


def test_a_difference_along_the_conditional_guess_changes_nothing_and_one_across_it_everything():
    along = projected(4.0, "v", None, cap=math.inf)(CONDITIONAL, 0.5 * CONDITIONAL, X, LEVEL)
    torch.testing.assert_close(along, CONDITIONAL)
    across = UNCONDITIONAL - (UNCONDITIONAL * CONDITIONAL).sum((1, 2, 3), keepdim=True) / CONDITIONAL.square().sum(
        (1, 2, 3), keepdim=True) * CONDITIONAL
    found = projected(4.0, "v", None, cap=math.inf)(CONDITIONAL, CONDITIONAL - across, X, LEVEL)
    torch.testing.assert_close(found, CONDITIONAL + 3 * across)
    capped = projected(4.0, "v", None, cap=0.1)(CONDITIONAL, CONDITIONAL - across, X, LEVEL)
    torch.testing.assert_close((capped - CONDITIONAL).square().mean((1, 2, 3)).sqrt(), torch.full((3,), 3 * 0.1))


def test_the_usual_cap_is_the_paper_s_norm_of_15_for_sdxl():
    c, u = torch.randn(1, 4, 128, 128, generator=G), torch.randn(1, 4, 128, 128, generator=G)
    change = projected(2.0, "v", None, eta=1.0)(c, u, c, LEVEL) - c
    assert torch.linalg.vector_norm(change).item() == pytest.approx(15, rel=1e-5)


def test_each_drawing_has_a_past_of_its_own():
    first, second, fresh = (projected(4.0, "v", None) for _ in range(3))
    first(X, UNCONDITIONAL, X, LEVEL), second(UNCONDITIONAL, X, X, LEVEL)
    answers = [mix(CONDITIONAL, UNCONDITIONAL, X, LEVEL) for mix in (first, second, fresh)]
    assert not any(torch.equal(one, other) for one, other in combinations(answers, 2))


# ---- CFG-Zero*


def test_zero_star_is_diffusers_on_the_network_s_velocity():
    c, u = net(X, torch.full((3,), LEVEL.t), torch.ones(3)), net(X, torch.full((3,), LEVEL.t), -torch.ones(3))
    theirs = ClassifierFreeZeroStarGuidance(4.0)
    for step, level in enumerate((FIRST, LEVEL)):
        theirs._step = step
        as_x0 = [to_x0("flow", X, out, level) for out in (c, u)]
        found = to_output("flow", X, zero_star(4.0, "flow", FIRST)(*as_x0, X, level), level)
        torch.testing.assert_close(found, theirs.forward(c, u).pred, rtol=1e-4, atol=1e-5)


def test_the_first_step_of_zero_star_leaves_the_noise_as_it_is():
    levels = grid(Flow(), 4)
    both = denoiser(net, torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0, -3.0]), "flow")
    first, second = islice(euler(cfg(both, 3.0, mix=zero_star(3.0, "flow", levels[0])), X, levels), 2)
    torch.testing.assert_close(first[0], X)
    assert (second[0] - X).abs().mean() > 0.01


def test_a_rescaled_first_step_of_zero_star_has_numbers():
    both = denoiser(net, torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0, -3.0]), "flow")
    at = lambda rescale: cfg(both, 3.0, rescale, "flow", zero_star(3.0, "flow", FIRST))(X, FIRST)
    torch.testing.assert_close(at(0.7), at(0.0))


@pytest.mark.parametrize("schedule, start, skipped", [("flow_sigmas", None, True), ("trailing", None, True), ("flow_sigmas", 1, False)])
def test_every_grid_that_begins_with_noise_has_a_first_step_that_zero_star_skips(schedule, start, skipped, monkeypatch):
    """flow_sigmas, the default of flows, begins with a thousandth of the picture."""
    told = []
    monkeypatch.setitem(MIXES, "cfg_zero", lambda scale, prediction, first: told.append(first))
    levels = grid(Flow(), 5, schedule)[start:]
    settings = DrawSettings("euler", schedule, 5, 3.0, None, guidance="cfg_zero")
    guide(lambda cond, **options: None, Cond(X), Cond(X), settings, "flow", levels)
    assert told == [levels[0] if skipped else None]


def test_where_the_unconditional_velocity_is_a_multiple_of_the_conditional_one_scales_make_no_difference():
    v = net(X, torch.full((3,), LEVEL.t), torch.ones(3))
    x0 = [to_x0("flow", X, out, LEVEL) for out in (v, -2.5 * v)]
    torch.testing.assert_close(zero_star(7.0, "flow", FIRST)(*x0, X, LEVEL), x0[0], rtol=1e-4, atol=1e-5)


def test_zero_star_is_refused_for_other_predictions():
    with pytest.raises(ValueError, match="guidance cfg_zero is for networks that predict the velocity of a flow, not eps: use cfg or apg"):
        MIXES["cfg_zero"](3.0, "eps", FIRST)


# ---- all of them


@pytest.mark.parametrize("name", MIXES)
def test_at_scale_one_every_rule_gives_the_conditional_guess(name):
    found = MIXES[name](1.0, "flow", FIRST)(CONDITIONAL, UNCONDITIONAL, X, LEVEL)
    torch.testing.assert_close(found, CONDITIONAL, rtol=1e-5, atol=1e-5)


def test_cfg_without_a_rule_is_the_plain_one_to_the_last_bit():
    both = denoiser(net, torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0, -3.0]), "v")
    assert torch.equal(cfg(both, 3.0)(X, LEVEL), cfg(both, 3.0, mix=MIXES["cfg"](3.0, "v", FIRST))(X, LEVEL))


# ---- autoguidance


def test_autoguidance_extrapolates_from_the_worse_network_to_the_better_one_as_diffusers_does():
    cond = torch.tensor([1.0, 2.0, 3.0])
    good, bad = denoiser(net, cond, "v"), denoiser(lambda x, t, cond: 0.5 * net(x, t, cond), cond, "v")
    found = cfg(beside(good, bad), 2.5)(X, LEVEL)
    torch.testing.assert_close(found, bad(X, LEVEL) + 2.5 * (good(X, LEVEL) - bad(X, LEVEL)))
    theirs = AutoGuidance(2.5, auto_guidance_layers=0, auto_guidance_config=None, dropout=1.0)
    torch.testing.assert_close(found, theirs.forward(good(X, LEVEL), bad(X, LEVEL)).pred)


def test_a_network_beside_itself_is_not_guided():
    one = denoiser(net, torch.tensor([1.0, 2.0, 3.0]), "v")
    assert torch.equal(cfg(beside(one, one), 4.0)(X, LEVEL), one(X, LEVEL))


def test_denoisers_beside_each_other_pass_a_learned_variance_on():
    wide = lambda x, t, cond: torch.cat([net(x, t, cond), x.sin()], 1)
    one = denoiser_with_variance(wide, torch.tensor([1.0, 2.0, 3.0]), "v")
    found = beside(one, one)(torch.cat([X, X]), LEVEL)
    assert isinstance(found, Denoised) and found.x0.shape == found.variance.shape == (6, 2, 4, 4)
    assert torch.equal(cfg(beside(one, one), 4.0)(X, LEVEL).variance, X.sin())
