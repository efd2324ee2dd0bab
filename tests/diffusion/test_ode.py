"""Inversion and likelihood, on a mixture whose flow and density are known exactly."""

import math

import pytest
import torch
from helpers import thinned

from tinyldm.diffusion.grids import grid
from tinyldm.diffusion.guidance import denoiser
from tinyldm.diffusion.noise import initial_noise, make_generators
from tinyldm.diffusion.ode import invert, log_likelihood
from tinyldm.diffusion.process import CLEAN, make_process
from tinyldm.diffusion.samplers import ddim, final

PROCESSES = [make_process(name) for name in ("flow", "vp", "ve", "cosine")] + [make_process("scaled_linear", zero_snr=True)]


def log_p(mixture, x):
    square = (x[:, None] - mixture.mean).square().sum((2, 3, 4))
    modes = mixture.weight.log() - square / (2 * mixture.std**2) - x[0].numel() / 2 * (2 * math.pi * mixture.std**2).log()
    return modes.logsumexp(1)


def unit_vectors(x):
    """All n of them, for an exact divergence: [n, b, c, h, w]."""
    n = x[0].numel()
    return math.sqrt(n) * torch.eye(n).to(x).view(n, 1, *x.shape[1:]).expand(n, *x.shape)


def distance(a, b):
    return (a - b).square().mean().sqrt().item()


# ---- inversion


@pytest.mark.parametrize("curve", thinned(2, ["vp", "cosine", "flow", "ve"]))
def test_solved_to_the_end_inversion_is_ddim_backwards(image_mixture, curve_levels, curve):
    top = 1.0 if curve == "flow" else 0.99                     # pure noise too
    x, levels = image_mixture.sample(50), curve_levels(curve, 100, top, 0.0)[:-1] + [CLEAN]
    noise = final(invert(image_mixture, x, levels, repeats=50))
    assert distance(final(ddim(image_mixture, noise, levels)), x) < 1e-9


@pytest.mark.parametrize("repeats, falls", [(1, 2.5), (3, 4)])
@pytest.mark.parametrize("curve", ["cosine", "flow", "ve"])
def test_what_is_rebuilt_comes_closer_with_more_steps(image_mixture, curve_levels, curve, repeats, falls):
    x, errors = image_mixture.sample(100), []
    for steps in (50, 100, 200):
        levels = curve_levels(curve, steps, 0.99, 0.0)[:-1] + [CLEAN]
        errors.append(distance(final(ddim(image_mixture, final(invert(image_mixture, x, levels, repeats)), levels)), x))
    assert errors[0] > falls * errors[1] > falls**2 * errors[2]
    assert errors[2] < 2e-3


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_of_a_networks_own_picture_the_noise_is_found_again(toy_network, kind):
    process, errors = make_process("flow"), []
    denoise = denoiser(lambda x, t, cond: 0.3 * toy_network(x, t), None, kind)
    noise = initial_noise((4, 8, 8), make_generators(range(3)))
    for steps in (10, 20, 40):
        levels = grid(process, steps)
        drawn = final(ddim(denoise, noise, levels))
        found = final(invert(denoise, drawn, levels))
        errors.append(distance(final(ddim(denoise, found, levels)), drawn))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 1e-3


def test_the_noise_is_that_of_the_exact_flow(pixel_mixture, curve_levels):
    x, errors = pixel_mixture.sample(100), []
    for steps in (50, 100, 200):
        levels = curve_levels("flow", steps, 1.0, 0.0)
        errors.append(distance(final(invert(pixel_mixture, x, levels, 5)), pixel_mixture.carry(x, CLEAN, levels[0])))
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2 and errors[2] < 0.02


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_inversion_walks_any_grid_from_clean_data_to_its_first_level(image_mixture, process):
    x, levels = image_mixture.sample(20).float(), grid(process, 50)
    before, calls = x.clone(), []
    denoise = lambda x, level: (calls.append(level), image_mixture(x, level).float())[1]
    path = list(invert(denoise, x, levels, repeats=2))
    assert torch.equal(x, before) and len(path) == 50 and calls == [level for level in levels[-2::-1] for _ in range(2)]
    noise = path[-1][0]
    assert noise.dtype == torch.float32 and distance(final(ddim(image_mixture, noise, levels)), x) < 0.1
    assert 0.6 < noise.std() / math.hypot(levels[0].alpha, levels[0].sigma) < 1.4


# ---- likelihood


@pytest.mark.parametrize("curve, bits", thinned(2, [("cosine", 1e-4), ("flow", 1e-4), ("ve", 1e-3), ("vp", 2e-3)]))
def test_bits_per_dimension_equal_the_exact_ones(image_mixture, curve_levels, curve, bits):
    """To 1e-4 where the curve ends in pure noise; VE at sigma 50 and VP at alpha 0.07 take the end for a Gaussian."""
    x, levels = image_mixture.sample(200), curve_levels(curve, 200, 1.0, 0.0)[:-1] + [CLEAN]
    found, exact = log_likelihood(image_mixture, x, levels, unit_vectors(x)), log_p(image_mixture, x)
    assert found.shape == (200,) and found.dtype == torch.float64
    assert abs((found - exact).mean().item()) / (2 * math.log(2)) < bits
    assert (found - exact).abs().max() < (0.005 if bits < 1e-3 else 0.1)


def test_likelihood_is_of_second_order(image_mixture, curve_levels):
    x = image_mixture.sample(100)
    exact, errors = log_p(image_mixture, x), []
    for steps in (50, 100, 200):
        found = log_likelihood(image_mixture, x, curve_levels("flow", steps, 1.0, 0.0), unit_vectors(x))
        errors.append(distance(found, exact))
    assert 3.2 < errors[0] / errors[1] < 5 and 3.2 < errors[1] / errors[2] < 5


def test_probabilities_add_up_to_one(pixel_mixture, curve_levels):
    x = torch.linspace(-5, 5, 501, dtype=torch.float64).view(-1, 1, 1, 1)
    p = log_likelihood(pixel_mixture, x, curve_levels("flow", 200, 1.0, 0.0), torch.ones_like(x)[None]).exp()
    assert torch.trapezoid(p, x.flatten()).item() == pytest.approx(1, abs=1e-3)


def test_random_signs_give_the_divergence_without_bias(image_mixture, curve_levels):
    """Skilling and Hutchinson: 2000 answers about one x scatter around the exact one."""
    x, levels = image_mixture.sample(1).expand(2000, 1, 1, 2), curve_levels("flow", 30, 1.0, 0.0)
    signs = torch.randint(0, 2, (1, *x.shape), generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
    exact = log_likelihood(image_mixture, x[:1], levels, unit_vectors(x[:1]))
    found = log_likelihood(image_mixture, x, levels, signs)
    assert found.std() > 1e-3 and abs(found.mean() - exact).item() < 3 * found.std().item() / math.sqrt(2000) + 1e-9


@pytest.mark.parametrize("process", thinned(2, PROCESSES), ids=str)
def test_likelihood_on_the_grids_that_are_sampled_on(image_mixture, process):
    x = image_mixture.sample(100)
    found = log_likelihood(image_mixture, x, grid(process, 250), unit_vectors(x))
    assert abs((found - log_p(image_mixture, x)).mean().item()) / (2 * math.log(2)) < 0.02


def test_the_likelihood_of_noisy_data_is_that_at_its_level(image_mixture, curve_levels):
    levels = curve_levels("cosine", 200, 1.0, 0.3)
    at = levels[-1]
    x = at.alpha * image_mixture.sample(50) + at.sigma * initial_noise((1, 1, 2), make_generators(range(50))).double()
    noisy = type(image_mixture)(at.alpha * image_mixture.mean, ((at.alpha * image_mixture.std) ** 2 + at.sigma**2).sqrt(),
                                image_mixture.weight)
    torch.testing.assert_close(log_likelihood(image_mixture, x, levels, unit_vectors(x)), log_p(noisy, x), rtol=0, atol=5e-3)


def test_likelihood_keeps_its_arguments_and_works_without_gradients(image_mixture, curve_levels):
    x, levels = image_mixture.sample(3).float(), curve_levels("flow", 20, 1.0, 0.0)
    before, denoise = x.clone(), lambda x, level: image_mixture(x, level).float()
    found = log_likelihood(denoise, x, levels, unit_vectors(x))
    with torch.inference_mode():
        again = log_likelihood(denoise, x, levels, unit_vectors(x))
    assert torch.equal(x, before) and torch.equal(found, again) and found.dtype == torch.float32 and not found.requires_grad


def test_the_likelihood_of_a_standard_gaussian(curve_levels):
    """x0 = alpha x / (alpha^2 + sigma^2): on cosine nothing moves but the coordinate."""
    denoise = lambda x, level: level.alpha * x / (level.alpha**2 + level.sigma**2)
    x = torch.randn(5, 1, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    wanted = torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)
    found = log_likelihood(denoise, x, curve_levels("cosine", 100, 1.0, 0.0), unit_vectors(x))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)
