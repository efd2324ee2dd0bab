import math
from functools import partial

import pytest
import torch

from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import denoiser
from tinyldm.diffusion.prediction import PREDICTIONS
from tinyldm.diffusion.process import PROCESSES, Level, make_process
from tinyldm.diffusion.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    euler_a,
    final,
    find_sampler,
    heun,
    initial_noise,
    lms,
    make_generators,
    pndm,
    randn_like,
    sampler_name,
    signal,
    unipc,
)

SD = make_process("scaled_linear")
FLOW = make_process("flow")
STOCHASTIC = {"ddpm": ddpm, "euler_a": euler_a, "ddim eta=1": partial(ddim, eta=1.0)}


def noise(n, shape=(4, 6, 6)):
    return initial_noise(shape, make_generators(range(n)))


# ------------------------------------------------------------------------------------------------ accuracy

# Where each grid starts and stops. Not at t = 0: there sigma grows like sqrt(t) on vp, which no method of finite
# order resolves. DPM++ starts at finite log(alpha / sigma), because its step from alpha = 0 is of first order.
SPANS = {"vp": (1.0, 0.02), "cosine": (0.98, 0.02), "flow": (0.98, 0.02)}
COARSE, FINE = (80, 160, 320), (640, 1280, 2560)
# The order, the step counts where it shows, and the steps left off at the end. lms starts at first order, which in the
# end is what remains of its error; unipc's last step is of first order, and short of it its corrector shows.
ORDERS = {
    "ddim": (1, COARSE, 0),
    "euler": (1, COARSE, 0),
    "heun": (2, COARSE, 0),
    "lms": (2, FINE, 0),
    "pndm": (2, FINE, 0),
    "pndm along v": (1, COARSE, 0),
    "dpmpp_2m": (2, COARSE, 0),
    "unipc": (3, FINE, 1),
}


def measured_order(sampler, mixture, curve_levels, curve, span, counts=COARSE, short=0):
    """The slope of log(error) in log(step): against the exact solution, not against a finer run."""
    errors = []
    for steps in counts:
        levels = curve_levels(curve, steps, *span)
        x = noise(256, (1, 1, 1)).double()
        exact = mixture.carry(x, levels[0], levels[-1 - short])
        found = list(sampler(mixture, x, levels))[-1 - short][0]
        errors.append((found - exact).abs().mean().item())
    assert errors[-1] < 5e-3
    return math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0])


@pytest.mark.parametrize("curve", SPANS)
@pytest.mark.parametrize("name", ORDERS)
def test_deterministic_samplers_converge_at_their_order(name, curve, pixel_mixture, curve_levels):
    order, counts, short = ORDERS[name]
    sampler = {**SAMPLERS, "pndm along v": partial(pndm, along="v")}[name]
    found = measured_order(sampler, pixel_mixture, curve_levels, curve, SPANS[curve], counts, short)
    assert found == pytest.approx(order, abs=0.2)


def test_every_deterministic_sampler_has_its_order_measured():
    assert set(SAMPLERS) - set(STOCHASTIC) <= set(ORDERS)


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


def test_heun_is_of_second_order_in_the_coordinate_of_its_paper_too(pixel_mixture, curve_levels):
    def published(*args):
        return heun(*args, scale=lambda level: level.alpha)

    assert measured_order(published, pixel_mixture, curve_levels, "vp", SPANS["vp"]) == pytest.approx(2, abs=0.2)


def test_heun_keeps_its_order_from_pure_noise(pixel_mixture, curve_levels):
    order = measured_order(heun, pixel_mixture, curve_levels, "flow", (1.0, 0.02))
    assert order == pytest.approx(2, abs=0.2)


def statistics(mixture, x):
    """Per mode: its share of the samples, its mean, its standard deviation."""
    away = (x[:, None] - mixture.mean).square().sum((2, 3, 4)) / mixture.std**2
    nearest = (away / 2 + mixture.mean[0].numel() * mixture.std.log() - mixture.weight.log()).argmin(1)
    groups = [x[nearest == k] for k in range(len(mixture.std))]
    share = torch.tensor([len(group) / len(x) for group in groups])
    mean = torch.stack([group.mean(0) for group in groups])
    std = torch.stack([(group - group.mean(0)).square().mean().sqrt() for group in groups])
    return share, mean, std


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", PROCESSES)
def test_any_process_and_prediction_make_the_same_denoiser(name, kind, image_mixture):
    """Samplers see nothing but the denoiser, so what they do with one prediction they do with all."""
    process = make_process(name)
    denoise = denoiser(image_mixture.network(process, kind), None, kind)
    x = noise(16, (1, 1, 2)).double()
    for level in grid(process, 30)[1 if kind == "eps" and name == "flow" else 0 : -1]:
        torch.testing.assert_close(denoise(x, level), image_mixture(x, level), rtol=1e-7, atol=1e-7)


KINDS = [*PREDICTIONS]
# Every process with every sampler; the predictions rotate, so that each meets every process and every sampler.
TRIPLES = [
    (process, KINDS[(i + j) % 4], sampler)
    for i, process in enumerate(PROCESSES)
    for j, sampler in enumerate([*SAMPLERS, "ddim eta=0.3"])
]


@pytest.mark.parametrize("process_name, kind, name", TRIPLES)
def test_any_process_prediction_and_sampler_draw_from_the_mixture(process_name, kind, name, image_mixture):
    """Shares, means and standard deviations of the modes. With 2000 draws the smallest mode's mean scatters by
    0.02; the first-order samplers add a bias of 0.03 at 60 steps (0.005 at second order; the ancestral ones 0.03 at
    100)."""
    process, mixture, n = make_process(process_name), image_mixture, 2000
    sampler = {**SAMPLERS, "ddim eta=0.3": partial(ddim, eta=0.3)}[name]
    levels = grid(process, 100 if name in STOCHASTIC else 60, "normal" if process_name == "flow" else "linspace")
    if process_name == "flow" and kind == "eps":
        levels = levels[1:]  # eps-prediction cannot start from alpha = 0
    eps = torch.randn(n, 1, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = levels[0].alpha * mixture.sample(n) + levels[0].sigma * eps  # alpha is 0.07 at most, but it is not 0
    denoise = denoiser(mixture.network(process, kind), None, kind)
    generators = make_generators(range(n)) if name in (*STOCHASTIC, "ddim eta=0.3") else None
    drawn = statistics(mixture, final(sampler(denoise, x, levels, generators=generators)))
    exact = statistics(mixture, mixture.sample(100_000, seed=2))
    for found, wanted, tolerance in zip(drawn, exact, (0.03, 0.08, 0.05)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


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


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("process", [SD, FLOW], ids=["discrete", "flow"])
def test_one_step_jumps_to_the_guess_about_pure_noise(name, process, image_mixture):
    x, levels = noise(3, (1, 1, 2)).double(), grid(process, 1)
    steps = list(SAMPLERS[name](image_mixture, x, levels, generators=make_generators(range(3))))
    assert len(steps) == 1
    for value in steps[0]:
        torch.testing.assert_close(value, image_mixture(x, levels[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_yields_x_and_the_guess_on_the_way_and_ends_on_the_guess(name, image_mixture):
    x, levels = noise(3, (1, 1, 2)).double(), grid(FLOW, 6)
    steps = list(SAMPLERS[name](image_mixture, x, levels, generators=make_generators(range(3))))
    assert len(steps) == 6
    before = [x] + [step[0] for step in steps]
    for start, level, (_, x0) in zip(before, levels, steps):
        assert torch.equal(x0, image_mixture(start, level))
    if name not in ("lms", "pndm"):  # these extrapolate in the last step too
        torch.testing.assert_close(steps[-1][0], steps[-1][1], rtol=1e-12, atol=1e-12)


def test_pndm_takes_its_first_step_twice_and_unipc_corrects_without_another_look(image_mixture):
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


def test_heun_looks_twice_at_every_step_but_the_last(image_mixture):
    seen = []

    def watching(x, level):
        seen.append(level.t)
        return image_mixture(x, level)

    final(heun(watching, noise(2, (1, 1, 2)).double(), grid(FLOW, 4)))
    assert seen == [1000, 750, 750, 500, 500, 250, 250]


# ------------------------------------------------------------------------------------- seeds, state, arguments


@pytest.mark.parametrize("name", ["euler", *STOCHASTIC])
def test_same_seed_gives_the_same_image_at_any_batch_size(name, toy_network):
    """4 x 9 x 9 is no multiple of 16: there a draw for the whole batch differs from one draw per image."""
    sampler, levels = (STOCHASTIC | SAMPLERS)[name], grid(SD, 8)

    def images(seeds):
        generators = make_generators(seeds)
        x = initial_noise((4, 9, 9), generators)
        return final(sampler(denoiser(toy_network, None, "v"), x, levels, generators=generators))

    together = images([5, 6, 7])
    for i, seed in enumerate([5, 6, 7]):
        torch.testing.assert_close(images([seed])[0], together[i], rtol=1e-5, atol=1e-5)
    assert torch.equal(images([5, 6, 7]), together)
    assert (images([8, 6, 7])[0] - together[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_renew_the_noise_at_every_step(name, toy_network):
    x, levels = noise(2), grid(SD, 8)
    runs = [
        final(STOCHASTIC[name](denoiser(toy_network, None, "v"), x, levels, generators=make_generators(seeds)))
        for seeds in ([1, 2], [1, 3])
    ]
    assert torch.equal(runs[0][0], runs[1][0]) and (runs[0][1] - runs[1][1]).abs().max() > 0.1


def test_noise_is_drawn_per_image_in_float32_and_equals_the_sequential_draws():
    x = initial_noise((4, 9, 9), make_generators([3, 4]))
    again = torch.stack([torch.randn(4, 9, 9, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    assert torch.equal(x, again) and x.dtype == torch.float32
    generators = make_generators([3, 4])
    assert torch.equal(randn_like(x.double(), generators), again.double())
    assert not torch.equal(randn_like(x, generators), again)  # the stream moves on


@pytest.mark.parametrize("name", STOCHASTIC)
def test_missing_generators_are_named(name, image_mixture):
    for generators in (None, make_generators([1])):
        with pytest.raises(ValueError, match="2 images need 2 generators, got (none|1): use make_generators"):
            final(STOCHASTIC[name](image_mixture, noise(2, (1, 1, 2)), grid(SD, 4), generators=generators))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_change_none_of_their_arguments_and_hold_no_state(name, toy_network):
    x, levels = noise(2), grid(SD, 5)
    x_before, levels_before = x.clone(), list(levels)
    denoise = denoiser(toy_network, None, "v")
    runs = [list(SAMPLERS[name](denoise, x, levels, generators=make_generators([1, 2]))) for _ in range(2)]
    assert torch.equal(x, x_before) and levels == levels_before
    for one, other in zip(*runs):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert len({step[0].data_ptr() for step in runs[0]}) == 5  # what was yielded is not overwritten later


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_record_no_gradients_and_leave_the_callers_mode_alone(name):
    weight = torch.ones(1, requires_grad=True)
    for x, x0 in SAMPLERS[name](lambda x, level: weight * x, noise(1), grid(SD, 3), generators=make_generators([0])):
        assert not x.requires_grad and not x0.requires_grad and torch.is_grad_enabled()


def test_names_are_found_in_any_spelling_and_unknown_ones_name_the_nearest():
    for spelling in ("DPM++ 2M", "dpm++-2m", "dpmpp_2m", "DPMPP_2M", "dpmpp2m"):
        assert find_sampler(spelling) is dpmpp_2m
    assert find_sampler("Euler") is euler and find_sampler(" DDIM ") is ddim
    names = {"Euler a": "euler_a", "euler_ancestral": "euler_a", "PLMS": "pndm", "UniPC": "unipc"}
    assert {spelling: sampler_name(spelling) for spelling in names} == names
    with pytest.raises(ValueError, match="unknown sampler 'hein': did you mean 'heun'"):
        find_sampler("hein")


def test_a_grid_of_one_level_is_no_step():
    with pytest.raises(ValueError, match="at least two levels"):
        final(euler(lambda x, level: x, noise(1), grid(SD, 3)[:1]))
