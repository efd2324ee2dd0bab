"""Skip-layer guidance: in which steps, and how much is added, as in diffusers' StableDiffusion3Pipeline."""

import pytest
import torch

from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import SkipLayers, cfg, denoiser, denoiser_with_variance, skip_layers
from tinyldm.diffusion.prediction import PREDICTIONS, to_x0
from tinyldm.diffusion.process import CLEAN, Flow, Level
from tinyldm.diffusion.samplers import euler, heun

LEVEL = Level(321.5, 0.6, 0.8)
X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
CONDITIONAL = torch.tensor([1.0, 2.0, 3.0])
SKIP = SkipLayers(layers=(1,), scale=2.8, start=0.01, stop=0.2)


def net(x, t, cond):
    return torch.tanh(x * cond.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000)


def without_layers(x, t, cond):
    return net(x, t, 0.5 * cond) + 0.1


def steps_with(levels, settings, sampler=euler):
    """The levels at which the network is called without its layers."""
    called = []

    def skipped(x, level):
        called.append(level)
        return x

    list(sampler(skip_layers(lambda x, level: 0.5 * x, skipped, settings, levels), X, levels))
    return called


@pytest.mark.parametrize("steps, start, stop", [
    (50, 0.01, 0.2), (28, 0.01, 0.2), (50, 0.0, 0.2), (10, 0.1, 0.5), (40, 0.0, 1.0), (4, 0.01, 0.2)])
def test_layers_are_skipped_in_the_steps_of_diffusers(steps, start, stop):
    levels = grid(Flow(3.0), steps)
    wanted = [i for i in range(steps) if i > steps * start and i < steps * stop]    # as in StableDiffusion3Pipeline.__call__
    assert steps_with(levels, SKIP._replace(start=start, stop=stop)) == [levels[i] for i in wanted]


def test_a_sampler_that_calls_the_network_twice_per_step_skips_layers_wherever_it_is_inside_those_steps():
    levels = grid(Flow(3.0), 20)
    assert [i for i in range(20) if 0.2 < i < 4.0] == [1, 2, 3]
    # Heun's second call of a step is at the next level: that of step 0 is already inside, that of step 3 no longer.
    assert steps_with(levels, SKIP, heun) == [levels[i] for i in (1, 1, 2, 2, 3, 3)]
    middle = lambda a, b: Level((a.t + b.t) / 2, (a.alpha + b.alpha) / 2, (a.sigma + b.sigma) / 2)
    guided = skip_layers(lambda x, level: x, lambda x, level: x - 1, SKIP, levels)
    for i, active in ((0, False), (1, True), (3, True), (4, False)):
        assert torch.equal(guided(X, middle(levels[i], levels[i + 1])), X + 2.8 * (X - (X - 1)) if active else X)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_skip_layer_guidance_adds_to_the_guided_output_of_the_network_what_diffusers_adds(kind):
    levels = [Level(900.0, 0.1, 0.995), LEVEL, CLEAN]
    t = torch.full((3,), LEVEL.t)
    conditional, unconditional = net(X, t, CONDITIONAL), net(X, t, -CONDITIONAL)
    expected = unconditional + 4.0 * (conditional - unconditional) + 2.8 * (conditional - without_layers(X, t, CONDITIONAL))
    both, skipped = denoiser(net, torch.cat([CONDITIONAL, -CONDITIONAL]), kind), denoiser(without_layers, CONDITIONAL, kind)
    found = cfg(skip_layers(both, skipped, SKIP._replace(stop=0.9), levels, copies=2), 4.0)(X, LEVEL)
    torch.testing.assert_close(found, to_x0(kind, X, expected, LEVEL), rtol=1e-5, atol=1e-5)
    alone = skip_layers(denoiser(net, CONDITIONAL, kind), skipped, SKIP._replace(stop=0.9), levels)(X, LEVEL)
    expected = conditional + 2.8 * (conditional - without_layers(X, t, CONDITIONAL))
    torch.testing.assert_close(alone, to_x0(kind, X, expected, LEVEL), rtol=1e-5, atol=1e-5)


def test_skip_layer_guidance_passes_a_learned_variance_on():
    levels, settings = [Level(900.0, 0.1, 0.995), LEVEL, CLEAN], SKIP._replace(stop=0.9)
    with_variance = lambda f: (lambda x, t, cond: torch.cat([f(x, t, cond), x], 1))
    both = denoiser_with_variance(with_variance(net), CONDITIONAL, "eps")
    skipped = denoiser_with_variance(with_variance(without_layers), CONDITIONAL, "eps")
    found = skip_layers(both, skipped, settings, levels)(X, LEVEL)
    plain = skip_layers(denoiser(net, CONDITIONAL, "eps"), denoiser(without_layers, CONDITIONAL, "eps"), settings, levels)
    assert torch.equal(found.variance, both(X, LEVEL).variance) and torch.equal(found.x0, plain(X, LEVEL))
