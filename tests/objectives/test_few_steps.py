"""Few-step objectives on data of which the curve is known: what they are made of has the exact answers."""


import pytest
import torch
from gaussian_curves import along, exact_x0, noise
from helpers import randomise
from mixtures import Mixture

from tinyldm.diffusion.grids import Levels
from tinyldm.diffusion.guidance import denoiser
from tinyldm.diffusion.prediction import to_output, to_target, to_x0
from tinyldm.diffusion.process import CLEAN, Level, make_process
from tinyldm.diffusion.samplers import ddim as ddim_sampler
from tinyldm.diffusion.samplers import euler, final
from tinyldm.diffusion.samplers import heun as heun_sampler
from tinyldm.model import told_too
from tinyldm.models.dit import DiT, DiTConfig
from tinyldm.models.layers import Cond
from tinyldm.models.mmdit import MMDiT, MMDiTConfig
from tinyldm.models.unet import UNet, UNetConfig
from tinyldm.objectives.consistency import PAIRS, Consistency
from tinyldm.objectives.progressive import two_steps
from tinyldm.objectives.scm import tangent
from tinyldm.objectives.teacher import both, ddim, derivative, guess, heun, level_at, pseudo_huber
from tinyldm.pipeline import tell_elapsed

FLOW, CONTINUOUS = make_process("flow"), {name: make_process(name) for name in ("flow", "vp", "ve")}
KINDS = ("eps", "v", "flow")


def nonlinear(x, t, cond=None):
    """A network in x's dtype, smooth in x and t."""
    t = t.view(-1, 1, 1, 1) / 500
    return torch.tanh(x.flip(1) * t.cos() + 0.3 * t) + 0.5 * x * t.sin()


# ---------------------------------------------------------------- what they share


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process", ["scaled_linear", "flow", "vp", "ve"])


def test_every_guess_is_x_itself_at_the_end_of_the_curve(process, kind):
    at = level_at(make_process(process), torch.tensor([0.0, -0.1, 0.5], dtype=torch.float64))
    x = noise(3, 2, 2, 2)
    found = guess(nonlinear, kind, x, at, None)
    assert torch.equal(found[:2], x[:2]) and not torch.allclose(found[2], x[2])


@pytest.mark.parametrize("kind", [*KINDS, "x0"])
@pytest.mark.parametrize("process", ["scaled_linear", "flow", "ve"])


def test_x0_and_eps_of_an_answer_are_those_that_it_is_the_target_of(process, kind):
    at, x0, eps = make_process(process)(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)), noise(3, 2, 2, 2), noise(3, 2, 2, 2, seed=1)
    x, out = at.alpha * x0 + at.sigma * eps, to_target(kind, x0, eps, at)
    for found, wanted in zip(both(kind, x, out, at), (x0, eps)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)
    torch.testing.assert_close(both(kind, x, out, at)[0], to_x0(kind, x, out, at), rtol=0, atol=1e-9)


def test_steps_with_levels_of_their_own_are_those_of_the_samplers():
    t, s = torch.tensor([0.9, 0.6, 0.3]).double(), torch.tensor([0.7, 0.0, 0.1]).double()
    x, (now, nxt) = noise(3, 1, 1, 2), (level_at(CONTINUOUS["vp"], each) for each in (t, s))
    denoise = lambda x, at: exact_x0(x, at)
    for ours, sampler in ((heun, heun_sampler), (lambda denoise, x, now, nxt: ddim(x, denoise(x, now), now, nxt), ddim_sampler)):
        found = ours(denoise, x, now, nxt)
        for i in range(3):
            levels = [Level(*(float(value.flatten()[i]) for value in at)) for at in (now, nxt)]
            torch.testing.assert_close(found[i:i + 1], final(sampler(denoise, x[i:i + 1], levels)), rtol=1e-12, atol=1e-12)


def test_pseudo_huber_is_a_root_mean_square_for_large_errors_and_a_parabola_for_small_ones():
    error = torch.tensor([[3.0, 4.0], [3e-4, 4e-4], [0.0, 0.0]]).view(3, 1, 1, 2).requires_grad_()
    rms = error.detach().square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(pseudo_huber(error, 0.0).detach(), rms, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(pseudo_huber(error, 1.0)[1].item(), rms[1].item() ** 2 / 2, rtol=1e-1, atol=1e-7)
    pseudo_huber(error, 0.0).sum().backward()
    assert torch.equal(error.grad[2], torch.zeros(1, 1, 2)) and error.grad.isfinite().all()


@pytest.mark.parametrize("make", [
    lambda told: DiT(DiTConfig(width=32, layers=1, heads=2, mlp_width=32, context_dim=32, time_dim=16, told=told)),
    lambda told: UNet(UNetConfig(widths=(8, 16), depth=1, attention=(True, True), heads=(2, 2), context_dim=32, groups=4, told=told)).to(
        memory_format=torch.channels_last)], ids=["dit", "unet"])
def test_derivatives_pass_through_attention_and_norms_and_leave_no_gradients(make):
    net = randomise(make(("elapsed",)))
    x, t, v = noise(2, 4, 4, 4).float(), torch.tensor([300.0, 700.0]), noise(2, 4, 4, 4, seed=1).float()
    way, one, h = torch.tensor([0.1, 0.3]), torch.ones(2), 0.01
    call = lambda x, t, way: net(x, t, Cond(noise(2, 3, 32).float(), extra={"elapsed": way}))
    value, change = derivative(call, (x, t, way), (v, one, one / 1000))
    wanted = (call(x + h * v, t + h, way + h / 1000) - call(x - h * v, t - h, way - h / 1000)) / (2 * h)
    assert not change.requires_grad and torch.allclose(value, call(x, t, way), atol=1e-5)
    torch.testing.assert_close(change, wanted.detach(), rtol=2e-2, atol=2e-3 * change.abs().max().item())


def test_a_network_that_is_told_a_number_begins_as_it_was():
    net = randomise(DiT(DiTConfig(width=32, layers=1, heads=2, mlp_width=32, context_dim=32, time_dim=16)))
    x, t, told = noise(2, 4, 4, 4).float(), torch.tensor([300.0, 700.0]), told_too(net, ("elapsed",))
    context = noise(2, 3, 32).float()
    extra = {"elapsed": torch.tensor([0.1, 0.3])}
    assert told.config.told == ("elapsed",) and told_too(told, ("elapsed",)) is told
    assert torch.equal(told(x, t, Cond(context, extra=extra)), net(x, t, Cond(context)))
    torch.nn.init.normal_(told.time_in.told["elapsed"].weight)
    assert not torch.allclose(told(x, t, Cond(context, extra=extra)), net(x, t, Cond(context)))
    with pytest.raises(ValueError, match="told a number by the name elapsed, which is missing"):
        told(x, t, Cond(context))
    with pytest.raises(ValueError, match="cannot be told elapsed: use a network that can .unet, dit"):
        told_too(MMDiT(MMDiTConfig(width=32, layers=1, heads=2, context_dim=32, pooled_dim=8)), ("elapsed",))


# ---------------------------------------------------------------- exact answers


@pytest.mark.parametrize("process", CONTINUOUS)
@pytest.mark.parametrize("kind", KINDS)


def test_the_tangent_is_that_of_finite_differences(process, kind):
    """g = cos(phi) df / dphi along the curve through x whose direction is that of x0, in float64."""
    curve, t, x = CONTINUOUS[process], torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), noise(3, 2, 2, 2)
    now, ends = curve(t), consistent(x, curve(t), noise(3, 2, 2, 2, seed=1))
    cosine = now.alpha / (now.alpha**2 + now.sigma**2).sqrt()
    found = tangent(nonlinear, curve, kind, x, t, None, ends)
    torch.testing.assert_close(found, cosine * directional(curve, kind, x, t, ends, 1e-4), rtol=1e-6, atol=1e-6)


def consistent(x, now, x0):
    """(x0, eps) that imply x."""
    return x0, (x - now.alpha * x0) / now.sigma


def directional(curve, kind, x, t, ends, h):
    """df / dphi along the curve with these ends, by central differences."""
    def at(d):
        level = curve(t + d)
        return guess(nonlinear, kind, level.alpha * ends[0] + level.sigma * ends[1], level, None), torch.atan2(level.sigma, level.alpha)

    (one, phi_one), (two, phi_two) = at(-h), at(h)
    return (two - one) / (phi_two - phi_one)


@pytest.mark.parametrize("process", CONTINUOUS)
def test_the_exact_consistency_function_has_no_tangent(process):
    """Of Gaussian data, with the exact direction; a tenth of the guess has one of that size."""
    curve, t, x = CONTINUOUS[process], torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), noise(3, 1, 1, 2)
    inverse = lambda t: Level(t, *curve(t / 1000)[1:])
    net = lambda x, t, cond: to_output("v", x * scale_of(inverse(t)), along(x * scale_of(inverse(t)), inverse(t), CLEAN), inverse(t))
    now = curve(t)
    ends = consistent(x, now, exact_x0(x, now))
    assert tangent(net, curve, "v", x, t, None, ends).abs().max() < 1e-9
    blurred = lambda x, t, cond: to_output("v", x * scale_of(inverse(t)), exact_x0(x * scale_of(inverse(t)), inverse(t)), inverse(t))
    assert tangent(blurred, curve, "v", x, t, None, ends).abs().max() > 0.01


def scale_of(at):
    return (at.alpha**2 + at.sigma**2).clamp(min=1).sqrt()


def test_one_step_with_the_target_comes_to_where_two_steps_of_the_teacher_come():
    mixture = Mixture(torch.tensor([[-1.5, 0.0], [1.0, 1.0]], dtype=torch.float64).view(2, 1, 1, 2), torch.tensor([0.2, 0.3]).double(),
                      torch.tensor([0.6, 0.4]).double())
    for process in (FLOW, CONTINUOUS["vp"]):
        for end in (0.0, 0.25):
            levels = [Level(*(float(value) for value in level_at(process, torch.tensor([t], dtype=torch.float64))))
                      for t in (0.9, (0.9 + end) / 2, end)]
            x = noise(5, 1, 1, 2)
            as_tensors = [Level(*(torch.tensor(value, dtype=torch.float64).view(1, 1, 1, 1) for value in level)) for level in levels]
            target = two_steps(lambda x, at: mixture(x, Level(*(float(value) for value in at))), x, *as_tensors)
            wanted = final(ddim_sampler(mixture, x, levels))
            one_step = final(ddim_sampler(lambda x, level: target, x, [levels[0], levels[2]]))
            torch.testing.assert_close(one_step, wanted, rtol=1e-10, atol=1e-10)


def test_the_mean_velocity_draws_gaussian_data_exactly_in_one_step_and_in_two():
    def mean_velocity(x, t, cond):
        t = (t.double() / 1000).view(-1, 1, 1, 1)
        r = t - cond.extra["elapsed"].double().view(-1, 1, 1, 1)
        return (x - along(x, Level(0, 1 - t, t), Level(0, 1 - r, r))) / (t - r)

    x, at = noise(4, 1, 1, 2), lambda t: Level(1000 * t, 1 - t, t)
    for times in ([1.0, 0.0], [1.0, 0.4, 0.0]):
        levels = Levels([at(t) for t in times], None)
        net = tell_elapsed(lambda x, t, cond: mean_velocity(x, t, cond), levels)
        drawn = final(euler(denoiser(net, Cond(torch.zeros(4, 1, 1)), "flow"), x, levels))
        torch.testing.assert_close(drawn, along(x, at(1.0), at(0.0)), rtol=1e-6, atol=1e-6)


def test_pairs_of_times_come_closer_in_training_and_lie_on_their_grids():
    rho, option = torch.tensor([0.01, 0.3, 2.0, 40.0], dtype=torch.float64), Consistency.options
    for name in PAIRS:
        gaps = []
        for progress in (0.0, 0.5, 1.0):
            high, low = PAIRS[name](rho, progress, option)
            assert (low >= 0).all() and (low < high).all()
            gaps.append(high - low)
        assert (gaps[0] > gaps[1]).all() and (gaps[1] > gaps[2]).all()
    high, low = PAIRS["ect"](rho, 0.0, option)
    n = 1 + 8 / (1 + rho.exp())                                         # sigmoid(-rho)
    torch.testing.assert_close(low, (rho * (1 - n / 2)).clamp(min=0))
    high, low = PAIRS["ict"](rho, 0.0, option)                         # ten intervals of Karras' grid, 2e-3 to 80
    grid = (torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 11, dtype=torch.float64)) ** 7
    for i in range(4):
        k = int((grid <= rho[i]).sum()) - 1
        assert low[i].item() == pytest.approx(grid[k].item()) and high[i].item() == pytest.approx(grid[k + 1].item())
    assert PAIRS["ict"](rho, 1.0, option)[0].sub(PAIRS["ict"](rho, 1.0, option)[1])[2].item() == pytest.approx(
        7 * 2 ** (6 / 7) * (80 ** (1 / 7) - 0.002 ** (1 / 7)) / 1280, rel=0.01)
