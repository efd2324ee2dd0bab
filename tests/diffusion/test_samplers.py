import math
from functools import partial

import pytest
from helpers import combinations, later
import torch

from tinyldm.diffusion.grids import Levels, curve, grid
from tinyldm.diffusion.guidance import Denoised, denoiser
from tinyldm.diffusion.noise import initial_noise, make_generators, randn_like
from tinyldm.diffusion.prediction import PREDICTIONS
from tinyldm.diffusion.process import CLEAN, PROCESSES, Discrete, Level, make_process
from tinyldm.diffusion.samplers import (
    SAMPLERS,
    adaptive,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_sde,
    edm,
    euler,
    euler_a,
    final,
    find_sampler,
    heun,
    lms,
    pndm,
    predictor_corrector,
    sampler_name,
    unipc,
)
from tinyldm.diffusion.langevin import annealed_langevin, langevin, to_score
from tinyldm.diffusion.step import signal

SD = make_process("scaled_linear")
FLOW = make_process("flow")
VE = make_process("ve")
STOCHASTIC = {
    "ddpm": ddpm,
    "euler_a": euler_a,
    "ddim eta=1": partial(ddim, eta=1.0),
    "ddim eta=0.3": partial(ddim, eta=0.3),
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_sde": dpmpp_sde,
    "edm": edm,
    "annealed_langevin": annealed_langevin,
    "predictor_corrector": predictor_corrector,
}
ANY = SAMPLERS | STOCHASTIC
STEPPING = [name for name in SAMPLERS if name not in ("annealed_langevin", "predictor_corrector")]      # move only from level to level
RENEWING = [*STOCHASTIC, "lcm"]  # lcm also draws noise, but it is for consistency functions: with E[x0 | x] it does not draw the data


def noise(n, shape=(4, 6, 6)):
    return initial_noise(shape, make_generators(range(n)))


# ------------------------------------------------------------------------------------------------ accuracy

# Where each grid starts and stops. Not at t = 0: there sigma grows like sqrt(t) on vp, which no method of finite
# order resolves. DPM++ starts at finite log(alpha / sigma), because its step from alpha = 0 is of first order.
SPANS = {"vp": (1.0, 0.02), "cosine": (0.98, 0.02), "flow": (0.98, 0.02), "ve": (1.0, 0.1)}
FORMS = {"1-D": (1, 1, 1), "2-D": (1, 1, 2), "image": (3, 4, 4)}
COARSE, FINE = (80, 160, 320), (640, 1280, 2560)
# The order, the step counts at which it can be measured, and the number of steps left out at the end. lms starts at first
# order, which dominates its error at last; unipc's last step is of first order, so its order shows without that step.
ORDERS = {
    "ddim": (1, COARSE, 0),
    "euler": (1, COARSE, 0),
    "heun": (2, COARSE, 0),
    "lms": (2, FINE, 0),
    "pndm": (2, FINE, 0),
    "pndm along v": (1, COARSE, 0),
    "dpmpp_2m": (2, COARSE, 0),
    "unipc": (3, FINE, 1),
    "dpmpp_sde eta=0": (2, COARSE, 0),
    "heun in x / alpha": (2, COARSE, 0),
    "dpmpp_2m heun": (2, COARSE, 0),
    "unipc of second order at the end": (3, FINE, 0),
    "unipc bh1": (3, FINE, 1),
}
VARIANTS = {
    "pndm along v": partial(pndm, along="v"),
    "dpmpp_sde eta=0": partial(dpmpp_sde, eta=0.0),
    "heun in x / alpha": partial(heun, scale=signal),
    "dpmpp_2m heun": partial(dpmpp_2m, solver_type="heun"),
    "unipc of second order at the end": partial(unipc, lower_order_final=False),
    "unipc bh1": partial(unipc, solver_type="bh1"),
}


def measured_order(sampler, mixture, curve_levels, curve, span, counts=COARSE, short=0):
    """The slope of log(error) against log(step). The error is that to the exact solution, not to a finer run."""
    errors = []
    for steps in counts:
        levels = curve_levels(curve, steps, *span)
        x = math.hypot(levels[0].alpha, levels[0].sigma) * noise(256 // mixture.mean[0].numel() + 8, mixture.mean[0].shape).double()
        exact = mixture.carry(x, levels[0], levels[-1 - short])
        found = list(sampler(mixture, x, levels))[-1 - short][0]
        errors.append((found - exact).abs().mean().item())
    assert errors[-1] < 5e-3
    return math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0])


# Each sampler once in the fast suite, on another curve and form than the one before it.
CONVERGING = [pytest.param(name, curve, form, marks=later(12, i, 3 * j + k))
              for i, name in enumerate(ORDERS) for j, curve in enumerate(SPANS) for k, form in enumerate(FORMS)]


@pytest.mark.parametrize("name, curve, form", CONVERGING)
def test_deterministic_samplers_converge_at_their_order(name, curve, form, solved_mixtures, curve_levels):
    order, counts, short = ORDERS[name]
    sampler = (SAMPLERS | VARIANTS)[name]
    counts = counts if form == "1-D" else counts[1:]
    found = measured_order(sampler, solved_mixtures[form], curve_levels, curve, SPANS[curve], counts, short)
    print(f"order {found:.2f}")
    assert found == pytest.approx(order, abs=0.2)


def test_every_deterministic_sampler_has_its_order_measured():
    assert set(SAMPLERS) - set(RENEWING) - {"adaptive"} <= set(ORDERS)


def watched(denoise, seen):
    """The denoiser, which also records the levels at which it is called."""

    def watching(x, level):
        seen.append(level.t)
        return denoise(x, level)

    return watching


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("curve", SPANS)
def test_the_error_of_adaptive_follows_its_tolerance(curve, form, solved_mixtures, curve_levels):
    """The error is a root mean square, as the tolerance is, and the errors of all steps add up to a few tolerances. With a
    pair of orders 3 and 2 the calls grow as the cube root: a thousandth of the tolerance takes up to ten times as many."""
    mixture, levels = solved_mixtures[form], curve_levels(curve, 20, *SPANS[curve])
    x = math.hypot(levels[0].alpha, levels[0].sigma) * noise(64, mixture.mean[0].shape).double()
    exact = mixture.carry(x, levels[0], levels[-1])
    errors, calls = [], []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        found = final(adaptive(watched(mixture, seen := []), x, levels, rtol=tolerance, atol=tolerance))
        errors.append((found - exact).square().mean().sqrt().item() / tolerance)
        calls.append(len(seen))
    print(f"error / tolerance {', '.join(f'{error:.2g}' for error in errors)} in {calls} calls")
    assert max(errors) < 2 and min(errors) > 0.05
    assert calls == sorted(calls) and calls[-1] < 15 * calls[0]


def test_adaptive_stops_at_the_last_level_and_needs_three_calls_a_step(image_mixture):
    """From pure noise to clean data, whatever the number of levels. The first call is the only one beyond three a step."""
    x = noise(3, (1, 1, 2)).double()
    exact = final(adaptive(image_mixture, x, grid(FLOW, 20), rtol=1e-6, atol=1e-6))
    for steps in (1, 2, 20, 500):
        levels = grid(FLOW, steps)
        found = list(adaptive(watched(image_mixture, seen := []), x, levels, rtol=1e-4, atol=1e-4))
        torch.testing.assert_close(found[-1][0], exact, rtol=0, atol=1e-3)
        assert 3 * len(found) <= len(seen) < 4 * len(found) + 24  # few steps are refused


def test_adaptive_walks_backwards_too_from_clean_data_to_where_it_came_from(image_mixture):
    x, levels = noise(8, (1, 1, 2)).double(), grid(FLOW, 10)
    tight = {"rtol": 1e-5, "atol": 1e-5}
    down = final(adaptive(image_mixture, x, levels, **tight))
    seen = []
    again = final(adaptive(watched(image_mixture, seen), down, Levels(levels[::-1], levels.curve), **tight))
    torch.testing.assert_close(again, x, rtol=0, atol=2e-3)
    assert len(seen) < 300  # a wrong slope at clean data would cost many small steps


def test_adaptive_says_when_no_step_will_do():
    with pytest.raises(ValueError, match="raise them"):
        final(adaptive(lambda x, level: x * math.nan, noise(1), grid(SD, 4)))


@pytest.mark.parametrize("sampler", [adaptive, dpmpp_sde, edm])
def test_samplers_that_need_levels_in_between_ask_for_the_curve(sampler, image_mixture):
    x, levels = noise(2, (1, 1, 2)).double(), grid(SD, 6)
    bare, generators = list(levels), make_generators([1, 2])
    with pytest.raises(ValueError, match=r"pass Levels\(levels, curve\(process\)\)"):
        final(sampler(image_mixture, x, bare, generators))
    runs = [final(sampler(image_mixture, x, some, make_generators([1, 2]))) for some in (levels, Levels(bare, curve(SD)))]
    assert torch.equal(*runs)


def test_lms_is_exact_where_the_slope_is_a_cubic():
    """After its start of first, second and third order; over uneven steps, down to clean data."""
    ratios = [5.0, 4.2, 3.1, 2.9, 2.0, 1.1, 0.4, 0.0]
    levels = [Level(0.0, 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)) for ratio in ratios]

    def denoise(x, level):
        s = level.sigma / level.alpha
        return (x - level.sigma * (1 - s + 2 * s**2 - 0.7 * s**3)) / level.alpha

    def area(s):
        return s - s**2 / 2 + 2 * s**3 / 3 - 0.7 * s**4 / 4

    y = [x / level.alpha for (x, _), level in zip(lms(denoise, noise(2).double(), levels, scale=signal), levels[1:])]
    for i in range(3, len(y)):
        exact = y[i - 1] + area(ratios[i + 1]) - area(ratios[i])
        torch.testing.assert_close(y[i], exact, rtol=1e-12, atol=1e-12)


def test_heun_keeps_its_order_from_pure_noise(pixel_mixture, curve_levels):
    order = measured_order(heun, pixel_mixture, curve_levels, "flow", (1.0, 0.02))
    assert order == pytest.approx(2, abs=0.2)


def statistics(mixture, x):
    """Per mode: its fraction of the samples, its mean, its standard deviation."""
    away = (x[:, None] - mixture.mean).square().sum((2, 3, 4)) / mixture.std**2
    nearest = (away / 2 + mixture.mean[0].numel() * mixture.std.log() - mixture.weight.log()).argmin(1)
    groups = [x[nearest == k] for k in range(len(mixture.std))]
    fraction = torch.tensor([len(group) / len(x) for group in groups])
    mean = torch.stack([group.mean(0) for group in groups])
    std = torch.stack([(group - group.mean(0)).square().mean().sqrt() for group in groups])
    return fraction, mean, std


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", PROCESSES)
def test_any_process_and_prediction_make_the_same_denoiser(name, kind, image_mixture):
    """Samplers only see the denoiser, so what they do with one prediction they do with all."""
    process = make_process(name)
    denoise = denoiser(image_mixture.network(process, kind), None, kind)
    x = noise(16, (1, 1, 2)).double()
    for level in grid(process, 30)[1 if kind == "eps" and name.endswith("flow") else 0 : -1]:
        torch.testing.assert_close(denoise(x, level), image_mixture(x, level), rtol=1e-7, atol=1e-7)


def crowd(denoise, n, shape):
    """A denoiser of [1, 1, n, pixels]: n images as one, so that one generator draws for them all."""
    return lambda x, level: denoise(x.view(n, *shape), level).view_as(x)


def drawn(sampler, denoise, mixture, levels, n, seed=1):
    """n images from the sampler, begun with exact draws at the first level."""
    shape = mixture.mean[0].shape
    eps = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = levels[0].alpha * mixture.sample(n) + levels[0].sigma * eps
    x = final(sampler(crowd(denoise, n, shape), x.view(1, 1, n, -1), levels, generators=make_generators([seed])))
    return x.view(n, *shape)


# Steps from which the bias of the method is below what these sizes can see. (ddim at eta = 1 and euler_a are ddpm: below.)
STEPS = {name: 400 for name in ("ddpm", "ddim eta=0.3")} | {
    name: 100 for name in ("dpmpp_2m_sde", "dpmpp_sde", "edm", "predictor_corrector")
}


@pytest.mark.parametrize("name, curve", combinations(4, STEPS, SPANS))
def test_stochastic_samplers_draw_from_the_distribution_in_1d(name, curve, pixel_mixture, curve_levels):
    """Kolmogorov-Smirnov, 20000 draws: exact ones exceed 0.0138 once in a thousand."""
    levels, n = curve_levels(curve, STEPS[name], *SPANS[curve]), 20_000
    x = drawn(STOCHASTIC[name], pixel_mixture, pixel_mixture, levels, n)
    cdf = pixel_mixture.cdf(x.flatten().sort().values, levels[-1])
    rank = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((rank + 1) / n - cdf, cdf - rank / n).max().item()
    print(f"KS {distance:.4f}")
    assert distance < 0.0138


def sliced_wasserstein(x, y, directions=50):
    """The mean over random directions of the 1-Wasserstein distance of the projections. x, y: [n, ...]."""
    away = torch.randn(x[0].numel(), directions, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    away = away / away.norm(dim=0)
    return ((x.flatten(1) @ away).sort(0).values - (y.flatten(1) @ away).sort(0).values).abs().mean().item()


DRAWING = combinations(4, STEPS, SPANS)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_lcm_draws_the_data_in_any_number_of_steps_with_the_exact_consistency_function(steps, pixel_mixture, curve_levels):
    """Kolmogorov-Smirnov as above; the first level is nearly pure noise, sigma = 0.9995."""
    consistency = lambda x, level: pixel_mixture.carry(x, level, CLEAN)
    levels, n = Levels([*curve_levels("cosine", steps + 1, 0.98, 0.0)[:steps], CLEAN], None), 4000
    generators = make_generators(range(n))                                  # both noises from one: from equal seeds they would be equal
    x = final(ANY["lcm"](consistency, initial_noise((1, 1, 1), generators).double(), levels, generators)).flatten().sort().values
    cdf, rank = pixel_mixture.cdf(x, CLEAN), torch.arange(n, dtype=torch.float64)
    assert torch.maximum((rank + 1) / n - cdf, cdf - rank / n).max() < 0.031                      # 0.0138 sqrt(20000 / 4000)


@pytest.mark.slow
@pytest.mark.parametrize("name, curve", DRAWING)
def test_stochastic_samplers_draw_from_the_distribution_in_2d(name, curve, image_mixture, curve_levels):
    """Sliced Wasserstein-1 distance of 15000 draws to as many exact ones: two exact sets are 0.01 to 0.02 apart."""
    levels, n = curve_levels(curve, STEPS[name], *SPANS[curve]), 15_000
    x = drawn(STOCHASTIC[name], image_mixture, image_mixture, levels, n)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    distance = sliced_wasserstein(x, levels[-1].alpha * image_mixture.sample(n, seed=7) + levels[-1].sigma * eps)
    print(f"SW {distance:.4f}")
    assert distance < 0.025


KINDS = [*PREDICTIONS]
# Every process with every sampler; the predictions rotate, so that each meets every process and every sampler.
TRIPLES = [
    pytest.param(process, KINDS[(i + j) % 4], sampler, marks=later(7, i, j))
    for i, process in enumerate(PROCESSES)
    for j, sampler in enumerate([*(name for name in SAMPLERS if name != "lcm"), "ddim eta=0.3"])
]


@pytest.mark.parametrize("process_name, kind, name", TRIPLES)
def test_any_process_prediction_and_sampler_draw_from_the_mixture(process_name, kind, name, image_mixture):
    """Shares, means and standard deviations of the modes. With 4000 draws the smallest mode's mean scatters by
    0.015; the first-order samplers add a bias of 0.03 at 60 steps (0.005 at second order; the stochastic ones 0.03 to
    0.04 at 100)."""
    process, mixture, n = make_process(process_name), image_mixture, 4000
    levels = grid(process, 100 if name in STOCHASTIC else 60, "linspace" if isinstance(process, Discrete) else "normal")
    if process_name.endswith("flow") and kind == "eps":
        levels = levels[1:]  # eps-prediction cannot start from alpha = 0
    denoise = denoiser(mixture.network(process, kind), None, kind)
    found = statistics(mixture, drawn(ANY[name], denoise, mixture, levels, n))
    exact = statistics(mixture, mixture.sample(100_000, seed=2))
    for one, wanted, tolerance in zip(found, exact, (0.03, 0.08, 0.06)):
        torch.testing.assert_close(one, wanted, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("levels", [grid(SD, 12), grid(SD, 12, "karras"), grid(FLOW, 12)])
def test_euler_is_ddim_without_noise(levels, image_mixture):
    x = noise(8, (1, 1, 2)).double()
    torch.testing.assert_close(final(euler(image_mixture, x, levels)), final(ddim(image_mixture, x, levels)))


@pytest.mark.parametrize("levels", [grid(SD, 12), grid(SD, 12, "karras"), grid(FLOW, 12)])
def test_ancestral_sampling_is_ddim_at_eta_one(levels, image_mixture):
    x = noise(8, (1, 1, 2)).double()
    one = final(ddpm(image_mixture, x, levels, generators=make_generators(range(8))))
    for same in (partial(ddim, eta=1.0), euler_a):
        other = final(same(image_mixture, x, levels, generators=make_generators(range(8))))
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_ancestral_step_is_the_posterior_of_bayes():
    """q(x_nxt | x, x0) from the joint Gaussian of (x_nxt, x): x = ratio x_nxt + noise of the added variance."""
    now, nxt = Level(0.0, 0.5, math.sqrt(0.75)), Level(0.0, 0.8, 0.6)
    ratio, prior, seen = now.alpha / nxt.alpha, nxt.sigma**2, now.sigma**2
    gain = ratio * prior / seen
    x0, x = torch.full((20_000, 1, 1, 1), 0.7).double(), torch.full((20_000, 1, 1, 1), -0.4).double()
    mean = nxt.alpha * 0.7 + gain * (-0.4 - now.alpha * 0.7)
    drawn = final(ddpm(lambda x, level: x0, x, [now, nxt], generators=make_generators(range(20_000))))
    assert drawn.mean().item() == pytest.approx(mean, abs=0.01)
    assert drawn.var().item() == pytest.approx(prior * (1 - gain * ratio), rel=0.03)


@pytest.mark.parametrize("process", [SD, VE, make_process("cosine"), make_process("vp")], ids=["sd", "ve", "cosine", "vp"])
def test_edm_is_algorithm_2_of_its_paper(process, image_mixture):
    """Transcribed: arXiv:2206.00364, Alg. 2, in its own coordinate x / alpha; the first level lies above s_tmax."""
    s_churn, s_tmin, s_tmax, s_noise = 5.0, 0.05, 4.0, 1.007
    levels, generators = grid(process, 12, "karras", sigma_min=0.02, sigma_max=10.0), make_generators([1, 2])
    at, y = curve(process), levels[0].sigma / levels[0].alpha * noise(2, (1, 1, 2)).double()
    options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise, "scale": signal}
    found = edm(image_mixture, levels[0].alpha * y, levels, make_generators([1, 2]), **options)
    times = [level.sigma / level.alpha for level in levels]
    churned = 0
    for (x, _), t, t_next, nxt in zip(found, times, times[1:], levels[1:]):
        gamma = min(s_churn / 12, math.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0.0
        t_hat = t + gamma * t
        if gamma:
            y = y + math.sqrt(t_hat**2 - t**2) * s_noise * randn_like(y, generators)
            churned += 1
        D = lambda y, t: image_mixture(at(t).alpha * y, at(t))
        d = (y - D(y, t_hat)) / t_hat
        y_next = y + (t_next - t_hat) * d
        if t_next > 0:
            y_next = y + (t_next - t_hat) * (d / 2 + (y_next - D(y_next, t_next)) / t_next / 2)
        y = y_next
        torch.testing.assert_close(x, nxt.alpha * y, rtol=1e-6, atol=1e-6)
    assert 0 < churned < 12


def test_the_half_step_of_dpmpp_sde_shares_its_noise_with_the_whole_step(image_mixture):
    """They are on one Brownian path in sigma / alpha: the noise of the half step and that of the whole step correlate as the
    square root of the ratio of their lengths. The half step ends at the middle in lambda."""
    now, nxt, seen = grid(SD, 5)[1], grid(SD, 5)[2], []

    def denoise(x, level):
        seen.append((x, level))
        return torch.zeros_like(x)

    x, levels = torch.zeros(1, 1, 1, 40_000).double(), Levels([now, nxt], curve(SD))
    end = final(dpmpp_sde(denoise, x, levels, make_generators([3])))
    middle, (a, b, c) = seen[1][1], [level.sigma / level.alpha for level in (now, seen[1][1], nxt)]
    assert b == pytest.approx(math.sqrt(a * c)) and nxt.t < middle.t < now.t
    correlation = torch.corrcoef(torch.stack([seen[1][0].flatten(), end.flatten()]))[0, 1].item()
    assert correlation == pytest.approx(math.sqrt((a - b) / (a - c)), abs=0.01)
    assert end.std().item() == pytest.approx(nxt.sigma * math.sqrt(1 - (c / a) ** 2), rel=0.02)
    assert seen[1][0].std().item() == pytest.approx(middle.sigma * math.sqrt(1 - (b / a) ** 2), rel=0.02)


@pytest.mark.parametrize("size", [0.02, 0.2, 0.5])
def test_langevin_steps_settle_a_little_wider_than_the_gaussian_of_their_score(size):
    """x <- (1 - a / v) x + sqrt(2 a) noise has the stationary variance v / (1 - a / (2 v)); on any curve, v = alpha^2 s^2 + sigma^2."""
    level, generators = FLOW(torch.tensor([0.4])), make_generators([0])
    level = Level(*(value.item() for value in level))
    v, a = level.alpha**2 * 0.25 + level.sigma**2, size * level.sigma**2
    denoise = lambda x, level: level.alpha * 0.25 / v * x                           # exact for data of N(0, 0.25)
    x = torch.zeros(1, 1, 200, 200, dtype=torch.float64)                            # far from where it ends
    for _ in range(math.ceil(5 * v / a)):
        x = langevin(x, to_score(x, denoise(x, level), level), randn_like(x, generators), a)
    assert x.mean().item() == pytest.approx(0, abs=0.02) and x.var().item() == pytest.approx(v / (1 - a / 2 / v), rel=0.03)


def test_annealed_langevin_is_algorithm_1_of_its_paper(image_mixture):
    """Transcribed: arXiv:1907.05600, Alg. 1, with its ladder of ten levels, and the denoiser's answer at the end."""
    sigmas = torch.logspace(0, -2, 10, dtype=torch.float64).tolist()
    levels = [Level(0.0, 1.0, sigma) for sigma in sigmas]
    x = start = noise(4, (1, 1, 2)).double()
    generators, epsilon = make_generators(range(4)), 2e-5
    for level in levels:
        a = epsilon * level.sigma**2 / sigmas[-1] ** 2
        for _ in range(3):
            x = x + a * (image_mixture(x, level) - x) / level.sigma**2 + math.sqrt(2 * a) * randn_like(x, generators)
    wanted = image_mixture(x, levels[-1])
    found = final(annealed_langevin(image_mixture, start, [*levels, Level(0.0, 1.0, 0.0)], make_generators(range(4)), corrections=3))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_annealed_langevin_draws_from_a_mixture_whose_modes_mix(pixel_mixture):
    """Kolmogorov-Smirnov, 20000 draws. The bias of steps of this size, and of so few at each level, is 0.04."""
    levels, n = grid(VE, 20), 20_000
    x = drawn(partial(annealed_langevin, corrections=8), pixel_mixture, pixel_mixture, levels, n)
    cdf = pixel_mixture.cdf(x.flatten().sort().values, levels[-1])
    distance = (cdf - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max().item()
    print(f"KS {distance:.4f}")
    assert distance < 0.05


def test_a_corrector_makes_up_for_coarse_steps_of_the_predictor(image_mixture, curve_levels):
    """The message of arXiv:2011.13456, Table 1: at equal numbers of calls, half of them on correction serve better."""
    distances = []
    for sampler, steps in ((partial(predictor_corrector, snr=0.3), 10), (ddpm, 20)):
        levels, n = curve_levels("ve", steps, 1.0, 0.1), 8000
        x = drawn(sampler, image_mixture, image_mixture, levels, n)
        eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        distances.append(sliced_wasserstein(x, image_mixture.sample(n, seed=7) + levels[-1].sigma * eps))
    print(f"SW {distances}")
    assert distances[0] < distances[1]


def test_a_corrected_picture_does_not_depend_on_those_drawn_with_it(image_mixture):
    x, levels = noise(6, (1, 4, 2)).double(), grid(SD, 5)
    denoise = lambda x, level: x * level.alpha + x.square() / 5
    whole = final(predictor_corrector(denoise, x, levels, make_generators(range(6))))
    alone = final(predictor_corrector(denoise, x[4:5], levels, make_generators([4])))
    torch.testing.assert_close(whole[4:5], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predictor", [ddim, heun, dpmpp_sde])
def test_a_predictor_without_corrections_is_the_sampler_itself(predictor, image_mixture):
    x, levels = noise(2, (1, 1, 2)).double(), grid(SD, 6)
    found = final(predictor_corrector(image_mixture, x, levels, make_generators([1, 2]), predictor=predictor, corrections=0))
    assert torch.equal(found, final(predictor(image_mixture, x, levels, make_generators([1, 2]))))


def test_churn_never_leaves_the_grid_and_none_is_heun(image_mixture):
    x, levels, seen = noise(2, (1, 1, 2)).double(), grid(SD, 10), []
    churned = final(edm(watched(image_mixture, seen), x, levels, make_generators([1, 2])))
    assert seen[0] == seen[0] and max(seen) <= 999
    assert torch.equal(final(edm(image_mixture, x, levels, s_churn=0.0)), final(heun(image_mixture, x, levels)))
    assert (churned - final(heun(image_mixture, x, levels))).abs().max() > 1e-3


def test_deterministic_members_of_a_family_are_the_plain_samplers(image_mixture):
    x, levels = noise(2, (1, 1, 2)).double(), grid(SD, 10)
    assert torch.equal(final(dpmpp_2m_sde(image_mixture, x, levels, eta=0.0)), final(dpmpp_2m(image_mixture, x, levels)))


@pytest.mark.parametrize("raw", [-1.0, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("process", [SD, make_process("cosine")], ids=["sd", "cosine"])
def test_a_learned_variance_interpolates_between_beta_tilde_and_beta(process, raw):
    """arXiv:2102.09672, Eq. 15, with beta and beta_tilde from the table, on a step over many of its entries."""
    n, now, nxt = 40_000, *grid(process, 7, "trailing")[3:5]
    x0, x = torch.full((1, 1, 1, n), 0.7).double(), torch.full((1, 1, 1, n), -0.4).double()
    beta = 1 - (now.alpha / nxt.alpha) ** 2
    tilde = beta * nxt.sigma**2 / now.sigma**2
    v = (raw + 1) / 2
    wanted = math.exp(v * math.log(beta) + (1 - v) * math.log(tilde))
    learned = lambda x, level: Denoised(x0, torch.full_like(x, raw))
    found = final(ddpm(learned, x, [now, nxt], make_generators([0])))
    plain = final(ddpm(lambda x, level: x0, x, [now, nxt], make_generators([0])))
    assert found.var().item() == pytest.approx(wanted, rel=0.03)
    assert found.mean().item() == pytest.approx(plain.mean().item(), abs=0.02)
    assert torch.allclose(found, plain) == (raw == -1.0)


def test_the_last_step_of_a_learned_variance_adds_no_noise():
    found = final(ddpm(lambda x, level: Denoised(x / 2, torch.ones_like(x)), noise(2), grid(SD, 3)[-2:]))
    torch.testing.assert_close(found, noise(2) / 2)


# ------------------------------------------------------------------------------------- any start, grid and dtype

GRIDS = ["normal", "leading", "linspace_unrounded", "karras", "exponential", "beta", "900,400,90"]


STARTING = combinations(5, SAMPLERS, ["scaled_linear", "cosine", "vp", "ve", "flow"])


@pytest.mark.parametrize("name, process_name", STARTING)
def test_every_sampler_runs_from_any_level_on_any_grid(name, process_name, image_mixture):
    process = make_process(process_name)
    for schedule in GRIDS:
        if not isinstance(process, Discrete) and schedule in ("leading", "linspace_unrounded"):
            continue
        for steps, strength in ((1, 1.0), (2, 0.5), (5, 0.6), (9, 1.0)):
            whole = grid(process, steps, schedule)
            levels = grid(process, steps, schedule, strength=max(strength, 1 / (len(whole) - 1)))
            x = levels[0].alpha * image_mixture.sample(4) + levels[0].sigma * noise(4, (1, 1, 2)).double()
            end = final(SAMPLERS[name](image_mixture, x, levels, generators=make_generators(range(4))))
            wild = 1e4 if name in ("lms", "pndm", "annealed_langevin") else 10  # these extrapolate over steps as long as these
            assert bool(end.isfinite().all()) and end.abs().max() < wild, (schedule, steps)


@pytest.mark.parametrize("cases", [CONVERGING, DRAWING, TRIPLES, STARTING])
def test_the_fast_suite_misses_no_sampler_process_or_prediction(cases):
    for axis in range(len(cases[0].values)):
        assert {case.values[axis] for case in cases if not case.marks} == {case.values[axis] for case in cases}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_network_in_bfloat16_draws_nearly_the_same_in_float32(name, toy_network):
    """The network's output is rounded to 8 bits, and x stays float32. The bound is coarse because this rounding is."""
    rounded = lambda x, t, cond: toy_network(x, t).bfloat16()
    ends = [
        final(SAMPLERS[name](denoiser(net, None, "v"), noise(2), grid(SD, 12), generators=make_generators([1, 2])))
        for net in (toy_network, rounded)
    ]
    assert ends[0].dtype == ends[1].dtype == torch.float32
    assert not torch.equal(*ends) and (ends[0] - ends[1]).abs().mean() < 0.02 * ends[0].abs().mean()


@pytest.mark.parametrize("name", STEPPING)
@pytest.mark.parametrize("process", [SD, FLOW], ids=["discrete", "flow"])
def test_one_step_jumps_to_the_guess_about_pure_noise(name, process, image_mixture):
    x, levels = noise(3, (1, 1, 2)).double(), grid(process, 1)
    if name == "adaptive":
        return  # it takes as many steps as it needs
    steps = list(SAMPLERS[name](image_mixture, x, levels, generators=make_generators(range(3))))
    assert len(steps) == 1
    for value in steps[0]:
        torch.testing.assert_close(value, image_mixture(x, levels[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", STEPPING)
def test_every_step_yields_x_and_the_guess_on_the_way_and_ends_on_the_guess(name, image_mixture):
    x, levels = noise(3, (1, 1, 2)).double(), grid(FLOW, 6)
    options = {"s_churn": 0.0} if name == "edm" else {}  # with churn, its x0 is the guess for the noisier x
    steps = list(SAMPLERS[name](image_mixture, x, levels, generators=make_generators(range(3)), **options))
    if name == "adaptive":
        assert torch.equal(steps[0][1], image_mixture(x, levels[0]))
        return
    assert len(steps) == 6
    before = [x] + [step[0] for step in steps]
    for start, level, (_, x0) in zip(before, levels, steps):
        assert torch.equal(x0, image_mixture(start, level))
    if name not in ("lms", "pndm"):  # these two extrapolate in the last step as well
        torch.testing.assert_close(steps[-1][0], steps[-1][1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, solver_type", [("dpmpp_2m", "midpoint"), ("dpmpp_2m", "heun"), ("unipc", "bh1"), ("unipc", "bh2")])
def test_a_last_step_of_no_length_changes_nothing(name, solver_type, image_mixture):
    """Karras sigmas that end at sigma_min, where diffusers' final_sigmas_type is sigma_min too."""
    x, levels = noise(2, (1, 1, 2)).double(), grid(SD, 5, "karras")[:-1]
    levels.append(levels[-1])
    *_, before, after = SAMPLERS[name](image_mixture, x, levels, lower_order_final=False, solver_type=solver_type)
    if name == "dpmpp_2m":
        torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=1e-12)
    assert after[0].isfinite().all()                            # unipc corrects what it predicted before


def test_pndm_takes_its_first_step_twice_and_unipc_corrects_without_another_call(image_mixture):
    seen = []

    def watching(x, level):
        seen.append(level.t)
        return image_mixture(x, level)

    x, levels = noise(2, (1, 1, 2)).double(), grid(SD, 4)
    final(pndm(watching, x, levels))
    assert seen == [999, 749, 749, 499, 249]
    seen.clear()
    final(unipc(watching, x, levels))
    assert seen == [999, 749, 499, 249]


def test_heun_calls_the_denoiser_twice_in_every_step_but_the_last(image_mixture):
    seen = []

    def watching(x, level):
        seen.append(level.t)
        return image_mixture(x, level)

    final(heun(watching, noise(2, (1, 1, 2)).double(), grid(FLOW, 4)))
    assert seen == [1000, 750, 750, 500, 500, 250, 250]


# ------------------------------------------------------------------------------------- seeds, state, arguments


@pytest.mark.parametrize("name", ["euler", *RENEWING])
def test_same_seed_gives_the_same_image_at_any_batch_size(name, toy_network):
    """4 x 9 x 9 is not a multiple of 16, so one draw for the whole batch would differ from one draw per image."""
    sampler, levels = ANY[name], grid(SD, 8)

    def images(seeds):
        generators = make_generators(seeds)
        x = initial_noise((4, 9, 9), generators)
        return final(sampler(denoiser(toy_network, None, "v"), x, levels, generators=generators))

    together = images([5, 6, 7])
    for i, seed in enumerate([5, 6, 7]):
        torch.testing.assert_close(images([seed])[0], together[i], rtol=1e-5, atol=1e-5)
    assert torch.equal(images([5, 6, 7]), together)
    assert (images([8, 6, 7])[0] - together[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", RENEWING)
def test_stochastic_samplers_renew_the_noise_at_every_step(name, toy_network):
    x, levels = noise(2), grid(SD, 8)
    runs = [
        final(ANY[name](denoiser(toy_network, None, "v"), x, levels, generators=make_generators(seeds)))
        for seeds in ([1, 2], [1, 3])
    ]
    assert torch.equal(runs[0][0], runs[1][0]) and (runs[0][1] - runs[1][1]).abs().max() > 0.1


def test_noise_is_drawn_per_image_in_float32_and_equals_the_sequential_draws():
    x = initial_noise((4, 9, 9), make_generators([3, 4]))
    again = torch.stack([torch.randn(4, 9, 9, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    assert torch.equal(x, again) and x.dtype == torch.float32
    generators = make_generators([3, 4])
    assert torch.equal(randn_like(x.double(), generators), again.double())
    assert not torch.equal(randn_like(x, generators), again)  # the generators have advanced


@pytest.mark.parametrize("name", RENEWING)
def test_missing_generators_are_named(name, image_mixture):
    for generators in (None, make_generators([1])):
        with pytest.raises(ValueError, match="2 images need 2 generators, got (none|1): use make_generators"):
            final(ANY[name](image_mixture, noise(2, (1, 1, 2)), grid(SD, 4), generators=generators))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_change_none_of_their_arguments_and_hold_no_state(name, toy_network):
    x, levels = noise(2), grid(SD, 5)
    x_before, levels_before = x.clone(), list(levels)
    denoise = denoiser(toy_network, None, "v")
    runs = [list(SAMPLERS[name](denoise, x, levels, generators=make_generators([1, 2]))) for _ in range(2)]
    assert torch.equal(x, x_before) and levels == levels_before
    for one, other in zip(*runs):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert len({step[0].data_ptr() for step in runs[0]}) == len(runs[0]) > 1  # what was yielded is not overwritten later
    assert name == "adaptive" or len(runs[0]) == 5


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_record_no_gradients_and_leave_the_callers_mode_alone(name):
    weight = torch.ones(1, requires_grad=True)
    for x, x0 in SAMPLERS[name](lambda x, level: weight * x, noise(1), grid(SD, 3), generators=make_generators([0])):
        assert not x.requires_grad and not x0.requires_grad and torch.is_grad_enabled()


def test_names_are_found_in_any_spelling_and_unknown_ones_name_the_nearest():
    for spelling in ("DPM++ 2M", "dpm++-2m", "dpmpp_2m", "DPMPP_2M", "dpmpp2m"):
        assert find_sampler(spelling) is dpmpp_2m
    assert find_sampler("Euler") is euler and find_sampler(" DDIM ") is ddim
    names = {"DPM++ 2M SDE": "dpmpp_2m_sde", "DPM++ SDE": "dpmpp_sde", "EDM": "edm", "Euler a": "euler_a",
             "euler_ancestral": "euler_a", "PLMS": "pndm", "UniPC": "unipc"}
    assert {spelling: sampler_name(spelling) for spelling in names} == names
    with pytest.raises(ValueError, match="unknown sampler 'hein': did you mean 'heun'"):
        find_sampler("hein")


def test_a_grid_of_one_level_is_no_step():
    with pytest.raises(ValueError, match="at least two levels"):
        final(euler(lambda x, level: x, noise(1), grid(SD, 3)[:1]))
