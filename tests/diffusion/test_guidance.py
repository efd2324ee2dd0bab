import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from scipy.stats import kstest

from tinyldm.diffusion.guidance import (
    Denoised,
    cfg,
    classifier_guidance,
    denoiser,
    denoiser_with_variance,
    dynamic_threshold,
    inpaint,
    interval,
)
from tinyldm.diffusion.noise import initial_noise, make_generators
from tinyldm.diffusion.prediction import PREDICTIONS, to_output, to_x0
from tinyldm.diffusion.process import CLEAN, Level
from tinyldm.diffusion.samplers import ddim, ddpm, final

LEVEL = Level(321.5, 0.6, 0.8)
X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
CONDITIONAL = torch.tensor([1.0, 2.0, 3.0])
BOTH = torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0, -3.0])  # conditional half first


def net(x, t, cond):
    return torch.tanh(x * cond.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_denoiser_passes_t_to_the_network_and_computes_x0_from_its_output(kind):
    out = net(X, torch.full((3,), 321.5), CONDITIONAL)
    assert torch.equal(denoiser(net, CONDITIONAL, kind)(X, LEVEL), to_x0(kind, X, out, LEVEL))


def test_a_half_precision_network_gives_float32_arithmetic():
    def half(x, t, cond):
        return net(x, t, cond).bfloat16()

    x0 = denoiser(half, CONDITIONAL, "eps")(X, LEVEL)
    out = half(X, torch.full((3,), 321.5), CONDITIONAL).float()
    assert x0.dtype == torch.float32 and torch.equal(x0, (X - 0.8 * out) / 0.6)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_cfg_at_scale_one_is_the_conditional_model_to_the_last_bit(kind):
    guided = cfg(denoiser(net, BOTH, kind), 1.0)(X, LEVEL)
    assert torch.equal(guided, denoiser(net, CONDITIONAL, kind)(X, LEVEL))


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_cfg_mixes_the_outputs_of_the_network_as_published(kind):
    conditional, unconditional = net(torch.cat([X, X]), torch.full((6,), 321.5), BOTH).chunk(2)
    mixed = unconditional + 7.5 * (conditional - unconditional)
    guided = cfg(denoiser(net, BOTH, kind), 7.5)(X, LEVEL)
    torch.testing.assert_close(guided, to_x0(kind, X, mixed, LEVEL), rtol=1e-5, atol=1e-5)


def test_cfg_calls_the_network_once_with_both_halves():
    sizes = []

    def counting(x, t, cond):
        sizes.append((len(x), len(t)))
        return net(x, t, cond)

    cfg(denoiser(counting, BOTH, "v"), 3.0)(X, LEVEL)
    assert sizes == [(6, 6)]


def test_unknown_predictions_are_refused_before_the_network_runs():
    with pytest.raises(ValueError, match="did you mean 'eps'"):
        denoiser(net, CONDITIONAL, "epsilon")


# ---- the network's input and output


def test_the_network_sees_noise_of_large_variance_at_unit_scale():
    seen, level = [], Level(500.0, 1.0, 3.0)
    denoiser(lambda x, t, cond: (seen.append(x), x)[1], None, "x0")(X, level)
    torch.testing.assert_close(seen[0], X / math.sqrt(10.0))


def test_of_twice_the_channels_the_first_half_is_the_prediction_and_the_second_the_variance():
    def wide(x, t, cond):
        return torch.cat([net(x, t, cond), net(-x, t, cond) + 7], 1).bfloat16()

    t = torch.full((3,), 321.5)
    x0, variance = denoiser_with_variance(wide, CONDITIONAL, "v")(X, LEVEL)
    assert torch.equal(x0, to_x0("v", X, net(X, t, CONDITIONAL).bfloat16().float(), LEVEL))
    assert torch.equal(variance, (net(-X, t, CONDITIONAL) + 7).bfloat16().float())
    assert torch.equal(denoiser(wide, CONDITIONAL, "v")(X, LEVEL), x0)


def test_a_learned_variance_reaches_ddpm_through_cfg():
    levels = [Level(500.0, 0.6, 0.8), Level(300.0, 0.8, 0.6)]

    def drawn(variance):
        wide = lambda x, t, cond: torch.cat([net(x, t, cond), torch.full_like(x, variance)], 1)
        return final(ddpm(cfg(denoiser_with_variance(wide, BOTH, "v"), 3.0), X, levels, make_generators([1, 2, 3])))

    plain = final(ddpm(cfg(denoiser(net, BOTH, "v"), 3.0), X, levels, make_generators([1, 2, 3])))
    assert torch.equal(drawn(-1.0), plain) and (drawn(1.0) - plain).abs().mean() > 0.01


def test_ddpm_takes_the_fixed_variance_of_a_network_that_has_learned_none():
    levels = [Level(500.0, 0.6, 0.8), Level(300.0, 0.8, 0.6)]
    ends = [final(ddpm(make(net, CONDITIONAL, "v"), X, levels, make_generators([1, 2, 3])))
            for make in (denoiser, denoiser_with_variance)]
    assert torch.equal(*ends)


# ---- rescaled and limited


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_rescaling_is_the_published_formula_on_the_output_of_the_network(kind):
    conditional, unconditional = net(torch.cat([X, X]), torch.full((6,), 321.5), BOTH).double().chunk(2)
    mixed = unconditional + 7.5 * (conditional - unconditional)
    wanted = to_x0(kind, X.double(), rescale_noise_cfg(mixed, conditional, 0.7), LEVEL)
    guided = cfg(denoiser(lambda *words: net(*words).double(), BOTH, kind), 7.5, 0.7, kind)(X.double(), LEVEL)
    torch.testing.assert_close(guided, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_full_rescaling_gives_the_answer_the_standard_deviation_of_the_conditional_one(kind):
    output = lambda x0: to_output(kind, X, x0, LEVEL)
    both = denoiser(net, BOTH, kind)
    full, none = (output(cfg(both, 7.5, rescale, kind)(X, LEVEL)).std((1, 2, 3)) for rescale in (1.0, 0.0))
    wanted = output(denoiser(net, CONDITIONAL, kind)(X, LEVEL)).std((1, 2, 3))
    torch.testing.assert_close(full, wanted, rtol=1e-4, atol=0)
    assert ((none / wanted - 1).abs() > 0.05).all()


def test_rescaled_x0_and_rescaled_v_agree_in_pure_noise_only():
    def rescaled(kind, level):
        return cfg(denoiser(net, BOTH, "v"), 7.5, 0.7, kind)(X, level)

    pure = Level(999.0, 0.0, 1.0)
    torch.testing.assert_close(rescaled("v", pure), rescaled("x0", pure))
    assert (rescaled("v", LEVEL) - rescaled("x0", LEVEL)).abs().mean() > 0.05


def test_outside_the_interval_only_the_conditional_half_is_evaluated():
    samples = []

    def counting(x, t, cond):
        samples.append((t[0].item(), len(x)))
        return net(x, t, cond)

    limited = interval(cfg(denoiser(counting, BOTH, "v"), 5.0), denoiser(counting, CONDITIONAL, "v"), 0.5, 2.0)
    levels = [Level(t, math.cos(angle), math.sin(angle)) for t, angle in
              ((5.0, math.pi / 2), (4.0, math.atan(2.1)), (3.0, math.atan(1.9)), (2.0, 0.6), (1.0, math.atan(0.4)))] + [CLEAN]
    x = final(ddim(limited, X, levels))
    assert samples == [(5.0, 3), (4.0, 3), (3.0, 6), (2.0, 6), (1.0, 3)] and x.isfinite().all()
    assert limited(X, Level(9.0, 0.0, 1.0)).equal(denoiser(net, CONDITIONAL, "v")(X, Level(9.0, 0.0, 1.0)))
    edges = [Level(9.0, 1.0, sigma) for sigma in (0.5, 2.0)]
    samples.clear()
    for edge in edges:
        limited(X, edge)
    assert [n for _, n in samples] == [3, 6]                  # (low, high], as published


def test_guidance_everywhere_is_plain_cfg():
    guided = cfg(denoiser(net, BOTH, "v"), 5.0)
    limited = interval(guided, denoiser(net, CONDITIONAL, "v"), 0.0, math.inf)
    assert torch.equal(limited(X, LEVEL), guided(X, LEVEL))
    pure = Level(999.0, 0.0, 1.0)
    assert torch.equal(limited(X, pure), guided(X, pure))


def test_dynamic_thresholding_is_the_published_one_on_pixels_and_scales_with_its_bound():
    x0 = 1.4 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 0.5, 1, 3]).view(4, 1, 1, 1)
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.99, sample_max_value=1e9)
    wanted = scheduler._threshold_sample(x0)
    found = dynamic_threshold(lambda x, level: x, 0.99)(x0, LEVEL)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found[0], x0[0]) and found[3].abs().max() == 1.0 < x0[3].abs().max()
    torch.testing.assert_close(dynamic_threshold(lambda x, level: 4 * x, 0.99, 4.0)(x0, LEVEL), 4 * wanted)


# ---- on the exact mixture


def log_joint(mixture, x, level):
    """log p(x_t, mode), [b, k]."""
    variance = (level.alpha * mixture.std) ** 2 + level.sigma**2
    square = (x[:, None] - level.alpha * mixture.mean).square().sum((2, 3, 4))
    return mixture.weight.log() - square / (2 * variance) - x[0].numel() / 2 * (2 * math.pi * variance).log()


def only(mixture, k):
    """The mixture, given that mode k was drawn."""
    return replace(mixture, mean=mixture.mean[k : k + 1], std=mixture.std[k : k + 1], weight=torch.ones(1).double())


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("level", [Level(1.0, 0.95, 0.3), Level(1.0, 0.4, 0.6), Level(1.0, 1.0, 5.0)])
def test_cfg_of_exact_conditionals_follows_the_score_of_the_sharpened_mixture(image_mixture, level, scale):
    """p(x) p(y | x)^scale: its score by autograd, and Tweedie's formula."""
    x = level.alpha * image_mixture.sample(50) + level.sigma * initial_noise((1, 1, 2), make_generators(range(50))).double()
    both = lambda x, level: torch.cat([only(image_mixture, 1)(x[:50], level), image_mixture(x[50:], level)])
    noisy = x.clone().requires_grad_()
    joint = log_joint(image_mixture, noisy, level)
    score = torch.autograd.grad(((1 - scale) * joint.logsumexp(1) + scale * joint[:, 1]).sum(), noisy)[0]
    torch.testing.assert_close(cfg(both, scale)(x, level), (x + level.sigma**2 * score) / level.alpha)


def classifier(mixture, k):
    return lambda x, level: log_joint(mixture, x, level).log_softmax(1)[:, k]


@pytest.mark.parametrize("curve", ["vp", "cosine", "flow", "ve"])
def test_an_exact_classifier_makes_the_conditional_denoiser_of_the_unconditional_one(image_mixture, curve_levels, curve):
    steered = classifier_guidance(image_mixture, classifier(image_mixture, 2))
    for level in curve_levels(curve, 10, 0.95, 0.05):
        x = level.alpha * image_mixture.sample(50) + level.sigma * initial_noise((1, 1, 2), make_generators(range(50))).double()
        torch.testing.assert_close(steered(x, level), only(image_mixture, 2)(x, level), rtol=1e-6, atol=1e-6)


def test_steered_by_an_exact_classifier_the_sampler_draws_from_the_conditional_distribution(pixel_mixture, curve_levels):
    levels, generators = curve_levels("flow", 100, 0.99, 0.0), make_generators(range(2000))
    x = initial_noise((1, 1, 1), generators).double()
    steered = final(ddpm(classifier_guidance(pixel_mixture, classifier(pixel_mixture, 1)), x, levels, generators))
    wanted = only(pixel_mixture, 1)
    assert kstest(wanted.cdf(steered, CLEAN).flatten().numpy(), "uniform").pvalue > 0.01
    assert kstest(pixel_mixture.cdf(steered, CLEAN).flatten().numpy(), "uniform").pvalue < 1e-9


def test_classifier_guidance_follows_the_published_eps_and_leaves_pure_noise_alone():
    log_p = lambda x, level: (x * CONDITIONAL.view(-1, 1, 1, 1)).sin().sum((1, 2, 3))
    gradient = (X * CONDITIONAL.view(-1, 1, 1, 1)).cos() * CONDITIONAL.view(-1, 1, 1, 1)
    eps = net(X, torch.full((3,), 321.5), CONDITIONAL) - 2.5 * LEVEL.sigma * gradient       # Eq. 14
    plain = denoiser(net, CONDITIONAL, "eps")
    torch.testing.assert_close(classifier_guidance(plain, log_p, 2.5)(X, LEVEL), to_x0("eps", X, eps, LEVEL))
    pure = Level(999.0, 0.0, 1.0)
    flow = denoiser(net, CONDITIONAL, "flow")
    assert torch.equal(classifier_guidance(flow, log_p, 2.5)(X, pure), flow(X, pure))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_classifier_has_its_gradient_where_samplers_switch_gradients_off(image_mixture, context):
    with context():
        x = image_mixture.sample(5)
        steered = classifier_guidance(image_mixture, classifier(image_mixture, 0))(x, LEVEL)
    torch.testing.assert_close(steered, only(image_mixture, 0)(x.clone(), LEVEL), rtol=1e-6, atol=1e-6)
    assert not steered.requires_grad


# ---- all of them


GUIDED = {
    "cfg": lambda both, one: cfg(both, 5.0),
    "rescaled": lambda both, one: cfg(both, 5.0, 0.7, "v"),
    "interval": lambda both, one: interval(cfg(both, 5.0), one, 0.1, 2.0),
    "threshold": lambda both, one: dynamic_threshold(cfg(both, 5.0)),
    "classifier": lambda both, one: classifier_guidance(one, lambda x, level: -x.square().sum((1, 2, 3))),
    "inpaint": lambda both, one: inpaint(one, torch.ones(1, 2, 4, 4), torch.ones(1, 1, 4, 4) / 2),
    "stacked": lambda both, one: dynamic_threshold(inpaint(interval(cfg(both, 5.0, 0.7, "v"), one, 0.1, 2.0),
                                                           torch.ones(1, 2, 4, 4), torch.ones(1, 1, 4, 4) / 2), bound=3.0),
}


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_keeps_its_arguments_and_answers_a_half_precision_network_in_float32(name):
    half = lambda x, t, cond: net(x.bfloat16(), t, cond).bfloat16()
    guided = GUIDED[name](denoiser(half, BOTH, "v"), denoiser(half, CONDITIONAL, "v"))
    x = X.clone()
    first, second = guided(x, LEVEL), guided(x, LEVEL)
    assert torch.equal(x, X) and torch.equal(first, second) and not first.requires_grad
    assert first.dtype == torch.float32 and first.shape == X.shape and first.isfinite().all()
    full = GUIDED[name](denoiser(net, BOTH, "v"), denoiser(net, CONDITIONAL, "v"))(X, LEVEL)
    assert 0 < (first - full).abs().max() < 0.2


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_passes_a_learned_variance_on_and_calls_the_network_once(name):
    calls = []

    def wide(x, t, cond):
        calls.append(len(x))
        return torch.cat([net(x, t, cond), x.sin()], 1)

    guided = GUIDED[name](denoiser_with_variance(wide, BOTH, "v"), denoiser_with_variance(wide, CONDITIONAL, "v"))
    found = guided(X, LEVEL)
    assert isinstance(found, Denoised) and len(calls) == 1
    assert torch.equal(found.variance, X.sin())
    assert torch.equal(found.x0, GUIDED[name](denoiser(net, BOTH, "v"), denoiser(net, CONDITIONAL, "v"))(X, LEVEL))
